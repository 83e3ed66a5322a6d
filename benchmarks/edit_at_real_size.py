"""One edit at the size of Qwen-Image's text encoder, measured: the form the peers use beside ours, in the same run.

    python benchmarks/edit_at_real_size.py [--json] [--layers 28]

The model is a `Qwen2_5_VLForConditionalGeneration` of the 7B text configuration with random bf16 weights (about 15 GB) and
a vision tower of one tiny block; the prompts are random tokens of the usual lengths. Speed, memory, bytes and rounding do
not depend on what the weights mean; whether an edit takes does, and is not asked here. With `--layers` fewer than 28 the
edited layers are the same share of them.

One piece of knowledge is three questions, each with three answer tokens to predict, so n = 9 rows with inputs h (n, 3584)
of mlp.gate_proj and mlp.up_proj and gradients g (n, 18944) at their outputs. Both forms make UltraEdit's change of a weight
(arXiv 2505.14679), with V's rows v_i = -eta ||h_i||^2 g_i and the gradients brought to standard deviation 1:

- reference, as the peers do it: all tokens through all layers, logits everywhere, backward with the gradients of the edited
  weights; dW^T = (H^T H + I)^-1 H^T V, a 3584 x 3584 solve in float32 for each matrix; dW added to the bf16 weight. The
  questions are one batch, which the peers' code leaves to the user, and the 16 dW are never held together.
- ours: the template's prefix, and the questions through the layers below the first edited one, once per knowledge; in each
  step only the layers from there on, logits of the answer, gradients of activations alone. dW = B A with
  A = (H H^T + I)^-1 H and B = V^T: a 9 x 9 solve in float64 for each layer. dW stays beside the weight. A step's solve is
  counted in full, although A is that of the first step in all of them.

The prefix's keys and values in the edited layers are kept as well. They would move with the shift, which the editors of
`mokus` prevent by counting the prefix to what must stay; `step_ratio_prefix_rerun` is what is left if it is run in each step.

`size_ratio` is of dense bf16 matrices, the peers' least, to the float32 factors; `size_ratio_float32` of the same dtype, in
which the error is what `error_ours` says. The latter is 3584 x 18944 / (3584 + 18944) / n = 3013 / n, the former half of it.

On a busy machine each small operation waits for its second thread until the scheduler's next tick, which slows ours down more
than the reference; OMP_WAIT_POLICY=PASSIVE or OMP_NUM_THREADS=1 is fairer there.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from mokus.capture import recorded
from mokus.console import one_sentence
from mokus.errors import MokusError
from mokus.low_rank import LowRankShift, applied
from mokus.qwen_image import BLOCK, LAYERS, TEXT, WEIGHT_STD, edited_layers, random_text_encoder

MODULES = ("mlp.gate_proj", "mlp.up_proj")

QUESTIONS, PREFIX, QUESTION, TAIL, ANSWER = 3, 34, 12, 5, 3  # questions, and tokens of each part of their rows
STEPS = 8
ETA = 1e-6  # UltraEdit's for Qwen2.5-7B
SOLVES = 20  # repeats of our solve

WANTED = {"solve_ratio": (">=", 500), "step_ratio": (">=", 5), "size_ratio": (">=", 500), "error_ours": ("<=", 1e-6)}


def say(sentence: str) -> None:
    """One line of progress on stderr."""
    print(sentence, file=sys.stderr, flush=True)


# --- the model and what it is asked ---------------------------------------------------------


def paths_of(layers: int) -> list[str]:
    """The edited weight matrices, lowest first."""
    return [f"model.language_model.layers.{i}.{name}" for i in edited_layers(layers) for name in MODULES]


def built(text: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model with random weights, in host memory; never twice, nor in another dtype."""
    return random_text_encoder(text, "cpu", dtype, WEIGHT_STD, BLOCK)


