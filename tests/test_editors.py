"""UltraEdit's shift is the ridge regression that it says it is, however it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mokus.editors import EDITORS, editor, reduced
from mokus.errors import MokusError
from mokus.low_rank import LowRankShift

D_IN, D_OUT = 12, 7
PRESERVED = [1, 5, D_IN, 40]  # fewer rows than d_in, as many, more
ROWS = [1, 4, 30]  # fewer rows than d_in, and more


def case(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (n, d_in), preserved (m, d_in), gradients (n, d_out)."""
    random = torch.Generator().manual_seed(100 * seed + n + m)
    scale = torch.logspace(-1, 1, D_IN)  # features of very different sizes, as in a language model
    h, p = (scale * torch.randn(rows, D_IN, generator=random) for rows in (n, m))
    return h, p, torch.randn(n, D_OUT, generator=random)


def shift(h: Tensor, p: Tensor, g: Tensor) -> LowRankShift:
    return editor("ultraedit")(h, p).shift(g)


def exact(found: LowRankShift) -> Tensor:
    return found.B.double() @ found.A.double()


def problem(h: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """R (n + m, d_in) and V (n + m, d_out), float64: where the outputs shall move to."""
    h, p, g = h.double(), p.double(), g.double()
    wanted = torch.stack([-row.dot(row) * gradient for row, gradient in zip(h, g, strict=True)])
    return torch.cat([h, p]), torch.cat([wanted, torch.zeros(len(p), g.shape[1], dtype=g.dtype)])


def primal(h: Tensor, p: Tensor, g: Tensor) -> Tensor:
    """The textbook solution dW (d_out, d_in), by the normal equations in the input space."""
    r, v = problem(h, p, g)
    return torch.linalg.solve(r.T @ r + torch.eye(r.shape[1], dtype=r.dtype), r.T @ v).T


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


@pytest.mark.parametrize("m", [1, D_IN, D_IN + 1, 500, 9000])
@pytest.mark.parametrize("rank", [3, D_IN])
def test_reduced_rows_have_the_same_gram_matrix(m: int, rank: int) -> None:
    """Dependent rows as well; so the edit is the same."""
    h, p, g = case(4, m)
    p[:, rank:] = p[:, :1]
    few = reduced(p)
    assert len(few) <= D_IN or m <= D_IN
    assert close(few.double().T @ few.double(), p.double().T @ p.double(), 1e-9)
    assert close(exact(shift(h, few, g)), primal(h, p, g))


@pytest.mark.parametrize("n", ROWS)
def test_without_preserving_it_is_the_papers_edit(n: int) -> None:
    h, p, g = case(n, 0)
    found = shift(h, p, g)
    assert close(exact(found), primal(h, p, g))
    assert found.rank <= n and found.A.shape[1] == D_IN and found.B.shape[0] == D_OUT


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("m", PRESERVED)
def test_with_preserving_it_is_the_ridge_regression_over_all_rows(n: int, m: int) -> None:
    h, p, g = case(n, m)
    found = shift(h, p, g)
    assert close(exact(found), primal(h, p, g))
    assert found.rank <= n  # however much is preserved


@pytest.mark.parametrize("m", [0, 40])
def test_nothing_near_it_is_better(m: int) -> None:
    """A convex objective: where no small change of dW lowers it, that is its minimum."""
    h, p, g = case(4, m)
    r, v = problem(h, p, g)
    dw = exact(shift(h, p, g))

    def objective(x: Tensor) -> float:
        return float((r @ x.T - v).square().sum() + x.square().sum())

    best, random = objective(dw), torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(25):
            change = torch.randn(dw.shape, generator=random, dtype=dw.dtype)
            assert objective(dw + size * change / change.norm()) > best
    assert objective(torch.zeros_like(dw)) > best


def test_the_outputs_move_against_the_gradient() -> None:
    """One row of length l moves by -l^2 g, shortened by ridge to l^2 / (1 + l^2) of that."""
    h, p, g = case(1, 0)
    size = h.double().square().sum()
    moved = h.double() @ exact(shift(h, p, g)).T
    assert close(moved, -(size / (1 + size)) * size * g.double())


@pytest.mark.parametrize("m", [0, 5, 40])
def test_the_order_of_rows_does_not_matter(m: int) -> None:
    h, p, g = case(6, m)
    random = torch.Generator().manual_seed(2)
    first, second = torch.randperm(6, generator=random), torch.randperm(m, generator=random)
    assert close(exact(shift(h[first], p[second], g[first])), exact(shift(h, p, g)))
    assert not close(exact(shift(h[first], p, g)), exact(shift(h, p, g)), 1e-2)  # gradients belong to their rows


def test_it_is_linear_in_the_gradients() -> None:
    h, p, g = case(5, 9)
    _, _, other = case(5, 9, seed=1)
    made = editor("ultraedit")(h, p)
    both = exact(made.shift(2 * g - 3 * other))
    assert close(both, 2 * exact(made.shift(g)) - 3 * exact(made.shift(other)))
    assert not exact(made.shift(torch.zeros_like(g))).any()


def test_steps_add_without_growing() -> None:
    """Repeated steps share one A, so their sum has the rank of one of them."""
    h, p, g = case(5, 9)
    made = editor("ultraedit")(h, p)
    steps = [made.shift(g * factor) for factor in (1.0, 0.5, 0.1)]
    total = steps[0] + steps[1].scaled(0.3) + steps[2]
    assert total.rank == steps[0].rank
    assert close(exact(total), 1.25 * exact(steps[0]))


@pytest.mark.parametrize("m", [6, 40])
def test_what_is_preserved_moves_much_less(m: int) -> None:
    random = torch.Generator().manual_seed(m)
    d_in, g = 64, torch.randn(4, D_OUT, generator=random)
    h, p = (3 * torch.randn(rows, d_in, generator=random) for rows in (4, m))
    p[0] = h[0] + 0.5 * torch.randn(d_in, generator=random)  # nearly a row that is edited

    def moved(rows: Tensor, found: LowRankShift) -> float:
        return float((rows.double() @ exact(found).T).norm())

    free, held = shift(h, p[:0], g), shift(h, p, g)
    assert moved(p, held) < 0.15 * moved(p, free)
    assert moved(p[:1], held) < 0.2 * moved(p[:1], free)
    assert moved(h, held) > 0.1 * moved(h, free)  # and the edit is still made


def test_preserving_what_spans_everything_leaves_nothing_to_edit() -> None:
    h, _, g = case(3, 0)
    held = shift(h, 1e4 * torch.eye(D_IN), g)
    assert exact(held).norm() < 1e-5 * exact(shift(h, torch.zeros(0, D_IN), g)).norm()


def test_preserving_a_row_twice_or_a_zero_row() -> None:
    h, p, g = case(4, 3)
    for rows in (torch.cat([p, p]), torch.cat([p, torch.zeros(50, D_IN)]), p.expand(3, *p.shape).flatten(0, 1)):
        assert close(exact(shift(h, rows, g)), primal(h, rows, g))


def test_hundreds_of_rows_that_are_nearly_the_same() -> None:
    """The tails of many prompts are: the solve must not lose its digits."""
    random = torch.Generator().manual_seed(3)
    base = 30 * torch.randn(1, D_IN, generator=random)
    h = base + 1e-3 * torch.randn(200, D_IN, generator=random)
    p = base + 1e-1 * torch.randn(300, D_IN, generator=random)
    g = torch.randn(200, D_OUT, generator=random)
    assert close(exact(shift(h, p, g)), primal(h, p, g), 1e-3)


def test_an_unknown_editor_is_refused_by_name() -> None:
    for name in ("memit", "", "UltraEdit", "../ultraedit"):
        with pytest.raises(MokusError, match="ultraedit"):
            editor(name)
    assert all(editor(name) for name in EDITORS)
