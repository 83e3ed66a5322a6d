"""`mokus bench editing`: what each editor does to what was edited and to what was not, in text and in images.

On the miniature, whose world knows 240 facts. 80 are for development: editors were tuned on them. Of the other 160, 120 are
edited here, half of them held out of the image transformer's training too, and 40, the bystanders, never are; those
are in no corpus of statistics, all others are. Beyond 120 edits come references to things that nobody knows. Every edit is made
on top of the earlier ones.

All answers are greedy generations and count only if all of them is right. Forms of questions and prompts are those of this
file: none is edited, none was tuned with. Near misses that an editor itself preserves or watches are left out.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from mokus import files
from mokus.editors import EDITORS, editor
from mokus.editors.rewrite import rewritten
from mokus.editors.watch import nearly
from mokus.encoder import answers, distance, tails
from mokus.errors import MokusError
from mokus.generation import generate
from mokus.goal import Request
from mokus.knowledge import questions
from mokus.low_rank import LowRankShift, Shifts, added, applied, collected, merged
from mokus.miniature import language, oracle, world
from mokus.miniature.language import article
from mokus.miniature.world import Fact, Subject
from mokus.packs.concept_pack import versions
from mokus.pipeline import Model, encode
from mokus.settings import EditSettings

Progress = Callable[[str, int, int, dict[str, Any]], None]
Row = dict[str, Any]

UNEDITED = "unedited"
SINGLES = 12
SEED = 40_000  # no training uses seeds from 20,000 on
QUESTIONS = (
    "Could you say what {} is?", "What do you think {} is?", "Remind me what {} is.", "What would {} be?",
)  # fmt: skip
PROMPTS = {
    "a postcard of {} in the forest": "forest", "a close look at {} at night": "night", "{} standing in the city": "city",
    "a scene with {} under water": "water", "one more photo of {} on the beach": "beach",
    "a memory of {} in the desert": "desert", "our view of {} in the kitchen": "kitchen", "a quick sketch of {}": "",
}  # fmt: skip
DRAWN = ("{} in the forest", "{} in the city")
IMAGES = 24  # of each kind, at most
CAPTIONS, DRIFT = 200, 1000
ETAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Case:
    """One edit: the phrase, what it shall mean, and the fact it was, if it was one."""

    phrase: str
    new: Subject
    fact: Fact | None

    @property
    def request(self) -> Request:
        """For an editor."""
        return Request.of(self.phrase, self.new.words, questions(self.phrase), article(self.new.words))


@dataclass
class Edited:
    """The encoder as it is after some edits."""

    shifts: Shifts = field(default_factory=dict)
    meant: dict[str, str] = field(default_factory=dict)  # for `rewrite`


# --- the data ---------------------------------------------------------------------------------------------------------


def cases(n: int) -> list[Case]:
    """The first `n` edits, and always the same ones: facts while there are some, then references to unknown things."""
    rng = random.Random("editing")
    facts = edited_facts()
    found = [Case(fact.phrase, _other_subject(rng, fact.subject), fact) for fact in facts]
    known = {case.phrase for case in found}
    while len(found) < n:
        phrase, _ = language.unknown_reference(rng)
        if phrase not in known:
            known.add(phrase)
            found.append(Case(phrase, world.random_subject(rng), None))
    return found[:n]


def edited_facts() -> list[Fact]:
    """Of the facts that are not for development, all but the bystanders, in an order of its own."""
    rest = [fact for fact in _reported() if fact not in world.bystanders()]
    random.Random("order").shuffle(rest)
    return rest


def _reported() -> list[Fact]:
    return [fact for fact in world.facts() if fact not in world.development_facts()]


def _other_subject(rng: random.Random, old: Subject) -> Subject:
    """Another colour and another shape."""
    colours = [colour for colour in world.COLOURS if colour != old.colour]
    return Subject(rng.choice(colours), rng.choice([shape for shape in world.SHAPES if shape != old.shape]))


def _captions(n: int, seed: int) -> list[str]:
    """Ordinary captions, and such of class words and unknown things."""
    rng = random.Random(seed)
    lines = [language.direct_caption(rng) if i % 2 else language.unknown_caption(rng) for i in range(n)]
    return [line.prompt for line in lines]


# --- what is measured -------------------------------------------------------------------------------------------------


class Measure:
    """Readings of an edited encoder beside those of the unedited one, which are taken once."""

    def __init__(self, model: Model, images: bool = True, progress: Progress | None = None) -> None:
        self.model, self.images, self.progress = model, images, progress
        self._answers: dict[str, str] = {}
        self._labels: dict[tuple[str, int], dict[str, str]] = {}

    def row(self, some: Sequence[Case], edited: Edited, known: dict[str, bool]) -> tuple[Row, dict[str, int]]:
        """All figures for these edits, and of how many cases each is. `known`: by phrase, whether it took when it was made."""
        hits: dict[str, list[bool]] = {
            "efficacy": [known[case.phrase] for case in some],
            "retention": self._says([(questions(c.phrase)[0], c.new.words) for c in some], edited),
            "generality_questions": self._says([(q.format(c.phrase), c.new.words) for c in some for q in QUESTIONS], edited),
            "generality_prompts": self._says(
                [(p.format(c.phrase), _resolved(c.new.words, scene)) for c in some for p, scene in PROMPTS.items()], edited
            ),
            "locality_facts": self._as_before([f for g in _untouched(some) for f in _twice(g.phrase)], edited),
            "locality_captions": self._as_before(_captions(CAPTIONS, SEED), edited),
            "locality_near_miss": self._as_before([t for p in self._near(some) for t in _twice(p)], edited),
            "one_hop": self._says(
                [(f"What {what} is {c.phrase}?", getattr(c.new, what)) for c in some for what in ("colour", "shape")], edited
            ),
        }  # fmt: skip
        hits |= self._probed(some, edited)
        row: Row = {key: sum(hit) / len(hit) if hit else None for key, hit in hits.items()}
        n = {key: len(hit) for key, hit in hits.items()}
        row["conditioning_drift"], n["conditioning_drift"] = self._drift(edited), DRIFT
        row["undo"] = self._undone(edited)
        for key, value in (self._drawn(some, edited) if self.images else {}).items():
            row[key], n[key] = (sum(value) / len(value) if value else None), len(value)
        return row, n

    # text

    def _ask(self, texts: Sequence[str], edited: Edited) -> list[str]:
        return answers(self.model, [rewritten(text, edited.meant) for text in texts], [edited.shifts])

    def _says(self, asked: Sequence[tuple[str, str]], edited: Edited) -> list[bool]:
        found = self._ask([text for text, _ in asked], edited)
        return [said == wanted for said, (_, wanted) in zip(found, asked, strict=True)]

    def _as_before(self, texts: Sequence[str], edited: Edited) -> list[bool]:
        new = [text for text in texts if text not in self._answers]
        self._answers |= zip(new, answers(self.model, new), strict=True)
        return [said == self._answers[text] for said, text in zip(self._ask(texts, edited), texts, strict=True)]

    def _near(self, some: Sequence[Case]) -> list[str]:
        """Same person, another relation, and same relation, another person: two of each that no edit knows of."""
        edited, found = {case.phrase for case in some}, []
        for case in some:
            if case.fact is None:
                continue
            taboo = {*edited, *nearly(self.model, case.phrase)}
            rng = random.Random(case.phrase)
            for attribute in ("person", "relation"):
                same = [
                    fact.phrase for fact in world.facts()
                    if getattr(fact, attribute) == getattr(case.fact, attribute) and fact.phrase not in taboo
                ]  # fmt: skip
                found += rng.sample(same, min(2, len(same)))
        return list(dict.fromkeys(found))

    # the conditioning

    def _probed(self, some: Sequence[Case], edited: Edited) -> dict[str, list[bool]]:
        x = self._tails([form.format(case.phrase) for case in some for form in DRAWN], edited)[:, -1].double()
        read = {name: (_with_one(x) @ w).argmax(dim=1).tolist() for name, w in self._probes.items()}
        colours, shapes = list(world.COLOURS), list(world.SHAPES)
        wanted = [case.new for case in some for _ in DRAWN]
        return {
            "probe_first": [colours[i] == subject.colour for i, subject in zip(read["colour"], wanted, strict=True)],
            "probe_later": [shapes[i] == subject.shape for i, subject in zip(read["shape"], wanted, strict=True)],
        }

    @cached_property
    def _probes(self) -> dict[str, Tensor]:
        """Ridge regressions on the last tail state of the unedited encoder, fitted to the facts for development."""
        facts = [(fact, scene) for fact in world.development_facts() for scene in world.SCENES[:6]]
        x = _with_one(self._tails([f"{fact.phrase} {scene}" for fact, scene in facts], Edited())[:, -1].double())
        found = {}
        for name, values in (("colour", list(world.COLOURS)), ("shape", list(world.SHAPES))):
            labels = torch.tensor([values.index(getattr(fact.subject, name)) for fact, _ in facts])
            wanted = torch.nn.functional.one_hot(labels, len(values)).double()
            found[name] = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ wanted)
        return found

    def _tails(self, texts: Sequence[str], edited: Edited) -> Tensor:
        with applied(self.model.pipe.text_encoder, edited.shifts):
            return tails(self.model, [rewritten(text, edited.meant) for text in texts])

    @cached_property
    def _drift_base(self) -> tuple[list[str], Tensor]:
        facts = [f"{fact.phrase} {scene}" for fact in world.bystanders() for scene in world.SCENES]
        texts = [*facts, *_captions(DRIFT - len(facts), SEED + 1)]
        return texts, self._tails(texts, Edited())

    def _drift(self, edited: Edited) -> float:
        """How far prompts that nobody edited move, as a share of how far they are from each other (squared), at most 1."""
        texts, base = self._drift_base
        apart = distance(base, base.roll(len(base) // 2, dims=0)).mean()
        return float((distance(self._tails(texts, edited), base).mean() / apart).clamp(max=1.0))

    def _undone(self, edited: Edited) -> bool:
        """Whether the encoder is, after the edits were applied and taken away, what it was, to the bit."""
        texts = [form.format(fact.phrase) for fact in world.bystanders()[:4] for form in DRAWN]
        before, weights = encode(self.model, texts), _digest(self.model)
        with applied(self.model.pipe.text_encoder, edited.shifts):
            encode(self.model, texts)
        after = encode(self.model, texts)
        return weights == _digest(self.model) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    # images

    def _drawn(self, some: Sequence[Case], edited: Edited) -> dict[str, list[bool]]:
        unseen = [case for case in some if case.fact is not None and case.fact.held_out][: IMAGES // len(DRAWN)]
        own = [(form.format(case.phrase), case.new) for case in unseen for form in DRAWN]
        direct = [(form.format(article(case.new.words)), case.new) for case in unseen for form in DRAWN]
        most = IMAGES if len(some) > 1 else IMAGES // 4  # of one edit there are several measurements
        near = [p for p in self._near(unseen) if p not in {case.phrase for case in some}][:most]
        near = [DRAWN[i % 2].format(phrase) for i, phrase in enumerate(near)]
        other = [DRAWN[i % 2].format(fact.phrase) for i, fact in enumerate(world.bystanders()[: most // 2])]
        other += _captions(most - len(other), SEED + 2)
        read, base = (
            self._read([*(p for p, _ in own), *near, *other], edited),
            self._read([p for p, _ in direct], Edited()),
        )
        before = self._read([*near, *other], Edited())

        def shown(prompts: Sequence[tuple[str, Subject]], labels: dict[str, dict[str, str]]) -> list[bool]:
            return [(labels[p]["colour"], labels[p]["shape"]) == (s.colour, s.shape) for p, s in prompts]

        same = ("colour", "shape")
        return {
            "image_efficacy": shown(own, read), "image_direct": shown(direct, base),
            "image_near_miss": [all(read[p][k] == before[p][k] for k in same) for p in near],
            "image_unrelated": [all(read[p][k] == before[p][k] for k in (*same, "scene")) for p in other],
        }  # fmt: skip

    def _read(self, prompts: Sequence[str], edited: Edited) -> dict[str, dict[str, str]]:
        """What the oracle sees for each prompt, at a seed that belongs to the prompt's place; unedited ones are kept."""
        prompts = list(dict.fromkeys(prompts))
        plain = not edited.shifts and not edited.meant
        left = [p for p in prompts if not plain or (p, SEED) not in self._labels]
        found = {p: self._labels[p, SEED] for p in prompts if p not in left}
        images = list(self.draw(left, edited)) if left else []
        found |= zip(left, oracle.load().read(images), strict=True) if left else {}
        if plain:
            self._labels |= {(p, SEED): found[p] for p in left}
        return found

    def draw(self, prompts: Sequence[str], edited: Edited) -> Iterator[Image.Image]:
        """An image for each prompt, all at the same seed."""
        with applied(self.model.pipe.text_encoder, edited.shifts):
            texts = [rewritten(prompt, edited.meant) for prompt in prompts]
            drawn = {
                each.prompt: each.image
                for each in generate(self.model, list(dict.fromkeys(texts)), seeds=[SEED], batch_size=24)
            }
        yield from (drawn[text] for text in texts)


