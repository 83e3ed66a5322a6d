"""What the machine has: bytes on the GPU, in the host and on the disk, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # there, of a container's memory: version 2, version 1
# Of dense bf16, TFLOP/s by the makers' data sheets, with accumulation in float32
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}


@dataclass(frozen=True)
class Machine:
    """Bytes, and TFLOP/s at best; None for what is not known or not there."""

    name: str
    gpu: float | None
    host: float | None
    disk: float | None
    tflops: float | None


def this_machine(device: torch.device, place: Path = Path(".")) -> Machine:
    """The GPU with what is free on it, or the CPU with how fast it multiplies matrices now, in float32."""
    host = host_memory()
    disk = float(shutil.disk_usage(place).free)
    if device.type == "cpu":
        return Machine(f"CPU, {torch.get_num_threads()} threads", None, host, disk, cpu_tflops())
    name = torch.cuda.get_device_name(device)
    return Machine(name, float(torch.cuda.mem_get_info(device)[0]), host, disk, peak_of(name))


def host_memory() -> float:
    """Bytes of memory, or of what this container may take of it."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in LIMITS:
        try:
            found.append(int((CGROUPS / name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such version here; "max", which is no limit
            continue
    return float(min(found))


def other_machine(gpu_gib: float, name: str | None = None) -> Machine:
    """A machine with such a GPU. Its host and disk are not known."""
    return Machine(name or "a GPU that is not here", gpu_gib * GIB, None, None, peak_of(name or ""))


def peak_of(name: str) -> float | None:
    """TFLOP/s of a card in the table, but for the slower builds of the same name."""
    if "PCIe" in name or "NVL" in name:
        return None
    return next((value for card, value in PEAKS.items() if card.lower() in name.lower()), None)


def cpu_tflops(size: int = 1024, width: int = 3072, repeats: int = 3) -> float:
    """TFLOP/s of a float32 product (size, width) x (width, width) on this CPU: the best of several."""
    a, b = torch.rand(size, width), torch.rand(width, width)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size * width * width / min(times) / 1e12
