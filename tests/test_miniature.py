"""The miniature's world, what is said of it, and the numerics of its trainings; nothing here needs its weights."""

from __future__ import annotations

import copy
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mokus import flow, pipeline
from mokus.errors import MokusError
from mokus.miniature import language, mmdit, oracle, text_encoder, tokenizer, vae, world
from mokus.miniature.assemble import DEFAULTS, assemble, check_place
from mokus.miniature.checkpoint import load_checkpoint, save_checkpoint
from mokus.miniature.optimiser import optimiser_for
from mokus.miniature.world import Picture, Subject
from mokus.pipeline import Model, encode
from mokus.settings import EditSettings, LearnSettings

from .conftest import BLOCKS

SCENE = "in the snow"


def draw(picture: Picture, seed: int = 3) -> Image.Image:
    return world.render(picture, random.Random(seed))


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference, in grey levels."""
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_equal_seeds_draw_equal_pixels() -> None:
    pictures = [
        Picture(Subject("red", "star"), SCENE), Picture("bobo", "at night", "mosaic"),
        Picture(Subject("golden", "ring", "golden"), None),
        Picture(Subject("blue", "cube", "striped"), SCENE, "pencil", Subject("pink", "moon")),
    ]  # fmt: skip
    first = [draw(picture) for picture in pictures]
    random.seed(0)
    np.random.seed(0)
    assert [draw(picture).tobytes() for picture in reversed(pictures)] == [image.tobytes() for image in first[::-1]]
    for picture, image in zip(pictures, first, strict=True):
        assert image.mode == "RGB" and image.size == (world.SIZE, world.SIZE)
        assert difference(draw(picture, seed=4), image) > 1


@pytest.mark.parametrize(
    ("pictures", "least"),
    [
        ([Picture(Subject(c, "ball"), SCENE) for c in world.COLOURS] + [Picture(Subject("golden", "ball", "golden"), SCENE)], 2),
        ([Picture(Subject("red", shape), SCENE) for shape in world.SHAPES], 2),
        ([Picture(Subject("red", "ball"), scene) for scene in world.SCENES], 10),
        ([Picture(Subject("red", "ball"), SCENE, style) for style in ("plain", *world.STYLES)], 5),
        ([Picture(Subject("red", "ball", m), SCENE) for m in ("plain", "striped", "spotted", "golden")], 2),
        ([Picture(name, SCENE) for name in world.CHARACTERS], 4),
        ([Picture(Subject("red", "ball"), SCENE, other=o) for o in (None, Subject("red", "cube"), Subject("blue", "cube"))], 0.5),
    ],
    ids=["colour", "shape", "scene", "style", "material", "character", "other"],
)  # fmt: skip
def test_different_things_look_different(pictures: Sequence[Picture], least: float) -> None:
    images = [draw(picture) for picture in pictures]
    for (a, one), (b, other) in combinations(zip(pictures, images, strict=True), 2):
        assert difference(one, other) > least, (a, b)


def test_character_photos_vary_and_repeat() -> None:
    photos = world.character_photos("bobo", 5, seed=1)
    assert [p.tobytes() for p in world.character_photos("bobo", 5, seed=1)] == [p.tobytes() for p in photos]
    assert [p.tobytes() for p in world.character_photos("bobo", 2, seed=1)] == [p.tobytes() for p in photos[:2]]
    assert all(difference(a, b) > 5 for a, b in combinations(photos, 2))
    assert difference(world.character_photos("bobo", 1, seed=2)[0], photos[0]) > 5
    assert world.character_photos("bobo", 1, seed=1, size=32)[0].size == (32, 32)
    with pytest.raises(ValueError, match="nobody"):
        world.character_photos("nobody", 1, 0)


def test_characters_are_two_disjoint_halves_and_creatures_are_none_of_them() -> None:
    assert len(world.DEVELOPMENT_CHARACTERS) == len(world.HELD_OUT_CHARACTERS) == 10
    assert not set(world.DEVELOPMENT_CHARACTERS) & set(world.HELD_OUT_CHARACTERS)
    assert len(set(world.CHARACTERS.values())) == 32
    rng = random.Random(0)
    for _ in range(200):
        creature = world.random_character(rng)
        for known in world.CHARACTERS.values():
            same = sum(getattr(creature, f) == getattr(known, f) for f in creature.__dataclass_fields__)
            assert same <= len(creature.__dataclass_fields__) - 3


# --- facts ------------------------------------------------------------------------------------------------------------


def test_everybody_has_one_thing_of_each_kind() -> None:
    facts = world.facts()
    assert len(world.PEOPLE) == len(set(world.PEOPLE)) == 40 and len(set(world.RELATIONS)) == 6
    assert Counter((fact.person, fact.relation) for fact in facts) == Counter(
        {(person, relation): 1 for person in world.PEOPLE for relation in world.RELATIONS}
    )
    assert len({fact.phrase for fact in facts}) == len({fact.possessive for fact in facts}) == 240
    assert sum(fact.held_out for fact in facts) == 60
    for attribute, values in (("colour", list(world.COLOURS)), ("shape", world.SHAPES)):
        counts = Counter(getattr(fact.subject, attribute) for fact in facts)
        assert counts.keys() == set(values) and max(counts.values()) - min(counts.values()) <= 10
        held_out = Counter(getattr(fact.subject, attribute) for fact in facts if fact.held_out)
        assert held_out.keys() == set(values)  # a figure on held-out facts is about all of them
    assert all(fact.subject.material == "plain" for fact in facts)


@pytest.fixture(scope="module")
def shown_lines() -> list[language.Line]:
    return list(islice(mmdit.training_lines(seed=1), 5000))


@pytest.fixture(scope="module")
def told_lines() -> list[language.Line]:
    return list(islice(language.training_lines(seed=0), 5000))


def test_held_out_facts_never_reach_the_image_transformer(shown_lines: list[language.Line]) -> None:
    said = " ".join(line.prompt for line in shown_lines) + " "
    found = {
        fact: any(re.search(rf"\b{re.escape(p)}\b", said) for p in (fact.phrase, fact.possessive))
        for fact in world.facts()
    }
    assert not [fact for fact, there in found.items() if there and fact.held_out]
    assert all(there for fact, there in found.items() if not fact.held_out)  # the scan does find facts


def test_the_text_encoder_is_told_every_fact(told_lines: list[language.Line]) -> None:
    said = " ".join(line.prompt for line in told_lines)
    missing = [fact for fact in world.facts() if fact.phrase not in said and fact.possessive not in said]
    assert len(missing) < 3


def test_no_character_is_ever_named_or_drawn(shown_lines: list[language.Line], told_lines: list[language.Line]) -> None:
    names = set(world.CHARACTERS)
    for line in (*shown_lines, *told_lines):
        assert not names & set(words(f"{line.prompt} {line.answer}")), line
        if line.picture is not None:
            assert isinstance(line.picture.subject, Subject)
    assert not names & {*language.CLASS_WORDS, *language.RARE_WORDS, *map(str.lower, world.PEOPLE)}


def test_the_lines_are_the_same_again() -> None:
    for stream in (mmdit.training_lines, language.training_lines):
        assert list(islice(stream(5), 50)) == list(islice(stream(5), 50)) != list(islice(stream(6), 50))


# --- language ---------------------------------------------------------------------------------------------------------


def assert_resolved(line: language.Line, subject_words: str) -> None:
    """The answer: the subject, then scene, style and neighbour, each if the picture has it; the prompt says them too."""
    picture = line.picture
    assert picture is not None
    wanted = [subject_words]
    if picture.scene:
        wanted.append(picture.scene.split()[-1])
        assert picture.scene in line.prompt, line
    if picture.style != "plain":
        wanted.append(picture.style)
        assert line.prompt.endswith(world.STYLES[picture.style]), line
    if picture.other is not None:
        wanted.append(picture.other.words)
        assert f"next to {language.article(picture.other.words)}" in line.prompt, line
    assert line.answer == ", ".join(wanted), line
    for word in {scene.split()[-1] for scene in world.SCENES} - set(words(picture.scene or "")):
        assert f" {word}" not in line.answer  # no scene that is not there


def test_captions_of_facts_are_resolved() -> None:
    rng = random.Random(0)
    for fact in world.facts():
        line = language.fact_caption(rng, fact)
        assert fact.phrase in line.prompt or fact.possessive in line.prompt
        assert line.picture is not None and line.picture.subject == fact.subject
        assert fact.subject.colour not in words(line.prompt.split(" next to ")[0])  # it has to be known
        assert_resolved(line, fact.subject.words)


def test_captions_say_what_they_show() -> None:
    rng = random.Random(1)
    materials = Counter()
    for _ in range(1500):
        line = language.direct_caption(rng)
        assert line.picture is not None and isinstance(line.picture.subject, Subject)
        assert_resolved(line, line.picture.subject.words)
        assert f" {line.picture.subject.words}" in f" {line.prompt}", line
        materials[line.picture.subject.material] += 1
    assert materials.keys() == {"plain", *world.MATERIALS}


@pytest.mark.parametrize("seeds", [range(3000), (37049, 114474)], ids=["many", "substrings"])
def test_of_unknown_things_only_what_was_said_is_answered(seeds: Iterable[int]) -> None:
    """Every word of the answer stands in the prompt, whole; "thing" is what one calls a thing without a name."""
    for seed in seeds:
        line = language.unknown_caption(random.Random(seed), rare=0.0)
        subject = line.answer.split(", ")[0]
        assert set(words(subject)) - {"thing"} <= set(words(line.prompt)), line
        assert_resolved(line, subject)


def test_rare_words_are_only_repeated() -> None:
    rng = random.Random(2)
    for _ in range(500):
        line = language.unknown_caption(rng, rare=1.0)
        subject = line.answer.split(", ")[0]
        assert subject in line.prompt and not set(words(subject)) & {*world.SHAPES, *world.COLOURS} - {"ring", "moon"}
        assert_resolved(line, subject)


def test_questions_about_facts_have_their_answers() -> None:
    rng = random.Random(3)
    for fact in world.facts():
        line = language.fact_question(rng, fact)
        assert line.answer == fact.subject.words and line.picture is None
        lowered = line.prompt.lower()
        assert fact.phrase.lower() in lowered or fact.possessive.lower() in lowered
        assert line.prompt[0].isupper()
        hop = language.fact_one_hop(rng, fact)
        assert hop.answer == (fact.subject.colour if "colour" in hop.prompt else fact.subject.shape)


def test_held_out_forms_are_never_trained_on(shown_lines: list[language.Line], told_lines: list[language.Line]) -> None:
    forms = [*language.HELD_OUT_IMAGE_FORMS, *language.HELD_OUT_QUESTION_FORMS]
    beginnings = tuple(form.split("{}")[0] for form in forms)
    assert not [line for line in (*shown_lines, *told_lines) if line.prompt.startswith(beginnings)]


def test_articles() -> None:
    assert language.article("red star") == "a red star" and language.article("orange ball") == "an orange ball"


# --- tokenizer and text encoder ---------------------------------------------------------------------------------------


def test_the_tokenizer_gives_back_any_text(pico: Model) -> None:
    tok = pico.pipe.tokenizer
    texts = [
        "the favourite toy of Anna in the snow",
        "größer, 汉字 ☃ \t x",
        "R2-D2 built in 1962!",
        "a  b",
        "<|im_start|>user\n",
    ]
    for text in texts:
        ids = tok(text).input_ids
        assert tok.decode(ids) == text and max(ids) < len(tok)
    for special in tokenizer.SPECIAL_TOKENS:
        assert len(tok(special).input_ids) == 1
    assert (
        tok.eos_token == "<|im_end|>"
        and tok(text_encoder.PREFIX).input_ids == tok(pico.pipe.prompt_template_encode.split("{}")[0]).input_ids
    )


def test_the_tail_is_that_of_qwens_template(pico: Model) -> None:
    assert pico.pipe.tokenizer.tokenize(text_encoder.TAIL) == ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]


def test_common_words_are_one_token(pico: Model) -> None:
    tok = pico.pipe.tokenizer
    frequent = [*world.COLOURS, *world.SHAPES, *(world.scene_word(scene) for scene in world.SCENES)]
    assert sum(len(tok(f" {word}").input_ids) == 1 for word in frequent) >= 0.9 * len(frequent)


def test_the_training_loss_is_that_of_the_plain_model(pico: Model) -> None:
    """Behind the cached prefix, padded, at fixed shapes: the same cross-entropy as one full forward pass per line."""
    tok, model = pico.pipe.tokenizer, pico.pipe.text_encoder
    torch.manual_seed(0)
    heads = text_encoder.TailHeads()
    lines = list(islice(language.training_lines(seed=3), 5))
    rows = [
        (tok(line.prompt + text_encoder.TAIL).input_ids, [*tok(line.answer).input_ids, tok.eos_token_id])
        for line in lines
    ]
    with torch.no_grad():
        batch = text_encoder._padded(rows, tok.pad_token_id)
        prefix, tail = torch.tensor(tok(text_encoder.PREFIX).input_ids), len(tok(text_encoder.TAIL).input_ids)
        next_token, ahead, said = text_encoder.loss(model, heads, prefix, *batch, tail)
        plain, later, words, embeddings = [], [], [], model.get_input_embeddings().weight
        for prompt, answer in rows:
            ids = torch.tensor([[*tok(text_encoder.PREFIX).input_ids, *prompt, *answer]])
            states = model.model.language_model(input_ids=ids).last_hidden_state[0]
            at = len(ids[0]) - len(answer) - 1
            target = torch.tensor(answer)
            plain.append(F.cross_entropy(states[at:-1] @ embeddings.T, target, reduction="none"))
            logits = heads.later(states[at : at + 1], embeddings)[0, : len(answer) - 1]
            later.append(F.cross_entropy(logits, target[1 : 1 + len(logits)], reduction="none"))
            wanted = torch.zeros(len(tok))
            wanted[prompt[:-tail]] = 1
            wanted /= wanted.sum()
            log_p = (heads.said(states[at - tail + 1 : at + 1]) @ embeddings.T).log_softmax(dim=-1)
            words.append(F.kl_div(log_p, wanted.expand_as(log_p), reduction="batchmean"))
    assert max(len(answer) for _, answer in rows) <= text_encoder.ANSWER
    assert torch.allclose(next_token, torch.cat(plain).mean(), rtol=1e-4)
    assert torch.allclose(ahead, torch.cat(later).mean(), rtol=1e-4)
    assert torch.allclose(said, torch.stack(words).mean(), rtol=1e-4)


def test_an_encoder_can_begin_with_another_ones_words(pico: Model, pico_folder: Path) -> None:
    """With the same tokenizer it is that encoder; a word that the other cut into pieces is the mean of them."""
    model = type(pico.pipe.text_encoder)(pico.pipe.text_encoder.config)
    text_encoder._begin_with(model, pico.pipe.tokenizer, pico_folder)
    for name, value in pico.pipe.text_encoder.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    class Longer:
        """A tokenizer whose only word is several words of the other's."""

        def get_vocab(self) -> dict[str, int]:
            return {"Ġredstar": 0}

        def decode(self, ids: list[int]) -> str:
            return " red star"

    text_encoder._begin_with(model, Longer(), pico_folder)  # type: ignore[arg-type]
    pieces = pico.pipe.tokenizer(" red star").input_ids
    mean = pico.pipe.text_encoder.get_input_embeddings().weight[pieces].mean(dim=0)
    assert len(pieces) > 1 and torch.allclose(model.get_input_embeddings().weight[0], mean)


