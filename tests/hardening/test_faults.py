"""Whatever happens to a command, and when: a pack is as before or as after, and the same command again goes through.

A command runs in a child, in which every call that changes the disk is counted (opening a file to write, renaming, removing,
making a folder, flushing), and at the k-th of them the child is killed with SIGKILL, or finds the disk full, or read-only.
"Killed in the middle of a write" is half of the file's bytes, and then the kill. What a command computes is computed once and
remembered, since only its writing is looked at here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mokus import cli, covariance, knowledge_update
from mokus.bench.knowcusbench import cli as knowcus_cli
from mokus.bench.knowcusbench import run as knowcus_run
from mokus.cli import app
from mokus.errors import MokusError
from mokus.packs.concept_pack import MANIFEST, ConceptPack
from mokus.pipeline import Model
from mokus.training import material
from mokus.training.checkpoint import checkpoint_of

from ..conftest import PackFactory, known, random_shifts
from ..test_concept_pack import tree
from ..test_knowcus_run import SUITE
from .conftest import case

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and kills processes")

# Of a command with more calls than these: the first, the last, and so many in between, the same in every run but others for
# every way. MOKUS_FAULTS=all takes every call.
FIRST, LAST, SOME = 2, 3, 3
WAYS = ("killed", "killed in the middle", "full", "read-only")
EXHAUSTIVE = pytest.mark.exhaustive


# --- a command in a child that something happens to ---------------------------------------------------------


class Disk:
    """Counts the calls that change the disk, and at the k-th does what `way` says; only in a child, for good."""

    def __init__(self, at: int | None, way: str) -> None:
        self.at, self.way, self.calls, self._inside = at, way, 0, False
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self.met("fsync", descriptor)
            real(descriptor)

        os.fsync = fsync
        sys.addaudithook(self.heard)

    def heard(self, event: str, given: tuple[Any, ...]) -> None:
        if self._inside or event not in (
            "open",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.mkdir",
            "os.truncate",
            "os.link",
        ):
            return
        if event == "open":
            path, _, flags = given
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not writes or isinstance(path, int) or str(path).startswith("/dev/"):
                return
        self.met(event, given[0])

    def met(self, event: str, what: Any) -> None:
        self._inside = True  # what is done here does not count
        try:
            self._call(event, what)
        finally:
            self._inside = False

    def _call(self, event: str, what: Any) -> None:
        self.calls += 1
        if self.at is None or self.calls <= self.at:
            return
        if self.way == "killed in the middle" and event in ("fsync", "os.rename"):
            with contextlib.suppress(OSError, TypeError):  # of a folder
                os.truncate(what, os.stat(what).st_size // 2)
        if self.way.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way == "read-only" or event in (
            "open",
            "fsync",
            "os.mkdir",
        ):  # a full disk lets files be renamed and removed
            number = errno.EROFS if self.way == "read-only" else errno.ENOSPC
            raise OSError(number, os.strerror(number), what if isinstance(what, str) else None)


def child(act: Callable[[], dict[str, Any]], at: int | None = None, way: str = "killed") -> dict[str, Any] | None:
    """What `act` returns, with the number of calls, or None if the child was killed."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        status = 1
        try:
            os.close(read)
            disk = Disk(at, way)
            told = act()
            os.write(write, json.dumps({**told, "calls": disk.calls}).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), "the child broke in another way"
    return json.loads(said) if status == 0 else None


def command(*args: Any) -> Callable[[], dict[str, Any]]:
    """A command line, as something to be run in a child."""

    def act() -> dict[str, Any]:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        odd = None if isinstance(result.exception, (SystemExit, type(None))) else repr(result.exception)
        return {"code": result.exit_code, "odd": odd, "stderr": result.stderr}

    return act


def points(calls: int, way: str) -> list[int]:
    """At which calls something happens: all of them, or a fixed choice of many."""
    if calls <= FIRST + LAST + SOME or os.environ.get("MOKUS_FAULTS") == "all":
        return list(range(calls))
    between = random.Random(way).sample(range(FIRST, calls - LAST), SOME)
    return [*range(FIRST), *sorted(between), *range(calls - LAST, calls)]


