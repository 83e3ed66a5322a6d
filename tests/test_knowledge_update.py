"""Knowledge is bound to the anchor without touching the model, each piece by itself, and taken out without a trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mokus import knowledge_update, pipeline
from mokus.concept_pack import ADAPTER, ADAPTER_CONFIG, LORA, ConceptPack
from mokus.errors import MokusError
from mokus.knowledge import CHECK_FORMS, IMAGE_FORMS, near_misses, prompts, questions
from mokus.knowledge_update import Edit, Rows, ask, bind, edit, preserved_inputs, unbind
from mokus.low_rank import LowRankShift, Shifts, applied
from mokus.pipeline import Model, encode
from mokus.prior_prompts import in_places, prior_prompts
from mokus.settings import EditSettings
from mokus.words import Words

from .conftest import PackFactory, random_shifts

ANCHOR = "sks toy"
A, B, C = "my favourite toy", "the robot my grandmother built", "the one that makes me smile"
# Small and quick. What a model of random weights answers is left to chance, so the alignment alone decides.
QUICK = EditSettings(
    layers=[1, 2], eta=0.005, steps=6, preserve=8, odd_references=0, near_misses=2, exchanged=0, answer_weight=0.0,
    least_alignment=0.1,
)  # fmt: skip

Bound = Callable[..., ConceptPack]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def tail_length(model: Model) -> int:
    """Tokens of the template after the prompt."""
    return len(model.pipe.tokenizer(model.pipe.prompt_template_encode.split("{}")[1]).input_ids)


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


def test_an_edit_does_not_touch_the_model(pico: Model) -> None:
    before = snapshot(pico)
    assert edit(pico, A, ANCHOR, settings=QUICK).shifts
    assert_unchanged(pico, before)


def test_an_edit_that_breaks_off_does_not_either(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(pico)
    with pytest.raises(MokusError, match="nothing"):
        edit(pico, A, ANCHOR, settings=replace(QUICK, editor="nothing"))
    calls = []

    def interrupt(self: Any, model: Model, plain: Any = Rows.encode) -> Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return plain(self, model)

    monkeypatch.setattr(Rows, "encode", interrupt)
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
    settings = replace(QUICK, answer_weight=1.0)
    found = edit(pico, A, ANCHOR, settings=settings)
    assert found.questions == questions(A)
    for question in questions(A):
        assert answer_loss(pico, question, found.shifts) < 0.5 * answer_loss(pico, question)
    assert found.read_back == ask(pico, questions(A)[0], [found.shifts])
    assert found.taken == (found.read_back == ANCHOR and found.alignment >= settings.least_alignment)
    assert found.read_back == ANCHOR  # of this model of random weights, too


@pytest.mark.parametrize("eta", [0.005, 0.3])
def test_an_edit_never_leaves_more_to_do_than_there_was(pico: Model, eta: float) -> None:
    """The best of all steps is kept, also where every one of them overshoots."""
    found = edit(pico, A, ANCHOR, settings=replace(QUICK, eta=eta, steps=3))
    assert float(distances(pico, A, IMAGE_FORMS, found.shifts).mean()) < 1.001


def test_the_paper_s_edit_of_the_answer_alone(pico: Model, bound: Bound) -> None:
    """Without a weight on the alignment, prompts may move anywhere, and a pack still holds it."""
    settings = replace(QUICK, answer_weight=1.0, alignment_weight=0.0, eta=0.03)
    (found,) = bind(pico, pack := bound(), A, settings=settings)
    assert answer_loss(pico, questions(A)[0], found.shifts) < answer_loss(pico, questions(A)[0])
    assert found.taken == (found.read_back == ANCHOR) == bool(pack.knowledge)
    assert all(0 <= known.alignment <= 1 for known in pack.knowledge)


def test_ranks_are_at_most_the_edited_rows(pico: Model, edits: dict[str, Edit]) -> None:
    answer = len(pico.pipe.tokenizer(ANCHOR).input_ids) + 1  # and the end
    rows = len(questions(A)) * answer + len(IMAGE_FORMS) * tail_length(pico)
    paths = {f"model.language_model.layers.{layer}.{name}" for layer in QUICK.layers for name in QUICK.modules}
    for found in edits.values():
        assert found.shifts.keys() == paths
        for path, shift in found.shifts.items():
            linear = pico.pipe.text_encoder.get_submodule(path)
            assert 0 < shift.rank <= rows
            assert (shift.A.shape[1], shift.B.shape[0]) == (linear.in_features, linear.out_features)
            assert shift.A.dtype == shift.B.dtype == torch.float32


def test_an_edit_is_the_same_again_and_with_shared_preserved_rows(pico: Model, edits: dict[str, Edit]) -> None:
    kept = preserved_inputs(pico, ANCHOR, QUICK)
    for again in (edit(pico, A, ANCHOR, settings=QUICK), edit(pico, A, ANCHOR, settings=QUICK, kept=kept)):
        assert replace(again, seconds=0, shifts={}) == replace(edits[A], seconds=0, shifts={})
        assert equal(again.shifts, edits[A].shifts)


def test_what_is_preserved_moves_less(pico: Model) -> None:
    """Ordinary prompts, odd references, and phrases a word off, against the same edit that preserves none of them."""

    def drift(texts: Sequence[str], shifts: Shifts) -> float:
        return float((tails(pico, texts, shifts) - tails(pico, texts)).square().mean())

    def shifts(**kept: int) -> Shifts:
        return edit(pico, A, ANCHOR, settings=replace(QUICK, **{"preserve": 0, "near_misses": 0, **kept})).shifts

    free, ordinary, near = shifts(), shifts(preserve=24), shifts(near_misses=4)
    odd, exchanged = shifts(odd_references=24), shifts(exchanged=24)
    # the size of the edits differs, so the drift is compared with what they do to the knowledge itself
    texts = prior_prompts("toy", 24, seed=0)
    assert drift(texts, ordinary) / drift([A], ordinary) < 0.7 * drift(texts, free) / drift([A], free)
    texts = near_misses(A)[:4]
    assert drift(texts, near) / drift([A], near) < 0.7 * drift(texts, free) / drift([A], free)
    words = Words.of(pico.pipe.tokenizer)
    texts = in_places(words.references(24, seed=0), seed=0)
    assert drift(texts, odd) / drift([A], odd) < 0.7 * drift(texts, free) / drift([A], free)
    texts = words.exchanged(A, 24)
    assert drift(texts, exchanged) / drift([A], exchanged) < 0.7 * drift(texts, free) / drift([A], free)


@pytest.mark.parametrize(
    ("chosen", "why"),
    [({"layers": [1, 99]}, "99"), ({"layers": [-1]}, "-1"), ({"modules": ["mlp.nothing"]}, "mlp.nothing"),
     ({"editor": "rome"}, "rome")],
)  # fmt: skip
def test_what_cannot_be_edited_is_refused(pico: Model, bound: Bound, chosen: dict[str, Any], why: str) -> None:
    pack = bound()
    before = tree(pack.path)
    with pytest.raises(MokusError, match=why):
        bind(pico, pack, A, settings=replace(QUICK, **chosen))
    assert tree(pack.path) == before


# --- bind -------------------------------------------------------------------------------------------------------------


def test_bind_writes_what_took(pico: Model, bound: Bound, edits: dict[str, Edit]) -> None:
    pack, seen = bound(), []
    looks = tree(pack.path)[LORA]
    found = bind(pico, pack, f" {A}. ", B, A, settings=QUICK, progress=lambda *step: seen.append(step))
    assert [each.knowledge for each in found] == [A, B] and all(each.taken for each in found)
    opened = ConceptPack.open(pack.path)
    for each in (pack, opened):
        assert [known.text for known in each.knowledge] == [A, B]
        for (known, shifts), text in zip(each.edits(), (A, B), strict=True):
            assert equal(shifts, edits[text].shifts)  # as each by itself
            assert known.answer == ANCHOR and known.questions == questions(text)
            assert (known.editor, known.eta, known.steps) == ("ultraedit", QUICK.eta, edits[text].steps)
            assert known.ranks == {path: shift.rank for path, shift in shifts.items()}
    assert tree(pack.path)[LORA] == looks
    binding = [step for step in seen if step[0] == "binding"]
    assert [step[1:3] for step in binding] == [(0, 2), (1, 2), (2, 2)]
    reading = [step for step in seen if step[0] != "binding"]
    assert {step[0] for step in reading} == {"reading what must stay"} and reading[-1][1] == reading[-1][2] > 0


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


def test_what_does_not_hold_together_is_left_out(pico: Model, bound: Bound, edits: dict[str, Edit]) -> None:
    """Each takes by itself, but edits of a small model disturb each other: what is written holds with all of it on."""
    least = min(each.alignment for each in edits.values()) - 0.01
    found = bind(pico, pack := bound(), A, B, C, settings=replace(QUICK, least_alignment=least))
    written = [known.text for known in pack.knowledge]
    assert written == [each.knowledge for each in found if each.taken]
    assert 0 < len(written) < 3
    for text in written:
        assert 1 - float(distances(pico, text, CHECK_FORMS, pack.shifts()).mean()) >= least - 1e-3


def test_what_was_bound_before_is_not_lost(pico: Model, bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    """New knowledge with which the old no longer holds is left out, however well it took itself."""
    pack = bound([A])
    before, real = tree(pack.path), knowledge_update._checked

    def checked(model: Model, text: str, answer: str, question: str, shifts: Shifts) -> tuple[str, float]:
        alone = all(shift.rank == pack.edits()[0][1][path].rank for path, shift in shifts.items())
        return (answer, 0.0) if text == A and not alone else real(model, text, answer, question, shifts)

    monkeypatch.setattr(knowledge_update, "_checked", checked)
    assert [each.taken for each in bind(pico, pack, B, settings=QUICK)] == [False]
    assert tree(pack.path) == before


def test_one_call_writes_the_weights_of_several(pico: Model, bound: Bound) -> None:
    together, apart, turned = bound([A, B]), bound([A], [B]), bound([B], [A])
    one, other = tree(together.path), tree(apart.path)
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in (ADAPTER, ADAPTER_CONFIG, LORA))
    by_text = {known.text: shifts for known, shifts in turned.edits()}
    assert list(by_text) == [B, A]
    assert all(equal(by_text[known.text], shifts) for known, shifts in apart.edits())


def test_one_call_writes_the_bytes_of_several(pico: Model, bound: Bound) -> None:
    assert tree(bound([A, B]).path) == tree(bound([A], [B]).path)


def test_two_runs_write_the_same_bytes(pico: Model, bound: Bound) -> None:
    torch.manual_seed(17)  # global randomness has no part in it
    bind(pico, pack := bound(), A, settings=QUICK)
    assert tree(pack.path) == tree(bound([A]).path)


def test_binding_anew_replaces(pico: Model, bound: Bound) -> None:
    pack = bound()
    bind(pico, pack, A, settings=replace(QUICK, steps=2))
    once = tree(pack.path)
    bind(pico, pack, A, settings=QUICK)
    assert tree(pack.path) == tree(bound([A]).path) != once


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
    (found,) = bind(pico, pack := bound(), A, questions=own, settings=replace(QUICK, steps=2))
    assert found.questions == own and pack.knowledge[0].questions == own
    assert found.read_back == ask(pico, own[0], [found.shifts])


def test_what_cannot_be_bound_is_refused(pico: Model, pico_folder: Path, bound: Bound) -> None:
    pack = bound()
    before = tree(pack.path)
    for knowledge, own, why in (
        ([], None, "no knowledge"), ([A, " "], None, "empty"), (["what is my toy?"], None, "question"),
        ([A, B], ["What?"], "one"),
    ):  # fmt: skip
        with pytest.raises(MokusError, match=why):
            bind(pico, pack, *knowledge, questions=own, settings=QUICK)
    other = replace(pico, fingerprint="f" * 64, id="another model")
    with pytest.raises(MokusError, match="another model"):
        bind(other, pack, A, settings=QUICK)
    assert tree(pack.path) == before


def test_the_model_is_as_before_a_bind(pico: Model, bound: Bound) -> None:
    before = snapshot(pico)
    bind(pico, bound(), A, settings=replace(QUICK, steps=2))
    assert_unchanged(pico, before)


# --- unbind -----------------------------------------------------------------------------------------------------------


def test_unbinding_leaves_no_trace(pico: Model, bound: Bound) -> None:
    pack, base, with_a = bound([A], [B]), tree(bound().path), tree(bound([A]).path)
    assert tree(pack.path) != with_a
    unbind(pack, f"{B}.")
    assert tree(pack.path) == with_a and [known.text for known in pack.knowledge] == [A]
    unbind(pack, A)
    assert tree(pack.path) == base


def test_unbinding_the_first_leaves_the_second(pico: Model, bound: Bound) -> None:
    pack, other = bound([A], [B]), bound([B])
    unbind(pack, A)
    assert {name: data for name, data in tree(pack.path).items() if name != "mokus.json"} == {
        name: data for name, data in tree(other.path).items() if name != "mokus.json"
    }
    assert equal(pack.shifts(), other.shifts())


@pytest.mark.parametrize("text", [A, B])
def test_of_what_was_bound_in_one_call_no_trace_is_left_either(pico: Model, bound: Bound, text: str) -> None:
    unbind(pack := bound([A, B]), B if text == A else A)
    assert tree(pack.path) == tree(bound([text]).path)


def test_after_unbinding_all_the_encodings_are_the_models(pico: Model, bound: Bound) -> None:
    pack, texts = bound([A]), [A, ANCHOR, *prior_prompts("toy", 8, 0)]
    before = encode(pico, texts)
    with applied(pico.pipe.text_encoder, pack.shifts()):
        assert not torch.equal(encode(pico, [A])[0], before[0])
    unbind(pack, A)
    assert pack.shifts() == {}
    with applied(pico.pipe.text_encoder, pack.shifts()):
        assert all(torch.equal(a, b) for a, b in zip(encode(pico, texts), before, strict=True))


def test_what_is_not_bound_cannot_be_unbound(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", knowledge=[A, B])
    before = tree(pack.path)
    for wanted in ([C], [A, C], ["My favourite toy"]):
        with pytest.raises(MokusError, match="is not bound") as caught:
            unbind(pack, *wanted)
        assert A in str(caught.value) and tree(pack.path) == before
    unbind(pack, A, B)
    with pytest.raises(MokusError, match="none"):
        unbind(pack, A)


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
        while len(ids) < len(start) + knowledge_update.LONGEST_ANSWER:
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
