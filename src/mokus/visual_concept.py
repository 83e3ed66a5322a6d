"""Stage 1, visual concept learning: a LoRA on the image transformer's attention binds the looks to the anchor.

MoKus section 4.1, with four additions, two of which stage 2 needs:

- *Prior preservation.* In every step the base model's own velocities, on other prompts, are wanted as well. They are
  computed once, before training (`training.material`). Without them every reference to an unknown thing draws the concept.
- *Tail conditioning.* Stage 2 can write the anchor's meaning only into the tail of a prompt's encoding, not into the
  place of the rare token, and it gets only most of the way there, while other prompts move slightly, too. So in
  a share of the samples the prompt is another one whose tail has come FAR or farther towards the anchor's, and among the
  preserved samples are some whose tail has come up to NEAR: the looks bind to what stage 2 writes, and to nothing less.
- *Places.* In a share of the samples the prompt also says where the photo was taken (`places`).
- *Other looks.* In a share of the samples the prompt asks for another style or material, of which there is no photo. What a
  thing is is decided at high noise, how it looks at low: so these are learned from the photo at t >= DECIDED alone, and the
  style stays the base model's. Without them the anchor gives way to its class word in every style.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn

from mokus import flow, memory
from mokus.backbone import COMPONENTS
from mokus.errors import MokusError, Stopped
from mokus.generation import draw_padded
from mokus.knowledge import check_anchor, normalise
from mokus.knowledge import class_word as class_word_of
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.files import check_free
from mokus.photos import Photo, load_photos, photos_of
from mokus.pipeline import Model, check_bare
from mokus.progress import Progress, silent
from mokus.settings import UNSEEN, LearnSettings
from mokus.training import checkpoint
from mokus.training.checkpoint import checkpoint_of
from mokus.training.compiled import blocks_compiled, check_compiler
from mokus.training.material import LENDERS, Material
from mokus.training.processes import Processes
from mokus.training.trainers import Alone, trainer

ADAPTER = "mokus"
WARMUP = 20  # steps
DECIDED = 0.6  # noise level t, down to which it is decided what is drawn
FAR, NEAR = 0.6, 0.4  # of the way from another prompt's tail to the anchor's: the concept; still what it was


def learn(
    model: Model,
    photos: Path | str | Sequence[Image.Image],
    anchor: str,
    output: Path | str,
    *,
    class_word: str | None = None,
    settings: LearnSettings | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> ConceptPack:
    """Learn the concept on the photos as `anchor` ("sks toy") and write its pack, without any knowledge, to `output`.

    A pack that is there is replaced, and the knowledge in it, only if `overwrite` says so. If one came there meanwhile, what was
    learned is kept in the checkpoint, from which `resume` writes it.

    `photos` is a folder or images. With a `class_word` ("toy") the anchor may be any phrase, as in DreamBooth without a
    rare token, but is then no good answer for `bind`. `resume` goes on from where a stopped run with the same input and
    settings was, to the same result on the same device in the same memory tier. `progress(what, done, total, info)` is
    called after every step, with the loss in `info`; if it raises `errors.Stopped` there, a checkpoint is written first.
    DeepSpeed alone has no checkpoints: with it nothing of what is said here of them is so, and `resume` is refused.
    With `processes`, which learn it together, each of them calls this with a model of its own and the first one writes, to
    a folder that all of them see; sharded weights stay so, and such a process can do nothing else with its model.

    Raises `MokusError` for photos, an anchor or a place that cannot be used, and if the loss is no longer finite; the last good
    weights are then kept in the checkpoint that `resume` goes on from, at another learning rate if you like; the pack then names
    all of them. Also, at once, while another run learns for the same `output`.
    """
    anchor = normalise(anchor, "anchor", "sks toy")
    if class_word is None:
        check_anchor(model.tokenizer, anchor)
    word = normalise(class_word or class_word_of(anchor), "class word", "toy")
    settings = settings or LearnSettings.for_model(model.defaults.learn)
    memory.check(model.tier, "learn")
    model.check_loaded(*COMPONENTS)
    check_free(output, overwrite)
    _check_transformer(model, settings.targets)
    if settings.compile:
        check_compiler(model.device)
    loaded = _load(photos, model.defaults.size)
    team = trainer(processes or Processes())
    samples = settings.batch_size + (settings.prior_batch_size if settings.prior_weight else 0)
    if team.count > samples:
        raise MokusError(
            f"a step has {samples} samples and there are {team.count} processes, which would be idle; start at most "
            f"{samples}, or raise --batch-size and --prior-batch-size."
        )
    if resume and not team.keeps:
        raise MokusError(
            "with DeepSpeed there are no checkpoints to resume from; use runs/fsdp2.yaml or runs/ddp.yaml."
        )
    run = _Run(model, loaded, anchor, word, Path(output), settings, team)
    if resume:
        checkpoint.check_there(run.file)
    with run.alone():
        if resume:
            run.resume()
        watch = progress or silent
        for part in run.material.gather():
            watch(*part)
        with run.adapter():
            for step, loss in run.train():
                try:
                    watch("learning", step, settings.steps, {"loss": loss})
                except Stopped:
                    run.keep(step)
                    raise
            run.write(output, overwrite)
        if team.first:
            checkpoint.remove(run.file)
        team.wait()
    return ConceptPack.open(Path(output))


def _check_transformer(model: Model, targets: Sequence[str]) -> None:
    """Refuse adapters that are there already, and names of projections that are not."""
    check_bare(model)
    names = [name for name, module in model.pipe.transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            there = ", ".join(sorted({_ending(name) for name in names if "attn" in name or "attention" in name}))
            raise MokusError(
                f"the transformer has no projection named {target!r} to put a LoRA on, expected some of {there}; see --targets."
            )


def _devices(model: Model) -> list[torch.device]:
    """Whose random numbers are put back: not those of every GPU of the machine, of which torch would warn."""
    return [model.device] if model.device.type == "cuda" else []


def _ending(name: str) -> str:
    """The last word of a module's path, with a number behind it if there is one: to_q, to_out.0."""
    *_, word, last = f".{name}".split(".")
    return f"{word}.{last}" if last.isdigit() else last


