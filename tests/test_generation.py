"""What `generate` draws is what plain diffusers and peft draw, in any batch, again and again, and leaves no trace."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from torch import nn

from mokus import pipeline
from mokus.errors import MokusError
from mokus.generation import Generated, generate, packs_loaded, save_png
from mokus.packs.concept_pack import LORA, README, ConceptPack
from mokus.pipeline import Model
from mokus.sizes import Size, sides, simplest

from .conftest import SIZE, STEPS, PackFactory, known, random_lora, random_shifts

PROMPTS = ["my favourite toy in the snow", "sks toy", "a red star at night, in the style of a very old pencil sketch"]
BOUND = "my favourite toy"


def pixels(results: Any) -> np.ndarray:
    return np.stack([np.asarray(result.image) for result in results]).astype(int)


def plain(folder: Path, *packs: ConceptPack, dtype: torch.dtype = torch.float32) -> QwenImagePipeline:
    """The packs in diffusers and peft alone."""
    pipe = QwenImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    names = [f"pack{i}" for i in range(len(packs))]
    for name, pack in zip(names, packs, strict=True):
        pipe.load_lora_weights(str(pack.path), weight_name=LORA, use_safetensors=True, adapter_name=name)
        pipe.text_encoder.load_adapter(str(pack.path / "text_encoder"), adapter_name=name)
    if packs:
        pipe.set_adapters(names)
        pipe.text_encoder.set_adapter(names)
    return pipe


def drawn(pipe: QwenImagePipeline, prompt: str, seed: int = 0, scale: float = 4.0, size: Size = SIZE) -> Image.Image:
    width, height = sides(size)
    return pipe(
        prompt, negative_prompt=" " if scale > 1 else None, true_cfg_scale=scale, height=height, width=width,
        num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]  # fmt: skip


@contextmanager
def untouched(model: Model) -> Iterator[None]:
    """The same modules, weights to the bit, no adapter, no hook."""

    def look() -> dict[str, Any]:
        parts = {name: getattr(model.pipe, name) for name in pipeline.COMPONENTS}
        modules = {f"{n}.{path}": id(m) for n, part in parts.items() for path, m in part.named_modules()}
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for p in parts.values() for m in p.modules())
        adapters = [getattr(part, "peft_config", None) for part in parts.values()]
        grad = [p.requires_grad for part in parts.values() for p in part.parameters()]
        return {"modules": modules, "hooks": hooks, "adapters": adapters, "grad": grad}

    weights = {n: {k: v.clone() for k, v in _state(model, n).items()} for n in pipeline.COMPONENTS}
    before = look()
    yield
    assert look() == before
    for name, state in weights.items():
        after = _state(model, name)
        assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)


def _state(model: Model, name: str) -> dict[str, torch.Tensor]:
    part: nn.Module = getattr(model.pipe, name)
    return dict(part.state_dict())


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, pico_pack: PackFactory) -> ConceptPack:
    return pico_pack(tmp_path_factory.mktemp("packs") / "toy.pack", knowledge=[BOUND, "the one that makes me smile"])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, pico_pack: PackFactory) -> ConceptPack:
    return pico_pack(tmp_path_factory.mktemp("packs") / "dog.pack", anchor="zwx dog", knowledge=["my dog"], seed=7)


# --- the same as plain diffusers and peft --------------------------------------------------------------------


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_plain_diffusers_draws_the_same(pico: Model, pico_folder: Path, pack: ConceptPack, scale: float) -> None:
    reference = plain(pico_folder, pack)
    for i, prompt in enumerate(PROMPTS):
        (result,) = generate(pico, prompt, [pack], seeds=[i], true_cfg_scale=scale)
        assert result.image.tobytes() == drawn(reference, prompt, i, scale).tobytes()


def test_plain_diffusers_in_bfloat16(pico_folder: Path, pack: ConceptPack, tmp_path: Path) -> None:
    """The looks are the same to the bit; of the knowledge peft rounds the factors, we do not."""
    model = pipeline.load(pico_folder, device="cpu", dtype=torch.bfloat16)
    pack.check_base(model)  # the fingerprint does not depend on the dtype
    looks = ConceptPack.create(tmp_path / "a", model=model, anchor="sks toy", lora=pack.lora(), settings={})
    reference = plain(pico_folder, dtype=torch.bfloat16)
    bare = reference.encode_prompt(BOUND)[0]
    reference.load_lora_weights(str(looks.path), weight_name=LORA, use_safetensors=True)
    (result,) = generate(model, BOUND, [looks])
    assert result.image.tobytes() == drawn(reference, BOUND).tobytes()
    reference.text_encoder.load_adapter(str(pack.path / "text_encoder"))
    rounded = reference.encode_prompt(BOUND)[0]
    with packs_loaded(model, [pack]):
        exact = model.pipe.encode_prompt(BOUND)[0]
    assert (rounded - exact).norm() < 0.02 * (exact - bare).norm()


@pytest.mark.parametrize("size", [48, (64, 48), (32, 64), (48, 48)])
def test_without_packs_it_is_the_plain_pipeline(pico: Model, pico_folder: Path, pack: ConceptPack, size: Size) -> None:
    (bare,), (with_pack,) = generate(pico, PROMPTS[0], size=size), generate(pico, PROMPTS[0], [pack], size=size)
    assert bare.image.size == sides(size) and bare.settings["size"] == simplest(size)
    assert bare.image.tobytes() == drawn(plain(pico_folder), PROMPTS[0], size=size).tobytes()
    assert np.abs(pixels([bare]) - pixels([with_pack])).mean() > 2


def test_several_packs_act_at_once(pico: Model, pico_folder: Path, pack: ConceptPack, other: ConceptPack) -> None:
    (both,) = generate(pico, PROMPTS[0], [pack, other])
    assert both.image.tobytes() == drawn(plain(pico_folder, pack, other), PROMPTS[0]).tobytes()
    for alone in (pack, other):
        assert np.abs(pixels([both]) - pixels(generate(pico, PROMPTS[0], [alone]))).mean() > 1


def test_looks_and_knowledge_both_matter(pico: Model, tmp_path: Path, pack: ConceptPack) -> None:
    words = ConceptPack.create(tmp_path / "a", model=pico, anchor="sks toy", lora={}, settings={})
    words.replace_edits([(known("it"), random_shifts(pico))])
    looks = ConceptPack.create(tmp_path / "b", model=pico, anchor="sks toy", lora=random_lora(pico), settings={})
    images = [pixels(generate(pico, PROMPTS[0], packs)) for packs in ([], [words], [looks], [pack])]
    assert all(np.abs(images[i] - images[j]).mean() > 0.5 for i in range(4) for j in range(i))


def test_the_card_runs_as_pasted(pack: ConceptPack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pack.path)
    code = re.findall(r"```python\n(.*?)```", Path(README).read_text(encoding="utf-8"), re.DOTALL)[0]
    assert "mokus" not in code
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["image"].size == (SIZE, SIZE)


# --- batches and repetition ----------------------------------------------------------------------------------


def test_order_and_batches(pico: Model, pack: ConceptPack) -> None:
    """Prompt by prompt, seed by seed; prompts of different lengths share a batch and change nothing but rounding."""
    jobs = [(prompt, seed) for prompt in PROMPTS for seed in (3, 1)]
    alone = list(generate(pico, PROMPTS, [pack], seeds=[3, 1], batch_size=1))
    assert [(result.prompt, result.seed) for result in alone] == jobs
    for batch_size in (4, 8):
        together = list(generate(pico, PROMPTS, [pack], seeds=[3, 1], batch_size=batch_size))
        assert [(result.prompt, result.seed) for result in together] == jobs
        assert np.abs(pixels(together) - pixels(alone)).max() <= 1
    images = pixels(alone)
    assert all(np.abs(images[i] - images[j]).mean() > 0.5 for i in range(6) for j in range(i))


def test_prompts_are_encoded_once(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    monkeypatch.setattr(pico.pipe.text_encoder, "forward", _counted(pico.pipe.text_encoder.forward, count))
    list(generate(pico, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], seeds=range(2), batch_size=1))
    assert len(count) == 3  # two prompts and the negative one


def _counted(function: Any, count: list[int]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return function(*args, **kwargs)

    return call


def test_files_are_repeated_to_the_byte(pico: Model, pack: ConceptPack, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (result,) = generate(pico, BOUND, [pack], seeds=[5])
        save_png(result, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}
    with Image.open(tmp_path / "a.png") as image:
        about = json.loads(image.text["mokus"])
        assert image.tobytes() == result.image.tobytes()
    assert (about["prompt"], about["seed"], about["settings"]) == (BOUND, 5, result.settings)
    wanted = {
        "steps": STEPS,
        "true_cfg_scale": 4.0,
        "size": SIZE,
        "negative_prompt": " ",
        "fingerprint": pico.fingerprint,
    }
    assert wanted.items() <= about["settings"].items()
    assert about["settings"]["packs"] == [{"anchor": "sks toy", "sha256": pack.digest}]
    assert {"mokus", "torch", "diffusers", "transformers", "peft"} <= about["settings"]["versions"].keys()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(Generated(Image.new("RGB", (8, 8)), "a", 0, {}), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        save_png(Generated(Image.new("RGB", (8, 8)), "b", 0, {}), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_progress_counts_up_to_the_end(pico: Model) -> None:
    seen: list[tuple[str, int, int]] = []
    list(generate(pico, PROMPTS, seeds=[0], batch_size=2, progress=lambda *what: seen.append(what[:3])))
    assert [what for what, _, _ in seen] == ["drawing"] * 4
    assert [done for _, done, _ in seen] == [2, 4, 5, 6] and {total for _, _, total in seen} == {6}


# --- no traces -----------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_the_model_is_as_before(pico: Model, pack: ConceptPack, other: ConceptPack) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    (before,) = generate(pico, BOUND)
    with untouched(pico):
        list(generate(pico, BOUND, [pack, other]))
    with untouched(pico), pytest.raises(Stop):
        list(generate(pico, BOUND, [pack, other], progress=stop))
    with untouched(pico), pytest.raises(Stop), packs_loaded(pico, [pack, other]):
        raise Stop
    with untouched(pico):
        left = generate(pico, [BOUND] * 2, [pack], batch_size=1)
        next(left)  # nobody asks for the second
    assert next(iter(generate(pico, BOUND))).image.tobytes() == before.image.tobytes()
    assert np.abs(pixels([next(left)]) - pixels([before])).max() > 2  # and if somebody does, the pack is there


def test_a_failure_while_loading_leaves_no_trace(
    pico: Model, pack: ConceptPack, other: ConceptPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Stop

    monkeypatch.setattr(pico.pipe, "set_adapters", fail)
    with untouched(pico), pytest.raises(Stop):
        list(generate(pico, BOUND, [pack, other]))


def test_packs_stay_loaded_inside(pico: Model, pack: ConceptPack) -> None:
    (wanted,) = generate(pico, BOUND, [pack])
    with packs_loaded(pico, [pack]):
        assert drawn(pico.pipe, BOUND).tobytes() == wanted.image.tobytes()
        with pytest.raises(MokusError, match="adapters already"):
            generate(pico, BOUND, [pack])


# --- what cannot be drawn ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"size": 0}, "size is 0"), ({"size": -8}, "size is -8"), ({"size": 33}, "multiple of 8"),
        ({"steps": 0}, "steps"), ({"steps": 1}, "at least 2"), ({"batch_size": 0}, "batch_size"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale"), ({"true_cfg_scale": -1}, "true_cfg_scale"),
        ({"prompts": []}, "no prompt"), ({"prompts": ["a", " "]}, "empty"), ({"prompts": [3]}, "text"),
        ({"prompts": "robot " * 1100}, "tokens"), ({"negative_prompt": "robot " * 1100}, "tokens"),
        ({"seeds": []}, "no seed"), ({"seeds": [-1]}, "-1"), ({"seeds": [1 << 64]}, "out of range"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_at_the_call(pico: Model, given: dict[str, Any], words: str) -> None:
    with pytest.raises(MokusError, match=words):
        generate(pico, **{"prompts": "a", **given})


def test_the_longest_prompt_is_drawn(pico: Model) -> None:
    (result,) = generate(pico, "robot " * 1000, true_cfg_scale=1)
    (shorter,) = generate(pico, "robot " * 600, true_cfg_scale=1)  # both beyond the pipeline's default of 512 tokens
    assert result.image.tobytes() != shorter.image.tobytes()


def test_bad_packs_are_refused_at_the_call(
    pico: Model, pack: ConceptPack, tmp_path: Path, pico_pack: PackFactory
) -> None:
    twin = pico_pack(tmp_path / "twin.pack", seed=3)
    for packs, told in (([pack, twin], "same anchor 'sks toy'"), ([pack, pack], "is given twice")):
        with pytest.raises(MokusError, match=told):
            generate(pico, "a", packs)
    text = json.loads((twin.path / "mokus.json").read_text())
    (twin.path / "mokus.json").write_text(json.dumps({**text, "fingerprint": "0" * 64}))
    with pytest.raises(MokusError, match="was made for"):
        generate(pico, "a", [ConceptPack.open(twin.path)])
