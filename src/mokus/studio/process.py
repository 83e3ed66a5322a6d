"""The worker's process: one model, one loop. It takes what comes through the pipe, one after the other.

Messages to it are ("job", id, kind, arguments, folder, resuming), ("call", number, name, arguments) and ("close",); from it
("progress", id, what, done, total, info), ("preview", id, path), ("over", id, state, result or sentence),
("answer", number, result), ("refused", number, sentence) and, of an error that is ours, ("fault", text) before it dies of it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mokus.console import hush
from mokus.errors import MokusError, Stopped
from mokus.sizes import Size
from mokus.studio.kinds import KINDS, Task

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.studio.shelf import Shelf


def main(pipe: Connection, stop: Any, model: str | None, device: str | None) -> None:
    """Until it is told to close, or the process that started it is gone."""
    for each in (signal.SIGINT, signal.SIGTERM):  # often sent to both: the one that started this one acts on it
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    hush()
    try:
        _Loop(pipe, stop, model, device).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # it is gone
        return
    except Exception as error:  # reported, and then it ends the process: what it left in memory is not to be trusted
        pipe.send(("fault", f"{type(error).__name__}: {error}"))
        raise


def _outlive_nobody() -> None:
    """End with the process that started this one, at once: it may be hours to the next word to it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Loop:
    def __init__(self, pipe: Connection, stop: Any, model: str | None, device: str | None) -> None:
        self.pipe, self.stop, self.source, self.device = pipe, stop, model, device
        self._model: Model | None = None
        self._shelf: Shelf | None = None

    def model(self) -> Model:
        if self._model is None:
            import diffusers.utils.logging
            import transformers.utils.logging

            from mokus.pipeline import load

            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
            self._model = load(self.source, self.device)
        return self._model

    def shelf(self) -> Shelf:
        if self._shelf is None:
            from mokus.studio.shelf import Shelf

            self._shelf = Shelf(self.model())
        return self._shelf

    def run(self) -> None:
        while True:
            message, *rest = self.pipe.recv()
            if message == "close":
                return
            if message == "job":
                self.job(*rest)
            else:
                self.call(*rest)

    def job(self, id: str, kind: str, arguments: dict[str, Any], folder: str, resuming: bool) -> None:
        def progress(what: str, done: int, total: int, info: dict[str, Any]) -> None:
            self.pipe.send(("progress", id, what, done, total, info))
            if self.stop.value:
                raise Stopped

        def show(image: Path) -> None:
            self.pipe.send(("preview", id, str(image)))

        if self._shelf:
            self._shelf.clear()  # jobs find the model bare
        task = Task(self.model, Path(folder), resuming, progress, show)
        try:
            result = KINDS[kind](task, **arguments)
        except Stopped:
            self.pipe.send(("over", id, "stopped", None))
        except MokusError as error:
            self.pipe.send(("over", id, "failed", str(error)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise  # of the pipe, not of the job
        except OSError as error:  # of the disk: no room, no permission
            self.pipe.send(("over", id, "failed", f"{error.filename or 'the disk'}: {error.strerror or error}."))
        else:
            self.pipe.send(("over", id, "done", result))

    def call(self, number: int, name: str, arguments: dict[str, Any]) -> None:
        try:
            answer = self.calls[name](self, **arguments)
        except MokusError as error:
            self.pipe.send(("refused", number, str(error)))
        else:
            self.pipe.send(("answer", number, answer))

    def describe(self) -> dict[str, Any]:
        model = self.model()
        usual = model.defaults
        return {
            "id": model.id, "fingerprint": model.fingerprint, "device": str(model.device), "size": usual.size,
            "size_multiple": model.size_multiple, "steps": usual.steps, "true_cfg_scale": usual.true_cfg_scale,
            "negative_prompt": usual.negative_prompt,
        }  # fmt: skip

    def draw(self, wishes: list[tuple[str | None, str, int]], size: Size, packs: int) -> list[bytes | str]:
        return self.shelf().draw(wishes, size, packs)

    def embed(self, pack: str | None, prompt: str, negative: str | None, packs: int) -> bytes:
        return self.shelf().embed(pack, prompt, negative, packs)

    calls: ClassVar[dict[str, Callable[..., Any]]] = {"describe": describe, "draw": draw, "embed": embed}
