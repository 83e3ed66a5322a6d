"""How fast stage 1 learns: beside a plain training loop, and beside the bare forward and backward pass of its own graph.

    python benchmarks/learn_speed.py [--json] [--compile]                       # a CPU: Qwen-Image's width, one block
    python benchmarks/learn_speed.py --device cuda --layers 60 --text-layers 28 --size 1024     # a GPU: all of it

All of them train a LoRA on the same image transformer (Qwen-Image's classes and widths, random weights, as many blocks as
asked), with as many samples in a step, in turns, several rounds in one run; figures are medians over the rounds.

- ours: what `mokus learn` does in a step;
- bare: forward and backward of the very inputs that one of our steps has, and nothing else: no drawing, no optimiser;
- plain: a loop in the manner of the usual DreamBooth script, which in every step encodes prompts and images, draws t uniformly,
  and keeps the LoRA in the model's dtype;
- plain, cached: the same with encodings and latents computed once;
- ours, compiled: with --compile.

Where other programs want the processors, too, look at the processors' seconds: what this process used, whoever had it wait.

FLOPs are counted by torch's FlopCounterMode, over one step each. The hardware's peak is the rate of a large matrix product in
the same dtype, measured here, by as many threads.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
import typer
from diffusers import QwenImagePipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mokus import flow
from mokus.backbone import COMPONENTS
from mokus.console import note, one_sentence
from mokus.errors import MokusError
from mokus.fingerprint import fingerprint
from mokus.memory import CPU, tier
from mokus.photos import photos_of
from mokus.pipeline import Defaults, Model, encode, pad
from mokus.qwen_image import TEXT, TRANSFORMER, VAE, random_pipeline
from mokus.settings import LearnSettings
from mokus.training.compiled import check_compiler
from mokus.visual_concept import ADAPTER, _Run

ANCHOR, WORD, PHOTOS = "sks toy", "toy", 4
VOCABULARY = 4096  # the tokenizer here has no more
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# `--pico`: narrow matrices, for a test
NARROW = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12)}
NARROW_TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}  # fmt: skip

Step = Callable[[], object]


# --- what is compared ---------------------------------------------------------


def build(device: torch.device, dtype: torch.dtype, layers: int, text_layers: int, size: int, pico: bool) -> Model:
    """The model: widths as Qwen-Image's unless it is pico, so many layers."""
    text = {**TEXT, "vocab_size": VOCABULARY, **(NARROW_TEXT if pico else {}), "num_hidden_layers": text_layers}
    pipe = random_pipeline(
        device, dtype, {**TRANSFORMER, **(NARROW if pico else {}), "num_layers": layers}, text,
        {"base_dim": 4} if pico else VAE,
    )  # fmt: skip
    use = CPU if device.type == "cpu" else tier("checkpointed")
    return Model(pipe, "random weights", fingerprint(pipe), Defaults(size=size), device, tier=use)


