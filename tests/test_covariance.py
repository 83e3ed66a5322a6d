"""The statistics are those of all inputs at once, whatever was cached, stopped, damaged or foreign before."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mokus import covariance, encoder
from mokus.covariance import Corpus, Moments, corpus_of, moments
from mokus.encoder import CONTINUED, inputs_at_prefix, inputs_of
from mokus.errors import MokusError
from mokus.pipeline import Model
from mokus.settings import EditSettings

GATE, DOWN, Q = (
    f"model.language_model.layers.{x}" for x in ("1.mlp.gate_proj", "2.mlp.down_proj", "0.self_attn.q_proj")
)
PATHS = [DOWN, GATE, Q]
CORPUS = Corpus(
    [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("ball", "ring", "cube in the snow")],
    ["my old lamp", "the one that sings at night", "the toy of Anna", "his book by the sea", "it"],
)
CHUNKS = 3 + 5 + 1  # of up to four prompts of one length each, and the template's prefix

Stopped = type("Stopped", (Exception,), {})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, four prompts at a time, saved after each four; nothing half-written is ever left in it."""
    monkeypatch.setenv("MOKUS_CACHE", str(tmp_path))
    monkeypatch.setattr(encoder, "CHUNK", 4)
    monkeypatch.setattr(covariance, "SAVE_EVERY", -1.0)
    yield tmp_path / "statistics"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def undisturbed(pico: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Moments]:
    """What is gathered in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOKUS_CACHE", str(tmp_path_factory.mktemp("undisturbed")))
        patch.setattr(encoder, "CHUNK", 4)
        return moments(pico, PATHS, CORPUS)


def equal(a: dict[str, Moments], b: dict[str, Moments]) -> bool:
    """To the last bit."""
    return list(a) == list(b) and all(
        torch.equal(a[p].gram, b[p].gram) and torch.equal(a[p].behind, b[p].behind) and a[p].rows == b[p].rows
        for p in a
    )


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def stored(model: Model, path: str, corpus: Corpus = CORPUS) -> Path:
    return covariance.cache_folder() / "statistics" / f"{covariance._key(model, path, corpus)}.safetensors"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the chunks that are encoded from now on."""
    found: list[int] = []
    gathered = covariance._moments

    def counted(model: Model, chunks: Any, i: int, paths: list[str]) -> dict[str, Moments]:
        found.append(i)
        return gathered(model, chunks, i, paths)

    monkeypatch.setattr(covariance, "_moments", counted)
    return found


# --- what they are of --------------------------------------------------------------------------------------------------


def square(*rows: Tensor) -> Tensor:
    x = torch.cat(rows).double()
    return x.T @ x


@pytest.mark.parametrize(("chunk", "tolerance"), [(64, 1e-5), (4, 1e-5), (1, 1e-5)])
def test_the_gram_matrix_is_that_of_all_inputs_at_once(
    pico: Model, monkeypatch: pytest.MonkeyPatch, chunk: int, tolerance: float
) -> None:
    """All tokens of some prompts, the tails of others, the template's prefix once; and what the encoder says by itself."""
    monkeypatch.setattr(encoder, "CHUNK", chunk)
    found = moments(pico, PATHS, CORPUS)
    whole, tails = inputs_of(pico, CORPUS.whole, PATHS, said=CONTINUED), inputs_of(pico, CORPUS.tails, PATHS)
    prefix = inputs_at_prefix(pico, PATHS)
    for path in PATHS:
        rows = whole.whole[path], tails.tail[path], prefix[path]
        assert found[path].gram.dtype == torch.float64 and found[path].rows == sum(map(len, rows))
        assert close(found[path].gram, square(*rows), tolerance)
        assert len(whole.said[path]) > 0 and close(found[path].behind, square(whole.behind[path]), tolerance)


