"""The paper's own figures: another model, other photos, other prompts. To be read beside ours, never compared with them.

Table 1 is as in three public reading notes of the paper that agree with each other, table 2 as in two of them; its sweeps
of the step size and the layers are left out, since those notes contradict each other there.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2603.12743, tables 1 and 2"
MODEL = "Qwen-Image"


@dataclass(frozen=True)
class Heading:
    """A column of the paper's table, and what of ours is closest to it."""

    kind: str  # "reconstruction" or "generation"
    name: str  # as the paper calls it
    column: str  # ours; the paper does not say which side it segments, nor which prompt it scores


HEADINGS = (
    Heading("reconstruction", "CLIP-I", "clip_i"),
    Heading("reconstruction", "CLIP-I-Seg", "clip_i_seg_source"),
    Heading("generation", "CLIP-I", "clip_i"),
    Heading("generation", "CLIP-I-Seg", "clip_i_seg_source"),
    Heading("generation", "CLIP-T", "clip_t"),
    Heading("generation", "Pick", "pick"),
)


@dataclass(frozen=True)
class Line:
    """A row of the paper's table."""

    name: str  # as the paper calls it
    method: str  # ours that does the same
    figures: tuple[float, ...]  # one for each of `HEADINGS`
    minutes: float  # of training, for five pieces of knowledge

    def figure(self, heading: Heading) -> float:
        """The figure below a heading."""
        return self.figures[HEADINGS.index(heading)]


TABLE = (
    Line("Naive-DB", "naive-db", (0.874, 0.758, 0.789, 0.717, 0.291, 20.80), 27),
    Line("Enc-FT", "enc-ft", (0.582, 0.553, 0.591, 0.562, 0.197, 18.34), 10),
    Line("MoKus", "mokus-paper", (0.867, 0.764, 0.761, 0.718, 0.305, 21.30), 6),
)

# pieces of knowledge: reconstruction CLIP-I-Seg, generation CLIP-T, seconds of training
KNOWLEDGE = {1: (0.761, 0.304, 331.3), 3: (0.761, 0.305, 345.1), 5: (0.764, 0.305, 360.0)}
