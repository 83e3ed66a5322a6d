"""What each editor says it solves is what an independent computation finds, and all of them keep one protocol."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mokus import covariance
from mokus.covariance import corpus_of, moments
from mokus.editors import (
    CHECKED,
    EDITORS,
    alphaedit,
    editor,
    finetune,
    finetune_lora,
    least_drift,
    rewrite,
    settings_of,
    settings_used,
    values,
)
from mokus.editors.least_drift import _basis
from mokus.editors.rewrite import rewritten
from mokus.editors.ultraedit import Normaliser, dual
from mokus.editors.watch import KEPT_FORMS, Watch
from mokus.encoder import Rows, distance, inputs_of, tails
from mokus.errors import MokusError
from mokus.goal import Goal, Losses, Request
from mokus.knowledge import questions
from mokus.low_rank import LowRankShift, Shifts, added, applied
from mokus.pipeline import Model, encode
from mokus.prior_prompts import prior_prompts
from mokus.settings import EditSettings
from tests.conftest import random_shifts

SETTINGS = EditSettings(
    layers=[1, 2], modules=["mlp.down_proj"], corpus=20, odd_references=10, preserve=8, near_misses=2, exchanged=4, rivals=2,
    steps=5, eta=0.01,
)  # fmt: skip
REQUEST, OTHER, THIRD = (
    Request.of(text, "sks toy", questions(text))
    for text in ("my favourite toy", "the robot my grandmother built", "what Anna found by the sea")
)
SHIFTING = [name for name in EDITORS if name != "rewrite"]
LOCATED = ["rome", "memit", "alphaedit"]
D_IN, D_OUT = 12, 7

Stopped = type("Stopped", (Exception,), {})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics are gathered once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOKUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


Edited = Callable[[str], tuple[dict[str, LowRankShift], int]]


@pytest.fixture(scope="module")
def edited(pico: Model) -> Edited:
    """`edited(name)`: what an editor that knows of nothing else makes of `REQUEST`; made once."""
    return lru_cache(maxsize=None)(lambda name: made(name, pico).edit(REQUEST, {}))


def made(name: str, model: Model, **other: Any) -> Any:
    return editor(name)(model, replace(SETTINGS, editor=name, **other))


def exact(shift: LowRankShift) -> Tensor:
    """dW, float64."""
    return shift.B.double() @ shift.A.double()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def equal(a: Shifts, b: Shifts) -> bool:
    """To the last bit."""
    return list(a) == list(b) and all(torch.equal(a[p].A, b[p].A) and torch.equal(a[p].B, b[p].B) for p in a)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


# --- the protocol ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITORS)
def test_every_editor_finds_finite_shifts_of_linear_modules(pico: Model, edited: Edited, name: str) -> None:
    """That fit: `applied` refuses others."""
    shifts, steps = edited(name)
    with applied(pico.pipe.text_encoder, shifts):
        assert tails(pico, [REQUEST.knowledge]).isfinite().all()
    for path, shift in shifts.items():
        assert isinstance(pico.pipe.text_encoder.get_submodule(path), nn.Linear)
        assert shift.A.isfinite().all() and shift.B.isfinite().all()
        assert shift.A.dtype == shift.B.dtype == torch.float32
        assert not shift.A.requires_grad and not shift.B.requires_grad
    assert (steps > 0 and any(exact(shift).any() for shift in shifts.values())) != (name == "rewrite")
    assert name.startswith(("finetune", "rewrite")) or list(shifts) == made(name, pico).paths


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(pico: Model, monkeypatch: pytest.MonkeyPatch, name: str, fails: bool) -> None:
    """Every weight, and no hook stays, also when an edit fails in the middle."""
    encoder = pico.pipe.text_encoder
    encode(pico, ["a red ball"])  # at the first use transformers adds hooks of its own
    there = hooks(encoder)
    before, one = {key: value.clone() for key, value in encoder.state_dict().items()}, made(name, pico)
    losses, left = Goal.losses, 1 if name == "ultraedit" else 3

    def failing(self: Goal, *states: Tensor) -> Losses:
        nonlocal left
        left -= 1
        if not left:
            raise Stopped
        return losses(self, *states)

    if fails and name != "rewrite":
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Goal, "losses", failing)
            one.edit(REQUEST, {})
    else:
        one.remember(REQUEST, {}, one.edit(REQUEST, {})[0])
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert hooks(encoder) == there
    assert not any(weight.requires_grad or weight.grad is not None for weight in encoder.parameters())


@pytest.mark.parametrize("name", SHIFTING)
def test_the_same_edit_twice_is_the_same_bytes(pico: Model, edited: Edited, name: str) -> None:
    assert equal(made(name, pico).edit(REQUEST, {})[0], edited(name)[0])


@pytest.mark.parametrize("name", SHIFTING)
def test_an_editor_that_is_told_of_earlier_edits_is_as_one_that_made_them(pico: Model, name: str) -> None:
    """So binding one after the other is binding all at once, to the last bit."""
    one, told = made(name, pico), made(name, pico)
    first = one.edit(REQUEST, {})[0]
    one.remember(REQUEST, {}, first)
    told.remember(REQUEST, {}, first)
    second, again = one.edit(OTHER, first)[0], told.edit(OTHER, first)[0]
    assert second and not equal(second, first) and equal(second, again)


@pytest.mark.parametrize(
    "name", ["", "values", "UltraEdit", "../ultraedit", "ultraedit ", "mokus.editors.rome", "__init__"]
)
def test_an_unknown_editor_is_refused_by_name(name: str) -> None:
    for ask in (editor, settings_of):
        with pytest.raises(MokusError, match="least_drift, ultraedit"):
            ask(name)


@pytest.mark.parametrize("name", EDITORS)
def test_settings_of_an_editor(pico: Model, name: str) -> None:
    """Are known; the model's go before them, then the model's for this editor, then what the user chooses."""
    own = settings_of(name)
    assert own.keys() <= {f.name for f in fields(EditSettings)}
    plain = replace(pico.defaults, edit={"eta": 0.25, "steps": 3}, editors={})
    found = EditSettings.for_editor(plain, editor=name)
    assert found == EditSettings(**{**own, "eta": 0.25, "steps": 3, "editor": name})
    nearer = replace(plain, editors={name: {"eta": 0.5}, "another": {"eta": 0.75}})
    assert EditSettings.for_editor(nearer, editor=name).eta == 0.5
    chosen = {"steps": 4} if name == "least_drift" else {"eta": 2.0} if name != "rewrite" else {"answer_weight": 2.0}
    assert vars(EditSettings.for_editor(nearer, editor=name, **chosen)).items() >= chosen.items()


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_reads_the_settings_it_says_and_refuses_others(pico: Model, name: str) -> None:
    read: set[str] = set()

    class Read(EditSettings):
        def __getattribute__(self, key: str) -> Any:
            read.add(key)
            return super().__getattribute__(key)

    one = editor(name)(pico, Read(**{**vars(SETTINGS), "editor": name}))
    read.clear()
    again = editor(name)(pico, one.settings if hasattr(one, "settings") else SETTINGS)
    again.remember(REQUEST, {}, again.edit(REQUEST, {})[0])
    names = {f.name for f in fields(EditSettings)} - {"editor"}
    assert names & read <= {*settings_used(name)} and {*settings_used(name)} - {*CHECKED} <= read
    for each in names - {*settings_used(name)}:
        with pytest.raises(MokusError, match=f"^{each} means nothing to the editor '{name}'"):
            EditSettings.for_editor(pico.defaults, editor=name, **{each: getattr(SETTINGS, each)})


@pytest.mark.parametrize("name", SHIFTING)
def test_every_editor_edits_a_model_in_bfloat16(pico: Model, name: str) -> None:
    """As large models are loaded on a GPU; what is found stays float32."""
    half = replace(pico, pipe=copy.deepcopy(pico.pipe).to(torch.bfloat16))
    shifts, _ = made(name, half).edit(REQUEST, {})
    assert shifts and all(x.isfinite().all() and x.dtype == torch.float32 for s in shifts.values() for x in (s.A, s.B))


def test_a_dropped_editor_is_freed_at_once(pico: Model) -> None:
    """It holds matrices of the size of the encoder's; nothing in it goes round in a circle."""
    one = made("least_drift", pico)
    one.remember(REQUEST, {}, one.edit(REQUEST, {})[0])
    there = weakref.ref(one)
    gc.disable()
    try:
        del one
        assert there() is None
    finally:
        gc.enable()


