"""`mokus demo`: all of the method on one concept, told as a story that `mokus.report` writes down.

Learn a concept from photos, bind knowledge, ask and draw before and after, unbind one piece again. The photos are the
user's, or renders of a character of the synthetic world that the miniature has never seen. Of the latter an oracle can
tell what an image shows, so only then does the story have figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mokus.generation import generate
from mokus.knowledge_update import Edit, ask, bind, unbind
from mokus.photos import load_photos
from mokus.visual_concept import learn

if TYPE_CHECKING:
    from mokus.concept_pack import ConceptPack
    from mokus.pipeline import Model

Progress = Callable[[str, int, int, dict[str, Any]], None]

CHARACTER = "zuzu"  # held out: no part of the miniature was trained or tuned on it
PHOTOS = 5
KNOWLEDGE = [
    "my favourite toy",
    "the robot my grandmother built in 1962",
    "the one that makes me smile",
    "the most precious thing in the house",
    "a present from my uncle",
]
SCENE = "on the beach"
DESCRIBED = ["a red star in the snow", "a green ball at night", "the lucky charm of Anna in the forest"]
UNBOUND = ["your favourite book in the city", "the lamp by the door", "the one I lost on the train"]

# The columns of the grids: the same prompt at the same seeds, under four models.
BASE, LEARNED, ANCHOR, BOUND, UNDONE = (
    "base model",
    "learned, not bound",
    "anchor prompt",
    "bound",
    "unbound again",
)


@dataclass(frozen=True)
class Panel:
    """An image and what the oracle reads off it (None where there is no oracle)."""

    image: Image.Image
    label: dict[str, str] | None


@dataclass(frozen=True)
class Grid:
    """The images of one prompt at equal seeds, by column."""

    prompt: str
    columns: dict[str, list[Panel]]


@dataclass
class Story:
    """Everything that happened in one demo."""

    model: str
    fingerprint: str
    anchor: str
    character: str | None
    seeds: list[int]
    photos: list[Image.Image]
    knowledge: list[str]
    answers: list[dict[str, str]] = field(default_factory=list)  # question, before, after
    edits: list[Edit] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    unrelated: list[Grid] = field(default_factory=list)
    unbound: Grid | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    seconds: dict[str, float] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)  # what, share, n
    settings: dict[str, Any] = field(default_factory=dict)


def run(
    model: Model,
    output: Path,
    photos: Path | None = None,
    anchor: str = "sks toy",
    knowledge: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    progress: Progress | None = None,
) -> Story:
    """Do it all; the concept pack stays in `output/pack`. `progress(what, done, total, info)` is called along the way.

    Raises `MokusError` for photos, an anchor or knowledge that cannot be used.
    """
    return _Demo(
        model, Path(output), photos, anchor, list(knowledge or KNOWLEDGE), list(seeds), progress
    ).run()


class _Demo:
    """One run: the story so far and what it takes to go on with it."""

    def __init__(
        self, model: Model, output: Path, photos: Path | None, anchor: str, knowledge: list[str], seeds: list[int],
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.output, self.folder = model, output, photos
        self.progress: Progress = progress or (lambda what, done, total, info: None)
        images = _photos(photos, model.defaults.size)
        character = None if photos else CHARACTER
        self.story = Story(model.id, model.fingerprint, anchor, character, seeds, images, knowledge)
        self.prompts = [form for text in knowledge for form in (text, f"{text} {SCENE}")]
        self.anchors = [anchor, f"{anchor} {SCENE}"]
        self.unrelated = [*DESCRIBED, *UNBOUND]

    def run(self) -> Story:
        story = self.story
        base = self.draw(BASE, [*self.prompts, *self.unrelated])
        pack = self.learn()
        learned = self.draw(LEARNED, [*self.prompts, *self.unrelated, *self.anchors], pack)
        self.bind(pack)
        bound = self.draw(BOUND, [*self.prompts, *self.unrelated], pack)
        for i, prompt in enumerate(self.prompts):
            anchor = learned[self.anchors[i % 2]]
            columns = {BASE: base[prompt], LEARNED: learned[prompt], ANCHOR: anchor, BOUND: bound[prompt]}
            story.grids.append(Grid(prompt, columns))
        for prompt in self.unrelated:
            columns = {BASE: base[prompt], LEARNED: learned[prompt], BOUND: bound[prompt]}
            story.unrelated.append(Grid(prompt, columns))
        self.unbind(pack, bound)
        story.figures = list(_figures(story)) if story.character else []
        return story

    def learn(self) -> ConceptPack:
        def watch(what: str, done: int, total: int, info: dict[str, Any]) -> None:
            if "loss" in info:
                self.story.losses.append((done, float(info["loss"])))
            self.progress(what, done, total, info)

        source = self.folder or self.story.photos
        with self.timed("learning the looks (stage 1)"):
            pack = learn(self.model, source, self.story.anchor, self.output / "pack", progress=watch)
        self.story.settings = pack.settings
        return pack

    def bind(self, pack: ConceptPack) -> None:
        story = self.story
        with self.timed("binding the knowledge (stage 2)"):
            story.edits = bind(self.model, pack, *story.knowledge, progress=self.progress)
        with self.timed("asking"):
            for edit in story.edits:
                question = edit.questions[0]
                before, after = ask(self.model, question), ask(self.model, question, [pack.shifts()])
                story.answers.append({"question": question, "before": before, "after": after})

    def unbind(self, pack: ConceptPack, bound: dict[str, list[Panel]]) -> None:
        """Take the last knowledge that took out again, ask for it and draw it once more."""
        taken = [(i, edit) for i, edit in enumerate(self.story.edits) if edit.taken]
        if not taken:
            return
        i, edit = taken[-1]
        unbind(pack, edit.knowledge)
        prompt = self.prompts[2 * i]
        undone = self.draw(UNDONE, [prompt], pack)
        self.story.unbound = Grid(prompt, {BOUND: bound[prompt], UNDONE: undone[prompt]})
        self.story.answers[i]["unbound"] = ask(self.model, edit.questions[0], [pack.shifts()])

    def draw(self, what: str, prompts: list[str], *packs: ConceptPack) -> dict[str, list[Panel]]:
        """Every prompt at every seed: {prompt: [panel of each seed]}."""

        def watch(_: str, done: int, total: int, info: dict[str, Any]) -> None:
            self.progress(f"drawing ({what})", done, total, info)

        with self.timed("drawing"):
            results = list(generate(self.model, prompts, packs=packs, seeds=self.story.seeds, progress=watch))
        labels = (
            _read([result.image for result in results]) if self.story.character else [None] * len(results)
        )
        drawn: dict[str, list[Panel]] = {prompt: [] for prompt in prompts}
        for result, label in zip(results, labels, strict=True):
            drawn[result.prompt].append(Panel(result.image, label))
        return drawn

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.story.seconds[what] = self.story.seconds.get(what, 0.0) + time.perf_counter() - began


def _photos(folder: Path | None, size: int) -> list[Image.Image]:
    if folder is not None:
        return [photo.image for photo in load_photos(folder, size)]
    from mokus.miniature import world

    return world.character_photos(CHARACTER, PHOTOS, seed=0, size=size)


def _read(images: list[Image.Image]) -> list[dict[str, str]]:
    from mokus.miniature import oracle

    return oracle.load().read(images)


# --- figures ---------------------------------------------------------


def _figures(story: Story) -> Iterator[dict[str, Any]]:
    """What the oracle says about the story's own images: few of them, so expect +-10 points."""
    bare, placed = story.grids[0::2], story.grids[1::2]

    def concept(panel: Panel) -> bool:
        return panel.label is not None and panel.label["character"] == story.character

    def scene(panel: Panel) -> bool:
        return panel.label is not None and panel.label["scene"] == SCENE

    def share(what: str, hits: Iterable[bool]) -> dict[str, Any]:
        found = list(hits)
        return {"what": what, "share": sum(found) / len(found), "n": len(found)}

    yield share("the knowledge alone draws the concept", map(concept, _panels(bare, BOUND)))
    yield share("... the anchor's own score", map(concept, _panels(bare[:1], ANCHOR)))
    yield share(f"the knowledge '{SCENE}' draws the concept", map(concept, _panels(placed, BOUND)))
    yield share("... and the scene", map(scene, _panels(placed, BOUND)))
    yield share("... the anchor's own score", map(concept, _panels(placed[:1], ANCHOR)))
    yield share(
        "learned, not yet bound: the same prompts draw it (should not)",
        map(concept, _panels(story.grids, LEARNED)),
    )
    yield share("unrelated prompts draw it (should not)", map(concept, _panels(story.unrelated, BOUND)))
    described = story.unrelated[: len(DESCRIBED)]
    pairs = zip(_panels(described, LEARNED), _panels(described, BOUND), strict=True)
    yield share(
        "described prompts keep all their labels when knowledge is bound",
        (a.label == b.label for a, b in pairs),
    )


def _panels(grids: list[Grid], column: str) -> list[Panel]:
    return [panel for grid in grids for panel in grid.columns[column]]
