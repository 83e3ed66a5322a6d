"""Draw: prompts, packs and seeds; the base model beside the customized one at equal seeds."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.datastructures import FormData, ImmutableMultiDict
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from mokus.console import parse_seeds
from mokus.errors import MokusError
from mokus.knowledge import check_text
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.together import contested, shifts_of
from mokus.pictures import grid
from mokus.studio.home import SUFFIX
from mokus.studio.jobs import Job
from mokus.studio.page import Given, Studio, check_images, lines, sent_to, shown_at, text
from mokus.studio.settings_form import number
from mokus.studio.triggers import Piece, pieces
from mokus.studio.views import view

KINDS = ("compare",)


def routes(studio: Studio) -> list[Route]:
    """Of this page."""
    home = studio.home

    def show(given: Given, error: str) -> Response:
        packs, _ = home.packs()
        job = studio.job(text(given, "job"), *KINDS, "generate")
        if job and not given.get("prompts"):
            given = _as_given(job)
        elif not given.get("prompts"):
            given = ImmutableMultiDict([*given.multi_items(), *_first(packs, text(given, "pack"))])
        return studio.page(
            "draw.html", "/draw", error,
            packs=packs, given=given, chosen=given.getlist("pack"), defaults=studio.defaults,
            reading=_reading(given, packs), view=view(home, job) if job else None,
            back=f"/draw?job={job.id}" if job else "",
            earlier_jobs=[view(home, each) for each in studio.jobs(*KINDS) if not job or each.id != job.id][:8],
        )  # fmt: skip

    def reading(request: Request) -> Response:
        return HTMLResponse(studio.fragment("highlights.html", **_reading(request.query_params, home.packs()[0])))

    def start(form: FormData) -> str:
        prompts = lines(form, "prompts")
        if not prompts:
            raise MokusError("there is no prompt; write at least one, such as 'my favourite toy in the snow'.")
        for prompt in prompts:
            check_text(prompt, "prompt", "my favourite toy in the snow")
        packs = {name: home.pack(name) for name in form.getlist("pack") if isinstance(name, str)}
        prefer, seeds = text(form, "prefer"), parse_seeds(text(form, "seeds", "0-3"), "the field of seeds")
        check_images((1 + bool(packs)) * len(prompts) * len(seeds))  # of the base model, and customized
        steps, guidance = _steps(form), _guidance(form)
        _check_together({name: ConceptPack.open(path) for name, path in packs.items()}, prefer)
        job = studio.worker.submit(
            "compare", prompts=prompts, packs=list(map(str, packs.values())), seeds=seeds,
            prefer=str(packs[prefer]) if prefer in packs else None, steps=steps, true_cfg_scale=guidance,
        )  # fmt: skip
        return f"/draw?job={job.id}#job-{job.id}"

    def picture(request: Request) -> Response:
        job = studio.worker.job(request.path_params["id"])
        rows = job.result if job.kind in KINDS and job.state == "done" else []
        if not rows:
            raise MokusError(f"job {job.id} has no images yet; wait until it is done.")
        image = grid([(row["prompt"], _columns(row["images"])) for row in rows])
        image.save(content := BytesIO(), "PNG")
        headers = {"Content-Disposition": f'attachment; filename="grid-{job.id}.png"'}
        return Response(content.getvalue(), media_type="image/png", headers=headers)

    return [
        shown_at("/draw", show),
        Route("/draw/reading", reading),
        sent_to("/draw/start", start, show),
        Route("/draw/{id:str}/grid.png", picture),
    ]


def _columns(images: list[dict[str, Any]]) -> dict[str, list[Image.Image]]:
    columns: dict[str, list[Image.Image]] = {}
    for name, title in (("base", "base model"), ("customized", "with the packs")):
        files = [each[name] for each in images if each.get(name)]
        if files:
            columns[title] = [Image.open(file) for file in files]
    return columns


def _first(packs: Mapping[str, ConceptPack], wanted: str) -> list[tuple[str, str]]:
    """What stands in the form before anything is typed: a pack and a phrase of it."""
    name = wanted if wanted in packs else next(iter(packs), "")
    if not name:
        return [("prompts", "a red star in the snow")]
    known = packs[name].knowledge
    phrase = known[0].text if known else packs[name].anchor
    return [("prompts", f"{phrase} in the snow"), *([] if wanted else [("pack", name)])]


def _as_given(job: Job) -> Given:
    told = job.arguments
    names = [path.rsplit("/", 1)[-1].removesuffix(SUFFIX) for path in told.get("packs", [])]
    prefer = (told.get("prefer") or "").rsplit("/", 1)[-1].removesuffix(SUFFIX)
    optional = {key: str(told[key]) for key in ("steps", "true_cfg_scale") if told.get(key) is not None}
    return ImmutableMultiDict([
        ("prompts", "\n".join(told["prompts"])), ("seeds", seeds_text(told.get("seeds", [0]))), ("prefer", prefer),
        *(("pack", name) for name in names), *optional.items(),
    ])  # fmt: skip


def seeds_text(seeds: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def _reading(given: Given, packs: Mapping[str, ConceptPack]) -> dict[str, Any]:
    """Every prompt in pieces, with what triggers which knowledge; and phrases that several of the packs bind."""
    used = {name: packs[name] for name in given.getlist("pack") if name in packs}
    prefer = text(given, "prefer")
    read: list[list[Piece]] = [pieces(prompt, used, prefer) for prompt in lines(given, "prompts")]
    both = [phrase for phrase, _ in contested(list(used.values())).values()]
    return {"read": read, "used": list(used), "both": both, "prefer": prefer}


def _check_together(packs: Mapping[str, ConceptPack], prefer: str) -> None:
    """Say now, in the words of this page, what the worker would refuse."""
    for phrase, holders in contested(list(packs.values())).values():
        if packs.get(prefer) not in holders:
            raise MokusError(
                f"several of these packs bind {phrase!r}; choose below which one counts, or use fewer of them."
            )
    shifts_of(list(packs.values()), packs.get(prefer))


def _steps(form: FormData) -> int | None:
    steps = number("steps", value, int) if (value := text(form, "steps")) else None
    if steps is not None and steps < 1:
        raise MokusError(f"steps is {steps}, expected at least 1.")
    return steps


def _guidance(form: FormData) -> float | None:
    scale = number("guidance", value, float) if (value := text(form, "true_cfg_scale")) else None
    if scale is not None and scale < 0:
        raise MokusError(f"guidance is {scale:g}, expected a number from 0; 1 is none.")
    return scale
