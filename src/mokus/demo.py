"""`mokus demo`: all of the method on one concept, told as a story that `mokus.report` writes down.

Learn a concept from photos, bind knowledge, ask and draw before and after, unbind one piece again. The photos are the
user's, or renders of a character of the synthetic world that the miniature has never seen. Of the latter an oracle can
tell what an image shows, so only then does the story have figures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mokus.checks import ask
from mokus.errors import MokusError
from mokus.generation import generate
from mokus.knowledge import class_word, normalise
from mokus.knowledge_update import Edit, bind, unbind
from mokus.photos import load_photos
from mokus.progress import Progress, silent
from mokus.settings import EditSettings
from mokus.visual_concept import learn

if TYPE_CHECKING:
    from mokus.packs.concept_pack import ConceptPack
    from mokus.pipeline import Model


CHARACTER = "zuzu"  # held out: no part of the miniature was trained or tuned on it
PHOTOS = 5

# {c}: the class word of the anchor
KNOWLEDGE = [
    "my favourite {c}",
    "the {c} my grandmother bought in 1962",
    "the one that makes me smile",
    "the most precious thing in the house",
    "a present from my uncle",
]
SCENES = ["on the beach", "in the forest", "in the city", "under water", "in the kitchen"]  # no edit is made with these
DESCRIBED = ["a red star in the snow", "a green ball at night", "the lucky charm of Anna in the forest"]
UNBOUND = ["your favourite {c}", "the lamp by the door", "the one I lost on the train"]

# The columns of the grids: the same prompt at the same seeds, under four models; and the anchor in its place.
BASE, LEARNED, BOUND, UNDONE = "base model", "learned, not yet bound", "bound", "unbound again"
BEGUN = ".mokus-demo"  # in the folder of one, beside its pack, so that one that was stopped can be made again
ANCHOR = "anchor"


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
    answers: list[dict[str, str]] = field(default_factory=list)  # question, before, after; of one also unbound
    edits: list[Edit] = field(default_factory=list)
    alone: list[Grid] = field(default_factory=list)  # of each knowledge
    placed: list[Grid] = field(default_factory=list)  # of each knowledge in one of SCENES
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
    """Do it all; the concept pack stays in `output/pack`, rendered photos in `output/photos`, instead of an earlier demo's.

    `progress(what, done, total, info)` is called along the way. Raises `MokusError` for photos, an anchor or knowledge
    that cannot be used, and if something that is not of an earlier demo is in these places.
    """
    anchor, size = normalise(anchor, "anchor", "sks toy"), model.defaults.size
    wanted = knowledge or [text.format(c=class_word(anchor)) for text in KNOWLEDGE]
    wanted = list(dict.fromkeys(map(normalise, wanted)))
    check_place(output, photos)
    images = [photo.image for photo in load_photos(photos, size)] if photos else _renders(size)
    story = Story(model.id, model.fingerprint, anchor, None if photos else CHARACTER, list(seeds), images, wanted)
    _Demo(model, output, story, progress or silent).run(photos)
    return story


def check_place(output: Path, photos: Path | None) -> None:
    """Raise `MokusError` if the demo would replace a pack, or photos, that are not of an earlier one."""
    if (output / BEGUN).is_file():
        return
    for place in (output / "pack", *([] if photos else [output / "photos"])):
        if place.exists():
            raise MokusError(f"{place} exists and is not of an earlier demo; name another folder with -o.")


@dataclass
class _Demo:
    """One run: the story so far and what it takes to go on with it."""

    model: Model
    output: Path
    story: Story
    progress: Progress

    def run(self, photos: Path | None) -> None:
        """From the photos to the last figure; all of it goes into the story."""
        story, anchor = self.story, self.story.anchor
        scenes = [SCENES[i % len(SCENES)] for i in range(len(story.knowledge))]
        placed = [f"{text} {scene}" for text, scene in zip(story.knowledge, scenes, strict=True)]
        unrelated = [*DESCRIBED, *(text.format(c=class_word(anchor)) for text in UNBOUND)]
        prompts = [*story.knowledge, *placed, *unrelated]

        pack = self.learn(photos or story.photos)  # first, for it refuses what cannot be learned
        (self.output / BEGUN).touch()
        base = self.draw(BASE, prompts)
        learned = self.draw(LEARNED, [*prompts, anchor, *(f"{anchor} {scene}" for scene in scenes)], pack)
        self.bind(pack)
        bound = self.draw(BOUND, prompts, pack)

        def grid(prompt: str, instead: str = "") -> Grid:
            columns = {BASE: base[prompt], LEARNED: learned[prompt], BOUND: bound[prompt]}
            return Grid(prompt, columns | ({ANCHOR: learned[instead]} if instead else {}))

        story.alone = [grid(text, anchor) for text in story.knowledge]
        story.placed = [grid(text, f"{anchor} {scene}") for text, scene in zip(placed, scenes, strict=True)]
        story.unrelated = [grid(prompt) for prompt in unrelated]
        self.unbind(pack)
        story.figures = list(_figures(story)) if story.character else []
        if not photos:
            _save(story.photos, self.output / "photos")

    def learn(self, photos: Path | list[Image.Image]) -> ConceptPack:
        """Stage 1, into `output/pack`, with the losses for the report."""

        def watch(what: str, done: int, total: int, info: dict[str, Any]) -> None:
            if "loss" in info:
                self.story.losses.append((done, float(info["loss"])))
            self.progress(what, done, total, info)

        with self.timed("learning the looks (stage 1)"):
            pack = learn(self.model, photos, self.story.anchor, self.output / "pack", overwrite=True, progress=watch)
        self.story.settings["stage 1"] = pack.settings
        return pack

    def bind(self, pack: ConceptPack) -> None:
        """Stage 2, and what each knowledge answers before and after."""
        story = self.story
        settings = EditSettings.for_editor(self.model.defaults)
        story.settings["stage 2"] = asdict(settings)
        with self.timed("binding the knowledge (stage 2)"):
            story.edits = bind(self.model, pack, *story.knowledge, settings=settings, progress=self.progress)
        with self.timed("asking"):
            for question in (edit.questions[0] for edit in story.edits):
                before, after = ask(self.model, question), ask(self.model, question, [pack.shifts()])
                story.answers.append({"question": question, "before": before, "after": after})

    def unbind(self, pack: ConceptPack) -> None:
        """Take the last knowledge that took out again, ask for it and draw it once more."""
        taken = [i for i, edit in enumerate(self.story.edits) if edit.taken]
        if not taken:
            return
        i = taken[-1]
        text = self.story.knowledge[i]
        unbind(pack, text)
        self.story.answers[i]["unbound"] = ask(self.model, self.story.answers[i]["question"], [pack.shifts()])
        undone = self.draw(UNDONE, [text], pack)[text]
        self.story.unbound = Grid(text, {BOUND: self.story.alone[i].columns[BOUND], UNDONE: undone})

    def draw(self, what: str, prompts: list[str], *packs: ConceptPack) -> dict[str, list[Panel]]:
        """Every prompt at every seed: {prompt: [panel of each seed]}."""

        def watch(_: str, done: int, total: int, info: dict[str, Any]) -> None:
            self.progress(f"drawing: {what}", done, total, info)

        prompts = list(dict.fromkeys(prompts))
        with self.timed("drawing"):
            results = list(generate(self.model, prompts, packs=packs, seeds=self.story.seeds, progress=watch))
        labels = _read([result.image for result in results]) if self.story.character else [None] * len(results)
        drawn: dict[str, list[Panel]] = {prompt: [] for prompt in prompts}
        for result, label in zip(results, labels, strict=True):
            drawn[result.prompt].append(Panel(result.image, label))
        return drawn

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.story.seconds[what] = self.story.seconds.get(what, 0.0) + time.perf_counter() - began


def _renders(size: int) -> list[Image.Image]:
    from mokus.miniature import world

    return world.character_photos(CHARACTER, PHOTOS, seed=0, size=size)


def _save(images: list[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start=1):
        image.save(folder / f"{number}.png")


def _read(images: list[Image.Image]) -> list[dict[str, str]]:
    from mokus.miniature import oracle

    return oracle.load().read(images)


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(story: Story) -> Iterator[dict[str, Any]]:
    """What the oracle says about the story's own images: few of them, so expect +-10 points."""

    def concept(grids: list[Grid], column: str) -> list[bool]:
        return [p.label is not None and p.label["character"] == story.character for p in _panels(grids, column)]

    def scene(column: str) -> list[bool]:
        asked = [grid.prompt for grid in story.placed for _ in story.seeds]
        found = [panel.label["scene"] if panel.label else "nothing" for panel in _panels(story.placed, column)]
        return [prompt.endswith(read) for prompt, read in zip(asked, found, strict=True)]

    def share(what: str, hits: list[bool]) -> dict[str, Any]:
        return {"what": what, "share": sum(hits) / len(hits), "n": len(hits)}

    alone, placed = story.alone, story.placed
    yield share("the knowledge alone draws the concept", concept(alone, BOUND))
    yield share("... the anchor's own score", concept(alone[:1], ANCHOR))
    yield share("the knowledge in a scene draws the concept", concept(placed, BOUND))
    yield share("... the anchor's own score", concept(placed, ANCHOR))
    yield share("... and the scene", scene(BOUND))
    yield share("... the anchor's own score", scene(ANCHOR))
    yield share("not yet bound: the same prompts draw it (should not)", concept(alone + placed, LEARNED))
    yield share("unrelated prompts draw it (should not)", concept(story.unrelated, BOUND))
    described = story.unrelated[: len(DESCRIBED)]
    pairs = zip(_panels(described, LEARNED), _panels(described, BOUND), strict=True)
    yield share("described prompts keep all labels when knowledge is bound", [a.label == b.label for a, b in pairs])


def _panels(grids: list[Grid], column: str) -> list[Panel]:
    return [panel for grid in grids for panel in grid.columns[column]]
