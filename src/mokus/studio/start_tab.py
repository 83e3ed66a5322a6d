"""The first page: the packs that are there, and the ready example for who has none."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from pathlib import Path

from starlette.datastructures import FormData
from starlette.responses import Response
from starlette.routing import Route

from mokus.demo import CHARACTER
from mokus.miniature import example as ready
from mokus.settings import EditSettings, LearnSettings
from mokus.studio.learn_tab import with_previews
from mokus.studio.page import Given, Studio, sent_to, shown_at
from mokus.studio.settings_form import chosen

EXAMPLE = "example"
READY_FOR = "miniature"  # the model that it is of


def routes(studio: Studio) -> list[Route]:
    """Of this page."""

    def show(given: Given, error: str) -> Response:
        packs, faults = studio.home.packs()
        samples = {name: sorted((pack.path / "samples").glob("*.png"))[-1:] for name, pack in packs.items()}
        making = any(job.arguments.get("output") == str(_place()) and not job.over for job in studio.jobs("learn"))
        return studio.page(
            "start.html", "/", error, packs=packs, faults=faults, samples=samples, making=making, phrases=ready.PHRASES,
            ready=studio.model == READY_FOR, shown=ready.SHOWN, pair=[_inline(ready.BEFORE), _inline(ready.AFTER)],
        )  # fmt: skip

    def example(form: FormData) -> str:
        """The ready one, taken in; for other models learned and bound now, as anybody's is."""
        studio.check_free(EXAMPLE)
        if studio.model == READY_FOR:
            studio.home.take(EXAMPLE, ready.FOLDER)
            return f"/draw?pack={EXAMPLE}"
        size, photos, files = studio.defaults.size, studio.home.new_photos(), []
        for number, image in enumerate(ready.photos(size), start=1):
            image.save(file := BytesIO(), "PNG")
            files.append((f"{CHARACTER}-{number}.png", file.getvalue()))
        studio.home.add_photos(photos, files, size)
        learning, binding = chosen(LearnSettings, form), chosen(EditSettings, form)
        job = studio.make(
            "learn", EXAMPLE, photos=str(studio.home.photos(photos)), anchor=ready.ANCHOR,
            settings=with_previews(learning, studio.defaults.learn),
        )  # fmt: skip
        studio.worker.submit("bind", pack=job.arguments["output"], knowledge=ready.PHRASES, settings=binding)
        return f"/learn?job={job.id}"

    def _place() -> str:
        return str(studio.home.packs_folder / f"{EXAMPLE}.pack")

    return [shown_at("/", show), sent_to("/example", example, show)]


def _inline(picture: Path) -> str:
    """The picture as an address that holds all of it, since no folder of the studio does."""
    return f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"
