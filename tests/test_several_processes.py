"""Learned together by several processes as by one: the same losses, the same LoRA, and checkpoints for each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import mokus
from mokus import visual_concept
from mokus.errors import MokusError
from mokus.miniature import world
from mokus.pipeline import Model
from mokus.settings import LearnSettings
from mokus.training import checkpoint
from mokus.training.processes import Processes
from mokus.training.trainers import Alone, Together

from .conftest import ATTENTION, SIZE

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "runs"
ANCHOR = "sks toy"
# five samples in a step, which two processes cannot share evenly; every projection, of which the last block's text has no use
SETTINGS = LearnSettings(
    steps=6, rank=2, alpha=4.0, learning_rate=1e-2, batch_size=3, prior_batch_size=2, prior_prompts=2, prior_steps=2,
    place_share=0.0, looks_share=0.0, checkpoint_every=2, targets=ATTENTION, preview_every=6,
)  # fmt: skip

# run by each process: a run that one process began is ended, and one is begun that one process shall end
WORKER = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
import mokus
from mokus.training.processes import Processes
from mokus.settings import LearnSettings
from mokus.training.trainers import Together

class Stop(Exception):
    pass

torch.set_num_threads(1)
folder, model, settings = Path(sys.argv[1]), sys.argv[2], LearnSettings(**json.loads(sys.argv[3]))
processes = Processes.of_environment()
photos = [Image.open(file) for file in sorted((folder / "photos").iterdir())]
losses = {"ended": {}, "begun": {}}

def learn(name, stop, **more):
    def progress(what, done, total, info):
        if what == "learning":
            losses[name][done] = info["loss"]
            if done == stop:
                raise Stop
    try:
        mokus.learn(
            mokus.load(model, "cpu"), photos, "sks toy", folder / f"{name}.pack", settings=settings, progress=progress,
            processes=processes, **more,
        )
    except Stop:
        pass

learn("ended", None, resume=True)
learn("begun", 5)
about = {"count": processes.count, "sharded": Together(processes).sharded, "losses": losses}
(folder / f"process-{processes.index}.json").write_text(json.dumps(about))
processes.wait()
"""


class Stop(Exception):
    """Raised in the middle of a run."""


@pytest.fixture
def images() -> list[Image.Image]:
    return world.character_photos("bobo", 2, seed=0, size=SIZE)


def watched(losses: dict[str, float], stop: int | None = None) -> Callable[..., None]:
    """A progress callback that keeps the losses by step, and stops after one."""

    def progress(what: str, done: int, total: int, info: dict[str, Any]) -> None:
        if what == "learning":
            losses[str(done)] = info["loss"]
            if done == stop:
                raise Stop

    return progress


def launched(config: str, *arguments: str) -> None:
    """Start two processes as a user would, and wait for them."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*launch, "--num_processes", "2", *arguments], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sharded"), [("ddp.yaml", False), pytest.param("fsdp2.yaml", True, marks=pytest.mark.exhaustive)]
)
def test_two_processes_learn_what_one_does(
    pico: Model, pico_folder: Path, images: list[Image.Image], tmp_path: Path, config: str, sharded: bool
) -> None:
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "photos" / f"{i}.png")
    alone: dict[str, float] = {}
    pack = mokus.learn(pico, images, ANCHOR, tmp_path / "one.pack", settings=SETTINGS, progress=watched(alone))
    with pytest.raises(Stop):
        mokus.learn(pico, images, ANCHOR, tmp_path / "ended.pack", settings=SETTINGS, progress=watched({}, 3))
    (tmp_path / "worker.py").write_text(WORKER)
    given = (str(tmp_path), str(pico_folder), json.dumps(asdict(SETTINGS)))
    launched(config, str(tmp_path / "worker.py"), *given)

    for index in (0, 1):  # there were two, and both saw the losses of all samples
        about = json.loads((tmp_path / f"process-{index}.json").read_text())
        assert (about["count"], about["sharded"]) == (2, sharded)
        assert about["losses"]["ended"] == pytest.approx({step: alone[step] for step in "3456"}, rel=1e-4)
        assert about["losses"]["begun"] == pytest.approx({step: alone[step] for step in "12345"}, rel=1e-4)
    begun = mokus.learn(pico, images, ANCHOR, tmp_path / "begun.pack", settings=SETTINGS, resume=True)
    for other in (begun, mokus.ConceptPack.open(tmp_path / "ended.pack")):
        lora = other.lora()
        for (
            key,
            value,
        ) in pack.lora().items():  # as a whole: where a gradient is nearly 0, Adam makes much of its rounding
            assert (lora[key] - value).norm() <= 1e-3 * value.norm(), key
        assert [file.name for file in (other.path / "samples").iterdir()] == ["step-00006.png"]
    assert not list(tmp_path.glob(".*.learning"))


class _Part(Alone):
    """One of several processes, as it draws its samples."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count


@pytest.mark.parametrize("refused", [False, True])
def test_what_the_first_process_is_refused_is_refused_to_all(tmp_path: Path, refused: bool) -> None:
    """So none waits for it for ever: here for the lock of a training."""
    meeting, said = Barrier(2, timeout=60), ["", ""]

    def gathered(index: int, mine: list[str]) -> list[str]:
        said[index] = mine[0]
        meeting.wait()
        return said

    def one(index: int) -> str:
        team = object.__new__(Together)
        team.first, team.processes = index == 0, SimpleNamespace(gathered=partial(gathered, index))  # type: ignore[assignment]
        run = SimpleNamespace(team=team, file=checkpoint.checkpoint_of(tmp_path / "a.pack"))
        try:
            with visual_concept._Run.alone(run):  # type: ignore[arg-type]
                return "learned"
        except MokusError as error:
            return str(error)

    another = checkpoint.held(checkpoint.checkpoint_of(tmp_path / "a.pack")) if refused else nullcontext()
    with another, ThreadPoolExecutor(2) as threads:
        first, second = threads.map(one, range(2))
    assert first == second and ("already learning" in first if refused else first == "learned")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_samples_of_a_step_are_shared_out(
    pico: Model, images: list[Image.Image], tmp_path: Path, count: int
) -> None:
    """The mean of the processes' losses, and so of their gradients, is the loss of one."""
    settings = replace(SETTINGS, preview_every=0)
    photos = visual_concept._load(images, SIZE)
    run = visual_concept._Run(pico, photos, ANCHOR, "toy", tmp_path / "a.pack", settings)
    for _ in run.material.gather():
        pass
    losses = []
    for run.team in (Alone(), *(_Part(i, count) for i in range(count))):
        losses.append(float(run.loss(torch.Generator().manual_seed(7))))
    assert sum(losses[1:]) / count == pytest.approx(losses[0], rel=1e-5)
    assert all(abs(loss - losses[0]) > 1e-3 for loss in losses[1:])  # none has all samples


def test_more_processes_than_samples_are_refused(
    pico: Model, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visual_concept, "trainer", lambda processes: _Part(processes.index, processes.count))
    with pytest.raises(MokusError, match="5 samples and there are 6 processes"):
        mokus.learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=SETTINGS, processes=Processes(0, 6))
