"""What is exported, loaded by other means than ours, changes the same weights by the same amounts and draws the same images."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from mokus import pipeline
from mokus.cli import app
from mokus.errors import MokusError
from mokus.generation import generate
from mokus.low_rank import LowRankShift, applied
from mokus.packs.concept_pack import LORA, MANIFEST, README, ConceptPack
from mokus.packs.export import TARGETS, Exported, _folder, export, stored_dtype
from mokus.packs.files import locked_place
from mokus.pipeline import Model

from .conftest import SIZE, STEPS, PackFactory, known, random_shifts

PHRASES = ["my favourite toy", "the robot my grandmother built"]
PROMPT = f"{PHRASES[1]} in the snow"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, pico_pack: PackFactory) -> ConceptPack:
    return pico_pack(tmp_path_factory.mktemp("packs") / "toy.pack", knowledge=PHRASES)


@pytest.fixture(scope="module")
def exported(pack: ConceptPack, pico: Model) -> dict[str, Exported]:
    return {to: export(pack, to, pack.path.parent / to, pico if to == "merged" else None) for to in TARGETS}


@pytest.fixture(scope="module")
def ours(pack: ConceptPack, pico: Model) -> np.ndarray:
    return levels(next(generate(pico, PROMPT, packs=[pack])).image)


@pytest.fixture
def words(tmp_path: Path, pico: Model) -> ConceptPack:
    """A pack of words alone."""
    edits = [(known("Zorblax"), random_shifts(pico))]
    return ConceptPack.create(
        tmp_path / "words.pack", model=pico, anchor="Zorblax", word="toy", lora={}, settings={}, edits=edits
    )


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def plain(folder: Path) -> QwenImagePipeline:
    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: QwenImagePipeline, prompt: str = PROMPT) -> np.ndarray:
    return levels(
        pipe(
            prompt, negative_prompt=" ", true_cfg_scale=4.0, height=SIZE, width=SIZE, num_inference_steps=STEPS,
            generator=torch.Generator("cpu").manual_seed(0),
        ).images[0]
    )  # fmt: skip


def wanted(pack: ConceptPack) -> dict[str, Tensor]:
    """The change of every weight, by component and name."""
    lora = pack.lora()
    looks = {key.removesuffix(".lora_A.weight"): lora[key.replace("lora_A", "lora_B")] @ a
             for key, a in lora.items() if "lora_A" in key}  # fmt: skip
    return looks | {f"text_encoder.{module}": shift.dense() for module, shift in pack.shifts().items()}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, msg=name)


# --- each layout, by another reader --------------------------------------------------------------------------


def test_diffusers_and_peft_draw_the_same_pixels(
    exported: dict[str, Exported], pico_folder: Path, ours: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the lines of its README, and with the encoder's adapter loaded by transformers instead."""
    folder, pipe = exported["diffusers"].path, plain(pico_folder)
    before = drawn(pipe)
    pipe.load_lora_weights(str(folder), weight_name=LORA, use_safetensors=True)
    pipe.text_encoder.load_adapter(str(folder / "text_encoder"))
    assert np.array_equal(drawn(pipe), ours) and not np.array_equal(before, ours)
    assert exported["diffusers"].notes == []

    monkeypatch.chdir(folder.parent)
    code = re.findall(r"```python\n(.*?)```", (folder / README).read_text(encoding="utf-8"), re.DOTALL)[0]
    lines: dict[str, Any] = {}
    exec(code.partition("image = ")[0], lines)
    assert np.array_equal(drawn(lines["pipe"]), ours)


def test_in_bfloat16_too_peft_keeps_the_knowledge_to_the_bit(
    exported: dict[str, Exported], pico_folder: Path, pack: ConceptPack
) -> None:
    model = pipeline.load(pico_folder, device="cpu", dtype=torch.bfloat16)
    with applied(model.pipe.text_encoder, pack.shifts()):
        ours = pipeline.encode(model, [PROMPT])[0]
    pipe = QwenImagePipeline.from_pretrained(pico_folder, dtype=torch.bfloat16)
    knowledge = PeftModel.from_pretrained(pipe.text_encoder, exported["diffusers"].path / "text_encoder")
    assert torch.equal(pipe.encode_prompt(PROMPT)[0][0], ours)
    with knowledge.disable_adapter():
        assert torch.equal(pipe.encode_prompt(PROMPT)[0][0], pipeline.encode(model, [PROMPT])[0])


