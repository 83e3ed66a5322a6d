"""A shift is the dense matrix it stands for, and a module that had one applied is the module it was."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mokus.low_rank import LowRankShift, added, applied, collected

Shape = tuple[int, int, int]  # rank, d_in, d_out
SHAPES: list[Shape] = [(1, 5, 7), (3, 8, 4), (6, 4, 9), (9, 5, 6)]  # the last two of a higher rank than d_in


def random_shift(shape: Shape, seed: int) -> LowRankShift:
    random = torch.Generator().manual_seed(seed)
    rank, d_in, d_out = shape
    return LowRankShift(torch.randn(rank, d_in, generator=random), torch.randn(d_out, rank, generator=random))


def exact(shift: LowRankShift) -> Tensor:
    """dW in float64, from the definition."""
    return torch.einsum("or,ri->oi", shift.B.double(), shift.A.double())


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 4, bias=False))).to(dtype)


def mlp_shifts(seed: int) -> dict[str, LowRankShift]:
    return {"0": random_shift((2, 5, 6), seed), "2.0": random_shift((3, 6, 4), seed + 100)}


def merged(module: nn.Module, *many: dict[str, LowRankShift]) -> nn.Module:
    """A copy in float64 with every dense dW added to its weight."""
    other = copy.deepcopy(module).double()
    with torch.no_grad():
        for shifts in many:
            for path, shift in shifts.items():
                other.get_submodule(path).weight += exact(shift)
    return other


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


# --- algebra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_are_those_of_the_dense_matrix(shape: Shape) -> None:
    a, b = random_shift(shape, 1), random_shift((shape[0] + 2, *shape[1:]), 2)
    assert torch.allclose(a.dense().double(), exact(a), atol=1e-5)
    assert torch.allclose(exact(a + b), exact(a) + exact(b), atol=1e-12)
    assert (a + b).rank == a.rank + b.rank
    # powers of two scale without rounding
    assert torch.equal(exact(a.scaled(-4.0)), -4.0 * exact(a))
    assert torch.allclose(exact(a.scaled(0.3)), 0.3 * exact(a), atol=1e-5)
    assert a.nbytes == 4 * a.rank * (shape[1] + shape[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_a_partition_of_the_sum(shape: Shape) -> None:
    """What was put side by side can be taken apart again, bit for bit: that is how knowledge is unbound."""
    a, b, c = (random_shift((rank, *shape[1:]), rank) for rank in (shape[0], 2, 3))
    total = a + b + c
    start = 0
    for each in (a, b, c):
        part = total.rows(start, start := start + each.rank)
        assert torch.equal(part.A, each.A) and torch.equal(part.B, each.B)
    cut = total.rank // 2
    halves = exact(total.rows(0, cut)) + exact(total.rows(cut, total.rank))
    assert torch.allclose(halves, exact(total), atol=1e-12)
    assert not exact(total.rows(cut, cut)).any()


def test_shifts_over_one_shared_A_add_without_growing() -> None:
    a, other = random_shift((4, 6, 5), 0), random_shift((4, 6, 5), 1)
    both = LowRankShift(a.A, other.B) + a
    assert both.A is a.A and both.rank == 4
    assert torch.allclose(exact(both), exact(a) + exact(LowRankShift(a.A, other.B)), atol=1e-5)
    # equal numbers in another tensor are not the same A, and the sum holds all the same
    copied = LowRankShift(a.A.clone(), other.B) + a
    assert copied.rank == 8 and torch.allclose(exact(copied), exact(both), atol=1e-5)


def test_added_sums_module_by_module() -> None:
    one, two, three = {"a": random_shift((1, 4, 3), 1)}, mlp_shifts(2), {"a": random_shift((2, 4, 3), 3)}
    total = added(one, two, three, {})
    assert total.keys() == {"a", *two}
    assert torch.allclose(exact(total["a"]), exact(one["a"]) + exact(three["a"]), atol=1e-12)
    assert torch.equal(total["a"].A, torch.cat([one["a"].A, three["a"].A]))  # in the order given
    assert all(total[path] is two[path] for path in two)
    assert one["a"].rank == 1 and added() == {}


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 5), (5, 6), (4, 4)])
def test_many_shifts_collected_are_the_same_change_at_no_more_than_full_rank(d_out: int, d_in: int) -> None:
    random = torch.Generator().manual_seed(0)
    total, dense = {}, torch.zeros(d_out, d_in)
    for i in range(9):
        more = LowRankShift(torch.randn(2, d_in, generator=random), torch.randn(d_out, 2, generator=random))
        total, dense = collected(added(total, {"x": more})), dense + more.dense()
        assert total["x"].rank == min(2 * (i + 1), d_in, d_out)
        assert torch.allclose(total["x"].dense(), dense, atol=1e-5)
    few = {"x": LowRankShift(torch.randn(2, d_in), torch.randn(d_out, 2))}
    assert collected(few)["x"] is few["x"]  # which are the same bits


@pytest.mark.parametrize("shape", [(6, 20, 30), (40, 12, 30), (40, 30, 12), (5, 5, 5)])
@pytest.mark.parametrize("true_rank", [1, 3])
def test_compressed_finds_the_numerical_rank(shape: Shape, true_rank: int) -> None:
    """Factors of any size of a matrix of rank k come out with k rows, equal within float32's rounding."""
    rank, d_in, d_out = shape
    random = torch.Generator().manual_seed(true_rank)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    a, b = draw(rank, true_rank) @ draw(true_rank, d_in), draw(d_out, rank)
    shift = LowRankShift(a.float(), b.float())
    small = shift.compressed()
    assert small.rank == true_rank
    assert small.A.dtype == small.B.dtype == torch.float32
    assert small.A.is_contiguous() and small.B.is_contiguous()
    error = torch.linalg.matrix_norm(exact(small) - exact(shift)) / torch.linalg.matrix_norm(exact(shift))
    assert error < 1e-6