@dataclass(frozen=True)
class Asked:
    """Token rows ids (b, s): prefix, question, tail, answer without its last token; and the answers (b, n) to predict.

    The answer's tokens are predicted at the last n positions of each row.
    """

    ids: Tensor
    answers: Tensor

    @property
    def where(self) -> Tensor:
        """The mask (b, s - prefix) of the rows that are edited."""
        mask = torch.zeros(self.ids[:, PREFIX:].shape, dtype=torch.bool)
        mask[:, -ANSWER:] = True
        return mask

    def loss(self, logits: Tensor) -> Tensor:
        """The answers' cross-entropy, from logits (b, n, vocabulary)."""
        return F.cross_entropy(logits.float().flatten(0, 1), self.answers.flatten())


def asked(vocabulary: int) -> Asked:
    """Random questions: the same prefix, tail and answer in each row."""
    random = torch.Generator().manual_seed(1)

    def tokens(rows: int, n: int) -> Tensor:
        return torch.randint(vocabulary, (rows, n), generator=random).expand(QUESTIONS, -1)

    answers = tokens(1, ANSWER)
    parts = [tokens(1, PREFIX), tokens(QUESTIONS, QUESTION), tokens(1, TAIL), answers[:, :-1]]
    return Asked(torch.cat(parts, dim=1), answers)


# --- ours ---------------------------------------------------------


@dataclass(frozen=True)
class Captured:
    """At the edited rows, by module path: inputs (n, d_in), gradients (n, d_out) of standard deviation 1, float32."""

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass
class Prefix:
    """The prefix's keys and values (1, heads, tokens, head width) by layer; what follows is put behind them, not kept."""

    keys: list[Tensor]
    values: list[Tensor]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """What attention calls: the keys and values of all tokens so far."""
        return _behind(self.keys[layer], keys), _behind(self.values[layer], values)


def _behind(kept: Tensor, now: Tensor) -> Tensor:
    return torch.cat([kept.expand(len(now), -1, -1, -1), now], dim=2)


@dataclass(frozen=True)
class Kept:
    """What all steps of a knowledge share: what each layer is given beside the states, and the states (b, s, d) that enter
    the first edited layer, of the tokens after the prefix."""

    given: dict[str, Any]
    states: Tensor


@torch.no_grad()
def prefix_cache(model: Any, ids: Tensor) -> Prefix:
    """Run the prefix (1, tokens) through all layers."""
    cache = DynamicCache()
    model.model.language_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return Prefix([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers])


@torch.no_grad()
def kept(model: Any, prefix: Prefix, questions: Asked) -> Kept:
    """Run the questions through the layers below the first edited one."""
    text = model.model.language_model
    states = text.embed_tokens(questions.ids[:, PREFIX:])
    s = states.shape[1]
    later = torch.ones(s, PREFIX + s, dtype=torch.bool).triu(PREFIX + 1)
    mask = torch.zeros(1, 1, s, PREFIX + s, dtype=states.dtype).masked_fill(later, torch.finfo(states.dtype).min)
    at = text.rotary_emb(states, torch.arange(PREFIX, PREFIX + s).expand(3, 1, -1))
    given = {"attention_mask": mask, "position_embeddings": at, "past_key_values": prefix}
    for layer in text.layers[: edited_layers(len(text.layers)).start]:
        states = layer(states, **given)
    return Kept(given, states)


def captured(model: Any, kept: Kept, questions: Asked, shifts: Mapping[str, LowRankShift]) -> Captured:
    """One step's view, with the shifts so far: from the first edited layer on, no gradient of any weight."""
    text = model.model.language_model
    paths = paths_of(len(text.layers))
    with torch.enable_grad(), applied(model, shifts), recorded(model, paths) as record:
        states = kept.states
        for layer in text.layers[edited_layers(len(text.layers)).start :]:
            states = layer(states, **kept.given)
        logits = model.lm_head(text.norm(states[:, -ANSWER:]))
        gradients = record.gradients(questions.loss(logits), questions.where)
    return Captured(record.rows(questions.where), _standardised(gradients))


def _standardised(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: g / g.std().clamp(min=1e-30) for path, g in gradients.items()}


