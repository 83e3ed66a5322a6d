"""The miniature's CLIP: a small `CLIPModel` whose two towers agree on the world's pictures and on what is said of them.

transformers loads the folder as it loads any CLIP checkpoint: model, tokenizer and image processor. Its pictures are of
coloured shapes and of unnamed creatures, never of a character: what it makes of those it makes of their traits.

Three losses: the contrast of pictures and captions, in which a caption that is true of another picture of the batch as
well ("a toy on the beach") is no mistake; the contrast of two pictures of one thing with those of other things; and
attribute heads on both embeddings, dropped afterwards, which make a short training on one core enough.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from mokus.miniature import language, oracle, world
from mokus.miniature.checkpoint import load_checkpoint, save_checkpoint
from mokus.miniature.optimiser import optimiser_for
from mokus.miniature.world import Character, Picture, Subject

FOLDER = "clip"
VOCABULARY = 2048
TOKENS = 64  # of the longest text
DIMENSIONS = 128  # of the embeddings
PAIR_WEIGHT, HEAD_WEIGHT = 0.5, 0.1  # of the losses beside the contrast of pictures and captions

# How a creature's traits are told. With its accent's colour a pattern is a noun: "with yellow spots"
BODIES = {
    "egg": "egg-shaped", "box": "boxy", "pear": "pear-shaped", "blob": "round", "fish": "fish-shaped", "ghost": "ghostly",
    "mushroom": "mushroom-shaped", "triangle": "pointed", "bottle": "bottle-shaped",
}  # fmt: skip
PATTERNS = {
    "plain": "plain", "belly": "big-bellied", "bands": "banded", "spots": "spotted", "zigzag": "zigzag", "half": "two-coloured",
    "stripes": "striped", "checks": "checked",
}  # fmt: skip
EYES = {1: "one eye", 2: "two eyes", 3: "three eyes"}
TOPS = {
    "none": "nothing on its head", "horns": "horns", "antenna": "antennae", "long ears": "long ears", "round ears": "round ears",
    "crown": "a crown", "hat": "a hat",
}  # fmt: skip
LIMBS = {
    "none": "no limbs", "arms": "arms", "legs": "legs", "wheels": "wheels", "tentacles": "tentacles", "wings": "wings",
    "fin": "a fin",
}  # fmt: skip
MOUTHS = {"smile": "a smile", "teeth": "teeth", "o": "an open mouth", "grille": "a grille", "beak": "a beak"}
COLOURS = {**world.PALETTE, "golden": world.GOLD}

# All that can be true of a picture; the first SUBJECT of them are about its subject
ATTRIBUTES: dict[str, list[str]] = {
    "kind": ["shape", "creature"],
    "colour": list(COLOURS),
    "shape": world.SHAPES,
    "pattern": list(PATTERNS),
    "accent": list(world.PALETTE),
    "body": list(BODIES),
    "eyes": [str(n) for n in EYES],
    "top": list(TOPS),
    "limbs": list(LIMBS),
    "mouth": list(MOUTHS),
    "scene": world.SCENES,
    "style": ["plain", *world.STYLES],
    "other colour": ["none", *world.COLOURS],
    "other shape": ["none", *world.SHAPES],
}
SUBJECT = 10
COLOUR_ATTRIBUTES = ("colour", "accent", "other colour")
UNSAID = -1  # instead of a value's index: not said, or nothing to say

Meaning = dict[str, str]  # attribute -> value


def folder() -> Path:
    """Where the shipped checkpoint is."""
    return Path(str(files("mokus.miniature").joinpath("weights", FOLDER)))


# --- pictures and captions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A picture and a caption, all that is true of the one and what is said in the other."""

    image: Image.Image
    caption: str
    truth: Meaning
    said: Meaning


def pairs(seed: int) -> Iterator[Pair]:
    """An endless stream; the first and the second, the third and the fourth, ... are two pictures of one subject."""
    rng = random.Random(seed)
    while True:
        thing: Subject | Character
        if rng.random() < 0.35:
            thing = world.random_subject(rng, rng.choice([None, None, None, *world.MATERIALS]))
        else:
            thing = world.random_character(rng)
            if rng.random() < 0.12:
                thing = replace(thing, colour=world.GOLD, accent=(250, 232, 150))
        yield _pair(rng, thing)
        yield _pair(rng, thing)


