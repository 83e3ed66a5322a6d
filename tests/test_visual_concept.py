"""Learning is repeatable, can be broken off and resumed to the same bytes, and leaves the model as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image, ImageOps
from torch import Tensor

from mokus import flow
from mokus.errors import MokusError
from mokus.generation import generate
from mokus.miniature import world
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Model
from mokus.places import PLACES
from mokus.settings import LearnSettings
from mokus.training import material, trainers
from mokus.training.material import CROPS
from mokus.visual_concept import learn

from .conftest import ATTENTION, BLOCKS, SIZE, PackFactory, random_lora

ANCHOR = "sks toy"
QUICK = LearnSettings(
    steps=4, rank=2, alpha=2.0, learning_rate=1e-2, prior_prompts=2, prior_steps=2, checkpoint_every=2, place_share=0.0,
    looks_share=0.0,
)  # fmt: skip
ALONE = replace(QUICK, steps=3, prior_weight=0.0, tail_share=0.0)  # nothing but the photos and their prompts


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return world.character_photos("bobo", 2, seed=0, size=SIZE)


@pytest.fixture(scope="module")
def plain(pico: Model, images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> ConceptPack:
    """The pack of an undisturbed run with QUICK; not to be changed."""
    return learn(pico, images, ANCHOR, tmp_path_factory.mktemp("plain") / "toy.pack", settings=QUICK)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def checkpoint(output: Path) -> Path:
    return output.parent / f".{output.name}.learning" / "checkpoint.pt"


class Stop(Exception):
    """Raised in the middle of a run."""


def stop_at(step: int, stage: str = "learning") -> Callable[..., None]:
    def progress(what: str, done: int, total: int, info: dict[str, Any]) -> None:
        if what == stage and done == step:
            raise Stop

    return progress


def broken_off(model: Model, images: Any, output: Path, settings: LearnSettings = QUICK, step: int = 3) -> None:
    with pytest.raises(Stop):
        learn(model, images, ANCHOR, output, settings=settings, overwrite=True, progress=stop_at(step))


# --- the model --------------------------------------------------------------------------------------------------------


def snapshot(model: Model) -> tuple[dict[str, Tensor], list[tuple[str, type]], Tensor]:
    transformer = model.pipe.transformer
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        velocity = flow.velocity(
            transformer, torch.randn(1, 16, 32, generator=random), torch.tensor([0.5]),
            torch.randn(1, 5, 192, generator=random), None, (4, 4),
        )  # fmt: skip
    return weights, [(name, type(module)) for name, module in transformer.named_modules()], velocity


def assert_unchanged(model: Model, before: tuple[dict[str, Tensor], list[tuple[str, type]], Tensor]) -> None:
    weights, modules, velocity = snapshot(model)
    assert equal(weights, before[0]) and modules == before[1] and torch.equal(velocity, before[2])
    transformer = model.pipe.transformer
    assert not any(p.requires_grad or p.grad is not None for p in transformer.parameters())
    assert not transformer.training and not getattr(transformer, "peft_config", None)
    assert not getattr(transformer, "_hf_peft_config_loaded", False)  # diffusers would look for adapters


@pytest.fixture(autouse=True)
def _for_the_next_test(pico: Model) -> Iterator[None]:
    """One failing test shall not make others fail."""
    yield
    pico.pipe.transformer.unload_lora()
    pico.pipe.transformer.requires_grad_(False)


def test_the_model_is_as_before(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    before = snapshot(pico)
    learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=replace(QUICK, preview_every=2))
    assert_unchanged(pico, before)
    for step, stage in ((1, "reading photos"), (2, "recording what must stay"), (1, "learning"), (3, "learning")):
        with pytest.raises(Stop):
            learn(pico, images, ANCHOR, tmp_path / "b.pack", settings=QUICK, progress=stop_at(step, stage))
        assert_unchanged(pico, before)
        assert not (tmp_path / "b.pack").exists()


def test_a_refused_target_leaves_the_model_as_before(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    before = snapshot(pico)
    with pytest.raises(MokusError, match="no_such"):
        learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=replace(ALONE, targets=["no_such"]))
    assert_unchanged(pico, before)
    assert learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=ALONE).lora()


def test_adapters_of_the_user_are_not_taken_away(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    """Nor learned on top of: the pack would be of another model than it says."""
    pico.pipe.load_lora_weights(random_lora(pico), adapter_name="mine")
    try:
        with pytest.raises(MokusError, match="adapter"):
            learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=QUICK)
        assert "mine" in getattr(pico.pipe.transformer, "peft_config", {})
    finally:
        pico.pipe.unload_lora_weights()


# --- what is learned --------------------------------------------------------------------------------------------------


def test_the_pack_says_what_was_learned(pico: Model, plain: ConceptPack) -> None:
    assert plain.anchor == ANCHOR and plain.fingerprint == pico.fingerprint and plain.knowledge == []
    assert plain.settings == json.loads(json.dumps(QUICK.__dict__))
    targets = {f"transformer.transformer_blocks.{i}.attn.{name}" for i in range(BLOCKS) for name in QUICK.targets}
    sides = {f"{target}.lora_{side}.weight" for target in targets for side in "AB"}
    lora = plain.lora()
    assert lora.keys() == sides
    assert all(value.shape[0 if "lora_A" in key else 1] == QUICK.rank for key, value in lora.items())
    assert all(value.abs().max() > 0 for value in lora.values())  # B begins at zero


def test_diffusers_loads_the_looks(pico_folder: Path, plain: ConceptPack) -> None:
    pipe = QwenImagePipeline.from_pretrained(pico_folder)
    pipe.load_lora_weights(plain.path, use_safetensors=True)
    adapted = {name: module for name, module in pipe.transformer.named_modules() if hasattr(module, "lora_A")}
    lora = plain.lora()
    assert len(adapted) == len(lora) / 2
    for name, module in adapted.items():
        (adapter,) = module.lora_A
        assert module.scaling == {adapter: 1.0}
        assert torch.equal(module.lora_A[adapter].weight, lora[f"transformer.{name}.lora_A.weight"])
        assert torch.equal(module.lora_B[adapter].weight, lora[f"transformer.{name}.lora_B.weight"])


def test_the_loss_goes_down(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    """In training, and as an independent computation finds it: velocities at fixed noise, the pack loaded by diffusers."""
    settings = replace(ALONE, steps=60, batch_size=2, rank=8, alpha=8.0, targets=ATTENTION)
    losses: list[float] = []

    def progress(what: str, done: int, total: int, info: dict[str, Any]) -> None:
        if what == "learning":
            assert (done, total) == (len(losses) + 1, 60)
            losses.append(info["loss"])

    pack = learn(pico, images[:1], ANCHOR, tmp_path / "a.pack", settings=settings, progress=progress)
    assert len(losses) == 60 and sum(losses[-10:]) < 0.75 * sum(losses[:10])

    pipe, random = pico.pipe, torch.Generator().manual_seed(99)
    with torch.no_grad():
        x = pipe.image_processor.preprocess(images[0])[:, :, None]
        z0 = pipe._pack_latents(pipe.vae.encode(x).latent_dist.mode(), 1, 8, 8, 8).expand(8, -1, -1)
        z1, t = torch.randn(z0.shape, generator=random), torch.linspace(0.1, 0.9, 8)
        embeds = pipe.encode_prompt(ANCHOR)[0].expand(8, -1, -1)

        def loss() -> float:
            z_t = (1 - t.view(-1, 1, 1)) * z0 + t.view(-1, 1, 1) * z1
            return float((flow.velocity(pipe.transformer, z_t, t, embeds, None, (4, 4)) - (z1 - z0)).square().mean())

        before = loss()
        pipe.load_lora_weights(pack.lora())
        try:
            after = loss()
        finally:
            pipe.unload_lora_weights()
    assert after < 0.75 * before


def test_prior_preservation_preserves(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    """With it, what the class word and other prompts draw changes less."""
    drifts = []
    for weight in (0.0, 4.0):
        settings = replace(QUICK, steps=25, prior_weight=weight, prior_batch_size=4, prior_prompts=8)
        pack = learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=settings, overwrite=True)
        pipe, random, prompts = pico.pipe, torch.Generator().manual_seed(5), ["toy", "a toy", "a red ball", "your toy"]
        with torch.no_grad():
            embeds = [pipe.encode_prompt(prompt)[0] for prompt in prompts]
            points = [torch.randn(1, 16, 32, generator=random) for _ in prompts]

            def velocities(pipe: Any = pipe, embeds: Any = embeds, points: Any = points) -> Tensor:
                t = torch.tensor([0.8])
                return torch.cat([
                    flow.velocity(pipe.transformer, z, t, e, None, (4, 4)) for z, e in zip(points, embeds, strict=True)
                ])  # fmt: skip

            base = velocities()
            pipe.load_lora_weights(pack.lora())
            try:
                drifts.append(float((velocities() - base).square().mean()))
            finally:
                pipe.unload_lora_weights()
    assert drifts[1] < 0.8 * drifts[0]


# --- determinism and resuming -----------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bytes(
    pico: Model, images: list[Image.Image], plain: ConceptPack, tmp_path: Path
) -> None:
    torch.manual_seed(123)  # global randomness has no part in it, and is left alone
    state = torch.get_rng_state()
    again = learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert tree(again.path) == tree(plain.path)
    other = learn(pico, images, ANCHOR, tmp_path / "b.pack", settings=replace(QUICK, seed=1))
    assert not equal(other.lora(), plain.lora())


@pytest.mark.parametrize("seed", [2**40, 2**48, 2**63])
def test_any_seed_that_the_settings_take_can_be_used(
    pico: Model, images: list[Image.Image], tmp_path: Path, seed: int
) -> None:
    try:
        settings = replace(ALONE, steps=1, seed=seed)
    except MokusError:
        return
    assert learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=settings).settings["seed"] == seed


VARIANTS = {
    "plain": QUICK,
    "alone": replace(ALONE, steps=5),
    "everything": replace(QUICK, steps=5, crop=True, flip=True, batch_size=2, alpha=3.0, looks_share=0.5),
    "previews": replace(QUICK, preview_every=1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_gives_the_bytes_of_an_undisturbed_run(
    pico: Model, images: list[Image.Image], tmp_path: Path, name: str
) -> None:
    settings = VARIANTS[name]
    wanted = tree(learn(pico, images, ANCHOR, tmp_path / "whole.pack", settings=settings).path)
    broken_off(pico, images, tmp_path / "a.pack", settings)
    assert not (tmp_path / "a.pack").exists() and checkpoint(tmp_path / "a.pack").is_file()
    torch.manual_seed(99)
    steps: list[int] = []
    pack = learn(
        pico, images, ANCHOR, tmp_path / "a.pack", settings=settings, resume=True,
        progress=lambda what, done, total, info: steps.append(done) if what == "learning" else None,
    )  # fmt: skip
    assert steps == list(range(3, settings.steps + 1))  # from the checkpoint on
    assert tree(pack.path) == wanted
    assert not checkpoint(pack.path).parent.exists()


def test_a_run_may_be_broken_off_again_and_again(
    pico: Model, images: list[Image.Image], plain: ConceptPack, tmp_path: Path
) -> None:
    output = tmp_path / "a.pack"
    settings = replace(QUICK, checkpoint_every=1)
    broken_off(pico, images, output, settings, step=2)
    for step in (3, 4):  # the last step has no checkpoint
        with pytest.raises(Stop):
            learn(pico, images, ANCHOR, output, settings=settings, resume=True, progress=stop_at(step))
    pack = learn(pico, images, ANCHOR, output, settings=settings, resume=True)
    assert equal(pack.lora(), plain.lora())


def test_a_run_is_resumed_with_other_settings_that_change_nothing(
    pico: Model, images: list[Image.Image], plain: ConceptPack, tmp_path: Path
) -> None:
    broken_off(pico, images, output := tmp_path / "a.pack")
    pack = learn(pico, images, ANCHOR, output, settings=replace(QUICK, checkpoint_every=3), resume=True)
    assert equal(pack.lora(), plain.lora())


def test_a_pack_names_every_learning_rate_that_it_was_learned_at(
    pico: Model, images: list[Image.Image], plain: ConceptPack, tmp_path: Path
) -> None:
    """With the step from which on it was, where a stopped run is gone on with at another; one alone stands by itself."""
    output, slower = tmp_path / "a.pack", replace(QUICK, learning_rate=QUICK.learning_rate / 2)
    every = {"checkpoint_every": 1}
    broken_off(pico, images, output, replace(QUICK, **every), step=2)
    for step in (3, 4):
        with pytest.raises(Stop):
            learn(pico, images, ANCHOR, output, settings=replace(slower, **every), resume=True, progress=stop_at(step))
    pack = learn(pico, images, ANCHOR, output, settings=replace(QUICK, **every), resume=True)
    rates = pack.settings["learning_rates"]
    assert [rate for _, rate in rates] == [QUICK.learning_rate, slower.learning_rate, QUICK.learning_rate]
    assert [step for step, _ in rates] == [0, 2, 3]
    assert "learning_rates" not in plain.settings and not equal(pack.lora(), plain.lora())


def test_a_checkpoint_that_names_no_learning_rate_is_gone_on_from(
    pico: Model, images: list[Image.Image], plain: ConceptPack, tmp_path: Path
) -> None:
    """One from before packs named them all."""
    broken_off(pico, images, output := tmp_path / "a.pack")
    kept = torch.load(checkpoint(output), weights_only=True)
    torch.save({key: value for key, value in kept.items() if key != "rates"}, checkpoint(output))
    assert equal(learn(pico, images, ANCHOR, output, settings=QUICK, resume=True).lora(), plain.lora())


def test_a_pack_that_is_there_is_replaced_only_if_it_is_said(
    pico: Model, images: list[Image.Image], pico_pack: PackFactory, tmp_path: Path
) -> None:
    before = tree(pico_pack(tmp_path / "a.pack").path)
    with pytest.raises(MokusError, match="overwrite=True"):
        learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=QUICK)
    assert tree(tmp_path / "a.pack") == before
    assert not learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=QUICK, overwrite=True).knowledge


def test_a_pack_that_came_there_meanwhile_is_not_replaced_and_what_was_learned_is_kept(
    pico: Model, images: list[Image.Image], plain: ConceptPack, pico_pack: PackFactory, tmp_path: Path
) -> None:
    output = tmp_path / "a.pack"

    def meanwhile(what: str, done: int, *_: Any) -> None:
        if what == "learning" and done == QUICK.steps:
            pico_pack(output)

    steps: list[int] = []
    with pytest.raises(MokusError, match=r"overwrite=True.*--resume"):
        learn(pico, images, ANCHOR, output, settings=QUICK, progress=meanwhile)
    before = tree(output)
    assert ConceptPack.open(output).knowledge and checkpoint(output).is_file()
    more: dict[str, Any] = {
        "settings": QUICK, "resume": True,
        "progress": lambda what, done, *_: steps.append(done) if what == "learning" else None,
    }  # fmt: skip
    with pytest.raises(MokusError, match="overwrite=True"):
        learn(pico, images, ANCHOR, output, **more)
    kept = checkpoint(output).read_bytes()
    assert tree(output) == before
    assert tree(learn(pico, images, ANCHOR, output, overwrite=True, **more).path) == tree(plain.path)
    assert not checkpoint(output).parent.exists()
    # or the other pack goes elsewhere
    output.rename(tmp_path / "b.pack")
    checkpoint(output).parent.mkdir()
    checkpoint(output).write_bytes(kept)
    assert tree(learn(pico, images, ANCHOR, output, **more).path) == tree(plain.path)
    assert steps == []


def test_only_the_same_run_is_resumed(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    output = tmp_path / "a.pack"
    with pytest.raises(MokusError, match="nothing to resume"):
        learn(pico, images, ANCHOR, tmp_path / "new" / "a.pack", settings=QUICK, resume=True)
    assert not (tmp_path / "new").exists()
    broken_off(pico, images, output)
    before = checkpoint(output).read_bytes()
    others: list[tuple[Model, list[Image.Image], str, LearnSettings]] = [
        (pico, images, ANCHOR, replace(QUICK, steps=5)),
        (pico, images, ANCHOR, replace(QUICK, seed=1)),
        (pico, images, "zwx toy", QUICK),
        (pico, images[::-1], ANCHOR, QUICK),
        (pico, images[:1], ANCHOR, QUICK),
        (replace(pico, fingerprint="0" * 64), images, ANCHOR, QUICK),
    ]
    for model, photos, anchor, settings in others:
        with pytest.raises(MokusError, match="resume"):
            learn(model, photos, anchor, output, settings=settings, resume=True)
    assert checkpoint(output).read_bytes() == before and not output.exists()
    # and a fresh run is not misled by it
    learn(pico, images, "zwx toy", output, settings=QUICK)
    assert not checkpoint(output).parent.exists()


def test_one_output_is_learned_by_one_run_at_a_time(
    pico: Model, images: list[Image.Image], plain: ConceptPack, tmp_path: Path
) -> None:
    """Both would write the same checkpoint, and the first to finish would remove the other's."""
    output = tmp_path / "a.pack"
    broken_off(pico, images, output)  # so there is a checkpoint that the second run could harm
    refused: list[str] = []

    def meanwhile(what: str, done: int, *_: Any) -> None:
        if what != "reading photos" or refused:
            return
        before = tree(tmp_path)
        for more in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(MokusError, match=r"already learning .*a\.pack;") as told:
                learn(pico, images, ANCHOR, output, settings=QUICK, **more)
            refused.append(str(told.value))
        assert tree(tmp_path) == before
        with ThreadPoolExecutor() as other:  # whoever binds or unbinds need not wait for the training

            def written() -> None:
                with ConceptPack.lock_place(output, 0.05):
                    pass

            other.submit(written).result(60)

    assert tree(learn(pico, images, ANCHOR, output, settings=QUICK, progress=meanwhile).path) == tree(plain.path)
    assert len(refused) == 3


