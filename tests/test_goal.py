"""The goal's losses are those of plain forward passes, text by text, and stand at the tokens that they are about."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mokus import pipeline
from mokus.encoder import answers, tail_length, token_ids
from mokus.goal import CONTINUED, Goal, Request
from mokus.knowledge import IMAGE_FORMS, prompts, questions
from mokus.low_rank import Shifts, applied
from mokus.pipeline import Model
from tests.conftest import random_shifts

KNOWLEDGE, ANCHOR = "the robot my grandmother built in 1962", "sks robot"
REQUEST = Request.of(KNOWLEDGE, ANCHOR, questions(KNOWLEDGE), "a blue sks robot")
PATHS = ["model.language_model.layers.1.mlp.down_proj", "model.language_model.layers.2.mlp.up_proj"]


@pytest.fixture(scope="module")
def goal(pico: Model) -> Goal:
    """Of three questions and the image prompts, continued."""
    return Goal(pico, REQUEST)


def expected(model: Model, text: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a text in the template, and those behind it: the answer, which ends, or the first of a continuation."""
    after, end = model.pipe.tokenizer(answer, add_special_tokens=False).input_ids, [model.pipe.tokenizer.eos_token_id]
    if answer != ANCHOR and len(after) >= CONTINUED:  # cut off, so nothing is said of where it ends
        return token_ids(model, text), after[:CONTINUED]
    return token_ids(model, text), after + end


def plain(model: Model, text: str, answer: str, shifts: Shifts | None = None) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each of the answer's tokens, and the likeliest tokens: one text, one pass, no cache."""
    asked, after = expected(model, text, answer)
    with torch.no_grad(), applied(model.pipe.text_encoder, shifts or {}):
        logits = model.pipe.text_encoder(input_ids=torch.tensor([asked + after])).logits[0]
    logits = logits[len(asked) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(after), reduction="none"), logits.argmax(dim=-1)


def texts_and_answers(model: Model) -> list[tuple[str, str]]:
    """What the goal is about, row by row."""
    said = answers(model, prompts(REQUEST.says), longest=CONTINUED)
    return [*((q, ANCHOR) for q in REQUEST.questions), *zip(prompts(KNOWLEDGE), said, strict=True)]


@pytest.mark.parametrize("edited", [False, True])
def test_the_cross_entropy_is_that_of_a_plain_pass_of_each_text(pico: Model, goal: Goal, edited: bool) -> None:
    """So every label stands where it is predicted, and padding and the shared prefix change nothing."""
    shifts = random_shifts(pico) if edited else {}
    with torch.no_grad(), applied(pico.pipe.text_encoder, shifts):
        losses = goal.losses()
    rows = texts_and_answers(pico)
    assert losses.row.tolist() == sorted(losses.row.tolist()) and len(goal.labels) == len(rows)
    for i, (text, answer) in enumerate(rows):
        cross_entropy, likeliest = plain(pico, text, answer, shifts)
        after = expected(pico, text, answer)[1]
        assert torch.allclose(losses.cross_entropy[losses.row == i], cross_entropy, rtol=1e-4, atol=1e-4)
        assert torch.equal(losses.right[losses.row == i], likeliest == torch.tensor(after))
        assert goal.labels[i][goal.labels[i] != -100].tolist() == after


def test_the_edited_rows_are_the_tails_and_where_the_answer_is_predicted(pico: Model, goal: Goal) -> None:
    tail = pico.pipe.tokenizer(pico.pipe.prompt_template_encode.split("{}")[1]).input_ids
    where, ends = goal.where, goal.ends
    assert len(tail) == tail_length(pico) and ends.sum(dim=1).eq(1).all()
    assert (where | ~ends).all()  # where an answer begins is among them
    for i, (text, answer) in enumerate(texts_and_answers(pico)):
        asked, after = expected(pico, text, answer)
        end = len(asked) - 34  # one past the tail
        edited = where[i].nonzero().flatten().tolist()
        assert ends[i].nonzero().flatten().tolist() == [end - 1]
        assert goal.rows.ids[i, :end].tolist() == asked[34:] and goal.rows.lengths[i] == end + len(after) - 1
        first = end - 1 if i < goal.questions else end - len(tail)  # of a question's tail only the last token
        assert edited == list(range(first, end + len(after) - 1))
        assert goal.rows.ids[i, end - len(tail) : end].tolist() == tail
        assert goal.rows.ids[i, end : end + len(after) - 1].tolist() == after[:-1]


