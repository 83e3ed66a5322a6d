"""Settings of the two stages: plain numbers with their help texts, of which the command line makes its options.

The defaults are for Qwen-Image, after the paper where it says what it used; those of the edit's size (eta, steps,
alignment) are ours and have not been tried at that size. A model folder may bring its own (`mokus_defaults.json`), which
stand between these and what the user says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Self, get_args, get_origin, get_type_hints

from mokus.errors import MokusError

if TYPE_CHECKING:
    from mokus.pipeline import Defaults

SEEDS = 1 << 64  # of images: seeds are less, which is what torch's random generators take
MOST_SEED = 1 << 62  # of learning: some generators take 63 bits, and a little is added to it
AT_ONCE = 8  # images drawn at a time, unless the user says otherwise: what the doctor plans with
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def _set(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


_KINDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a name", list[str]: "a list of names",
    list[int]: "a list of whole numbers",
}  # fmt: skip


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value, of a model's defaults as a rule, is of a field's type."""
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_fits(each, get_args(kind)[0]) for each in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


class _Settings:
    @classmethod
    def for_model(cls, defaults: Mapping[str, Any], **chosen: Any) -> Self:
        """The model's own defaults, then what was chosen; an unknown name is an error with a suggestion."""
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in (*defaults, *chosen):
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise MokusError(
                    f"{name!r} is no setting of {cls.__name__}; "
                    + (f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}.")
                )
        hints = get_type_hints(cls)
        for name, value in (*defaults.items(), *chosen.items()):
            if not _fits(value, hints[name]):
                raise MokusError(f"{name} is {repr(value)[:60]}, expected {_KINDS[hints[name]]}; correct it.")
        return cls(**{**defaults, **chosen})

    def _finite(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise MokusError(f"{each.name} is {value}, expected a finite number; correct it.")

    def _shares(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise MokusError(f"{name} is {value}, expected a share from 0 to 1.")

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value < least:
                raise MokusError(f"{name} is {value}, expected at least {least:g}; choose a larger one.")


# of `LearnSettings`, those that do not change what is learned, but for rounding
UNSEEN = ("compile", "preview_every", "checkpoint_every")


@dataclass(frozen=True)
class LearnSettings(_Settings):
    """Stage 1, visual concept learning."""

    steps: int = _set(500, "Training steps.")
    rank: int = _set(4, "Rank of the LoRA.")
    alpha: float = _set(4.0, "The LoRA is scaled by alpha / rank.")
    targets: list[str] = _set(ATTENTION, "Projections of each attention block that get a LoRA.")
    learning_rate: float = _set(2e-4, "Of AdamW; constant after a short warm-up, cosine to zero in the last half.")
    batch_size: int = _set(1, "Photos in each step.")
    time_mean: float = _set(0.0, "Mean of logit(t); above 0 leans towards noise.")
    time_std: float = _set(1.0, "Standard deviation of logit(t).")
    tail_share: float = _set(0.5, "Share of samples in which only the tail of the prompt's encoding is the anchor's.")
    place_share: float = _set(0.5, "Share of samples whose prompt says the place, too; 0 is the anchor alone.")
    looks_share: float = _set(
        0.25, "Share of samples whose prompt asks for another style or material, learned at high noise alone."
    )
    prior_weight: float = _set(1.0, "Weight of prior preservation; 0 is none.")
    prior_batch_size: int = _set(1, "Preserved samples in each step.")
    prior_prompts: int = _set(24, "Prompts whose images by the base model are preserved.")
    prior_steps: int = _set(8, "Points on the base model's path to each of them.")
    crop: bool = _set(False, "Crop photos at random, up to an eighth of their sides.")
    flip: bool = _set(False, "Mirror photos at random.")
    preview_every: int = _set(0, "Draw the anchor every so many steps; 0 is never.")
    checkpoint_every: int = _set(100, "Steps between the checkpoints that --resume goes on from.")
    compile: bool = _set(
        False,
        "Compile the image transformer's blocks: a minute at first, then faster steps; on a CPU by a C++ compiler.",
    )
    seed: int = _set(0, "Equal seeds on the same machine give equal bytes; on a GPU nearly so.")

    def __post_init__(self) -> None:
        self._finite()
        self._at_least(
            1, "steps", "rank", "batch_size", "prior_batch_size", "prior_prompts", "prior_steps", "checkpoint_every"
        )
        self._at_least(0, "learning_rate", "time_std", "prior_weight", "preview_every", "seed")
        self._shares("tail_share", "place_share", "looks_share")
        if self.seed >= MOST_SEED:
            raise MokusError(f"seed is {self.seed}, expected less than 2^62; choose a smaller one.")
        if not self.targets:
            raise MokusError(
                f"targets is empty, expected names of attention projections such as {' '.join(ATTENTION)}."
            )


@dataclass(frozen=True)
class EditSettings(_Settings):
    """Stage 2, textual knowledge updating."""

    editor: str = _set("least_drift", "The editor: how shifts are found.")
    layers: list[int] = _set(list(range(18, 26)), "Layers of the text encoder that are edited.")
    modules: list[str] = _set(["mlp.gate_proj", "mlp.up_proj"], "Matrices of each layer that are edited.")
    steps: int = _set(16, "Steps of the search for an edit.")
    alignment: float = _set(0.88, "Wanted: how far the encoding of image prompts has moved to the anchor's, 0 to 1.")
    least_alignment: float = _set(0.6, "Below this, knowledge has not taken.")
    answer_weight: float = _set(1.0, "Weight of the answer's loss; 0 leaves the alignment alone.")
    alignment_weight: float = _set(1.0, "Weight of the alignment's loss; 0 is the paper's edit of the answer alone.")
    drift_weight: float = _set(0.02, "Weight of what an edit changes elsewhere, as a share of the outputs' energy.")
    near_weight: float = _set(
        1.0, "Weight of how far prompts that are watched are from where they belong; 0 watches none."
    )
    rivals: int = _set(
        64,
        "At most so many of the prompts that are watched join the loss, those furthest off: 16, and one for each earlier edit.",
    )
    near_misses: int = _set(8, "Phrases one word off the knowledge that count as elsewhere.")
    exchanged: int = _set(24, "Phrases with other words in the place of the knowledge's that count as elsewhere.")
    preserve: int = _set(96, "Prompts about the class word that count as elsewhere.")
    corpus: int = _set(600, "Prompts of the corpus that statistics are gathered over, besides the model's own.")
    odd_references: int = _set(2000, "References in random words in that corpus.")
    eta: float = _set(1e-6, "Step size or learning rate of the editors that have one.")
    ridge: float = _set(1.0, "Weight of the statistics in memit, of the identity in alphaedit.")
    null_space: float = _set(
        0.02, "alphaedit: directions with less than this share of the mean second moment are free."
    )

    def __post_init__(self) -> None:
        self._finite()
        self._shares("alignment", "least_alignment")
        self._at_least(1, "steps")
        self._at_least(
            0, "answer_weight", "alignment_weight", "drift_weight", "near_weight", "rivals",
            "near_misses", "exchanged", "preserve", "corpus", "odd_references", "eta", "ridge", "null_space",
        )  # fmt: skip
        if not self.layers or not self.modules:
            raise MokusError("layers and modules must name at least one matrix of the text encoder to edit.")

    @classmethod
    def for_editor(cls, defaults: Defaults, **chosen: Any) -> EditSettings:
        """What the editor's authors use, then the model's defaults, in general and for this editor, then what was chosen.

        Raises `MokusError` for what was chosen and means nothing to the editor.
        """
        from mokus.editors import settings_of, settings_used

        name = chosen.get("editor") or defaults.edit.get("editor") or cls().editor
        used = ("editor", *settings_used(name))
        if idle := [each for each in chosen if each not in used and each in {f.name for f in fields(cls)}]:
            raise MokusError(
                f"{idle[0]} means nothing to the editor {name!r}, which goes by {', '.join(used[1:])}; leave it out."
            )
        return cls.for_model({**settings_of(name), **defaults.edit, **defaults.editors.get(name, {})}, **chosen)