def pictures(size: int) -> list[Image.Image]:
    """Noise, size x size."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(PHOTOS)]


class Plain:
    """The usual loop: half of the samples are photos of the concept, half are images of its class."""

    def __init__(self, model: Model, run: _Run, images: list[Image.Image], cached: bool) -> None:
        self.model, self.grid, self.images = model, run.material.grid, images
        self.samples = run.settings.batch_size + run.settings.prior_batch_size
        self.transformer, self.cached = model.pipe.transformer, cached
        self.random = torch.Generator().manual_seed(0)
        self.own = [p for name, p in self.transformer.named_parameters() if ".plain." in name]
        self.optimiser = torch.optim.AdamW(self.own, lr=run.settings.learning_rate)
        if cached:
            self.known = (self.encode_prompts(), [self.encode_image(image) for image in images])

    @torch.no_grad()
    def encode_prompts(self) -> tuple[Tensor, Tensor]:
        prompts = [f"a photo of {ANCHOR}", f"a photo of {WORD}"] * self.samples
        return pad([encode(self.model, [prompt])[0] for prompt in prompts[: self.samples]])

    @torch.no_grad()
    def encode_image(self, image: Image.Image) -> Tensor:
        pipe, vae = self.model.pipe, self.model.pipe.vae
        x = pipe.image_processor.preprocess(image).to(self.model.device, vae.dtype)[:, :, None]
        z = vae.encode(x).latent_dist.sample()
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean, device=z.device, dtype=z.dtype).view(shape)
        std = torch.tensor(vae.config.latents_std, device=z.device, dtype=z.dtype).view(shape)
        z = (z - mean) / std
        return QwenImagePipeline._pack_latents(z, 1, z.shape[1], z.shape[3], z.shape[4])

    def __call__(self) -> None:
        picked = torch.randint(len(self.images), (self.samples,), generator=self.random).tolist()
        if self.cached:
            (embeds, mask), latents = self.known
            z0 = torch.cat([latents[i] for i in picked])
        else:
            (embeds, mask), z0 = self.encode_prompts(), torch.cat([self.encode_image(self.images[i]) for i in picked])
        z1 = torch.randn(z0.shape, generator=self.random).to(z0)
        t = torch.rand(len(z0), generator=self.random).to(z0)
        z = flow.interpolate(z0, z1, t)
        v = flow.velocity(self.transformer, z, t, embeds, mask, self.grid)
        F.mse_loss(v.float(), flow.target(z0, z1).float()).backward()
        torch.nn.utils.clip_grad_norm_(self.own, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


def bare(run: _Run, ours: Step) -> Step:
    """Forward and backward on what the transformer is given in one of our steps."""
    given: dict[str, Any] = {}
    hook = run.transformer.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    ours()
    hook.remove()

    def step() -> None:
        run.transformer(**given)[0].float().square().mean().backward()
        for p in run.parameters:
            p.grad = None

    return step


def contenders(run: _Run, images: list[Image.Image], compiled: bool) -> Iterator[tuple[str, str, bool, Step]]:
    """Name, whose LoRA is active, whether compiled code runs, and one step. Inside `run.adapter()`, all material gathered."""
    transformer, training = run.transformer, run.train()
    next(training)  # the optimiser's moments are there from now on
    yield "bare", ADAPTER, False, bare(run, lambda: next(training))
    yield "ours", ADAPTER, False, lambda: next(training)
    if compiled:
        yield "ours, compiled", ADAPTER, True, lambda: next(training)
    s = run.settings
    config = LoraConfig(r=s.rank, lora_alpha=s.alpha, target_modules=s.targets, init_lora_weights="gaussian")
    transformer.add_adapter(config, adapter_name="plain")
    for name, p in transformer.named_parameters():
        if ".plain." in name:
            p.data = p.data.to(transformer.dtype)
    for name, cached in (("plain", False), ("plain, cached", True)):
        yield name, "plain", False, Plain(run.model, run, images, cached)


# --- measuring ---------------------------------------------------------


class Peak:
    """The most memory inside: of the GPU's tensors, or of this process, looked at every few milliseconds. In GiB."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gib = device, 0.0
        self._over, self._watching = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while True:  # looks before it asks whether all is over: what takes no time has a peak too
            self.gib = max(self.gib, process.memory_info().rss / 2**30)
            if self._over.wait(0.02):
                return

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            self._over.set()
            self._watching.join()


def seconds_of(step: Step, device: torch.device) -> tuple[float, float]:
    """Of one step, with all that the device has to do for it: on the clock, and of this process's processors."""
    wait(device)
    began, used = time.perf_counter(), time.process_time()
    step()
    wait(device)
    return time.perf_counter() - began, time.process_time() - used


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tflop_of(step: Step) -> float:
    """Products of matrices in one step; attention is counted as the products that it is."""
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        step()
    return counted.get_total_flops() / 1e12