def test_modules_with_the_same_input_have_their_moments_in_common(pico: Model, cache: Path, encoded: list[int]) -> None:
    """One matrix of them is in memory, one file on the disk, whichever of them was asked for first."""
    up = GATE.replace("gate_proj", "up_proj")
    found = moments(pico, [up, GATE, DOWN], CORPUS)
    assert list(found) == [up, GATE, DOWN] and found[up].gram is found[GATE].gram is not found[DOWN].gram
    assert len(list(cache.glob("*.safetensors"))) == 2 and encoded == list(range(CHUNKS))
    assert equal(moments(pico, [GATE], CORPUS), {GATE: found[up]}) and len(encoded) == CHUNKS


@pytest.mark.parametrize("corpus", [Corpus([], []), Corpus(["it"], []), Corpus([], ["it"])])
def test_a_corpus_without_whole_prompts_or_without_tails(pico: Model, corpus: Corpus) -> None:
    whole, tails = inputs_of(pico, corpus.whole, [DOWN], said=CONTINUED), inputs_of(pico, corpus.tails, [DOWN])
    rows = whole.whole[DOWN], tails.tail[DOWN], inputs_at_prefix(pico, [DOWN])[DOWN]
    found = moments(pico, [DOWN], corpus)[DOWN]
    assert found.rows == sum(map(len, rows))
    assert close(found.gram, square(*rows), 1e-9)
    assert close(found.behind, square(whole.behind[DOWN]), 1e-9) if corpus.whole else not found.behind.any()


@pytest.mark.parametrize(("memory", "passes"), [(0, 3), (1_400_000, 2), (6 << 20, 1)])
def test_little_memory_makes_more_passes_and_the_same_moments(
    pico: Model,
    monkeypatch: pytest.MonkeyPatch,
    encoded: list[int],
    undisturbed: dict[str, Moments],
    memory: int,
    passes: int,
) -> None:
    monkeypatch.setattr(covariance, "MEMORY", memory)
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)
    assert encoded == list(range(CHUNKS)) * passes


@pytest.mark.parametrize("memory", [2 << 20, 5 << 20])
def test_no_pass_takes_more_memory_than_allowed(pico: Model, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """But for a single matrix that does; and two are together if they fit."""
    monkeypatch.setattr(covariance, "MEMORY", memory)

    def size(group: list[str]) -> int:
        return sum(2 * 8 * pico.pipe.text_encoder.get_submodule(path).in_features ** 2 for path in group)

    for paths in (PATHS, PATHS[::-1]):
        groups = list(covariance._passes(pico, paths))
        assert [path for group in groups for path in group] == paths
        assert all(size(group) <= memory or len(group) == 1 for group in groups)
        assert all(size([*a, b[0]]) > memory for a, b in pairwise(groups))


def test_progress_goes_up_to_all_prompts(pico: Model) -> None:
    told: list[tuple[str, int, int]] = []
    moments(pico, [GATE], CORPUS, lambda what, done, total, _: told.append((what, done, total)))
    done = [step[1] for step in told]
    total = len(CORPUS.whole) + len(CORPUS.tails)
    assert {step[0] for step in told} == {"gathering statistics"} and {step[2] for step in told} == {total}
    assert done == sorted(done) and done[-1] == total


def test_the_corpus_is_the_same_each_time_and_holds_the_models_own(pico: Model) -> None:
    settings = EditSettings(corpus=20, odd_references=7)
    own = replace(pico, corpus=("a prompt of its own",))
    some, again, more = (corpus_of(model, settings) for model in (pico, pico, own))
    assert some == again and len(some.tails) == 7 and len(some.whole) >= 20
    assert more.whole == [*some.whole, "a prompt of its own"] and more.tails == some.tails
    assert len(corpus_of(pico, EditSettings(corpus=0, odd_references=0)).whole) == 0


# --- the cache ---------------------------------------------------------------------------------------------------------


def test_a_second_call_reads_what_the_first_wrote(
    pico: Model, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Moments]
) -> None:
    """In any order, and for some of the modules; nothing is encoded, nor even tokenized, which takes longer than reading."""
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)

    def refuse(*_: Any) -> Any:
        raise AssertionError("encoded again")

    for name in ("inputs_of", "inputs_at_prefix", "of_equal_length"):
        monkeypatch.setattr(covariance, name, refuse)
    assert equal(moments(pico, PATHS, CORPUS, refuse), undisturbed)
    for path in PATHS:
        assert equal(moments(pico, [path], CORPUS), {path: undisturbed[path]})
    assert list(moments(pico, PATHS[::-1], CORPUS)) == PATHS[::-1]