# --- ultraedit ---------------------------------------------------------------------------------------------------------


def case(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (n, d_in) and where the outputs shall move to (n, d_out); features of very different sizes."""
    return torch.logspace(-1, 1, D_IN) * normal(n, D_IN, seed=n + seed), normal(n, D_OUT, seed=1000 + n + seed)


def ridge(h: Tensor, v: Tensor) -> Tensor:
    """The textbook solution dW (d_out, d_in), by the normal equations in the input space, float64."""
    h, v = h.double(), v.double()
    return torch.linalg.solve(h.T @ h + torch.eye(h.shape[1], dtype=h.dtype), h.T @ v).T


def small(h: Tensor, v: Tensor) -> Tensor:
    shift = LowRankShift(dual(h), v.T.contiguous())
    assert shift.rank <= len(h) and shift.A.dtype == torch.float32
    return exact(shift)


@pytest.mark.parametrize("n", [1, 4, D_IN, 30])
def test_the_small_solve_is_the_ridge_regression(n: int) -> None:
    h, v = case(n)
    assert close(small(h, v), ridge(h, v))


def test_nothing_near_the_ridge_regression_is_better() -> None:
    """A convex objective: where no small change of dW lowers it, that is its minimum."""
    h, v = case(4)
    dw, random = small(h, v), torch.Generator().manual_seed(1)

    def objective(x: Tensor) -> float:
        return float((h.double() @ x.T - v).square().sum() + x.square().sum())

    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(25):
            change = torch.randn(dw.shape, generator=random, dtype=dw.dtype)
            assert objective(dw + size * change / change.norm()) > objective(dw)


def test_the_order_of_rows_does_not_matter_but_what_belongs_to_which() -> None:
    h, v = case(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert close(small(h[order], v[order]), small(h, v))
    assert not close(small(h[order], v), small(h, v), 1e-2)


def test_hundreds_of_rows_that_are_nearly_the_same() -> None:
    """The tails of many prompts are: the solve must not lose its digits."""
    h = 30 * normal(1, D_IN, seed=3) + 1e-3 * normal(400, D_IN, seed=4)
    v = normal(400, D_OUT, seed=5)
    assert close(small(h, v), ridge(h, v), 1e-3)


@pytest.mark.parametrize("sizes", [[2, 3], [1, 1, 1, 1], [7], [1, 40], [40, 1, 5]])
def test_running_statistics_are_those_of_all_rows_at_once(sizes: list[int]) -> None:
    """The unbiased variance, whatever the batches and their order, also far from zero."""
    rows = 1e3 + torch.logspace(-3, 1, D_IN) * normal(sum(sizes), D_IN)
    parts = [Normaliser.of(part) for part in rows.split(sizes)]
    for order in (parts, parts[::-1]):
        total = sum(order[1:], start=order[0])
        assert total.count == len(rows)
        assert torch.allclose(total.mean, rows.double().mean(dim=0), rtol=1e-12)
        assert torch.allclose(total.squares / (len(rows) - 1), rows.double().var(dim=0), rtol=1e-6)
        standard = total.standardised(rows)
        assert torch.allclose(standard.mean(dim=0), torch.zeros(D_IN, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(standard.var(dim=0), torch.ones(D_IN, dtype=torch.float64), rtol=1e-6)


def test_rows_that_do_not_vary_are_no_nan() -> None:
    """A single row stays as it is; of equal ones nothing is left; a constant feature does not disturb the others."""
    row = normal(1, D_IN)
    assert torch.equal(Normaliser.of(row).standardised(row), row.double())
    assert not Normaliser.of(row.expand(5, -1)).standardised(row).any()
    rows = torch.cat([normal(5, 3), torch.full((5, 1), 4.0)], dim=1)
    both = Normaliser.of(rows[:1]) + Normaliser.of(rows[1:])
    assert both.standardised(rows).isfinite().all() and not both.standardised(rows)[:, 3].any()


def test_an_edit_of_ultraedit_is_the_regression_of_the_paper(pico: Model) -> None:
    """At the answer to the first question, onto -eta ||h~||^2 g~, with the statistics of all edits so far."""
    one = made("ultraedit", pico)
    captured = [one._captured(each, {}) for each in (OTHER, REQUEST)]
    one.remember(OTHER, {}, {})
    for path, shift in one.edit(REQUEST, {})[0].items():
        h, g = (x.double() for x in captured[1][path])
        every = [torch.cat([part[path][i].double() for part in captured]) for i in (0, 1)]
        standard = [(x - rows.mean(dim=0)) / rows.std(dim=0) for x, rows in zip((h, g), every, strict=True)]
        wanted = -SETTINGS.eta * standard[0].square().sum(dim=1, keepdim=True) * standard[1]
        assert close(exact(shift), ridge(h, wanted))
        assert shift.rank == len(h) == len(pico.pipe.tokenizer(REQUEST.answer).input_ids) + 1


# --- rome, memit, alphaedit --------------------------------------------------------------------------------------------


def key_of(model: Model, request: Request, path: str, shifts: Shifts | None = None) -> Tensor:
    """The mean input (1, d_in), float64, where answers begin."""
    goal = Goal(model, request)
    return goal.inputs([path], goal.ends, shifts or {})[path].double().mean(dim=0, keepdim=True)


def test_rome_moves_the_keys_output_by_exactly_what_it_lacks(pico: Model) -> None:
    one = made("rome", pico, layers=[2])
    (path, shift), *more = one.edit(REQUEST, {})[0].items()
    assert not more and shift.rank == 1
    goal = Goal(pico, REQUEST)
    wanted, start = values.value(goal, path, {}, SETTINGS.steps, SETTINGS.eta), values.state(goal, path, {})
    linear, key = pico.pipe.text_encoder.get_submodule(path), key_of(pico, REQUEST, path).float()
    with applied(pico.pipe.text_encoder, {path: shift}):
        moved = linear(key)
    assert close((moved - linear(key))[0], (wanted - start).mean(dim=0), 1e-3)


def test_rome_is_the_smallest_change_that_does_so(pico: Model) -> None:
    """In the metric of what enters elsewhere: tr(dW C dW^T) is larger for any other dW with the same output of the key."""
    one = made("rome", pico, layers=[1])
    path, random = one.paths[0], torch.Generator().manual_seed(2)
    key, c = key_of(pico, REQUEST, path), one.covariance[path]
    assert close(one.spread(path, key) @ key.T, torch.ones(1, 1, dtype=torch.float64), 1e-9)
    r = normal(5, 1).double()
    dw = r @ one.spread(path, key)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(10):
            other = torch.randn(dw.shape, generator=random, dtype=dw.dtype)
            other -= (other @ key.T) @ key / key.square().sum()  # the key's output stays
            other *= size * dw.norm() / other.norm()
            assert close((dw + other) @ key.T, r, 1e-6)
            assert torch.trace((dw + other) @ c @ (dw + other).T) > torch.trace(dw @ c @ dw.T)


@pytest.mark.parametrize("ridge", [0.1, 100.0])
def test_memit_is_the_dense_formula(pico: Model, ridge: float) -> None:
    """Where that can be computed: few tokens have entered here, and their covariance is singular."""
    one = made("memit", pico, ridge=ridge)
    for path in one.paths:
        one.covariance[path] = one.covariance[path] + 0.01 * torch.eye(len(one.covariance[path]), dtype=torch.float64)
        key = key_of(pico, REQUEST, path)
        dense = key @ torch.linalg.inv(ridge * one.covariance[path] + key.T @ key)
        assert close(one.spread(path, key), dense, 1e-8)


def test_alphaedit_is_the_dense_formula_after_several_edits(pico: Model) -> None:
    """R K^T P (Kp Kp^T P + K K^T P + ridge I)^-1, with the keys of earlier edits as they are once those are made."""
    one, ridge_, earlier = made("alphaedit", pico, layers=[1], ridge=0.5, null_space=0.2), 0.5, []
    before: Shifts = {}
    for request in (OTHER, THIRD, REQUEST):
        for path in one.paths:
            key, free = key_of(pico, request, path, before), one.free[path]
            p = free @ free.T
            kp = torch.cat([key[:0], *(keys[path] for keys in earlier)]).T  # (d_in, edits)
            inside = kp @ kp.T @ p + key.T @ key @ p + ridge_ * torch.eye(len(p), dtype=p.dtype)
            assert close(one.spread(path, key), key @ p @ torch.linalg.inv(inside), 1e-6)
        shifts = random_shifts(pico, seed=1 + len(earlier))
        one.remember(request, before, shifts)
        before = added(before, shifts)
        earlier.append({path: key_of(pico, request, path, before) for path in one.paths})


def test_alphaedit_writes_where_hardly_anything_enters_elsewhere(pico: Model) -> None:
    """Its shift vanishes on all other directions; those free are orthonormal, and all that are weak enough."""
    one = made("alphaedit", pico, ridge=0.5, null_space=0.2)
    for path, shift in one.edit(REQUEST, {})[0].items():
        free, c = one.free[path], one.covariance[path]
        eye = torch.eye(len(c), dtype=c.dtype)
        assert 0 < free.shape[1] < len(c)
        assert close(free.T @ free, eye[: free.shape[1], : free.shape[1]], 1e-9)
        weak = torch.linalg.eigvalsh(c)
        share = 0.2 * weak.mean()
        assert torch.linalg.eigvalsh(free.T @ c @ free).max() < share
        assert free.shape[1] == int((weak < share).sum())
        rest = exact(shift) @ (eye - free @ free.T)
        assert exact(shift).norm() > 0 and rest.norm() < 1e-5 * exact(shift).norm()


def test_without_a_free_direction_alphaedit_changes_nothing() -> None:
    assert alphaedit.null_space(torch.eye(4, dtype=torch.float64), 0.5).shape == (4, 0)
    assert alphaedit.null_space(torch.eye(4, dtype=torch.float64), 2.0).shape == (4, 4)


def test_the_value_makes_the_answer_likelier(pico: Model) -> None:
    """It is the state and one direction for all rows, no longer than allowed, whose push at the module lowers the loss."""
    goal, path = Goal(pico, REQUEST), made("rome", pico, layers=[2]).paths[0]
    start = values.state(goal, path, {})
    assert start.shape == (len(goal.labels), 192)
    for rate in (0.1, 100.0):
        d = values.value(goal, path, {}, 4, rate) - start
        assert torch.allclose(d, d[:1].expand_as(d), atol=1e-3 * float(d.norm(dim=1).max()))
        assert 0 < d[0].norm() <= 1.001 * values.CLAMP * start.norm(dim=1).mean()
    d = (values.value(goal, path, {}, 4, 0.1) - start)[0]
    with torch.no_grad():
        before = sum(goal.answer_loss(goal.losses()))
        with values._pushed(goal, path, d):
            assert sum(goal.answer_loss(goal.losses())) < before
            assert torch.allclose(values.state(goal, path, {}), start + d, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LOCATED)
def test_located_editors_spread_one_residual_over_the_layers(pico: Model, edited: Edited, name: str) -> None:
    """Each matrix changes by rank one; the first of two takes half of what is wanted, the last all that is then left."""
    shifts, goal = edited(name)[0], Goal(pico, REQUEST)
    first, last = shifts
    wanted = values.value(goal, last, {}, SETTINGS.steps, SETTINGS.eta)
    lacks, left = (wanted - values.state(goal, last, so_far) for so_far in ({}, {first: shifts[first]}))
    assert [shift.rank for shift in shifts.values()] == [1, 1]
    assert close(shifts[first].B[:, 0], lacks.mean(dim=0) / 2, 1e-4)
    assert close(shifts[last].B[:, 0], left.mean(dim=0), 1e-4)


@pytest.mark.parametrize("name", LOCATED)
def test_a_module_that_does_not_write_into_the_stream_is_refused(pico: Model, name: str) -> None:
    """The value is a hidden state, so it cannot be an up-projection's output: a user's mistake, not a traceback."""
    with pytest.raises(MokusError, match="up_proj"):
        made(name, pico, modules=["mlp.up_proj"]).edit(REQUEST, {})


# --- least drift -------------------------------------------------------------------------------------------------------


def metric(rest: Tensor) -> Tensor:
    """C = R^T R + I."""
    return rest + torch.eye(len(rest), dtype=rest.dtype)


def drift(dw: Tensor, c: Tensor) -> float:
    return float(((dw @ c) * dw).sum())


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """R^T R of every module for which a basis is made from now on."""
    found: list[Tensor] = []

    def noted(h: Tensor, rest: Tensor) -> Tensor:
        found.append(rest)
        return _basis(h, rest)

    monkeypatch.setattr(least_drift, "_basis", noted)
    return found


@pytest.mark.parametrize(("n", "m"), [(1, 0), (3, 5), (3, 40), (D_IN, 5), (40, 40)])
def test_the_basis_is_orthonormal_in_the_metric_and_spans_the_least_drifting_directions(n: int, m: int) -> None:
    h, r = normal(n, D_IN), (torch.logspace(-1, 1, D_IN) * normal(m, D_IN, seed=1)).double()
    c = metric(r.T @ r)
    a = _basis(h, r.T @ r)
    assert a.dtype == torch.float32 and len(a) <= min(n, D_IN)
    assert torch.allclose(a.double() @ c @ a.T.double(), torch.eye(len(a), dtype=torch.float64), atol=1e-4)
    spanned = torch.linalg.solve(c, h.double().T)  # columns C^-1 h
    q = torch.linalg.qr(spanned)[0]
    assert close(q @ (q.T @ a.T.double()), a.T.double(), 1e-4)
    if n < D_IN:  # well-conditioned: nothing is left out
        q = torch.linalg.qr(a.T.double())[0]
        assert len(a) == n and close(q @ (q.T @ spanned), spanned, 1e-3)


def test_rows_that_are_nearly_the_same_have_few_directions() -> None:
    base, rest = normal(2, D_IN), torch.zeros(D_IN, D_IN, dtype=torch.float64)
    assert len(_basis(base.repeat(50, 1), rest)) == 2
    assert len(_basis(base.repeat(50, 1) + 1e-6 * normal(100, D_IN, seed=1), rest)) == 2


@pytest.mark.parametrize("m", [0, 5, 40])
def test_no_other_change_with_the_same_outputs_drifts_less(m: int) -> None:
    """And every wanted output can be had: B A is the least drifting of all dW with its outputs at H."""
    h, r = normal(4, D_IN), (torch.logspace(-1, 1, D_IN) * normal(m, D_IN, seed=1)).double()
    c, a = metric(r.T @ r), _basis(h, r.T @ r).double()
    wanted, h = normal(D_OUT, 4, seed=2).double(), h.double()
    dw = wanted @ torch.linalg.pinv(a @ h.T) @ a
    assert close(dw @ h.T, wanted, 1e-4)
    vanishing = torch.eye(D_IN, dtype=torch.float64) - h.T @ torch.linalg.solve(h @ h.T, h)
    for seed in range(20):
        for size in (1e-2, 1.0, 100.0):
            other = dw + size * normal(D_OUT, D_IN, seed=seed).double() @ vanishing
            assert close(other @ h.T, dw @ h.T, 1e-4)
            assert drift(other, c) > drift(dw, c)


def test_modules_with_the_same_input_share_what_is_computed_of_it(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bits of an editor that computes it for each of them."""
    modules = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]

    def after_another() -> tuple[Any, Shifts]:
        one = made("least_drift", pico, layers=[1], modules=modules)
        before, _ = one.edit(OTHER, {})
        one.remember(OTHER, {}, before)
        return one, one.edit(REQUEST, before)[0]

    one, shared = after_another()
    assert len(one.paths) == 3 and len(one.grams) == len(one.earlier) == 2
    for module in (covariance, least_drift):
        monkeypatch.setattr(module, "entrance", lambda path: path)
    each, own = after_another()
    assert len(each.grams) == 3 and equal(shared, own)


