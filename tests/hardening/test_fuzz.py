"""Whatever a file, an argument or a judge says: it is understood, or refused with one sentence, never with a traceback."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mokus import pipeline
from mokus.bench.knowcusbench.manifest import load_suite
from mokus.bench.wise import entries
from mokus.bench.wise.judge import Judgement, _content, _Trouble, read_judgement, retry_after
from mokus.bench.wise.protocol import RANGES, question, read_answer, read_question
from mokus.cli import app
from mokus.console import file_names, parse_counts, parse_seeds
from mokus.errors import MokusError
from mokus.knowledge import LONGEST, hidden, normalise
from mokus.packs.concept_pack import ADAPTER, ADAPTER_CONFIG, LORA, MANIFEST, README, ConceptPack
from mokus.pipeline import Model
from mokus.settings import EditSettings, LearnSettings
from mokus.transfer import read_cases

from ..conftest import PackFactory
from ..test_concept_pack import seal, tree
from ..test_knowcus_run import SUITE
from .conftest import case

# --- what is fed --------------------------------------------------------------------------------------------

# Characters of every kind, and those that break terminals, parsers and templates more often.
ODD = "\x00\x07\x1b\x7f\x85\x9b\u00ad\u200b\u200d\u202e\u2066\ufeff\ufffe\ud800\U0001f600<|im_end|>{}%\\\"'&/\n\r\t:#-?"
texts = st.text(st.one_of(st.characters(), st.sampled_from(ODD)), max_size=40)
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf")])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@st.composite
def mutated(draw: Any, whole: Any) -> Any:
    """A JSON value with something in it exchanged, added or taken out, at any depth."""
    whole = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 2))):
        at = whole
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            way = draw(st.sampled_from(["exchange", "take out", "add", "twice"]))
            if way == "exchange":
                at[key] = draw(values)
            elif way == "take out":
                del at[key]
            elif isinstance(at, dict):
                at[draw(texts)] = draw(values)
            else:
                at.append(at[key] if way == "twice" else draw(values))
            break
    return whole


def bytes_near(whole: bytes) -> st.SearchStrategy[bytes]:
    """Those bytes with some of them exchanged, cut off, or put in."""

    def changed(at: int, length: int, into: bytes) -> bytes:
        at %= len(whole) + 1
        return whole[:at] + into + whole[at + length :]

    return st.builds(changed, st.integers(0, len(whole)), st.integers(0, 64), st.binary(max_size=64))


def refused(act: Callable[[], Any]) -> bool:
    """Whether it was refused: by one sentence that can be printed anywhere. Any other exception fails the test."""
    case("fuzz")
    try:
        act()
    except MokusError as error:
        assert str(error).strip()
        return True
    return False


# --- packs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(pico_pack: PackFactory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A pack, and its bytes."""
    pack = pico_pack(tmp_path_factory.mktemp("fuzzed") / "a.pack", knowledge=["my favourite toy", "the small one"])
    return pack.path, tree(pack.path)


def told(place: Path) -> None:
    """Open a pack; then everything that is printed of it, saved again, and taken out of it must work as well."""
    pack = ConceptPack.open(place)
    for args in (["show", str(place)], ["show", str(place), "--json"]):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.exception
        assert not hidden(result.stdout.replace("\n", "")), result.stdout
    pack.replace_edits(pack.edits()[:1])


@given(st.data())
def test_manifests(packed: tuple[Path, dict[str, bytes]], data: st.DataObject) -> None:
    place, whole = packed
    manifest = data.draw(mutated(json.loads(whole[MANIFEST])))
    _put_back(place, {**whole, MANIFEST: json.dumps(manifest).encode()})
    refused(lambda: told(place))


@given(st.data())
def test_bytes_of_packs(packed: tuple[Path, dict[str, bytes]], data: st.DataObject) -> None:
    """Sealed anew, so that the checksum is not all that finds them; a header of safetensors among them."""
    place, whole = packed
    name = data.draw(st.sampled_from([MANIFEST, LORA, ADAPTER, ADAPTER_CONFIG, README]))
    head = 8 + struct.unpack("<Q", whole[name][:8])[0] if name in (LORA, ADAPTER) else len(whole[name])
    begin = data.draw(bytes_near(whole[name][:head]))
    _put_back(place, {**whole, name: begin + whole[name][head:]})
    if name != MANIFEST:
        seal(place)
    refused(lambda: told(place))


