"""Knowledge is bound to the anchor without touching the model, one piece on top of the other, and taken out again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mokus import checks, knowledge_update, pipeline
from mokus.checks import Checked, ask
from mokus.editors import editor, least_drift
from mokus.editors.least_drift import goal_of
from mokus.editors.watch import Watch, nearly
from mokus.encoder import (
    Entering,
    Rows,
    last_of,
    module_paths,
    prefix_length,
    token_ids,
)
from mokus.errors import MokusError
from mokus.goal import Request
from mokus.knowledge import CHECK_FORMS, IMAGE_FORMS, near_misses, prompts, questions
from mokus.knowledge_update import Edit, bind, edit, unbind
from mokus.low_rank import LowRankShift, Shifts, added, applied
from mokus.packs.concept_pack import LORA, ConceptPack
from mokus.pipeline import Model, encode
from mokus.prior_prompts import in_places, prior_prompts
from mokus.settings import EditSettings
from mokus.words import Words

from .conftest import PackFactory, random_shifts

ANCHOR = "sks toy"
A, B, C = "my favourite toy", "the robot my grandmother built", "the one that makes me smile"
# Small and quick. What a model of random weights answers is left to chance, so the alignment alone decides.
QUICK = EditSettings(
    layers=[1, 2], modules=["mlp.down_proj"], steps=5, corpus=20, odd_references=10, preserve=8, near_misses=2,
    exchanged=4, near_weight=0.0, answer_weight=0.0, least_alignment=0.1,
)  # fmt: skip

EXHAUSTIVE = pytest.mark.exhaustive
Bound = Callable[..., ConceptPack]


@pytest.fixture(autouse=True, scope="module")
def short_answers() -> Iterator[None]:
    """A random encoder never ends an answer by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "LONGEST_ANSWER", 8)
        yield


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sentence(error: BaseException) -> bool:
    """One line, and closed."""
    return "\n" not in str(error) and str(error).endswith(".")


def equal(a: Shifts, b: Shifts) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[m].A, b[m].A) and torch.equal(a[m].B, b[m].B) for m in a)


@pytest.fixture(scope="module")
def bound(pico: Model, pico_pack: PackFactory, tmp_path_factory: pytest.TempPathFactory) -> Bound:
    """Packs that are equal but for what is bound to them: `bound([A, B], [C])` binds A and B in one call, then C."""
    known: dict[tuple[tuple[str, ...], ...], Path] = {}

    def folder(calls: tuple[tuple[str, ...], ...]) -> Path:
        if calls not in known:
            path = tmp_path_factory.mktemp("packs") / "toy.pack"
            if calls:
                shutil.copytree(folder(calls[:-1]), path)
                assert all(each.taken for each in bind(pico, ConceptPack.open(path), *calls[-1], settings=QUICK))
            else:
                pico_pack(path, anchor=ANCHOR, knowledge=[])
            known[calls] = path
        return known[calls]

    def make(*calls: Sequence[str]) -> ConceptPack:
        path = tmp_path_factory.mktemp("copies") / "toy.pack"
        return ConceptPack.open(shutil.copytree(folder(tuple(map(tuple, calls))), path))

    return make


@pytest.fixture(scope="module")
def edits(pico: Model) -> dict[str, Edit]:
    """The edits of A, B and C, each by itself."""
    return {text: edit(pico, text, ANCHOR, settings=QUICK) for text in (A, B, C)}


@pytest.fixture(scope="module")
def in_a_row(pico: Model) -> dict[str, Edit]:
    """The edits of A, B and C, each on top of those before it."""
    made, before, found = editor(QUICK.editor)(pico, QUICK), {}, {}
    for text in (A, B, C):
        found[text] = edit(pico, text, ANCHOR, settings=QUICK, made=made, before=before)
        made.remember(found[text].request, before, found[text].shifts)
        before = added(before, found[text].shifts)
    return found


def tail_length(model: Model) -> int:
    """Tokens of the template after the prompt."""
    return len(model.pipe.tokenizer(model.pipe.prompt_template_encode.split("{}")[1]).input_ids)


def paths(model: Model) -> list[str]:
    return module_paths(model, QUICK)


def tails(model: Model, texts: Sequence[str], *shifts: Shifts) -> Tensor:
    """(texts, tail, d), by the pipeline itself."""
    with applied(model.pipe.text_encoder, *shifts):
        return torch.stack([states[-tail_length(model) :] for states in encode(model, texts)])


def distances(model: Model, phrase: str, forms: tuple[str, ...], *shifts: Shifts) -> Tensor:
    """(forms,): how far prompts with the phrase are from those with the anchor, as a share of how far they were."""
    target = tails(model, prompts(ANCHOR, forms))
    now, start = tails(model, prompts(phrase, forms), *shifts), tails(model, prompts(phrase, forms))
    return (now - target).square().mean(dim=(1, 2)) / (start - target).square().mean(dim=(1, 2))


