"""Jobs as they are shown: what they are about, how far they are, what came of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mokus.html import loss_curve
from mokus.studio.home import SUFFIX
from mokus.studio.jobs import AGAIN

if TYPE_CHECKING:
    from mokus.studio.home import Home
    from mokus.studio.jobs import Job

LONGEST = 70  # of a text in a title
MOST_POINTS = 400  # of a curve that is fetched again and again


@dataclass(frozen=True)
class View:
    """A job as its card shows it."""

    job: Job
    title: str  # its texts shortened
    whole: str  # the title with all of its texts
    tab: str  # where it is looked at
    state: str
    percent: int | None  # of what is being done now; None while that is unknown
    doing: str
    left: str  # time
    curve: Markup
    previews: list[str]  # addresses
    resumable: bool
    pack: str  # name of the pack it makes or changes


def view(home: Home, job: Job) -> View:
    """How a job is shown."""
    pack = _pack(job)
    running = job.state == "running"
    return View(
        job=job,
        title=_title(job.kind, _short(job.arguments), pack),
        whole=_title(job.kind, job.arguments, pack),
        tab=_tab(job, pack),
        state=job.state,
        percent=round(100 * job.done / job.total) if running and job.total else None,
        doing=(job.what or "loading the model") if running else "",
        left=duration(job.eta) if running and job.eta is not None else "",
        curve=_curve(job.history),
        previews=[home.address(path) for path in job.previews if Path(path).is_file()],
        resumable=job.state in AGAIN,
        pack=pack,
    )


def duration(seconds: float) -> str:
    """Time left, as one would say it."""
    whole = max(1, round(seconds))
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{round(whole / 60)} min"
    return f"{whole / 3600:.1f} h"


def _curve(history: list[list[float]]) -> Markup:
    every = max(1, len(history) // MOST_POINTS)
    points = [(int(step), float(loss)) for step, loss in history[::every]]
    return Markup(loss_curve(points))  # numbers alone, so nothing in it needs to be escaped


def _pack(job: Job) -> str:
    path = job.arguments.get("output") or job.arguments.get("pack") or ""
    return Path(path).name.removesuffix(SUFFIX)


def _short(told: Any) -> Any:
    """The arguments of a job with what is long in them cut."""
    if isinstance(told, str) and len(told) > LONGEST:
        return f"{told[: LONGEST - 1].rstrip()}…"
    if isinstance(told, list):
        return [_short(each) for each in told]
    return {name: _short(each) for name, each in told.items()} if isinstance(told, dict) else told


def _title(kind: str, told: dict[str, Any], pack: str) -> str:
    match kind:
        case "learn":
            return f"Learn “{told['anchor']}”"
        case "bind":
            return f"Bind {_quoted(told['knowledge'])} to {pack}"
        case "unbind":
            return f"Unbind {_quoted(told['knowledge'])} from {pack}"
        case "ask":
            return f"Ask “{told['question']}”"
        case "check":
            return f"Ask {pack} everything"
        case "effects":
            return f"Side effects of “{told['knowledge']}” in {pack}"
        case "create":
            return f"Create “{told['name']}”"
        case "erase":
            return f"Erase {_quoted(told['concepts'])}"
        case "transfer":
            return f"Transfer “{told['answer']}”"
        case _:
            return f"Draw {_quoted(told.get('prompts', []))}"


def _quoted(texts: list[str]) -> str:
    first = f"“{texts[0]}”" if texts else "nothing"
    return f"{first} and {len(texts) - 1} more" if len(texts) > 1 else first


def _tab(job: Job, pack: str) -> str:
    if job.kind == "learn":
        return f"/learn?job={job.id}"
    if job.kind in ("create", "erase", "transfer"):
        return f"/words?job={job.id}"
    if job.kind in ("generate", "compare"):
        return f"/draw?job={job.id}"
    name = pack or Path((job.arguments.get("packs") or [""])[0]).name.removesuffix(SUFFIX)
    return f"/know?pack={name}&job={job.id}"
