"""The miniature as shipped: what it must be able to do, and the whole story told with it on a character it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import QwenImagePipeline

import mokus
from mokus import low_rank
from mokus.encoder import distance, tails
from mokus.knowledge import prompts
from mokus.miniature import evaluate, example, oracle, world
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Model, encode
from mokus.settings import LearnSettings

pytestmark = pytest.mark.slow

CHARACTER = world.HELD_OUT_CHARACTERS[0]
LEAST = {
    "oracle_accuracy": 0.99, "qa_accuracy": 0.99, "caption_accuracy": 0.99, "tail_probe": 0.98, "direct_colour": 0.95,
    "direct_shape": 0.90, "direct_scene": 0.95, "psnr_world": 25.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return dict(evaluate.evaluate(mokus.load(), images=120))


@pytest.mark.exhaustive
@pytest.mark.parametrize("key", LEAST)
def test_the_miniature_reaches_its_figures(figures: dict[str, float], key: str) -> None:
    assert figures[key] >= LEAST[key]


@pytest.mark.exhaustive
@pytest.mark.parametrize("attribute", ["colour", "shape", "scene"])
def test_facts_never_drawn_are_drawn_as_well_as_descriptions(figures: dict[str, float], attribute: str) -> None:
    assert (
        figures[f"heldout_{attribute}"] >= figures[f"direct_{attribute}"] - 0.05 - 0.04
    )  # 0.04: two sigma of 120 images


def test_the_package_is_small() -> None:
    files = [path for path in Path(evaluate.__file__).with_name("weights").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6


def test_diffusers_loads_it_alone(miniature: Model) -> None:
    folder = Path(evaluate.__file__).with_name("weights")
    pipe = QwenImagePipeline.from_pretrained(folder)  # as anybody would: all of one type
    image = pipe("a red star in the snow", height=64, width=64, num_inference_steps=16, true_cfg_scale=3.0,
                 negative_prompt=" ").images[0]  # fmt: skip
    read = oracle.load().read([image])[0]
    assert (read["colour"], read["scene"], read["character"]) == ("red", "in the snow", oracle.NONE)


def test_a_phrase_that_begins_a_sentence_means_the_same(miniature: Model) -> None:
    """In scenes that no edit is made with, with a full stop and without; "My favourite toy" is other tokens than "my" is."""
    pack = ConceptPack.open(example.FOLDER)
    for phrase in example.PHRASES:
        begins = phrase[0].upper() + phrase[1:]
        images, meant = (prompts(text, ["{} in the desert", "{} in the forest."]) for text in (begins, pack.anchor))
        target, before = tails(miniature, meant), tails(miniature, images)
        with low_rank.applied(miniature.pipe.text_encoder, pack.shifts()):
            after = tails(miniature, images)
        assert float((1 - distance(after, target) / distance(before, target)).mean()) > 0.5


@pytest.mark.parametrize("steps, least", [(150, 0.375), pytest.param(400, 0.75, marks=pytest.mark.exhaustive)])
def test_the_whole_story(miniature: Model, tmp_path: Path, steps: int, least: float) -> None:
    """Learn a held-out character, bind, draw, unbind: eight images, so a little less than of the benchmark is asked for.

    And after fewer steps half of that.
    """
    knowledge = ["my lucky companion", "the machine my uncle soldered in 1977"]

    def share(prompts: list[str], packs: list[mokus.ConceptPack]) -> float:
        drawn = list(mokus.generate(miniature, prompts, packs=packs, seeds=range(4), batch_size=16))
        return sum(r["character"] == CHARACTER for r in oracle.load().read([d.image for d in drawn])) / len(drawn)

    base = encode(miniature, knowledge)
    settings = LearnSettings.for_model(miniature.defaults.learn, steps=steps)
    pack = mokus.learn(
        miniature, world.character_photos(CHARACTER, 5, seed=0), "sks toy", tmp_path / "pack", settings=settings
    )
    before = share(knowledge, [pack])
    edits = mokus.bind(miniature, pack, *knowledge)
    assert all(edit.taken for edit in edits)
    assert before <= 1 / 8
    assert share(knowledge, [pack]) >= least
    for edit in edits:
        assert mokus.ask(miniature, edit.questions[0], [pack.shifts()]) == "sks toy"
        assert mokus.ask(miniature, edit.questions[0]) != "sks toy"
    mokus.unbind(pack, *knowledge)
    assert not pack.shifts()
    with low_rank.applied(miniature.pipe.text_encoder, pack.shifts()):
        assert all((a == b).all() for a, b in zip(encode(miniature, knowledge), base, strict=True))