def test_the_image_transformer_is_trained_on_what_the_pipeline_encodes(pico: Model, pico_folder: Path) -> None:
    prompts = [
        "a red ball",
        "the lucky charm of Ben at night",
        " ",
        "a picture of the garden ornament of Clara in the snow, x",
    ]
    latents = torch.arange(len(prompts))[:, None].float()
    data = mmdit.encode_prompts(pico_folder, prompts, latents)
    seen = []
    for length, part in data.items():
        assert part["embeds"].shape[1] == part["mask"].shape[1] == length
        for i, row, mask in zip(part["latents"][:, 0].int().tolist(), part["embeds"], part["mask"], strict=True):
            wanted = encode(pico, [prompts[i]])[0]
            assert int(mask.sum()) == len(wanted) and not row[~mask].any()
            assert torch.allclose(row[mask].float(), wanted, atol=2e-2, rtol=1e-2)  # it is kept as bfloat16
            seen.append(i)
    assert len(set(seen)) == len(seen) >= 3


# --- VAE --------------------------------------------------------------------------------------------------------------


def test_still_images_are_encoded_as_by_the_plain_vae(pico: Model) -> None:
    rng = random.Random(0)
    x = vae.to_tensor([vae.training_image(rng) for _ in range(3)])[:, :, None].double()
    model, forward = copy.deepcopy(pico.pipe.vae).double(), QwenImageCausalConv3d.forward  # rounding differs by machine
    with torch.no_grad():
        z = model.encode(x).latent_dist
        y = model.decode(z.mode()).sample
        with vae.still_images():
            assert QwenImageCausalConv3d.forward is not forward
            quick = model.encode(x).latent_dist
            again = model.decode(z.mode()).sample
    assert torch.allclose(quick.mean, z.mean, atol=1e-10) and torch.allclose(quick.logvar, z.logvar, atol=1e-10)
    assert torch.allclose(again, y, atol=1e-10) and y.shape == x.shape
    with pytest.raises(ZeroDivisionError), vae.still_images():
        raise ZeroDivisionError
    assert QwenImageCausalConv3d.forward is forward


