"""Images for those who wait, several at a time: while one batch is drawn, the next one gathers.

Nothing is held back for a batch to fill: whatever waits when the worker is free is drawn together. So a server with one
visitor answers as fast as it can, and one with many draws as many at a time as it may.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mokus.errors import MokusError
from mokus.sizes import Size
from mokus.studio.worker import Worker

CLOSING_SECONDS = 5  # after which another one may be there
SMOOTHING = 0.2  # weight of the last batch in the mean of seconds per image


class Refused(Exception):
    """Not now: try again after so many seconds."""

    def __init__(self, sentence: str, seconds: int, closing: bool = False) -> None:
        super().__init__(sentence)
        self.seconds, self.closing = seconds, closing


@dataclass(frozen=True, eq=False)
class _Wish:
    pack: str | None
    prompt: str
    seed: int
    size: Size
    answer: asyncio.Future[bytes]


class Batches:
    """A bounded queue before the worker. All in one event loop; `run` is its task."""

    def __init__(
        self, worker: Worker, *, batch: int, queue: int, packs: int,
        drawn: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:  # fmt: skip
        """`batch` images at a time, `queue` waiting, `packs` in memory. `drawn(images, seconds)` is told of each batch."""
        self._worker, self._batch, self._queue, self._packs, self._drawn = worker, batch, queue, packs, drawn
        self._waiting: deque[_Wish] = deque()
        self._some = asyncio.Event()
        self.closed = False
        self.drawing = 0  # images, now
        self._pace = 1.0  # seconds per image

    @property
    def waiting(self) -> int:
        """Images that are not being drawn yet."""
        return len(self._waiting)

    def ask(self, pack: str | None, prompt: str, seeds: Sequence[int], size: Size) -> list[asyncio.Future[bytes]]:
        """A PNG for every seed. Raises `Refused` if there is no room for all of them, or it is closing.

        The futures raise `MokusError` for what cannot be drawn, `worker.WorkerDied` and `Refused`.
        """
        if self.closed:
            raise _closing()
        self._waiting = deque(wish for wish in self._waiting if not wish.answer.done())  # some may have gone
        if len(self._waiting) + len(seeds) > self._queue:
            raise Refused(
                f"{len(self._waiting)} images are waiting, and {self._queue} may; try again in {self.patience} s.",
                self.patience,
            )
        loop = asyncio.get_running_loop()
        wishes = [_Wish(pack, prompt, seed, size, loop.create_future()) for seed in seeds]
        self._waiting.extend(wishes)
        self._some.set()
        return [wish.answer for wish in wishes]

    @property
    def patience(self) -> int:
        """Seconds until what waits is drawn, as far as can be told."""
        return max(1, math.ceil((len(self._waiting) + self.drawing) * self._pace))

    def close(self) -> None:
        """Refuse all that has not begun; what is being drawn will be."""
        self.closed = True
        while self._waiting:
            _settle(self._waiting.popleft(), _closing())

    async def run(self) -> None:
        """Draw for ever. Whatever ends it, nobody is left waiting."""
        try:
            while True:
                await self._some.wait()
                if wishes := self._next():
                    await self._draw(wishes)
                else:
                    self._some.clear()
        finally:
            self.close()

    async def _draw(self, wishes: list[_Wish]) -> None:
        loop = asyncio.get_running_loop()
        self.drawing, began = len(wishes), loop.time()
        answers: list[Any] = [_closing()] * len(wishes)
        try:
            call = self._worker.call(
                "draw", wishes=[(w.pack, w.prompt, w.seed) for w in wishes], size=wishes[0].size, packs=self._packs
            )
            answers = await asyncio.wrap_future(call)
            self._pace += SMOOTHING * ((loop.time() - began) / len(wishes) - self._pace)
        except MokusError as error:  # WorkerDied too
            answers = [error] * len(wishes)
        finally:
            self.drawing = 0
            for wish, answer in zip(wishes, answers, strict=True):
                _settle(wish, MokusError(answer) if isinstance(answer, str) else answer)
        self._drawn(sum(isinstance(answer, bytes) for answer in answers), loop.time() - began)

    def _next(self) -> list[_Wish]:
        """The oldest wish, and others that go with it; those that nobody waits for any more are left out."""
        chosen: list[_Wish] = []
        others: deque[_Wish] = deque()
        packs: set[str | None] = {None}
        for wish in self._waiting:
            if wish.answer.done():
                continue
            fits = not chosen or (len(chosen) < self._batch and wish.size == chosen[0].size)
            if fits and len(packs | {wish.pack}) <= self._packs + 1:
                chosen.append(wish)
                packs.add(wish.pack)
            else:
                others.append(wish)
        self._waiting = others
        return chosen


def _closing() -> Refused:
    return Refused("the server is closing; try again.", CLOSING_SECONDS, closing=True)


def _settle(wish: _Wish, answer: bytes | Exception) -> None:
    if wish.answer.done():  # whoever asked has gone
        return
    if isinstance(answer, Exception):
        wish.answer.set_exception(answer)
    else:
        wish.answer.set_result(answer)
