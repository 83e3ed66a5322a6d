"""How one training is done: in this process alone, or by several on samples of the same steps.

Whatever is random in a step is drawn for all of its samples by every process, from the step's number; then each takes its
own. So a step has the same samples, and the loss the same course, however many processes there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mokus.errors import MokusError
from mokus.training.processes import Processes


class Alone:
    """One process."""

    index, count = 0, 1
    first = True  # whether this process writes what there is to write
    sharded = False  # whether the weights are spread over the processes, and stay so
    keeps = True  # whether the optimiser's state can be had, for checkpoints

    def prepare(self, network: nn.Module, optimiser: Any) -> tuple[Any, Any]:
        """The network to call and the optimiser to step instead of these."""
        return network, optimiser

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean of the processes' losses."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        """Scale the gradients down to this norm; returns the one that they had."""
        return torch.nn.utils.clip_grad_norm_(parameters, most)

    def mean(self, value: Tensor) -> Tensor:
        """Of the processes' values."""
        return value

    def whole(self, state: Any) -> Any:
        """The nested state with whole tensors where it has shards; all processes call it."""
        return state

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside, these can be read where they are kept in pieces that are no tensors."""
        return nullcontext()

    def load(self, optimiser: Any, state: Any) -> None:
        """Give the optimiser a whole state."""
        optimiser.load_state_dict(state)

    @contextmanager
    def by_the_first(self) -> Iterator[bool]:
        """Inside, whether this process does what one of them does; a `MokusError` in there is raised in all of them."""
        yield True

    def wait(self) -> None:
        """Until all are here."""


class Together(Alone):
    """Several processes, by accelerate, as its config says: with copies of the weights (DDP) or shards of them (FSDP2, ZeRO-3).

    What is here for ZeRO-3 has been written after DeepSpeed's documentation and has never been run.
    """

    def __init__(self, processes: Processes) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DistributedType, parse_flag_from_env

        self.processes = processes
        self.index, self.count, self.first = processes.index, processes.count, processes.first
        # the last block's text goes nowhere, so a LoRA there has no gradient
        loose = DistributedDataParallelKwargs(find_unused_parameters=True)
        cpu = processes.state.device.type == "cpu"
        # the weights keep their dtype and the LoRA its float32; DeepSpeed has one dtype for all, its config's
        precision = None if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else "no"
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[loose])
        _shard_on_cpus_too(self.accelerator)
        kind = self.accelerator.distributed_type
        self.zero3 = kind == DistributedType.DEEPSPEED
        self.sharded, self.keeps = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED), not self.zero3

    def prepare(self, network: nn.Module, optimiser: Any) -> tuple[Any, Any]:
        if self.zero3:  # it wants to know, and there is no data loader to ask
            self.accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        network, optimiser = self.accelerator.prepare(network, optimiser)
        return network, optimiser

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(parameters, most)
        return _whole(norm) if isinstance(norm, Tensor) else torch.tensor(float(norm or 0.0))  # DeepSpeed's is a number

    def mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "mean")

    def whole(self, state: Any) -> Any:
        return _whole(state)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        if not self.zero3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    def load(self, optimiser: Any, state: Any) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        spread = {
            i: {
                name: distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
                if isinstance(p, DTensor) and value.shape == p.shape
                else value
                for name, value in state["state"].get(i, {}).items()
            }
            for i, p in enumerate(parameters)
        }
        optimiser.load_state_dict({**state, "state": {i: each for i, each in spread.items() if each}})

    @contextmanager
    def by_the_first(self) -> Iterator[bool]:
        why = ""
        try:
            yield self.first
        except MokusError as error:
            why = str(error)
        if why := self.processes.gathered([why])[0]:
            raise MokusError(why)

    def wait(self) -> None:
        self.processes.wait()


def trainer(processes: Processes) -> Alone:
    """For so many processes."""
    return Alone() if processes.count == 1 else Together(processes)


def _whole(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    return [_whole(each) for each in value] if isinstance(value, list) else value


def _shard_on_cpus_too(accelerator: Any) -> None:
    """Let accelerate shard weights on CPUs, as its config asks and torch can; it does so on GPUs alone."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