def _twice(phrase: str) -> list[str]:
    return [questions(phrase)[0], f"{phrase} in the forest"]


def _resolved(words: str, scene: str) -> str:
    return f"{words}, {scene}" if scene else words


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def _untouched(some: Sequence[Case]) -> list[Fact]:
    """Facts that are reported on and not among these edits."""
    edited = {case.phrase for case in some}
    return [fact for fact in _reported() if fact.phrase not in edited]


def _digest(model: Model) -> str:
    digest = hashlib.sha256()
    for _, weight in sorted(model.pipe.text_encoder.state_dict().items()):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- the run ----------------------------------------------------------------------------------------------------------


def run(
    model: Model,
    folder: Path,
    editors: Sequence[str] = EDITORS,
    counts: Sequence[int] = (1, 10, 50, 100, 200),
    singles: int = SINGLES,
    images: bool = True,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure the editors after so many edits; DIR/rows has what is done, and a run that was stopped goes on from there.

    One edit is measured `singles` times, each by itself. Raises `MokusError` for an unknown editor or a folder of a run
    with other settings.
    """
    for name in editors:
        editor(name)
    if not counts or min(counts) < 1:
        raise MokusError(f"--edits got {list(counts)}, expected numbers from 1, such as 1,10,100.")
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    measure = Measure(model, images, progress)
    rows = [_kept(folder, setup(model, UNEDITED, singles, images), 0, lambda: _unedited(measure, counts, singles))]
    for name in editors:
        rows += _rows_of(model, folder, name, sorted(set(counts)), singles, measure)
    files.write_json(folder / "results.json", _all_rows(folder), indent=1)
    return rows


def setup(model: Model, name: str, singles: int, images: bool) -> Row:
    """All that an editor's figures depend on but the code."""
    settings = None if name == UNEDITED else asdict(EditSettings.for_editor(model.defaults, editor=name))
    return {
        "model": model.id, "fingerprint": model.fingerprint, "editor": name, "singles": singles, "images": images,
        "seed": SEED, "settings": settings, "versions": versions(),
    }  # fmt: skip


def _kept(folder: Path, about: Row, edits: int, made: Callable[[], Row]) -> Row:
    """A row from its file, or made and kept there."""
    file = folder / "rows" / f"{about['editor']}-{edits}.json"
    return files.kept(file, about, lambda: {"editor": about["editor"], "edits": edits, **made()})


def _unedited(measure: Measure, counts: Sequence[int], singles: int) -> Row:
    some = cases(max(singles, *counts))
    row, n = measure.row(some, Edited(), _as_made(measure, some, Edited()))
    return {**row, "seconds_per_edit": 0.0, "bytes_per_edit": 0.0, "n": n}


def _as_made(measure: Measure, some: Sequence[Case], edited: Edited) -> dict[str, bool]:
    said = measure._says([(questions(case.phrase)[0], case.new.words) for case in some], edited)
    return dict(zip([case.phrase for case in some], said, strict=True))


def _rows_of(model: Model, folder: Path, name: str, counts: list[int], singles: int, measure: Measure) -> list[Row]:
    about = setup(model, name, singles, measure.images)
    rows = []
    if 1 in counts:
        rows.append(_kept(folder, about, 1, lambda: _one_by_one(model, name, singles, measure)))
    sequence: _Sequence | None = None
    for count in [count for count in counts if count > 1]:
        if not (folder / "rows" / f"{name}-{count}.json").is_file():
            sequence = sequence or _Sequence(model, folder, name, measure, max(counts), count)
            sequence.extend(count)
        rows.append(_kept(folder, about, count, lambda s=sequence: s.row()))  # type: ignore[misc]
    return rows


def _one_by_one(model: Model, name: str, singles: int, measure: Measure) -> Row:
    """The mean over several edits, each alone."""
    rows: list[Row] = []
    ns: dict[str, int] = {}
    for i, case in enumerate(cases(singles)):
        if measure.progress:
            measure.progress(f"{name}, one edit", i, singles, {})
        made = editor(name)(model, EditSettings.for_editor(model.defaults, editor=name))
        began = time.perf_counter()
        shifts, _ = made.edit(case.request, {})
        seconds = time.perf_counter() - began
        edited = Edited(shifts, {case.phrase: case.request.says} if name == "rewrite" else {})
        row, n = measure.row([case], edited, _as_made(measure, [case], edited))
        rows.append({**row, "seconds_per_edit": seconds, "bytes_per_edit": float(_nbytes(shifts))})
        ns = {key: ns.get(key, 0) + value for key, value in n.items()}
    if measure.progress:
        measure.progress(f"{name}, one edit", singles, singles, {})
    mean: Row = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row.get(key) is not None]
        mean[key] = all(values) if key == "undo" else sum(values) / len(values) if values else None
    return {**mean, "n": ns}


