"""A model is loaded as its folder says, known by its fingerprint, and encodes each prompt by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import QwenImagePipeline
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import mokus
from mokus import flow, pipeline
from mokus.editors import settings_of
from mokus.errors import MokusError
from mokus.pipeline import Defaults, Model, encode, pad, trimmed
from mokus.settings import EditSettings, LearnSettings

from .conftest import SIZE, STEPS

PROMPTS = [
    "a red ball",
    "the favourite toy of Anna in the snow, a picture of the thing that dances all day",
    " ",
    "x",
    "größer {} {0} %s <b> 汉字",
    "a red ball",
]


@pytest.fixture
def copied(pico_folder: Path, tmp_path: Path) -> Path:
    """A pico folder to spoil."""
    return Path(shutil.copytree(pico_folder, tmp_path / "model"))


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


# --- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [("a red ball", "a red ball"), ("x", "a red ball in the snow", "a red ball")])
def test_without_common_padding_velocities_are_the_same(pico: Model, prompts: tuple[str, ...]) -> None:
    n, random = len(prompts), torch.Generator().manual_seed(0)
    embeds, mask = pad(encode(pico, [*prompts, "the favourite toy of Anna in the snow, a picture of it at night"]))
    embeds, mask = embeds[:n], mask[:n]
    shorter, kept = trimmed(embeds, mask)
    assert shorter.shape[1] < embeds.shape[1] and (kept is None) == (len(set(prompts)) == 1)
    z, t = torch.randn(n, 16, 32, generator=random), torch.linspace(0.2, 0.8, n)
    with torch.no_grad():
        found, wanted = (
            flow.velocity(pico.pipe.transformer, z, t, e, m, (4, 4)) for e, m in ((shorter, kept), (embeds, mask))
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_templates_prefix_is_34_tokens(pico: Model) -> None:
    """As many as the pipeline drops: what an encoding begins with is the prompt itself."""
    pipe = pico.pipe
    before, after = pipe.prompt_template_encode.split("{}")
    assert len(pipe.tokenizer(before).input_ids) == pipe.prompt_template_encode_start_idx == 34
    for prompt in ("red", "a", " ", "Zebra 7", "ü"):
        ids = pipe.tokenizer(pipe.prompt_template_encode.format(prompt)).input_ids
        assert ids[:34] == pipe.tokenizer(before).input_ids
        assert pipe.tokenizer.decode(ids[34:]) == prompt + after


def test_an_encoding_does_not_depend_on_the_other_prompts(pico: Model) -> None:
    together = encode(pico, PROMPTS)
    assert [e.shape[1] for e in together] == [192] * len(PROMPTS)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert torch.equal(found, encode(pico, [prompt])[0])
    for prompt, found in zip(reversed(PROMPTS), encode(pico, PROMPTS[::-1]), strict=True):
        assert torch.equal(found, together[PROMPTS.index(prompt)])
    assert encode(pico, []) == []


def test_an_encoding_is_the_pipelines_own(pico: Model) -> None:
    pipe = pico.pipe
    found = encode(pico, PROMPTS)
    for prompt, states in zip(PROMPTS, found, strict=True):
        ids = pipe.tokenizer(pipe.prompt_template_encode.format(prompt)).input_ids
        assert len(states) == len(ids) - 34 and not states.requires_grad
        with torch.no_grad():
            plain, _ = pipe.encode_prompt(prompt)
        assert torch.equal(states, plain[0])
    with torch.no_grad():  # the pipeline's batch is padded, which costs it some rounding
        plain, mask = pipe.encode_prompt(PROMPTS)
    embeds, ours = pad(found)
    assert torch.equal(mask.bool(), ours) and torch.allclose(embeds, plain, atol=1e-4)


def test_padding_is_zeros_at_the_right(pico: Model) -> None:
    encodings = [torch.randn(n, 3) for n in (4, 1, 7)]
    embeds, mask = pad(encodings)
    assert embeds.shape == (3, 7, 3) and mask.shape == (3, 7) and mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [4, 1, 7]
    for encoding, row, here in zip(encodings, embeds, mask, strict=True):
        assert torch.equal(row[here], encoding) and not row[~here].any()
        assert here.tolist() == sorted(here.tolist(), reverse=True)
    alone, mask = pad(encodings[:1])
    assert torch.equal(alone[0], encodings[0]) and mask.all()
    assert pad([encodings[0].bfloat16()])[0].dtype == torch.bfloat16


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_same_at_every_load(pico: Model, pico_folder: Path, copied: Path) -> None:
    assert pipeline.load(pico_folder, device="cpu").fingerprint == pico.fingerprint
    assert pipeline.load(str(copied), device="cpu").fingerprint == pico.fingerprint
    assert pipeline.fingerprint(pico.pipe) == pico.fingerprint
    assert len(pico.fingerprint) == 64 and int(pico.fingerprint, 16)


def test_a_folder_is_known_by_its_whole_path(pico: Model, pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pico_folder.parent)
    found = pipeline.load(pico_folder.name, device="cpu")
    assert (found.id, found.fingerprint) == (str(pico_folder.resolve()), pico.fingerprint)


def test_the_fingerprint_does_not_depend_on_the_dtype(pico: Model, pico_folder: Path, tmp_path: Path) -> None:
    """Of weights saved as bfloat16, which any other dtype holds; float32 weights are rounded to bfloat16 once."""
    rounded = pipeline.load(pico_folder, device="cpu", dtype=torch.bfloat16)
    assert rounded.pipe.transformer.dtype == torch.bfloat16 and rounded.fingerprint == pico.fingerprint
    rounded.pipe.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert pipeline.load(tmp_path, device="cpu", dtype=dtype).fingerprint == pico.fingerprint


def test_every_weight_counts(pico_folder: Path) -> None:
    model = pipeline.load(pico_folder, device="cpu")
    for name in pipeline.COMPONENTS:
        state = getattr(model.pipe, name).state_dict()
        for weight in [state[key] for key in sorted(state)[:: max(1, len(state) // 6)]]:
            if not weight.is_floating_point():
                continue
            before = weight.clone()
            weight += 0.1
            assert pipeline.fingerprint(model.pipe) != model.fingerprint
            weight.copy_(before)
            assert pipeline.fingerprint(model.pipe) == model.fingerprint


def test_the_fingerprint_is_the_same_with_other_versions_of_the_libraries(
    pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer transformers lists more in a config, elsewhere and under other model types; packs of before still fit."""
    config = type(pico.pipe.text_encoder.config)
    listed = config.to_dict

    def newer(self: Any) -> dict[str, Any]:
        told = listed(self)
        text = {**told["text_config"], "newly_added": 3, "model_type": "renamed"}
        rope = text.pop("rope_parameters")
        return {**told, **rope, "text_config": text, "another_default": None, "transformers_version": "9.0"}

    monkeypatch.setattr(config, "to_dict", newer)
    assert pipeline.fingerprint(pico.pipe) == pico.fingerprint