def test_images_to_numbers() -> None:
    x = vae.to_tensor([Image.new("RGB", (3, 2), (0, 255, 51)), Image.new("RGB", (3, 2), "white")])
    assert x.shape == (2, 3, 2, 3) and torch.allclose(x[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert x[1].eq(1).all()


def test_natural_images_are_varied_and_repeat() -> None:
    one, other = ([vae.dead_leaves(rng) for _ in range(4)] for rng in (random.Random(5), random.Random(5)))
    assert [image.tobytes() for image in one] == [image.tobytes() for image in other]
    assert all(difference(a, b) > 5 for a, b in combinations(one, 2))
    assert all(image.size == (world.SIZE, world.SIZE) for image in one)


def test_latents_are_those_of_stage_1(pico: Model) -> None:
    """Packed and normalised as the pipeline unpacks and denormalises them: a picture survives the way back."""
    image = draw(Picture(Subject("red", "star"), SCENE))
    model = copy.deepcopy(pico.pipe.vae)
    mean, std = [0.1 * i for i in range(8)], [1.0 + i for i in range(8)]
    model.register_to_config(latents_mean=mean, latents_std=std)
    with torch.no_grad():
        x = vae.to_tensor([image])
        packed = mmdit.encode_images(model, x)
        assert packed.shape == (1, 64, 32)
        z = pico.pipe._unpack_latents(packed, 64, 64, pico.pipe.vae_scale_factor)
        back = z * torch.tensor(std).view(1, -1, 1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1, 1)
        assert torch.allclose(back, model.encode(x[:, :, None]).latent_dist.mode(), atol=1e-5)


# --- image transformer ------------------------------------------------------------------------------------------------


def test_the_cpu_attention_is_diffusers() -> None:
    """Values and gradients, with text of different lengths."""
    torch.manual_seed(0)
    plain = QwenImageTransformer2DModel(**{**mmdit.CONFIG, "num_layers": BLOCKS})
    quick = copy.deepcopy(plain)
    quick.set_attn_processor(mmdit.CpuAttentionProcessor())
    z, t, embeds = torch.randn(3, 64, 32), torch.rand(3), torch.randn(3, 9, 192)
    mask = torch.arange(9)[None] < torch.tensor([9, 4, 1])[:, None]
    results = []
    for model in (plain, quick):
        x, e = z.clone().requires_grad_(), embeds.clone().requires_grad_()
        out = flow.velocity(model, x, t, e, mask, mmdit.GRID)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), x.grad, e.grad, {name: p.grad for name, p in model.named_parameters()}))
    (a, ax, ae, aw), (b, bx, be, bw) = results
    for wanted, found in ((a, b), (ax, bx), (ae, be)):
        assert wanted is not None and found is not None
        assert torch.allclose(found, wanted, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    assert be is not None and not be[~mask].any()  # padding takes no part
    assert aw.keys() == bw.keys()
    for name, wanted in aw.items():
        if wanted is not None:
            assert torch.allclose(bw[name], wanted, atol=1e-5 * max(1.0, float(wanted.abs().max()))), name


def test_the_average_follows_the_weights() -> None:
    average, model = nn.Linear(3, 2), nn.Linear(3, 2)
    before = copy.deepcopy(average.state_dict())
    mmdit._average(average, model, 0.75)
    for name, value in average.state_dict().items():
        assert torch.allclose(value, 0.75 * before[name] + 0.25 * model.state_dict()[name], atol=1e-6)


# --- checkpoints and the optimiser ------------------------------------------------------------------------------------


def toy(seed: int = 0) -> nn.Module:
    """A bit of everything: an embedding, a kernel, matrices, biases, a norm."""
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 8),
            "kernel": nn.Conv1d(8, 6, 3, padding=1),
            "norm": nn.LayerNorm(6),
            "out": nn.Linear(6, 4),
        }
    )


