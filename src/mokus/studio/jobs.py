"""Jobs as they are kept on disk: HOME/jobs/ID/job.json, and beside it what a job has drawn.

A job.json is written beside its place and moved there, so it is whole whenever a process ends.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mokus.errors import MokusError

STATES = ("waiting", "running", "done", "stopped", "failed", "crashed")
OVER = STATES[2:]
AGAIN = STATES[3:]  # those that can be resumed


@dataclass(frozen=True)
class Job:
    """One piece of work as it stands now."""

    id: str
    kind: str
    arguments: dict[str, Any]
    created: float  # seconds since 1970
    state: str = "waiting"  # one of STATES; crashed: the worker died of it or beside it
    resumed: bool = False
    what: str = ""  # is being done now, and how far it is
    done: int = 0
    total: int = 0
    eta: float | None = None  # seconds until that is done
    history: list[list[float]] = field(default_factory=list)  # of learn: [step, loss]
    previews: list[str] = field(default_factory=list)  # paths of images
    result: Any = None
    error: str | None = None  # one sentence

    @property
    def over(self) -> bool:
        """Whether nothing more comes, unless it is resumed."""
        return self.state in OVER


class Jobs:
    """All jobs of a home, oldest first. Not for several threads at a time."""

    def __init__(self, home: Path) -> None:
        """Read what is there: a job that ran when its process ended has crashed. Raises `MokusError` for a broken file."""
        self._folder = home / "jobs"
        self._folder.mkdir(parents=True, exist_ok=True)
        found = [_read(file) for file in self._folder.glob("*/job.json")]
        self._jobs = {job.id: job for job in sorted(found, key=lambda job: int(job.id))}
        self._last = 0  # the highest number given, which is not given again to another job
        for job in list(self):
            if job.state == "running":
                self.put(job.id, state="crashed", eta=None, error="MoKus ended while this ran; it can be resumed.")

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __getitem__(self, id: str) -> Job:
        """Raises `MokusError` if there is no such job."""
        if id not in self._jobs:
            raise MokusError(f"there is no job {id[:40]!r}; the list of jobs has those that are.")
        return self._jobs[id]

    def folder(self, id: str) -> Path:
        """Where a job's images go."""
        return self._folder / self[id].id

    def new(self, kind: str, arguments: Mapping[str, Any]) -> Job:
        """A waiting job. Raises `MokusError` for arguments that are not plain JSON."""
        try:
            plain = json.loads(json.dumps(dict(arguments), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise MokusError(f"the arguments of {kind} are no plain JSON ({error}); give paths as text.") from error
        self._last = max(self._last, *(int(path.name) for path in self._folder.iterdir() if path.name.isdigit()), 0) + 1
        job = Job(f"{self._last:06d}", kind, plain, time.time())
        (self._folder / job.id).mkdir()
        self._write(job)
        self._jobs[job.id] = job
        return job

    def put(self, id: str, keep: bool = True, **changes: Any) -> Job:
        """Change a job; on disk, too, unless `keep` is off, for what changes many times a second.

        If it cannot be written it is not changed.
        """
        job = replace(self[id], **changes)
        if keep:
            self._write(job)
        self._jobs[id] = job
        return job

    def forget(self, id: str) -> None:
        """Take a job that is over off the list and off the disk, with all that it has drawn."""
        (self.folder(id) / "job.json").unlink(missing_ok=True)  # first: without it the folder is no job
        shutil.rmtree(self.folder(id), ignore_errors=True)
        del self._jobs[id]

    def _write(self, job: Job) -> None:
        file = self._folder / job.id / "job.json"
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps(asdict(job), ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(beside, file)


def _read(file: Path) -> Job:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        job = Job(**{each.name: values[each.name] for each in fields(Job)})
    except (ValueError, KeyError, TypeError) as error:
        raise MokusError(f"{file} is no job that MoKus wrote ({error}); move its folder elsewhere.") from error
    if job.id != file.parent.name or not job.id.isdigit() or job.state not in STATES:
        raise MokusError(f"{file} is no job that MoKus wrote; move its folder elsewhere.")
    return job