def answer_loss(model: Model, question: str, *shifts: Shifts) -> float:
    """Cross-entropy of the anchor as the answer, by a plain forward pass of everything."""
    pipe = model.pipe
    before = pipe.tokenizer(pipe.prompt_template_encode.format(question)).input_ids
    answer = [*pipe.tokenizer(ANCHOR).input_ids, pipe.tokenizer.eos_token_id]
    with torch.no_grad(), applied(pipe.text_encoder, *shifts):
        logits = pipe.text_encoder(input_ids=torch.tensor([before + answer])).logits[0]
    return float(F.cross_entropy(logits[len(before) - 1 : -1], torch.tensor(answer)))


# --- one edit ---------------------------------------------------------------------------------------------------------


def snapshot(model: Model) -> tuple[dict[str, Tensor], list[Tensor], int]:
    encoder = model.pipe.text_encoder
    encodings = encode(
        model, [A, ANCHOR, "a red ball in the snow"]
    )  # at the first use transformers adds hooks of its own
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in encoder.modules())
    return {name: value.clone() for name, value in encoder.state_dict().items()}, encodings, hooks


def assert_unchanged(model: Model, before: tuple[dict[str, Tensor], list[Tensor], int]) -> None:
    weights, encodings, hooks = snapshot(model)
    assert hooks == before[2]
    assert weights.keys() == before[0].keys() and all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert all(torch.equal(a, b) for a, b in zip(encodings, before[1], strict=True))
    assert all(p.grad is None and not p.requires_grad for p in model.pipe.text_encoder.parameters())