@pytest.mark.parametrize(
    ("component", "name", "value"),
    [("text_encoder", "num_attention_heads", 1), ("text_encoder", "rms_norm_eps", 0.5), ("vae", "latents_mean", [0.5] * 4),
     ("transformer", "axes_dims_rope", [2, 2, 4])],
)  # fmt: skip
def test_what_no_weight_shows_counts_too(
    pico: Model, monkeypatch: pytest.MonkeyPatch, component: str, name: str, value: Any
) -> None:
    whole = getattr(pico.pipe, component)
    config = whole.config
    told = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    changed = (
        {**told, "text_config": {**told["text_config"], name: value}}
        if "text_config" in told
        else {**told, name: value}
    )
    monkeypatch.setattr(type(whole), "config", property(lambda self: changed), raising=False)
    assert pipeline.fingerprint(pico.pipe) != pico.fingerprint


def test_a_retrained_file_is_another_model(pico: Model, copied: Path) -> None:
    file = next((copied / "text_encoder").glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name] *= 1.01
    save_file(weights, file, {"format": "pt"})
    assert pipeline.load(copied, device="cpu").fingerprint != pico.fingerprint


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("text_encoder/config.json", lambda c: c["text_config"]["rope_parameters"].update(rope_theta=500.0)),
        ("text_encoder/config.json", lambda c: c["text_config"].update(rms_norm_eps=0.1)),
        ("transformer/config.json", lambda c: c.update(axes_dims_rope=[16, 8, 8])),
        ("vae/config.json", lambda c: c.update(latents_std=[2.0] * 8)),
    ],
    ids=["rope", "norm", "axes", "latents"],
)
def test_another_config_is_another_model(
    pico: Model, copied: Path, file: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """The weights are the same, but it computes something else."""
    edit_json(copied / file, change)
    assert pipeline.load(copied, device="cpu").fingerprint != pico.fingerprint


# --- the text encoder alone ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_kept_counts_for_the_fingerprint(
    pico: Model, pico_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    alone = pipeline.load(pico_folder, device="cpu", dtype=dtype, text_alone=True)
    assert (alone.loaded, pico.loaded) == (("text_encoder",), pipeline.COMPONENTS)
    assert alone.pipe.transformer is None and alone.pipe.vae is None
    assert alone.fingerprint == pico.fingerprint
    pico.pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    assert pipeline.load(tmp_path, device="cpu", dtype=dtype, text_alone=True).fingerprint == pico.fingerprint


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_every_weight_that_is_not_kept_counts(pico: Model, copied: Path, name: str) -> None:
    (file,) = (copied / name).glob("*.safetensors")
    weights = load_file(file)
    for key in sorted(weights)[:: max(1, len(weights) // 5)]:
        save_file({**weights, key: weights[key] + 0.1}, file, {"format": "pt"})
        found = pipeline.load(copied, device="cpu", text_alone=True).fingerprint
        assert found != pico.fingerprint and found == pipeline.load(copied, device="cpu").fingerprint
    save_file(weights, file, {"format": "pt"})
    assert pipeline.load(copied, device="cpu", text_alone=True).fingerprint == pico.fingerprint


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def _enlarge_one(file: Path) -> None:
    weights = load_file(file)
    name = next(name for name in weights if weights[name].ndim == 2)
    save_file({**weights, name: weights[name].repeat(2, 1)}, file, {"format": "pt"})


def _widen(file: Path) -> None:
    edit_json(file.parent / "config.json", lambda config: config.update(joint_attention_dim=8))


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _enlarge_one, _widen, lambda file: shutil.rmtree(file.parent)])
def test_damage_to_what_is_not_kept_is_one_sentence_all_the_same(copied: Path, damage: Callable[[Path], None]) -> None:
    (file,) = (copied / "transformer").glob("*.safetensors")
    damage(file)
    for text_alone in (False, True):
        with pytest.raises(MokusError, match=r"cannot be loaded .*get a whole copy") as caught:
            pipeline.load(copied, device="cpu", text_alone=text_alone)
        assert "\n" not in str(caught.value)


def test_what_is_not_kept_is_known_by_the_hub_s_id_and_sizes_are_as_ever(
    pico: Model, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the libraries' own loaders sees the id."""
    real, given = pipeline.DiffusionPipeline.from_pretrained.__func__, []  # type: ignore[attr-defined]
    index = json.loads((pico_folder / "model_index.json").read_text())
    for kind in (type(pico.pipe.transformer), type(pico.pipe.vae)):
        loader = kind.from_pretrained

        def local(source: str, *, loader: Any = loader, **named: Any) -> Any:
            given.append((source, named["subfolder"]))
            return loader(pico_folder, **named)

        monkeypatch.setattr(kind, "from_pretrained", local)
    monkeypatch.setattr(pipeline.DiffusionPipeline, "load_config", lambda *_: index)
    monkeypatch.setattr(
        QwenImagePipeline, "from_pretrained", lambda source, **named: real(QwenImagePipeline, pico_folder, **named)
    )
    alone = pipeline.load("somebody/some-model", device="cpu", text_alone=True)
    assert given == [("somebody/some-model", "transformer"), ("somebody/some-model", "vae")]
    assert (alone.id, alone.fingerprint, alone.corpus) == ("somebody/some-model", pico.fingerprint, ())
    assert (alone.size_multiple, alone.grid(SIZE)) == (pico.size_multiple, pico.grid(SIZE))


def test_what_needs_the_rest_says_so(pico_folder: Path, tmp_path: Path) -> None:
    alone = pipeline.load(pico_folder, device="cpu", text_alone=True)
    words = "was loaded for text alone, without its transformer; load it whole"
    with pytest.raises(MokusError, match=words):
        mokus.generate(alone, "a red star")
    with pytest.raises(MokusError, match=words):
        mokus.learn(alone, [Image.new("RGB", (40, 40))], "sks toy", tmp_path / "toy.pack")
    assert not list(tmp_path.iterdir())


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_ready_and_frozen(pico: Model, pico_folder: Path) -> None:
    assert isinstance(pico.pipe, QwenImagePipeline)
    assert pico.id == str(pico_folder) and pico.device == torch.device("cpu")
    assert pico.size_multiple == 8
    for name in pipeline.COMPONENTS:
        component = getattr(pico.pipe, name)
        assert not component.training and not any(p.requires_grad for p in component.parameters())
        assert component.dtype == torch.float32


@pytest.mark.parametrize("name", ["no/where/at all", "/no/such/folder", "nobody-s/no-such-model"])
def test_a_model_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MokusError, match=r"such-model|no/where|no/such") as caught:
        pipeline.load(name)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_pipeline(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(MokusError, match="model_index"):
        pipeline.load(tmp_path)
    for name in ("StableDiffusionXLPipeline", "QwenImageEditPipeline"):
        edit_json(copied / "model_index.json", lambda index, name=name: index.update(_class_name=name))
        with pytest.raises(MokusError, match=name):
            pipeline.load(copied)


def remove_weights(folder: Path) -> None:
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()


def cut_weights(folder: Path) -> None:
    for file in (folder / "transformer").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    "spoil",
    [
        remove_weights,
        cut_weights,
        lambda folder: shutil.rmtree(folder / "vae"),
        lambda folder: (folder / "model_index.json").write_text("{"),
        lambda folder: (folder / "model_index.json").write_text("[1]"),
    ],
    ids=["no weights", "cut weights", "no vae", "broken index", "odd index"],
)
def test_half_a_model_is_refused_in_one_sentence(copied: Path, spoil: Callable[[Path], Any]) -> None:
    """A download that broke off is the usual case."""
    spoil(copied)
    with pytest.raises(MokusError, match="model"):
        pipeline.load(copied, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "cuda:-1", "tpu:0"])