@pytest.mark.parametrize("tolerance", [3e-1, 3e-3])
def test_compressed_drops_only_what_the_tolerance_allows(tolerance: float) -> None:
    """The error is what was left out of the spectrum, its largest value (Eckart and Young), no more."""
    u, _ = torch.linalg.qr(torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(15, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    values = 5.0 * 10.0 ** -torch.arange(8, dtype=torch.float64)
    shift = LowRankShift((values[:, None] * v.T).float(), u.float())
    small = shift.compressed(tolerance)
    kept = int((values > tolerance * values[0]).sum())
    assert small.rank == kept
    error = float(torch.linalg.matrix_norm(exact(small) - exact(shift), ord=2))
    assert error == pytest.approx(float(values[kept]), rel=1e-2)


def test_compressed_of_nothing_is_nothing() -> None:
    for nothing in (
        LowRankShift(torch.zeros(0, 4), torch.zeros(3, 0)),
        LowRankShift(torch.ones(2, 4), torch.zeros(3, 2)),
    ):
        small = nothing.compressed()
        assert small.rank == 0 and small.A.shape == (0, 4) and small.B.shape == (3, 0)


def test_factors_that_do_not_fit_are_refused() -> None:
    for a, b in (((2, 4), (3, 5)), ((2, 4), (2, 3)), ((4,), (3, 4)), ((1, 2, 4), (3, 2))):
        with pytest.raises(ValueError, match="not"):
            LowRankShift(torch.zeros(a), torch.zeros(b))


# --- applied ----------------------------------------------------------------------------------------------------------


def test_applied_equals_adding_the_dense_shifts() -> None:
    module, x = mlp(), torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(9))
    one, two = mlp_shifts(1), {"0": random_shift((1, 5, 6), 7)}
    with applied(module, one, two):
        found = module(x)
    assert torch.allclose(found.double(), merged(module, one, two)(x.double()), atol=1e-5)
    assert not torch.allclose(found, module(x), atol=1e-2)  # it does something
    with applied(module, added(one, two)):
        assert torch.allclose(module(x), found, atol=1e-5)


def test_gradients_flow_as_through_the_dense_sum() -> None:
    module, shifts = mlp(), mlp_shifts(1)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), requires_grad=True)
    y = x.detach().double().requires_grad_()
    with applied(module, shifts):
        module(x).square().sum().backward()
    merged(module, shifts)(y).square().sum().backward()
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)


