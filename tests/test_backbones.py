"""Every family of pipelines: what MoKus computes is what the pipeline itself does, and both stages work on it.

Models of random weights; no published checkpoint was run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from mokus import memory, pipeline
from mokus.backbone import BACKBONES, QWEN_IMAGE, backbone_of
from mokus.checks import ask
from mokus.cli import app
from mokus.editors import editor
from mokus.encoder import (
    ENTERED_ALIKE,
    Rows,
    answers,
    entrance,
    in_template,
    inputs_of,
    module_paths,
    prefix_length,
    tail_length,
    tails,
    token_ids,
)
from mokus.errors import MokusError
from mokus.generation import draw, generate
from mokus.knowledge_update import bind, unbind
from mokus.low_rank import LowRankShift, Shifts, applied
from mokus.miniature import world
from mokus.packs.concept_pack import LORA, MANIFEST, README, ConceptPack
from mokus.packs.export import export
from mokus.packs.files import ADAPTER_FOLDER
from mokus.pipeline import Model, encode, pad
from mokus.settings import EditSettings, LearnSettings
from mokus.studio.shelf import Shelf
from mokus.visual_concept import learn

from . import pico_backbones
from .conftest import known
from .pico_backbones import LAYERS, MAKERS

ANCHOR, KNOWN = "sks toy", "my favourite toy"
TEXTS = ["a red ball", "x", "my favourite toy in the snow at night", " "]
QUICK = LearnSettings(
    steps=4, rank=2, alpha=2.0, learning_rate=1e-2, prior_prompts=2, prior_steps=2, place_share=0.0, looks_share=0.0,
    preview_every=4,
)  # fmt: skip
# what a model of random weights answers is left to chance, so the alignment alone decides
EDIT = EditSettings(
    layers=[0, 1, 2], modules=["mlp.down_proj"], steps=12, corpus=10, odd_references=10, preserve=8, near_misses=2, exchanged=4,
    rivals=2, answer_weight=0.0, least_alignment=0.05,
)  # fmt: skip
NEW = list(MAKERS)
ALL = [QWEN_IMAGE.pipeline, *NEW]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Callable[[str], Path]:
    """The folder of a pico model of a family."""
    made = {QWEN_IMAGE.pipeline: pico_folder}

    def folder(family: str) -> Path:
        if family not in made:
            tok = Qwen2Tokenizer.from_pretrained(pico_folder / "tokenizer")
            made[family] = pico_backbones.save(family, tok, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def models(folders: Callable[[str], Path], pico: Model) -> Callable[[str], Model]:
    """The loaded model of a family; leave it as you found it."""
    loaded = {QWEN_IMAGE.pipeline: pico}

    def model(family: str) -> Model:
        if family not in loaded:
            loaded[family] = pipeline.load(folders(family), device="cpu")
        return loaded[family]

    return model


@pytest.fixture(params=ALL)
def model(request: pytest.FixtureRequest, models: Callable[[str], Model]) -> Model:
    return models(request.param)


@pytest.fixture(scope="session")
def packs(models: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ConceptPack]:
    """What was learned with QUICK, of a copy."""
    known: dict[str, Path] = {}

    def pack(family: str) -> ConceptPack:
        if family not in known:
            known[family] = tmp_path_factory.mktemp("learned") / "toy.pack"
            learn(models(family), photos(models(family)), ANCHOR, known[family], settings=QUICK)
        return ConceptPack.open(shutil.copytree(known[family], tmp_path_factory.mktemp("copy") / "toy.pack"))

    return pack


def photos(model: Model, n: int = 2) -> list[Image.Image]:
    return world.character_photos("bobo", n, seed=0, size=model.defaults.size)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def packed(model: Model, latents: Tensor) -> Tensor:
    """Latents as the pipeline has them, as (b, n, c)."""
    return latents.flatten(2).transpose(1, 2) if latents.ndim == 4 else latents


def some_shifts(model: Model, layer: int, seed: int = 0) -> Shifts:
    random = torch.Generator().manual_seed(seed)
    path = f"{model.backbone.language_model}.layers.{layer}.mlp.down_proj"
    linear = model.pipe.text_encoder.get_submodule(path)
    a = torch.randn(2, linear.in_features, generator=random) / linear.in_features**0.5
    return {path: LowRankShift(a, torch.randn(linear.out_features, 2, generator=random))}


# --- the text encoder ----------------------------------------------------------------------------------------


def test_each_family_is_what_its_folder_says(model: Model) -> None:
    assert type(model.pipe).__name__ == model.backbone.pipeline
    assert type(model.pipe.text_encoder).__name__ == model.backbone.text_encoder
    assert BACKBONES[model.backbone.pipeline] is model.backbone is backbone_of(model.pipe)
    assert pipeline.load(model.id, device="cpu").fingerprint == model.fingerprint


def test_a_derived_class_is_of_the_same_family(model: Model) -> None:
    assert backbone_of(object.__new__(type("Own", (type(model.pipe),), {}))) is model.backbone


def test_a_prompt_is_tokenized_as_the_pipeline_does(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = model.pipe.text_encoder.forward

    def watched(*args: Any, **given: Any) -> Any:
        there = given["attention_mask"].bool()
        seen.append(given["input_ids"][there])
        return forward(*args, **given)

    monkeypatch.setattr(model.pipe.text_encoder, "forward", watched)
    for text in TEXTS:
        encode(model, [text])
        ids = token_ids(model, text)
        assert seen.pop().tolist() == ids
        before, after = prefix_length(model), len(ids) - tail_length(model)
        assert model.tokenizer.decode(ids[before:after]) == text
        assert model.tokenizer.decode(ids) == in_template(model, text)


def test_what_stage_2_looks_at_is_what_the_image_transformer_is_told(model: Model) -> None:
    """With an edit and without: in rows of many prompts, the same states as the pipeline's own encodings, at their ends."""
    told = []
    for shifts in ({}, some_shifts(model, layer=1)):
        with applied(model.pipe.text_encoder, shifts):
            ours, own = tails(model, TEXTS), encode(model, TEXTS)
        told.append(ours)
        for one, whole in zip(ours, own, strict=True):
            assert torch.allclose(one, whole[-tail_length(model) :], atol=1e-4)
    assert not torch.allclose(*told, atol=0.1)


