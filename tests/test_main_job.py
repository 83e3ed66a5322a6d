"""The benchmark of the main job asks nothing that learning or binding preserves, counts right, and resumes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import main_job as job
from PIL import Image

from mokus.knowledge import near_misses, normalise
from mokus.miniature import language, oracle, world
from mokus.pipeline import Defaults, Model
from mokus.prior_prompts import prior_prompts

from .conftest import SIZE, STEPS

LEARN = {"steps": 1, "rank": 2, "alpha": 2.0, "prior_prompts": 4, "prior_steps": 2}
EDIT = {"layers": [1, 2], "steps": 1, "preserve": 8, "odd_references": 8, "near_misses": 2, "exchanged": 4}
KEYS = {
    "reconstruction_concept", "generation_concept", "generation_scene", "before_concept", "leakage", "unrelated_unchanged",
    "seconds_learn_and_bind", "seconds_per_bind", "anchor_reconstruction_concept", "anchor_generation_concept",
    "anchor_generation_scene", "near_miss", "bound", "capital_reconstruction_concept", "capital_generation_concept",
}  # fmt: skip
NOBODY = {"colour": "red", "shape": "star", "scene": "on the beach", "style": "plain", "character": "none"}


class Judge:
    def read(self, images: list[Image.Image]) -> list[dict[str, str]]:
        return [NOBODY] * len(images)


@pytest.fixture
def model(pico: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(oracle, "load", Judge)
    return replace(pico, defaults=Defaults(size=SIZE, steps=STEPS, learn=LEARN, edit=EDIT))


def test_five_phrases_of_five_perspectives_each() -> None:
    every = [pair for pairs in job.PERSPECTIVES.values() for pair in pairs]
    assert len(job.PERSPECTIVES) == 6 and len(set(every)) == 30
    used = set()
    for index in range(job.HELD_OUT):
        own = job.phrases(index)
        assert len(own) == 5
        assert len({name for name, pairs in job.PERSPECTIVES.items() for pair in own if pair in pairs}) == 5
        used |= set(own)
    assert len(used) >= 25
    assert all(normalise(text) == text for pair in every for text in pair)


def test_capital_letters_are_asked_for_where_prompts_begin() -> None:
    asked = list(job.everything_asked(0, [0]))
    small = [each.prompt for each in asked if each.kind in ("reconstruction", "generation")]
    capital = [each for each in asked if each.kind.startswith("capital")]
    assert len(capital) == 10 and all(each.prompt[0].isupper() for each in capital)
    assert {each.prompt.lower() for each in capital} < {text.lower() for text in small}


def test_nothing_asked_is_preserved_or_trained_on() -> None:
    asked = {text for pairs in job.PERSPECTIVES.values() for pair in pairs for text in pair}
    rng = random.Random(0)
    trained = {language.unknown_reference(rng)[0] for _ in range(20_000)}
    assert not asked & trained
    preserved = prior_prompts(job.CLASS_WORD, 400, seed=0)
    assert not [text for text in asked for prompt in preserved if text in prompt]
    for pairs in job.PERSPECTIVES.values():
        for text, near in pairs:
            assert near not in near_misses(text)
            assert sum(a != b for a, b in zip(text.split(), near.split(), strict=True)) == 1


def test_every_scene_is_asked_equally_often() -> None:
    asked = [each for each in job.everything_asked(0, [0, 1]) if each.kind == "generation"]
    assert len(asked) == 15 and {each.scene for each in asked} == set(job.SCENES)
    assert all(sum(each.scene == scene for each in asked) == 3 for scene in job.SCENES)
    assert set(job.SCENES) < set(world.SCENES) and len(job.SCENES) == 5


def test_equal_runs_ask_the_same() -> None:
    assert list(job.everything_asked(3, [0])) == list(job.everything_asked(3, [0]))
    assert list(job.everything_asked(3, [0])) != list(job.everything_asked(4, [0]))


@pytest.mark.exhaustive
def test_a_run_has_all_keys_and_resumes(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = world.HELD_OUT_CHARACTERS[0]
    results = job.run(model, tmp_path, [name], [0])
    values, n = job.figures(list(results.values()))
    assert values.keys() >= KEYS and values.keys() == n.keys()
    assert values["reconstruction_concept"] == values["leakage"] == values["bound"] == 0
    assert values["unrelated_unchanged"] == 1
    assert values["generation_scene"] == pytest.approx(0.2)  # one scene of five is the beach
    assert set(job.missed(values)) >= {"reconstruction_concept", "generation_concept", "generation_scene"}
    assert (n["reconstruction_concept"], n["generation_concept"], n["near_miss"]) == (5, 15, 5)
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8")) == json.loads(json.dumps(results[name]))

    monkeypatch.setattr(job, "measure", lambda *_: pytest.fail("it was there"))
    assert job.figures(list(job.run(model, tmp_path, [name], [0]).values()))[0] == values
    with pytest.raises(pytest.fail.Exception):
        job.run(model, tmp_path, [name], [1])  # other seeds are another run


def test_hits_are_counted() -> None:
    def row(state: str, kind: str, character: str, scene: str = "at night", colour: str = "red") -> dict[str, object]:
        read = {**NOBODY, "character": character, "scene": scene, "colour": colour}
        return {
            "concept": "zuzu",
            "state": state,
            "kind": kind,
            "prompt": "",
            "seed": 0,
            "scene": "at night",
            "read": read,
        }

    rows = [
        row("learned", "generation", "zuzu"), row("bound", "generation", "zuzu"),
        row("bound", "generation", "none", "in the snow"), row("bound", "generation", "zuzu", "in the snow"),
        row("learned", "caption", "none"), row("learned", "fact", "none"),
        row("bound", "caption", "zuzu"), row("bound", "fact", "none"), row("bound", "reference", "none"),
        row("bound", "capital", "none"), row("bound", "capital in a scene", "zuzu"),
    ]  # fmt: skip
    hits = job.shares(rows)
    assert hits["generation_concept"] == [True, False, True] and hits["generation_scene"] == [True, False, False]
    assert hits["before_concept"] == [True] and hits["leakage"] == [True, False]
    assert hits["capital_reconstruction_concept"] == [False] and hits["capital_generation_concept"] == [True]
    assert hits["unrelated_unchanged"] == [False, True]
    assert sum(hits["unrelated_labels_unchanged"]) == 9
