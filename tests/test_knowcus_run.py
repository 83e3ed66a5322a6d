"""KnowCusBench's runner: what is planned is drawn, once, whatever stops it in between and however many share the work."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from mokus import pipeline
from mokus.bench.knowcusbench import packs, run
from mokus.bench.knowcusbench.ablate import SWEEPS, first_alone, many
from mokus.bench.knowcusbench.manifest import Suite, load_suite
from mokus.bench.knowcusbench.methods import METHODS, about, method
from mokus.bench.knowcusbench.plan import Plan, asked, class_prompt, image_file, make_plan
from mokus.bench.knowcusbench.recipe import Recipe
from mokus.bench.knowcusbench.run import Runner, Shard, estimate
from mokus.bench.state import alone
from mokus.cli import app
from mokus.editors import EDITORS
from mokus.errors import MokusError
from mokus.generation import packs_loaded
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Model
from mokus.settings import EditSettings, LearnSettings
from mokus.training.processes import Processes

from .conftest import PackFactory
from .test_cli import DEFAULTS

SUITE: dict[str, Any] = {
    "name": "two-toys", "about": "for tests", "rare_token": "sks",
    "sources": {"album": {"about": "photos of ours", "url": "https://example.org", "licence": "CC0"}},
    "concepts": [
        {
            "name": name, "class_word": "toy", "source": "album",
            "knowledge": [{"text": text, "perspective": "value and quality"} for text in texts],
            "prompts": [
                {"text": "{} on the beach", "perspective": "background"}, {"text": "{} in sepia", "perspective": "style"},
            ],
        }
        for name, texts in (("robot", ("my favourite toy", "the pride of our shelf")), ("duck", ("what Ada lent me",)))
    ],
}  # fmt: skip
PATIENCE = 900  # seconds for a process
FAST = ("base", "anchor", "rewrite", "mokus")  # without those that only make the tests longer


@pytest.fixture(scope="module")
def folder(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model with quick defaults of its own."""
    copy = tmp_path_factory.mktemp("models") / "pico"
    shutil.copytree(pico_folder, copy)
    quick = {**DEFAULTS, "learn": {**DEFAULTS["learn"], "place_share": 0.0, "looks_share": 0.0}}
    (copy / pipeline.DEFAULTS_FILE).write_text(json.dumps(quick), encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pipeline.load(folder, device="cpu")


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of both concepts."""
    place = tmp_path_factory.mktemp("album")
    for name, colour in (("robot", (200, 40, 40)), ("duck", (240, 220, 40))):
        (place / name).mkdir()
        for i in range(2):
            Image.new("RGB", (48, 40), (colour[0] - 20 * i, *colour[1:])).save(place / name / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite.model_validate(SUITE)


@pytest.fixture(scope="module")
def whole(model: Model, suite: Suite, album: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    place = tmp_path_factory.mktemp("whole")
    assert Runner(model, plan_of(model, suite, album), place, batch_size=4).run() == []
    return place


def plan_of(
    model: Model, suite: Suite, album: Path, methods: tuple[str, ...] = FAST, seeds: tuple[int, ...] = (0, 1)
) -> Plan:
    return make_plan(model, suite, {name: method(name) for name in methods}, seeds, {"album": album})


def contents(place: Path) -> dict[str, str]:
    """sha256 of every file by its path, but for how long things took."""
    files = [
        f for f in (place / "images", place / "packs") for f in f.rglob("*") if f.is_file() and f.name != "made.json"
    ]
    return {str(f.relative_to(place)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_plan_counts_are_products(model: Model, suite: Suite, album: Path) -> None:
    plan = plan_of(model, suite, album, METHODS, (0, 1, 2))
    counts = suite.counts()
    for name in METHODS:
        own = [item for item in plan.items if item.method == name]
        assert sum(item.kind == "reconstruction" for item in own) == 3 * counts["reconstruction"] == 3 * 3
        assert sum(item.kind == "generation" for item in own) == 3 * counts["generation"] == 3 * 3 * 2


def test_images_are_equal_exactly_where_all_that_decides_them_is(model: Model, suite: Suite, album: Path) -> None:
    plan = plan_of(model, suite, album, METHODS)
    by_key: dict[str, set[tuple[str, str, int]]] = {}
    for item in plan.items:
        by_key.setdefault(item.key, set()).add((item.pack, item.drawn, item.seed))
    assert all(len(causes) == 1 for causes in by_key.values())
    assert len(by_key) == len({cause for causes in by_key.values() for cause in causes})
    keys = {name: {item.key for item in plan.items if item.method == name} for name in METHODS}
    assert keys["rewrite"] == keys["anchor"]  # the prompts hold the knowledge word for word
    assert not keys["mokus"] & keys["mokus-paper"]
    assert len({item.pack for item in plan.items if item.method == "naive-db"}) == 3  # one training per knowledge


def test_key_depends_on_photos_settings_and_model(model: Model, suite: Suite, album: Path, tmp_path: Path) -> None:
    def keys(roots: Path, **settings: Any) -> set[str]:
        return {
            item.key
            for item in make_plan(model, suite, {"anchor": method("anchor")}, [0], {"album": roots}, **settings).items
        }

    other = shutil.copytree(album, tmp_path / "other")
    for name in ("robot", "duck"):
        Image.new("RGB", (48, 40), (1, 2, 3)).save(other / name / "0.png")
    assert keys(album) == keys(album)
    assert not keys(album) & keys(other)
    assert not keys(album) & keys(album, steps=3)


@pytest.mark.parametrize(
    ("template", "word", "expected"),
    [("{} on the beach", "toy", "a toy on the beach"), ("{}", "umbrella", "an umbrella"), ("{}", "sunglasses", "sunglasses"),
     ("{}", "glass", "a glass"), ("{}", "bus", "a bus")],
)  # fmt: skip
def test_class_prompt(template: str, word: str, expected: str) -> None:
    assert class_prompt(template, word) == expected


def test_unknown_method_and_concept_are_refused(model: Model, suite: Suite, album: Path) -> None:
    with pytest.raises(MokusError, match="no method 'magic'"):
        method("magic")
    with pytest.raises(MokusError, match=r"no concept 'cat'.*robot, duck"):
        make_plan(model, suite, {"base": method("base")}, [0], {"album": album}, ["cat"])
    with pytest.raises(MokusError, match="--photos album=DIR"):
        make_plan(model, suite, {"base": method("base")}, [0], {})


def test_every_method_says_what_it_is() -> None:
    assert all(about(name).endswith((".", ":")) or about(name) for name in METHODS)
    assert len({about(name) for name in METHODS}) == len(METHODS)


def test_shipped_miniature_suite_can_be_planned() -> None:
    suite = load_suite("miniature")
    assert sum(len(asked(concept)) for concept in suite.concepts) == (
        suite.counts()["reconstruction"] + suite.counts()["generation"]
    )


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_everything_planned_is_there_and_nothing_else(model: Model, suite: Suite, album: Path, whole: Path) -> None:
    plan = plan_of(model, suite, album)
    assert {f.stem for f in (whole / "images").rglob("*.png")} == set(plan.images())
    about = json.loads(Image.open(image_file(whole, plan.items[0].key)).text["mokus"])  # type: ignore[attr-defined]
    assert (about["prompt"], about["seed"]) == (plan.items[0].drawn, plan.items[0].seed)


def test_images_are_those_of_the_plain_pipeline_with_the_pack(
    model: Model, suite: Suite, album: Path, whole: Path
) -> None:
    """Up to rounding; an edit moves the negative prompt as it moves any other."""
    plan = plan_of(model, suite, album)
    shelf = Runner(model, plan, whole).shelf
    for name in ("base", "anchor", "mokus"):
        item = next(each for each in plan.items if each.method == name and each.perspective)
        found = shelf.find(item.pack) if item.pack else None
        s = plan.settings
        with packs_loaded(model, [found[0]] if found else []):
            image = model.pipe(
                prompt=item.drawn, negative_prompt=s["negative_prompt"], true_cfg_scale=s["true_cfg_scale"],
                num_inference_steps=s["steps"], height=s["size"], width=s["size"],
                generator=torch.Generator("cpu").manual_seed(item.seed),
            ).images[0]  # fmt: skip
        drawn = Image.open(image_file(whole, item.key))
        assert abs(np.asarray(image, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1


def test_a_finished_run_does_nothing_again(
    model: Model, suite: Suite, album: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((packs, "learn"), (packs, "bind"), (run, "draw"), (run, "encode")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("done again"))
    before = contents(whole)
    assert Runner(model, plan_of(model, suite, album), whole, batch_size=4).run() == []
    assert contents(whole) == before


class Killed(BaseException):
    """What nothing catches, like the death of the process."""


@pytest.mark.parametrize("at", [4, *(pytest.param(at, marks=pytest.mark.exhaustive) for at in (1, 9, 17, 23))])
def test_killed_at_any_write_and_resumed_equals_uninterrupted(
    model: Model, suite: Suite, album: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The at-th file to be moved to its place is not; neither is any after it until the run is started again."""
    real, count = os.replace, 0

    def dying(a: Any, b: Any) -> None:
        nonlocal count
        count += 1
        if count >= at:
            raise Killed
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            Runner(model, plan_of(model, suite, album), tmp_path, batch_size=4).run()
    model.pipe.unload_lora_weights()
    assert Runner(model, plan_of(model, suite, album), tmp_path, batch_size=4).run() == []
    assert contents(tmp_path) == contents(whole)


def test_deleted_image_is_drawn_again_to_the_bit(
    model: Model, suite: Suite, album: Path, whole: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(whole, tmp_path / "run")
    for i, file in enumerate(sorted((place / "images").rglob("*.png"))):
        if i % 3 == 0:
            file.unlink()
    Runner(model, plan_of(model, suite, album), place, batch_size=4).run()
    assert contents(place) == contents(whole)


@pytest.mark.exhaustive
def test_shards_together_draw_what_one_process_does(
    model: Model, suite: Suite, album: Path, whole: Path, tmp_path: Path
) -> None:
    for i in range(2):
        Runner(model, plan_of(model, suite, album), tmp_path, batch_size=4).run(Shard(i, 2))
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_methods_one_by_one_draw_what_they_draw_together(
    model: Model, suite: Suite, album: Path, whole: Path, tmp_path: Path
) -> None:
    for name in reversed(FAST):
        Runner(model, plan_of(model, suite, album, (name,)), tmp_path, batch_size=4).run()
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_looks_is_learned_once_for_all_methods(
    model: Model, suite: Suite, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[str] = []
    real = packs.learn
    monkeypatch.setattr(packs, "learn", lambda *a, **k: learned.append(a[2]) or real(*a, **k))
    plan = plan_of(model, suite, album, METHODS, (0,))
    Runner(model, plan, tmp_path, batch_size=8).run()
    assert sorted(learned) == sorted(["sks toy"] * 2 + [k.text for c in suite.concepts for k in c.knowledge])
    rows = run.training_rows(plan, Runner(model, plan, tmp_path).shelf)
    assert {(row["method"], row["concept"]) for row in rows} == {(m, c) for m in METHODS for c in ("robot", "duck")}
    seconds = {row["method"]: row["seconds_learn"] for row in rows if row["concept"] == "robot"}
    assert seconds["base"] == 0 < seconds["anchor"] == seconds["mokus"]


def test_one_failed_item_does_not_stop_the_rest(
    model: Model, suite: Suite, album: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(model, suite, album)
    bad = plan.items[0]
    real = run.draw

    def draw(model: Model, jobs: Any, *rest: Any) -> Any:
        if any(seed == bad.seed for _, seed in jobs):
            raise RuntimeError("out of memory\nsecond line")
        return real(model, jobs, *rest)

    monkeypatch.setattr(run, "draw", draw)
    failed = Runner(model, plan, tmp_path, batch_size=4).run()
    assert {each.key for each in failed} == {key for key, item in plan.images().items() if item.seed == bad.seed}
    assert {each.reason for each in failed} == {"out of memory"}
    there = {f.stem for f in (tmp_path / "images").rglob("*.png")}
    assert there == set(plan.images()) - {each.key for each in failed}


def batches_fail(patch: pytest.MonkeyPatch, runner: ModuleType) -> list[bool]:
    """From now on a module's `draw` of several at once runs out of memory. Returns, growing, of each that is drawn alone whether
    what a failed batch held is still there: it has to be gone, or its items fail as well."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    real = runner.draw

    def draw(model: Model, jobs: Any, *rest: Any) -> Any:
        if len(jobs) > 1:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            raise RuntimeError("out of memory")
        assert held
        alive.append(any(each() is not None for each in held))
        return real(model, jobs, *rest)

    patch.setattr(runner, "draw", draw)
    return alive


def test_nothing_of_a_failed_batch_is_held_when_each_is_drawn_alone(
    model: Model, suite: Suite, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = batches_fail(monkeypatch, run)
    plan = plan_of(model, suite, album, ("base",), (0,))
    assert Runner(model, plan, tmp_path, batch_size=4).run() == []
    assert len(alive) == len(plan.images()) and not any(alive)


def test_concept_without_photos_fails_alone(model: Model, suite: Suite, album: Path, tmp_path: Path) -> None:
    shutil.copytree(album, tmp_path / "album")
    shutil.rmtree(tmp_path / "album" / "duck")
    (tmp_path / "album" / "robot" / "0.png").write_bytes(b"no image")
    plan = plan_of(model, suite, tmp_path / "album", ("base", "anchor"))
    failed = Runner(model, plan, tmp_path / "run").run()
    assert {(each.method, each.concept) for each in failed} == {("anchor", "duck"), ("anchor", "robot")}
    assert {"cannot be read" in each.reason or "not there" in each.reason for each in failed} == {True}
    assert {f.stem for f in (tmp_path / "run" / "images").rglob("*.png")} == {
        i.key for i in plan.items if i.method == "base"
    }


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_sweeps_ask_the_same_at_every_value(model: Model, suite: Suite, album: Path) -> None:
    settings = {name: EditSettings.for_editor(model.defaults, editor=name) for name in EDITORS}
    for make in SWEEPS.values():
        sweep = make(suite, settings)
        plan = make_plan(model, first_alone(suite), sweep.methods, [0], {"album": album})
        prompts = [{(i.concept, i.prompt) for i in plan.items if i.method == name} for name in sweep.methods]
        assert all(each == prompts[0] for each in prompts)
        assert len({i.pack for i in plan.items if i.concept == "robot"}) == len(sweep.methods)


def test_knowledge_sweep_begins_with_ones_own_and_shares_packs_with_mokus(
    model: Model, suite: Suite, album: Path
) -> None:
    assert many(suite, "what Ada lent me") == ("what Ada lent me", "my favourite toy", "the pride of our shelf")
    settings = {name: EditSettings.for_editor(model.defaults, editor=name) for name in EDITORS}
    sweep = SWEEPS["knowledge"](suite, settings)
    assert list(sweep.values.values()) == [1, 2, 3]
    swept = make_plan(model, first_alone(suite), sweep.methods, [0], {"album": album})
    usual = plan_of(model, suite, album, ("mokus",), (0,))
    own = {i.pack for i in usual.items if i.concept == "robot"}
    assert own == {i.pack for i in swept.items if i.concept == "robot" and i.method == "mokus@knowledge=2"}


def test_the_estimate_counts_a_piece_once_where_packs_go_on_from_each_other(
    model: Model, suite: Suite, album: Path, tmp_path: Path
) -> None:
    settings = {name: EditSettings.for_editor(model.defaults, editor=name) for name in EDITORS}
    plan = make_plan(
        model, first_alone(suite), SWEEPS["knowledge"](suite, settings).methods, [0], {"album": album}, ["robot"]
    )
    assert estimate(model, plan, tmp_path, 4).bound == 3
    (tmp_path / "packs" / next(i.pack for i in plan.items if i.method == "mokus@knowledge=2")).mkdir(parents=True)
    assert estimate(model, plan, tmp_path, 4).bound == 2  # the first, were it wanted alone, and the third
    last = make_plan(model, first_alone(suite), {"last": SWEEPS["knowledge"](suite, settings).methods["mokus@knowledge=3"]},
                     [0], {"album": album}, ["robot"])  # fmt: skip
    assert estimate(model, last, tmp_path, 4).bound == 1 and estimate(model, last, tmp_path / "new", 4).bound == 3


def test_seconds_are_those_of_binding_all_at_once_with_the_statistics_at_hand(
    model: Model, pico_pack: PackFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each edit once, and once what is done before and after them, however many packs a pack goes on from."""
    clock = [0.0]

    def statistics(*_: Any) -> None:
        clock[0] += 100

    def bound(model: Model, pack: ConceptPack, *knowledge: str, **_: Any) -> list[SimpleNamespace]:
        clock[0] += 7 + 3 * len(knowledge)
        return [SimpleNamespace(taken=True, seconds=3.0) for _ in knowledge]

    monkeypatch.setattr(packs, "editor", lambda _: statistics)
    monkeypatch.setattr(packs, "bind", bound)
    monkeypatch.setattr(packs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    pico_pack(tmp_path / "looks" / "pack")
    shelf, shorter = packs.Shelf(model, tmp_path, LearnSettings()), {}
    for n, wanted in ((1, (10, 3)), (2, (13, 6)), (4, (19, 12))):
        recipe = Recipe("sks toy", edit=EditSettings(), knowledge=tuple(f"thing {i}" for i in range(n)))
        shelf.bound(str(n), recipe, "looks", shorter)
        found = shelf.find(str(n))
        assert found and (found[1].seconds, found[1].editing) == wanted and found[1].taken == n
        shorter = {**shorter, n: str(n)}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_longer_pack_goes_on_from_a_shorter_one_to_the_same(
    model: Model, suite: Suite, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {name: EditSettings.for_editor(model.defaults, editor=name) for name in EDITORS}
    sweep = SWEEPS["knowledge"](suite, settings)
    bound: list[int] = []
    real = packs.bind
    monkeypatch.setattr(packs, "bind", lambda *a, **k: bound.append(len(a) - 2) or real(*a, **k))
    plan = make_plan(model, first_alone(suite), sweep.methods, [0], {"album": album}, ["robot"])
    Runner(model, plan, tmp_path / "steps").run()
    assert bound == [1, 1, 1]
    last = {"last": sweep.methods["mokus@knowledge=3"]}
    alone = make_plan(model, first_alone(suite), last, [0], {"album": album}, ["robot"])
    Runner(model, alone, tmp_path / "alone").run()
    key = alone.items[0].pack
    found = [Runner(model, p, tmp_path / d).shelf.find(key) for p, d in ((plan, "steps"), (alone, "alone"))]
    one, other = ([(known.text, shifts) for known, shifts in there[0].edits()] for there in found if there)
    assert [text for text, _ in one] == [text for text, _ in other] == list(many(suite, "my favourite toy"))
    for (_, a), (_, b) in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[path].A, b[path].A) and torch.equal(a[path].B, b[path].B) for path in a)
    # what was left out of the second pack might take in the third
    packs_of = {item.method: tmp_path / "steps" / "packs" / str(item.pack) for item in plan.items}
    made = packs_of["mokus@knowledge=2"] / "made.json"
    made.write_text(json.dumps({**json.loads(made.read_text()), "taken": 1}))
    shutil.rmtree(packs_of["mokus@knowledge=3"])
    for item in plan.items:
        image_file(tmp_path / "steps", item.key).unlink(missing_ok=True)
    bound.clear()
    Runner(model, plan, tmp_path / "steps").run()
    assert bound == [2]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, album: Path) -> Path:
    """A working folder with the suite and its photos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOKUS_MODEL", str(folder))
    shutil.copytree(album, tmp_path / "album")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE), encoding="utf-8")
    return tmp_path


RUN = "bench knowcus run --suite suite.yaml --photos album=album --seeds 0-1 --batch-size 4 --methods"


ABLATE = "bench knowcus ablate --sweep eta --suite suite.yaml --photos album=album --seeds 0"


def command(text: str) -> Result:
    return CliRunner().invoke(app, text.split())


def test_run_and_run_again(place: Path) -> None:
    found = command(f"{RUN} base,anchor -o out")
    assert found.exit_code == 0, found.output
    assert "base: 6 reconstructions, 12 generations" in found.stderr
    assert "36 images in all, 30 of them different" in found.stderr
    plan = json.loads((place / "out/plan.json").read_text())
    assert plan["methods"] == ["base", "anchor"] and len(plan["items"]) == 36
    assert json.loads((place / "out/failed.json").read_text()) == []
    before = contents(place / "out")
    again = command(f"{RUN} base,anchor,rewrite -o out --json")
    assert again.exit_code == 0 and json.loads(again.stdout)["failed"] == []
    assert contents(place / "out") == before  # a rewrite is the anchor here
    assert json.loads((place / "out/plan.json").read_text())["methods"] == ["base", "anchor", "rewrite"]


def test_what_failed_before_is_not_forgotten(place: Path) -> None:
    """By a run of other methods in the same folder; what fails again or is drawn now is there once or not at all."""
    (place / "album" / "robot" / "0.png").write_bytes(b"no image")
    assert command(f"{RUN} anchor -o out").exit_code == 1
    failed = json.loads((place / "out/failed.json").read_text())
    assert failed and {each["concept"] for each in failed} == {"robot"}
    assert command(f"{RUN} base -o out").exit_code == 0
    assert json.loads((place / "out/failed.json").read_text()) == failed
    assert command(f"{RUN} anchor -o out").exit_code == 1
    assert json.loads((place / "out/failed.json").read_text()) == failed


def test_concepts_are_named_with_spaces_between_them(place: Path) -> None:
    found = CliRunner().invoke(app, [*f"{RUN} base -o out --plan --concepts".split(), "duck, robot"])
    assert found.exit_code == 0 and "2 concepts" in found.stderr, found.output


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scores.json", {"rows": []}), ("scores.json", [1]), ("scores.json", {"metrics": {}, "rows": [1]}),
        ("plan.json", {"a": 1}), ("plan.json", []),
    ],
)  # fmt: skip
def test_a_file_that_no_run_wrote_is_one_sentence(place: Path, name: str, content: Any) -> None:
    assert command(f"{RUN} base -o out").exit_code == 0
    (place / "out" / name).write_text(json.dumps(content))
    found = command("bench knowcus report out --photos album=album --without clip,clip_i_seg,dino,pick")
    assert (found.exit_code, found.stdout) == (2, "") and "is not as a run writes it" in found.stderr
    if name == "plan.json":
        assert "is not as a run writes it" in command(f"{RUN} base -o out").stderr


@pytest.mark.exhaustive
def test_a_concept_without_photos_leaves_the_others_scored(place: Path) -> None:
    clip = Path(pipeline.__file__).parent / "miniature/weights/clip"
    measured = f"--photos album=album --clip {clip} --without clip_i_seg,dino,pick"
    (place / "album" / "robot" / "0.png").write_bytes(b"no image")
    assert command(f"{RUN} base,anchor -o out").exit_code == 1
    assert command(f"bench knowcus report out {measured}").exit_code == 0
    scores = json.loads((place / "out/scores.json").read_text())
    assert {row["concept"] for row in scores["rows"]} == {"duck"}
    assert "cannot be read" in next(row["reason"] for row in scores["missing"] if row["method"] == "base")
    swept = command(f"{ABLATE} -o swept {measured}")
    assert swept.exit_code == 1 and (place / "swept/ablation.json").is_file()


def test_check_says_what_there_is(place: Path) -> None:
    check = "bench knowcus check --suite suite.yaml --photos album=album"
    found = command(check)
    assert found.exit_code == 0 and "2 of 2 concepts are ready" in found.stdout, found.output
    shutil.rmtree(place / "album" / "duck")
    found = command(f"{check} --json")
    there = {each["concept"]: each["problem"] for each in json.loads(found.stdout)["photos"]}
    assert found.exit_code == 1 and there["robot"] is None and "https://example.org" in there["duck"]
    assert "rendered" in command("bench knowcus check --suite miniature").stdout


@pytest.mark.exhaustive
def test_a_sweep_is_drawn_scored_and_reported(place: Path) -> None:
    clip = Path(pipeline.__file__).parent / "miniature/weights/clip"
    measured = f"--clip {clip} --without clip_i_seg,dino,pick"
    found = command(f"{ABLATE} -o out {measured} --json")
    assert found.exit_code == 0, found.output
    (sweep,) = json.loads(found.stdout)["sweeps"]
    assert sweep["name"] == "eta" and len({row["value"] for row in sweep["rows"]}) == 5
    assert len(list((place / "out/images").rglob("*.png"))) == 2 * 5 * 3  # concepts x values x (itself and two prompts)
    report = command(f"bench knowcus report out --photos album=album {measured}")
    assert report.exit_code == 0, report.output
    assert "eta" in (place / "out/report.md").read_text() and (place / "out/report.html").is_file()
    assert json.loads((place / "out/results.json").read_text())["ablation"] == [sweep]
    (place / "out/ablation.json").write_text(json.dumps({"sweeps": [{**sweep, "rows": [
        {**row, "figures": {}, "interval": {}} for row in sweep["rows"]
    ]}]}))  # fmt: skip
    assert command(f"bench knowcus report out --photos album=album {measured}").exit_code == 0
    assert json.loads((place / "out/results.json").read_text())["ablation"] == [sweep]  # of the scores, not of the file


@pytest.mark.parametrize("arguments, sentence", [
    ("ablate --sweep colour -o out", "there is no sweep 'colour', expected some of knowledge, eta, layers."),
    ("report nowhere", "nowhere holds no run; make one by 'mokus bench knowcus run -o nowhere'."),
    ("check --suite nowhere.yaml", "nowhere.yaml"),
])  # fmt: skip
def test_mistakes_of_the_other_commands(place: Path, arguments: str, sentence: str) -> None:
    found = command(f"bench knowcus {arguments}")
    assert found.exit_code == 2 and sentence in found.stderr and "Traceback" not in found.output, found.output


def test_a_method_that_is_made_otherwise_now_is_not_averaged_with_what_it_was(
    model: Model, suite: Suite, album: Path, tmp_path: Path
) -> None:
    """Other settings of its editor, in the folder of an earlier run: its old images are asked for no more, the others are."""
    changed = replace(model, defaults=replace(model.defaults, edit={**model.defaults.edit, "drift_weight": 0.5}))
    before, now = plan_of(model, suite, album, ("anchor", "mokus")), plan_of(changed, suite, album, ("mokus",), (1, 2))
    for plan, seeds in ((before, [0, 1]), (now, [1, 2])):
        run.write_plan(model, plan, tmp_path, seeds, "a command", "a suite")
    items = json.loads((tmp_path / "plan.json").read_text())["items"]
    found = {name: {item["key"] for item in items if item["method"] == name} for name in ("anchor", "mokus")}
    assert found["anchor"] == {item.key for item in before.items if item.method == "anchor"}
    assert found["mokus"] == {item.key for item in now.items}
    assert not found["mokus"] & {item.key for item in before.items}


def test_more_seeds_of_the_same_are_added(model: Model, suite: Suite, album: Path, tmp_path: Path) -> None:
    for seeds in ((0, 1), (1, 2)):
        run.write_plan(model, plan_of(model, suite, album, ("mokus",), seeds), tmp_path, seeds, "a command", "a suite")
    items = json.loads((tmp_path / "plan.json").read_text())["items"]
    wanted = plan_of(model, suite, album, ("mokus",), (0, 1, 2)).items
    assert sorted(item["key"] for item in items) == sorted(item.key for item in wanted)


def test_a_model_is_the_same_whatever_it_is_called(model: Model, suite: Suite, album: Path, tmp_path: Path) -> None:
    """A run of a folder that was given by a relative path, or has moved, is gone on with; one of other weights is not."""
    for name in ("models/mine", str(tmp_path / "models" / "mine")):
        called = replace(model, id=name)
        run.write_plan(called, plan_of(called, suite, album, ("mokus",)), tmp_path, [0], "a command", "a suite")
    assert json.loads((tmp_path / "plan.json").read_text())["model"] == name
    other = replace(called, fingerprint="f" * 64)
    with pytest.raises(MokusError, match="another fingerprint"):
        run.write_plan(other, plan_of(other, suite, album, ("mokus",)), tmp_path, [0], "a command", "a suite")


def test_plan_draws_nothing(place: Path) -> None:
    found = command(f"{RUN} base -o out --plan")
    assert found.exit_code == 0 and "to do: 18 images" in found.stderr and not (place / "out").exists()


def test_failures_are_listed_and_exit_code_is_1(place: Path) -> None:
    shutil.rmtree(place / "album" / "duck")
    found = command(f"{RUN} base,anchor -o out")
    assert found.exit_code == 1 and "failed: anchor, duck" in found.stderr and "Traceback" not in found.output
    listed = json.loads((place / "out/failed.json").read_text())
    assert {each["concept"] for each in listed} == {"duck"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--methods base,magic -o out", "there is no method 'magic', expected some of base, anchor"),
        ("--methods base --seeds x -o out", "--seeds got 'x'"),
        ("--methods base --concepts cat -o out", "has no concept 'cat', expected some of robot, duck"),
        ("--methods base --photos nowhere=album -o out", "expected SOURCE=DIR with a source of album"),
        ("--methods base --photos album=nothing -o out", "the folder of album, nothing, is not there"),
        ("--methods base --suite nothing.yaml -o out", "nothing.yaml"),
        ("--methods base --size 33 -o out", "multiple of"),
    ],
)
def test_mistakes_are_one_sentence(place: Path, arguments: str, sentence: str) -> None:
    found = command(f"bench knowcus run --suite suite.yaml --photos album=album {arguments}")
    assert found.exit_code == 2, found.output
    assert sentence in " ".join(found.stderr.split()) and len(found.stderr.strip().splitlines()) == 1
    assert not (place / "out").exists()


def test_photos_must_be_named(place: Path) -> None:
    found = command("bench knowcus run --suite suite.yaml --methods base -o out")
    assert found.exit_code == 2 and "--photos album=DIR" in found.stderr


def test_folder_of_another_run_is_refused(place: Path) -> None:
    assert command(f"{RUN} base -o out").exit_code == 0
    found = command(f"{RUN} base --steps 3 -o out")
    assert found.exit_code == 2 and "another settings" in found.stderr


def test_a_run_of_other_versions_is_not_gone_on_with_but_reported(place: Path) -> None:
    """Images of both would stand under the versions of the newer."""
    assert command(f"{RUN} base -o out").exit_code == 0
    plan = json.loads((place / "out/plan.json").read_text())
    newer = plan["versions"]["torch"]
    plan["versions"]["torch"] = "1.0"
    (place / "out/plan.json").write_text(json.dumps(plan))
    found = command(f"{RUN} base,anchor -o out")
    assert found.exit_code == 2
    assert f"out holds a run with another torch (1.0, now {newer}); name another folder with -o." in found.stderr
    assert json.loads((place / "out/plan.json").read_text()) == plan
    found = command("bench knowcus report out --photos album=album --without clip,clip_i_seg,dino,pick")
    assert found.exit_code == 0 and "torch 1.0" in (place / "out/report.md").read_text(), found.output


def test_two_runs_at_once_are_refused(place: Path) -> None:
    with alone(place / "out"):
        found = command(f"{RUN} base -o out")
    assert found.exit_code == 2 and "another run is at work" in found.stderr


def test_full_disk_is_a_sentence_and_loses_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = run.save_png, 0

    def save_png(result: Any, file: Path) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(result, file)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_png", save_png)
        found = command(f"{RUN} base -o out")
    assert found.exit_code == 2 and "No space left on device" in found.stderr and "Traceback" not in found.output
    assert len(list((place / "out/images").rglob("*"))) >= 2
    assert command(f"{RUN} base -o out").exit_code == 0


@pytest.mark.slow
def test_two_processes_make_the_same_files_as_one(place: Path) -> None:
    one = command(f"{RUN} {','.join(FAST)} -o one")
    assert one.exit_code == 0 and one.stderr.count("/2)") == 2, one.stderr[-3000:]  # concepts of each process
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # of its launchers, --cpu starts one process, however many are asked for; --multi_gpu starts them, here on CPUs
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    arguments = [*launch, *f"-m mokus {RUN} {','.join(FAST)} -o two".split()]
    two = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert two.returncode == 0 and two.stderr.count("/1)") == 2, two.stderr[-3000:]
    assert contents(place / "one") == contents(place / "two")
    items = [json.loads((place / name / "plan.json").read_text())["items"] for name in ("one", "two")]
    assert items[0] == items[1]


@pytest.mark.parametrize(("index", "code"), [(0, 1), (1, 0)])
def test_only_the_first_process_tells_of_a_failure(
    place: Path, monkeypatch: pytest.MonkeyPatch, index: int, code: int
) -> None:
    for name in ("robot", "duck"):  # one for each process
        (place / "album" / name / "0.png").write_bytes(b"no image")
    monkeypatch.setattr(Processes, "of_environment", lambda: Processes(index, 2, "cpu"))
    left = []  # whether all was written when the process was ready to leave the others
    for file, arguments in (
        ("failed.json", f"{RUN} anchor"),
        ("ablation.json", f"{ABLATE} --without clip,clip_i_seg,dino,pick"),
    ):
        monkeypatch.setattr(Processes, "leave", lambda self, file=file: left.append((place / "out" / file).is_file()))
        found = command(f"{arguments} -o out")
        assert (found.exit_code, "failed: " in found.stderr) == (code, index == 0), found.output
    assert left == [index == 0] * 2


# of the first process, what it does when all is drawn takes longer than the launcher needs to end it
SLOWLY = """
import time
from mokus.bench.knowcusbench import run
from mokus.cli import main

write = run.write_training
run.write_training = lambda *given: (time.sleep(3), write(*given))
main()
"""


@pytest.mark.slow
def test_the_first_of_two_processes_has_written_all_before_the_launcher_ends(place: Path) -> None:
    shutil.rmtree(place / "album" / "duck")
    (place / "slowly.py").write_text(SLOWLY)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0"]  # a free one
    arguments = [*launch, "slowly.py", *f"{RUN} base,anchor -o out".split()]
    done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and (place / "out/failed.json").is_file(), done.stderr[-3000:]
    assert {each["concept"] for each in json.loads((place / "out/failed.json").read_text())} == {"duck"}
    assert json.loads((place / "out/training.json").read_text())["rows"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_kill_9_and_resume(place: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "mokus", *f"{RUN} {','.join(FAST)} -o out".split()]
    for many_files in (1, 6):  # killed when so many images are there
        process = subprocess.Popen(
            arguments, cwd=place, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        _wait_for(place / "out", many_files, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    straight = [sys.executable, "-m", "mokus", *f"{RUN} {','.join(FAST)} -o straight".split()]
    assert subprocess.run(straight, cwd=place, env=environment, capture_output=True, timeout=PATIENCE).returncode == 0
    assert contents(place / "out") == contents(place / "straight")


def _wait_for(place: Path, images: int, process: subprocess.Popen[bytes], seconds: float = PATIENCE) -> None:
    """Until so many images are there, or the process has ended."""
    began = time.monotonic()
    while len(list(place.rglob("images/*/*.png"))) < images and process.poll() is None:
        assert time.monotonic() - began < seconds
        time.sleep(0.02)
