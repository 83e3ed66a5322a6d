"""The benchmark of stage 1, narrow: it compares the same work, and counts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "learn_speed.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--pico", "--size", "32", "--rounds", "2", "--matrix", "64", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_are_measured() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    steps = found["steps"]
    assert set(steps) == {"bare", "ours", "plain", "plain, cached"} and found["peak_tflop_per_second"] > 0
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["peak_gib"] > 0 for row in steps.values())
    work = {name: row["tflop_per_step"] for name, row in steps.items()}
    assert work["bare"] == pytest.approx(work["ours"], rel=1e-6)  # the very same graph
    assert work["plain"] > 1.1 * work["plain, cached"] > 0  # which encodes nothing
    assert steps["bare"]["over_bare"] == 1


@pytest.mark.exhaustive
def test_what_cannot_be_measured() -> None:
    done = run("--dtype", "int8")
    assert done.returncode == 2 and "expected float32 or bfloat16" in done.stderr and "Traceback" not in done.stderr