def peak_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """TFLOP/s of the best of several products of n x n matrices."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device)[0] for _ in range(6)) / 1e12


def measure(model: Model, settings: LearnSettings, rounds: int, matrix: int, folder: Path) -> dict[str, Any]:
    """{"peak_tflop_per_second": ..., "steps": {name: its figures}}."""
    device, images = model.device, pictures(model.defaults.size)
    photos = photos_of(images, model.defaults.size)
    run = _Run(model, photos, ANCHOR, WORD, folder / "a.pack", settings)
    for what, done, total, _ in run.material.gather():
        if done == total:
            note(f"{what}: {total}")
    with ExitStack() as stack:
        stack.enter_context(run.adapter())
        stack.enter_context(model.resident(*COMPONENTS))
        steps = {name: rest for name, *rest in contenders(run, images, settings.compile)}
        found: dict[str, dict[str, Any]] = {}

        def turned(name: str, call: Callable[[Step], float]) -> float:
            adapter, compiled, step = steps[name]
            run.transformer.set_adapter(adapter)
            eagerly = settings.compile and not compiled
            with torch.compiler.set_stance("force_eager") if eagerly else nullcontext():
                return call(step)

        for name in steps:  # also warms up; a compiled step is the same products as an eager one
            counted = 0.0 if name == "ours, compiled" else turned(name, tflop_of)
            tflop = counted or found["ours"]["tflop_per_step"]
            found[name] = {"tflop_per_step": tflop, "seconds": [], "processor_seconds": [], "peak_gib": 0.0}
            first, _ = turned(name, lambda step: seconds_of(step, device))
            note(f"{name}: {first:.1f} s for the first step, {found[name]['tflop_per_step']:.3f} TFLOP")
        rates = []
        for i in range(rounds):
            rates.append(peak_rate(device, run.transformer.dtype, matrix))
            for name, figures in found.items():
                with Peak(device) as memory:
                    seconds, used = turned(name, lambda step: seconds_of(step, device))
                figures["seconds"].append(seconds)
                figures["processor_seconds"].append(used)
                figures["peak_gib"] = max(figures["peak_gib"], memory.gib)
            last = ", ".join(f"{name} {figures['seconds'][-1]:.2f} s" for name, figures in found.items())
            note(f"round {i + 1} of {rounds}: {last}")
    peak = max(rates)
    for figures in found.values():
        figures["seconds_per_step"] = median(figures["seconds"])
        figures["over_bare"] = _over(figures["seconds"], found["bare"]["seconds"])
        figures["over_bare_of_processors"] = _over(figures["processor_seconds"], found["bare"]["processor_seconds"])
        figures["share_of_peak"] = figures["tflop_per_step"] / figures["seconds_per_step"] / peak
    return {"peak_tflop_per_second": peak, "steps": found}


def _over(each: list[float], bares: list[float]) -> float:
    """The median ratio of neighbours in time."""
    return median(a / b for a, b in zip(each, bares, strict=True))


# --- the command ---------------------------------------------------------


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="float32 on a CPU")] = None,
    layers: Annotated[int, typer.Option(help="Blocks of the image transformer, of 60.", min=1, max=60)] = 1,
    text_layers: Annotated[int, typer.Option(help="Layers of the text encoder, of 28.", min=1, max=28)] = 1,
    size: Annotated[int, typer.Option(help="Height and width, pixels.", min=32)] = 256,
    rounds: Annotated[int, typer.Option(help="Steps of each, in turns; figures are medians.", min=1)] = 5,
    matrix: Annotated[int, typer.Option(help="Side of the matrices that the peak is measured with.", min=64)] = 2048,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure our step compiled, too.")] = False,
    pico: Annotated[bool, typer.Option("--pico", help="Narrow matrices, for a test.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")] = False,
) -> None:
    """Measure the speed of stage 1."""
    with one_sentence(), TemporaryDirectory() as folder:
        if size % 16:
            raise MokusError(f"--size is {size}, expected a multiple of 16.")
        if device != "cpu" and not torch.cuda.is_available():
            raise MokusError(f"--device got {device}, but there is no GPU here; leave it out.")
        kind = dtype or ("float32" if device == "cpu" else "bfloat16")
        if kind not in DTYPES:
            raise MokusError(f"--dtype got {kind}, expected {' or '.join(DTYPES)}.")
        where = torch.device(device)
        if compiled:
            check_compiler(where)
        model = build(where, DTYPES[kind], layers, text_layers, size, pico)
        # nothing in what is computed once is measured, so there is little of it
        few = LearnSettings(steps=10_000, prior_prompts=2, prior_steps=1, place_share=0.0, looks_share=0.0)
        figures = measure(model, replace(few, compile=compiled), rounds, matrix, Path(folder))
    name = torch.cuda.get_device_name(where) if device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    about = {
        "device": name, "dtype": kind, "layers": layers, "text_layers": text_layers, "size": size, "rounds": rounds,
        "samples_per_step": few.batch_size + few.prior_batch_size, "torch": torch.__version__,
    }  # fmt: skip
    if as_json:
        print(json.dumps({**about, **figures}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"peak, as measured: {figures['peak_tflop_per_second']:.3f} TFLOP/s")
    print(f"{'':16} {'s/step':>8} {'/ bare':>7} {'cpu s':>8} {'/ bare':>7} {'TFLOP':>8} {'of peak':>8} {'GiB':>6}")
    rows: Mapping[str, Mapping[str, Any]] = figures["steps"]
    for name, row in rows.items():
        print(
            f"{name:16} {row['seconds_per_step']:8.3f} {row['over_bare']:7.2f} "
            f"{median(row['processor_seconds']):8.3f} {row['over_bare_of_processors']:7.2f} {row['tflop_per_step']:8.3f} "
            f"{row['share_of_peak']:8.1%} {row['peak_gib']:6.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
