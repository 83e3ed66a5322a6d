"""What is captured is what an independent computation finds, row by row, whatever else is in the batch."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mokus.capture import recorded
from mokus.errors import MokusError
from mokus.low_rank import LowRankShift, applied
from mokus.pipeline import Model

UP, GATE, DOWN = (
    f"model.language_model.layers.{name}" for name in ("1.mlp.up_proj", "2.mlp.gate_proj", "2.mlp.down_proj")
)
PATHS = [UP, GATE, DOWN]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).double()
    return layers.requires_grad_(False)


def net_forward(layers: nn.Sequential, x: Tensor, moved: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The net written out: its loss, with the outputs of "0", "2", "4" moved, and the inputs of these."""
    inputs = {}
    for path in ("0", "2", "4"):
        inputs[path] = x
        x = x @ layers[int(path)].weight.T + layers[int(path)].bias + moved.get(path, 0.0)
        x = torch.tanh(x) if path == "0" else F.gelu(x) if path == "2" else x
    return net_loss(x), inputs


def net_loss(y: Tensor) -> Tensor:
    weights = torch.arange(1.0, 1 + y.numel(), dtype=y.dtype).view_as(y)
    return (weights * y.sin()).sum() + y.square().sum()


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("paths", [["0", "2", "4"], ["4", "0"], ["2"]])
def test_against_finite_differences(paths: list[str]) -> None:
    layers, x = net(), torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    where = torch.tensor([[True, False, True], [False, True, True]])
    with recorded(layers, paths) as record:
        loss = net_loss(layers(x))
    inputs, gradients = record.rows(where), record.gradients(loss, where)
    _, wanted = net_forward(layers, x, {})
    for path in paths:
        assert torch.equal(inputs[path], wanted[path][where].float())
        shape = (2, 3, layers[int(path)].out_features)
        slopes = torch.zeros(shape, dtype=torch.float64)
        for i in range(slopes.numel()):
            step = torch.zeros(shape, dtype=torch.float64)
            step.view(-1)[i] = 1e-5
            rise = net_forward(layers, x, {path: step})[0] - net_forward(layers, x, {path: -step})[0]
            slopes.view(-1)[i] = rise / 2e-5
        assert torch.allclose(gradients[path].double(), slopes[where], rtol=1e-5, atol=1e-5)
        assert gradients[path].dtype == inputs[path].dtype == torch.float32
        assert not inputs[path].requires_grad and not gradients[path].requires_grad


# --- on a language model ----------------------------------------------------------------------------------------------