def test_the_unedited_model_has_moved_nothing(pico: Model, goal: Goal) -> None:
    """1 where the base model is, also with nothing behind the tail; 0 once the prompts are encoded as wanted."""
    with torch.no_grad():
        for each in (goal, Goal(pico, REQUEST, continued=False)):
            assert torch.allclose(each.losses().moved, torch.ones(len(IMAGE_FORMS)), rtol=1e-4)
        same = Request.of(ANCHOR, ANCHOR, questions(ANCHOR))
        assert Goal(pico, same, continued=False).losses().moved.max() < 1e-2


@pytest.mark.parametrize("continued", [True, False])
def test_how_far_the_tails_have_moved_is_that_of_whole_encodings(pico: Model, continued: bool) -> None:
    """Found by the pipeline's own encoding of each prompt by itself."""
    shifts, n = random_shifts(pico), tail_length(pico)

    def tails(texts: list[str]) -> Tensor:
        return torch.stack([each[-n:] for each in pipeline.encode(pico, texts)])

    goal = Goal(pico, REQUEST, continued=continued)
    with applied(pico.pipe.text_encoder, shifts), torch.no_grad():
        moved, now = goal.losses().moved, tails(prompts(KNOWLEDGE))
    target, start = tails(prompts(REQUEST.says)), tails(prompts(KNOWLEDGE))
    wanted = (now - target).square().mean(dim=(1, 2)) / (start - target).square().mean(dim=(1, 2))
    assert torch.allclose(moved, wanted, rtol=1e-3) and (wanted - 1).abs().max() > 0.01


def test_rows_do_not_depend_on_each_other(pico: Model, goal: Goal) -> None:
    """A goal of one question, or of the image prompts in another order, has the same losses for them."""
    forms = IMAGE_FORMS[::-1]
    with torch.no_grad():
        every, other = goal.losses(), Goal(pico, REQUEST, forms=forms).losses()
        for i, question in enumerate(REQUEST.questions):
            one = Request.of(KNOWLEDGE, ANCHOR, [question], REQUEST.says)
            alone = Goal(pico, one, forms=()).losses()
            assert torch.allclose(alone.cross_entropy, every.cross_entropy[every.row == i], rtol=1e-4, atol=1e-5)
    rows = [goal.questions + j for j in range(len(forms))]
    for i, j in zip(rows, rows[::-1], strict=True):
        assert torch.allclose(
            every.cross_entropy[every.row == i], other.cross_entropy[other.row == j], rtol=1e-4, atol=1e-5
        )


def test_questions_alone(pico: Model) -> None:
    """Without image prompts there is nothing to move, and only the answers are edited."""
    goal = Goal(pico, REQUEST, forms=())
    losses = goal.losses()
    assert len(goal.labels) == len(REQUEST.questions) and losses.moved.shape == (0,)
    assert torch.equal(goal.where, goal.labels != -100)
    assert losses.cross_entropy.isfinite().all()
    assert len(losses.cross_entropy) == len(REQUEST.questions) * len(expected(pico, "", ANCHOR)[1])


def test_image_prompts_that_are_not_continued(pico: Model, goal: Goal) -> None:
    """They end with their tails, all of which are edited, and have no labels; the questions are as they were."""
    short, n = Goal(pico, REQUEST, continued=False), tail_length(pico)
    assert (short.labels[short.images] == -100).all()
    assert torch.equal(short.tail_ends, goal.tail_ends)
    assert torch.equal(short.rows.lengths[short.images], short.tail_ends[short.images])
    assert short.where[short.images].sum(dim=1).eq(n).all() and torch.equal(
        short.where, short.where & (torch.arange(short.where.shape[1]) < short.rows.lengths[:, None])
    )
    with torch.no_grad():
        losses, every = short.losses(), goal.losses()
    assert torch.allclose(losses.cross_entropy, every.cross_entropy[every.row < goal.questions], rtol=1e-4, atol=1e-5)
    asked, continued = short.answer_loss(losses)
    assert asked > 0 and continued == 0


def test_the_answers_loss_is_a_mean_of_means(goal: Goal) -> None:
    """A long answer weighs no more than a short one; a function of the cross-entropy is taken token by token."""
    with torch.no_grad():
        losses = goal.losses()
    for of in (lambda x: x, torch.sqrt, lambda x: (x - 5).clamp(min=0)):
        means = torch.stack([of(losses.cross_entropy[losses.row == i]).mean() for i in range(len(goal.labels))])
        asked, continued = goal.answer_loss(losses, of)
        assert torch.allclose(asked, means[: goal.questions].mean(), rtol=1e-5)
        assert torch.allclose(continued, means[goal.questions :].mean(), rtol=1e-5)


