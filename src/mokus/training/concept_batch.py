"""Many concepts, learned one after the other: `mokus learn --batch concepts.yaml`.

    - photos: photos/robot       # paths are seen from the file's own folder
      anchor: sks toy
      output: packs/robot.pack
    - photos: photos/dog
      anchor: zwx dog
      output: packs/dog.pack
      steps: 300                 # and any other setting of `mokus learn`

What is done is passed over and what was stopped goes on, so the same command again does the rest. One concept that fails
does not stop the others. Several processes take whole concepts and never wait for each other but at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml  # type: ignore[import-untyped]

from mokus.errors import MokusError
from mokus.settings import UNSEEN, LearnSettings
from mokus.yaml_list import entries

if TYPE_CHECKING:
    from mokus.pipeline import Model
    from mokus.progress import Progress
    from mokus.training.processes import Processes

TEXTS = ("photos", "anchor", "output")
# what may go wrong with one concept while the others are fine: its photos, its place, memory
FAULTS = (MokusError, OSError, RuntimeError, ValueError)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", list[str]: "a list of names"}


@dataclass(frozen=True)
class Concept:
    """One entry: what is learned as what, and where its pack goes; settings other than the model's own."""

    photos: Path
    anchor: str
    output: Path
    settings: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a concept: "learned", "there already" or "failed", and why."""

    output: str
    anchor: str
    status: str
    reason: str
    seconds: float


# --- the file ---------------------------------------------------------


def read_concepts(path: Path) -> list[Concept]:
    """The entries of the file. Raises `MokusError` with the line and the number of the entry for whatever is wrong."""
    from mokus.knowledge import normalise

    concepts: list[Concept] = []
    for entry, where in entries(path, "concepts", "'- photos: ...' with 'anchor: ...' and 'output: ...' below"):
        found = _fields(entry, where)
        try:
            anchor = normalise(found.pop("anchor"), "anchor", "sks toy")
            LearnSettings(**{name: value for name, value in found.items() if name not in TEXTS})
        except MokusError as error:
            raise MokusError(f"{where}: {error}") from error
        photos, output = (path.parent / found.pop(name) for name in ("photos", "output"))
        if output.resolve() in (other.output.resolve() for other in concepts):
            raise MokusError(f"{where} has the output of an earlier entry, {output}; name another folder.")
        concepts.append(Concept(photos, anchor, output, found))
    return concepts


def _fields(entry: yaml.Node, where: str) -> dict[str, Any]:
    if not isinstance(entry, yaml.MappingNode):
        raise MokusError(f"{where} is no mapping, expected 'photos: ...', 'anchor: ...' and 'output: ...'.")
    kinds = {**dict.fromkeys(TEXTS, str), **_kinds()}
    found: dict[str, Any] = {}
    for key, value in entry.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        place = f"{where}: {name[:60]!r} (line {key.start_mark.line + 1})"
        if name in found:
            raise MokusError(f"{place} is there twice; remove one.")
        if name not in kinds:
            raise MokusError(f"{place} is no field, expected {', '.join(kinds)}.")
        found[name] = _value(value, kinds[name], place)
    for name in TEXTS:
        if name not in found:
            raise MokusError(f"{where} has no {name!r}; add it.")
    return found


def _kinds() -> dict[str, Any]:
    """The type of each setting."""
    hints = get_type_hints(LearnSettings)
    return {field.name: hints[field.name] for field in fields(LearnSettings)}


def _value(node: yaml.Node, kind: Any, place: str) -> Any:
    """The node as this type. YAML takes 2e-4, which has no point, for a text; here it is a number."""
    if kind is str:  # whatever it looks like: a folder may be called 2026
        if isinstance(node, yaml.ScalarNode) and node.value.strip():
            return node.value
        raise MokusError(f"{place} is no text; write one.")
    try:
        value = yaml.constructor.SafeConstructor().construct_object(node, deep=True)
        if kind is float and not isinstance(value, bool):
            return float(value)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise MokusError(f"{place} is {_short(node)}, expected {_KINDS[kind]}.") from error
    if kind == list[str] and isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value
    if type(value) is not kind:
        raise MokusError(f"{place} is {_short(node)}, expected {_KINDS[kind]}.")
    return value


def _short(node: yaml.Node) -> str:
    return repr(node.value[:60]) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"


# --- learning them ---------------------------------------------------------


def learn_all(
    model: Model,
    concepts: Sequence[Concept],
    chosen: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    bars: Callable[[], AbstractContextManager[Progress]] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Outcome]:
    """Learn them all, every process its share of them; the outcomes of all, in their order.

    `chosen`: settings for all, which an entry's own go before. `bars()` gives one concept's progress; `say` is told every
    outcome when it is known.
    """
    index, count = (processes.index, processes.count) if processes else (0, 1)
    mine = []
    for i in range(index, len(concepts), count):
        began = time.perf_counter()
        status, reason = _learn(model, concepts[i], chosen or {}, bars)
        seconds = time.perf_counter() - began
        mine.append((i, Outcome(str(concepts[i].output), concepts[i].anchor, status, reason, seconds)))
        if say:
            say(f"{i + 1} of {len(concepts)}, {told(mine[-1][1])}.")
    return [outcome for _, outcome in sorted(processes.gathered(mine) if processes else mine, key=lambda each: each[0])]


def told(outcome: Outcome) -> str:
    """An outcome in words."""
    if outcome.status == "failed":
        return f"{outcome.output}: failed: {outcome.reason.rstrip('.')}"
    return f"{outcome.output}: {outcome.status}" + (
        f" in {outcome.seconds:.1f} s" if outcome.status == "learned" else ""
    )


def _learn(model: Model, concept: Concept, chosen: Mapping[str, Any], bars: Any) -> tuple[str, str]:
    """What became of it, and why."""
    from mokus.training import checkpoint
    from mokus.training.checkpoint import checkpoint_of
    from mokus.visual_concept import learn

    try:
        settings = LearnSettings.for_model(model.defaults.learn, **{**chosen, **concept.settings})
        if (concept.output / "mokus.json").is_file():
            _check_same(model, concept, settings)
            if (file := checkpoint_of(concept.output)).parent.exists():
                with checkpoint.held(file):
                    checkpoint.remove(file)  # of a run that was killed when its pack was written
            return "there already", ""
        stopped = checkpoint_of(concept.output).is_file()
        what = (model, concept.photos, concept.anchor, concept.output)
        if bars is None:
            learn(*what, settings=settings, resume=stopped)
        else:
            with bars() as progress:
                learn(*what, settings=settings, resume=stopped, progress=progress)
    except FAULTS as error:
        return "failed", " ".join(str(error).split())[:500] or type(error).__name__
    return "learned", ""


def _check_same(model: Model, concept: Concept, settings: LearnSettings) -> None:
    """Raise `MokusError` unless the pack that is there is what would be learned, as far as a pack tells."""
    from mokus.packs.concept_pack import ConceptPack

    pack = ConceptPack.open(concept.output)
    pack.check_base(model)
    # a pack from before a setting was there has its default
    before, now = {**asdict(LearnSettings()), **pack.settings}, json.loads(json.dumps(asdict(settings)))
    looked_at = [name for name in now if name not in UNSEEN]
    for name, there, wanted in (
        ("anchor", pack.anchor, concept.anchor),
        *((name, before[name], now[name]) for name in looked_at),
    ):
        if there != wanted:
            raise MokusError(
                f"{concept.output} is a pack with another {name} ({there!r}, not {wanted!r}); remove it to learn it anew, or "
                "name another folder."
            )