def test_what_is_read_comes_to_the_models_device(pico: Model) -> None:
    """As what is gathered does; the device that holds nothing stands for a GPU."""
    moments(pico, PATHS, CORPUS)
    read = moments(replace(pico, device=torch.device("meta")), PATHS, CORPUS)
    assert {each.gram.device.type for each in read.values()} == {"meta"}


def test_only_the_modules_that_are_missing_are_gathered(
    pico: Model, monkeypatch: pytest.MonkeyPatch, encoded: list[int], undisturbed: dict[str, Moments]
) -> None:
    moments(pico, [GATE], CORPUS)
    asked: list[str] = []
    gathered = covariance._moments

    def noted(model: Model, chunks: Any, i: int, paths: list[str]) -> dict[str, Moments]:
        asked.extend(paths)
        return gathered(model, chunks, i, paths)

    monkeypatch.setattr(covariance, "_moments", noted)
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)
    assert encoded == 2 * list(range(CHUNKS)) and set(asked) == {DOWN, Q}


def test_another_corpus_model_or_module_has_another_file(pico: Model) -> None:
    """Also where the same text has moved from one part of the corpus to the other."""
    other = Corpus(CORPUS.whole[:-1], [*CORPUS.tails, CORPUS.whole[-1]])
    models = (pico, replace(pico, fingerprint="another"))
    files = {stored(model, path, corpus) for model in models for path in PATHS for corpus in (CORPUS, other)}
    assert len(files) == 12
    assert not torch.equal(moments(pico, [GATE], CORPUS)[GATE].gram, moments(pico, [GATE], other)[GATE].gram)
    assert stored(pico, GATE).is_file() and stored(pico, GATE, other).is_file()


# --- stopped -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(CHUNKS))
def test_a_stopped_run_goes_on_to_the_same_bytes(
    pico: Model, encoded: list[int], undisturbed: dict[str, Moments], after: int
) -> None:
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        if calls == after:
            raise Stopped
        calls += 1

    with pytest.raises(Stopped):
        moments(pico, PATHS, CORPUS, stop)
    assert encoded == list(range(after + 1))
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)
    assert encoded == list(range(CHUNKS))  # none of them twice


@pytest.mark.parametrize("writes", [1, 2, 4, 3 * CHUNKS - 1])
def test_stopped_between_two_modules_files(
    pico: Model, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Moments], writes: int
) -> None:
    """Some have then counted more than others; what each lacks, and no more, is added to it."""
    write, left = covariance._write, writes

    def stop(*args: Any) -> None:
        nonlocal left
        if not left:
            raise Stopped
        left -= 1
        write(*args)

    monkeypatch.setattr(covariance, "_write", stop)
    with pytest.raises(Stopped):
        moments(pico, PATHS, CORPUS)
    monkeypatch.setattr(covariance, "_write", write)
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)


def test_stopped_while_a_file_is_written(
    pico: Model, cache: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Moments]
) -> None:
    """A full disk, say: the file is the old one or not there, and nothing lies beside it."""
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        real(self, data[: len(data) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(MokusError, match=r"no space.*MOKUS_CACHE"):
        patch.setattr(Path, "write_bytes", full)
        moments(pico, PATHS, CORPUS)
    assert not list(cache.glob("*.safetensors")) and not list(cache.glob(".*.tmp"))
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)


# --- damaged, foreign --------------------------------------------------------------------------------------------------


def _flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1001] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _header_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _text(file: Path) -> None:
    file.write_text("no such page " * 100)


def _without_metadata(file: Path) -> None:
    save_file(_grams(file), file)