def token_rows(model: Model, lengths: list[int], seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    size = model.pipe.text_encoder.get_input_embeddings().num_embeddings
    return [torch.randint(0, size, (n,), generator=random) for n in lengths]


def batch(rows: list[Tensor], filler: int = 0, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as one batch, padded at the right with any token; the mask of their last two tokens."""
    longest = max(map(len, rows)) + extra
    ids = torch.full((len(rows), longest), filler)
    where = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        where[i, len(row) - 2 : len(row)] = True
    return ids, where


def states(model: Model, ids: Tensor) -> Tensor:
    return model.pipe.text_encoder.model.language_model(input_ids=ids, use_cache=False).last_hidden_state


def loss_at(hidden: Tensor, where: Tensor) -> Tensor:
    """A sum over the rows of the batch."""
    return (hidden[where] - 0.3).pow(2).sum() + hidden[where].sin().sum()


Captured = dict[str, Tensor]


def capture(model: Model, ids: Tensor, where: Tensor, paths: list[str] = PATHS) -> tuple[Captured, Captured]:
    with recorded(model.pipe.text_encoder, paths) as record:
        loss = loss_at(states(model, ids), where)
    return record.rows(where), record.gradients(loss, where)


def test_gradients_are_those_of_a_shift_of_the_outputs(pico: Model) -> None:
    """Autograd on a zero that is added to each output must see the same slopes."""
    ids, where = batch(token_rows(pico, [7, 12, 5]))
    inputs, gradients = capture(pico, ids, where)
    zeros: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def adder(path: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            kept[path] = args[0].detach().clone()
            zeros[path] = torch.zeros_like(output).requires_grad_()
            return output + zeros[path]

        return hook

    encoder = pico.pipe.text_encoder
    handles = [encoder.get_submodule(path).register_forward_hook(adder(path)) for path in PATHS]
    try:
        loss_at(states(pico, ids), where).backward()
    finally:
        for handle in handles:
            handle.remove()
    for path in PATHS:
        slope = zeros[path].grad
        assert slope is not None and slope[where].abs().max() > 0
        assert torch.equal(inputs[path], kept[path][where])
        assert torch.allclose(gradients[path], slope[where], rtol=1e-4, atol=1e-6 * slope.abs().max().item())


def test_rows_do_not_depend_on_the_batch(pico: Model) -> None:
    """Alone, in any order, beside longer rows, padded with whatever: the same inputs and gradients within rounding."""
    rows = token_rows(pico, [7, 12, 5, 9])
    alone = [capture(pico, *batch([row])) for row in rows]
    for order, filler, extra in (([0, 1, 2, 3], 0, 0), ([2, 0, 3, 1], 5, 0), ([3, 2, 1, 0], 11, 6)):
        together = capture(pico, *batch([rows[i] for i in order], filler, extra))
        for kind, found in enumerate(together):
            for path in PATHS:
                wanted = torch.cat([alone[i][kind][path] for i in order])
                assert found[path].shape == wanted.shape
                assert torch.allclose(found[path], wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_rows_are_counted_prompt_by_prompt(pico: Model) -> None:
    ids, where = batch(token_rows(pico, [7, 12]))
    with recorded(pico.pipe.text_encoder, [UP]) as record, torch.no_grad():
        states(pico, ids)
    found = record.rows(where)[UP]
    assert torch.equal(found, torch.stack([record.inputs[UP][i, j] for i, j in ((0, 5), (0, 6), (1, 10), (1, 11))]))
    assert record.rows(torch.zeros_like(where))[UP].shape == (0, record.inputs[UP].shape[-1])


def test_the_graph_begins_at_the_first_module(pico: Model) -> None:
    ids, where = batch(token_rows(pico, [6]))
    with recorded(pico.pipe.text_encoder, [UP, DOWN]) as record:
        loss = loss_at(states(pico, ids), where)
    assert not record.inputs[UP].requires_grad and record.outputs[UP].is_leaf
    assert record.inputs[DOWN].requires_grad and not record.outputs[DOWN].is_leaf
    record.gradients(loss, where)


def test_without_gradients_only_inputs_are_kept(pico: Model) -> None:
    ids, where = batch(token_rows(pico, [6, 8]))
    with torch.no_grad(), recorded(pico.pipe.text_encoder, PATHS) as record:
        plain = states(pico, ids)
    assert not any(output.requires_grad for output in record.outputs.values()) and not plain.requires_grad
    with_gradients, _ = capture(pico, ids, where)
    for path, found in record.rows(where).items():
        assert torch.allclose(found, with_gradients[path], atol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_weights_get_no_gradient_and_do_not_change(trainable: bool) -> None:
    layers, where = net().requires_grad_(trainable), torch.ones(2, 3, dtype=torch.bool)
    before = copy.deepcopy(layers.state_dict())
    with recorded(layers, ["0", "4"]) as record:
        loss = net_loss(layers(torch.randn(2, 3, 4, dtype=torch.float64)))
    record.gradients(loss, where)
    assert all(p.grad is None and p.requires_grad is trainable for p in layers.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_the_encoder_is_left_as_it_was(pico: Model) -> None:
    encoder = pico.pipe.text_encoder
    before, n = {name: value.clone() for name, value in encoder.state_dict().items()}, hooks(encoder)
    ids, where = batch(token_rows(pico, [7]))
    with torch.no_grad():
        plain = states(pico, ids)
    capture(pico, ids, where)
    with pytest.raises(ZeroDivisionError), recorded(encoder, PATHS):
        states(pico, ids)
        raise ZeroDivisionError
    with pytest.raises(AttributeError), recorded(encoder, [UP, "model.nothing"]):
        raise AssertionError("entered")
    assert hooks(encoder) == n
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with torch.no_grad():
        assert torch.equal(states(pico, ids), plain)


def test_inside_it_computes_the_same(pico: Model) -> None:
    ids, _ = batch(token_rows(pico, [7, 3]))
    with torch.no_grad():
        plain = states(pico, ids)
        with recorded(pico.pipe.text_encoder, PATHS):
            assert torch.equal(states(pico, ids), plain)


def test_with_a_shift_the_gradient_is_at_the_shifted_output() -> None:
    layers, x = net(), torch.randn(1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    random = torch.Generator().manual_seed(2)
    shift = LowRankShift(torch.randn(2, 4, generator=random), torch.randn(6, 2, generator=random))
    where = torch.ones(1, 2, dtype=torch.bool)
    other = copy.deepcopy(layers)
    other[0].weight += shift.dense().double()
    found = []
    for module, shifts in ((layers, {"0": shift}), (other, {})):
        with applied(module, shifts), recorded(module, ["0", "2"]) as record:
            loss = net_loss(module(x))
        found.append((record.rows(where), record.gradients(loss, where)))
    for (a, b), path in ((pair, path) for pair in zip(*found, strict=True) for path in ("0", "2")):
        assert torch.allclose(a[path], b[path], rtol=1e-4, atol=1e-4)


# --- values that are not finite ---------------------------------------------------------------------------------------

ADVICE = (
    "expected finite numbers; the model's weights are damaged or its dtype is too narrow, "
    "so get a whole copy of it and load it in float32 or bfloat16."
)


@pytest.mark.parametrize(("value", "named"), [("nan", "NaN"), ("inf", "infinity"), ("-inf", "infinity")])
def test_inputs_and_gradients_that_are_not_finite_are_refused(value: str, named: str) -> None:
    layers, x, where = net(), torch.randn(1, 2, 4, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    layers[0].bias[:] = float(value)
    layers[1] = nn.Identity()  # which lets it through
    with recorded(layers, ["0", "2"]) as record, torch.no_grad():
        layers(x)
    with pytest.raises(MokusError, match=re.escape(f"the inputs of 2 hold {named}, {ADVICE}")):
        record.rows(where)

    layers = net()
    with recorded(layers, ["0", "4"]) as record:
        loss = layers(x).sum() * float(value)
    assert record.rows(where)["4"].isfinite().all()
    with pytest.raises(MokusError, match=re.escape("the gradients of 0 hold ")) as caught:
        record.gradients(loss, where)
    assert ADVICE in str(caught.value)


def test_half_precision_overflows_into_a_sentence() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    with torch.no_grad():
        layers[0].weight.fill_(3e4)
    layers = layers.half()
    with recorded(layers, ["1"]) as record, torch.no_grad():
        layers(torch.ones(1, 1, 4, dtype=torch.float16))
    with pytest.raises(MokusError, match="the inputs of 1 hold infinity"):
        record.rows(torch.ones(1, 1, dtype=torch.bool))


def test_what_is_not_finite_elsewhere_does_not_matter() -> None:
    layers, x = net(), torch.zeros(1, 2, 4, dtype=torch.float64)
    x[0, 1] = float("nan")  # such as padding
    with recorded(layers, ["0", "2"]) as record:
        loss = layers(x)[:, :1].sum()
    where = torch.tensor([[True, False]])
    assert all(rows.isfinite().all() for rows in record.rows(where).values())
    assert all(rows.isfinite().all() for rows in record.gradients(loss, where).values())


def test_a_damaged_encoder_is_named(pico: Model) -> None:
    ids, where = batch(token_rows(pico, [7]))
    encoder = copy.deepcopy(pico.pipe.text_encoder)
    encoder.get_submodule(GATE).weight[0, 0] = float("nan")
    with recorded(encoder, PATHS) as record:
        loss = loss_at(encoder.model.language_model(input_ids=ids, use_cache=False).last_hidden_state, where)
    with pytest.raises(MokusError, match=re.escape(f"the inputs of {DOWN} hold NaN")):
        record.rows(where)
    with pytest.raises(MokusError, match=r"the gradients of .* hold NaN"):
        record.gradients(loss, where)