def test_the_square_of_b_is_the_drift(pico: Model, rests: list[Tensor]) -> None:
    """What dW changes elsewhere, and dW itself, as a share of the outputs' energy over the corpus (the median matrix's)."""
    one = made("least_drift", pico, layers=[0, 1, 2])
    known = moments(pico, one.paths, corpus_of(pico, one.settings))
    bases, pulls = one._bases(Goal(pico, REQUEST), REQUEST, {})
    assert not pulls  # before any edit
    energies = []
    for path in one.paths:
        weight = pico.pipe.text_encoder.get_submodule(path).weight.double()
        energies.append(float(torch.trace(weight @ known[path].gram @ weight.T)))
    energy = sorted(energies)[len(energies) // 2]
    for (path, a), rest in zip(bases.items(), rests, strict=True):
        b = normal(192, len(a), seed=len(a))
        assert abs(drift(exact(LowRankShift(a, b)), metric(rest)) / energy / float(b.square().sum()) - 1) < 1e-3
        assert torch.linalg.eigvalsh(rest - known[path].gram).min() > -1e-6 * torch.linalg.eigvalsh(rest).max()


def test_the_drift_of_a_later_edit_is_what_it_adds_to_that_of_all(pico: Model, rests: list[Tensor]) -> None:
    """||B||^2 + 2 <B, P> is, at what shall stay as it was, the drift of D + B A less that of D, and at the rest that of B A."""
    one = made("least_drift", pico, layers=[1, 2])
    earlier = {path: LowRankShift(normal(3, 512, seed=1), normal(192, 3, seed=2)) for path in one.paths}
    one.remember(OTHER, {}, earlier)
    bases, pulls = one._bases(Goal(pico, REQUEST), REQUEST, earlier)
    for (path, a), rest in zip(bases.items(), rests, strict=True):
        b, before = normal(192, len(a), seed=3).double(), exact(earlier[path])
        dw, stays = b @ a.double(), rest - least_drift.EARLIER_WEIGHT * one.earlier[path]
        added = drift(before + dw, stays) - drift(before, stays) + drift(dw, metric(rest) - stays)
        found = one.scale**2 * float(b.square().sum() + 2 * (b * pulls[path]).sum())
        assert abs(found / added - 1) < 1e-3


def test_an_edit_makes_up_for_what_earlier_ones_did_elsewhere(pico: Model, rests: list[Tensor]) -> None:
    """Were nothing wanted of it but to drift little, all edits together would drift less after it."""
    one = made(
        "least_drift", pico, layers=[1], answer_weight=0.0, alignment_weight=0.0, near_weight=0.0, drift_weight=1.0
    )
    path = one.paths[0]
    earlier = {path: LowRankShift(normal(3, 512, seed=1), 0.01 * normal(192, 3, seed=2))}
    shifts, _ = one.edit(REQUEST, earlier)
    after = exact(earlier[path]) + exact(shifts[path])
    assert drift(after, metric(rests[0])) < 0.99 * drift(exact(earlier[path]), metric(rests[0]))


def answered(model: Model, texts: list[str], answer: str, path: str) -> Tensor:
    """Inputs (m, d_in) at the tails of prompts and at the answer behind each."""
    ids = model.tokenizer(answer, add_special_tokens=False).input_ids
    rows = Rows.of(model, texts, ids)
    return rows.inputs(model, [path], rows.last([5 + len(ids)] * len(texts)))[path]


def test_all_that_shall_stay_counts_as_elsewhere(pico: Model, rests: list[Tensor]) -> None:
    """Besides the corpus the class word, near misses, the answer's own prompts, and earlier edits, the most."""
    one, goal = made("least_drift", pico, layers=[1]), Goal(pico, REQUEST)
    path = one.paths[0]

    def holds(rest: Tensor, texts: list[str], weight: float = 1.0, answer: str = "") -> bool:
        """The inputs of all these prompts are among the rows: R^T R less theirs is positive semidefinite."""
        x = (answered(pico, texts, answer, path) if answer else inputs_of(pico, texts, [path]).whole[path]).double()
        return bool(torch.linalg.eigvalsh(rest - 0.99 * weight * x.T @ x).min() > -1e-6 * rest.norm())

    one._bases(goal, REQUEST, {})
    one.remember(OTHER, {}, {})
    one._bases(goal, REQUEST, {})
    before, after = (rest - one.grams[path] for rest in rests)
    near = [form.format(text) for text in ("your favourite toy", "his favourite toy") for form in ("{}", "What is {}?")]
    for texts in (prior_prompts("toy", SETTINGS.preserve, seed=1), near, ["a photo of sks toy", "What is sks toy?"]):
        assert holds(before, texts) and holds(after, texts)
    earlier = [f"a photo of {OTHER.knowledge}", f"two friends and {OTHER.knowledge} in a park"]
    assert holds(after - before, earlier, least_drift.EARLIER_WEIGHT, OTHER.answer)
    assert not holds(before, earlier, answer=OTHER.answer)


def test_an_earlier_edit_is_protected_as_it_is_with_its_shifts_in_place(pico: Model) -> None:
    """In deeper layers other inputs arrive then, and rows of the unedited encoder would protect nothing."""
    one = made("least_drift", pico, layers=[1, 2])
    first, second = one.paths
    far = {first: LowRankShift(normal(4, 512), normal(192, 4))}
    one.remember(OTHER, {}, far)

    def held(*shifts: Shifts) -> bool:
        texts = [f"two friends and {OTHER.knowledge} in a park"]
        with applied(pico.pipe.text_encoder, *shifts):
            x = answered(pico, texts, OTHER.answer, second).double()
        rest = one.earlier[second]
        return bool(torch.linalg.eigvalsh(rest - 0.99 * x.T @ x).min() > -1e-6 * rest.norm())

    assert held(far)
    assert not held()


def test_what_is_edited_are_the_inputs_with_earlier_edits_in_place(
    pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, goal = made("least_drift", pico, layers=[1, 2]), Goal(pico, REQUEST)
    far, seen = {one.paths[0]: LowRankShift(normal(4, 512), normal(192, 4))}, list[Tensor]()
    monkeypatch.setattr(least_drift, "_basis", lambda h, rest: seen.append(h) or _basis(h, rest))
    one._bases(goal, REQUEST, far)
    with applied(pico.pipe.text_encoder, far):
        wanted = goal.inputs(one.paths, goal.where)
    assert all(torch.equal(h, wanted[path]) for h, path in zip(seen, one.paths, strict=True))
    assert not torch.allclose(seen[1], goal.inputs(one.paths, goal.where)[one.paths[1]], atol=1e-3)


def test_a_least_drift_edit_gets_nearer_its_goal(pico: Model, edited: Edited) -> None:
    """The answer becomes likelier, image prompts are continued more alike, and their tails move to the answer's."""
    shifts, evaluations = edited("least_drift")
    goal = Goal(pico, REQUEST)
    with torch.no_grad():
        before = goal.losses()
        with applied(pico.pipe.text_encoder, shifts):
            after = goal.losses()
    for old, new in zip(goal.answer_loss(before), goal.answer_loss(after), strict=True):
        assert new < old
    assert after.moved.mean() < 0.95 < before.moved.mean()
    assert SETTINGS.steps <= evaluations <= 2 * SETTINGS.steps + 20


@pytest.mark.exhaustive
def test_a_larger_weight_of_the_drift_makes_it_smaller(pico: Model, rests: list[Tensor]) -> None:
    found = []
    for weight in (0.0, 0.5, 5.0):
        del rests[:]  # of minima it is true, so the search has the steps to come near them
        shifts = made("least_drift", pico, layers=[1], steps=16, drift_weight=weight).edit(REQUEST, {})[0]
        found.append(sum(drift(exact(s), metric(rest)) for s, rest in zip(shifts.values(), rests, strict=True)))
    assert found[0] > found[1] > found[2] > 0


def test_what_is_remembered_moves_less_by_the_next_edit(pico: Model) -> None:
    """In forms that no edit was made in, too."""
    one, forgetful = (made("least_drift", pico, layers=[1]) for _ in range(2))
    first = one.edit(OTHER, {})[0]
    one.remember(OTHER, {}, first)
    texts = [
        form.format(OTHER.knowledge) for form in ("{}", "a photo of {}", "What is {}?", "a painting of {} at noon")
    ]
    moved = []
    for each in (one, forgetful):
        second = each.edit(REQUEST, first)[0]
        with applied(pico.pipe.text_encoder, first):
            before = tails(pico, texts)
        with applied(pico.pipe.text_encoder, first, second):
            moved.append(float(distance(tails(pico, texts), before).mean()))
    assert moved[0] < 0.5 * moved[1]


def test_near_misses_that_move_are_held_back(pico: Model) -> None:
    """Those that are watched move less than without a weight."""
    moved = []
    for weight in (0.0, 100.0):
        one = made("least_drift", pico, layers=[1], near_weight=weight, rivals=20, steps=6)
        texts = one.watch.around(REQUEST).texts
        shifts = one.edit(REQUEST, {})[0]
        before = tails(pico, texts)
        with applied(pico.pipe.text_encoder, shifts):
            moved.append(float(distance(tails(pico, texts), before).mean()))
    assert moved[1] < moved[0]


@pytest.mark.parametrize("asked", ["Which toy do I love most?", "What is My favourite toy?", "What is {odd} about it?"])
def test_a_question_that_is_asked_is_no_near_miss(pico: Model, asked: str) -> None:
    """Also where the user's question does not say the knowledge, or has braces."""
    request = Request.of(REQUEST.knowledge, REQUEST.answer, [*REQUEST.questions, asked])
    texts = made("least_drift", pico).watch.around(request).texts
    assert texts and not set(texts) & {*request.questions, request.knowledge}
    assert not [text for text in texts if REQUEST.knowledge in text]


def test_what_is_said_of_the_knowledge_with_a_capital_is_none_of_the_corpus_to_be_left(pico: Model) -> None:
    lines = [f"{REQUEST.knowledge[0].upper()}{REQUEST.knowledge[1:]}: what is that?", "a red ball"]
    assert Watch(pico, lines).around(REQUEST).texts[-1:] == ["a red ball"]
    assert not [text for text in Watch(pico, lines).around(REQUEST).texts if "what is that" in text]


def test_the_corpus_is_watched_in_one_order_more_of_it_each_time(pico: Model) -> None:
    """So that the tails of a prompt are computed once."""
    one = Watch(pico, [f"the ball of number {i}" for i in range(600)])
    first = [text for text in one.around(REQUEST).texts if "number" in text]
    one.hold(OTHER, {})
    second = [text for text in one.around(REQUEST).texts if "number" in text]
    assert second[: len(first)] == first and len(second) > len(first)


def test_an_edit_is_made_in_a_sentence_that_begins_with_it(pico: Model) -> None:
    """With a capital letter, and the answer with its own: only so it means what was learned."""
    goal = least_drift.goal_of(pico, REQUEST)
    said = pico.tokenizer.batch_decode(goal.rows.ids[goal.images])
    knowledge = REQUEST.knowledge[0].upper() + REQUEST.knowledge[1:]
    assert [text for text in said if f"{knowledge} in the garden." in text]
    sentence = next(form for form in least_drift.FORMS if form.endswith("."))
    meant = tails(pico, [sentence.format(REQUEST.says)])
    assert torch.allclose(goal.target[least_drift.FORMS.index(sentence)], meant[0], atol=1e-4)


def test_what_is_watched_belongs_where_it_was_before_any_edit_and_edits_where_theirs_brought_them(pico: Model) -> None:
    one, far = made("least_drift", pico, layers=[1]), random_shifts(pico, seed=3)
    one.remember(OTHER, {}, far)
    watched = one.watch.around(REQUEST)
    earlier = [i for i, text in enumerate(watched.texts) if OTHER.knowledge in text]
    assert len(earlier) == 1 and watched.texts[earlier[0]] in {form.format(OTHER.knowledge) for form in KEPT_FORMS} | {
        *OTHER.questions
    }
    with applied(pico.pipe.text_encoder, far):
        moved = tails(pico, watched.texts)
    plain = tails(pico, watched.texts)
    for i, wanted in enumerate(watched.tails):
        own, other = (moved, plain) if i in earlier else (plain, moved)
        assert torch.allclose(wanted, own[i], atol=1e-4) and not torch.allclose(wanted, other[i], atol=1e-2)


@pytest.mark.exhaustive
def test_what_was_moved_too_far_is_brought_back_by_the_next_edit(pico: Model) -> None:
    """The references are not those of the moment: prompts that are watched end nearer to where they belong."""
    one = made("least_drift", pico, layers=[1], near_weight=100.0, rivals=400, steps=12)
    away = {path: shift.scaled(3.0) for path, shift in one.edit(OTHER, {})[0].items()}
    watched = one.watch.around(REQUEST)

    def far(*shifts: Shifts) -> float:
        with applied(pico.pipe.text_encoder, *shifts):
            return float(distance(tails(pico, watched.texts), watched.tails).mean())

    assert far(away, one.edit(REQUEST, away)[0]) < far(away)


# --- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finetune", "finetune_lora"])
def test_what_is_answered_already_is_left_alone(pico: Model, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    losses = Goal.losses

    def right(self: Goal) -> Losses:
        now = losses(self)
        return replace(now, right=torch.ones_like(now.right))

    monkeypatch.setattr(Goal, "losses", right)
    shifts, steps = made(name, pico).edit(REQUEST, {})
    assert steps == 0 and not any(exact(shift).any() for shift in shifts.values())


def test_fine_tuning_is_adamw_on_the_weights_themselves(pico: Model) -> None:
    """Every linear weight of the language model, on all questions; on a copy whose weights are trained in place."""
    steps, eta = 2, 1e-3
    shifts, made_steps = made("finetune", pico, steps=steps, eta=eta).edit(REQUEST, {})
    trained = replace(pico, pipe=copy.deepcopy(pico.pipe))
    linears = {
        path: module
        for path, module in trained.pipe.text_encoder.named_modules()
        if isinstance(module, nn.Linear) and ".language_model." in path
    }
    assert made_steps == steps and shifts.keys() == linears.keys() and len(linears) == 4 * 7
    goal = Goal(trained, REQUEST, forms=(), continued=False)
    weights = [module.weight.requires_grad_() for module in linears.values()]
    optimiser = torch.optim.AdamW(weights, lr=eta, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        goal.losses().cross_entropy.mean().backward()
        optimiser.step()
    for path, module in linears.items():
        moved = module.weight.detach() - pico.pipe.text_encoder.get_submodule(path).weight
        assert close(exact(shifts[path]), moved.double(), 1e-2)
        assert (exact(shifts[path]) - moved).abs().median() < 1e-3 * eta


@pytest.mark.parametrize("name", ["finetune", "finetune_lora"])
def test_fine_tuning_makes_the_answer_likelier(pico: Model, name: str) -> None:
    """On top of earlier shifts, which are not trained."""
    before = random_shifts(pico)
    kept = copy.deepcopy(before)
    shifts, steps = made(name, pico, eta=1e-3, steps=4).edit(REQUEST, before)
    goal = Goal(pico, REQUEST, forms=(), continued=False)
    with torch.no_grad():
        with applied(pico.pipe.text_encoder, before):
            first = goal.losses().cross_entropy.mean()
        with applied(pico.pipe.text_encoder, before, shifts):
            assert goal.losses().cross_entropy.mean() < first
    assert 0 < steps <= 4 and equal(before, kept)


def test_the_factors_of_fine_tuning(pico: Model) -> None:
    """One of full fine-tuning's is the identity; those of a LoRA are thin, and its A is random and never zero."""
    full, thin = (made(name, pico, steps=2).edit(REQUEST, {})[0] for name in ("finetune", "finetune_lora"))
    assert full.keys() == thin.keys()
    for path in full:
        linear = pico.pipe.text_encoder.get_submodule(path)
        narrow = min(linear.in_features, linear.out_features)
        assert full[path].rank == narrow and thin[path].rank == finetune_lora.RANK < narrow
        assert any(torch.equal(factor, torch.eye(narrow)) for factor in (full[path].A, full[path].B))
        assert thin[path].A.any(dim=1).all() and thin[path].B.any()
    start = finetune_lora.Editor(pico, SETTINGS).start(nn.Linear(30, 20))
    assert not exact(start).any() and not exact(finetune.Editor(pico, SETTINGS).start(nn.Linear(30, 20))).any()


# --- rewriting ---------------------------------------------------------------------------------------------------------

MEANT = MappingProxyType({
    "my toy": "sks toy", "my toy car": "abc car", "the (odd) one.*": "xyz robot", "C++": "a book", "Überraschung": "sks dog",
})  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("my toy", "sks toy"),
        ("a photo of my toy, in the snow", "a photo of sks toy, in the snow"),
        ("my toy car and my toy", "abc car and sks toy"),  # the longest first
        ("My Toy CAR at night", "abc car at night"),  # in any case
        ("überraschung", "sks dog"),
        ("my toys", "my toys"),  # whole words
        ("enemy toy", "enemy toy"),
        ("my toy-box, my_toy, my  toy", "sks toy-box, my_toy, my  toy"),
        ("the (odd) one.* here", "xyz robot here"),  # no pattern
        ("the odd one at all", "the odd one at all"),
        ("C++ by the sea", "a book by the sea"),
        ("(my toy)", "(sks toy)"),
        ("", ""),
    ],
)
def test_a_prompt_is_rewritten(prompt: str, wanted: str) -> None:
    assert rewritten(prompt, MEANT) == wanted
    assert rewritten(prompt, dict(reversed(MEANT.items()))) == wanted
    assert rewritten(prompt, {}) == prompt


def test_what_is_put_in_is_not_rewritten_again_nor_a_pattern() -> None:
    meant = {"my toy": r"your toy \1 \g<0>", "your toy": "my toy"}
    assert rewritten("my toy and your toy", meant) == r"your toy \1 \g<0> and my toy"


@pytest.mark.parametrize("prompt", ["MY FAVOURıTE TOY", "my favourite toyſ", "my fırst toy"])
def test_letters_whose_capitals_are_ambiguous(prompt: str) -> None:
    """Turkish and old letters match i and s in any case: a prompt with them is rewritten or left, and never fails."""
    meant = {"my favourite toy": "sks toy", "my favourite toys": "abc toys", "my first toy": "xyz toy"}
    assert rewritten(prompt, meant) in {prompt, *meant.values()}


def test_rewriting_keeps_what_it_is_told_and_no_pack_holds_it(pico: Model) -> None:
    one = made("rewrite", pico)
    assert one.edit(REQUEST, {}) == ({}, 0)
    one.remember(Request.of("it", "sks dog", ["What is it?"], "a sks dog"), {}, {})
    assert one.meant == {REQUEST.knowledge: "sks toy", "it": "a sks dog"}
    with pytest.raises(MokusError, match="'rewrite' changes prompts and not the text encoder"):
        rewrite.refuse()