def test_half_precision_does_not_round_the_shift_away() -> None:
    """Smaller than half a unit in the last place of every weight, it would be lost if it were added to them."""
    signs = torch.tensor([[1.0, -1.0] * 128])
    shift = LowRankShift(1e-3 * signs, torch.ones(1, 1))
    linear = nn.Linear(256, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        assert torch.equal((linear.weight.float() + shift.dense()).bfloat16(), linear.weight)
        with applied(nn.Sequential(linear), {"0": shift}):
            found = linear(signs.bfloat16())
    assert found.dtype == torch.bfloat16
    assert found.item() == pytest.approx(0.256, rel=2**-8)  # W x is 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outside_it_is_as_before_bit_for_bit(dtype: torch.dtype) -> None:
    module, x = mlp(dtype), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, before, n = copy.deepcopy(module.state_dict()), module(x), hooks(module)
    with applied(module, mlp_shifts(0)):
        inside = module(x)
        with applied(module, mlp_shifts(5)):
            assert not torch.equal(module(x), inside)
        assert torch.equal(module(x), inside)  # the inner one is gone, the outer one is not
    assert torch.equal(module(x), before) and hooks(module) == n
    with pytest.raises(KeyboardInterrupt), applied(module, mlp_shifts(0)), applied(module, mlp_shifts(1)):
        raise KeyboardInterrupt
    assert torch.equal(module(x), before) and hooks(module) == n
    assert module.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_the_hooks_of_others_stay() -> None:
    module, seen = mlp(), []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    with applied(module, mlp_shifts(0)):
        module(torch.zeros(1, 5))
    module(torch.zeros(1, 5))
    assert seen == [1, 1]


def test_an_empty_shift_changes_no_bit() -> None:
    module, x = mlp(), torch.randn(3, 5)
    with applied(module, {"0": LowRankShift(torch.zeros(0, 5), torch.zeros(6, 0))}, {}):
        assert hooks(module) == 0
        found = module(x)
    assert torch.equal(found, module(x))


@pytest.mark.parametrize(
    ("path", "shape"), [("1", (1, 5, 5)), ("2", (1, 6, 4)), ("3", (1, 5, 6)), ("nothing", (1, 5, 6)),
     ("0", (1, 6, 5)), ("2.0", (2, 5, 4))]
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_left_behind(path: str, shape: Shape) -> None:
    module, n = mlp(), hooks(mlp())
    with pytest.raises(ValueError, match=path), applied(module, mlp_shifts(0), {path: random_shift(shape, 0)}):
        raise AssertionError("entered")
    assert hooks(module) == n


# --- peft -------------------------------------------------------------------------------------------------------------


def in_peft(module: nn.Module, shifts: dict[str, LowRankShift]) -> nn.Module:
    """The same shifts as a PEFT LoRA of scale 1."""
    ranks = {path: shift.rank for path, shift in shifts.items()}
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(shifts), rank_pattern=ranks, alpha_pattern=ranks)
    model = get_peft_model(module, config)
    for path, shift in shifts.items():
        layer = model.base_model.model.get_submodule(path)
        assert layer.scaling == {"default": 1.0}
        layer.lora_A["default"].weight.data = shift.A.clone()
        layer.lora_B["default"].weight.data = shift.B.clone()
    return model.eval()


def test_it_is_pefts_lora_to_the_bit() -> None:
    module, x = mlp(), torch.randn(7, 5, generator=torch.Generator().manual_seed(4))
    for seed in range(5):
        shifts = mlp_shifts(seed)
        with applied(module, shifts):
            found = module(x)
        assert torch.equal(found, in_peft(copy.deepcopy(module), shifts)(x))


def test_it_reaches_a_module_that_peft_has_wrapped() -> None:
    module, x, shifts = mlp(), torch.randn(7, 5, generator=torch.Generator().manual_seed(4)), mlp_shifts(1)
    wrapped = in_peft(copy.deepcopy(module), mlp_shifts(2)).base_model.model
    before = wrapped(x)
    with applied(wrapped, shifts):
        found = wrapped(x)
    assert torch.allclose(found.double(), merged(module, shifts, mlp_shifts(2))(x.double()), atol=1e-5)
    assert torch.equal(wrapped(x), before)