def test_peft_changes_the_named_modules_of_the_encoder_alone(
    exported: dict[str, Exported], pico_folder: Path, pack: ConceptPack
) -> None:
    encoder = PeftModel.from_pretrained(plain(pico_folder).text_encoder, exported["diffusers"].path / "text_encoder")
    found = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in encoder.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    agree(found, {module: shift.dense() for module, shift in pack.shifts().items()})


def comfyui_names(pipe: QwenImagePipeline) -> dict[str, tuple[str, nn.Parameter]]:
    """LoRA name -> (component and name here, weight), as ComfyUI's `comfy/lora.py` maps them onto its own state dicts.

    There the image transformer's keys are diffusers' after "diffusion_model.", and the language model's of Qwen2.5-VL
    stand after "qwen25_7b.transformer.model.". Every weight has a generic name; the transformer's has two more.
    """
    names = {}
    for name, weight in pipe.transformer.named_parameters():
        if (module := name.removesuffix(".weight")) != name:
            for lora in (f"transformer.{module}", module, f"lora_unet_{module.replace('.', '_')}"):
                names[lora] = (f"transformer.{module}", weight)
    for name, weight in pipe.text_encoder.named_parameters():
        if (module := name.removesuffix(".weight")) != name and module.startswith("model.language_model."):
            key = "qwen25_7b.transformer." + module.replace("model.language_model.", "model.")
            names[f"text_encoders.{key}"] = (f"text_encoder.{module}", weight)
    return names