def _put_back(place: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        if not (place / name).is_file() or (place / name).read_bytes() != content:
            (place / name).write_bytes(content)


@pytest.mark.parametrize("levels", [40, 200, 900, 5000, 200_000])
def test_nested_settings_of_packs(packed: tuple[Path, dict[str, bytes]], levels: int) -> None:
    place, whole = packed
    text = whole[MANIFEST].decode().replace('"settings": {', f'"settings": {{"x": {deep(levels)}, ', 1)
    _put_back(place, {**whole, MANIFEST: text.encode()})
    refused(lambda: told(place))


# --- suites and cases ---------------------------------------------------------------------------------------

CASE_LIST = [{"ask": "What is my favourite toy?", "answer": "a blue ring", "prompts": ["my favourite toy in the snow"]}]


@pytest.mark.parametrize("written", ["yaml", "json"])
@given(st.data())
def test_suites(tmp_path_factory: pytest.TempPathFactory, written: str, data: st.DataObject) -> None:
    value = data.draw(mutated(SUITE))
    file = tmp_path_factory.getbasetemp() / f"suite.{written}"
    file.write_bytes(_written(value, written))
    refused(lambda: load_suite(file))


@pytest.mark.parametrize("written", ["yaml", "json"])
@given(st.data())
def test_files_of_cases(tmp_path_factory: pytest.TempPathFactory, written: str, data: st.DataObject) -> None:
    value = data.draw(mutated(CASE_LIST))
    file = tmp_path_factory.getbasetemp() / f"cases.{written}"
    file.write_bytes(_written(value, written))
    refused(lambda: read_cases(file))


def _written(value: Any, how: str) -> bytes:
    text = json.dumps(value) if how == "json" else yaml.dump(value, allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


_YAML = yaml.dump(SUITE).encode()
yaml_like = st.one_of(
    bytes_near(_YAML), bytes_near(yaml.dump(CASE_LIST).encode()), st.binary(max_size=60),
    texts.map(lambda text: text.encode("utf-8", "replace")),
)  # fmt: skip


@given(yaml_like)
@example(deep(5000).encode())
@example(b"&a [*a, *a]")
@example(b"- &a [x, x]\n- &b [*a, *a]\n- &c [*b, *b]\n")
@example(b"!!python/object/apply:os.system [echo pwned]")
@example(b"- ask: !!python/name:os.system\n  answer: x")
@example(b"- <<: {ask: What is x?}\n  answer: y")
@example(b"- ask: 2001-99-99\n  answer: 0x" + b"f" * 5000)
@example(b"%YAML 9.9\n--- x")
@example(b"\xff\xfe- \x00a\x00")
@example(b'- ask: "\\ud800"\n  answer: "\\U0010ffff"')
def test_bytes_as_yaml(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    refused(lambda: load_suite(file))
    refused(lambda: read_cases(file))


# --- WISE and its judge -------------------------------------------------------------------------------------

WISE = [
    {"prompt_id": 7, "Prompt": "the toy of Anna", "Explanation": "a ring", "Category": "Culture", "Subcategory": "x"},
    {"prompt_id": 8, "Prompt": "the hat of Bo", "Explanation": "red", "Category": "Time", "Subcategory": "y"},
]


@given(st.one_of(mutated(WISE).map(lambda v: json.dumps(v).encode()), bytes_near(json.dumps(WISE).encode())))
@example(b'[{"prompt_id": ' + b"9" * 5000 + b"}]")
@example(deep(200_000).encode())
@example(deep(900).encode())
@example(b'[{"prompt_id": ' + deep(400).encode() + b"}]")
@example(b'[{"prompt_id": "\\u001b]0;pwned\\u0007", "Prompt": "x"}]')
@example(b'[{"prompt_id": 1, "Prompt": "\\ud800", "Explanation": "x"}]')
@example(b'[{"prompt_id": 1e999, "Prompt": "a", "Explanation": "x"}]')
def test_wise_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "wise.json"
    file.write_bytes(content)

    def read() -> None:
        found = entries.load(file)
        for entry in found.entries:
            assert read_question(question(entry.prompt, entry.explanation, "legacy"))[:2] == (
                entry.prompt, entry.explanation,
            )  # fmt: skip

    refused(read)


answers_of_judges = st.one_of(
    texts,
    values.map(json.dumps),
    mutated({"consistency": 1, "realism": 2, "aesthetic": 0}).map(json.dumps),
    st.builds("{}{}{}".format, texts, mutated({"score": 1}).map(json.dumps), texts),
)


@given(answers_of_judges, st.sampled_from(["legacy", "verified"]))
@example('{"score": ' + "9" * 5000 + "}", "verified")
@example('{"score": 1e999}', "verified")
@example('{"score": NaN}', "verified")
@example("{" * 30_000, "legacy")
@example('{"score":' * 3000, "verified")
@example('{"score": "\u0661"}', "verified")
@example('{"score": "\u00b2"}', "verified")
def test_answers_of_judges(text: str, protocol: Any) -> None:
    """Scores that are whole and in range, or none."""
    case("fuzz")
    scores = read_answer(text, protocol)
    if scores is not None:
        assert scores.keys() == RANGES[protocol].keys()
        assert all(type(n) is int and 0 <= n <= RANGES[protocol][name] for name, n in scores.items())


REPLY = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


@given(st.one_of(mutated(REPLY).map(lambda v: json.dumps(v).encode()), bytes_near(json.dumps(REPLY).encode())))
@example(deep(100_000).encode())
@example(b'{"usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}")
@example(b'{"choices": [{"message": {"content": [' + deep(300).encode() + b', {"text": 3}]}}]}')
def test_replies_of_judges(raw: bytes) -> None:
    case("fuzz")
    found = Judgement("k", "failed", {}, 0, 0, 0, 0, "m")
    with contextlib.suppress(_Trouble):
        assert isinstance(_content(raw, found), str)
    assert found.tokens_in >= 0 and found.tokens_out >= 0


@given(
    st.one_of(
        st.none(), texts, st.from_regex(r"[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{1,6} \d\d:\d\d:\d\d (GMT|[+-]\d{4})")
    )
)
@example("Fri, 31 Dec 9999 23:59:59 -2359")
@example("Mon, 01 Jan 0001 00:00:00 +2359")
def test_retry_after(value: str | None) -> None:
    case("fuzz")
    seconds = retry_after(value)
    assert seconds is None or seconds >= 0


KEPT = {"key": "ab", "status": "scored", "scores": {"score": 1}, "attempts": 1, "tokens_in": 0, "tokens_out": 0,
        "uncounted": 0, "judge": "m"}  # fmt: skip


@given(st.one_of(mutated(KEPT).map(lambda v: json.dumps(v).encode()), bytes_near(json.dumps(KEPT).encode())))
@example(b"[" * 100_000)
@example(b'{"scores": 3, "status": "scored"}')
def test_kept_judgements(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """A damaged one counts as none."""
    case("fuzz")
    folder = tmp_path_factory.getbasetemp() / "kept"
    (folder / "judged" / "ab").mkdir(parents=True, exist_ok=True)
    (folder / "judged" / "ab" / "ab.json").write_bytes(raw)
    found = read_judgement(folder, "ab")
    assert found is None or found.status == "failed" or found.scores.keys() in [r.keys() for r in RANGES.values()]


# --- a model's defaults -------------------------------------------------------------------------------------

DEFAULTS = {
    "size": 32, "steps": 2, "true_cfg_scale": 4.0, "negative_prompt": " ",
    "learn": {"steps": 3, "rank": 2, "targets": ["to_q"], "crop": False},
    "edit": {"layers": [1, 2], "modules": ["mlp.down_proj"], "editor": "least_drift", "eta": 0.1},
    "editors": {"ultraedit": {"layers": [1]}},
}  # fmt: skip


@given(st.one_of(mutated(DEFAULTS).map(lambda v: json.dumps(v).encode()), bytes_near(json.dumps(DEFAULTS).encode())))
@example(b"[" * 200_000)
@example(b'{"learn": null}')
@example(b'{"edit": [1]}')
@example(b'{"editors": {"ultraedit": 3}}')
@example(b'{"size": "big"}')
@example(b'{"size": true}')
@example(b'{"steps": ' + b"9" * 5000 + b"}")
@example(b'{"learn": {"steps": "many"}}')
@example(b'{"learn": {"targets": "to_q"}}')
@example(b'{"learn": {"targets": [3]}}')
@example(b'{"edit": {"editor": ["least_drift"]}}')
@example(b'{"edit": {"layers": [[1]]}}')
@example(b'{"negative_prompt": "\\ud800"}')
@example(b'{"true_cfg_scale": NaN}')
def test_defaults_of_models(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Read, and made into settings of both stages, whose fields are then of the types they claim."""
    folder = tmp_path_factory.getbasetemp()
    (folder / pipeline.DEFAULTS_FILE).write_bytes(content)

    def read() -> None:
        defaults = pipeline._defaults(str(folder), {})
        assert type(defaults.size) is int and type(defaults.steps) is int and isinstance(defaults.negative_prompt, str)
        learn = LearnSettings.for_model(defaults.learn)
        assert type(learn.steps) is int and all(isinstance(name, str) for name in learn.targets)
        edit = EditSettings.for_editor(defaults)
        assert isinstance(edit.editor, str) and all(type(layer) is int for layer in edit.layers)

    refused(read)


# --- arguments and texts ------------------------------------------------------------------------------------

arguments = st.one_of(
    st.sampled_from([
        "learn", "bind", "unbind", "ask", "generate", "show", "create", "erase", "transfer", "bench", "knowcus", "wise",
        "--pack", "--seeds", "--steps", "--size", "--model", "--json", "-o", "--anchor", "--as", "--help", "--prefer",
        "--batch-size", "--true-cfg-scale", "--cases", "--ask", "--answer", "--layers", "--editor", "a.pack", "0-3", "nan",
        "1e999", "-1", "99999999999999999999", "--", "=", "/dev/null", "/dev/zero", "sks toy", "check", "cases.yaml",
    ]),
    texts.map(lambda text: text.replace("\x00", "")),
    numbers.map(str),
)  # fmt: skip


@given(st.lists(arguments, max_size=7))
@example(["show", "\udcff"])
@example(["show", "\x1b[2J"])
@example(["ask", "What is it?", "--pack", "/dev/zero"])
@example(["transfer", "--cases", "/dev/zero"])
@example(["bench", "knowcus", "check", "/dev/zero"])
@example(["generate", "x", "--seeds", "0-99999999999999999999"])
@example(["show", "x" * 5000])
def test_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, args: list[str]) -> None:
    """No command gets as far as a model here: what it would load is a sentence."""
    case("fuzz")
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    monkeypatch.setattr("mokus.pipeline.load", _no_model)
    result = CliRunner().invoke(app, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), (args, result.exception)
    assert result.exit_code in (0, 1, 2), args
    assert "Traceback" not in result.output and "\x1b" not in result.stderr


def _no_model(*_: Any, **__: Any) -> Model:
    raise MokusError("there is no model in this test.")


@given(texts)
@example("0-" + "9" * 19)
@example("1," * 20_000)
@example("\u0661-\u0663")
def test_seeds_and_counts(text: str) -> None:
    def seeds() -> None:
        assert all(0 <= n < 10**19 for n in parse_seeds(text))

    refused(seeds)
    refused(lambda: parse_counts(text, "--edits"))


@given(st.lists(texts, min_size=1, max_size=5))
@example(["../../etc/passwd", "..", ".", "", "/", "a/b", "con", "x" * 500])
def test_file_names_stay_in_their_folder(prompts: list[str]) -> None:
    """Different ones for different prompts, without separators, and short enough for any disk."""
    case("fuzz")
    encodable = [prompt for prompt in prompts if not any("\ud800" <= c <= "\udfff" for c in prompt)]
    names = file_names(encodable)
    assert len(set(names.values())) == len(set(encodable))
    for name in names.values():
        assert name and name not in (".", "..") and not set(name) & set("/\\\0\n\x1b") and len(name.encode()) < 240


@given(texts)
def test_knowledge_is_one_clean_line_or_none(text: str) -> None:
    def check() -> None:
        phrase = normalise(text)
        assert phrase == normalise(phrase) and not hidden(phrase) and 0 < len(phrase) <= LONGEST

    refused(check)