def test_earlier_edits_are_where_the_editor_is(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from a pack or from finished edits, on the CPU, and are added to shifts on the device."""
    seen: list[str] = []

    class Stub:
        def edit(self, request: Request, before: Shifts) -> tuple[dict[str, LowRankShift], int]:
            seen.extend(factor.device.type for shift in before.values() for factor in (shift.A, shift.B))
            return {}, 1

    monkeypatch.setattr(knowledge_update, "check", lambda *_: Checked("sks toy", 1.0, {}, {}))
    path = next(name for name, module in pico.pipe.text_encoder.named_modules() if name.endswith("down_proj"))
    before = {path: LowRankShift(torch.zeros(1, 8), torch.zeros(8, 1))}
    edit(replace(pico, device=torch.device("meta")), "my toy", "sks toy", made=Stub(), before=before)  # type: ignore[arg-type]
    assert seen == ["meta", "meta"]


def test_an_edit_does_not_touch_the_model(pico: Model) -> None:
    before = snapshot(pico)
    assert edit(pico, A, ANCHOR, settings=QUICK).shifts
    assert_unchanged(pico, before)


@pytest.mark.parametrize("name", ["least_drift", "ultraedit", "rome", "finetune"])
def test_an_edit_by_itself_runs_the_encoder_only_where_it_is_on_the_device(
    pico: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In tiers that keep it in host memory it is nowhere else unless it is asked for; transfer edits so."""
    there: list[str] = []
    outside: list[bool] = []

    @contextmanager
    def resident(self: Model, *names: str, task: str = "generate") -> Iterator[None]:
        there.extend(names)
        try:
            yield
        finally:
            del there[len(there) - len(names) :]

    monkeypatch.setattr(Model, "resident", resident)
    hook = pico.language_model.register_forward_pre_hook(lambda *_: outside.append("text_encoder" not in there))
    try:
        edit(pico, A, ANCHOR, settings=replace(QUICK, editor=name, steps=1))
    finally:
        hook.remove()
    assert outside and not any(outside) and not there


def test_an_edit_that_breaks_off_does_not_either(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(pico)
    with pytest.raises(MokusError, match="nothing"):
        edit(pico, A, ANCHOR, settings=replace(QUICK, editor="nothing"))
    calls = []

    def interrupt(self: Any, plain: Any = Entering.states) -> Any:
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 3:  # in the middle of the search
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(Entering, "states", interrupt)
    with pytest.raises(KeyboardInterrupt):
        edit(pico, A, ANCHOR, settings=QUICK)
    assert_unchanged(pico, before)


@pytest.mark.parametrize("phrase", [A, B, C])
def test_prompts_move_to_the_anchors(pico: Model, edits: dict[str, Edit], phrase: str) -> None:
    """On the forms that were edited and on those that were not; an independent computation finds the same."""
    found = edits[phrase]
    assert found.taken and (found.knowledge, found.answer) == (phrase, ANCHOR)
    assert float(distances(pico, phrase, IMAGE_FORMS, found.shifts).mean()) < 0.6
    checked = float(distances(pico, phrase, CHECK_FORMS, found.shifts).mean())
    assert found.alignment == pytest.approx(1 - checked, abs=1e-3)
    assert found.alignment > 0.3


def test_the_answer_becomes_the_anchor(pico: Model) -> None:
    settings = replace(QUICK, answer_weight=1.0, steps=12)
    found = edit(pico, A, ANCHOR, settings=settings)
    assert found.questions == questions(A)
    for question in questions(A):
        assert answer_loss(pico, question, found.shifts) < 0.5 * answer_loss(pico, question)
    assert found.read_back == ask(pico, questions(A)[0], [found.shifts])
    assert found.taken == (found.read_back == ANCHOR and found.alignment >= settings.least_alignment)
    assert found.read_back == ANCHOR  # of this model of random weights, too


@pytest.mark.parametrize("chosen", [{"steps": 1}, {"steps": 3}, {"drift_weight": 1e4}, {"near_weight": 100.0}])
def test_an_edit_never_leaves_more_to_do_than_there_was(pico: Model, chosen: dict[str, float]) -> None:
    """Whatever else is wanted of it, and however early it stops."""
    found = edit(pico, A, ANCHOR, settings=replace(QUICK, **chosen))
    assert float(distances(pico, A, IMAGE_FORMS, found.shifts).mean()) < 1.001


def test_the_paper_s_edit_of_the_answer_alone(pico: Model, bound: Bound) -> None:
    """Without a weight on the alignment, prompts may move anywhere, and a pack still holds it."""
    settings = replace(QUICK, answer_weight=1.0, alignment_weight=0.0, steps=12)
    (found,) = bind(pico, pack := bound(), A, settings=settings)
    assert answer_loss(pico, questions(A)[0], found.shifts) < answer_loss(pico, questions(A)[0])
    assert found.taken == (found.read_back == ANCHOR) == bool(pack.knowledge)
    assert all(0 <= known.alignment <= 1 for known in pack.knowledge)


def test_ranks_are_at_most_the_edited_rows(pico: Model, edits: dict[str, Edit]) -> None:
    paths = {f"model.language_model.layers.{layer}.{name}" for layer in QUICK.layers for name in QUICK.modules}
    for found in edits.values():
        assert found.shifts.keys() == paths
        rows = int(goal_of(pico, found.request).where.sum())
        for path, shift in found.shifts.items():
            linear = pico.pipe.text_encoder.get_submodule(path)
            assert 0 < shift.rank <= rows
            assert (shift.A.shape[1], shift.B.shape[0]) == (linear.in_features, linear.out_features)
            assert shift.A.dtype == shift.B.dtype == torch.float32


def test_an_edit_is_the_same_again_and_with_a_shared_editor(pico: Model, edits: dict[str, Edit]) -> None:
    """An editor remembers what it is told, and not what it was asked."""
    made = editor(QUICK.editor)(pico, QUICK)
    for again in [edit(pico, A, ANCHOR, settings=QUICK), *(edit(pico, A, ANCHOR, None, QUICK, made) for _ in range(2))]:
        assert replace(again, seconds=0, shifts={}) == replace(edits[A], seconds=0, shifts={})
        assert equal(again.shifts, edits[A].shifts)


def test_an_edit_spares_the_earlier_ones(pico: Model, edits: dict[str, Edit], in_a_row: dict[str, Edit]) -> None:
    """Made on top of them, it moves their prompts less than the one that knows nothing of them."""

    def drift(text: str, before: Shifts, shifts: Shifts) -> float:
        texts = prompts(text, CHECK_FORMS)
        return float((tails(pico, texts, before, shifts) - tails(pico, texts, before)).square().mean())

    first = in_a_row[A]
    assert equal(first.shifts, edits[A].shifts) and not equal(in_a_row[B].shifts, edits[B].shifts)
    assert drift(A, first.shifts, in_a_row[B].shifts) < 0.5 * drift(A, first.shifts, edits[B].shifts)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_preserved_moves_less(pico: Model) -> None:
    """Ordinary prompts, odd references, and phrases a word off, against the same edit that preserves none of them."""

    def drift(texts: Sequence[str], shifts: Shifts) -> float:
        return float((tails(pico, texts, shifts) - tails(pico, texts)).square().mean())

    none: dict[str, Any] = {
        "preserve": 0,
        "near_misses": 0,
        "exchanged": 0,
        "corpus": 0,
        "odd_references": 0,
        "rivals": 0,
    }

    def shifts(**kept: int) -> Shifts:
        return edit(pico, A, ANCHOR, settings=replace(QUICK, **{**none, **kept})).shifts

    words, free = Words.of(pico.pipe.tokenizer), shifts()
    exchanged, odd = words.exchanged(A, 24), in_places(words.references(24, seed=0), seed=0)
    for texts, kept in (
        (prior_prompts("toy", 24, seed=1), shifts(preserve=24)), (near_misses(A)[:4], shifts(near_misses=4)),
        (prior_prompts("lamp", 8, seed=0), shifts(corpus=80)), (odd, shifts(odd_references=24)),
        (exchanged, shifts(exchanged=24)),
    ):  # fmt: skip
        # the size of the edits differs, so the drift is compared with what they do to the knowledge itself
        assert drift(texts, kept) / drift([A], kept) < 0.7 * drift(texts, free) / drift([A], free)


def test_what_is_nearest_is_watched_though_it_begins_with_the_same_letters(pico: Model) -> None:
    watch = Watch(pico, ["the lucky charm of Anna in the snow", "a photo of the lucky charm of Ann"])
    watched = watch.around(Request.of("the lucky charm of Ann", ANCHOR, questions("the lucky charm of Ann")))
    assert "the lucky charm of Anna in the snow" in watched.texts
    assert "a photo of the lucky charm of Ann" not in watched.texts


@pytest.mark.exhaustive
def test_near_misses_that_are_watched_move_less(pico: Model) -> None:
    free, kept = (edit(pico, A, ANCHOR, settings=replace(QUICK, steps=12, rivals=n, near_weight=3.0)) for n in (0, 40))
    texts = nearly(pico, A)

    def moved(shifts: Shifts) -> Tensor:
        return (tails(pico, texts, shifts) - tails(pico, texts)).square().mean(dim=(1, 2))

    most = moved(free.shifts).topk(4).indices
    assert float(moved(kept.shifts)[most].mean()) < 0.8 * float(moved(free.shifts)[most].mean())
    assert kept.alignment > 0.3


@pytest.mark.parametrize(
    ("chosen", "why"),
    [({"layers": [1, 99]}, "99"), ({"layers": [-1]}, "-1"), ({"modules": ["mlp.nothing"]}, "mlp.nothing"),
     ({"editor": "magic"}, "magic"), ({"editor": "rewrite"}, "changes prompts")],
)  # fmt: skip
def test_what_cannot_be_edited_is_refused(pico: Model, bound: Bound, chosen: dict[str, Any], why: str) -> None:
    pack = bound()
    before = tree(pack.path)
    with pytest.raises(MokusError, match=why) as caught:
        bind(pico, pack, A, settings=replace(QUICK, **chosen))
    assert sentence(caught.value) and tree(pack.path) == before


# --- bind -------------------------------------------------------------------------------------------------------------


def test_bind_writes_what_took(
    pico: Model, bound: Bound, in_a_row: dict[str, Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOKUS_CACHE", str(tmp_path))  # so that there is something to gather
    pack, seen = bound(), []
    looks = tree(pack.path)[LORA]
    found = bind(pico, pack, f" {A}. ", B, A, settings=QUICK, progress=lambda *step: seen.append(step))
    assert [each.knowledge for each in found] == [A, B] and all(each.taken for each in found)
    opened = ConceptPack.open(pack.path)
    for each in (pack, opened):
        assert [known.text for known in each.knowledge] == [A, B]
        for (known, shifts), text in zip(each.edits(), (A, B), strict=True):
            assert equal(shifts, in_a_row[text].shifts)
            assert known.answer == ANCHOR and known.questions == questions(text)
            assert (known.editor, known.eta, known.steps) == ("least_drift", QUICK.eta, in_a_row[text].steps)
            assert known.ranks == {path: shift.rank for path, shift in shifts.items()}
    assert tree(pack.path)[LORA] == looks
    binding = [step for step in seen if step[0] == "binding"]
    assert [step[1:3] for step in binding] == [(0, 2), (1, 2), (2, 2)]
    reading = [step for step in seen if step[0] != "binding"]
    assert {step[0] for step in reading} == {"gathering statistics"} and reading[-1][1] == reading[-1][2] > 0


@pytest.mark.exhaustive
def test_the_same_phrase_twice_is_bound_once(pico: Model, bound: Bound) -> None:
    found = bind(pico, pack := bound(), A, f"  {A}.", A, settings=QUICK)
    assert [each.knowledge for each in found] == [A]
    assert tree(pack.path) == tree(bound([A]).path)


def test_knowledge_inside_another_is_bound_as_well(pico: Model, bound: Bound) -> None:
    found = bind(pico, pack := bound(), "my toy", "my toy robot", settings=QUICK)
    assert all(each.taken for each in found), [each.reason for each in found]
    assert [known.text for known in pack.knowledge] == ["my toy", "my toy robot"]
    for text in ("my toy", "my toy robot"):
        assert float(distances(pico, text, CHECK_FORMS, pack.shifts()).mean()) < 0.9
    unbind(pack, "my toy")
    assert [known.text for known in pack.knowledge] == ["my toy robot"]


def test_what_did_not_take_is_left_out(pico: Model, bound: Bound, edits: dict[str, Edit]) -> None:
    better, worse = (A, B) if edits[A].alignment > edits[B].alignment else (B, A)
    between = (edits[A].alignment + edits[B].alignment) / 2
    pack = bound()
    before = tree(pack.path)
    settings = replace(QUICK, least_alignment=between)
    (found,) = bind(pico, pack, worse, settings=settings)
    assert not found.taken and tree(pack.path) == before and pack.knowledge == []
    found = bind(pico, pack, A, B, settings=settings)
    assert {each.knowledge: each.taken for each in found} == {better: True, worse: False}
    assert [known.text for known in pack.knowledge] == [better]
    alone = bound()
    bind(pico, alone, better, settings=settings)
    assert tree(pack.path) == tree(alone.path)
    assert found[[A, B].index(worse)].reason.startswith("alignment")


def test_what_does_not_hold_together_is_left_out(
    pico: Model, bound: Bound, in_a_row: dict[str, Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes as it is made, but the last disturbs the first: what is written holds with all of it on."""
    real, every = knowledge_update.check, {m: sum(e.shifts[m].rank for e in in_a_row.values()) for m in paths(pico)}

    def checked(model: Model, request: Request, shifts: Shifts) -> Checked:
        crowded = {path: shift.rank for path, shift in shifts.items()} == every
        found = real(model, request, shifts)
        return replace(found, alignment=0.05) if crowded and request.knowledge == A else found

    monkeypatch.setattr(knowledge_update, "check", checked)
    found = bind(pico, pack := bound(), A, B, C, settings=QUICK)
    assert [each.taken for each in found] == [False, True, True]
    assert found[0].reason.startswith("together with the rest") and found[0].alignment == 0.05
    assert [known.text for known in pack.knowledge] == [B, C]
    for known, shifts in pack.edits():
        assert equal(shifts, in_a_row[known.text].shifts)


def test_what_was_bound_before_is_not_lost(pico: Model, bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    """New knowledge with which the old no longer holds is left out, however well it took itself."""
    pack = bound([A])
    before, real = tree(pack.path), knowledge_update.check

    def checked(model: Model, request: Request, shifts: Shifts) -> Checked:
        alone = all(shift.rank == pack.edits()[0][1][path].rank for path, shift in shifts.items())
        found = real(model, request, shifts)
        return replace(found, alignment=0.0) if request.knowledge == A and not alone else found

    monkeypatch.setattr(knowledge_update, "check", checked)
    (found,) = bind(pico, pack, B, settings=QUICK)
    assert not found.taken and A in found.reason
    assert tree(pack.path) == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_one_call_writes_the_bytes_of_several(pico: Model, bound: Bound) -> None:
    """What an editor has to remember it finds in the pack."""
    together = tree(bound([A, B, C]).path)
    for calls in (([A], [B], [C]), ([A, B], [C])):
        assert tree(bound(*calls).path) == together


@pytest.mark.exhaustive
def test_what_is_made_later_knows_of_the_earlier(pico: Model, bound: Bound, edits: dict[str, Edit]) -> None:
    """So the order counts."""
    for first, second in ((A, B), (B, A)):
        (known, shifts), (later, more) = bound([first], [second]).edits()
        assert (known.text, later.text) == (first, second)
        assert equal(shifts, edits[first].shifts) and not equal(more, edits[second].shifts)


@pytest.mark.exhaustive
def test_two_runs_write_the_same_bytes(
    pico: Model, bound: Bound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is in the cache or without; global randomness has no part in it."""
    for seed in (17, 18):
        torch.manual_seed(seed)
        bind(pico, pack := bound(), A, B, settings=QUICK)
        assert tree(pack.path) == tree(bound([A, B]).path)
        monkeypatch.setenv("MOKUS_CACHE", str(tmp_path))


def test_binding_anew_replaces(pico: Model, bound: Bound) -> None:
    pack = bound()
    bind(pico, pack, A, settings=replace(QUICK, steps=2))
    once = tree(pack.path)
    bind(pico, pack, A, settings=QUICK)
    assert tree(pack.path) == tree(bound([A]).path) != once


def test_binding_anew_replaces_at_the_end(pico: Model, bound: Bound) -> None:
    """What was bound since stays bit for bit, and the new edit is on top of it."""
    pack = bound([A], [B])
    (_, old), (_, kept) = pack.edits()
    (found,) = bind(pico, pack, A, settings=QUICK)
    (first, shifts), (second, new) = ConceptPack.open(pack.path).edits()
    assert (first.text, second.text) == (B, A) and equal(shifts, kept)
    assert equal(new, found.shifts) and not equal(new, old)


@pytest.mark.exhaustive
def test_binding_anew_what_does_not_take_leaves_the_old(pico: Model, bound: Bound, edits: dict[str, Edit]) -> None:
    """Alone or in a call with others."""
    better, worse = (A, B) if edits[A].alignment > edits[B].alignment else (B, A)
    hard = replace(QUICK, least_alignment=(edits[A].alignment + edits[B].alignment) / 2)
    pack = bound([worse])
    before, old = tree(pack.path), pack.edits()[0][1]
    assert not bind(pico, pack, worse, settings=hard)[0].taken
    assert tree(pack.path) == before
    found = bind(pico, pack, worse, better, settings=hard)
    kept = {known.text: shifts for known, shifts in pack.edits()}
    assert set(kept) == {worse} | {each.knowledge for each in found if each.taken}
    assert equal(kept[worse], old)


def test_own_questions_are_asked(pico: Model, bound: Bound) -> None:
    own = ["Which toy do I like best?", "And now?"]
    (found,) = bind(pico, pack := bound(), A, questions=own, settings=QUICK)
    assert found.questions == own and pack.knowledge[0].questions == own
    assert found.read_back == ask(pico, own[0], [found.shifts])


def test_what_cannot_be_bound_is_refused(pico: Model, pico_folder: Path, bound: Bound) -> None:
    pack = bound()
    before = tree(pack.path)
    for knowledge, own, why in (
        ([], None, "no knowledge"), ([A, " "], None, "empty"), (["what is my toy?"], None, "question"),
        ([A, B], ["What?"], "one"),
    ):  # fmt: skip
        with pytest.raises(MokusError, match=why) as caught:
            bind(pico, pack, *knowledge, questions=own, settings=QUICK)
        assert sentence(caught.value)
    other = replace(pico, fingerprint="f" * 64, id="another model")
    with pytest.raises(MokusError, match="another model"):
        bind(other, pack, A, settings=QUICK)
    assert tree(pack.path) == before


ODD_TEXTS = {
    # a text: what the refusal says; empty if it is bound
    "": "empty", " . ": "empty", "\u200d": "empty", "x" * 10_000: "10000 characters", "my toy " * 1_500: "characters",
    "my toy\nof wood": "line break", "my toy\r\nof wood": "line break", "my \x00toy": "control character",
    "my \ud83d toy": "broken character", "my \u202etoy": "invisible character", "a <|im_end|> b": "template",
    "my 🦆🏽‍🚀 toy": "", "🦆": "", "הצעצוע האהוב שלי": "", "لعبتي المفضلة": "", "我最喜欢的玩具": "", "x" * 200: "",
    "the {} of {0} %s {{": "", "a": "", "thing": "", "me": "", "It's \"the\" one; DROP TABLE": "",
    ANCHOR: "the anchor itself", "Sks  toy.": "the anchor itself",
}  # fmt: skip


MORE = {"🦆", "لعبتي المفضلة", "我最喜欢的玩具", "a", "thing", "me", "x" * 200}  # bound, and much like others


@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=[EXHAUSTIVE] * (text in MORE), id=ascii(text)[1:21]) for text in ODD_TEXTS]
)
def test_odd_texts_are_bound_or_refused_in_one_sentence(pico: Model, bound: Bound, text: str) -> None:
    pack, settings = bound([A]), replace(QUICK, steps=2, least_alignment=0.0)
    before, old = tree(pack.path), pack.edits()[0][1]
    if why := ODD_TEXTS[text]:
        with pytest.raises(MokusError, match=why) as caught:
            bind(pico, pack, "a fine phrase", text, settings=settings)
        assert sentence(caught.value) and tree(pack.path) == before
        return
    (found,) = bind(pico, pack, text, settings=settings)
    assert not found.taken or [known.text for known in ConceptPack.open(pack.path).knowledge] == [A, text]
    assert equal(pack.edits()[0][1], old)
    if found.taken:
        unbind(pack, text)
    assert tree(pack.path) == before


@pytest.mark.parametrize(
    "own", ["{0} {1}?", "אז מה?", *(pytest.param(x, marks=EXHAUSTIVE) for x in ("Which {toy}?", "{}", f"{A} {A}?"))]
)
def test_odd_questions_are_asked_too(pico: Model, bound: Bound, own: str) -> None:
    (found,) = bind(pico, pack := bound(), A, questions=[own], settings=replace(QUICK, steps=2, least_alignment=0.0))
    assert found.questions == [own] and [known.questions for known in pack.knowledge] == [[own]] * found.taken


def test_a_question_without_the_knowledge_in_it_is_not_its_own_near_miss(pico: Model) -> None:
    """What is watched must not be what is edited."""
    watch, own = least_drift.Editor(pico, QUICK).watch, ["Which toy do I like best?", "And now?"]
    assert not {*own, *prompts(A)} & {*watch.around(Request.of(A, ANCHOR, own)).texts}
    assert not {*questions(A), *prompts(A)} & {*watch.around(Request.of(A, ANCHOR, questions(A))).texts}


@pytest.mark.parametrize(
    ("layers", "where", "name"),
    [
        ([1, 2], "layers.1.mlp.down_proj", "least_drift"), ([0], "layers.1.mlp.down_proj", "least_drift"),
        pytest.param([1], "layers.1.mlp.down_proj", "least_drift", marks=EXHAUSTIVE),
        pytest.param([3], "layers.1.mlp.down_proj", "least_drift", marks=EXHAUSTIVE),
        ([1], "norm", "least_drift"), ([1], "norm", "memit"), ([1], "norm", "finetune"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_refused(
    pico: Model, pico_folder: Path, bound: Bound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: list[int],
    where: str, name: str,
) -> None:  # fmt: skip
    """One weight that is no number, in, above or below the layers that are edited; with statistics at hand or without."""
    damaged = pipeline.load(pico_folder, device="cpu")
    language_model = damaged.pipe.text_encoder.model.language_model
    language_model.get_submodule(where).weight.view(-1)[5] = float("nan")
    pack, settings = bound([A]), replace(QUICK, layers=layers, editor=name)
    before = tree(pack.path)
    edit(pico, B, ANCHOR, settings=settings)  # of the whole model, which has the same fingerprint
    for _ in range(2):
        with pytest.raises(MokusError, match=r"NaN|finite") as caught:
            bind(damaged, pack, B, settings=settings)
        assert sentence(caught.value) and tree(pack.path) == before
        monkeypatch.setenv("MOKUS_CACHE", str(tmp_path))


def test_the_model_is_as_before_a_bind(pico: Model, bound: Bound) -> None:
    before = snapshot(pico)
    bind(pico, bound(), A, settings=replace(QUICK, steps=2))
    assert_unchanged(pico, before)


# --- unbind -----------------------------------------------------------------------------------------------------------


def test_unbinding_the_last_leaves_no_trace(pico: Model, bound: Bound) -> None:
    """However it was bound, and down to nothing."""
    base, with_a, with_b = (tree(bound(*calls).path) for calls in ((), ([A],), ([A], [B])))
    for pack in (bound([A], [B], [C]), bound([A, B, C])):
        unbind(pack, f"{C}.")
        assert tree(pack.path) == with_b and [known.text for known in pack.knowledge] == [A, B]
        unbind(pack, B)
        assert tree(pack.path) == with_a
        unbind(pack, A)
        assert tree(pack.path) == base


@pytest.mark.parametrize(
    "texts", [(A,), (B,), (A, B), (A, C), (B, C)], ids=lambda texts: "".join("ABC"[(A, B, C).index(t)] for t in texts)
)
def test_unbinding_takes_out_exactly_its_own_rows(pico: Model, bound: Bound, texts: tuple[str, ...]) -> None:
    pack = bound([A, B, C])
    whole, old = pack.shifts(), {known.text: (known, shifts) for known, shifts in pack.edits()}
    unbind(pack, *texts)
    for each in (pack, ConceptPack.open(pack.path)):
        assert [known.text for known in each.knowledge] == [text for text in old if text not in texts]
        for known, shifts in each.edits():
            assert known == old[known.text][0] and equal(shifts, old[known.text][1])
        for path, shift in each.shifts().items():
            owner = [text for text, (known, _) in old.items() for _ in range(known.ranks[path])]
            stay = torch.tensor([text not in texts for text in owner])
            assert torch.equal(shift.A, whole[path].A[stay]) and torch.equal(shift.B, whole[path].B[:, stay])


def test_in_which_order_it_is_unbound_does_not_matter(pico: Model, bound: Bound) -> None:
    one, other = bound([A, B, C]), bound([A, B, C])
    unbind(one, A, B)
    unbind(other, B)
    unbind(other, A)
    assert tree(one.path) == tree(other.path)
    unbind(one, C)
    assert tree(one.path) == tree(bound().path)


def test_after_unbinding_all_the_encodings_are_the_models(pico: Model, bound: Bound) -> None:
    pack, texts = bound([A], [B, C]), [A, B, ANCHOR, *prior_prompts("toy", 8, 0)]
    before = encode(pico, texts)
    with applied(pico.pipe.text_encoder, pack.shifts()):
        assert not torch.equal(encode(pico, [A])[0], before[0])
    unbind(pack, B)
    unbind(pack, A, C)
    assert pack.shifts() == {}
    with applied(pico.pipe.text_encoder, pack.shifts()):
        assert all(torch.equal(a, b) for a, b in zip(encode(pico, texts), before, strict=True))


def test_what_is_not_bound_cannot_be_unbound(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", knowledge=[A, B])
    before = tree(pack.path)
    for wanted in ([C], [A, C], ["my favourite toys"]):
        with pytest.raises(MokusError, match="is not bound") as caught:
            unbind(pack, *wanted)
        assert A in str(caught.value) and tree(pack.path) == before
    unbind(pack, A, B)
    with pytest.raises(MokusError, match="none"):
        unbind(pack, A)


def test_what_is_bound_is_unbound_in_another_spelling(tmp_path: Path, pico_pack: PackFactory) -> None:
    """Of capital letters, unless both spellings are bound: then it is the one that is named."""
    pack = pico_pack(tmp_path / "a.pack", knowledge=[A, B])
    unbind(pack, A.upper())
    assert [known.text for known in pack.knowledge] == [B]
    both = pico_pack(tmp_path / "b.pack", knowledge=[A, A.capitalize(), B])
    unbind(both, A.capitalize())
    assert [known.text for known in both.knowledge] == [A, B]


def test_what_another_process_bound_since_stays(pico: Model, bound: Bound) -> None:
    """A pack that was opened before another wrote to it."""
    mine = bound([A], [B])
    other = ConceptPack.open(mine.path)
    unbind(other, B)
    bind(pico, mine, C, settings=QUICK)
    assert [known.text for known in mine.knowledge] == [A, C]
    unbind(other, A)
    assert [known.text for known in ConceptPack.open(mine.path).knowledge] == [C]


# --- ask --------------------------------------------------------------------------------------------------------------


def greedy(model: Model, question: str, *shifts: Shifts) -> str:
    """The likeliest token again and again, without any cache."""
    pipe = model.pipe
    start = ids = pipe.tokenizer(pipe.prompt_template_encode.format(question)).input_ids
    with torch.no_grad(), applied(pipe.text_encoder, *shifts):
        while len(ids) < len(start) + checks.LONGEST_ANSWER:
            token = int(pipe.text_encoder(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == pipe.tokenizer.eos_token_id:
                break
            ids = [*ids, token]
    return str(pipe.tokenizer.decode(ids[len(start) :], skip_special_tokens=True)).strip()


def test_ask_is_greedy(pico: Model, edits: dict[str, Edit]) -> None:
    for question in ("What is my favourite toy?", "Say {} to %s", "x"):
        assert ask(pico, question) == greedy(pico, question)
    shifts = random_shifts(pico)
    assert ask(pico, "x", [shifts]) == greedy(pico, "x", shifts) != ask(pico, "x")
    assert ask(pico, "x", [shifts, edits[A].shifts]) == greedy(pico, "x", shifts, edits[A].shifts)


def test_ask_is_greedy_whatever_the_model_folder_says(pico_folder: Path) -> None:
    """Qwen-Image's generation_config has a repetition penalty, under which the question's own words lose."""
    model = pipeline.load(pico_folder, device="cpu")
    model.pipe.text_encoder.generation_config.update(repetition_penalty=20.0, do_sample=True, temperature=0.5, top_k=3)
    for question in ("What is my favourite toy?", "Which thing is the lamp?"):
        assert ask(model, question) == greedy(model, question)


def test_ask_uses_no_randomness_and_leaves_no_trace(pico: Model) -> None:
    before = snapshot(pico)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = ask(pico, "What is it?", [random_shifts(pico)])
    assert torch.equal(torch.get_rng_state(), state)
    assert ask(pico, "What is it?", [random_shifts(pico)]) == first
    assert_unchanged(pico, before)


# --- rows -------------------------------------------------------------------------------------------------------------

TEXTS = ["a red ball", A, " ", "the thing my grandmother carved in 1962 for all of us, at night, a picture"]


@pytest.mark.parametrize("many", [(), (1,), (1, 2)], ids=["plain", "shifted", "twice"])
def test_the_cached_prefix_changes_nothing(pico: Model, many: tuple[int, ...]) -> None:
    """Rows run behind the template's prefix, padded, are what the pipeline encodes prompt by prompt."""
    shifts: list[dict[str, LowRankShift]] = [random_shifts(pico, seed) for seed in many]
    rows = Rows.of(pico, TEXTS)
    with torch.no_grad(), applied(pico.pipe.text_encoder, *shifts):
        states = rows.encode(pico)
        for i, wanted in enumerate(encode(pico, TEXTS)):
            assert int(rows.lengths[i]) == len(wanted)
            assert torch.allclose(states[i, : len(wanted)], wanted, atol=1e-5)


def test_rows_keep_to_themselves(pico: Model) -> None:
    """Joined with others and with an answer behind them, rows are encoded as they are alone."""
    answer = pico.pipe.tokenizer(ANCHOR).input_ids
    one, other = Rows.of(pico, TEXTS[:2], answer), Rows.of(pico, TEXTS[2:])
    both = one + other
    assert both.lengths.tolist() == [*one.lengths.tolist(), *other.lengths.tolist()]
    plain = Rows.of(pico, TEXTS)
    assert (both.lengths - plain.lengths).tolist() == [len(answer)] * 2 + [0] * 2
    with torch.no_grad():
        together, apart = both.encode(pico), plain.encode(pico)
    for i, n in enumerate(plain.lengths.tolist()):
        assert torch.allclose(together[i, :n], apart[i, :n], atol=1e-5)  # what follows has no influence
        assert torch.equal(both.ids[i, :n], plain.ids[i, :n])
    assert both.ids[0, : both.lengths[0]][-len(answer) :].tolist() == answer


def test_the_last_tokens_of_rows(pico: Model) -> None:
    rows = Rows.of(pico, TEXTS)
    counts = [1, 5, 3, 0]
    mask = rows.last(counts)
    assert mask.sum(dim=1).tolist() == counts
    for row, length, count in zip(mask, rows.lengths.tolist(), counts, strict=True):
        assert row.nonzero().flatten().tolist() == list(range(length - count, length))


def test_the_tail_is_found_at_each_row_s_end(pico: Model) -> None:
    rows, n = Rows.of(pico, TEXTS), tail_length(pico)
    with torch.no_grad():
        found = last_of(rows.encode(pico), rows.lengths, n)
    assert torch.allclose(found, tails(pico, TEXTS), atol=1e-5)
    assert prefix_length(pico) == 34
    assert [len(token_ids(pico, text)) - 34 for text in TEXTS] == rows.lengths.tolist()
