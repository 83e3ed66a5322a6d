"""The data of KnowCusBench: concepts, what is known of them, and the prompts they are drawn in.

A *suite* is one YAML or JSON file. Two come with the package: `knowcus`, of 35 photographed subjects, and `miniature`, of
12 characters of the synthetic world. A file is read with suspicion: plain data only, every field checked, and whatever
is wrong with it is one sentence with its line. The perspectives are those of the paper (arXiv 2603.12743).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml  # type: ignore[import-untyped]
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mokus.errors import MokusError
from mokus.knowledge import check_text, normalise, reference, same
from mokus.photos import SUFFIXES, load_photos

KnowledgePerspective = Literal[
    "ownership and relationships",
    "physical attributes",
    "function and performance",
    "value and quality",
    "origin and production",
    "emotion and state",
]
PromptPerspective = Literal["background", "insertion", "style", "attribute"]
KNOWLEDGE_PERSPECTIVES: tuple[str, ...] = get_args(KnowledgePerspective)
PROMPT_PERSPECTIVES: tuple[str, ...] = get_args(PromptPerspective)

SHIPPED = ("knowcus", "miniature")
RENDERED = "miniature"  # the source whose photos are rendered, of which the oracle can read what an image shows
LARGEST = 4_000_000  # bytes of a file; the larger of the shipped ones has a fiftieth of it
DEEPEST = 12  # lists and mappings inside each other; a suite has 7
CHECK_SIZE = 16  # pixels to which photos are scaled when they are only looked for

At = tuple[str | int, ...]  # keys and places in lists, from the top of a file to something in it
Lines = dict[At, int]


# --- the types --------------------------------------------------------------------------------------------------------


def _phrase(what: str, example: str) -> AfterValidator:
    return AfterValidator(lambda text: normalise(text, what, example))


def _reference(text: str) -> str:
    return reference(text, "piece of knowledge")


def _template(text: str) -> str:
    text = normalise(text, "prompt", "{} on the beach")
    if text.count("{}") != 1 or re.search("[{}]", text.replace("{}", "")):
        raise MokusError(f"the prompt {text!r} is to have {{}} once, where the knowledge goes, and no other braces.")
    if text == "{}":
        raise MokusError("the prompt says nothing besides the knowledge, which is drawn by itself anyway; add words.")
    return text


def _name(name: str) -> str:
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise MokusError(f"the name {name!r} is none of a folder, expected letters, digits, spaces and any of '_-.'.")
    return name


def _rare_token(text: str) -> str:
    text = normalise(text, "rare token", "sks")
    if " " in text:
        raise MokusError(f"the rare token {text!r} is several words, expected one, such as 'sks'.")
    return text


def _filled(text: str) -> str:
    check_text(text, "text", "the photos of my garden")
    return text.strip()


Name = Annotated[str, AfterValidator(_name)]  # also of folders, so nothing that leads elsewhere
Text = Annotated[str, Field(min_length=1), AfterValidator(_filled)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Knowledge(_Data):
    """A phrase that refers to a concept, without its anchor: "the robot my grandmother built in 1962"."""

    text: Annotated[str, AfterValidator(_reference)]
    perspective: KnowledgePerspective


class Prompt(_Data):
    """An image prompt with `{}` where the knowledge goes. `expected`: what the oracle shall read, by label; renders only."""

    text: Annotated[str, AfterValidator(_template)]
    perspective: PromptPerspective
    expected: dict[str, str] = {}


class Concept(_Data):
    """Something photographed. `name` is its folder in its source; the class word says what it is."""

    name: Name
    class_word: Annotated[str, _phrase("class word", "toy")]
    source: Text
    knowledge: Annotated[tuple[Knowledge, ...], Field(min_length=1)]
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)]


class Source(_Data):
    """Where photos come from."""

    about: Text
    url: Text
    licence: Text


class Suite(_Data):
    """Concepts that are measured together, and the rare token of all their anchors."""

    name: Name
    about: Text
    rare_token: Annotated[str, AfterValidator(_rare_token)]
    sources: Annotated[dict[Name, Source], Field(min_length=1)]
    concepts: Annotated[tuple[Concept, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if faults := sorted(_faults(self)):
            at, sentence = faults[0]
            raise PydanticCustomError("suite", "{sentence}", {"sentence": sentence, "at": at})
        return self

    @property
    def rendered(self) -> bool:
        """Whether all concepts are characters of the miniature's world, whose images the oracle can read."""
        return all(concept.source == RENDERED for concept in self.concepts)

    def anchor(self, concept: Concept) -> str:
        """What the photos of the concept are learned as: "sks toy"."""
        return f"{self.rare_token} {concept.class_word}"

    def counts(self) -> dict[str, Any]:
        """How many of everything: an int by name, and dicts of them by perspective and by source.

        "reconstruction" and "generation" are images of one method and one seed: each knowledge by itself, and in each
        prompt of its concept.
        """
        concepts = self.concepts
        known = Counter[str](each.perspective for concept in concepts for each in concept.knowledge)
        asked = Counter[str](each.perspective for concept in concepts for each in concept.prompts)
        drawn: Counter[str] = Counter()
        for concept in concepts:
            for each in concept.prompts:
                drawn[each.perspective] += len(concept.knowledge)
        sources = Counter(concept.source for concept in concepts)
        return {
            "concepts": len(concepts),
            "knowledge": known.total(),
            "prompts": asked.total(),
            "reconstruction": known.total(),
            "generation": drawn.total(),
            "concepts_by_source": {name: sources[name] for name in self.sources},
            "knowledge_by_perspective": {name: known[name] for name in KNOWLEDGE_PERSPECTIVES},
            "prompts_by_perspective": {name: asked[name] for name in PROMPT_PERSPECTIVES},
            "generation_by_perspective": {name: drawn[name] for name in PROMPT_PERSPECTIVES},
        }


