"""Several processes of one run, as `accelerate launch` starts them; without it there is one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # processes may wait for each other so long: one may have more to do than another


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    index: int = 0
    count: int = 1
    device: str | None = None  # None: whatever is best
    state: Any = None  # accelerate's, if there are several

    @classmethod
    def of_environment(cls) -> Processes:
        """As the launcher says."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        import torch
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # without a GPU it would take every process for the only one, unless told so
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, str(state.device), state)

    @property
    def first(self) -> bool:
        """Whether this is the one that shows progress and writes what is of all."""
        return self.index == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.state:
            self.state.wait_for_everyone()

    def leave(self) -> None:
        """Wait until all have done their work, and part; what comes after it is the exit.

        A launcher ends all processes as soon as one fails, and one that exits while it is connected to the others may abort.
        """
        if self.state:
            self.wait()
            self.state.destroy_process_group()

    def gathered(self, mine: list[T]) -> list[T]:
        """What all processes have, the same in each."""
        if not self.state:
            return mine
        from accelerate.utils import gather_object

        return list(gather_object(mine))