def read(tensors: dict[str, Tensor], names: dict[str, tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The changes that a file makes, by ComfyUI's and musubi-tuner's rule: up @ down * alpha / rank, alpha = rank if absent."""
    rest, found = dict(tensors), {}
    for lora, (name, weight) in names.items():
        for a, b in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if f"{lora}.{a}.weight" in rest:
                down, up = rest.pop(f"{lora}.{a}.weight"), rest.pop(f"{lora}.{b}.weight")
                alpha = rest.pop(f"{lora}.alpha", torch.tensor(float(len(down))))
                found[name] = up @ down * (alpha / len(down))
                assert found[name].shape == weight.shape
    assert not rest, "keys that the loader knows nothing of"
    return found


def test_comfyui_reads_both_halves_of_one_file(
    exported: dict[str, Exported], pico_folder: Path, pack: ConceptPack, ours: np.ndarray
) -> None:
    done, pipe = exported["comfyui"], plain(pico_folder)
    tensors = load_file(done.path / "comfyui.safetensors")
    assert not any(name.endswith("alpha") for name in tensors)  # which diffusers refuses beside "transformer."
    names = comfyui_names(pipe)
    changes = read(tensors, names)
    agree(changes, wanted(pack))
    with torch.no_grad():  # ComfyUI adds them to the weights
        for name, weight in names.values():
            if name in changes:
                weight += changes.pop(name)
    assert abs(drawn(pipe) - ours).max() <= 1
    assert done.notes == []


def test_musubi_reads_the_looks_and_is_said_to_lack_the_rest(
    exported: dict[str, Exported], pico_folder: Path, pack: ConceptPack, pico: Model
) -> None:
    done, pipe = exported["kohya"], plain(pico_folder)
    file = done.path / "kohya.safetensors"
    tensors = load_file(file)
    names = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": (
            f"transformer.{name.removesuffix('.weight')}",
            w,
        )
        for name, w in pipe.transformer.named_parameters()
    }
    agree(read(tensors, names), {k: v for k, v in wanted(pack).items() if k.startswith("transformer.")})
    assert {len(name.split(".")[0].split(" ")) for name in tensors} == {1}
    assert sum(name.endswith(".alpha") for name in tensors) * 3 == len(tensors)  # explicit for every module
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_alpha"] == opened.metadata()["ss_network_dim"] == "2"
        assert not any(phrase in str(opened.metadata()) for phrase in PHRASES)
    assert len(done.notes) == 1 and "2 phrases" in done.notes[0] and "'sks toy'" in done.notes[0]

    bare = pico_looks(pack, pico)
    pipe.load_lora_weights(str(done.path), weight_name=file.name, use_safetensors=True)  # which reads this layout, too
    assert abs(drawn(pipe, "sks toy") - bare).max() <= 1


def pico_looks(pack: ConceptPack, pico: Model) -> np.ndarray:
    """What the anchor draws with the looks alone."""
    place = pack.path.parent / "looks.pack"
    looks = ConceptPack.create(place, model=pico, anchor="sks toy", lora=pack.lora(), settings={})
    return levels(next(generate(pico, "sks toy", packs=[looks])).image)


def test_a_merged_folder_draws_the_same_without_anything_loaded(
    exported: dict[str, Exported], ours: np.ndarray, pico: Model, pico_folder: Path, pack: ConceptPack
) -> None:
    done = exported["merged"]
    assert abs(drawn(plain(done.path)) - ours).max() <= 1
    model = pipeline.load(done.path, device="cpu")
    assert (model.defaults, model.corpus) == (pico.defaults, pico.corpus) and model.fingerprint != pico.fingerprint
    assert abs(levels(next(generate(model, PROMPT)).image) - ours).max() <= 1
    assert done.notes == [] and max(done.rounding.values()) < 1e-5  # float32
    before = {key: weight for key, weight in plain(pico_folder).transformer.state_dict().items()}
    for key, weight in pico.pipe.transformer.state_dict().items():  # the model that was exported from is as it was
        assert torch.equal(weight, before[key])


def test_rounding_to_bfloat16_is_measured_and_told(tmp_path: Path, pico_folder: Path, pico_pack: PackFactory) -> None:
    """Changes of a thousandth of the weights: bfloat16, with 8 bits, keeps little of them."""
    model = pipeline.load(pico_folder, device="cpu", dtype=torch.bfloat16)
    weak = {module: shift.scaled(1e-3) for module, shift in random_shifts(model).items()}
    pack = pico_pack(tmp_path / "a.pack", knowledge=[])
    pack.replace_edits([(known("it"), weak)])
    done = export(pack, "merged", tmp_path / "merged", model)
    kept = pipeline.load(tmp_path / "merged", device="cpu", dtype=torch.bfloat16).pipe.text_encoder
    lost = whole = 0.0
    for module, shift in weak.items():
        change = (
            kept.get_submodule(module).weight.double() - model.pipe.text_encoder.get_submodule(module).weight.double()
        )
        lost += float((change - shift.dense().double()).square().sum())
        whole += float(shift.dense().double().square().sum())
    assert done.rounding["knowledge"] == pytest.approx((lost / whole) ** 0.5, rel=1e-6) and lost / whole > 0.1
    assert any("bfloat16 loses" in note and "knowledge" in note for note in done.notes)
    assert all(note in (done.path / README).read_text(encoding="utf-8") for note in done.notes)


# --- what is there and what is not ---------------------------------------------------------------------------


def test_every_export_says_how_it_is_loaded(exported: dict[str, Exported]) -> None:
    for to, done in exported.items():
        text = (done.path / README).read_text(encoding="utf-8")
        assert to in text and "sks toy" in text and README in done.files
        assert sorted(p.relative_to(done.path).as_posix() for p in done.path.rglob("*") if p.is_file()) == done.files
        assert (PHRASES[0] in text) == (to != "kohya")  # what is not carried is not promised
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            compile(code, README, "exec")


def test_what_a_stranger_wrote_and_odd_folders_are_text_in_it(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", knowledge=["my <script>toy</script>", "the `rm` of mine"])
    folder = tmp_path / 'my "best" toy'
    text = (export(pack, "diffusers", folder).path / README).read_text(encoding="utf-8")
    assert "- my &lt;script>toy" in text and "- the 'rm' of mine" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, README, "exec")
    assert json.dumps(folder.name) in code


def test_the_same_pack_has_the_same_bytes(tmp_path: Path, pack: ConceptPack, exported: dict[str, Exported]) -> None:
    for to in ("comfyui", "diffusers", "kohya"):
        again = export(pack, to, tmp_path / to)
        assert [(again.path / n).read_bytes() for n in again.files] == [
            (exported[to].path / n).read_bytes() for n in exported[to].files
        ]


def test_a_pack_of_words_alone(tmp_path: Path, pico: Model, pico_folder: Path, words: ConceptPack) -> None:
    """Everything that has a place for the text encoder carries it; kohya's layout carries nothing, and is refused."""
    wanted_image = levels(next(generate(pico, "Zorblax", packs=[words])).image)
    with pytest.raises(MokusError, match="words alone"):
        export(words, "kohya", tmp_path / "kohya")
    assert not (tmp_path / "kohya").exists()

    agree(read(load_file(export(words, "comfyui", tmp_path / "c").path / "c.safetensors"), comfyui_names(plain(pico_folder))),
          wanted(words))  # fmt: skip
    pipe = plain(pico_folder)
    pipe.text_encoder.load_adapter(str(export(words, "diffusers", tmp_path / "d").path / "text_encoder"))
    assert np.array_equal(drawn(pipe, "Zorblax"), wanted_image)
    assert abs(drawn(plain(export(words, "merged", tmp_path / "m", pico).path), "Zorblax") - wanted_image).max() <= 1


def test_modules_that_comfyui_has_no_name_for_are_named(tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", knowledge=[])
    head = pico.pipe.text_encoder.lm_head
    shift = LowRankShift(torch.ones(1, head.in_features), torch.ones(head.out_features, 1))
    pack.replace_edits([(known("it"), {"lm_head.dense": shift})])  # paths are words with dots between them
    done = export(pack, "comfyui", tmp_path / "c")
    assert len(done.notes) == 1 and "lm_head.dense" in done.notes[0]
    assert all(name.startswith("transformer.") for name in load_file(done.path / "c.safetensors"))


# --- the command ---------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command(
    tmp_path: Path, pack: ConceptPack, pico_folder: Path, monkeypatch: pytest.MonkeyPatch, ours: np.ndarray
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(pack.path, "--to", "comfyui")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["toy-comfyui/README.md", "toy-comfyui/toy-comfyui.safetensors"]
    result = run(pack.path, "--to", "kohya", "-o", "k", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["files"] == [README, "k.safetensors"]
    assert result.stderr.count("\n") == 1 and "left out" in result.stderr
    result = run(pack.path, "--to", "merged", "--model", pico_folder, "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["path"]) == (0, "toy-merged") and max(told["rounding"].values()) < 1e-5
    pipe = plain(Path("toy-merged"))
    assert pipe.transformer.dtype == torch.float32 and abs(drawn(pipe) - ours).max() <= 1


@pytest.mark.parametrize("tier", ["8bit", "4bit", "offload"])
def test_merged_weights_are_plain_in_every_memory_tier(
    tmp_path: Path, pack: ConceptPack, words: ConceptPack, pico_folder: Path, exported: dict[str, Exported], tier: str
) -> None:
    """The command loads the model with plain weights; a model that was loaded otherwise is refused."""
    model = pipeline.load(pico_folder, device="cpu", tier=tier)
    for each, looks in ((pack, exported["merged"].path), (words, pico_folder)):
        with pytest.raises(MokusError, match=f"plain weights.*{tier}"):
            export(each, "merged", tmp_path / "refused", model)
        place = tmp_path / each.path.name.removesuffix(".pack")
        result = CliRunner().invoke(
            app,
            ["--tier", tier, "export", str(each.path), "--to", "merged", "--model", str(pico_folder), "-o", str(place)],
        )
        assert result.exit_code == 0, result.output
        found, expected = (plain(folder).transformer.state_dict() for folder in (place, looks))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert not (tmp_path / "refused").exists()


def test_bad_input_is_one_sentence(
    tmp_path: Path, pack: ConceptPack, pico: Model, pico_folder: Path, pico_pack: PackFactory
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("dear diary")
    empty = ConceptPack.create(tmp_path / "empty.pack", model=pico, anchor="sks toy", lora={}, settings={})
    tampered = pico_pack(tmp_path / "b.pack")
    (tampered.path / LORA).write_bytes((tampered.path / LORA).read_bytes()[:-1] + b"\1")
    foreign = pico_pack(tmp_path / "c.pack").path
    says = (foreign / MANIFEST).read_text(encoding="utf-8").replace(pico.fingerprint, "0" * 64)
    (foreign / MANIFEST).write_text(says, encoding="utf-8")
    free = tmp_path / "free"
    for arguments, told in [
        ((pack.path, "--to", "comfy", "-o", free), "did you mean comfyui"),
        ((pack.path, "--to", "musubi", "-o", free), "did you mean kohya"),
        ((pack.path, "--to", "automatic", "-o", free), "comfyui, diffusers, kohya, merged"),
        ((pack.path, "--to", "comfyui", "-o", tmp_path / "taken"), "exists already"),
        ((pack.path, "--to", "comfyui", "-o", tmp_path / "taken" / "diary.txt"), "exists already"),
        ((pack.path, "--to", "comfyui", "-o", "."), "exists already"),
        ((pack.path, "--to", "comfyui", "-o", free, "--dtype", "float32"), "--to merged"),
        ((pack.path, "--to", "merged", "-o", free, "--dtype", "int4"), "bfloat16, float16, float32"),
        ((foreign, "--to", "merged", "-o", free, "--model", pico_folder), "was made for"),
        ((empty.path, "--to", "diffusers", "-o", free), "nothing to export"),
        ((tampered.path, "--to", "diffusers", "-o", free), "sha256"),
        ((tmp_path / "nowhere", "--to", "diffusers", "-o", free), "no concept pack"),
    ]:
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments
        assert result.stderr.startswith("mokus: ") and result.stderr.count("\n") == 1 and told in result.stderr
    assert not free.exists() and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["pointer", "cut", "empty"])
def test_a_damaged_model_is_one_sentence(tmp_path: Path, pack: ConceptPack, pico_folder: Path, damage: str) -> None:
    shutil.copytree(pico_folder, tmp_path / "model")
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 40000000\n"
    file.write_bytes({"pointer": pointer, "cut": file.read_bytes()[:1000], "empty": b""}[damage])
    assert stored_dtype(tmp_path / "model") is None and stored_dtype(pico_folder) == torch.float32
    result = run(pack.path, "--to", "merged", "--model", tmp_path / "model", "-o", tmp_path / "merged")
    assert (result.exit_code, result.stdout) == (2, ""), result.exception
    assert re.fullmatch(r"mokus: the model .* cannot be loaded \(.*\); get a whole copy of it\.\n", result.stderr)
    assert not (tmp_path / "merged").exists()


def test_nothing_is_left_of_an_export_that_failed(
    tmp_path: Path, pack: ConceptPack, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {key: weight.clone() for key, weight in pico.pipe.text_encoder.state_dict().items()}
    monkeypatch.setattr(type(pico.pipe), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(pack, "merged", tmp_path / "merged", pico)
    assert [path.name for path in tmp_path.iterdir()] == [".merged.lock"]
    assert all(torch.equal(before[key], weight) for key, weight in pico.pipe.text_encoder.state_dict().items())


def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path: Path, pack: ConceptPack) -> None:
    """As large as a model, and hidden. But nothing of other names, nor a pack whose writing was cut off."""
    left = {name: tmp_path / name for name in (".toy.123.tmp", ".toy.b.123.tmp", ".toy.old")}
    for folder in left.values():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    export(pack, "comfyui", tmp_path / "toy")
    assert {path.name for path in tmp_path.iterdir()} == {"toy", ".toy.lock", ".toy.b.123.tmp", ".toy.old"}


def test_what_a_living_export_writes_is_left_to_it(
    tmp_path: Path, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mokus.packs.export.locked_place", partial(locked_place, seconds=0.05))
    with ThreadPoolExecutor() as other, _folder(tmp_path / "toy") as beside:
        with pytest.raises(MokusError, match="another process"):
            other.submit(export, pack, "comfyui", tmp_path / "toy").result(60)
        assert beside.is_dir()
        (beside / "model.safetensors").write_bytes(b"whole")
    with pytest.raises(MokusError, match="exists already"):
        export(pack, "comfyui", tmp_path / "toy")
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["model.safetensors"]