# --- what one field cannot tell ---------------------------------------------------------------------------------------

Fault = tuple[At, str]  # where, and what is wrong, as a sentence


def _faults(suite: Suite) -> Iterator[Fault]:
    """What does not go together."""
    yield from _odd_names(suite)
    yield from _odd_knowledge(suite)
    for i, concept in enumerate(suite.concepts):
        for at, sentence in _odd_prompts(concept):
            yield ("concepts", i, "prompts", *at), sentence
    rare = re.compile(rf"(?<!\w){re.escape(suite.rare_token)}(?!\w)", re.IGNORECASE)
    for at, text in _texts(suite):
        if rare.search(text):
            yield at, f"{text!r} names the rare token {suite.rare_token!r}, which only anchors may; say it without."


def _texts(suite: Suite) -> Iterator[tuple[At, str]]:
    for i, concept in enumerate(suite.concepts):
        yield ("concepts", i, "class_word"), concept.class_word
        for k, knowledge in enumerate(concept.knowledge):
            yield ("concepts", i, "knowledge", k, "text"), knowledge.text
        for k, prompt in enumerate(concept.prompts):
            yield ("concepts", i, "prompts", k, "text"), prompt.text


def _odd_names(suite: Suite) -> Iterator[Fault]:
    from mokus.miniature import world

    names: set[str] = set()
    for i, (name, source) in enumerate((concept.name, concept.source) for concept in suite.concepts):
        at: At = ("concepts", i, "name")
        if name in names:
            yield at, f"the concept {name!r} is there twice; remove or rename one of them."
        names.add(name)
        if source == RENDERED and name not in world.CHARACTERS:
            known = ", ".join(world.BENCHMARK_CHARACTERS)
            yield at, f"{name!r} is no character that can be rendered, expected one such as {known}."
        if source not in suite.sources:
            known = ", ".join(suite.sources)
            yield ("concepts", i, "source"), f"the source {source!r} is not declared, expected one of {known}."


def _odd_knowledge(suite: Suite) -> Iterator[Fault]:
    owner: dict[str, str] = {}
    for i, concept in enumerate(suite.concepts):
        for k, knowledge in enumerate(concept.knowledge):
            text = same(knowledge.text)
            if text in owner:
                at: At = ("concepts", i, "knowledge", k, "text")
                yield at, f"{knowledge.text!r} is known of {owner[text]} already; say something else."
            owner.setdefault(text, concept.name)


def _odd_prompts(concept: Concept) -> Iterator[Fault]:
    """The same of one concept's prompts; where is counted from them."""
    seen: set[str] = set()
    readable = _readable() if concept.source == RENDERED else {}
    for k, prompt in enumerate(concept.prompts):
        if same(prompt.text) in seen:
            yield (k, "text"), f"the prompt {prompt.text!r} is there twice for {concept.name}; remove one of them."
        seen.add(same(prompt.text))
        for label, value in prompt.expected.items():
            at: At = (k, "expected", label)
            if not readable:
                yield at, f"nothing can be expected of {concept.name}, for nothing reads real photos; leave it out."
            elif label not in readable:
                yield at, f"nothing reads {label!r} off an image of a character, expected {' or '.join(readable)}."
            elif value not in readable[label]:
                known = ", ".join(map(repr, readable[label]))
                yield at, f"the {label} {value!r} does not exist in the world, expected one of {known}."


