"""`mokus serve` under load on this machine, beside a server that draws one image at a time.

    python benchmarks/serve_load.py --json

Both servers are started one after the other, with the same model and packs and the same visitors: so many at a time, each of
whom asks for one image and then for the next, in turn of the base model and of every pack. The second server is the same
program with `--batch 1`. Nothing but 127.0.0.1 is spoken to. Seconds are of this machine as it was just then.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

import mokus
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Model

RARE = ("sks", "zwx", "ohwx", "qxv", "vrk", "jzt", "xql", "wqz")
CLIENTS, REQUESTS, PACKS, WAIT_SECONDS = 8, 32, 2, 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; the miniature without it")
    parser.add_argument("--device", help="cpu, cuda; a GPU if there is one")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="visitors at a time")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests in all, to each server")
    parser.add_argument("--packs", type=int, default=PACKS, help="packs that are asked for, besides the base model")
    parser.add_argument("--batch", type=int, default=CLIENTS, help="images at a time, of the server that draws several")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    asked = parser.parse_args()
    if min(asked.clients, asked.requests, asked.batch) < 1 or not 0 <= asked.packs <= len(RARE):
        parser.error(f"expected at least one of each, and at most {len(RARE)} packs")
    with tempfile.TemporaryDirectory(prefix="mokus-load-") as folder:
        names = make_packs(mokus.load(asked.model, "cpu"), Path(folder), asked.packs)
        rows = {f"batch {n}": measure(asked, Path(folder), names, n) for n in dict.fromkeys((1, asked.batch))}
    if asked.json:
        print(json.dumps(rows, indent=1))
        return
    for name, row in rows.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))


def make_packs(model: Model, folder: Path, n: int) -> list[str]:
    """Packs with random looks: they take as long to draw as any others."""
    random = torch.Generator().manual_seed(0)
    names = []
    for i in range(n):
        lora = {}
        for name, module in model.pipe.transformer.named_modules():
            if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
                a = 0.01 * torch.randn(4, module.in_features, generator=random)
                b = 0.01 * torch.randn(module.out_features, 4, generator=random)
                lora |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        ConceptPack.create(folder / f"pack-{i}", model=model, anchor=f"{RARE[i]} toy", lora=lora, settings={})
        names.append(f"pack-{i}")
    return names


def measure(asked: argparse.Namespace, folder: Path, packs: Sequence[str], batch: int) -> dict[str, Any]:
    """One server, from its start to its end."""
    with serving(asked, folder, batch) as (port, process):
        models = [None, *packs]
        for model in models:  # once each, so that everything is in memory
            ask(port, model, 0)
        with Memory(process) as memory, ThreadPoolExecutor(asked.clients) as visitors:
            began = time.perf_counter()
            answers = list(visitors.map(lambda i: ask(port, models[i % len(models)], i), range(asked.requests)))
            seconds = time.perf_counter() - began
    took = sorted(second for status, second in answers if status == 200)
    return {
        "requests": asked.requests, "clients": asked.clients, "errors": asked.requests - len(took),
        "requests_per_second": round(len(took) / seconds, 3),
        "p50_seconds": round(statistics.median(took), 3) if took else None,
        "p99_seconds": round(took[min(len(took) - 1, int(0.99 * len(took)))], 3) if took else None,
        "memory_mib": memory.most >> 20,
    }  # fmt: skip


def ask(port: int, model: str | None, seed: int) -> tuple[int, float]:
    """One image: the status, 0 if there is none, and seconds."""
    body = json.dumps({"prompt": "a toy in the snow", "seed": seed, **({"model": model} if model else {})})
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    try:
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        status = answer.status
    except (OSError, http.client.HTTPException):
        status = 0
    finally:
        connection.close()
    return status, time.perf_counter() - began


@contextmanager
def serving(asked: argparse.Namespace, folder: Path, batch: int) -> Iterator[tuple[int, psutil.Process]]:
    command = [sys.executable, "-m", "mokus", "serve", "--packs", str(folder), "--port", "0", "--batch", str(batch)]
    for name in ("model", "device"):
        if value := getattr(asked, name):
            command += [f"--{name}", value]
    environment = {name: value for name, value in os.environ.items() if name != "MOKUS_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start; what it said is above")
            yield int(line.rpartition(":")[2].split("/")[0]), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


class Memory:
    """The most that the server and its worker had in memory while this was entered, bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.most = process, 0

    def __enter__(self) -> Memory:
        from threading import Event, Thread

        self.over = Event()
        self.thread = Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def watch(self) -> None:
        while True:
            family = [self.process, *self.process.children(recursive=True)]
            self.most = max(self.most, sum(each.memory_info().rss for each in family if each.is_running()))
            if self.over.wait(0.2):
                return


if __name__ == "__main__":
    main()