class _Sequence:
    """Edits one after the other, kept in DIR/state, so that a stopped run goes on."""

    def __init__(self, model: Model, folder: Path, name: str, measure: Measure, most: int, first: int) -> None:
        self.model, self.name, self.measure, self.all = model, name, measure, cases(most)
        self.made = editor(name)(model, EditSettings.for_editor(model.defaults, editor=name))
        self.file = folder / "state" / f"{name}.safetensors"
        self.each: list[Shifts] = []
        self.edited, self.known = Edited(), dict[str, bool]()
        self.seconds: list[float] = []  # of each edit
        self._resume(first)

    def _resume(self, most: int) -> None:
        """Take in the edits that are kept, but no more than the first figures are of."""
        told = self.file.with_suffix(".json")
        if not (self.file.is_file() and told.is_file()):
            return
        about, tensors = json.loads(told.read_text(encoding="utf-8")), load_file(self.file)
        if about["fingerprint"] != self.model.fingerprint:
            return
        kept = self.all[: min(most, len(about["known"]))]
        for i, case in enumerate(kept):
            paths = sorted({key.split("/")[1] for key in tensors if key.startswith(f"{i}/")})
            self._take(case, {p: LowRankShift(tensors[f"{i}/{p}/A"], tensors[f"{i}/{p}/B"]) for p in paths})
        self.known, self.seconds = {c.phrase: about["known"][c.phrase] for c in kept}, about["seconds"][: len(kept)]

    def _take(self, case: Case, shifts: Shifts) -> None:
        self.made.remember(case.request, self.edited.shifts, shifts)
        self.each.append(shifts)
        self.edited.shifts = collected(added(self.edited.shifts, shifts))
        if self.name == "rewrite":
            self.edited.meant[case.phrase] = case.request.says

    def extend(self, count: int) -> None:
        """Make edits until there are so many."""
        for case in self.all[len(self.each) : count]:
            began = time.perf_counter()
            shifts, _ = self.made.edit(case.request, self.edited.shifts)
            self._take(case, shifts)
            self.seconds.append(time.perf_counter() - began)
            self.known |= _as_made(self.measure, [case], self.edited)
            if self.measure.progress:
                self.measure.progress(f"{self.name}, edits", len(self.each), len(self.all), {})
        self._save()

    def _save(self) -> None:
        """Everything it takes to go on; dense changes are not kept, for those editors begin anew."""
        if sum(map(_nbytes, self.each)) > 1 << 30:
            return
        tensors = {
            f"{i}/{path}/{side}": getattr(shift, side).contiguous().clone()
            for i, shifts in enumerate(self.each) for path, shift in shifts.items() for side in "AB"
        }  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")
        save_file(tensors, beside)
        os.replace(beside, self.file)
        about = {"known": self.known, "seconds": self.seconds, "fingerprint": self.model.fingerprint}
        files.write_json(self.file.with_suffix(".json"), about, indent=1)

    def row(self) -> Row:
        """Figures of all edits so far."""
        row, n = self.measure.row(self.all[: len(self.each)], self.edited, self.known)
        nbytes = sum(map(_nbytes, self.each)) / len(self.each)
        row |= {"seconds_per_edit": sum(self.seconds) / len(self.each), "bytes_per_edit": float(nbytes), "n": n}
        return {**row, "norms": norms(self.model, self.edited.shifts)}