# --- quick commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swift(quick: Model) -> Iterator[Model]:
    """Inside, commands have the model at once, and remember what they computed of it."""
    found, encodings = knowledge_update._found, material.encode
    edits: dict[Any, Any] = {}
    known_: dict[str, Any] = {}

    def remembered(model: Model, requests: Any, *rest: Any) -> Any:
        key = tuple((each.knowledge, each.says) for each in requests)
        if key not in edits:
            edits[key] = found(model, requests, *rest)
        return list(edits[key])

    def encode(model: Model, prompts: Any) -> Any:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known_]
        known_.update(zip(new, encodings(model, new), strict=True))
        return [known_[prompt] for prompt in prompts]

    def draw(model: Model, jobs: Any, *_: Any) -> Any:
        return [Image.new("RGB", (8, 8), (seed, 0, 0)) for _, seed in jobs]

    with pytest.MonkeyPatch.context() as patch:
        for module in (cli, knowcus_cli):
            patch.setattr(module, "load_model", lambda *_, **__: quick)
        patch.setattr(knowledge_update, "_found", remembered)
        patch.setattr(knowledge_update, "_hold_together", lambda model, edits, *_: list(edits))
        patch.setattr(material, "encode", encode)
        patch.setattr(knowcus_run, "encode", encode)
        patch.setattr(knowcus_run, "draw", draw)
        yield quick


@pytest.fixture
def old(tmp_path: Path, pico_pack: PackFactory) -> dict[str, bytes]:
    """A pack at `tmp_path/a/a.pack`, and a copy of it beside."""
    pack = pico_pack(tmp_path / "a" / "a.pack")
    shutil.copytree(pack.path, tmp_path / "copy")
    return tree(pack.path)