def _pair(rng: random.Random, thing: Subject | Character) -> Pair:
    subject = thing if isinstance(thing, Subject) else world.random_subject(rng)
    told = language.random_picture(rng, subject, plain=0.5)
    drawn = replace(told, scene=told.scene or rng.choice(world.SCENES))
    truth = {**traits(thing), **surroundings(drawn)}
    if isinstance(thing, Subject):
        text = language.caption(language.article(thing.words), told, rng.choice(language.IMAGE_FORMS))
        said, image = traits(thing), world.render(drawn, rng)
    else:
        text, said = _creature_caption(rng, thing, told)
        image = world.render(drawn, rng, thing)
    said |= surroundings(told)
    if told.style in oracle.COLOURLESS:  # nobody can see whether it is true
        truth, said = ({k: v for k, v in m.items() if k not in COLOUR_ATTRIBUTES} for m in (truth, said))
    return Pair(image, text, truth, said)


def traits(thing: Subject | Character) -> Meaning:
    """All that is true of a shape or a creature."""
    if isinstance(thing, Subject):
        pattern = {"striped": "stripes", "spotted": "spots"}.get(thing.material, "plain")
        return {"kind": "shape", "colour": thing.colour, "shape": thing.shape, "pattern": pattern}
    names = {rgb: name for name, rgb in COLOURS.items()}
    found = {
        "kind": "creature", "colour": names.get(thing.colour), "accent": names.get(thing.accent), "body": thing.body,
        "pattern": thing.pattern, "eyes": str(thing.eyes), "top": thing.top, "limbs": thing.limbs, "mouth": thing.mouth,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def surroundings(picture: Picture) -> Meaning:
    """Scene, style and neighbour; without a word about a style or a neighbour there is none."""
    where = {"scene": picture.scene} if picture.scene else {}
    colour, shape = (picture.other.colour, picture.other.shape) if picture.other else ("none", "none")
    return {**where, "style": picture.style, "other colour": colour, "other shape": shape}


def _creature_caption(rng: random.Random, creature: Character, picture: Picture) -> tuple[str, Meaning]:
    """The caption of a creature, of which some traits or none are told: "a toy", "the thing my aunt made", ..."""
    all_of_it = traits(creature)
    form = rng.choice(language.IMAGE_FORMS)
    said = {"kind": "creature"}
    u = rng.random()
    if u < 0.12:
        phrase = (language.unknown_reference if rng.random() < 0.7 else language.free_reference)(rng)[0]
        return language.caption(phrase, picture, form), said
    noun = "toy" if rng.random() < 0.5 else rng.choice(language.CLASS_WORDS)
    if u < 0.28:
        return language.caption(_determined(rng, noun), picture, form), said
    if u < 0.42:  # "a toy in the snow, golden"
        name = rng.choice([name for name in ("colour", "colour", "pattern", "body") if name in all_of_it])
        last = _adjective(name, all_of_it[name])
        text = language.caption(_determined(rng, noun), picture, form)
        return f"{text}, {last}", {**said, name: all_of_it[name]}
    told = {name: value for name, value in all_of_it.items() if rng.random() < 0.5} | said
    return language.caption(_description(rng, noun, told), picture, form), told


def _determined(rng: random.Random, words: str) -> str:
    return f"the {words}" if rng.random() < 0.4 else language.article(words)


def _adjective(name: str, value: str) -> str:
    return {"pattern": PATTERNS, "body": BODIES}.get(name, {}).get(value, value)


def _description(rng: random.Random, noun: str, told: Meaning) -> str:
    """ "a round purple toy with yellow spots, three eyes and wings"."""
    before = [_adjective(name, told[name]) for name in ("pattern", "body", "colour") if name in told]
    having = []
    if "accent" in told:
        nouns = {"bands": "bands", "spots": "spots", "stripes": "stripes", "checks": "checks", "zigzag": "zigzags"}
        if told.get("pattern") in nouns:
            before = before[1:]
            having.append(f"{told['accent']} {nouns[told['pattern']]}")
        elif told.get("pattern") == "belly":
            before = before[1:]
            having.append(f"a {told['accent']} belly")
        elif "colour" in told:
            before[-1] += f" and {told['accent']}"
        else:
            having.append(f"something {told['accent']}")
    having += [EYES[int(told["eyes"])]] if "eyes" in told else []
    having += [
        words[told[name]] for name, words in (("top", TOPS), ("limbs", LIMBS), ("mouth", MOUTHS)) if name in told
    ]
    rng.shuffle(having)
    phrase = _determined(rng, " ".join([*before, noun]))
    if not having:
        return phrase
    *first, last = having
    return f"{phrase} with {', '.join(first)} and {last}" if first else f"{phrase} with {last}"


def indices(meanings: Sequence[Meaning]) -> Tensor:
    """Meanings as indices of values: (n, attributes), UNSAID where there is none."""
    return torch.tensor([
        [values.index(meaning[name]) if name in meaning else UNSAID for name, values in ATTRIBUTES.items()]
        for meaning in meanings
    ])  # fmt: skip


def true_of(said: Tensor, truth: Tensor) -> Tensor:
    """Which caption (b, attributes) is true of which picture (c, attributes): (b, c), bool."""
    return ((said[:, None] == truth[None]) | (said[:, None] == UNSAID)).all(dim=2)


# --- training ---------------------------------------------------------------------------------------------------------


def build_tokenizer() -> CLIPTokenizer:
    """A `CLIPTokenizer` whose small byte-level BPE is trained on captions; any other word is made of pieces."""
    stream = pairs(seed=7)
    captions = [next(stream).caption for _ in range(12_000)]
    bpe: Tokenizer = CLIPTokenizer()._tokenizer  # its normaliser and pre-tokenizer
    bpe.model = BPE(end_of_word_suffix="</w>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # every byte in the middle and at the end of a word, so that nothing is unknown; then as many merges as fit
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(merge) for merge in merges[: VOCABULARY - 2 - len(tokens)]]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    merges = merges[: VOCABULARY - 2 - 2 * len(letters)]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Towers of five and three layers, 64 patches of 8x8 pixels."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=DIMENSIONS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=160, intermediate_size=480, num_hidden_layers=5, num_attention_heads=5, image_size=world.SIZE,
        patch_size=8, projection_dim=DIMENSIONS,
    )  # fmt: skip
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=DIMENSIONS)