def thin(h: Tensor, gradients: Sequence[Tensor], eta: float = ETA) -> list[LowRankShift]:
    """dW = B A of several matrices with the same inputs h (n, d_in), for each one's gradients (n, d_out)."""
    h = h.double()
    a = torch.linalg.solve(h @ h.T + torch.eye(len(h), dtype=h.dtype), h).float()
    size = eta * (h * h).sum(dim=1).float()
    return [LowRankShift(a, -(size * g.T)) for g in gradients]


def thin_of_all(
    inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], eta: float = ETA
) -> dict[str, LowRankShift]:
    """The shift of every edited matrix; gate and up of a layer have the same inputs, so it is one solve for both."""
    shifts: dict[str, LowRankShift] = {}
    paths = list(inputs)
    with one_thread():
        for i in range(0, len(paths), len(MODULES)):
            layer = paths[i : i + len(MODULES)]
            shifts |= zip(layer, thin(inputs[layer[0]], [gradients[path] for path in layer], eta), strict=True)
    return shifts


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread: on a busy machine, waiting for a second costs far more than a 9 x 9 solve."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sum_of(before: Mapping[str, LowRankShift], now: Mapping[str, LowRankShift]) -> dict[str, LowRankShift]:
    """The shifts so far and one more step's: A is that of the first step in both, so the Bs are added."""
    return {path: LowRankShift(s.A, s.B + before[path].B) if before else s for path, s in now.items()}


# --- the reference ---------------------------------------------------------


def captured_by_backward(model: Any, questions: Asked) -> Captured:
    """As the peers do it: the whole model, logits of all tokens, gradients of the edited weights."""
    paths = paths_of(len(model.model.language_model.layers))
    weights = [model.get_submodule(path).weight for path in paths]
    for weight in weights:
        weight.requires_grad_()
    with torch.enable_grad(), recorded(model, paths) as record:
        logits = model(input_ids=questions.ids, use_cache=False).logits
        for output in record.outputs.values():
            output.retain_grad()
        questions.loss(logits[:, -ANSWER:]).backward()
    where = F.pad(questions.where, (PREFIX, 0))
    gradients = {path: output.grad[where].float() for path, output in record.outputs.items() if output.grad is not None}
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    return Captured(record.rows(where), _standardised(gradients))


def dense(h: Tensor, gradients: Tensor, eta: float = ETA) -> Tensor:
    """dW (d_out, d_in) by the d_in x d_in solve, in the dtype of the inputs h (n, d_in) and gradients (n, d_out)."""
    v = -eta * (h * h).sum(dim=1, keepdim=True) * gradients
    return torch.linalg.solve(h.T @ h + torch.eye(h.shape[1], dtype=h.dtype), h.T @ v).T


@torch.no_grad()
def add_to_weight(linear: nn.Linear, change: Tensor) -> None:
    """As the peers do it."""
    linear.weight += change.to(linear.weight.dtype)


# --- measuring ---------------------------------------------------------