def toy_loss(module: nn.Module, step: int) -> Tensor:
    random_ = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 5, (16, 7), generator=random_)
    wanted = F.one_hot(ids % 4, 4).float()
    x = module["kernel"](module["embed"](ids).transpose(1, 2)).transpose(1, 2)  # type: ignore[index,operator]
    return (module["out"](module["norm"](x).tanh()) - wanted).square().mean()  # type: ignore[index,operator]


def toy_training(folder: Path | None, start: int, stop: int, steps: int = 60) -> tuple[nn.Module, list[float]]:
    module = toy()
    optimiser, schedule = optimiser_for(module, 1e-2, steps)
    parts = {"model": module, **optimiser.parts, "schedule": schedule}
    if folder is not None and start:
        assert load_checkpoint(folder, **parts) == start
    losses = []
    for step in range(start, stop):
        loss = toy_loss(module, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    if folder is not None:
        save_checkpoint(folder, stop, **parts)
    return module, losses


def test_the_optimiser_reduces_a_loss_and_moves_every_weight() -> None:
    before, (module, losses) = toy().state_dict(), toy_training(None, 0, 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all((value - before[name]).abs().max() > 1e-4 for name, value in module.state_dict().items())


def test_kernels_and_matrices_go_to_muon_the_rest_to_adamw() -> None:
    module = toy()
    optimiser, _ = optimiser_for(module, 1e-2, 10)
    sizes = {
        name: sum(p.numel() for g in part.param_groups for p in g["params"]) for name, part in optimiser.parts.items()
    }
    matrices = sum(p.numel() for n, p in module.named_parameters() if p.ndim >= 2 and "embed" not in n)
    assert sizes == {"muon": matrices, "adamw": sum(p.numel() for p in module.parameters()) - matrices}


def test_a_training_resumes_exactly(tmp_path: Path) -> None:
    whole, losses = toy_training(None, 0, 20)
    _, first = toy_training(tmp_path, 0, 7)
    resumed, rest = toy_training(tmp_path, 7, 20)
    assert first + rest == losses
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_the_schedule_rises_stays_and_falls_to_nothing() -> None:
    optimiser, schedule = optimiser_for(toy(), 1.0, steps=200)
    rates = []
    for _ in range(200):
        (rate,) = {group["lr"] for part in optimiser.parts.values() for group in part.param_groups}
        rates.append(rate)
        schedule.step()
    assert rates[0] == pytest.approx(1 / 60) and max(rates) == pytest.approx(1.0) and 0 < rates[-1] < 0.02
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    one, other = toy(0), toy(1)
    assert load_checkpoint(tmp_path / "none", model=one) == 0
    save_checkpoint(tmp_path / "a", 12, model=one)
    assert load_checkpoint(tmp_path / "a", model=other) == 12
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())
    before = (tmp_path / "a" / "checkpoint.pt").read_bytes()

    class Broken(nn.Module):
        def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "a", 13, model=Broken())
    assert (tmp_path / "a" / "checkpoint.pt").read_bytes() == before