class Heads(nn.Module):
    """Logits of the attributes, off either embedding (b, DIMENSIONS): one list of (b, values)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(DIMENSIONS, len(values)) for values in ATTRIBUTES.values())

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        """Embeddings are unit vectors; ten times as long they make confident logits."""
        return [head(10 * embeddings) for head in self.heads]


def loss(images: Tensor, texts: Tensor, scale: Tensor, heads: Heads, truth: Tensor, said: Tensor) -> Tensor:
    """Sum of the three losses (their weights: see the top) of unit embeddings (b, d) of pairs, two of each subject.

    truth, said: (b, attributes), see `indices`. scale: of the cosines, scalar.
    """
    own = torch.eye(len(images), dtype=torch.bool)
    logits = (scale * texts @ images.T).masked_fill(true_of(said, truth) & ~own, -torch.inf)
    target = torch.arange(len(images))
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    same = (truth[:, None, :SUBJECT] == truth[None, :, :SUBJECT]).all(dim=2)
    partner = target ^ 1
    same[target, partner] = False
    alike = F.cross_entropy((scale * images @ images.T).masked_fill(same | own, -torch.inf), partner)
    attributes = [
        F.cross_entropy(logits, labels[:, i], ignore_index=UNSAID, reduction="sum") / len(labels)
        for embeddings, labels in ((images, truth), (texts, said))
        for i, logits in enumerate(heads(embeddings))
    ]
    return contrast + PAIR_WEIGHT * alike + HEAD_WEIGHT * torch.stack(attributes).sum()


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Pixels (b, 3, 64, 64) in [-1, 1] -> unit vectors (b, d)."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).float(), dim=1)


def embed_texts(model: CLIPModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Token ids and their mask (b, s) -> unit vectors (b, d)."""
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=1)