def test_modules_that_count_as_entered_alike_are(model: Model) -> None:
    """So that statistics of one of them are those of all."""
    inside = f"{model.backbone.language_model}.layers.1"
    names = [*ENTERED_ALIKE, *ENTERED_ALIKE.values(), "self_attn.o_proj", "mlp.down_proj"]
    paths = [f"{inside}.{name}" for name in dict.fromkeys(names)]
    found = inputs_of(model, ["a red ball", "it"], paths).whole
    for path in paths:
        alike = {other for other in paths if torch.equal(found[path], found[other])}
        assert alike == {other for other in paths if entrance(other) == entrance(path)} and entrance(path) in alike


def test_an_edit_above_what_is_read_is_refused_and_would_change_nothing(model: Model) -> None:
    highest = model.backbone.highest(LAYERS)
    assert len(model.language_model.layers) == LAYERS
    before = encode(model, TEXTS[:1])[0]
    for layer in range(LAYERS):
        with applied(model.pipe.text_encoder, some_shifts(model, layer)):
            assert torch.equal(encode(model, TEXTS[:1])[0], before) == (layer > highest)
        wanted = replace(EDIT, layers=[0, layer])
        if layer > highest:
            with pytest.raises(
                MokusError, match=rf"layer {layer} is .* comes out of layer {highest}.* 0 to {highest}\."
            ):
                module_paths(model, wanted)
        else:
            assert module_paths(model, wanted)[-1] == next(iter(some_shifts(model, layer)))
    with pytest.raises(MokusError, match=f"layers 0 to {LAYERS - 1}"):
        module_paths(model, replace(EDIT, layers=[LAYERS]))
    tuned = editor("finetune")(model, EDIT).linears  # type: ignore[attr-defined]
    layers = {int(path.split(".layers.")[1].split(".")[0]) for path in tuned}
    assert layers == set(range(highest + 1))