def test_a_killed_run_keeps_nobody_out(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    output = tmp_path / "a.pack"
    code = (
        "import sys, time; from pathlib import Path; from mokus.training import checkpoint\n"
        "with checkpoint.held(checkpoint.checkpoint_of(Path(sys.argv[1]))):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(MokusError, match="already learning"):
            learn(pico, images, ANCHOR, output, settings=ALONE)
        assert not output.exists()
        other.kill()
    assert learn(pico, images, ANCHOR, output, settings=ALONE).lora()


def test_what_a_killed_writer_left_is_in_nobodys_way(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    """Killed while it wrote a checkpoint: half of one lies beside, or instead of, a whole one."""
    output = tmp_path / "a.pack"
    folder = checkpoint(output).parent
    folder.mkdir()
    left = folder / ".checkpoint.pt.123.tmp"  # as `files.write` calls it
    left.write_bytes(b"half")
    lying = []

    def watch(what: str, done: int, *_: Any) -> None:
        if what == "learning":
            lying.append(left.exists())

    settings = replace(ALONE, steps=3, checkpoint_every=2)
    assert learn(pico, images, ANCHOR, output, settings=settings, progress=watch).lora()
    assert lying == [True, False, False]  # the next checkpoint takes it away, so that none pile up
    assert not folder.exists()


# --- when it goes wrong -----------------------------------------------------------------------------------------------


def spoiled_loss(call: int, spoil: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`flow.loss`, with `spoil` done to its value at this call."""
    calls, real = [], flow.loss

    def loss(predicted: Tensor, wanted: Tensor) -> Tensor:
        calls.append(1)
        value = real(predicted, wanted)
        return spoil(value) if len(calls) == call else value

    return loss


def test_a_loss_that_is_not_finite_ends_the_run(
    pico: Model, images: list[Image.Image], plain: ConceptPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, output = snapshot(pico), tmp_path / "a.pack"
    with monkeypatch.context() as patched, pytest.raises(MokusError, match="finite at step 4"):
        patched.setattr(flow, "loss", spoiled_loss(4, lambda value: value * float("nan")))
        learn(pico, images, ANCHOR, output, settings=QUICK)
    assert_unchanged(pico, before)
    assert not output.exists() and checkpoint(output).is_file()
    # the weights that were kept are good: once the reason is gone, the run ends as it would have
    assert tree(learn(pico, images, ANCHOR, output, settings=QUICK, resume=True).path) == tree(plain.path)


def test_where_nothing_is_kept_nothing_is_said_to_be(
    pico: Model, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with DeepSpeed."""
    monkeypatch.setattr(trainers.Alone, "keeps", False)
    monkeypatch.setattr(flow, "loss", spoiled_loss(2, lambda value: value * float("nan")))
    with pytest.raises(MokusError, match=r"finite at step 2, and .* no checkpoints; begin anew with") as error:
        learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=QUICK)
    assert "--resume" not in str(error.value) and not checkpoint(tmp_path / "a.pack").exists()


@pytest.mark.parametrize("step", [3, 4])  # a checkpoint is written after the fourth
def test_the_weights_kept_are_good_ones(
    pico: Model, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A gradient that overflows while its loss does not spoils the weights one step before the loss tells."""
    output = tmp_path / "a.pack"
    overflow = spoiled_loss(step, lambda value: value + (value - value.detach()).sqrt())  # + 0, with slope infinity
    monkeypatch.setattr(flow, "loss", overflow)
    with pytest.raises(MokusError, match="finite"):
        learn(pico, images, ANCHOR, output, settings=replace(QUICK, steps=8))
    kept = torch.load(checkpoint(output), weights_only=True)["lora"]
    assert all(value.isfinite().all() for value in kept.values())


@pytest.mark.parametrize("learning_rate", [1e10, 1e30])
def test_a_learning_rate_that_is_far_too_large(
    pico: Model, images: list[Image.Image], tmp_path: Path, learning_rate: float
) -> None:
    before, output = snapshot(pico), tmp_path / "a.pack"
    with pytest.raises(MokusError, match="finite"):
        learn(pico, images, ANCHOR, output, settings=replace(ALONE, steps=8, learning_rate=learning_rate))
    assert_unchanged(pico, before)
    assert not output.exists()
    # what was kept is from before the rate did its harm, and goes on at another
    kept = torch.load(checkpoint(output), weights_only=True)
    assert all(value.isfinite().all() and value.abs().max() < 1e3 for value in kept["lora"].values())
    assert learn(pico, images, ANCHOR, output, settings=replace(ALONE, steps=8), resume=True).lora()


def test_an_older_pack_stays_until_the_new_one_is_whole(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    output = tmp_path / "a.pack"
    learn(pico, images, ANCHOR, output, settings=ALONE)
    before = tree(output)
    broken_off(pico, images, output, QUICK)
    assert tree(output) == before
    learn(pico, images, ANCHOR, output, settings=QUICK, resume=True, overwrite=True)
    assert tree(output) != before and ConceptPack.open(output).settings["steps"] == QUICK.steps


def test_a_place_that_is_taken_is_refused_before_the_training(
    pico: Model, images: list[Image.Image], tmp_path: Path
) -> None:
    """Not after hours of it."""
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("dear diary")
    (tmp_path / "file").write_text("x")
    trained: list[str] = []
    for name in ("diary", "file"):
        with pytest.raises(MokusError, match=name):
            learn(pico, images, ANCHOR, tmp_path / name, settings=ALONE, progress=lambda what, *_: trained.append(what))
    assert "learning" not in trained


def test_the_folder_one_is_in_is_refused_before_the_training(
    pico: Model, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be replaced by the pack's, and the user's shell left nowhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", "..", str(tmp_path / "here")):
        with pytest.raises(MokusError, match="the folder you are in"):
            learn(pico, images, ANCHOR, output, settings=QUICK, progress=stop_at(1))


@pytest.mark.parametrize(
    ("anchor", "why"),
    [
        ("toy", "one word"),
        ("  toy. ", "one word"),
        ("", "empty"),
        ("sks toy?", "question"),
        ("sks <|im_end|> toy", r"<\|"),
    ],
)
def test_what_is_no_anchor_is_refused(
    pico: Model, images: list[Image.Image], tmp_path: Path, anchor: str, why: str
) -> None:
    with pytest.raises(MokusError, match=why):
        learn(pico, images, anchor, tmp_path / "a.pack", settings=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_photos_that_cannot_be_used_are_refused(pico: Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for photos in ([], tmp_path / "empty", str(tmp_path / "nowhere")):
        with pytest.raises(MokusError, match="photo"):
            learn(pico, photos, ANCHOR, tmp_path / "a.pack", settings=QUICK)


def test_a_target_that_is_not_there_is_refused_beside_others(
    pico: Model, images: list[Image.Image], tmp_path: Path
) -> None:
    """A misspelt one would silently be left out."""
    with pytest.raises(MokusError, match="no_such"):
        learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=replace(ALONE, targets=["to_q", "no_such"]))


# --- photos and their prompts -----------------------------------------------------------------------------------------


def test_captions_are_used(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    """Each caption is the prompt of its photo, with the anchor in front unless it names it."""

    def learned(caption: str | None) -> dict[str, Tensor]:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        images[0].save(folder / "one.png")
        (folder / "one.txt").unlink(missing_ok=True)
        if caption is not None:
            (folder / "one.txt").write_text(caption, encoding="utf-8")
        return learn(pico, folder, ANCHOR, tmp_path / "a.pack", settings=ALONE, overwrite=True).lora()

    bare, snow = learned(None), learned("in the snow")
    assert equal(learned(ANCHOR), bare) and equal(learned("  \n"), bare)
    assert equal(learned(f"{ANCHOR}, in the snow"), snow)
    assert not equal(snow, bare) and not equal(learned("at night"), snow)
    assert equal(learn(pico, images[:1], ANCHOR, tmp_path / "b.pack", settings=ALONE).lora(), bare)


def test_a_changed_caption_is_another_run(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "a.pack"
    photos.mkdir()
    images[0].save(photos / "one.png")
    broken_off(pico, photos, output)
    (photos / "one.txt").write_text("in the snow")
    with pytest.raises(MokusError, match="resume"):
        learn(pico, photos, ANCHOR, output, settings=QUICK, resume=True)


def test_the_place_is_said_in_a_share_of_the_samples(
    pico: Model, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that is found in every photo is a caption that says it; one that is not found changes nothing."""

    def learned(where: int | None, share: float, caption: str | None = None) -> dict[str, Tensor]:
        monkeypatch.setattr(material, "place_of", lambda *_, **__: where)
        photos = tmp_path / "photos"
        photos.mkdir(exist_ok=True)
        images[0].save(photos / "one.png")
        (photos / "one.txt").write_text(caption or "", encoding="utf-8")
        settings = replace(ALONE, place_share=share)
        return learn(pico, photos, ANCHOR, tmp_path / "a.pack", settings=settings, overwrite=True).lora()

    bare, always = learned(None, 1.0), learned(3, 1.0)
    assert equal(bare, learned(None, 0.0)) and equal(bare, learned(3, 0.0)) and not equal(bare, always)
    assert equal(always, learned(None, 0.0, f"{ANCHOR} {PLACES[3]}"))
    assert equal(always, learned(5, 1.0, f"{ANCHOR} {PLACES[3]}"))  # what the user says goes before what the model sees


def test_places_are_found_by_the_model_itself(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    """The base model's, whatever the seed of the training: resumable and the same again."""
    settings, output = replace(QUICK, place_share=0.5), tmp_path / "a.pack"
    undisturbed = learn(pico, images, ANCHOR, tmp_path / "b.pack", settings=settings)
    broken_off(pico, images, output, settings)
    assert equal(learn(pico, images, ANCHOR, output, settings=settings, resume=True).lora(), undisturbed.lora())


def test_braces_in_captions_are_harmless(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    images[0].save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("{in} the {} {0} snow", encoding="utf-8")
    assert learn(pico, tmp_path, ANCHOR, tmp_path / "a.pack", settings=ALONE).lora()


def variants(image: Image.Image, **chosen: bool) -> list[Image.Image]:
    return material.variants(image, replace(QUICK, **chosen))


def test_crops_and_mirror_images(images: list[Image.Image]) -> None:
    image = images[0]
    assert [v.tobytes() for v in variants(image)] == [image.tobytes()]
    flipped = variants(image, flip=True)
    assert [v.tobytes() for v in flipped] == [image.tobytes(), ImageOps.mirror(image).tobytes()]
    cropped, both = variants(image, crop=True), variants(image, crop=True, flip=True)
    assert len(cropped) == CROPS + 1 and len(both) == 2 * len(cropped)
    assert len({v.tobytes() for v in both}) == len(both) and {v.size for v in both} == {image.size}
    assert [v.tobytes() for v in variants(image, crop=True)] == [v.tobytes() for v in cropped]
    assert [ImageOps.mirror(v).tobytes() for v in both[: len(cropped)]] == [v.tobytes() for v in both[len(cropped) :]]


def test_a_crop_takes_at_most_an_eighth_of_each_side() -> None:
    """Seen on an image whose pixels say where they were: red across, green down."""
    at = np.linspace(0, 255, SIZE).astype(np.uint8)
    where = np.stack(
        [np.tile(at, (SIZE, 1)), np.tile(at[:, None], (1, SIZE)), np.zeros((SIZE, SIZE), np.uint8)], axis=2
    )
    for crop in variants(Image.fromarray(where), crop=True)[1:]:
        pixels = np.asarray(crop).astype(int)
        for span in (pixels[SIZE // 2, :, 0], pixels[:, SIZE // 2, 1]):
            assert (np.diff(span) >= 0).all()
            assert 255 * 7 / 8 - 12 <= span[-1] - span[0] <= 255
        across, down = np.ptp(pixels[SIZE // 2, :, 0]), np.ptp(pixels[:, SIZE // 2, 1])
        assert abs(across - down) < 8  # a square stays one


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def test_previews_are_the_packs_samples(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    """The last one is what the pack draws (a scale other than 1 included), and drawing them changes nothing."""
    settings = replace(QUICK, alpha=6.0, preview_every=2, seed=7)
    pack = learn(pico, images, ANCHOR, tmp_path / "a.pack", settings=settings, overwrite=True)
    samples = {path.name: Image.open(path) for path in (pack.path / "samples").iterdir()}
    assert sorted(samples) == ["step-00002.png", "step-00004.png"]
    assert all(sample.size == (SIZE, SIZE) for sample in samples.values())
    drawn = next(generate(pico, ANCHOR, packs=[pack], seeds=[7])).image
    assert largest_difference(samples["step-00004.png"], drawn) <= 2
    assert largest_difference(samples["step-00002.png"], drawn) > 2
    quiet = learn(pico, images, ANCHOR, tmp_path / "b.pack", settings=replace(settings, preview_every=0))
    assert equal(quiet.lora(), pack.lora()) and not (quiet.path / "samples").exists()


def test_previews_draw_the_anchor_whatever_the_captions(pico: Model, images: list[Image.Image], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    images[0].save(photos / "one.png")
    (photos / "one.txt").write_text("under water, seen from above")
    settings = replace(ALONE, preview_every=3)
    pack = learn(pico, photos, ANCHOR, tmp_path / "a.pack", settings=settings)
    drawn = next(generate(pico, ANCHOR, packs=[pack], seeds=[0])).image
    assert largest_difference(Image.open(pack.path / "samples" / "step-00003.png"), drawn) <= 2