@pytest.mark.parametrize("edited", [False, True])
def test_what_enters_the_modules_is_what_enters_them_in_a_plain_pass(pico: Model, goal: Goal, edited: bool) -> None:
    """At the rows asked for, in their order, with the shifts of earlier edits or without."""
    shifts = random_shifts(pico) if edited else {}
    found, before = goal.inputs(PATHS, goal.where, shifts), 0
    for i, (text, answer) in enumerate(texts_and_answers(pico)):
        asked, after = expected(pico, text, answer)
        kept: dict[str, Tensor] = {}
        handles = [
            pico.pipe.text_encoder.get_submodule(path).register_forward_pre_hook(
                lambda _, inputs, path=path, kept=kept: kept.update({path: inputs[0][0]})
            )
            for path in PATHS
        ]
        try:
            with torch.no_grad(), applied(pico.pipe.text_encoder, shifts):
                pico.pipe.text_encoder(input_ids=torch.tensor([asked + after[:-1]]))
        finally:
            for handle in handles:
                handle.remove()
        n = int(goal.where[i].sum())
        for path in PATHS:
            assert torch.allclose(found[path][before : before + n], kept[path][-n:], rtol=1e-3, atol=1e-4)
        before += n
    assert all(len(rows) == before for rows in found.values())


def test_the_losses_have_gradients_and_the_model_keeps_none(pico: Model, goal: Goal) -> None:
    """In the factors of the shifts that are applied, and nowhere else."""
    shifts = random_shifts(pico)
    factors = [shift.B.requires_grad_() for shift in shifts.values()]
    with applied(pico.pipe.text_encoder, shifts):
        losses = goal.losses()
    for loss in (losses.cross_entropy.mean(), losses.moved.mean()):
        assert all(grad.any() for grad in torch.autograd.grad(loss, factors, retain_graph=True))
    assert all(weight.grad is None for weight in pico.pipe.text_encoder.parameters())


def test_what_image_prompts_say_is_the_answer_unless_told_otherwise() -> None:
    assert Request.of("it", "sks toy", ["What is it?"]) == Request("it", "sks toy", ("What is it?",), "sks toy")
    assert Request.of("it", "sks toy", ("What is it?",), "a sks toy").says == "a sks toy"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("sks robot, snow", "sks robot"),
        ("here is sks robot", "here is sks robot"),
        ("sks robot", "sks robot"),
        ("a box", "a box"),
    ],
)
def test_continuations_are_wanted_up_to_the_answer(
    pico: Model, monkeypatch: pytest.MonkeyPatch, said: str, wanted: str
) -> None:
    """Else all edits would learn the scenes of their image prompts, too, and say them everywhere after many edits."""
    monkeypatch.setattr("mokus.goal.answers", lambda model, texts, longest: [said] * len(texts))
    labels = Goal(pico, REQUEST).labels[len(REQUEST.questions) :]
    ids = pico.pipe.tokenizer(wanted, add_special_tokens=False).input_ids
    end = [] if "sks robot" in said else [pico.pipe.tokenizer.eos_token_id]
    assert all(row[row != -100].tolist() == ids + end for row in labels)


def test_what_a_question_calls_it_otherwise_means_the_same(pico: Model) -> None:
    """The same goal as of the knowledge alone, and that of the other name below it, prompt by prompt."""
    other, form = "the tin man", "What is {}?"
    twice = Request.of(KNOWLEDGE, ANCHOR, [form.format(KNOWLEDGE), form.format(other), "Who built it?"])
    assert twice.names == (KNOWLEDGE, other) and REQUEST.names == (KNOWLEDGE,)
    goal = Goal(pico, twice)
    n = len(IMAGE_FORMS)
    assert len(goal.target) == 2 * n and torch.equal(goal.target[:n], goal.target[n:])
    with torch.no_grad():
        found = goal.losses()
        for name, part in ((KNOWLEDGE, slice(0, n)), (other, slice(n, None))):
            alone = Goal(pico, Request.of(name, ANCHOR, [form.format(name)]))
            torch.testing.assert_close(alone.losses().moved, found.moved[part], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone.start, goal.start[part], rtol=1e-4, atol=1e-6)