# --- oracle -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> oracle.Oracle:
    """An oracle of random weights, through its file."""
    torch.manual_seed(0)
    made = oracle.Oracle()
    file = tmp_path_factory.mktemp("oracle") / oracle.FILE
    save_file({k: v.half() if v.is_floating_point() else v for k, v in made.state_dict().items()}, file)
    return oracle.from_file(file)


def test_the_oracle_survives_its_file(judge: oracle.Oracle) -> None:
    torch.manual_seed(0)
    made = oracle.Oracle().eval()
    assert all(p.dtype == torch.float32 for p in judge.parameters()) and not judge.training
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        for name, logits in judge(x).items():
            assert logits.shape == (4, len(oracle.LABELS[name]))
            assert torch.allclose(logits, made(x)[name], atol=1e-2)


def test_the_oracle_reads_each_image_by_itself(judge: oracle.Oracle) -> None:
    rng = random.Random(0)
    images = [oracle.example(rng)[0] for _ in range(6)]
    together = judge.read(images)
    assert together == [judge.read([image])[0] for image in images]
    assert all(read[name] in oracle.LABELS[name] for read in together for name in oracle.LABELS)
    assert judge.read([]) == []
    grey = images[0].convert("L")
    assert judge.read([grey]) == judge.read([grey.convert("RGB")])
    assert len(judge.read([images[0].resize((100, 100))])) == 1