def _another_tensor(file: Path) -> None:
    save_file({"matrix": _grams(file)["gram"]}, file)


def _one_tensor(file: Path) -> None:
    save_file({"gram": _grams(file)["gram"]}, file)


def _exchanged(file: Path) -> None:
    grams = _grams(file)
    with safe_open(file, "pt") as opened:
        save_file({"gram": grams["behind"], "behind": grams["gram"]}, file, opened.metadata())


def _rows_are_no_number(file: Path) -> None:
    _say(file, rows="many")


def _another_format(file: Path) -> None:
    _say(file, format="0")


def _another_model(file: Path) -> None:
    _say(file, fingerprint="0" * 64)


def _nan(file: Path) -> None:
    grams = _grams(file)
    grams["behind"][0, 0] = torch.nan
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    sha256 = covariance._sha256(grams["gram"], grams["behind"], said["rows"], said["chunks"])
    save_file(grams, file, {**said, "sha256": sha256})


def _grams(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in ("gram", "behind")}


def _say(file: Path, **other: str) -> None:
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    save_file(_grams(file), file, {**said, **other})


@pytest.mark.parametrize(
    "damage",
    [
        _flipped, _cut, _header_cut, _empty, _text, _without_metadata, _another_tensor, _one_tensor,
        _exchanged, _rows_are_no_number, _another_format, _another_model, _nan,
    ],
)  # fmt: skip
def test_a_damaged_file_is_found_out_and_gathered_anew(
    pico: Model,
    caplog: pytest.LogCaptureFixture,
    encoded: list[int],
    undisturbed: dict[str, Moments],
    damage: Callable[[Path], None],
) -> None:
    """Said once, with the file's name; afterwards the file is whole."""
    moments(pico, PATHS, CORPUS)
    damage(stored(pico, GATE))
    with caplog.at_level(logging.WARNING, "mokus"):
        assert equal(moments(pico, PATHS, CORPUS), undisturbed)
    assert len(caplog.records) == 1 and str(stored(pico, GATE)) in caplog.text and "gathered anew" in caplog.text
    caplog.clear()
    del encoded[:]
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)
    assert not caplog.records and not encoded


@pytest.mark.parametrize("said", [{"rows": "1"}, {"rows": "-5"}, {"chunks": "1"}])
def test_a_damaged_count_is_found_out(pico: Model, undisturbed: dict[str, Moments], said: dict[str, str]) -> None:
    """Else means would be of the wrong size, and chunks would be counted twice."""
    moments(pico, PATHS, CORPUS)
    _say(stored(pico, GATE), **said)
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)


def test_a_file_of_something_else_under_its_name(
    pico: Model, caplog: pytest.LogCaptureFixture, undisturbed: dict[str, Moments]
) -> None:
    """Of another corpus, another model, another module of the same width."""
    other_corpus, other_model = Corpus(["a dog"], []), replace(pico, fingerprint="another")
    moments(pico, [GATE], other_corpus)
    moments(other_model, [GATE], CORPUS)
    moments(pico, PATHS, CORPUS)
    for foreign in (stored(pico, GATE, other_corpus), stored(other_model, GATE), stored(pico, Q)):
        shutil.copy(foreign, stored(pico, GATE))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mokus"):
            assert equal(moments(pico, PATHS, CORPUS), undisturbed)
        assert len(caplog.records) == 1 and "another model or corpus" in caplog.text


def test_a_stopped_run_whose_file_is_damaged(
    pico: Model, caplog: pytest.LogCaptureFixture, undisturbed: dict[str, Moments]
) -> None:
    """That module begins again; the others go on."""

    def stop(_: str, done: int, *__: Any) -> None:
        if done >= 8:
            raise Stopped

    with pytest.raises(Stopped):
        moments(pico, PATHS, CORPUS, stop)
    _cut(stored(pico, DOWN))
    assert equal(moments(pico, PATHS, CORPUS), undisturbed)
    assert len(caplog.records) == 1
