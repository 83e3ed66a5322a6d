"""Metrics against independent computations on tiny random models, and the scores of a run."""

from __future__ import annotations

import json
import os
import shutil
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

from mokus.bench.knowcusbench import metrics as registry
from mokus.bench.knowcusbench import score as scoring
from mokus.bench.knowcusbench.manifest import Concept, Knowledge, Prompt, Source, Suite
from mokus.bench.knowcusbench.metrics import Metric, Shown, metrics_for, segmentation
from mokus.bench.knowcusbench.metrics.clip import Clip, Encoder
from mokus.bench.knowcusbench.metrics.dino import Dino
from mokus.bench.knowcusbench.metrics.oracle import Oracle
from mokus.bench.knowcusbench.metrics.pickscore import Pick
from mokus.bench.knowcusbench.metrics.pretrained import Pretrained
from mokus.bench.knowcusbench.metrics.segmentation import ClipISeg, GroundedSam
from mokus.bench.knowcusbench.plan import asked, class_prompt, image_file
from mokus.bench.knowcusbench.recipe import digest
from mokus.bench.knowcusbench.score import score
from mokus.errors import MokusError
from mokus.miniature import clip as miniature_clip
from mokus.miniature import segmenter as miniature_segmenter
from mokus.miniature import world

SIDE = 32  # pixels that the tiny models see
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- tiny models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `clip`, `dino`, `pick` (without a tokenizer), `detector` and `segmenter`: genuine classes, random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, *string.digits, ".", ",", "'", "-"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    end = len(words) - 1
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    seen = {**small, "image_size": SIDE, "patch_size": 8}
    text = {
        **small, "vocab_size": len(words), "max_position_embeddings": 24, "bos_token_id": end - 1, "eos_token_id": end,
        "pad_token_id": end,
    }  # fmt: skip
    for name in ("clip", "pick"):
        _save(CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=12)), folder / name)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder / "clip")
    _processor(folder / "clip", "CLIPImageProcessor", size={"shortest_edge": SIDE}, crop_size=[SIDE, SIDE], resample=3)
    _save(ViTModel(ViTConfig(**seen), add_pooling_layer=False), folder / "dino")
    _processor(folder / "dino", "ViTImageProcessor", size=[SIDE, SIDE], resample=2)
    _save(_detector(), folder / "detector")
    _bert().save_pretrained(folder / "detector")
    _processor(folder / "detector", "GroundingDinoImageProcessor", size={"shortest_edge": 96, "longest_edge": 128})
    _save(_sam(), folder / "segmenter")
    return folder


def _save(model: Any, folder: Path) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):  # so that images and texts differ in what is made of them
                nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
    model.save_pretrained(folder)


def _processor(folder: Path, kind: str, **settings: Any) -> None:
    for name in ("size", "crop_size"):
        if isinstance(settings.get(name), list):
            settings[name] = {"height": settings[name][0], "width": settings[name][1]}
    text = json.dumps({"image_processor_type": kind, "image_mean": MEAN, "image_std": STD, **settings})
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _bert() -> BertTokenizer:
    """The marks where Grounding-DINO looks for them, and words spelt in letters."""
    words = [f"[unused{i}]" for i in range(1100)]
    words[0], words[100:104], words[1012], words[1029] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"], ".", "?"
    words[1037:1063], words[200:226] = string.ascii_lowercase, [f"##{letter}" for letter in string.ascii_lowercase]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def _detector() -> GroundingDinoForObjectDetection:
    return GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=SwinConfig(
                image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
            ),
            text_config=BertConfig(
                vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            ),
            num_queries=10, encoder_layers=1, decoder_layers=2, d_model=64, encoder_ffn_dim=32, decoder_ffn_dim=32,
            encoder_attention_heads=2, decoder_attention_heads=2, disable_custom_kernels=True,
        )
    )  # fmt: skip