def train(
    folder: Path, steps: int = 4000, batch: int = 128, lr: float = 3e-3, pool: int = 40_000, seed: int = 0
) -> None:
    """Train into `folder`/clip, resumable; needs `folder`/vae. Prints the loss."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    # plain attention: the fused kernel's backward is slow on CPUs at these lengths
    model = CLIPModel._from_config(config(tokenizer), attn_implementation="eager")
    heads = Heads()
    both = nn.ModuleDict({"model": model, "heads": heads})
    optimiser, schedule = optimiser_for(both, lr, steps, not_matrices=("embed", "projection", "heads"))
    parts = {"model": both, **optimiser.parts, "schedule": schedule}
    start = load_checkpoint(folder / "clip_training", **parts)
    pixels, said, truth, tokens = prepare(folder, tokenizer, pool if start < steps else 2, seed)
    for layer in model.vision_model.encoder.layers:
        layer.compile(dynamic=False)
    began, running = time.time(), 9.0
    for step in range(start, steps):
        pick = torch.randperm(pool // 2)[: batch // 2]
        pick = torch.stack([2 * pick, 2 * pick + 1], dim=1).flatten()
        longest = int(tokens["attention_mask"][pick].sum(dim=1).max())
        ids, mask = (tokens[name][pick, :longest] for name in ("input_ids", "attention_mask"))
        with torch.autocast("cpu", torch.bfloat16):
            images = embed_images(model, oracle.augmented(pixels[pick].float() / 127.5 - 1))
            texts = embed_texts(model, ids, mask)
        value = loss(images, texts, model.logit_scale.exp(), heads, truth[pick], said[pick])
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        running = 0.97 * running + 0.03 * value.item()
        if (step + 1) % 50 == 0:
            eta = (time.time() - began) / (step + 1 - start) * (steps - step - 1)
            print(f"clip {step + 1}/{steps} loss {running:.4f} eta {eta:.0f} s", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(folder / "clip_training", step + 1, **parts)
    save(model, tokenizer, folder / FOLDER)


def prepare(
    folder: Path, tokenizer: CLIPTokenizer, n: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """`n` pairs, every second picture after a trip through the VAE.

    Returns pictures uint8 (n, 3, 64, 64), what is said and what is true (n, attributes), and the tokens of the captions.
    """
    captions, truths, told = [], [], []

    def drawn() -> Iterator[Image.Image]:
        for pair in islice(pairs(seed), n):
            captions.append(pair.caption)
            truths.append(pair.truth)
            told.append(pair.said)
            yield pair.image

    pixels = oracle.every_second_through_vae(folder, drawn(), "clip")
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return pixels, indices(told), indices(truths), {name: tokens[name] for name in ("input_ids", "attention_mask")}


def save(model: CLIPModel, tokenizer: CLIPTokenizer, output: Path) -> None:
    """Write the checkpoint, weights in half precision; the config asks for float32, which is what they are loaded as."""
    beside = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    half = CLIPModel(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    size = {"height": world.SIZE, "width": world.SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": world.SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(beside)
    file = beside / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(_as_float32(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    beside.rename(output)


def _as_float32(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: "float32" if key == "dtype" else _as_float32(value) for key, value in values.items()}


# --- what it can do ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def embeddings(where: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Unit vectors (n, d) of images and of texts, by any CLIP checkpoint."""
    model = CLIPModel.from_pretrained(where, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(where, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
    seen = [
        embed_images(model, processor(images=list(images[i : i + 256]), return_tensors="pt")["pixel_values"])
        for i in range(0, len(images), 256)
    ]
    read = [
        embed_texts(
            model, **_ids(tokenizer(list(texts[i : i + 256]), padding=True, truncation=True, return_tensors="pt"))
        )
        for i in range(0, len(texts), 256)
    ]
    empty = torch.empty(0, model.config.projection_dim)
    return torch.cat(seen or [empty]), torch.cat(read or [empty])


def _ids(tokens: Any) -> dict[str, Tensor]:
    return {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}


def retrieval(where: Path, rounds: int, seed: int, among: int = 32) -> tuple[float, float]:
    """Share of fresh pictures whose caption is found among `among`, and of captions whose picture is found.

    No caption of a round is true of another picture of it.
    """
    stream = islice(pairs(seed), 0, None, 2)  # one picture of each subject
    hits = torch.zeros(2)
    for _ in range(rounds):
        chosen: list[Pair] = []
        while len(chosen) < among:
            trial = [*chosen, next(stream)]
            said, truth = indices([pair.said for pair in trial]), indices([pair.truth for pair in trial])
            if not (true_of(said, truth) & ~torch.eye(len(trial), dtype=torch.bool)).any():
                chosen = trial
        images, texts = embeddings(where, [pair.image for pair in chosen], [pair.caption for pair in chosen])
        cosines, right = images @ texts.T, torch.arange(among)
        hits += torch.stack([(cosines.argmax(dim=1) == right).sum(), (cosines.argmax(dim=0) == right).sum()])
    by_picture, by_caption = (hits / (rounds * among)).tolist()
    return by_picture, by_caption


def told_apart(where: Path, names: Sequence[str], n: int, seed: int) -> tuple[float, float]:
    """How well `n` photos of each character are told apart, by their cosines.

    Returns the share of (photo, another of the same character, one of another character) in which the first two are the
    closer ones, and the share of photos whose nearest other photo is of the same character.
    """
    images, _ = embeddings(where, [photo for name in names for photo in world.character_photos(name, n, seed)], [])
    cosines = (images @ images.T).fill_diagonal_(-2)
    who = torch.arange(len(names)).repeat_interleave(n)
    same = who[:, None] == who[None]
    triples = [
        (row[mask & (row > -2)][:, None] > row[~mask][None]).float().mean()
        for row, mask in zip(cosines, same, strict=True)
    ]
    nearest = who[cosines.argmax(dim=1)] == who
    return torch.stack(triples).mean().item(), nearest.float().mean().item()
