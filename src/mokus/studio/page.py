"""What the tabs share: pages from templates, forms that say what is wrong beside what was typed, and where things are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, ImmutableMultiDict
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from mokus.errors import MokusError
from mokus.studio.home import Home

if TYPE_CHECKING:
    from mokus.pipeline import Defaults
    from mokus.studio.jobs import Job
    from mokus.studio.worker import Worker

Given = ImmutableMultiDict[Any, Any]  # of a query or a form
Show = Callable[[Given, str], Response]  # what was given, and what is wrong with it
Act = Callable[[FormData], str]  # returns the address to go to; raises `MokusError`

TABS = (("/learn", "Learn"), ("/know", "Know"), ("/draw", "Draw"), ("/words", "Words"), ("/benchmark", "Benchmark"))
MOST_IMAGES = 200  # of one job
UNUSABLE = 422  # the status of a page that says what is wrong
FAULTS = (MokusError, OSError)  # of the user, and of the disk: no room, no permission


class Studio:
    """The parts that the tabs work with."""

    def __init__(
        self, home: Home, worker: Worker, model: str, defaults: Defaults, reports: Sequence[Path] = ()
    ) -> None:
        self.home, self.worker, self.model, self.defaults = home, worker, model, defaults
        self.trouble = ""  # why the model could not be loaded, on every page
        self.reports = [home.reports_folder, *reports]
        self._naming = threading.Lock()  # a button may be pressed twice
        self._templates = Environment(
            loader=PackageLoader("mokus.studio"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self._templates.globals.update(tabs=TABS, address=home.address, model=model)

    def fragment(self, template: str, **values: Any) -> str:
        """A piece of a page; what users wrote is escaped by the templates."""
        return self._templates.get_template(template).render(**values)

    def page(self, template: str, here: str = "", error: str = "", **values: Any) -> HTMLResponse:
        """A page; with an error its status says so, too. `here`: the tab's address."""
        content = self.fragment(template, here=here, error=error, trouble=self.trouble, **values)
        return HTMLResponse(content, UNUSABLE if error else 200)

    def jobs(self, *kinds: str) -> list[Job]:
        """Jobs of these kinds, the newest first."""
        return [job for job in self.worker.jobs() if job.kind in kinds]

    def job(self, id: str, *kinds: str) -> Job | None:
        """The job of that id; without an id, the newest of these kinds that is not over.

        Raises `MokusError` if there is none, or it is of another kind.
        """
        if id:
            job = self.worker.job(id)
            if job.kind not in kinds:
                raise MokusError(f"job {id} ({job.kind}) is shown elsewhere; the list of jobs leads there.")
            return job
        return next((job for job in self.jobs(*kinds) if not job.over), None)

    def check_free(self, name: str) -> None:
        """Raise `MokusError` for a name that no new pack can have."""
        self.home.new_pack(name, self._promised())

    def make(self, kind: str, name: str, like: str = "", /, **arguments: Any) -> Job:
        """A job that makes a new pack of that name; without a name, of one like another.

        Raises `MokusError` for a name that no new pack can have.
        """
        with self._naming:
            promised = self._promised()
            output = self.home.new_pack(name or self.home.free_name(like, promised), promised)
            return self.worker.submit(kind, output=str(output), **arguments)

    def _promised(self) -> set[str]:
        """Where jobs write packs that are not done, or can be resumed."""
        unfinished = [job.arguments for job in self.worker.jobs() if job.state != "done"]
        return {told["output"] for told in unfinished if "output" in told}


def shown_at(path: str, show: Show) -> Route:
    """A page."""

    def endpoint(request: Request) -> Response:
        return show(request.query_params, "")

    return Route(path, endpoint, methods=["GET"])


def said(error: Exception) -> str:
    """One of `FAULTS` in a sentence."""
    return f"{error.filename or 'the disk'}: {error.strerror or error}." if isinstance(error, OSError) else str(error)


def sent_to(path: str, act: Act, show: Show) -> Route:
    """A form: it acts and goes on, or shows its page again with what was typed and what is wrong with it."""

    async def endpoint(request: Request) -> Response:
        async with request.form(max_files=0, max_fields=400) as form:
            try:
                where = await run_in_threadpool(act, form)
            except FAULTS as error:
                return await run_in_threadpool(show, form, said(error))
        return RedirectResponse(where, 303)

    return Route(path, endpoint, methods=["POST"])


def text(given: Mapping[str, Any], name: str, default: str = "") -> str:
    """One line of what was given; of a file that was sent in its place, nothing."""
    value = given.get(name, default)
    return value.strip() if isinstance(value, str) else default


def lines(given: Mapping[str, Any], name: str) -> list[str]:
    """Of what was given, the lines that say something, each once."""
    return list(dict.fromkeys(line.strip() for line in text(given, name).splitlines() if line.strip()))


def check_images(images: int) -> None:
    """Raise `MokusError` for a job that would keep the model busy for hours."""
    if images > MOST_IMAGES:
        raise MokusError(
            f"that is {images:,} images, expected at most {MOST_IMAGES} at a time; take fewer prompts or seeds, or draw on "
            "the command line."
        )


def local(path: str, default: str) -> str:
    """A path to go back to: of this site, whatever was sent."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else default