def test_a_device_that_is_not_there(pico_folder: Path, device: str) -> None:
    with pytest.raises(MokusError, match="device"):
        pipeline.load(pico_folder, device=device)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_a_device_that_torch_may_have_but_we_do_not_take(
    pico_folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # as if it were there
    with pytest.raises(MokusError, match=f"'{device}' cannot be used, expected cpu, cuda"):
        pipeline.load(pico_folder, device=device)


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_the_folders_defaults_are_read(pico: Model, copied: Path) -> None:
    assert pico.defaults == Defaults(size=SIZE, steps=STEPS)
    wanted = {"size": 64, "negative_prompt": "bad", "learn": {"rank": 3}, "edit": {"layers": [1, 2]}}
    (copied / pipeline.DEFAULTS_FILE).write_text(json.dumps(wanted), encoding="utf-8")
    found = pipeline.load(copied, device="cpu").defaults
    assert (found.size, found.steps, found.negative_prompt) == (64, Defaults().steps, "bad")
    assert LearnSettings.for_model(found.learn).rank == 3
    assert EditSettings.for_model(found.edit, eta=0.5) == EditSettings(layers=[1, 2], eta=0.5)
    (copied / pipeline.DEFAULTS_FILE).unlink()
    assert pipeline.load(copied, device="cpu").defaults == Defaults()


def test_what_goes_with_an_editor_goes_before_what_goes_with_all(copied: Path) -> None:
    wanted: dict[str, Any] = {"edit": {"layers": [1, 2], "steps": 5}, "editors": {"memit": {"layers": [1], "eta": 0.5}}}
    (copied / pipeline.DEFAULTS_FILE).write_text(json.dumps(wanted), encoding="utf-8")
    found = pipeline.load(copied, device="cpu").defaults
    assert found == Defaults(**wanted)
    assert EditSettings.for_editor(found) == EditSettings(layers=[1, 2], steps=5)
    assert EditSettings.for_editor(found, editor="memit", ridge=0.5) == EditSettings(
        **{**settings_of("memit"), "steps": 5, "editor": "memit", "layers": [1], "eta": 0.5, "ridge": 0.5}
    )
    assert EditSettings.for_editor(found, editor="memit", eta=7.0).eta == 7.0
    usual = Defaults(edit={"editor": "memit"}, editors=wanted["editors"])
    assert (EditSettings.for_editor(usual).editor, EditSettings.for_editor(usual).eta) == ("memit", 0.5)
    for bad in ({"edit": {"stepps": 1}}, {"editors": {"least_drift": {"stepps": 1}}}):
        with pytest.raises(MokusError, match="did you mean 'steps'"):
            EditSettings.for_editor(Defaults(**bad))
    with pytest.raises(MokusError, match="no editor 'magic'"):
        EditSettings.for_editor(found, editor="magic")


def test_the_folders_corpus_is_read(pico: Model, copied: Path) -> None:
    """A prompt a line; one that brings none has none."""
    assert pico.corpus == () and not (copied / pipeline.CORPUS_FILE).exists()
    (copied / pipeline.CORPUS_FILE).write_bytes("a red ball\n\n  \nein größer {} %s 汉字\r\nx".encode())
    assert pipeline.load(copied, device="cpu").corpus == ("a red ball", "ein größer {} %s 汉字", "x")
    (copied / pipeline.CORPUS_FILE).write_text("", encoding="utf-8")
    assert pipeline.load(copied, device="cpu").corpus == ()


def test_a_corpus_does_not_change_the_fingerprint(pico: Model, copied: Path) -> None:
    (copied / pipeline.CORPUS_FILE).write_text("a red ball\n", encoding="utf-8")
    assert pipeline.load(copied, device="cpu").fingerprint == pico.fingerprint


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\xfa", b"a red ball\n\x80\n", b"PK\x03\x04\xc3\x28"], ids=["bytes", "late", "zip"]
)
def test_a_corpus_that_is_no_text_is_refused(copied: Path, data: bytes) -> None:
    (copied / pipeline.CORPUS_FILE).write_bytes(data)
    with pytest.raises(MokusError, match=f"{pipeline.CORPUS_FILE}.* is no text") as caught:
        pipeline.load(copied, device="cpu")
    assert "\n" not in str(caught.value)


