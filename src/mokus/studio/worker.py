"""A worker: one model in a process of its own, and a queue of jobs for it.

Long work is submitted as a *job*, which is on disk (`jobs`) and outlives both processes. What must be quick and needs no
memory, an image for somebody who waits, is a *call*: a future. Both go through the same pipe to the same loop (`process`), a
call never behind a job that has not begun. If that process dies, what ran has crashed and can be resumed; the next work
starts another one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from mokus.errors import MokusError
from mokus.studio import process
from mokus.studio.jobs import AGAIN, Job, Jobs
from mokus.studio.kinds import check_call
from mokus.training import checkpoint

WRITE_SECONDS = 1.0  # between two writings of how far a job is
CLOSE_SECONDS = 60.0  # for what runs to stop


class WorkerDied(MokusError):
    """The worker's process ended while it worked at a call; the next call starts another one."""


class Worker:
    """One model in a process of its own, and a queue of jobs for it, kept on disk so that they survive this process too.

    For several threads. One at a time may have a home. What was waiting there goes on at once.
    """

    def __init__(self, home: Path, model: str | None = None, device: str | None = None) -> None:
        """`model`, `device` as in `mokus.load`; the model is loaded with the first work that needs it.

        Raises `MokusError` if another process has this home, or what is in it is broken.
        """
        home = Path(home).resolve()
        home.mkdir(parents=True, exist_ok=True)
        self._home_lock = FileLock(home / ".lock")
        try:
            self._home_lock.acquire(timeout=0)
        except Timeout as error:
            raise MokusError(f"another MoKus works in {home}; close that one, or name another folder.") from error
        self._changed = threading.Condition(threading.RLock())
        try:
            self._jobs = Jobs(home)
        except MokusError:
            self._home_lock.release()
            raise
        self._queue = [job.id for job in self._jobs if job.state == "waiting"]
        self._source = (model, device)
        self._child: _Child | None = None
        self._busy: str | None = None  # the job that the child has
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = 0
        self._closing = False
        self._pace = _Pace()
        atexit.register(self.close)  # before the interpreter's own, which would wait for a process that hears no signal
        with self._changed:
            self._advance()

    # --- jobs ---------------------------------------------------------

    def submit(self, kind: str, **arguments: Any) -> Job:
        """Put a job at the end of the queue. Kinds and arguments are the functions of `kinds`, in plain JSON.

        Raises `MokusError` for a kind that there is not, or arguments that do not go with it.
        """
        check_call(kind, arguments)
        with self._changed:
            self._check_open()
            job = self._jobs.new(kind, arguments)
            self._queue.append(job.id)
            self._advance()
            return self.job(job.id)

    def job(self, id: str) -> Job:
        """The job as it stands now. Raises `MokusError` if there is none."""
        with self._changed:
            job = self._jobs[id]
            return replace(job, history=list(job.history), previews=list(job.previews))

    def jobs(self) -> list[Job]:
        """All of them, the newest first."""
        with self._changed:
            return [self.job(job.id) for job in self._jobs][::-1]

    def folder(self, id: str) -> Path:
        """Where a job's images are."""
        with self._changed:
            return self._jobs.folder(id)

    def stop(self, id: str) -> None:
        """Take a waiting job out of the queue; tell a running one to end, which learn does with a checkpoint.

        That takes a step of it; see `wait`. One that is over stays as it is.
        """
        with self._changed:
            if self._jobs[id].state == "waiting":
                self._put(id, state="stopped")
                self._queue.remove(id)
            elif id == self._busy and self._child:
                self._child.stop.value = 1

    def resume(self, id: str) -> Job:
        """Queue a job again that was stopped, failed or crashed; learn goes on from its checkpoint if there is one.

        Raises `MokusError` for a job in another state.
        """
        with self._changed:
            self._check_open()
            if (job := self._jobs[id]).state not in AGAIN:
                raise MokusError(f"job {id} is {job.state}; only one that was stopped, failed or crashed is resumed.")
            self._put(id, state="waiting", resumed=True, what="", done=0, total=0, eta=None, error=None)
            self._queue.append(id)
            self._advance()
            return self.job(id)

    def forget(self, id: str) -> None:
        """Take a job that is over off the list, with its images and, of a `learn` that is not done, its checkpoint.

        So its name is free again; a finished pack stays. Raises `MokusError` for a job that waits or runs.
        """
        with self._changed:
            if not (job := self._jobs[id]).over:
                raise MokusError(f"job {id} is {job.state}; stop it before it is forgotten.")
            if job.kind == "learn" and job.state != "done":
                checkpoint.remove(checkpoint.checkpoint_of(Path(job.arguments["output"])))
            self._jobs.forget(id)
            self._changed.notify_all()

    def wait(self, id: str, timeout: float | None = None) -> Job:
        """Wait until a job is over, or for so many seconds; the job as it then stands."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs[id].over or (self._closing and id != self._busy), timeout)
            return self.job(id)

    # --- calls ---------------------------------------------------------

    def call(self, name: str, **arguments: Any) -> Future[Any]:
        """Something quick, of which nothing is kept: see `process`. Done before any job that has not begun.

        The future raises `MokusError` for what cannot be done, and `WorkerDied`.
        """
        with self._changed:
            self._check_open()
            self._numbers += 1
            future: Future[Any] = Future()
            future.set_running_or_notify_cancel()  # it cannot be called back
            self._calls[self._numbers] = future
            self._running().send(("call", self._numbers, name, arguments))
            return future

    # --- the end ---------------------------------------------------------

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Stop what runs, as `stop` does, and end the process, by force after so many seconds. What waits, waits on."""
        with self._changed:
            self._closing, child = True, self._child
            if child:
                child.stop.value = 1
                child.send(("close",))
        if child:
            child.end(timeout)
        self._home_lock.release()
        atexit.unregister(self.close)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process, if one runs."""
        child = self._child
        return child.process.pid if child else None

    # --- inside ---------------------------------------------------------

    def _check_open(self) -> None:
        if self._closing:
            raise MokusError("the worker is closed; start another one.")

    def _running(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._source, self._heard, self._died)
        return self._child

    def _advance(self) -> None:
        """Give the child its next job, if it has none."""
        if self._busy or self._closing or not self._queue:
            return
        id, child = self._queue[0], self._running()
        job = self._put(id, state="running")  # if that fails it waits on
        self._busy = self._queue.pop(0)
        child.stop.value = 0
        child.send(("job", id, job.kind, job.arguments, str(self._jobs.folder(id)), job.resumed))

    def _put(self, id: str, **changes: Any) -> Job:
        try:
            return self._jobs.put(id, **changes)
        finally:
            self._changed.notify_all()

    def _end(self, id: str, **changes: Any) -> None:
        """What became of the job that the child had: so it is here, even if it cannot be written down."""
        self._busy = None
        self._jobs.put(id, keep=False, eta=None, **changes)
        self._put(id)

    def _heard(self, message: str, *rest: Any) -> None:
        """What the child says; in the thread that listens to it."""
        with self._changed:
            if message == "progress":
                self._progress(*rest)
            elif message == "preview":
                id, path = rest
                self._put(id, previews=[*(old for old in self._jobs[id].previews if old != path), path])
            elif message == "over":
                id, state, told = rest
                self._end(id, state=state, **{"result" if state == "done" else "error": told})
                self._advance()
            elif message == "answer":
                self._calls.pop(rest[0]).set_result(rest[1])
            elif message == "refused":
                self._calls.pop(rest[0]).set_exception(MokusError(rest[1]))

    def _progress(self, id: str, what: str, done: int, total: int, info: dict[str, Any]) -> None:
        job, now = self._jobs[id], time.monotonic()
        fresh = what != job.what or done < job.done
        history = job.history
        if "loss" in info:
            while history and history[-1][0] >= done:  # it goes on from an earlier checkpoint
                history.pop()
            history.append([done, info["loss"]])
        eta = self._pace.left(fresh, done, total, now)
        self._jobs.put(id, keep=self._pace.due(now), what=what, done=done, total=total, eta=eta, history=history)
        self._changed.notify_all()

    def _died(self, child: _Child, reason: str) -> None:
        """The child has ended, and nothing more is heard of it."""
        with self._changed:
            if self._child is child:
                self._child = None
            calls, self._calls = self._calls, {}
            for future in calls.values():  # first: the disk may be full
                future.set_exception(WorkerDied(f"the worker died ({reason}); try again."))
            try:
                if id := self._busy:
                    self._end(id, state="crashed", error=f"the worker died ({reason}); the job can be resumed.")
            finally:
                self._advance()


class _Pace:
    """When what is being done will be done, and when it is time to write that down."""

    def __init__(self) -> None:
        self._began = self._first = self._wrote = 0.0

    def left(self, fresh: bool, done: int, total: int, now: float) -> float | None:
        """Seconds, from the pace since the first step that was heard of."""
        if fresh:
            self._began, self._first = now, done
        steps = done - self._first
        return (now - self._began) / steps * (total - done) if steps > 0 else None

    def due(self, now: float) -> bool:
        if now - self._wrote < WRITE_SECONDS:
            return False
        self._wrote = now
        return True


class _Child:
    """The process, a thread that listens to it, and one that speaks to it, so that nobody waits for a full pipe."""

    def __init__(
        self, source: tuple[str | None, str | None], heard: Callable[..., None], died: Callable[[_Child, str], None]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop = context.RawValue("b", 0)  # bare: a lock could be held by a process that was killed
        self._pipe, theirs = context.Pipe()
        self._heard, self._died, self._fault = heard, died, ""
        self._out: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.process = context.Process(target=process.main, args=(theirs, self.stop, *source), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is heard here
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        threading.Thread(target=self._speak, daemon=True).start()

    def send(self, message: tuple[Any, ...]) -> None:
        self._out.put(message)

    def end(self, timeout: float) -> None:
        """Wait for it to end, and make it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
        self._listener.join()

    def _speak(self) -> None:
        with suppress(OSError):  # it died, which the listener tells
            while (message := self._out.get()) is not None:
                self._pipe.send(message)

    def _listen(self) -> None:
        try:
            while (heard := self._receive())[0] != "end":
                if heard[0] == "fault":
                    self._fault = heard[1]
                else:
                    self._heard(*heard)
        finally:  # as a rule because it has ended; or what it said could not be written down
            self.process.kill()
            self.process.join()
            self._out.put(None)
            self._died(self, self._fault or _reason(self.process.exitcode))

    def _receive(self) -> tuple[Any, ...]:
        try:
            return tuple(self._pipe.recv())
        except (EOFError, OSError):
            return ("end",)


def _reason(code: int | None) -> str:
    """Of an exit code, in words."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {each.value for each in signal.Signals} else ""
        return f"signal {-code} {name}".strip() + (", often for want of memory" if -code == signal.SIGKILL else "")
    return f"exit code {code}"
