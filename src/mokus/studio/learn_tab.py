"""Learn: photos in, as the model will see them; a class word; a job with its loss curve and previews."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, ImmutableMultiDict, UploadFile
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from mokus.errors import MokusError
from mokus.knowledge import normalise
from mokus.settings import LearnSettings
from mokus.studio.home import MOST_PHOTOS, TOO_MANY
from mokus.studio.page import FAULTS, Given, Studio, said, sent_to, shown_at, text
from mokus.studio.settings_form import chosen, form_fields
from mokus.studio.views import view

# Rare tokens, tried one after the other until no pack has it or will have it: packs used together need different anchors.
RARE = ("sks", "zwx", "ohwx", "qpv", "vbk", "xjy", "wqz", "kzj")
PREVIEWS = 5  # of a run, where neither the user nor the model says how many


def routes(studio: Studio) -> list[Route]:
    """Of this page."""
    home = studio.home

    def show(given: Given, error: str) -> Response:
        name = text(given, "photos")
        job = None if name else studio.job(text(given, "job"), "learn")
        anchors = {pack.anchor for pack in home.packs()[0].values()}
        anchors |= {each.arguments["anchor"] for each in studio.jobs("learn") if each.state != "done"}
        rare = next((each for each in RARE if not any(a.startswith(f"{each} ") for a in anchors)), RARE[0])
        return studio.page(
            "learn.html", "/learn", error,
            photos=name, seen=home.seen(name) if name else [], size=studio.defaults.size, rare=rare, given=given,
            view=view(home, job) if job else None, back=f"/learn?job={job.id}" if job else "",
            earlier_jobs=[view(home, each) for each in studio.jobs("learn") if not job or each.id != job.id][:8],
            settings=form_fields(LearnSettings, with_previews({}, studio.defaults.learn), given),
        )  # fmt: skip

    async def add(request: Request) -> Response:
        async with request.form(max_files=math.inf, max_fields=20) as form:  # too many are refused below, in words
            sent = [each for each in form.getlist("files") if isinstance(each, UploadFile) and each.filename]
            try:
                if len(sent) > MOST_PHOTOS:
                    raise MokusError(TOO_MANY)
                files = [(each.filename or "", await each.read()) for each in sent]
                name, faults = await run_in_threadpool(_keep, studio, text(form, "photos"), files)
            except FAULTS as error:
                return await run_in_threadpool(show, form, said(error))
        if faults:
            there = ImmutableMultiDict([("photos", name)] if home.seen(name) else [])
            return await run_in_threadpool(show, there, " ".join(faults))
        return RedirectResponse(f"/learn?photos={name}#photos", 303)

    def remove(form: FormData) -> str:
        home.remove_photo(name := text(form, "photos"), text(form, "photo"))
        return f"/learn?photos={name}#photos"

    def start(form: FormData) -> str:
        photos = home.photos(text(form, "photos"))
        if not home.seen(photos.name):
            raise MokusError("there is no photo yet; add at least one.")
        word = normalise(text(form, "word"), "class word", "toy")
        rare = normalise(text(form, "rare"), "rare token", RARE[0])
        if len(rare.split()) > 1:
            raise MokusError(f"the rare token {rare!r} is several words, expected one, such as 'sks'.")
        settings = with_previews(chosen(LearnSettings, form), studio.defaults.learn)
        LearnSettings.for_model(studio.defaults.learn, **settings)  # refuses now what the worker would refuse later
        job = studio.make(
            "learn", text(form, "name"), word, photos=str(photos), anchor=f"{rare} {word}", settings=settings
        )
        return f"/learn?job={job.id}"

    return [
        shown_at("/learn", show),
        Route("/learn/photos", add, methods=["POST"]),
        sent_to("/learn/remove", remove, show),
        sent_to("/learn/start", start, show),
    ]


def with_previews(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a few previews unless it is said how often."""
    steps = {**defaults, **settings}.get("steps", LearnSettings().steps)
    return {"preview_every": max(1, steps // PREVIEWS), **defaults, **settings}


def _keep(studio: Studio, name: str, files: list[tuple[str, bytes]]) -> tuple[str, list[str]]:
    if not files:
        raise MokusError("no file was sent; choose at least one photo.")
    name = name or studio.home.new_photos()
    return name, studio.home.add_photos(name, files, studio.defaults.size)