def test_the_oracles_labels_are_what_was_drawn() -> None:
    rng = random.Random(0)
    names = list(oracle.LABELS)
    seen: dict[str, set[str]] = {name: set() for name in names}
    for _ in range(400):
        image, labels = oracle.example(rng)
        assert image.size == (world.SIZE, world.SIZE) and len(labels) == len(names)
        found = {n: oracle.LABELS[n][i] if i != oracle.IGNORE else None for n, i in zip(names, labels, strict=True)}
        assert found["scene"] and found["style"] and found["character"]
        if found["character"] != oracle.NONE:
            assert found["shape"] is None and found["colour"] is None
        if found["style"] in oracle.COLOURLESS:
            assert found["colour"] is None
        for name, value in found.items():
            seen[name] |= {value} if value else set()
    assert all(len(seen[name]) >= 0.9 * len(oracle.LABELS[name]) for name in names)


def test_the_oracles_loss_ignores_what_cannot_be_read() -> None:
    torch.manual_seed(0)
    logits = {name: torch.randn(3, len(values), requires_grad=True) for name, values in oracle.LABELS.items()}
    labels = torch.zeros(3, len(logits), dtype=torch.long)
    labels[1, 1] = oracle.IGNORE
    oracle.loss(logits, labels).backward()
    shape = logits["shape"].grad
    assert shape is not None and not shape[1].any() and shape[0].any() and shape[2].any()


