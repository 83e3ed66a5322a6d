"""`mokus learn --batch`: each concept as it is learned alone, again does the rest, and whatever is wrong is named."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mokus import visual_concept
from mokus.cli import app
from mokus.errors import MokusError
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Model
from mokus.training.concept_batch import Concept, learn_all, read_concepts
from mokus.training.processes import Processes

from .conftest import SIZE

QUICK = ["--steps", "2", "--rank", "2", "--prior-weight", "0", "--place-share", "0", "--looks-share", "0"]
QUICK += ["--checkpoint-every", "1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_folder: Path) -> Path:
    """A working folder with two folders of photos."""
    monkeypatch.setenv("MOKUS_MODEL", str(pico_folder))
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("robot", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE), (200 * i, 90, 200)).save(tmp_path / "photos" / name / "0.png")
    return tmp_path


def write(place: Path, text: str) -> Path:
    (place / "concepts.yaml").write_text(text, encoding="utf-8")
    return place / "concepts.yaml"


def entry(name: str, anchor: str = "sks toy", more: str = "") -> str:
    return f"- photos: photos/{name}\n  anchor: {anchor}\n  output: packs/{name}.pack\n{more}"


def learned(*more: str) -> Result:
    return CliRunner().invoke(app, ["learn", "--batch", "concepts.yaml", "--device", "cpu", *QUICK, *more])


def statuses(result: Result) -> list[str]:
    return [each["status"] for each in json.loads(result.stdout)]


# --- what it does -----------------------------------------------------------------------------------------------------


def test_each_is_learned_as_alone_and_one_that_fails_stops_no_other(place: Path) -> None:
    write(place, entry("robot") + entry("cat") + entry("dog", "zwx dog", "  rank: 3\n  learning_rate: 2e-3\n"))
    result = learned("--json")
    assert (result.exit_code, statuses(result)) == (1, ["learned", "failed", "learned"]), result.output
    assert "photos/cat" in json.loads(result.stdout)[1]["reason"]
    pack = ConceptPack.open(place / "packs" / "dog.pack")
    assert (pack.anchor, pack.settings["rank"], pack.settings["learning_rate"]) == ("zwx dog", 3, 2e-3)

    alone = ["learn", "photos/robot", "--anchor", "sks toy", "-o", "alone.pack", "--device", "cpu", *QUICK]
    assert CliRunner().invoke(app, alone).exit_code == 0
    robot = ConceptPack.open(place / "packs" / "robot.pack")
    assert robot.digest == ConceptPack.open(place / "alone.pack").digest

    # again: what is done is passed over, what has been mended is learned
    before = (place / "packs" / "robot.pack" / "mokus.json").stat().st_mtime_ns
    shutil.copytree(place / "photos" / "dog", place / "photos" / "cat")
    again = learned()
    assert again.exit_code == 0 and "3 of 3 concepts are there" in again.stdout
    assert (place / "packs" / "robot.pack" / "mokus.json").stat().st_mtime_ns == before
    assert statuses(learned("--json")) == ["there already"] * 3


def test_failures_are_listed_at_the_end(place: Path) -> None:
    write(place, entry("cat") + entry("robot"))
    result = learned()
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "1 of 2 concepts are there" and "cat.pack: failed" in lines[1] and len(lines) == 2


def test_a_concept_inside_another_s_pack_fails_and_leaves_it(place: Path) -> None:
    inside = entry("dog", "zwx dog").replace("packs/dog.pack", "packs/robot.pack/dog")
    write(place, entry("robot") + inside)
    result = learned("--json")
    assert (result.exit_code, statuses(result)) == (1, ["learned", "failed"]), result.output
    assert "is in the concept pack" in json.loads(result.stdout)[1]["reason"]
    assert ConceptPack.open(place / "packs" / "robot.pack").anchor == "sks toy"


def test_what_was_stopped_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its checkpoint, to the pack of an undisturbed run."""
    write(place, entry("robot"))
    real = visual_concept._Run.loss
    calls = 0

    def loss(run: Any, random: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(run, random)

    with monkeypatch.context() as patch:
        patch.setattr(visual_concept._Run, "loss", loss)
        assert learned().exit_code == 130
        assert calls == 2 and not (place / "packs" / "robot.pack").exists()
        assert statuses(learned("--json")) == ["learned"] and calls == 3  # the second step alone
    digest = ConceptPack.open(place / "packs" / "robot.pack").digest
    shutil.rmtree(place / "packs")
    assert learned().exit_code == 0
    assert ConceptPack.open(place / "packs" / "robot.pack").digest == digest


@pytest.mark.parametrize(
    ("text", "option", "named"),
    [(entry("robot", "zwx toy"), (), "anchor"), (entry("robot"), ("--seed", "7"), "seed")],
)
def test_a_pack_of_something_else_is_left_alone(place: Path, text: str, option: tuple[str, ...], named: str) -> None:
    write(place, entry("robot"))
    assert learned().exit_code == 0
    before = (place / "packs" / "robot.pack" / "mokus.json").read_bytes()
    write(place, text)
    result = learned(*option)
    assert result.exit_code == 1 and f"another {named}" in result.stdout
    assert (place / "packs" / "robot.pack" / "mokus.json").read_bytes() == before


def test_processes_share_the_concepts(place: Path, pico: Model) -> None:
    concepts = [Concept(place / "nowhere", "sks toy", place / f"{i}.pack", {}) for i in range(5)]
    shares = [[outcome.output for outcome in learn_all(pico, concepts, {}, Processes(i, 3))] for i in range(3)]
    assert sorted(output for share in shares for output in share) == [str(concept.output) for concept in concepts]
    assert sorted(map(len, shares)) == [1, 2, 2]


@pytest.mark.parametrize(("index", "code"), [(0, 1), (1, 0)])
def test_only_the_first_process_tells_of_a_failure(
    place: Path, monkeypatch: pytest.MonkeyPatch, index: int, code: int
) -> None:
    """A launcher ends all processes as soon as one fails, and the first one still has to say what there is."""
    write(place, entry("cat") + entry("mouse"))  # one for each process, and neither has photos
    monkeypatch.setattr(Processes, "of_environment", lambda: Processes(index, 2))
    left = []
    monkeypatch.setattr(Processes, "leave", lambda self: left.append(self.index))
    result = CliRunner().invoke(app, ["learn", "--batch", "concepts.yaml", *QUICK])
    assert result.exit_code == code, result.output
    assert ("cat.pack: failed" in result.stdout) == (index == 0) and left == [index]


# --- what is wrong with a file ----------------------------------------------------------------------------------------

BAD = {
    "": "holds no list",
    "photos: a": "holds no list",
    "- [1": "line 1: this is no YAML",
    "- robot": "line 1, entry 1 is no mapping",
    "- photos: a\n  anchor: sks toy": "entry 1 has no 'output'",
    entry("robot") + "- anchor: sks dog\n  output: b": "line 4, entry 2 has no 'photos'",
    entry("robot", more="  stepps: 3\n"): r"entry 1: 'stepps' \(line 4\) is no field",
    entry("robot", more="  steps: many\n"): r"'steps' \(line 4\) is 'many', expected a whole number",
    entry("robot", more="  steps: 1.5\n"): "'steps' .* is '1.5', expected a whole number",
    entry("robot", more="  steps: true\n"): "expected a whole number",
    entry("robot", more="  learning_rate: yes\n"): "'learning_rate' .* is 'yes', expected a number",
    entry("robot", more="  learning_rate: [1]\n"): "is a list or a mapping, expected a number",
    entry("robot", more="  flip: 1\n"): "expected true or false",
    entry("robot", more="  targets: to_q\n"): "'targets' .* is 'to_q', expected a list of names",
    entry("robot", more="  targets: [1]\n"): "expected a list of names",
    entry("robot", more="  seed: !!python/name:os.system x\n"): "expected a whole number",
    entry("robot", more="  steps: 0\n"): "entry 1: steps is 0, expected at least 1",
    entry("robot", more="  steps: 1\n  steps: 2\n"): r"'steps' \(line 5\) is there twice",
    entry("robot", "''"): "'anchor' .* is no text",
    entry("robot", "[sks, toy]"): "'anchor' .* is no text",
    entry("robot", "'sks\\ttoy?'"): "entry 1: the anchor",
    entry("robot") + entry("robot"): "line 4, entry 2 has the output of an earlier entry",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_files_are_refused(place: Path, text: str) -> None:
    with pytest.raises(MokusError, match=BAD[text]):
        read_concepts(write(place, text))


def test_paths_are_seen_from_the_files_folder(place: Path) -> None:
    (concept,) = read_concepts(write(place, entry("2026", more="  learning_rate: 2e-4\n")))
    assert (concept.photos, concept.output) == (place / "photos" / "2026", place / "packs" / "2026.pack")
    assert concept.settings == {"learning_rate": 2e-4}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("photos --batch concepts.yaml", "leave out PHOTOS"),
        ("--anchor 'sks toy' --batch concepts.yaml", "--batch has photos, anchors"),
        ("-o out --batch concepts.yaml", "--batch has photos, anchors"),
        ("--batch concepts.yaml --resume", "leave out .* --resume"),
        ("--batch concepts.yaml --overwrite", "leave out .* --overwrite"),
        ("--batch concepts.yaml --steps 0", "steps is 0"),
        ("--batch nowhere.yaml", "nowhere.yaml is not there"),
        ("--anchor 'sks toy' -o out", "Missing argument 'PHOTOS'.*--batch"),
        ("photos --anchor 'sks toy'", "Missing option '--output'.*--batch"),
    ],
)
def test_one_concept_or_many(place: Path, given: str, said: str) -> None:

    write(place, entry("robot"))
    result = CliRunner().invoke(app, ["learn", *shlex.split(given)])
    assert result.exit_code == 2 and re.search(said, result.stderr), result.output
    assert not (place / "packs").exists() and not (place / "out").exists()