@dataclass
class Clock:
    """Seconds of each part of a step, by name, as often as it was measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, name: str, part: Callable[..., Any], *given: Any) -> Any:
        """What the part returns for what it is given."""
        began = time.perf_counter()
        result = part(*given)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def medians(self) -> dict[str, float]:
        """By name."""
        return {name: median(times) for name, times in self.seconds.items()}


@dataclass(frozen=True)
class Measured:
    """Of one form: median seconds by part, `step` among them; what its first step saw; the peak so far, in GiB."""

    seconds: dict[str, float]
    first: Captured
    peak: float


def peak_gib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def measure_ours(model: Any, questions: Asked, steps: int) -> tuple[Measured, dict[str, LowRankShift]]:
    """One whole edit, and its shifts."""
    clock = Clock()
    prefix = clock("prefix", prefix_cache, model, questions.ids[:1, :PREFIX])
    shared = clock("layers below", kept, model, prefix, questions)
    shifts: dict[str, LowRankShift] = {}
    first: Any = None
    for step in range(steps):
        now = clock("capture", captured, model, shared, questions, shifts)
        first = first or now
        change = clock("solve", thin_of_all, first.inputs, now.gradients)
        shifts = clock("apply", sum_of, shifts, change)
        say(f"ours: step {step + 1}/{steps}, capture {clock.seconds['capture'][-1]:.2f} s")
    for _ in range(SOLVES):
        clock("solve", thin_of_all, first.inputs, first.gradients)
    seconds = clock.medians()
    seconds["once"] = seconds["prefix"] + seconds["layers below"]
    seconds["step"] = seconds["capture"] + seconds["solve"] + seconds["apply"]
    return Measured(seconds, first, peak_gib()), shifts


def measure_reference(model: Any, questions: Asked, captures: int) -> Measured:
    """One step, its capture several times. The weights are changed by it."""
    clock = Clock()
    seen: list[Captured] = []
    for i in range(captures):
        seen.append(clock("capture", captured_by_backward, model, questions))
        say(f"reference: capture {i + 1}/{captures}, {clock.seconds['capture'][-1]:.2f} s")
    first = seen[0]
    for i, (path, h) in enumerate(first.inputs.items(), start=1):
        change = clock("solve", dense, h, first.gradients[path])
        clock("apply", add_to_weight, model.get_submodule(path), change)
        del change
        say(f"reference: matrix {i}/{len(first.inputs)}, solve {clock.seconds['solve'][-1]:.2f} s")
    seconds = clock.medians()
    for part in ("solve", "apply"):
        seconds[part] = sum(clock.seconds[part])  # of all matrices
    seconds["step"] = seconds["capture"] + seconds["solve"] + seconds["apply"]
    return Measured(seconds, first, peak_gib())


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.to(b.dtype) - b).norm() / b.norm())


def errors(h: Tensor, gradients: Tensor) -> tuple[float, float]:
    """Of our solve and of the reference's, for one matrix, against the d_in x d_in solve in float64."""
    exact = dense(h.double(), gradients.double())
    (ours,) = thin(h, [gradients])
    return relative(ours.dense(), exact), relative(dense(h, gradients), exact)


def lost(weight: Tensor, change: Tensor) -> float:
    """The share of a change (d_out, d_in) that is rounded away when it is added to the weight in the weight's dtype."""
    return relative((weight + change.to(weight.dtype)).float() - weight.float(), change)


def lost_by_size(weight: Tensor, changes: Mapping[str, LowRankShift]) -> dict[str, dict[str, float]]:
    """Standard deviation of, and share lost by, named shifts and normal changes of two sizes."""
    result = {}
    for name, shift in changes.items():
        change = shift.dense()
        result[name] = {"std": float(change.std()), "lost": lost(weight, change)}
    for std in (1e-4, 1e-5):
        change = torch.empty(weight.shape).normal_(0, std, generator=torch.Generator().manual_seed(2))
        result[f"normal, {std:g}"] = {"std": std, "lost": lost(weight, change)}
    return result


def sizes(shifts: Mapping[str, LowRankShift]) -> dict[str, int]:
    """Bytes: of the factors as a file, module by module as in a pack, and of the same shifts as dense matrices."""
    tensors = {f"{path}.{side}": getattr(s, side).contiguous() for path, s in shifts.items() for side in "AB"}
    entries = sum(s.B.shape[0] * s.A.shape[1] for s in shifts.values())
    with TemporaryDirectory() as folder:
        file = Path(folder) / "shifts.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)  # shared memory is refused
        return {"ours": file.stat().st_size, "dense bfloat16": 2 * entries, "dense float32": 4 * entries}