LOCKS = (".a.pack.lock", ".a.pack.learning.lock")
COMMANDS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "learn": lambda place, photos: ["learn", photos, "--anchor", "sks duck", "-o", place, "--overwrite"],
    "bind": lambda place, _: ["bind", place, "the small one"],
    "unbind": lambda place, _: ["unbind", place, "my favourite toy"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("way", [WAYS[1], WAYS[2], *(pytest.param(w, marks=EXHAUSTIVE) for w in (WAYS[0], WAYS[3]))])
def test_a_pack_is_as_before_or_as_after(
    tmp_path: Path, swift: Model, old: dict[str, bytes], one_photo: Path, name: str, way: str
) -> None:
    place = tmp_path / "a" / "a.pack"
    args = COMMANDS[name](place, one_photo)
    begin(tmp_path)
    assert command(*args)()["code"] == 0  # here, so that what is computed is remembered for the children
    new = tree(place)
    begin(tmp_path)
    whole = child(command(*args))
    assert whole and whole["code"] == 0 and tree(place) == new, whole
    assert new != old and whole["calls"] > 10
    print(f"{name}: {whole['calls']} calls that change the disk")
    seen = set()
    for k in points(whole["calls"], way):
        case("faults")
        begin(tmp_path)
        ended = child(command(*args), k, way)
        assert (ended is None) == way.startswith("killed") or (ended and ended["code"] == 0), (k, ended)
        if ended and ended["code"]:  # a disk that is full while rubbish is cleared away disturbs nobody
            assert (ended["code"], ended["odd"], ended["stderr"].count("\n")) == (2, None, 1), (k, ended)
            assert os.strerror(errno.ENOSPC if way == "full" else errno.EROFS) in ended["stderr"], (k, ended)
        if place.exists() or (place.parent / ".a.pack.old" / MANIFEST).exists():
            ConceptPack.open(place)
        found = tree(place)
        assert found in (old, new), k
        seen.add(found == new)
        if name == "unbind" and found == new:
            continue
        again = [*args, "--resume"] if name == "learn" and checkpoint_of(place).is_file() else args
        ended = child(command(*again))
        assert ended and ended["code"] == 0 and tree(place) == new, (k, ended)
        assert {path.name for path in place.parent.iterdir()} <= {"a.pack", *LOCKS}, k
    assert False in seen and (True in seen or not way.startswith("killed"))


def begin(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    shutil.copytree(tmp_path / "copy", tmp_path / "a" / "a.pack")


@pytest.mark.parametrize("room", [0, 1, 4000, 20_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_files_that_do_not_fit(
    tmp_path: Path, swift: Model, old: dict[str, bytes], one_photo: Path, name: str, room: int
) -> None:
    """A limit of the operating system in place of a full disk: writes that begin, and break off in the middle."""
    import resource

    case("faults")
    place = tmp_path / "a" / "a.pack"

    def limited() -> dict[str, Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return command(*COMMANDS[name](place, one_photo))()

    ended = child(limited)
    assert ended and (ended["code"], ended["odd"]) == (2, None), ended
    assert ended["stderr"].count("\n") == 1 and os.strerror(errno.EFBIG) in ended["stderr"]
    assert tree(place) == old and not list(place.parent.glob("*.tmp"))


# --- a benchmark's folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["killed in the middle", pytest.param("full", marks=EXHAUSTIVE)])
def test_a_benchmark_goes_on(tmp_path: Path, swift: Model, one_photo: Path, way: str) -> None:
    """Killed at any call, run again: what one run makes, and nothing else."""
    suite = {**SUITE, "concepts": [{**SUITE["concepts"][0], "knowledge": SUITE["concepts"][0]["knowledge"][:1]}]}
    (tmp_path / "suite.yaml").write_text(yaml.dump(suite))
    shutil.copytree(one_photo, tmp_path / "album" / "robot")
    folder = tmp_path / "run"
    args = ["bench", "knowcus", "run", "-o", folder, "--suite", tmp_path / "suite.yaml", "--methods", "base,mokus",
            "--seeds", "0", "--photos", f"album={tmp_path / 'album'}"]  # fmt: skip
    assert command(*args)()["code"] == 0
    wanted = _digests(folder)
    shutil.rmtree(folder)
    whole = child(command(*args))
    assert whole and whole["code"] == 0 and _digests(folder) == wanted, whole
    assert len([name for name in wanted if name.startswith("images")]) >= 6
    for k in points(whole["calls"], way):
        case("faults")
        shutil.rmtree(folder)
        ended = child(command(*args), k, way)
        assert (ended is None) == way.startswith("killed") or (ended and ended["code"] == 0), (k, ended)
        if ended:
            assert ended["code"] in (0, 1, 2) and ended["odd"] is None, (k, ended)
        ended = child(command(*args))
        assert ended and ended["code"] == 0, (k, ended)
        assert _digests(folder) == wanted, k


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of what a run is for; how long things took is another each time, and so are locks."""
    files = [file for part in ("images", "packs") for file in (folder / part).rglob("*") if file.is_file()]
    kept = [file for file in files if file.name != "made.json" and file.suffix not in (".lock", ".tmp")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


# --- statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_statistics_are_whole_or_gathered_anew(
    tmp_path: Path, quick: Model, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """And what a killed process left in the cache is gone after the next."""
    monkeypatch.setenv("MOKUS_CACHE", str(tmp_path))
    corpus = covariance.Corpus(["a toy", "a robot"], ["a dog"])
    paths = [f"model.language_model.layers.{i}.mlp.{name}_proj" for i, name in ((1, "down"), (2, "up"))]

    def gather() -> dict[str, Any]:
        try:
            covariance.moments(quick, paths, corpus)
        except MokusError as error:
            return {"said": str(error)}
        return {"said": ""}

    assert not gather()["said"]
    shutil.rmtree(tmp_path / "statistics")
    whole = child(gather)
    assert whole and not whole["said"]
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "statistics").glob("*.safetensors")}
    assert len(wanted) == 2
    for k in points(whole["calls"], way):
        case("faults")
        shutil.rmtree(tmp_path / "statistics")
        ended = child(gather, k, way)
        if ended:
            assert "MOKUS_CACHE" in ended["said"] or not ended["said"], (k, ended)
        assert child(gather) == {"said": "", "calls": pytest.approx(whole["calls"], abs=20)}
        left = {file.name: file.read_bytes() for file in (tmp_path / "statistics").iterdir() if file.suffix != ".lock"}
        assert left == wanted, k


# --- places, clocks, and others -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_folders_that_may_only_be_read(
    tmp_path: Path, swift: Model, old: dict[str, bytes], one_photo: Path, name: str
) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root; the same is simulated as read-only above")
    case("faults")
    place = tmp_path / "a" / "a.pack"
    place.parent.chmod(0o555)
    try:
        ended = child(command(*COMMANDS[name](place, one_photo)))
    finally:
        place.parent.chmod(0o755)
    assert ended and (ended["code"], ended["odd"]) == (2, None) and str(tmp_path) in ended["stderr"]
    assert tree(place) == old


@pytest.mark.parametrize("jump", [10**9, -(10**9), 0.0])
def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, swift: Model, old: dict[str, bytes], one_photo: Path, jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards, backwards, or not at all from call to call; and files whose times are of long ago or of the future."""
    place, new = tmp_path / "a" / "a.pack", {}
    for name, make in COMMANDS.items():
        begin(tmp_path)
        assert CliRunner().invoke(app, list(map(str, make(place, one_photo)))).exit_code == 0
        new[name] = tree(place)
    now = [time.time()]

    def clock() -> float:
        now[0] += jump
        return now[0]

    for name, make in COMMANDS.items():
        case("faults")
        begin(tmp_path)
        for i, path in enumerate(sorted(place.rglob("*"))):
            os.utime(path, (0, 0) if i % 2 else (2**33, 2**33))
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", clock)
            result = CliRunner().invoke(app, list(map(str, make(place, one_photo))))
        assert result.exit_code == 0 and tree(place) == new[name], (name, result.output)


def test_two_that_bind_at_once_lose_nothing(tmp_path: Path, swift: Model, pico_pack: PackFactory) -> None:
    """Processes that bind different phrases to one pack, several times over: all of them are in it."""
    pack = pico_pack(tmp_path / "a.pack", knowledge=[])
    phrases = [[f"the toy of {who} {i}" for i in range(3)] for who in ("Anna", "Boris", "Cleo")]
    for some in phrases:  # found once, here, so that the processes do nothing but write
        for phrase in some:
            knowledge_update._found(
                swift, [knowledge_update.request(phrase, pack.anchor)], [], _settings(swift), False, None
            )
    children = []
    for some in phrases:
        case("faults")
        if not (pid := os.fork()):
            codes = [CliRunner().invoke(app, ["bind", str(pack.path), phrase]).exit_code for phrase in some]
            os._exit(max(codes))
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    bound = [each.text for each in ConceptPack.open(pack.path).knowledge]
    assert sorted(bound) == sorted(phrase for some in phrases for phrase in some)
    for some in phrases:
        assert [text for text in bound if text in some] == some


def test_binding_beside_one_that_learns_anew(
    tmp_path: Path, swift: Model, old: dict[str, bytes], one_photo: Path
) -> None:
    """Whoever comes second works on what the first left; in the end it is a pack that one of them wrote, whole."""
    place = tmp_path / "a" / "a.pack"
    for _ in range(3):
        case("faults")
        begin(tmp_path)
        children = []
        for name in ("learn", "bind"):
            if not (pid := os.fork()):
                ended = command(*COMMANDS[name](place, one_photo))()
                clear = ended["odd"] is None and (ended["code"] == 0 or ended["stderr"].count("\n") == 1)
                os._exit(0 if clear else 1)
            children.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
        pack = ConceptPack.open(place)
        assert pack.anchor == "sks duck" and {each.text for each in pack.knowledge} <= {"the small one"}


def test_a_writer_that_hangs_is_told_after_a_while(
    tmp_path: Path, quick: Model, pico_pack: PackFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process that holds the lock, and one that was killed with it: the first is waited for, the second not."""
    pack = pico_pack(tmp_path / "a.pack")
    read, write = os.pipe()
    if not (pid := os.fork()):
        with pack.locked():
            os.write(write, b"x")
            time.sleep(600)
        os._exit(0)
    os.read(read, 1)
    os.kill(pid, signal.SIGSTOP)
    case("faults")
    with pytest.raises(MokusError, match="another process"), pack.locked(seconds=0.2):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pack.locked(seconds=0.2):
        pack.replace_edits([(known("it"), random_shifts(quick, 1))])
    assert [each.text for each in pack.knowledge] == ["it"]


def _settings(model: Model) -> Any:
    from mokus.settings import EditSettings

    return EditSettings.for_editor(model.defaults)