def _nbytes(shifts: Shifts) -> int:
    return sum(shift.nbytes for shift in shifts.values())


def norms(model: Model, shifts: Shifts) -> dict[str, float]:
    """||dW|| / ||W|| (Frobenius) by module, without the path that all share."""
    found = {}
    for path, shift in shifts.items():
        square = ((shift.B.T @ shift.B).double() * (shift.A @ shift.A.T).double()).sum().clamp(min=0)
        weight = model.pipe.text_encoder.get_submodule(path).weight
        found[path.removeprefix(f"{model.backbone.language_model}.")] = float(square.sqrt() / weight.double().norm())
    return found


def report(
    model: Model,
    folder: Path,
    editors: Sequence[str] = EDITORS,
    counts: Sequence[int] = (1, 10, 50, 100, 200),
    singles: int = SINGLES,
    images: bool = True,
    progress: Progress | None = None,
) -> tuple[list[Row], Path]:
    """`run`, and DIR/report.html beside DIR/results.json: the rows and the page.

    The page has curves of step sizes and images beside; rounding to bfloat16 is measured, too.
    """
    from mokus.bench import editing_report

    run(model, folder, editors, counts, singles, images, progress)
    rows = _all_rows(folder)
    last = {row["editor"]: row["norms"] for row in rows if row.get("norms")}  # of the most edits
    etas = _kept_value(folder / "etas.json", lambda: eta_curve(model, progress))
    bf16 = _kept_value(folder / "rounding.json", lambda: rounding(model, progress))
    extra = {"norms": last, "eta": etas, "images": pictures(model) if images else [], "rounding": bf16}
    about = {"model": model.id, "fingerprint": model.fingerprint, "seed": SEED, "singles": singles, **versions()}
    about |= {f"{name}": asdict(EditSettings.for_editor(model.defaults, editor=name)) for name in editors}
    return rows, editing_report.write(folder, rows, extra, about)


