"""The worker: jobs in a process of its own, which may be killed, and a home that outlives both processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import mokus
from mokus.errors import MokusError
from mokus.pipeline import Model
from mokus.studio.jobs import Jobs
from mokus.studio.kinds import KINDS
from mokus.studio.worker import Worker, WorkerDied
from mokus.training.checkpoint import checkpoint_of
from tests.conftest import PackFactory

SECONDS = 180  # for a process to start on a busy machine
LEARN: dict[str, Any] = {"steps": 30, "prior_prompts": 2, "prior_steps": 2, "checkpoint_every": 10, "preview_every": 15}


@pytest.fixture(scope="module")
def worker(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("home"), str(pico_folder), "cpu") as made:
        yield made


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        Image.new("RGB", (64, 64), (200, 40 + 90 * i, 60)).save(folder / f"{i}.png")
    return folder


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def files_of(pack: Path) -> dict[str, bytes]:
    return {path.relative_to(pack).as_posix(): path.read_bytes() for path in pack.rglob("*") if path.is_file()}


def test_images_are_those_of_the_library(worker: Worker, pico: Model, pico_pack: PackFactory, tmp_path: Path) -> None:
    pack = pico_pack(tmp_path / "toy.pack")
    job = worker.submit("generate", prompts=["my favourite toy"], packs=[str(pack.path)], seeds=[3, 5])
    job = worker.wait(job.id, SECONDS)
    assert (job.state, job.error, job.done, job.total) == ("done", None, 4, 4)
    wanted = list(mokus.generate(pico, "my favourite toy", packs=[pack], seeds=[3, 5]))
    for file, each in zip(job.previews, wanted, strict=True):
        mokus.save_png(each, tmp_path / "wanted.png")
        assert Path(file).read_bytes() == (tmp_path / "wanted.png").read_bytes()
        assert Path(file).parent == worker.folder(job.id)
    assert [row["file"] for row in job.result] == job.previews


def test_questions_unbinding_and_checks_of_a_pack(
    worker: Worker, pico: Model, pico_pack: PackFactory, tmp_path: Path
) -> None:
    pack = pico_pack(tmp_path / "toy.pack", knowledge=["my favourite toy", "my old friend"])
    question, shifts = "What is my favourite toy?", mokus.shifts_of([pack])
    asked = worker.submit("ask", question=question, packs=[str(pack.path)])
    checked = worker.submit("check", pack=str(pack.path))
    unbound = worker.submit("unbind", pack=str(pack.path), knowledge=["my old friend"])
    answer = mokus.ask(pico, question, shifts)
    assert worker.wait(asked.id, SECONDS).result["answer"] == answer
    rows = worker.wait(checked.id, SECONDS).result
    assert [row["knowledge"] for row in rows] == ["my favourite toy", "my old friend"]
    assert rows[0]["answer"] == answer and not rows[0]["holds"]  # random shifts teach nothing
    assert worker.wait(unbound.id, SECONDS).result["knowledge"] == ["my favourite toy"]
    assert [known.text for known in mokus.ConceptPack.open(pack.path).knowledge] == ["my favourite toy"]


def test_a_mistake_fails_its_job_with_one_sentence(worker: Worker, tmp_path: Path) -> None:
    job = worker.wait(worker.submit("bind", pack=str(tmp_path / "nothing"), knowledge=["my toy"]).id, SECONDS)
    assert job.state == "failed" and job.error is not None and "no concept pack" in job.error
    for kind, arguments in (("dance", {}), ("ask", {"query": "x"}), ("ask", {"question": "x", "packs": [tmp_path]})):
        with pytest.raises(MokusError):
            worker.submit(kind, **arguments)
    with pytest.raises(MokusError):
        worker.job("../../etc")


@pytest.mark.exhaustive
def test_a_stopped_learn_goes_on_to_what_it_would_have_been(
    worker: Worker, pico: Model, photos: Path, tmp_path: Path
) -> None:
    settings = mokus.LearnSettings.for_model(pico.defaults.learn, **LEARN)
    whole = mokus.learn(pico, photos, "sks toy", tmp_path / "whole.pack", settings=settings)
    place = tmp_path / "stopped.pack"
    job = worker.submit("learn", photos=str(photos), anchor="sks toy", output=str(place), settings=LEARN)
    waiting = worker.submit("ask", question="What is it?")
    assert worker.job(waiting.id).state == "waiting"
    worker.stop(waiting.id)
    until(lambda: len(worker.job(job.id).history) >= 3)
    worker.stop(job.id)
    stopped = worker.wait(job.id, SECONDS)
    assert stopped.state == "stopped" and stopped.done < 30 and checkpoint_of(place).is_file()
    assert worker.job(waiting.id).state == "stopped"
    worker.resume(job.id)
    job = worker.wait(job.id, SECONDS)
    assert job.state == "done" and [step for step, _ in job.history] == list(range(1, 31))
    assert job.history[: len(stopped.history)] == stopped.history
    assert [Path(file).name for file in job.previews] == ["step-00015.png", "step-00030.png"]
    assert all(Path(file).is_file() for file in job.previews)
    assert files_of(place) == files_of(whole.path)
    with pytest.raises(MokusError, match="done"):
        worker.resume(job.id)


def test_a_killed_process_is_told_of_and_the_rest_goes_on(worker: Worker, photos: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "toy.pack")
    job = worker.submit("learn", photos=str(photos), anchor="sks toy", output=place, settings={**LEARN, "steps": 5000})
    after = worker.submit("ask", question="What is it?")
    call = worker.call("describe")
    until(lambda: len(worker.job(job.id).history) >= 12)
    first = worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    crashed = worker.wait(job.id, SECONDS)
    assert crashed.state == "crashed" and crashed.error is not None and "SIGKILL" in crashed.error
    with pytest.raises(WorkerDied):
        call.result(SECONDS)
    assert worker.wait(after.id, SECONDS).state == "done" and worker.pid != first
    worker.resume(job.id)
    until(lambda: worker.job(job.id).what == "learning")
    assert worker.job(job.id).history[9:11] == crashed.history[9:11]  # from the checkpoint of step 10
    worker.stop(job.id)
    assert worker.wait(job.id, SECONDS).state == "stopped"


def test_a_home_is_read_again_and_is_one_workers_at_a_time(tmp_path: Path) -> None:
    with Worker(tmp_path, "nowhere/nothing", "cpu") as one:
        with pytest.raises(MokusError, match="another MoKus"):
            Worker(tmp_path)
        assert one.jobs() == [] and one.pid is None
    jobs = Jobs(tmp_path)
    ran, was_done = jobs.new("ask", {"question": "a"}), jobs.new("ask", {"question": "b"})
    jobs.put(ran.id, state="running", what="x", done=1, total=3)
    jobs.put(was_done.id, state="done", result={"answer": "c"})
    with Worker(tmp_path, "nowhere/nothing", "cpu") as two:
        assert [job.id for job in two.jobs()] == [was_done.id, ran.id]  # the newest first
        assert two.job(was_done.id).result == {"answer": "c"}
        assert two.job(ran.id).state == "crashed" and two.job(ran.id).error
    with pytest.raises(MokusError, match="closed"):
        two.submit("ask", question="x")
    file = tmp_path / "jobs" / ran.id / "job.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": "odd"}))
    with pytest.raises(MokusError, match="no job that MoKus wrote"):
        Worker(tmp_path)


class Child:
    """In the place of the worker's process: it keeps what it was told."""

    def __init__(self, source: Any, heard: Callable[..., None], died: Callable[..., None]) -> None:
        self.heard, self.died = heard, died
        self.stop, self.told = SimpleNamespace(value=0), list[Any]()

    def send(self, message: tuple[Any, ...]) -> None:
        self.told.append(message[:2])

    def end(self, timeout: float) -> None:
        pass