def _readable() -> dict[str, list[str]]:
    """What the oracle reads off any image of a character: its labels, and their values."""
    from mokus.miniature import world

    return {"scene": list(world.SCENES), "style": ["plain", *world.STYLES]}


# --- reading a file ---------------------------------------------------------------------------------------------------


def load_suite(name_or_path: str | Path) -> Suite:
    """The suite of that name, if it is one of `SHIPPED`, or of a YAML or JSON file.

    Raises `MokusError` for a file that is not there or is no suite: on which line, what, and what to do.
    """
    path = Path(name_or_path)
    if name_or_path in SHIPPED:
        path = Path(str(files("mokus.bench.knowcusbench").joinpath("suites", f"{name_or_path}.yaml")))
    data, lines = _parsed(path, _text(path))
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        told = [_told(each, lines) for each in error.errors(include_url=False) if not _follows(each)]
        line, sentence = min(told, key=lambda each: each[0])
        raise MokusError(f"{path}, line {line}: {sentence}") from error


def _follows(error: Any) -> bool:
    """Of pydantic's errors, those that are there because of others: a list whose items are wrong counts as empty."""
    return error["type"] == "too_short" and bool(error["input"])


def _text(path: Path) -> str:
    try:
        if not path.is_file():  # also keeps from waiting for a pipe
            kind = "not a file" if path.exists() else "not there"
            raise MokusError(f"{path} is {kind}, expected {', '.join(SHIPPED)}, or a suite's YAML or JSON file.")
        if (size := path.stat().st_size) > LARGEST:
            raise MokusError(f"{path} has {size:,} bytes, expected a suite of at most {LARGEST:,}; split it.")
        raw = path.read_bytes()
    except OSError as error:
        raise MokusError(f"{path} cannot be read ({error.strerror}), expected a suite in YAML or JSON.") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise MokusError(f"{path}, line {line}: this is not UTF-8; save the file as UTF-8.") from error
    return text.replace("\t", " ") if path.suffix.lower() == ".json" else text  # YAML has no tabs between words