def test_defaults_are_read_anew_at_every_load(copied: Path) -> None:
    for size in (64, 96):
        (copied / pipeline.DEFAULTS_FILE).write_text(json.dumps({"size": size}), encoding="utf-8")
        assert pipeline.load(copied, device="cpu").defaults.size == size


@pytest.mark.parametrize("text", ['{"sizes": 64}', "{", "[]"])
def test_defaults_that_say_nothing_known_are_refused(copied: Path, text: str) -> None:
    (copied / pipeline.DEFAULTS_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(MokusError, match=pipeline.DEFAULTS_FILE):
        pipeline.load(copied, device="cpu")


def test_chosen_settings_go_before_the_models_and_these_before_ours() -> None:
    assert LearnSettings.for_model({}).steps == LearnSettings().steps
    assert LearnSettings.for_model({"steps": 7, "rank": 2}, steps=9) == LearnSettings(steps=9, rank=2)


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [(LearnSettings, "learning_rat", "learning_rate"), (LearnSettings, "step", "steps"), (EditSettings, "layer", "layers"),
     (EditSettings, "allignment", "alignment")],
)  # fmt: skip
def test_a_misspelt_setting_gets_a_suggestion(kind: type[LearnSettings], name: str, meant: str) -> None:
    for build in (lambda: kind.for_model({name: 1}), lambda: kind.for_model({}, **{name: 1})):
        with pytest.raises(MokusError, match=f"did you mean '{meant}'"):
            build()
    with pytest.raises(MokusError, match=meant):  # nothing is near: all are listed
        kind.for_model({"qqqqq": 1})


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        (LearnSettings, {"steps": 0}), (LearnSettings, {"rank": 0}), (LearnSettings, {"learning_rate": -1.0}),
        (LearnSettings, {"learning_rate": float("nan")}), (LearnSettings, {"tail_share": 1.5}), (LearnSettings, {"targets": []}),
        (EditSettings, {"steps": 0}), (EditSettings, {"eta": -0.1}), (EditSettings, {"layers": []}),
        (EditSettings, {"modules": []}), (EditSettings, {"near_weight": -1.0}), (EditSettings, {"ridge": float("nan")}),
        (EditSettings, {"corpus": -1}), (EditSettings, {"ridge": float("inf")}), (EditSettings, {"alignment": 5.0}),
        (LearnSettings, {"time_mean": float("-inf")}), (LearnSettings, {"alpha": float("nan")}),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(kind: Callable[..., Any], chosen: dict[str, Any]) -> None:
    with pytest.raises(MokusError, match=next(iter(chosen))):
        kind(**chosen)


