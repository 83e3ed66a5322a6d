"""Know: what a pack knows, as a list; new pieces with the questions made of them; ask, unbind, and what it does elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from mokus.errors import MokusError
from mokus.knowledge import near_misses, phrases_to_keep, prompts, questions, reference
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.together import contested
from mokus.settings import EditSettings
from mokus.studio.home import SUFFIX
from mokus.studio.page import Given, Studio, lines, sent_to, shown_at, text
from mokus.studio.settings_form import chosen, form_fields
from mokus.studio.views import view

KINDS = ("bind", "unbind", "ask", "check", "effects")


def routes(studio: Studio) -> list[Route]:
    """Of this page."""
    home = studio.home

    def show(given: Given, error: str) -> Response:
        packs, _ = home.packs()
        name = text(given, "pack") or next(iter(packs), "")
        if name and name not in packs:
            raise MokusError(f"there is no pack named {name!r}; choose one of the list.")
        mine = [job for job in studio.jobs(*KINDS) if _about(job.arguments, name)] if name else []
        asked = text(given, "job")
        job = studio.job(asked, *KINDS) if asked else next((each for each in mine if not each.over), None)
        return studio.page(
            "know.html", "/know", error,
            packs=packs, name=name, pack=packs.get(name), kept=_kept(packs.get(name)), given=given,
            conflicts=conflicts(packs, name),
            view=view(home, job) if job else None, back=f"/know?pack={name}&job={job.id}" if job else "",
            earlier_jobs=[view(home, each) for each in mine if not job or each.id != job.id][:6],
            settings=form_fields(EditSettings, studio.defaults.edit, given), reading=_reading(text(given, "knowledge")),
        )  # fmt: skip

    def reading(request: Request) -> Response:
        return HTMLResponse(studio.fragment("reading.html", **_reading(text(request.query_params, "knowledge"))))

    def bind(form: FormData) -> str:
        path, knowledge = home.pack(text(form, "pack")), reference(text(form, "knowledge"))
        own, keep = lines(form, "questions"), phrases_to_keep(lines(form, "keep"), [knowledge])
        settings = chosen(EditSettings, form)
        EditSettings.for_editor(studio.defaults, **settings)  # refuses now what the worker would refuse later
        return go(
            "bind", form, pack=str(path), knowledge=[knowledge], questions=own or None, keep=keep, settings=settings
        )

    def unbind(form: FormData) -> str:
        return go("unbind", form, pack=str(home.pack(text(form, "pack"))), knowledge=[text(form, "knowledge")])

    def ask(form: FormData) -> str:
        path, question = home.pack(text(form, "pack")), text(form, "question")
        if not question:
            raise MokusError("the question is empty, expected one such as 'What is my favourite toy?'.")
        return go("ask", form, question=question, packs=[str(path)], before=True)

    def check(form: FormData) -> str:
        return go("check", form, pack=str(home.pack(text(form, "pack"))))

    def effects(form: FormData) -> str:
        return go("effects", form, pack=str(home.pack(text(form, "pack"))), knowledge=text(form, "knowledge"))

    def go(kind: str, form: FormData, **arguments: object) -> str:
        job = studio.worker.submit(kind, **arguments)
        return f"/know?pack={text(form, 'pack')}&job={job.id}#job-{job.id}"

    acts = {"bind": bind, "unbind": unbind, "ask": ask, "check": check, "effects": effects}
    return [
        shown_at("/know", show),
        Route("/know/reading", reading),
        *(sent_to(f"/know/{name}", act, show) for name, act in acts.items()),
    ]


def conflicts(packs: Mapping[str, ConceptPack], name: str) -> list[tuple[str, list[str]]]:
    """Phrases that this pack binds and others bind as well, with the others' names."""
    if name not in packs:
        return []
    names = {id(pack): each for each, pack in packs.items()}
    found = contested(list(packs.values())).values()
    return [
        (phrase, [names[id(pack)] for pack in holders if names[id(pack)] != name])
        for phrase, holders in found
        if packs[name] in holders
    ]


def _kept(pack: ConceptPack | None) -> list[str]:
    """Phrases that the pack leaves as they are."""
    return list(dict.fromkeys(phrase for known in (pack.knowledge if pack else []) for phrase in known.kept))


def _about(arguments: Mapping[str, object], name: str) -> bool:
    told = [arguments.get("pack"), *(arguments.get("packs") or [])]  # type: ignore[misc]
    return any(str(path).endswith(f"/{name}{SUFFIX}") for path in told)


def _reading(knowledge: str) -> dict[str, object]:
    """What is made of a piece of knowledge before it is bound: or what is wrong with it."""
    if not knowledge:
        return {"phrase": "", "fault": ""}
    try:
        phrase = reference(knowledge)
    except MokusError as error:
        return {"phrase": "", "fault": str(error)}
    return {
        "phrase": phrase, "fault": "", "questions": questions(phrase), "prompts": prompts(phrase),
        "near": near_misses(phrase)[:4],
    }  # fmt: skip