def test_what_is_said_is_read_off_the_final_states(model: Model) -> None:
    """Greedy answers are those of the whole encoder, and an edit of any layer counts there, read or not."""
    text = "What is it?"
    ids, said = token_ids(model, text), []
    with torch.no_grad():
        for _ in range(3):
            said.append(int(model.pipe.text_encoder(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
        final = Rows.of(model, [text]).states(model).final
        whole = model.pipe.text_encoder(input_ids=torch.tensor([ids])).logits[0, prefix_length(model) :]
        assert torch.allclose(model.pipe.text_encoder.lm_head(final)[0], whole, atol=1e-3)
    (answer,) = answers(model, [text], longest=3)
    assert answer == model.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert ask(model, text).startswith(answer)


# --- the image transformer -----------------------------------------------------------------------------------


def test_the_velocity_is_what_the_pipeline_steps_along(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step of its own drawing: sign, time, places of the grid, what it is told."""
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    step = model.pipe.scheduler.step

    def watched(velocity: Tensor, t: Tensor, sample: Tensor, **given: Any) -> Any:
        steps.append((packed(model, velocity), t / 1000, packed(model, sample)))
        return step(velocity, t, sample, **given)

    monkeypatch.setattr(model.pipe.scheduler, "step", watched)
    encodings, size = encode(model, TEXTS[:2]), model.defaults.size
    settings = {"steps": 3, "true_cfg_scale": 1.0, "size": size}
    for encoding in encodings:
        draw(model, [(encoding, 0)], None, settings)
    assert len(steps) == 6
    embeds, mask = pad(encodings)
    assert not mask.all()  # one of the texts is padded, which changes nothing
    for (v, t, z), (w, same, y) in zip(steps[:3], steps[3:], strict=True):
        assert t == same
        with torch.no_grad():
            found = model.backbone.velocity(
                model.pipe.transformer, torch.cat([z, y]), t.repeat(2), embeds, mask, model.grid(size)
            )
        assert found.shape == (2, *z.shape[1:])
        assert torch.allclose(found, torch.cat([v, w]), atol=2e-3)


def test_a_step_to_the_end_along_the_true_velocity_is_the_photo(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told z1 - z0 of a photo's latent z0, the pipeline draws the photo as far as its VAE knows it."""
    photo, size = photos(model, 1)[0], model.defaults.size
    z0 = model.backbone.latent(model.pipe, photo, model.device)
    assert z0.dtype == torch.float32 and z0.shape[1] == np.prod(model.grid(size))
    step = model.pipe.scheduler.step

    def instead(velocity: Tensor, t: Tensor, sample: Tensor, **given: Any) -> Any:
        wanted = (packed(model, sample) - z0) / (t / 1000)  # z_t = z0 + t (z1 - z0)
        unpacked = wanted.transpose(1, 2).reshape(velocity.shape) if velocity.ndim == 4 else wanted
        return step(unpacked, t, sample, **given)

    monkeypatch.setattr(model.pipe.scheduler, "step", instead)
    (drawn,) = draw(model, [(encode(model, ["x"])[0], 0)], None, {"steps": 3, "true_cfg_scale": 1.0, "size": size})
    x = model.pipe.image_processor.preprocess(photo.convert(drawn.mode))
    x = x[:, :, None] if model.backbone.latent is not BACKBONES["ZImagePipeline"].latent else x
    with torch.no_grad():
        y = model.pipe.vae.decode(model.pipe.vae.encode(x).latent_dist.mode()).sample
    (known,) = model.pipe.image_processor.postprocess(y[:, :, 0] if y.ndim == 5 else y)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(known).astype(int)).max() <= 2


def test_images_are_decoded_one_at_a_time_to_the_same_pixels(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of 1024 pixels together would take more than a card has, whatever the memory tier."""
    vae, prompt = model.pipe.vae, "a red star"
    decode, sizes = vae._decode, []

    def watched(z: Tensor, *args: Any, **given: Any) -> Any:
        sizes.append(len(z))
        return decode(z, *args, **given)

    monkeypatch.setattr(vae, "_decode", watched)
    drawn = [np.asarray(each.image).astype(int) for each in generate(model, prompt, seeds=range(3))]
    assert sizes == [1, 1, 1]
    monkeypatch.setattr(vae, "use_slicing", False)
    together = [np.asarray(each.image).astype(int) for each in generate(model, prompt, seeds=range(3))]
    assert sizes[3:] == [3] and all(np.abs(a - b).max() <= 1 for a, b in zip(drawn, together, strict=True))


def test_other_prompts_and_images_have_no_influence(model: Model) -> None:
    encodings = encode(model, TEXTS[:3])
    z = torch.randn(3, *model.backbone.latent(model.pipe, photos(model, 1)[0], model.device).shape[1:])
    t, grid = torch.tensor([0.2, 0.5, 0.9]), model.grid(model.defaults.size)
    with torch.no_grad():
        together = model.backbone.velocity(model.pipe.transformer, z, t, *pad(encodings), grid)
        for i, encoding in enumerate(encodings):
            alone = model.backbone.velocity(
                model.pipe.transformer, z[i : i + 1], t[i : i + 1], encoding[None], None, grid
            )
            assert torch.allclose(alone[0], together[i], atol=2e-3)


# --- stage 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", NEW, indirect=True)  # of Qwen-Image the tests beside this file say as much
def test_learning_is_repeatable_and_leaves_no_trace(
    model: Model, packs: Callable[[str], ConceptPack], tmp_path: Path
) -> None:
    pack = packs(model.backbone.pipeline)
    before = {name: value.clone() for name, value in model.pipe.transformer.state_dict().items()}
    again = learn(model, photos(model), ANCHOR, tmp_path / "toy.pack", settings=QUICK)
    assert tree(again.path) == tree(pack.path)
    after = model.pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    lora = pack.lora()
    assert {name for key in lora for name in QUICK.targets if f".{name}.lora_" in key} == set(QUICK.targets)
    assert all(value.abs().max() > 0 for value in lora.values())
    assert list((pack.path / "samples").iterdir())


def test_the_photo_is_learned(model: Model, tmp_path: Path) -> None:
    """As the pipeline's own LoRA loader and the velocity at fixed points find it."""
    settings = replace(
        QUICK,
        steps=40,
        batch_size=4,
        rank=8,
        alpha=8.0,
        learning_rate=0.05,
        prior_weight=0.0,
        tail_share=0.0,
        preview_every=0,
    )
    image = photos(model, 1)
    pack = learn(model, image, ANCHOR, tmp_path / "toy.pack", settings=settings)
    z0 = model.backbone.latent(model.pipe, image[0], model.device).expand(6, -1, -1)
    z1, t = torch.randn(z0.shape, generator=torch.Generator().manual_seed(9)), torch.linspace(0.1, 0.9, 6)
    embeds, mask = pad(encode(model, [ANCHOR] * 6))

    @torch.no_grad()
    def error() -> float:
        z = (1 - t.view(-1, 1, 1)) * z0 + t.view(-1, 1, 1) * z1
        found = model.backbone.velocity(model.pipe.transformer, z, t, embeds, mask, model.grid(model.defaults.size))
        return float((found - (z1 - z0)).square().mean())

    before = error()
    model.pipe.load_lora_weights(pack.lora())
    try:
        assert error() < 0.9 * before
    finally:
        model.pipe.unload_lora_weights()


def test_a_projection_that_is_not_there(model: Model, tmp_path: Path) -> None:
    with pytest.raises(MokusError, match=r"no projection named 'to_qq' .*to_k, .*to_out\.0"):
        learn(model, photos(model), ANCHOR, tmp_path / "toy.pack", settings=replace(QUICK, targets=["to_q", "to_qq"]))
    assert not (tmp_path / "toy.pack").exists()


# --- stage 2, and drawing ------------------------------------------------------------------------------------


def plain(model: Model, pack: ConceptPack | None) -> Any:
    """The pack in diffusers and peft alone."""
    given = {}
    if model.backbone.bare_text_encoder:
        given["text_encoder"] = Qwen3ForCausalLM.from_pretrained(model.id, subfolder="text_encoder")
    if model.backbone.processor:  # a whole one wants torchvision
        given["processor"] = model.pipe.processor
    pipe = getattr(diffusers, model.backbone.pipeline).from_pretrained(model.id, **given)
    pipe.set_progress_bar_config(disable=True)
    if pack:
        pipe.load_lora_weights(str(pack.path), weight_name=LORA, use_safetensors=True)
        pipe.text_encoder.load_adapter(str(pack.path / ADAPTER_FOLDER))
    return pipe


def drawn(model: Model, pipe: Any, prompt: str, seed: int, scale: float) -> Image.Image:
    word, less = model.backbone.scale
    size = model.defaults.size
    return pipe(
        prompt, negative_prompt=" " if scale > 1 else None, height=size, width=size, num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(seed), **{word: scale - less},
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("model", NEW, indirect=True)  # of Qwen-Image the tests beside this file say as much
def test_both_stages_from_end_to_end(
    model: Model, packs: Callable[[str], ConceptPack], models: Callable[[str], Model]
) -> None:
    """Bound knowledge moves its prompts; plain diffusers and peft draw the same to the bit; unbinding is undone to the bit."""
    pack = packs(model.backbone.pipeline)
    learned, prompts = tree(pack.path), [f"{KNOWN} in the snow", KNOWN]
    bare = [each.image.tobytes() for each in generate(model, prompts, steps=3)]
    (edit,) = bind(model, pack, KNOWN, settings=EDIT)
    assert edit.taken and edit.alignment > 0.05 and edit.shifts.keys() == set(module_paths(model, EDIT))
    pack = ConceptPack.open(pack.path)
    assert [known.text for known in pack.knowledge] == [KNOWN]
    for scale in (3.0, 1.0):
        reference = plain(model, pack)
        for seed, prompt in enumerate(prompts):
            (result,) = generate(model, prompt, [pack], seeds=[seed], steps=3, true_cfg_scale=scale)
            assert result.image.tobytes() == drawn(model, reference, prompt, seed, scale).tobytes()
    together = [np.asarray(each.image).astype(int) for each in generate(model, prompts, [pack], steps=3)]
    for prompt, image, before in zip(prompts, together, bare, strict=True):
        (alone,) = generate(model, prompt, [pack], steps=3)
        assert np.abs(np.asarray(alone.image).astype(int) - image).max() <= 2  # rounding in batches
        assert alone.image.tobytes() != before
    for family in ALL:
        other = models(family)
        if other is not model:
            with pytest.raises(MokusError, match="was made for"):
                list(generate(other, KNOWN, [pack]))
    unbind(pack, KNOWN)
    assert tree(pack.path) == learned
    assert [each.image.tobytes() for each in generate(model, prompts, steps=3)] == bare


def test_the_text_encoder_alone_binds_to_the_same_bytes(
    model: Model, packs: Callable[[str], ConceptPack], folders: Callable[[str], Path]
) -> None:
    family = model.backbone.pipeline
    alone = pipeline.load(folders(family), device="cpu", text_alone=True)
    assert alone.loaded == ("text_encoder",) and alone.fingerprint == model.fingerprint
    by_whole, by_alone = packs(family), packs(family)
    for each, pack in ((model, by_whole), (alone, by_alone)):
        bind(each, pack, KNOWN, settings=EDIT)
    assert tree(by_alone.path) == tree(by_whole.path)


def test_a_server_draws_rows_of_several_packs_each_with_its_own(
    model: Model, packs: Callable[[str], ConceptPack], tmp_path: Path
) -> None:
    """Prompts of any lengths, with guidance, beside the base model: as each is drawn alone."""
    one = packs(model.backbone.pipeline)
    word, lora = ANCHOR.split()[-1], {key: -2 * value for key, value in one.lora().items()}
    two = ConceptPack.create(tmp_path / "two.pack", model=model, anchor=f"zwx {word}", lora=lora, settings=one.settings)
    size, shelf = model.defaults.size, Shelf(model)
    wishes = [
        (path, prompt, seed)
        for seed, prompt in enumerate((f"a {word}", f"a {word} on a long wooden table in the snow"))
        for path in (str(one.path), None, str(two.path))
    ]
    try:
        several = shelf.draw(wishes, size, 2)
    finally:
        shelf.clear()
    by_path: dict[str | None, list[ConceptPack]] = {None: [], str(one.path): [one], str(two.path): [two]}
    images = []
    for (path, prompt, seed), png in zip(wishes, several, strict=True):
        assert isinstance(png, bytes), png
        (alone,) = generate(model, prompt, by_path[path], seeds=[seed])
        images.append(np.asarray(Image.open(BytesIO(png))).astype(int))
        assert np.abs(np.asarray(alone.image).astype(int) - images[-1]).max() <= 2  # rounding in batches
    assert all(np.abs(a - b).max() > 2 for a, b in combinations(images, 2))  # so that another's looks would be seen


def test_a_pack_says_what_it_is_for(model: Model, packs: Callable[[str], ConceptPack]) -> None:
    pack = packs(model.backbone.pipeline)
    pack.replace_edits([(known(KNOWN), some_shifts(model, 1))])  # writes the card anew, without the model
    about = json.loads((pack.path / MANIFEST).read_text(encoding="utf-8"))
    assert about.get("pipeline") == (None if model.backbone is QWEN_IMAGE else model.backbone.pipeline)
    card = (pack.path / README).read_text(encoding="utf-8")
    assert f"- {model.backbone.name}\n" in card and f"{model.backbone.pipeline}.from_pretrained(" in card
    about["pipeline"] = "os; import shutil"
    (pack.path / MANIFEST).write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(MokusError, match="expected one of QwenImagePipeline"):
        ConceptPack.open(pack.path)


def test_the_card_of_z_image_draws(
    models: Callable[[str], Model], packs: Callable[[str], ConceptPack], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("ZImagePipeline")
    pack = packs("ZImagePipeline")
    pack.replace_edits([(known(KNOWN), some_shifts(model, 1))])
    code = re.findall(r"```python\n(.*?)```", (pack.path / README).read_text(encoding="utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(pack.path)
    names: dict[str, Any] = {"random": torch.Generator().manual_seed(3)}
    exec(code.replace("= pipe(\n", "= pipe(generator=random, prompt=\n"), names)
    (result,) = generate(model, KNOWN, [pack], seeds=[3])
    assert names["image"].tobytes() == result.image.tobytes()


@pytest.fixture
def bound(model: Model, packs: Callable[[str], ConceptPack]) -> ConceptPack:
    """A pack with looks and with knowledge that is random and not weak."""
    pack = packs(model.backbone.pipeline)
    pack.replace_edits([(known(KNOWN), some_shifts(model, 1))])
    return pack


@pytest.mark.parametrize("to", ["diffusers", "merged"])
def test_the_readme_of_an_export_draws(
    model: Model, to: str, bound: ConceptPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = export(bound, to, tmp_path / "there", model)
    code = re.findall(r"```python\n(.*?)```", (done.path / README).read_text(encoding="utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    if model.backbone.processor:  # a whole one wants torchvision
        whole = getattr(transformers, model.backbone.processor)
        monkeypatch.setattr(whole, "from_pretrained", lambda *_, **__: model.pipe.processor)
    names: dict[str, Any] = {}
    exec(code.partition("image = ")[0], names)
    (result,) = generate(model, KNOWN, [bound], seeds=[3], steps=3, true_cfg_scale=3.0)
    image = drawn(model, names["pipe"], KNOWN, 3, 3.0)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(result.image).astype(int)).max() <= (to == "merged")


def test_a_merged_export_is_a_model_like_any(model: Model, bound: ConceptPack, tmp_path: Path) -> None:
    """With the parts that were not changed, of the same classes; it can be given another pack and exported in its turn."""
    done = export(bound, "merged", tmp_path / "there", model)
    index, usual = (
        json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8")) for folder in (done.path, model.id)
    )
    del index["_name_or_path"]
    assert index == usual | {"text_encoder": ["transformers", model.backbone.text_encoder]}
    assert tree(done.path / "processor") == tree(Path(model.id, "processor"))
    again = pipeline.load(done.path, device="cpu")
    assert again.defaults == model.defaults and again.backbone is model.backbone
    (expected,) = generate(model, KNOWN, [bound], steps=3)
    (result,) = generate(again, KNOWN, steps=3)
    assert np.abs(np.asarray(result.image).astype(int) - np.asarray(expected.image).astype(int)).max() <= 1
    more = ConceptPack.create(
        tmp_path / "b.pack", model=again, anchor="Zorblax", word="toy", lora={}, settings={},
        edits=[(known("Zorblax"), some_shifts(again, 0))],
    )  # fmt: skip
    pipeline.load(export(more, "merged", tmp_path / "twice", again).path, device="cpu")


def test_a_merged_export_of_a_model_of_the_hub_has_its_whole_processor(
    models: Callable[[str], Model], packs: Callable[[str], ConceptPack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which nothing but the tokenizer has been downloaded until then."""
    model, pack = models("QwenImage21Pipeline"), packs("QwenImage21Pipeline")
    there = replace(model, id="org/model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, allow_patterns: model.id)
    done = export(pack, "merged", tmp_path / "there", there)
    assert tree(done.path / "processor") == tree(Path(model.id, "processor"))

    def unreachable(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(MokusError, match="processor of org/model"):
        export(pack, "merged", tmp_path / "nowhere", there)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("tier", ["selective", "8bit", "4bit"])
def test_memory_tiers(model: Model, tier: str, packs: Callable[[str], ConceptPack], tmp_path: Path) -> None:
    """What the blocks are called is no tier's business: the same pack where weights are plain, one for all where they are not."""
    placed = pipeline.load(model.id, device="cpu", tier=tier)
    assert placed.tier.name == tier and placed.fingerprint == model.fingerprint
    linear = [
        m for block in memory.blocks(placed.pipe.transformer) for m in block.modules() if isinstance(m, nn.Linear)
    ]
    assert linear and {memory.plain(each) for each in linear} == {placed.tier.bits == 16}
    pack = learn(placed, photos(model), ANCHOR, tmp_path / "toy.pack", settings=QUICK)
    if placed.tier.bits == 16:
        assert tree(pack.path) == tree(packs(model.backbone.pipeline).path)
    for each in (placed, model):
        (result,) = generate(each, ANCHOR, [pack], steps=2)
        assert result.image.size == (model.defaults.size,) * 2


@pytest.mark.parametrize("family", NEW)
def test_the_command_line(family: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders(family), tmp_path / "model"))
    usual = json.loads((folder / pipeline.DEFAULTS_FILE).read_text(encoding="utf-8"))
    named = {key: value for key, value in QUICK.__dict__.items() if key != "preview_every"}
    usual |= {"learn": named, "edit": EDIT.__dict__}
    (folder / pipeline.DEFAULTS_FILE).write_text(json.dumps(usual), encoding="utf-8")
    (tmp_path / "photos").mkdir()
    world.character_photos("bobo", 1, seed=0, size=usual["size"])[0].save(tmp_path / "photos" / "1.png")

    def run(*args: Any) -> Any:
        result = CliRunner().invoke(app, [*map(str, args), "--model", str(folder), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    pack = tmp_path / "toy.pack"
    assert run("learn", tmp_path / "photos", "--anchor", ANCHOR, "-o", pack)["anchor"] == ANCHOR
    assert run("bind", pack, KNOWN)[0]["taken"]
    assert run("ask", f"What is {KNOWN}?", "--pack", pack)["answer"]
    (row,) = run("generate", f"{KNOWN} in the snow", "--pack", pack, "-o", tmp_path / "images")
    assert Image.open(row["file"]).size == (usual["size"], usual["size"])
    result = CliRunner().invoke(
        app, ["bind", str(pack), "my other toy", "--layers", "0", "--layers", "9", "--model", str(folder)]
    )
    assert result.exit_code == 2 and "layer 9" in result.stderr


@pytest.mark.parametrize("family", NEW)
@pytest.mark.exhaustive
def test_in_bfloat16(
    family: str, folders: Callable[[str], Path], models: Callable[[str], Model], tmp_path: Path
) -> None:
    """As large models are loaded: the same model by its fingerprint, and both stages work."""
    model = pipeline.load(folders(family), device="cpu", dtype=torch.bfloat16)
    assert model.fingerprint == models(family).fingerprint
    pack = learn(
        model,
        photos(model, 1),
        ANCHOR,
        tmp_path / "toy.pack",
        settings=replace(QUICK, steps=1, prior_weight=0.0, preview_every=0),
    )
    (edit,) = bind(model, pack, KNOWN, settings=replace(EDIT, steps=4, least_alignment=0.0))
    images = [np.asarray(each.image) for packs in ([], [pack]) for each in generate(model, KNOWN, packs, steps=2)]
    assert edit.shifts and not np.array_equal(*images)


def test_a_prompt_that_would_be_cut_off_is_refused(model: Model) -> None:
    longest = model.backbone.longest - tail_length(model)
    text = " a" * longest
    assert len(token_ids(model, text)) - prefix_length(model) == model.backbone.longest
    generate(model, text)  # which draws nothing yet
    with pytest.raises(MokusError, match=f"at most {model.backbone.longest}"):
        generate(model, text + " a")
    if model.backbone is not QWEN_IMAGE:
        assert len(encode(model, [text])[0]) >= model.backbone.longest


# --- loading -------------------------------------------------------------------------------------------------


def test_an_unknown_family_is_named_beside_those_that_are_known(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("ZImagePipeline"), tmp_path / "model"))
    for name in ("FluxPipeline", None, ["a", "b"]):
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) | {"_class_name": name}
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(MokusError) as caught:
            pipeline.load(folder, device="cpu")
        assert all(word in str(caught.value) for word in (*BACKBONES, str(name))) and "\n" not in str(caught.value)


def test_a_text_encoder_that_cannot_answer_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """A bare model whose head is not its embeddings: transformers would make one up, at random."""
    folder = Path(shutil.copytree(folders("ZImagePipeline"), tmp_path / "model"))
    config = Qwen3Config.from_pretrained(folder / "text_encoder")
    assert config.tie_word_embeddings
    config.tie_word_embeddings = False
    Qwen3ForCausalLM(config).model.save_pretrained(folder / "text_encoder")
    with pytest.raises(MokusError, match="lacks lm_head"):
        pipeline.load(folder, device="cpu")


@pytest.mark.parametrize("family", NEW)
def test_defaults_are_the_familys_unless_the_folder_says_so(
    family: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders(family), tmp_path / "model"))
    (folder / pipeline.DEFAULTS_FILE).unlink()
    usual = BACKBONES[family].defaults({})
    found = pipeline.load(folder, device="cpu").defaults
    assert (found.steps, found.true_cfg_scale) == (usual["steps"], usual["true_cfg_scale"])
    (folder / pipeline.DEFAULTS_FILE).write_text('{"steps": 7}', encoding="utf-8")
    found = pipeline.load(folder, device="cpu").defaults
    assert (found.steps, found.true_cfg_scale) == (7, usual["true_cfg_scale"])


def test_noise_levels_of_the_folder_are_used_for_their_number_of_steps(
    models: Callable[[str], Model], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Qwen-Image-2.1 may bring its own, and then counts no steps; other numbers are drawn as without them."""
    folder = Path(shutil.copytree(folders("QwenImage21Pipeline"), tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) | {"sample_sigmas": [1.0, 0.9, 0.5]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / pipeline.DEFAULTS_FILE).write_text('{"size": 64}', encoding="utf-8")
    own, plain = pipeline.load(folder, device="cpu"), models("QwenImage21Pipeline")
    assert own.defaults.steps == 3

    def draws(model: Model, steps: int) -> bytes:
        (result,) = generate(model, "x", steps=steps, true_cfg_scale=1.0)
        return result.image.tobytes()

    assert draws(own, 2) == draws(plain, 2) and draws(own, 3) != draws(plain, 3)


@pytest.fixture(autouse=True)
def _for_the_next_test(models: Callable[[str], Model]) -> Iterator[None]:
    """One failing test shall not make others fail."""
    yield
    for family in ALL:
        models(family).pipe.transformer.unload_lora()
        models(family).pipe.transformer.requires_grad_(False)