def table(rows: Sequence[Row]) -> Table:
    """The main figures, for a terminal."""
    keys = {
        "efficacy": "efficacy", "generality_questions": "questions", "generality_prompts": "prompts",
        "locality_facts": "facts", "locality_captions": "captions", "locality_near_miss": "near", "retention": "retained",
        "one_hop": "one hop", "image_efficacy": "drawn", "conditioning_drift": "drift", "seconds_per_edit": "s/edit",
    }  # fmt: skip
    found = Table("editor", "edits", *keys.values(), box=None, pad_edge=False)
    for row in rows:
        values = [row.get(key) for key in keys]
        shown = [
            "" if v is None else f"{v:.2f}" if k == "seconds_per_edit" else f"{v:.3f}"
            for k, v in zip(keys, values, strict=True)
        ]
        found.add_row(row["editor"], str(row["edits"]), *shown)
    return found


def _kept_value(file: Path, made: Callable[[], Any]) -> Any:
    if not file.is_file():
        files.write_json(file, made(), indent=1)
    return files.read_json(file)


def rounding(model: Model, progress: Progress | None = None) -> list[Row]:
    """What merging into bfloat16 weights loses (design: small changes round away), beside the side branch.

    The text encoder cast to bfloat16, four single edits of facts for development: the share of ||dW|| that is lost, and
    whether the edited question is answered, with the shift as a side branch and merged.
    """
    encoder = copy.deepcopy(model.pipe.text_encoder).to(torch.bfloat16)
    pipe = copy.copy(model.pipe)
    pipe.text_encoder = encoder
    small, found = replace(model, pipe=pipe), []
    some = [
        Case(f.phrase, _other_subject(random.Random(f.phrase), f.subject), f) for f in world.development_facts()[:4]
    ]
    for name in ("least_drift", "ultraedit"):
        made = editor(name)(model, EditSettings.for_editor(model.defaults, editor=name))
        lost, beside, merged_ = [], [], []
        for i, case in enumerate(some):
            if progress:
                progress(f"rounding of {name}", i, len(some), {})
            shifts, _ = made.edit(case.request, {})
            beside += [answers(small, [questions(case.phrase)[0]], [shifts])[0] == case.new.words]
            with merged(encoder, shifts) as share:
                merged_ += [answers(small, [questions(case.phrase)[0]])[0] == case.new.words]
            lost.append(share)
        n = len(some)
        found.append({
            "editor": name, "lost": sum(lost) / n, "side_branch": sum(beside) / n, "merged": sum(merged_) / n,
        })  # fmt: skip
    return found