class _Refused(yaml.MarkedYAMLError):
    """Good YAML, but nothing that belongs into a suite."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Composer(yaml.SafeLoader):
    """Nodes of one document, nothing in it twice: an alias of aliases of aliases would be a billion of them."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, with all that is in it."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise _Refused("aliases such as '*name' are not allowed; write it out.", mark)
        if self.depth == DEEPEST:
            raise _Refused(f"this is nested {DEEPEST} deep, expected a suite; see docs/knowcusbench_manifest.md.", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _parsed(path: Path, text: str) -> tuple[Any, Lines]:
    """Nothing but mappings, lists and text, and the line on which each part of it begins."""
    lines: Lines = {(): 1}
    try:
        node = _Composer(text).get_single_node()
        return (_plain(node, (), lines) if node else {}), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        sentence = f"the control character U+{error.character:04X} is not allowed; remove it."
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, sentence = mark.line + 1, ", ".join(filter(None, (error.context, error.problem)))
        if not isinstance(error, _Refused):
            sentence = f"this is no YAML or JSON ({sentence}); texts with '{{}}', ': ' or ' #' need quotes."
    raise MokusError(f"{path}, line {line}: {sentence}")


def _plain(node: Any, at: At, lines: Lines) -> Any:
    """The data of a node; the lines of what is in it go into `lines`."""
    kind = node.tag.rpartition(":")[2]
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        for i, item in enumerate(node.value):
            lines[(*at, i)] = item.start_mark.line + 1
        return [_plain(item, (*at, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        found: dict[str, Any] = {}
        for name, value in node.value:
            key = _plain(name, (), {}) if isinstance(name, yaml.ScalarNode) else ""
            if not key:
                raise _Refused("the name of a field is not text; write 'name: value'.", name.start_mark)
            if key in found:
                raise _Refused(f"{key!r} is there twice; remove one of them.", name.start_mark)
            lines[(*at, key)] = name.start_mark.line + 1
            found[key] = _plain(value, (*at, key), lines)
        return found
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        # JSON spells one character beyond U+FFFF as two halves
        return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(node, yaml.ScalarNode) and kind == "null":
        return ""  # which every field refuses as empty
    if isinstance(node, yaml.ScalarNode) and kind in ("int", "float", "bool", "timestamp", "merge", "value"):
        raise _Refused(f"{node.value[:60]} is no text here; put it in quotes.", node.start_mark)
    raise _Refused(f"the tag {node.tag!r} is not allowed; write plain text, lists and mappings.", node.start_mark)


_TYPES: dict[str, type[_Data]] = {"sources": Source, "concepts": Concept, "knowledge": Knowledge, "prompts": Prompt}
_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "a mapping"}
_WANTED = {"string_type": "text", "tuple_type": "a list", "dict_type": "a mapping", "model_type": "a mapping"}


def _told(error: Any, lines: Lines) -> tuple[int, str]:
    """The line and the sentence of one of pydantic's errors."""
    at: At = error["loc"]
    context = error.get("ctx", {})
    name = next((part for part in reversed(at) if isinstance(part, str)), "suite")[:60]
    kind, given = error["type"], error["input"]
    if kind == "suite":
        at, sentence = context["at"], context["sentence"]
    elif kind == "value_error":
        sentence = str(context["error"])
    elif kind == "missing":
        sentence = f"the field {name!r} is missing; add it."
    elif kind == "extra_forbidden":
        owner = next((_TYPES[part] for part in reversed(at[:-1]) if part in _TYPES), Suite)
        sentence = f"{name!r} is no field here, expected some of {', '.join(owner.model_fields)}."
    elif kind == "literal_error":
        sentence = f"the {name} is {repr(given)[:60]}, expected {context['expected']}."
    elif kind == "string_unicode":
        sentence = f"{name!r} holds half a character, which is what wrongly encoded bytes become; write it in UTF-8."
    elif kind in ("string_too_short", "too_short") or given == "":
        sentence = f"{name!r} is empty; fill it in."
    elif kind in _WANTED:
        sentence = f"{name!r} holds {_KINDS[type(given)]}, expected {_WANTED[kind]}; see docs/knowcusbench_manifest.md."
    else:
        sentence = f"{name!r} cannot be used: {error['msg']}."
    while at not in lines:
        at = at[:-1]
    return lines[at], sentence


# --- photos -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhotoState:
    """What there is of one concept's photos. `folder` is None where no folder was named, and for renders."""

    concept: str
    source: str
    folder: Path | None
    photos: int  # files found; renders are made when they are needed and not counted
    problem: str | None  # one sentence; None: they can be used

    @property
    def state(self) -> Literal["rendered", "ready", "missing", "unusable"]:
        """In a word: "missing" is what has no photos, "unusable" what has some that cannot be read."""
        if self.problem is None:
            return "rendered" if self.folder is None else "ready"
        return "unusable" if self.photos else "missing"


def check_photos(suite: Suite, roots: Mapping[str, Path]) -> list[PhotoState]:
    """What there is of every concept's photos, in the order of the suite; `roots` are the sources' folders by name.

    Photos are opened as `learn` opens them, but scaled to a few pixels. Nothing is raised: what is wrong is in `problem`.
    """
    return [_photos_of(suite, concept, roots) for concept in suite.concepts]


def _photos_of(suite: Suite, concept: Concept, roots: Mapping[str, Path]) -> PhotoState:
    source, url = concept.source, suite.sources[concept.source].url
    if source == RENDERED:
        return PhotoState(concept.name, source, None, 0, None)
    if source not in roots:
        return PhotoState(concept.name, source, None, 0, f"no folder of {source} was named; its photos are from {url}")
    folder, found = Path(roots[source]) / concept.name, 0
    try:
        if not folder.is_dir():
            return PhotoState(concept.name, source, folder, 0, f"{folder} is no folder; its photos are from {url}")
        found = sum(path.suffix.lower() in SUFFIXES and not path.name.startswith(".") for path in folder.iterdir())
        load_photos(folder, CHECK_SIZE)
    except MokusError as error:
        return PhotoState(concept.name, source, folder, found, str(error))
    except OSError as error:
        return PhotoState(concept.name, source, folder, found, f"{folder} cannot be listed ({error.strerror}).")
    return PhotoState(concept.name, source, folder, found, None)
