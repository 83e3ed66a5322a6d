"""The first page: the packs that are there, and the ready example for who has none."""

from __future__ import annotations

from io import BytesIO

from starlette.datastructures import FormData
from starlette.responses import Response
from starlette.routing import Route

from mokus.demo import CHARACTER, KNOWLEDGE, PHOTOS
from mokus.settings import EditSettings, LearnSettings
from mokus.studio.learn_tab import with_previews
from mokus.studio.page import Given, Studio, sent_to, shown_at
from mokus.studio.settings_form import chosen

EXAMPLE = "example"
ANCHOR = "sks toy"
PHRASES = [KNOWLEDGE[0].format(c="toy"), KNOWLEDGE[2]]


def routes(studio: Studio) -> list[Route]:
    """Of this page."""

    def show(given: Given, error: str) -> Response:
        packs, faults = studio.home.packs()
        samples = {name: sorted((pack.path / "samples").glob("*.png"))[-1:] for name, pack in packs.items()}
        making = any(job.arguments.get("output") == str(_place()) and not job.over for job in studio.jobs("learn"))
        return studio.page(
            "start.html", "/", error, packs=packs, faults=faults, samples=samples, making=making, phrases=PHRASES
        )

    def example(form: FormData) -> str:
        """Photos of a character that the miniature has never seen, drawn now; learned and bound as anybody's are."""
        from mokus.miniature import world

        output, size = studio.home.new_pack(EXAMPLE), studio.defaults.size
        photos, files = studio.home.new_photos(), []
        for number, image in enumerate(world.character_photos(CHARACTER, PHOTOS, seed=0, size=size), start=1):
            image.save(file := BytesIO(), "PNG")
            files.append((f"{CHARACTER}-{number}.png", file.getvalue()))
        studio.home.add_photos(photos, files, size)
        learning, binding = chosen(LearnSettings, form), chosen(EditSettings, form)
        job = studio.worker.submit(
            "learn", photos=str(studio.home.photos(photos)), anchor=ANCHOR, output=str(output),
            settings=with_previews(learning, studio.defaults.learn),
        )  # fmt: skip
        studio.worker.submit("bind", pack=str(output), knowledge=PHRASES, settings=binding)
        return f"/learn?job={job.id}"

    def _place() -> str:
        return str(studio.home.packs_folder / f"{EXAMPLE}.pack")

    return [shown_at("/", show), sent_to("/example", example, show)]