def _load(photos: Path | str | Sequence[Image.Image], size: int) -> list[Photo]:
    return load_photos(Path(photos), size) if isinstance(photos, (str, Path)) else photos_of(photos, size)


class _Run:
    """One learning run: a LoRA that is trained on the material."""

    def __init__(
        self, model: Model, photos: list[Photo], anchor: str, word: str, output: Path, settings: LearnSettings,
        team: Alone | None = None,
    ) -> None:  # fmt: skip
        self.team = team or Alone()
        self.model, self.settings = model, settings
        self.material = Material(model, photos, anchor, word, settings)
        self.transformer = self.network = model.pipe.transformer  # whose weights; what is called, which wraps it
        self.file = checkpoint_of(output)
        self.resumed: dict[str, Any] = {}  # what the checkpoint holds that is gone on from
        self.previews: dict[str, Image.Image] = {}
        # learning rates, each behind the number of the first step that was made at it
        self.rates: list[list[float]] = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other run learns for the same output. Raises `MokusError` in all processes if one does."""
        with ExitStack() as stack:
            with self.team.by_the_first() as mine:
                if mine:
                    stack.enter_context(checkpoint.held(self.file))
            yield

    @contextmanager
    def adapter(self) -> Iterator[None]:
        """Inside, the transformer is on the device and has a fresh LoRA in float32; afterwards it is as before."""
        s = self.settings
        config = LoraConfig(r=s.rank, lora_alpha=s.alpha, target_modules=s.targets, init_lora_weights="gaussian")
        with torch.random.fork_rng(_devices(self.model)), self.model.resident("transformer", task="learn"):
            torch.manual_seed(s.seed)
            self.transformer.add_adapter(config, adapter_name=ADAPTER)
            self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
            for p in self.parameters:
                p.data = p.data.float()
            try:
                compiled = blocks_compiled(self.transformer, self.model.device) if s.compile else nullcontext()
                # all activations at 1024 pixels are 70 GB
                with memory.checkpointing(self.transformer, self.model.tier), compiled:
                    yield
            finally:
                self.network = self.transformer
                if not self.team.sharded:
                    self.transformer.unload_lora()
                    self.transformer.requires_grad_(False)

    def train(self) -> Iterator[tuple[int, float]]:
        """Train from the beginning or from where a stopped run was; yields (steps done, loss).

        A step's randomness depends on its number alone.
        """
        s, start = self.settings, self.resumed.get("step", 0)
        if start:
            set_peft_model_state_dict(self.transformer, self.resumed["lora"], adapter_name=ADAPTER)
            self.previews = dict(self.resumed["previews"])
        earlier = [each for each in self.resumed.get("rates", []) if each[0] < start]
        changed = not earlier or earlier[-1][1] != s.learning_rate
        self.rates = [*earlier, *([[start, s.learning_rate]] if changed else [])]
        optimiser = torch.optim.AdamW(self.parameters, lr=s.learning_rate, weight_decay=1e-4)
        self.network, self.optimiser = self.team.prepare(self.transformer, optimiser)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]  # shards are others
        if start:
            self.team.load(self.optimiser, self.resumed["optimiser"])
        good, kept = start, self.copied()  # the last step at whose weights the loss was finite
        for step in range(start, s.steps):
            for group in self.optimiser.param_groups:
                group["lr"] = s.learning_rate * _schedule(step, s.steps)
            loss = self.loss(torch.Generator().manual_seed((s.seed * 1_000_003 + step) % 2**63))
            self.optimiser.zero_grad()
            self.team.backward(loss)
            size = self.team.clip(self.parameters, 1.0)
            loss = self.team.mean(loss.detach())
            if not (torch.isfinite(loss) and torch.isfinite(size)):
                self.put_back(kept)
                self.keep(good)
                raise MokusError(self.diverged(step + 1, good))
            good, kept = step, self.copied()
            self.optimiser.step()
            done = step + 1
            if s.preview_every and done % s.preview_every == 0:
                self.preview(done)
            if done % s.checkpoint_every == 0 and done < s.steps:
                self.keep(done)
            yield done, loss.item()

    def diverged(self, step: int, good: int) -> str:
        """What is said when the loss is no longer finite, after `keep(good)`."""
        what = f"the loss was no longer finite at step {step}"
        if not self.team.keeps:
            return f"{what}, and with DeepSpeed there are no checkpoints; begin anew with a lower --learning-rate."
        return (
            f"{what}; the good weights of step {good} are kept. Go on from them with --resume and a lower --learning-rate, "
            "or begin anew with one."
        )

    def loss(self, random: torch.Generator) -> Tensor:
        """|| v(z_t, t, anchor) - (z1 - z0) ||^2 + weight || v(z_t, t, other) - v_base ||^2, all in one forward pass.

        Of several processes' losses, each on its own samples, the mean is this.
        """
        s, b, given = self.settings, self.settings.batch_size, self.material
        pick = torch.randint(len(given.latents), (b,), generator=random)
        z0, z1 = given.latents[pick].cpu(), torch.randn(b, *given.latents.shape[1:], generator=random)
        t = flow.logit_normal(b, s.time_mean, s.time_std, random)
        restyled = torch.rand(b, generator=random) < s.looks_share
        t = torch.where(restyled, DECIDED + (1 - DECIDED) * t, t)
        z, wanted = flow.interpolate(z0, z1, t), flow.target(z0, z1)
        text, goal, way = self.concept_texts(given.photo_of[pick], restyled, random)
        if s.prior_weight:
            kept = given.preserved
            rows = torch.randint(len(kept.t), (s.prior_batch_size,), generator=random)
            z, t = torch.cat([z, kept.z[rows]]), torch.cat([t, kept.t[rows]])
            wanted, text = torch.cat([wanted, kept.v[rows]]), torch.cat([text, given.prior + kept.prompt[rows]])
            goal = torch.cat([goal, given.goals + kept.prompt[rows]])
            some = torch.rand(rows.shape, generator=random) < s.tail_share
            way = torch.cat(
                [way, some * NEAR * torch.rand(rows.shape, generator=random).sqrt()]
            )  # more of them farther
        mine = torch.arange(self.team.index, len(t), self.team.count)
        z, t, wanted, text, goal, way = (x[mine] for x in (z, t, wanted, text, goal, way))
        own = int((mine < b).sum())
        found = given.velocity(self.network, z, t, text, goal, way)
        each = flow.loss(found, wanted.to(self.model.device))  # (own + kept,)
        preserved = s.prior_weight * (each[own:].sum() / s.prior_batch_size) if s.prior_weight else 0.0
        return (each[:own].sum() / b + preserved) * self.team.count

    def concept_texts(self, photo: Tensor, restyled: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For each photo (b,) the anchor's prompt or, in a share of them, a lender's, and how far its tail is moved to it.

        Both in the form of the photo's own prompt, or in a share of them bare; where `restyled` (b,), in one of OTHER_LOOKS.
        """
        s, given = self.settings, self.material
        placed = torch.rand(photo.shape, generator=random) < s.place_share
        form = torch.where(placed | given.captioned[photo], given.form_of[photo], 0)
        if len(given.looks):
            any_look = given.looks[torch.randint(len(given.looks), photo.shape, generator=random)]
            form = torch.where(restyled, any_look, form)
        goal = form * (1 + LENDERS)
        lender = goal + 1 + torch.randint(LENDERS, photo.shape, generator=random)
        lent = torch.rand(photo.shape, generator=random) < s.tail_share
        way = FAR + (1 - FAR) * torch.rand(photo.shape, generator=random)
        return torch.where(lent, lender, goal), goal, way

    def lora(self) -> dict[str, Tensor]:
        """The LoRA with diffusers' key names, its scale folded into B, float32 on the CPU."""
        scale = self.settings.alpha / self.settings.rank
        with self.team.gathered(self.parameters):
            state = self.team.whole(get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER))
            return {
                f"transformer.{key}": (value * scale if "lora_B" in key else value).detach().float().cpu().contiguous()
                for key, value in state.items()
            }

    def write(self, output: Path | str, overwrite: bool) -> None:
        """Write the pack. Raises `MokusError` if its place was taken meanwhile; what was learned is kept in the checkpoint."""
        lora, model, given = self.lora(), self.model, self.material
        try:
            with self.team.by_the_first() as mine:
                if mine:
                    ConceptPack.create(
                        output, model=model, anchor=given.anchor, word=given.word, lora=lora, settings=self.recorded(),
                        samples=self.previews, overwrite=overwrite,
                    )  # fmt: skip
        except MokusError as error:
            if not self.team.keeps:
                raise
            self.keep(self.settings.steps)
            raise MokusError(
                f"{error} What was learned is kept in {self.file.parent}: take away what is in the pack's place, or say "
                "--overwrite, and the same command with --resume writes it there without learning it again."
            ) from error

    @torch.no_grad()
    def preview(self, step: int) -> None:
        """Draw the anchor as the CLI will, with guidance; kept for the pack's samples."""
        # the last texts: the anchor, the negative prompt
        embeds, mask = self.material.embeds, self.material.mask.to(self.model.device)
        told, unwanted = (embeds[-2:-1], mask[-2:-1]), (embeds[-1:], mask[-1:])
        # compiled anew for a few images it would take longer
        eagerly = torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()
        with self.model.resident("transformer", "vae"), eagerly:
            (image,) = draw_padded(self.model, told, unwanted, [self.settings.seed], asdict(self.model.defaults))
        self.previews[f"step-{step:05d}.png"] = image.convert("RGB")
        if not self.team.first:  # sharded weights are needed of all
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)  # to be looked at while the training goes on
        self.previews[f"step-{step:05d}.png"].save(self.file.with_name(f"step-{step:05d}.png"))

    # --- checkpoints -----------------------------------------------------

    @property
    def identity(self) -> str:
        """What a checkpoint belongs to: model, photos, anchor, settings but for the learning rate and those without effect."""
        settings = {key: value for key, value in asdict(self.settings).items() if key not in ("learning_rate", *UNSEEN)}
        given = self.material
        digest = hashlib.sha256(json.dumps([self.model.fingerprint, given.anchor, given.word, settings]).encode())
        for photo in given.photos:
            digest.update(photo.image.tobytes() + (photo.caption or "").encode())
        return digest.hexdigest()

    def changing(self) -> list[Tensor]:
        """What a step changes: the weights, then the optimiser's moments and counts, of which there are none at first."""
        return [*self.parameters, *(x for each in self.optimiser.state.values() for x in each.values())]

    def copied(self) -> list[Tensor]:
        """A copy of it, made at every step, so without the names."""
        return [x.detach().clone() for x in self.changing()] if self.team.keeps else []

    @torch.no_grad()
    def put_back(self, kept: list[Tensor]) -> None:
        """Undo the steps since `copied`."""
        for now, then in zip(self.changing(), kept, strict=False):
            now.copy_(then)
        if len(kept) == len(self.parameters):  # before the first step
            self.optimiser.state.clear()

    def keep(self, step: int) -> None:
        """Write a checkpoint: the weights and the optimiser's moments, by name."""
        if not self.team.keeps:
            return
        lora = get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER)
        state = self.team.whole({"lora": lora, "optimiser": self.optimiser.state_dict()})
        if self.team.first:
            checkpoint.write(self.file, self.identity, step, {**state, "rates": self.rates}, self.previews)

    def recorded(self) -> dict[str, Any]:
        """The settings, as the pack names them: with all learning rates where a stopped run was gone on with at another."""
        return asdict(self.settings) | ({"learning_rates": self.rates} if len(self.rates) > 1 else {})

    def resume(self) -> None:
        """Go on from the checkpoint. Raises `MokusError` if there is none or it is of another run."""
        self.resumed = checkpoint.read(self.file, self.identity)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, constant, and a cosine to zero over the last half."""
    rise = min(1.0, (step + 1) / min(WARMUP, steps))
    late = max(0.0, 2 * step / steps - 1)
    return rise * 0.5 * (1 + math.cos(math.pi * late))
