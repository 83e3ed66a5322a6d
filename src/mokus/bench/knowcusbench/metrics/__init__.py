"""The metrics, one small file each, behind one protocol: images in, figures out.

The models of real suites come from the hub, each at one commit. The commits in `MODELS` were taken from what public
projects pin, not from the hub itself; which one was loaded stands beside every score, with the libraries' versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mokus.errors import MokusError

if TYPE_CHECKING:
    from PIL import Image

METRICS = ("clip", "clip_i_seg", "dino", "pick", "oracle")

# An id of the hub, at a commit; `pick_processor` is what PickScore was trained with.
MODELS = {
    "clip": "openai/clip-vit-base-patch32@3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "dino": "facebook/dino-vits16@abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd",
    "pick": "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800",
    "pick_processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "detector": "IDEA-Research/grounding-dino-tiny@a2bb814dd30d776dcf7e30523b00659f4f141c71",
    "segmenter": "facebook/sam2.1-hiera-tiny@de431c4043854a71d8101e17995dfe596bf101a5",
}

Values = dict[str, float | None]
About = dict[str, str | None]


@dataclass(frozen=True)
class Shown:
    """One image as a metric sees it: with what was asked for, and the photos that show what the concept looks like."""

    image: Image.Image
    prompt: str  # with the knowledge
    class_prompt: str  # with the class word in its place
    class_word: str
    concept: str
    references: tuple[Image.Image, ...]  # the same object for all images of a concept: what is known of it is kept
    expected: Mapping[str, str]  # what the oracle shall read; empty: nothing
    masks: tuple[Image.Image, ...] = ()  # of the references' subjects, mode L, where they are known exactly: of renders


class Metric(Protocol):
    """Figures of images. None is a miss: there was nothing to measure, which is counted and never left out."""

    name: str
    columns: tuple[str, ...]  # what it measures; each is in every result
    about: About  # ids, commits and versions of all that decides a figure; another `about` is another metric

    def __call__(self, shown: Sequence[Shown]) -> list[Values]:
        """The columns of every image. An image's figures do not depend on what else is shown, up to rounding in batches."""
        ...


def metrics_for(
    rendered: bool,
    without: Sequence[str] = (),
    device: str | None = None,
    *,
    clip: str | None = None,
    dino: str | None = None,
    pick: str | None = None,
    detector: str | None = None,
    segmenter: str | None = None,
) -> list[Metric]:
    """The metrics of a suite, loaded: of `rendered` characters with the models in the package, else those of `MODELS`.

    `without`: names of some to leave out. `clip` and the others: another model, "owner/name", "owner/name@revision" or
    a folder; such a suite has `dino` and `pick` only if they are named. `device`: "cpu", "cuda"; a GPU if there
    is one. Raises `MokusError` for an unknown metric, or for a model that cannot be had or is of another kind.
    """
    if unknown := [name for name in without if name not in METRICS]:
        raise MokusError(f"there is no metric {unknown[0]!r} to leave out, expected some of {', '.join(METRICS)}.")
    named = {"dino": dino, "pick": pick}
    standard = ("clip", "clip_i_seg", *(n for n in named if named[n]), "oracle") if rendered else METRICS[:-1]
    wanted = [name for name in standard if name not in without]

    from mokus.bench.knowcusbench.metrics import clip as clips
    from mokus.bench.knowcusbench.metrics import segmentation

    found: list[Metric] = []
    if {"clip", "clip_i_seg"} & {*wanted}:
        encoder = (
            clips.miniature(device) if rendered and not clip else clips.Encoder(clip or MODELS["clip"], device=device)
        )
    if "clip" in wanted:
        found.append(clips.Clip(encoder))
    if "clip_i_seg" in wanted:
        if rendered and not (detector or segmenter):
            cutter: segmentation.Segmenter = segmentation.Miniature()
        else:
            cutter = segmentation.GroundedSam(
                detector or MODELS["detector"], segmenter or MODELS["segmenter"], device=device
            )
        found.append(segmentation.ClipISeg(encoder, cutter))
    if "dino" in wanted:
        from mokus.bench.knowcusbench.metrics.dino import Dino

        found.append(Dino(dino or MODELS["dino"], device=device))
    if "pick" in wanted:
        from mokus.bench.knowcusbench.metrics.pickscore import Pick

        found.append(Pick(pick or MODELS["pick"], processor=None if pick else MODELS["pick_processor"], device=device))
    if "oracle" in wanted:
        from mokus.bench.knowcusbench.metrics.oracle import Oracle

        found.append(Oracle())
    return found