# --- where components are ---------------------------------------------------------------------------------------------


class Somewhere(nn.Module):
    """A component that only remembers where it was moved to."""

    place = "cpu"

    @property
    def device(self) -> torch.device:
        return torch.device(self.place)

    def to(self, device: Any) -> Somewhere:  # type: ignore[override]
        self.place = str(device)
        return self


def places(model: Model) -> tuple[str, ...]:
    return tuple(getattr(model.pipe, name).place for name in ("transformer", "text_encoder", "vae"))


@pytest.fixture
def far() -> Model:
    """A model on a device that this machine need not have: `resident` only says where components go."""
    pipe = SimpleNamespace(transformer=Somewhere(), text_encoder=Somewhere(), vae=Somewhere())
    return Model(cast(QwenImagePipeline, pipe), "far", "0" * 64, Defaults(), torch.device("cuda:0"))


def test_only_what_is_resident_is_on_the_device(far: Model) -> None:
    with far.resident("text_encoder"):
        assert places(far) == ("cpu", "cuda:0", "cpu")
    assert places(far) == ("cpu", "cpu", "cpu")
    with pytest.raises(KeyError), far.resident("transformer", "vae"):
        assert places(far) == ("cuda:0", "cpu", "cuda:0")
        raise KeyError
    assert places(far) == ("cpu", "cpu", "cpu")


@pytest.mark.parametrize("inner", [("text_encoder",), ("transformer", "vae"), ("text_encoder", "vae")])
def test_what_is_resident_still_is_after_a_nested_use(far: Model, inner: tuple[str, ...]) -> None:
    """`bind` keeps the text encoder there and asks, which wants it there as well; `learn` draws previews."""
    with far.resident("text_encoder"):
        with far.resident(*inner):
            assert all(getattr(far.pipe, name).place == "cuda:0" for name in inner)
        assert places(far) == ("cpu", "cuda:0", "cpu")
    assert places(far) == ("cpu", "cpu", "cpu")


def test_every_public_name_is_there() -> None:
    assert all(getattr(mokus, name).__doc__ for name in mokus.__all__)