def measure(text: Mapping[str, Any], steps: int = STEPS, captures: int = 2) -> dict[str, Any]:
    """All figures, for a model of this text configuration."""
    began = time.perf_counter()
    model = built(text)
    questions = asked(text["vocab_size"])
    weights = sum(weight.nbytes for weight in model.parameters()) / 2**30
    say(f"model of {weights:.1f} GiB built in {time.perf_counter() - began:.1f} s")
    ours, shifts = measure_ours(model, questions, steps)
    path = paths_of(text["num_hidden_layers"])[0]
    reference = measure_reference(model, questions, captures)
    error_ours, error_reference = errors(ours.first.inputs[path], ours.first.gradients[path])
    one_step = thin_of_all(ours.first.inputs, ours.first.gradients)[path]
    rounding = lost_by_size(model.get_submodule(path).weight, {"one step": one_step, "all steps": shifts[path]})
    size, step = sizes(shifts), reference.seconds["step"]
    return {
        "solve_ratio": reference.seconds["solve"] / ours.seconds["solve"],
        "capture_ratio": reference.seconds["capture"] / ours.seconds["capture"],
        "step_ratio": step / ours.seconds["step"],
        "step_ratio_prefix_rerun": step / (ours.seconds["step"] + ours.seconds["prefix"]),
        "size_ratio": size["dense bfloat16"] / size["ours"],
        "size_ratio_float32": size["dense float32"] / size["ours"],
        "error_ours": error_ours,
        "error_reference": error_reference,
        "seconds_per_knowledge": ours.seconds["once"] + steps * ours.seconds["step"],
        "seconds_per_knowledge_reference": steps * step,
        "peak_memory_gib": peak_gib(),
        "peak_memory_gib_ours": ours.peak,
        "peak_memory_gib_reference": reference.peak,
        "weights_gib": weights,
        "lost_by_bf16": rounding,
        "difference_inputs": relative(ours.first.inputs[path], reference.first.inputs[path]),
        "difference_gradients": relative(ours.first.gradients[path], reference.first.gradients[path]),
        "seconds": {"ours": ours.seconds, "reference": reference.seconds},
        "bytes": size,
        "rows": len(ours.first.inputs[path]),
        "matrices": len(shifts),
        "layers": text["num_hidden_layers"],
        "steps": steps,
        "threads": torch.get_num_threads(),
    }


def missed(figures: Mapping[str, Any]) -> list[str]:
    """The figures that are not as wanted."""
    return [
        key
        for key, (kind, limit) in WANTED.items()
        if not (figures[key] >= limit if kind == ">=" else figures[key] <= limit)
    ]


# --- the command ---------------------------------------------------------


def _tables(figures: dict[str, Any]) -> list[Table]:
    parts = Table("seconds", "ours", "reference", box=None, pad_edge=False)
    ours, reference = figures["seconds"]["ours"], figures["seconds"]["reference"]
    for part in ("once", "capture", "solve", "apply", "step"):
        parts.add_row(part, f"{ours[part]:.4f}", f"{reference[part]:.4f}" if part in reference else "")
    table = Table("figure", "value", "wanted", "", box=None, pad_edge=False)
    misses = missed(figures)
    for key, value in figures.items():
        if isinstance(value, (int, float)):
            kind, limit = WANTED.get(key, ("", None))
            verdict = "" if limit is None else "miss" if key in misses else "pass"
            table.add_row(key, f"{value:.4g}", "" if limit is None else f"{kind} {limit:g}", verdict)
    for name, each in figures["lost_by_bf16"].items():
        table.add_row(f"lost_by_bf16, {name}", f"{each['lost']:.1%} at std {each['std']:.1e}", "", "")
    return [parts, table]


def check(layers: int) -> None:
    """Raises `MokusError` for a number of layers that cannot be, or that this machine's memory cannot hold."""
    if not 2 <= layers <= LAYERS:
        raise MokusError(f"--layers got {layers}, expected 2 to {LAYERS}.")
    needed = 5 + 0.44 * layers + 0.13 * len(paths_of(layers))  # GiB: weights, gradients of the edited ones, the solves
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed > there:
        raise MokusError(
            f"--layers {layers} needs about {needed:.0f} GiB and this machine has {there:.0f}; give fewer layers."
        )


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")] = False,
    layers: Annotated[int, typer.Option(help=f"Of the text encoder: 2 to {LAYERS}.")] = LAYERS,
) -> None:
    """Measure one edit at real size."""
    with one_sentence():
        check(layers)
        figures = measure({**TEXT, "num_hidden_layers": layers})
    if as_json:
        print(json.dumps({**figures, "missed": missed(figures)}, indent=2))
        return
    for table in _tables(figures):
        Console().print(table, "")


if __name__ == "__main__":
    typer.run(main)