def _sam() -> Sam2Model:
    widths = [8, 16, 32, 64]
    backbone = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[128, 128], blocks_per_stage=[1] * 4, embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[8, 4, 4, 2], global_attention_blocks=[],
    )  # fmt: skip
    return Sam2Model(
        Sam2Config(
            vision_config=Sam2VisionConfig(
                backbone_config=backbone, backbone_channel_list=widths[::-1], fpn_hidden_size=32,
                backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
            ),
            prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=128, patch_size=16),
            mask_decoder_config=Sam2MaskDecoderConfig(
                hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32
            ),
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def encoder(models: Path) -> Encoder:
    return Encoder(str(models / "clip"))


@pytest.fixture(scope="session")
def grounded(models: Path) -> GroundedSam:
    return GroundedSam(str(models / "detector"), str(models / "segmenter"))


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Smooth and colourful, and another one for every seed."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def some(n: int = 5) -> list[Shown]:
    """Images of two concepts in turn, the last one a repetition of the first."""
    photos = [tuple(picture(100 + i) for i in range(3)), tuple(picture(200 + i) for i in range(2))]
    images = [picture(i) for i in range(n - 1)]
    return [
        Shown(
            image, f"my toy {i} in the snow", "a toy in the snow", ("toy", "mug")[i % 2], f"concept {i % 2}", photos[i % 2], {}
        )
        for i, image in enumerate([*images, images[0]])
    ]  # fmt: skip


def by_hand(image: Image.Image, resample: Image.Resampling) -> Tensor:
    """A square image as the tiny models see it: (1, 3, SIDE, SIDE)."""
    values = np.asarray(image.resize((SIDE, SIDE), resample), dtype=np.float64) / 255
    return torch.from_numpy((values - MEAN) / STD).permute(2, 0, 1)[None].float()


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


# --- CLIP, DINO, PickScore against independent computations -----------------------------------------------------------


def test_clip_is_what_the_models_own_forward_pass_says(models: Path, encoder: Encoder) -> None:
    model, tokenizer = CLIPModel.from_pretrained(models / "clip").eval(), CLIPTokenizer.from_pretrained(models / "clip")

    @torch.no_grad()
    def embedded(image: Image.Image, text: str = "a toy") -> tuple[Tensor, Tensor]:
        pixels = by_hand(image, Image.Resampling.BICUBIC)
        both = model(**tokenizer(text, return_tensors="pt"), pixel_values=pixels)
        return both.image_embeds[0], both.text_embeds[0]

    for each, values in zip(some(), Clip(encoder)(some()), strict=True):
        image, prompt = embedded(each.image, each.prompt)
        pairs = [cosine(image, embedded(reference)[0]) for reference in each.references]
        assert values["clip_i"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
        assert values["clip_t"] == pytest.approx(cosine(image, prompt), abs=1e-5)
        assert values["clip_t_class"] == pytest.approx(
            cosine(image, embedded(each.image, each.class_prompt)[1]), abs=1e-5
        )


def test_clip_is_what_torchmetrics_says(models: Path, encoder: Encoder) -> None:
    functional = pytest.importorskip("torchmetrics.functional.multimodal")
    model, processor = CLIPModel.from_pretrained(models / "clip").eval(), encoder.image_processor
    shown = some()

    class Returning(nn.Module):
        """torchmetrics expects tensors, as older transformers returned them."""

        config = model.config

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return model.get_image_features(pixels).pooler_output

        def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return model.get_text_features(tokens, mask).pooler_output

    def process(text: Any = None, images: Any = None, **settings: Any) -> Any:
        return processor(images, return_tensors="pt") if images else encoder.tokenizer(text, **settings)

    def theirs(image: Image.Image, other: Any) -> float:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        value = functional.clip_score(pixels, other, model_name_or_path=lambda: (Returning(), process))
        return float(value) / 100

    with torch.no_grad():
        for each, values in zip(shown, Clip(encoder)(shown), strict=True):
            assert theirs(each.image, each.prompt) == pytest.approx(max(0, values["clip_t"] or 0), abs=1e-5)


def test_clip_of_an_image_with_itself_is_one(encoder: Encoder) -> None:
    image = picture(0)
    (values,) = Clip(encoder)([Shown(image, "a", "b", "toy", "x", (image.copy(),), {})])
    assert values["clip_i"] == pytest.approx(1, abs=1e-6)


def test_long_texts_are_cut_off(encoder: Encoder) -> None:
    assert encoder.longest == 24 and "24 tokens" in str(encoder.about["text"])
    long, longer = encoder.texts(["a toy " * 8, "a toy " * 8 + "in the snow, at night, and more"])
    assert torch.allclose(long, longer) and not torch.allclose(long, encoder.texts(["a toy"])[0])


def test_dino_is_the_cosine_of_class_tokens(models: Path) -> None:
    model = ViTModel.from_pretrained(models / "dino", add_pooling_layer=False).eval()

    @torch.no_grad()
    def token(image: Image.Image) -> Tensor:
        return model(by_hand(image, Image.Resampling.BILINEAR)).last_hidden_state[0, 0]

    for each, values in zip(some(), Dino(str(models / "dino"))(some()), strict=True):
        pairs = [cosine(token(each.image), token(reference)) for reference in each.references]
        assert values["dino"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_pick_is_the_logit_of_the_models_own_forward_pass(models: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(models / "pick").eval(), CLIPTokenizer.from_pretrained(models / "clip")
    metric = Pick(str(models / "pick"), processor=str(models / "clip"))
    assert metric.about["processor_id"] == "clip" and metric.about["id"] == "pick"
    for each, values in zip(some(), metric(some()), strict=True):
        for column, text in (("pick", each.prompt), ("pick_class", each.class_prompt)):
            pixels = by_hand(each.image, Image.Resampling.BICUBIC)
            with torch.no_grad():
                logit = model(**tokenizer(text, return_tensors="pt"), pixel_values=pixels).logits_per_image
            assert values[column] == pytest.approx(float(logit), abs=1e-4)


@pytest.mark.parametrize("name", ["clip", "dino", "pick", "clip_i_seg"])
def test_figures_do_not_depend_on_batches_or_order(
    name: str, models: Path, encoder: Encoder, grounded: GroundedSam
) -> None:
    metric: Metric = {
        "clip": lambda: Clip(encoder), "dino": lambda: Dino(str(models / "dino")),
        "pick": lambda: Pick(str(models / "clip")), "clip_i_seg": lambda: ClipISeg(encoder, grounded),
    }[name]()  # fmt: skip
    shown = some()
    together = metric(shown)
    alone = [metric([each])[0] for each in shown]
    backwards = metric(shown[::-1])[::-1]
    for first, second, third in zip(together, alone, backwards, strict=True):
        assert first == pytest.approx(second, abs=1e-4) and first == pytest.approx(third, abs=1e-4)
    assert [set(values) for values in together] == [set(metric.columns)] * len(shown)


def test_what_is_the_same_is_computed_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = [], []
    image_features, text_features = encoder.model.get_image_features, encoder.model.get_text_features
    monkeypatch.setattr(encoder, "_texts", {})
    monkeypatch.setattr(
        encoder.model, "get_image_features", lambda **x: (images.append(len(x["pixel_values"])), image_features(**x))[1]
    )
    monkeypatch.setattr(
        encoder.model, "get_text_features", lambda **x: (texts.append(len(x["input_ids"])), text_features(**x))[1]
    )
    shown, metric = some(), Clip(encoder)
    metric(shown)
    assert sorted(images) == [2, 3, 4] and sum(texts) == 6  # 4 different images, photos of 2 concepts; 5 prompts and 1
    metric(shown)
    assert sum(images) == 2 + 3 + 4 + 4 and sum(texts) == 6


# --- CLIP-I-Seg -------------------------------------------------------------------------------------------------------


class Told:
    """A segmenter that finds the left half, but nothing in images that are told to be without."""

    def __init__(self, empty: Sequence[Image.Image] = (), box: tuple[int, ...] = (0, 0, 32, 64)) -> None:
        self.about: registry.About = {"id": "told"}
        self.empty, self.box, self.words = {id(image) for image in empty}, box, list[str]()

    def masks(self, images: Sequence[Image.Image], class_word: str) -> list[Image.Image | None]:
        self.words.append(class_word)
        mask = Image.new("L", (64, 64))
        mask.paste(255, self.box)  # type: ignore[arg-type]
        return [None if id(image) in self.empty else mask for image in images]


def test_everything_outside_the_mask_is_white_and_does_not_matter(encoder: Encoder) -> None:
    def other_background(image: Image.Image, seed: int) -> Image.Image:
        changed = picture(seed)
        changed.paste(image.crop((0, 0, 32, 64)), (0, 0))
        return changed

    image, photos = picture(0), (picture(1), picture(2))
    first = Shown(image, "a", "b", "toy", "x", photos, {})
    changed = Shown(other_background(image, 8), "a", "b", "toy", "x", tuple(other_background(p, 9) for p in photos), {})
    one, two = ClipISeg(encoder, Told())([first, changed])
    assert one["clip_i_seg_both"] == pytest.approx(two["clip_i_seg_both"], abs=1e-6)
    assert one["clip_i_seg_source"] != pytest.approx(two["clip_i_seg_source"], abs=1e-3)
    white = Image.new("RGB", (64, 64), "white")
    white.paste(image.crop((0, 0, 32, 64)), (0, 0))
    by_columns = [
        [cosine(encoder.images([shown])[0], encoder.images([p])[0]) for p in map(_left_half, photos)]
        for shown in (image, white)
    ]
    for column, cosines in zip(("clip_i_seg_source", "clip_i_seg_both"), by_columns, strict=True):
        assert one[column] == pytest.approx(np.mean(cosines), abs=1e-5)


def _left_half(image: Image.Image) -> Image.Image:
    values = np.array(image)
    values[:, 32:] = 255
    return Image.fromarray(values)


def test_with_everything_inside_the_mask_it_is_clip_i(encoder: Encoder) -> None:
    whole = ClipISeg(encoder, Told(box=(0, 0, 64, 64)))(some())
    for values, plain in zip(whole, Clip(encoder)(some()), strict=True):
        assert values["clip_i_seg_source"] == pytest.approx(plain["clip_i"], abs=1e-6)
        assert values["clip_i_seg_both"] == pytest.approx(plain["clip_i"], abs=1e-6)


def test_misses_are_none_and_counted(encoder: Encoder) -> None:
    image, photos = picture(0), tuple(picture(i) for i in (1, 2, 3))
    shown = Shown(image, "a", "b", "Toy", "x", photos, {})

    def of(*empty: Image.Image) -> registry.Values:
        return ClipISeg(encoder, Told(empty))([shown])[0]

    found, lost = of(), of(image)
    assert lost["clip_i_seg_both"] is None and lost["clip_i_seg_references_missed"] == 0
    assert lost["clip_i_seg_source"] == pytest.approx(found["clip_i_seg_source"])
    fewer = of(photos[1])
    rest = ClipISeg(encoder, Told())([Shown(image, "a", "b", "Toy", "x", (photos[0], photos[2]), {})])[0]
    assert fewer == pytest.approx({**rest, "clip_i_seg_references_missed": 1})
    none = {"clip_i_seg_source": None, "clip_i_seg_both": None, "clip_i_seg_references_missed": 3}
    assert of(*photos) == of(image, *photos) == none
    assert ClipISeg(encoder, Told(box=(0, 0, 0, 0)))([shown]) == [none]  # an empty mask is a miss too


def test_exact_masks_of_references_are_used_in_the_segmenters_place(encoder: Encoder) -> None:
    image, photos = picture(0), (picture(1), picture(2))
    told = Told(empty=photos)  # it would find nothing in them
    masks = tuple(mask for mask in Told().masks(photos, "toy") if mask)
    exact = Shown(image, "a", "b", "toy", "x", photos, {}, masks)
    (found,) = ClipISeg(encoder, told)([exact])
    assert found == ClipISeg(encoder, Told())([Shown(image, "a", "b", "toy", "x", photos, {})])[0]
    assert told.words == ["toy"]  # of the image alone


def test_each_class_word_is_looked_for_in_its_own_images(encoder: Encoder) -> None:
    told = Told()
    metric = ClipISeg(encoder, told)
    metric(some())
    assert told.words == ["toy", "mug", "toy", "mug"]  # images by word, and references once
    metric(some(2))
    assert metric.about["segmenter_id"] == "told" and metric.about["background"] == "white"


def test_the_box_is_that_of_the_highest_score(grounded: GroundedSam, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, size in ((0, (64, 64)), (1, (64, 96)), (2, (80, 64))):
        image = picture(seed, size)
        inputs = grounded.processor(images=image, text="a rubber duck.", return_tensors="pt")
        with torch.no_grad():
            outputs = grounded.detector(**inputs)
        scores = outputs.logits.sigmoid()[0].amax(dim=1)
        x, y, width, height = outputs.pred_boxes[0, scores.argmax()].tolist()
        expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        box = grounded.box(image, "Rubber Duck")
        assert box is not None
        assert box.tolist() == pytest.approx([v * side for v, side in zip(expected, size * 2, strict=True)], abs=1e-3)
        monkeypatch.setattr(segmentation, "THRESHOLD", float(scores.max()) + 1e-6)
        assert grounded.box(image, "Rubber Duck") is None
        assert grounded.masks([image], "Rubber Duck") == [None]
        monkeypatch.undo()


def test_the_mask_is_what_sam_draws_in_the_box(grounded: GroundedSam) -> None:
    sam, side = grounded.segmenter, 128
    for seed, size in ((0, (64, 64)), (1, (64, 96)), (2, (200, 160))):
        image, box = picture(seed, size), torch.tensor([5.0, 8.0, 50.0, 40.0])
        values = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) / 255
        values = (values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        pixels = torch.from_numpy(values).float().permute(2, 0, 1)[None]
        left, top, right, bottom = box.tolist()
        scaled = [left * side / size[0], top * side / size[1], right * side / size[0], bottom * side / size[1]]
        with torch.no_grad():
            outputs = sam(
                image_embeddings=sam.get_image_embeddings(pixels), input_boxes=torch.tensor([[scaled]]),
                multimask_output=False,
            )  # fmt: skip
        logits = F.interpolate(outputs.pred_masks[:, 0], size=size[::-1], mode="bilinear", align_corners=False)[0, 0]
        mask = grounded.inside(image, box)
        assert mask is not None and mask.mode == "L" and mask.size == size
        assert set(np.unique(mask)) <= {0, 255}
        clear = logits.abs() > 1e-4
        assert torch.equal(torch.from_numpy(np.asarray(mask) > 0)[clear], (logits > 0)[clear])


# --- the oracle -------------------------------------------------------------------------------------------------------


def test_the_oracle_reads_characters_and_what_was_asked() -> None:
    metric, names = Oracle(), world.HELD_OUT_CHARACTERS[:3]
    photos = {name: world.character_photos(name, 1, 5)[0] for name in names}
    read = {name: metric([Shown(photos[name], "", "", "toy", name, (), {})])[0] for name in names}
    assert [values["oracle_concept"] for values in read.values()] == [1.0] * 3
    assert all(values["oracle_asked"] is None for values in read.values())
    scene = scene_of(photos[names[0]])
    elsewhere = next(s for s in world.SCENES if s != scene)
    expected = [({"scene": scene}, 1.0), ({"scene": elsewhere}, 0.0), ({"scene": elsewhere, "style": "plain"}, 0.5)]
    for wanted, share in expected:
        (values,) = metric([Shown(photos[names[0]], "", "", "toy", names[1], (), wanted)])
        assert values == {"oracle_concept": 0.0, "oracle_asked": share}
    with pytest.raises(MokusError, match="no 'mood' off an image, expected some of colour, shape, scene"):
        metric([Shown(photos[names[0]], "", "", "toy", names[0], (), {"mood": "happy"})])


def scene_of(image: Image.Image) -> str:
    from mokus.miniature import oracle

    return oracle.load().read([image])[0]["scene"]


# --- which metrics, and with which models -----------------------------------------------------------------------------


@pytest.fixture
def miniature(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny random models in the place of the shipped ones."""
    weights = tmp_path / "segmenter.safetensors"
    torch.manual_seed(0)
    save_file({k: v.contiguous() for k, v in miniature_segmenter.Segmenter().state_dict().items()}, weights)
    monkeypatch.setattr(miniature_clip, "folder", lambda: models / "clip")
    monkeypatch.setattr(miniature_segmenter, "file", lambda: weights)
    monkeypatch.setattr(miniature_segmenter, "load", lambda: miniature_segmenter.from_file(weights))


def test_the_miniatures_metrics_need_nothing_but_the_package(miniature: None, models: Path) -> None:
    found = metrics_for(True)
    assert [metric.name for metric in found] == ["clip", "clip_i_seg", "oracle"]
    assert [metric.about["id"] for metric in found] == ["miniature"] * 3
    assert found[1].about["segmenter_id"] == "miniature" and len(found[1].about["segmenter_sha256"] or "") == 64
    shown = [Shown(picture(0), "a toy", "a toy", "toy", "x", (picture(1),), {})]
    for metric in found:
        (values,) = metric(shown)
        assert set(values) == set(metric.columns)
    more = metrics_for(True, without=["clip_i_seg", "oracle"], dino=str(models / "dino"))
    assert [metric.name for metric in more] == ["clip", "dino"]


def test_real_suites_have_all_metrics_but_the_oracle(models: Path) -> None:
    names = {name: str(models / name) for name in ("clip", "dino", "detector", "segmenter")}
    found = metrics_for(False, pick=str(models / "clip"), **names)
    assert [metric.name for metric in found] == ["clip", "clip_i_seg", "dino", "pick"]
    assert [column for metric in found for column in metric.columns] == [
        "clip_i", "clip_t", "clip_t_class", "clip_i_seg_source", "clip_i_seg_both", "clip_i_seg_references_missed",
        "dino", "pick", "pick_class",
    ]  # fmt: skip
    assert all(value is None or isinstance(value, str) for metric in found for value in metric.about.values())
    assert found[1].about["segmenter_detector_id"] == "detector"
    assert metrics_for(False, without=["clip", "clip_i_seg", "dino", "pick"]) == []


def test_every_model_of_the_hub_is_pinned_to_a_commit() -> None:
    for name in registry.MODELS.values():
        assert name.count("/") == 1 and len(name.partition("@")[2]) == 40


def test_an_unknown_metric_or_device(models: Path) -> None:
    with pytest.raises(MokusError, match="no metric 'fid' to leave out, expected some of clip, clip_i_seg, dino"):
        metrics_for(False, without=["fid"])
    with pytest.raises(MokusError, match="the device 'abacus'"):
        Dino(str(models / "dino"), device="abacus")


def test_a_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        MokusError, match=r"'openai/clip-vit-base-patch32@3d74.*by --clip, or .* --without clip\."
    ) as caught:
        metrics_for(False)
    assert "\n" not in str(caught.value)
    with pytest.raises(MokusError, match=r"'nobody/nothing' cannot be had .*--dino.*--without dino"):
        metrics_for(False, without=["clip", "clip_i_seg"], dino="nobody/nothing")
    with pytest.raises(MokusError, match=r"empty.*config\.json"):
        Dino(str(_made(tmp_path / "empty")))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_model_of_another_kind_or_broken(models: Path, tmp_path: Path) -> None:
    with pytest.raises(MokusError, match="--clip is of the kind 'vit', expected clip"):
        Encoder(str(models / "dino"))
    shutil.copytree(models / "dino", tmp_path / "dino")
    weights = load_file(tmp_path / "dino" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "q_proj" not in k and "query" not in k},
        tmp_path / "dino" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(MokusError, match=r"--dino lacks .*q_proj.* a ViTModel"):
        Dino(str(tmp_path / "dino"))
    (tmp_path / "dino" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(MokusError, match="--dino"):
        Dino(str(tmp_path / "dino"))
    (tmp_path / "dino" / "config.json").write_text("{")
    with pytest.raises(MokusError, match="--dino"):
        Dino(str(tmp_path / "dino"))


def test_a_folder_is_known_by_what_is_in_it(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dino", tmp_path / "elsewhere" / "dino")
    here, there = Dino(str(models / "dino")).about, Dino(str(tmp_path / "elsewhere" / "dino")).about
    assert here == there and here["id"] == "dino" and here["revision"] is None and here["torch"] == torch.__version__
    processor = tmp_path / "elsewhere" / "dino" / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("0.48", "0.5"))
    assert Dino(str(tmp_path / "elsewhere" / "dino")).about["sha256"] != here["sha256"]


def test_a_model_of_the_hub_is_known_by_its_commit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--facebook--dino"
    shutil.copytree(models / "dino", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("facebook/dino", f"facebook/dino@{COMMIT}", "facebook/dino@main"):
        metric = Dino(name)
        assert (metric.about["id"], metric.about["revision"], metric.about["sha256"]) == ("facebook/dino", COMMIT, None)
    assert metric(some()) == Dino(str(models / "dino"))(some())
    with pytest.raises(MokusError, match=r"facebook/dino@f{40}"):
        Dino(f"facebook/dino@{'f' * 40}")


def test_models_are_loaded_in_full_precision(models: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(models / "clip").half().save_pretrained(tmp_path / "clip")
    model = Pretrained(str(tmp_path / "clip"), "clip", "--clip").model(CLIPModel)
    assert model.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters()) and not model.training


# --- the scores of a run ----------------------------------------------------------------------------------------------


class Brightness:
    """A metric that is quick, tells what it saw, and misses dark images."""

    name = "clip"
    columns: tuple[str, ...] = ("clip_i", "clip_t")

    def __init__(self, revision: str = "1", stop_at: int | None = None) -> None:
        self.about: registry.About = {"id": "brightness", "revision": revision}
        self.stop_at, self.calls, self.seen = stop_at, 0, list[Shown]()

    def __call__(self, shown: Sequence[Shown]) -> list[registry.Values]:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.seen += shown
        values = [float(np.asarray(each.image).mean()) + len(each.references) for each in shown]
        return [
            {"clip_i": value if value > 60 else None, "clip_t": float(len(each.prompt))}
            for each, value in zip(shown, values, strict=True)
        ]


@pytest.fixture
def suite() -> Suite:
    def concept(name: str, source: str, *known: str) -> Concept:
        knowledge = tuple(Knowledge(text=text, perspective="emotion and state") for text in known)
        prompts = (Prompt(text="{} in the snow", perspective="background"),)
        return Concept(name=name, class_word="toy", source=source, knowledge=knowledge, prompts=prompts)

    source = Source(about="a", url="b", licence="c")
    name = world.HELD_OUT_CHARACTERS[0]
    return Suite(
        name="small", about="two", rare_token="sks", sources={"miniature": source, "mine": source},
        concepts=(concept(name, "miniature", "my pride", "his joy"), concept("mug", "mine", "my mug", "her mug")),
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, suite: Suite) -> Path:
    """A run of two methods, of which `anchor` draws the same image for all knowledge; and the photos of `mug`."""
    folder, items = tmp_path / "run", []
    for number, concept in enumerate(suite.concepts):
        for method in ("mokus", "anchor"):
            for i, template, perspective, expected in asked(concept):
                shared = f"{concept.name}{template}" + (str(i) if method == "mokus" else "")
                key = digest(shared)[:32]
                items.append({
                    "method": method, "key": key, "concept": concept.name, "knowledge": i, "perspective": perspective,
                    "prompt": template.format(concept.knowledge[i].text), "expected": expected,
                    "class_prompt": class_prompt(template, concept.class_word),
                })  # fmt: skip
                file = image_file(folder, key)
                file.parent.mkdir(parents=True, exist_ok=True)
                picture(int(key[:8], 16)).point(lambda v, n=number, i=i: v // (1 + 3 * n * i)).save(file)
    plan = {
        "suite": suite.name, "suite_sha256": digest(suite.model_dump()), "photos": {"n": 2, "seed": 3}, "items": items,
        "suite_file": "suite.yaml", "settings": {}, "seeds": [0], "commands": [], "methods": ["mokus", "anchor"],
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    photos = tmp_path / "photos" / "mug"
    photos.mkdir(parents=True)
    for i in range(3):
        picture(300 + i, (90, 60)).save(photos / f"{i}.png")
    return folder


@pytest.fixture
def roots(run: Path) -> dict[str, Path]:
    return {"mine": run.parent / "photos"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "scores.json").read_text())["rows"]


def test_every_image_and_prompt_has_one_row(run: Path, suite: Suite, roots: dict[str, Path]) -> None:
    metric, told = Brightness(), []
    scores = score(run, suite, [metric], roots, lambda *args: told.append(args), batch_size=3)
    items = json.loads((run / "plan.json").read_text())["items"]
    shared = {(item["key"], item["prompt"], item["class_prompt"], item["concept"]) for item in items}
    assert len(scores["rows"]) == len(shared) == len(metric.seen) == 16 and scores["missing"] == []
    assert {(row["key"], row["prompt"], row["class_prompt"], row["concept"]) for row in scores["rows"]} == shared
    assert scores == json.loads((run / "scores.json").read_text())
    assert scores["metrics"] == {"clip": metric.about}
    assert [args[:3] for args in told] == [("clip", n, 16) for n in (3, 6, 9, 12, 15, 16)]
    by_prompt = {each.prompt: each for each in metric.seen}
    assert len(by_prompt["my mug"].references) == 3 and by_prompt["my mug"].references[0].size == (512, 512)
    character = suite.concepts[0].name
    theirs = world.character_photos(character, 2, 3)
    assert [a.tobytes() for a in by_prompt["my pride"].references] == [b.tobytes() for b in theirs]
    assert by_prompt["my mug in the snow"].class_prompt == "a toy in the snow"
    assert by_prompt["my pride"].class_word == "toy" and by_prompt["my pride"].concept == character
    for row in scores["rows"]:
        with Image.open(image_file(run, row["key"])) as image:
            value = float(np.asarray(image).mean()) + (2 if row["concept"] == character else 3)
        assert row["clip_i"] == (pytest.approx(value) if value > 60 else None)
    assert any(row["clip_i"] is None for row in scores["rows"])  # a miss is there, and it is null


def test_scored_once_is_scored(run: Path, suite: Suite, roots: dict[str, Path]) -> None:
    first = score(run, suite, [Brightness()], roots)
    text = (run / "scores.json").read_text()
    again = Brightness()
    assert score(run, suite, [again], roots) == first and again.calls == 0
    assert (run / "scores.json").read_text() == text


def test_rows_of_one_image_are_seen_together(run: Path, suite: Suite, roots: dict[str, Path]) -> None:
    metric = Brightness()
    score(run, suite, [metric], roots)
    known: dict[bytes, Image.Image] = {}
    for each in metric.seen:
        assert known.setdefault(each.image.tobytes(), each.image) is each.image
    assert len(known) == 12


def test_another_model_scores_anew_and_leaves_the_other_metrics(
    run: Path, suite: Suite, roots: dict[str, Path]
) -> None:
    class Dark(Brightness):
        name, columns = "dino", ("dino",)

        def __call__(self, shown: Sequence[Shown]) -> list[registry.Values]:
            self.calls += 1
            return [{"dino": 1.0} for _ in shown]

    before = score(run, suite, [Brightness(), Dark()], roots)
    metric, dark = Brightness("2"), Dark()
    after = score(run, suite, [metric], roots)
    assert len(metric.seen) == 16 and after["metrics"]["clip"] == metric.about
    assert after["metrics"]["dino"] == before["metrics"]["dino"]
    assert after["rows"] == before["rows"]  # the same values, and the other metric's columns are kept
    score(run, suite, [dark], roots)
    assert dark.calls == 0


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_a_stop_loses_at_most_a_batch(stop_at: int, run: Path, suite: Suite, roots: dict[str, Path]) -> None:
    whole = score(run, suite, [Brightness()], roots)
    (run / "scores.json").unlink()
    stopped = Brightness(stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt):
        score(run, suite, [stopped], roots, batch_size=3, save_every=0)
    assert sum("clip_i" in row for row in rows_of(run)) == 3 * (stop_at - 1)
    rest = Brightness()
    assert score(run, suite, [rest], roots, batch_size=3) == whole
    assert len(rest.seen) == 16 - 3 * (stop_at - 1)


def test_a_kill_in_the_middle_of_writing_loses_no_more(
    run: Path, suite: Suite, roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = score(run, suite, [Brightness()], roots)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _killed)
        with pytest.raises(SystemExit):
            score(run, suite, [Brightness("2")], roots, save_every=0)
    assert json.loads((run / "scores.json").read_text()) == before
    metric = Brightness("2")
    score(run, suite, [metric], roots)
    assert len(metric.seen) == 16 and {path.name for path in run.iterdir()} == {"images", "plan.json", "scores.json"}


def _killed(*_: Any) -> None:
    raise SystemExit


def test_saving_is_not_done_after_every_batch(
    run: Path, suite: Suite, roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = scoring.write_json
    monkeypatch.setattr(scoring, "write_json", lambda file, value: (written.append(file), write(file, value)))
    score(run, suite, [Brightness()], roots, batch_size=1, save_every=1000)
    assert written == [run / "scores.json"]


def test_what_is_not_drawn_or_broken_is_listed(run: Path, suite: Suite, roots: dict[str, Path]) -> None:
    whole = score(run, suite, [Brightness()], roots)
    shared = [row["key"] for row in whole["rows"]]
    twice = next(key for key in shared if shared.count(key) == 2)
    lost = next(key for key in shared if shared.count(key) == 1)
    image_file(run, lost).unlink()
    image_file(run, twice).write_bytes(image_file(run, twice).read_bytes()[:200])
    (run / "scores.json").unlink()
    scores = score(run, suite, [Brightness(), Brightness()], roots, batch_size=1)
    assert len(scores["rows"]) == 13
    assert {(each["key"], each["reason"].partition(" (")[0]) for each in scores["missing"]} == {
        (lost, "not drawn"), (twice, f"{image_file(run, twice)} cannot be read"),
    }  # fmt: skip
    assert [each["key"] for each in scores["missing"]].count(twice) == 2
    assert {"method", "concept", "key", "reason"} == set(scores["missing"][0])


def test_other_photos_or_texts_score_anew(run: Path, suite: Suite, roots: dict[str, Path]) -> None:
    score(run, suite, [Brightness()], roots)
    picture(7, (60, 60)).save(roots["mine"] / "mug" / "3.png")
    metric = Brightness()
    scores = score(run, suite, [metric], roots)
    assert {each.concept for each in metric.seen} == {"mug"} and len(metric.seen) == 8 and len(scores["rows"]) == 16


def test_an_image_that_was_drawn_again_otherwise_is_scored_again(
    run: Path, suite: Suite, roots: dict[str, Path]
) -> None:
    """As by edits that were made anew: under the same key, and no other image is."""
    before = {(row["key"], row["prompt"]): row["clip_i"] for row in score(run, suite, [Brightness()], roots)["rows"]}
    key, _ = next(iter(before))
    with Image.open(image_file(run, key)) as drawn:
        drawn.point(lambda v: 255 - v // 2).save(image_file(run, key))
    metric = Brightness()
    after = {(row["key"], row["prompt"]): row["clip_i"] for row in score(run, suite, [metric], roots)["rows"]}
    assert {each for each in before if after[each] != before[each]} == {each for each in before if each[0] == key}
    assert len(metric.seen) == sum(each[0] == key for each in before)


def test_photos_of_what_was_not_drawn_are_not_needed(run: Path, suite: Suite) -> None:
    with pytest.raises(MokusError, match=r"images of mug .* no folder of mine was named; .* --photos mine=DIR\."):
        score(run, suite, [Brightness()])
    for item in json.loads((run / "plan.json").read_text())["items"]:
        if item["concept"] == "mug":
            image_file(run, item["key"]).unlink(missing_ok=True)
    scores = score(run, suite, [Brightness()])
    assert len(scores["rows"]) == 8 and {each["concept"] for each in scores["missing"]} == {"mug"}


def test_a_folder_that_is_no_run_of_the_suite(run: Path, suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(MokusError, match="holds no run; make one by"):
        score(tmp_path, suite, [Brightness()])
    other = suite.model_copy(update={"rare_token": "zwx"})
    with pytest.raises(MokusError, match="holds a run of another suite than small"):
        score(run, other, [Brightness()])


def test_a_run_is_scored_by_real_metrics(
    run: Path, suite: Suite, roots: dict[str, Path], miniature: None, models: Path
) -> None:
    found = metrics_for(True, dino=str(models / "dino"), pick=str(models / "clip"))
    scores = score(run, suite, found, roots)
    columns = [column for metric in found for column in metric.columns]
    assert all(set(columns) <= set(row) for row in scores["rows"]) and len(scores["rows"]) == 16
    assert all(row["oracle_asked"] is None for row in scores["rows"])
    again = metrics_for(True, dino=str(models / "dino"), pick=str(models / "clip"))
    assert [metric.about for metric in again] == [metric.about for metric in found]
    assert score(run, suite, again, roots) == scores