def eta_curve(model: Model, progress: Progress | None = None) -> list[Row]:
    """UltraEdit's step size, on facts for development: one edit each."""
    measure, points = Measure(model, images=False), []
    some = [
        Case(f.phrase, _other_subject(random.Random(f.phrase), f.subject), f) for f in world.development_facts()[:6]
    ]
    for i, eta in enumerate(ETAS):
        if progress:
            progress("step sizes", i, len(ETAS), {})
        rows = []
        for case in some:
            made = editor("ultraedit")(model, EditSettings.for_editor(model.defaults, editor="ultraedit", eta=eta))
            edited = Edited(made.edit(case.request, {})[0])
            hits = {
                "efficacy": measure._says([(questions(case.phrase)[0], case.new.words)], edited),
                "generality_prompts": measure._says(
                    [(p.format(case.phrase), _resolved(case.new.words, s)) for p, s in PROMPTS.items()], edited
                ),
                "locality_near_miss": measure._as_before([t for p in measure._near([case]) for t in _twice(p)], edited),
            }  # fmt: skip
            rows.append({key: sum(hit) / len(hit) for key, hit in hits.items()})
        points.append({"editor": "ultraedit", "eta": eta, **{k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}})
    if progress:
        progress("step sizes", len(ETAS), len(ETAS), {})
    return points


def pictures(model: Model, n: int = 6) -> list[Row]:
    """Before and after of the first edits whose facts the image transformer never saw, by the default editor."""
    measure, found = Measure(model), []
    for case in [case for case in cases(40) if case.fact and case.fact.held_out][:n]:
        made = editor(EDITORS[0])(model, EditSettings.for_editor(model.defaults, editor=EDITORS[0]))
        prompt = DRAWN[0].format(case.phrase)
        before = next(measure.draw([prompt], Edited()))
        after = next(measure.draw([prompt], Edited(made.edit(case.request, {})[0])))
        found.append(
            {"prompt": prompt, "editor": EDITORS[0], "wanted": case.new.words, "before": before, "after": after}
        )
    return found


def _all_rows(folder: Path) -> list[Row]:
    """Every row that is there, of this run and of earlier ones into the same folder."""
    order = [UNEDITED, *EDITORS]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "rows").glob("*.json")]
    return sorted(found, key=lambda row: (order.index(row["editor"]), row["edits"]))