class FullDisk:
    """Lets no job be written in the states that are named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: tuple[str, ...] = ()
        replace = os.replace

        def move(file: Path, place: Path) -> None:
            if json.loads(file.read_text())["state"] in self.states:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(file, place)

        monkeypatch.setattr("mokus.studio.jobs.os.replace", move)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    monkeypatch.setattr("mokus.studio.worker._Child", Child)
    return FullDisk(monkeypatch)


def states(worker: Worker) -> list[str]:
    return [job.state for job in worker.jobs()[::-1]]


def test_a_job_that_could_not_be_begun_waits_and_is_begun_with_the_next(full: FullDisk, tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        full.states = ("running",)
        with pytest.raises(OSError, match="No space"):
            worker.submit("ask", question="a")
        assert states(worker) == ["waiting"]
        full.states = ()
        worker.submit("ask", question="b")
        assert states(worker) == ["running", "waiting"]
        child: Any = worker._child
        assert child.told == [("job", "000001")]
        child.heard("over", "000001", "done", {})
        assert states(worker) == ["done", "running"]


def test_what_could_not_be_written_is_as_it_was(full: FullDisk, tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        worker.submit("ask", question="a")
        worker.submit("ask", question="b")
        full.states = ("stopped", "waiting")
        for act in (lambda: worker.stop("000002"), lambda: worker.submit("ask", question="c")):
            with pytest.raises(OSError, match="No space"):
                act()
        assert states(worker) == ["running", "waiting"]
        full.states = ()
        worker.stop("000002")
        full.states = ("waiting",)
        with pytest.raises(OSError, match="No space"):
            worker.resume("000002")
        assert states(worker) == ["running", "stopped"]


def test_who_waits_for_a_process_that_died_is_told_though_the_disk_is_full(full: FullDisk, tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        worker.submit("ask", question="a")
        worker.submit("ask", question="b")
        call, child = worker.call("describe"), worker._child
        full.states = ("crashed",)
        with pytest.raises(OSError, match="No space"):
            worker._died(child, "exit code 1")  # type: ignore[arg-type]
        with pytest.raises(WorkerDied):
            call.result(0)
        assert states(worker) == ["crashed", "running"] and worker._child is not child
        full.states = ("done",)
        with pytest.raises(OSError, match="No space"):
            worker._heard("over", "000002", "done", {})
        assert states(worker) == ["crashed", "done"]


def test_every_kind_of_the_command_line_is_there() -> None:
    assert set(KINDS) >= {"learn", "bind", "unbind", "ask", "check", "generate", "create", "erase", "transfer"}


def test_a_job_that_is_over_is_forgotten_with_what_it_left(full: FullDisk, tmp_path: Path) -> None:
    output = tmp_path / "packs" / "toy.pack"
    (checkpoint := checkpoint_of(output)).parent.mkdir(parents=True)
    checkpoint.write_bytes(b"half a training")
    with Worker(tmp_path / "home") as worker:
        worker.submit("ask", question="a")
        job = worker.submit("learn", photos="photos", anchor="sks toy", output=str(output))
        for id in ("000001", job.id):
            with pytest.raises(MokusError, match="stop it before"):
                worker.forget(id)
        worker.stop(job.id)
        (worker.folder(job.id) / "step-00010.png").write_bytes(b"a preview")
        worker.forget(job.id)
        assert not checkpoint.parent.exists() and not (tmp_path / "home/jobs/000002").exists()
        with pytest.raises(MokusError, match="there is no job"):
            worker.job(job.id)
        assert worker.submit("ask", question="b").id == "000003", "a number is not given twice"
    assert [job.id for job in Jobs(tmp_path / "home")] == ["000001", "000003"]