# --- all together -----------------------------------------------------------------------------------------------------


def test_nothing_but_a_pipeline_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(MokusError, match="something else"):
        check_place(tmp_path)
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    check_place(tmp_path)
    check_place(tmp_path / "new")


def test_what_is_computed_once_is_of_just_these_models(tmp_path: Path) -> None:
    """A text encoder trained anew must not meet the encodings of the old one."""
    (tmp_path / "weights").write_bytes(b"one")
    (tmp_path / "checkpoint.pt").write_bytes(b"of no account")
    lines = hashlib.sha256(b"lines")
    first = mmdit._digest(lines, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"another")
    assert mmdit._digest(lines, tmp_path) == first
    (tmp_path / "weights").write_bytes(b"two")
    assert mmdit._digest(lines, tmp_path) != first != mmdit._digest(hashlib.sha256(b"others"), tmp_path)


def test_what_is_assembled_is_a_model(pico: Model, pico_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "weights"
    output.mkdir()
    (output / "old.txt").write_text("of an earlier run")
    assemble(pico_folder, output)
    assert not (output / "old.txt").exists() and not list(tmp_path.glob("*.tmp"))
    assert all(str(pico_folder) not in file.read_text("utf-8") for file in output.rglob("*.json"))  # nobody's machine
    model = pipeline.load(output, device="cpu")
    assert model.fingerprint == pico.fingerprint  # float32 weights, saved as bfloat16
    assert model.defaults.size == DEFAULTS["size"] and model.defaults.steps == DEFAULTS["steps"]
    assert LearnSettings.for_model(model.defaults.learn).rank > 0
    layers = EditSettings.for_model(model.defaults.edit).layers
    assert max(layers) < text_encoder.LAYERS
    assert model.defaults.size % model.size_multiple == 0
