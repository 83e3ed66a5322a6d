"""Prompts run together are encoded, and answered, as each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mokus
from mokus import encoder, pipeline
from mokus.encoder import (
    Entering,
    EnteringTails,
    Lines,
    Rows,
    answers,
    inputs_of,
    last_of,
    module_paths,
    prefix_length,
    tail_length,
    tails,
    token_ids,
)
from mokus.errors import MokusError
from mokus.low_rank import LowRankShift, Shifts, added, applied
from mokus.pipeline import Model
from mokus.settings import EditSettings
from tests.conftest import random_shifts

TEXTS = [
    "What is my favourite toy?", "a photo of a red ball", "What is my favourite cup?", "it",
    "the robot my grandmother built in 1962, at night", "a photo of a red ball", "a photo of a blue ring",
]  # fmt: skip
PATHS = ["model.language_model.layers.1.mlp.up_proj", "model.language_model.layers.2.mlp.down_proj"]


def ending(model: Model) -> Shifts:
    """Makes the end of an answer likely or not by what was said, so that answers have many lengths."""
    random = torch.Generator().manual_seed(5)
    head, end = model.pipe.text_encoder.lm_head, model.pipe.tokenizer.eos_token_id
    there = torch.zeros(head.out_features, 1)
    there[end] = 1.0
    return {"lm_head": LowRankShift(torch.randn(1, head.in_features, generator=random) * 0.6, there)}


# --- answers -----------------------------------------------------------------------------------------------------------


def test_answers_are_those_to_each_question_by_itself(pico: Model) -> None:
    """As `mokus.ask` gives them: texts of different lengths, some twice, with shifts or without, ending or not."""
    shifts, ends = random_shifts(pico), ending(pico)
    lengths = set()
    for given in ([], [shifts], [ends, shifts]):
        said = answers(pico, TEXTS, given)
        assert said == [mokus.ask(pico, text, given) for text in TEXTS]
        lengths |= {len(pico.pipe.tokenizer(text).input_ids) for text in said}
    assert len(lengths) > 3


def test_an_answer_does_not_depend_on_what_else_is_asked(pico: Model) -> None:
    given = [ending(pico)]
    said = dict(zip(TEXTS, answers(pico, TEXTS, given), strict=True))
    assert answers(pico, TEXTS[::-1], given) == [said[text] for text in TEXTS[::-1]]
    for some in (TEXTS[:1], TEXTS[2:5], [TEXTS[3]] * 3, []):
        assert answers(pico, some, given) == [said[text] for text in some]
    assert len(set(said.values())) > 2


def test_more_questions_than_are_run_together(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    said = answers(pico, TEXTS, longest=4)
    for chunk in (1, 2, 3):
        monkeypatch.setattr(encoder, "CHUNK", chunk)
        assert answers(pico, TEXTS, longest=4) == said


@pytest.mark.parametrize("longest", [1, 3, 8])
def test_no_answer_is_longer_than_allowed(pico: Model, longest: int) -> None:
    """It is the beginning of the longer one."""
    for short, long in zip(answers(pico, TEXTS, longest=longest), answers(pico, TEXTS, longest=12), strict=True):
        assert long.startswith(short) and len(short) <= len(long)


# --- encodings ---------------------------------------------------------------------------------------------------------


def alone(model: Model, text: str) -> Tensor:
    """Hidden states (s, d) of prompt and tail, as the pipeline itself encodes the prompt."""
    return pipeline.encode(model, [text])[0]


def test_rows_are_encoded_as_the_pipeline_encodes_each_prompt(pico: Model) -> None:
    rows = Rows.of(pico, TEXTS)
    with torch.no_grad():
        states = rows.encode(pico)
    for i, text in enumerate(TEXTS):
        wanted = alone(pico, text)
        assert len(wanted) == rows.lengths[i] == len(token_ids(pico, text)) - prefix_length(pico)
        assert torch.allclose(states[i, : len(wanted)], wanted, rtol=1e-4, atol=1e-4)


def test_tails_are_the_ends_of_encodings(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are run at a time, and with none at all."""
    n, shifts = encoder.tail_length(pico), random_shifts(pico)
    for chunk in (2, 64):
        monkeypatch.setattr(encoder, "CHUNK", chunk)
        with applied(pico.pipe.text_encoder, shifts):
            found, wanted = tails(pico, TEXTS), torch.stack([alone(pico, text)[-n:] for text in TEXTS])
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert tails(pico, []).shape == (0, n, found.shape[-1])
    assert encoder.distance(found, found).tolist() == [0.0] * len(TEXTS)
    assert encoder.distance(found, found + 2).allclose(torch.tensor(4.0))


def test_the_prefix_is_run_once_for_all_prompts_of_a_call(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is applied at the call, and left as it was by every part of them."""
    monkeypatch.setattr(encoder, "CHUNK", 2)
    tokens: list[int] = []
    hook = pico.language_model.register_forward_pre_hook(
        lambda _, __, given: tokens.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    prefix, path = prefix_length(pico), "model.language_model.layers.1.mlp.down_proj"
    try:
        for call in (tails, answers, lambda model, texts: inputs_of(model, texts, [path])):
            tokens.clear()
            call(pico, TEXTS)
            assert tokens[0] == prefix and tokens.count(prefix) == 1 < len(tokens)
    finally:
        hook.remove()


def test_rows_put_together_are_the_rows_of_all(pico: Model) -> None:
    """Whatever their lengths, and whatever answers follow them."""
    answer = [5, 6, 7]
    parts = [Rows.of(pico, [TEXTS[0]], answer), Rows.of(pico, TEXTS[3:5]), Rows.of(pico, TEXTS[1:2], answer[:1])]
    for both in (parts[0] + parts[1] + parts[2], parts[0] + (parts[1] + parts[2])):
        wanted = [
            token_ids(pico, text)[prefix_length(pico) :] + after
            for text, after in zip([TEXTS[0], *TEXTS[3:5], TEXTS[1]], [answer, [], [], answer[:1]], strict=True)
        ]
        assert both.lengths.tolist() == [len(row) for row in wanted]
        assert [row[:n].tolist() for row, n in zip(both.ids, both.lengths, strict=True)] == wanted
        assert torch.equal(both.prefix, parts[0].prefix)


def test_the_last_tokens_of_rows_of_many_lengths(pico: Model) -> None:
    """A mask of them and the states at them agree, and are those of each row."""
    rows, n = Rows.of(pico, TEXTS), 3
    states = torch.arange(rows.ids.numel(), dtype=torch.float32).view(*rows.ids.shape, 1)
    mask = rows.last([n] * len(TEXTS))
    assert mask.sum(dim=1).tolist() == [n] * len(TEXTS)
    assert torch.equal(states[mask].view(len(TEXTS), n, 1), last_of(states, rows.lengths, n))
    for i, length in enumerate(rows.lengths.tolist()):
        assert mask[i].nonzero().flatten().tolist() == [length - 3, length - 2, length - 1]
    assert torch.equal(rows.last([0] * len(TEXTS)), torch.zeros_like(mask))


# --- inputs ------------------------------------------------------------------------------------------------------------


def test_inputs_are_those_of_each_prompt_by_itself(pico: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortest first, and the same rows however many prompts are run at a time; a prompt that is there twice counts twice."""
    each = [inputs_of(pico, [text], PATHS) for text in sorted(TEXTS, key=lambda t: len(token_ids(pico, t)))]
    n, tail = sum(len(token_ids(pico, text)) - prefix_length(pico) for text in TEXTS), encoder.tail_length(pico)
    for chunk in (1, 3, 64):
        monkeypatch.setattr(encoder, "CHUNK", chunk)
        found = inputs_of(pico, TEXTS, PATHS)
        for path in PATHS:
            assert torch.allclose(found.prompt[path], torch.cat([x.prompt[path] for x in each]), rtol=1e-4, atol=1e-4)
            assert torch.allclose(found.tail[path], torch.cat([x.tail[path] for x in each]), rtol=1e-4, atol=1e-4)
            assert len(found.whole[path]) == n and len(found.tail[path]) == tail * len(TEXTS)
            assert not len(found.said[path]) and torch.equal(found.behind[path], found.tail[path])
    none = inputs_of(pico, [], PATHS)
    assert [none.whole[path].shape for path in PATHS] == [(0, found.whole[path].shape[1]) for path in PATHS]


@pytest.mark.parametrize("longest", [1, 12])
def test_inputs_go_on_with_what_the_encoder_says(pico: Model, longest: int) -> None:
    """With what is applied, and up to where it ends: the rows are those of a prompt that has the answer behind it."""
    shifts, lengths = added(random_shifts(pico), ending(pico)), set()
    end, head = pico.pipe.tokenizer.eos_token_id, pico.pipe.text_encoder.lm_head
    with torch.no_grad(), applied(pico.pipe.text_encoder, shifts):
        grams = {path: torch.zeros(0) for path in PATHS}
        for text in TEXTS:
            said: list[int] = []
            while len(said) < longest:  # each token from the beginning, with nothing kept
                token = int(head(Rows.of(pico, [text], said).states(pico).final[0, -1]).argmax())
                if token == end:
                    break
                said.append(token)
            lengths.add(len(said))
            rows, found = Rows.of(pico, [text], said), inputs_of(pico, [text], PATHS, said=longest)
            for path, wanted in rows.inputs(pico, PATHS, rows.last([tail_length(pico) + len(said)])).items():
                assert torch.allclose(found.behind[path], wanted, rtol=1e-4, atol=1e-4)
                grams[path] = grams[path] + wanted.T @ wanted if len(grams[path]) else wanted.T @ wanted
        together = inputs_of(pico, TEXTS, PATHS, said=longest)
    for path in PATHS:
        x = together.behind[path]
        assert torch.allclose(x.T @ x, grams[path], rtol=1e-3, atol=1e-2)
    assert len(lengths) > 1 or longest == 1


def test_prefix_and_rest_are_the_whole_prompt(pico: Model) -> None:
    kept: list[Tensor] = []
    handle = pico.pipe.text_encoder.get_submodule(PATHS[1]).register_forward_pre_hook(lambda _, x: kept.append(x[0][0]))
    try:
        with torch.no_grad():
            pico.pipe.text_encoder(input_ids=torch.tensor([token_ids(pico, TEXTS[0])]))
    finally:
        handle.remove()
    parts = [encoder.inputs_at_prefix(pico, PATHS)[PATHS[1]], inputs_of(pico, TEXTS[:1], PATHS).whole[PATHS[1]]]
    assert len(parts[0]) == prefix_length(pico) == 34
    assert torch.allclose(torch.cat(parts), kept[0], rtol=1e-4, atol=1e-4)


# --- which matrices ----------------------------------------------------------------------------------------------------


def test_modules_are_named_from_the_lowest_layer_up(pico: Model) -> None:
    paths = module_paths(pico, EditSettings(layers=[2, 0], modules=["mlp.up_proj", "self_attn.o_proj"]))
    assert [path.removeprefix("model.language_model.layers.") for path in paths] == [
        "0.mlp.up_proj", "0.self_attn.o_proj", "2.mlp.up_proj", "2.self_attn.o_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "modules", "said"),
    [
        ([4], ["mlp.up_proj"], "0 to 3"),
        ([-1], ["mlp.up_proj"], "layer -1"),
        ([1], ["mlp"], "'mlp'"),
        ([1], ["mlp.act_fn"], "mlp.act_fn"),
        ([1], ["input_layernorm"], "input_layernorm"),
        ([1], ["nothing"], "nothing"),
        ([1], [""], "''"),
    ],
)
def test_layers_and_modules_that_are_not_there(pico: Model, layers: list[int], modules: list[str], said: str) -> None:
    with pytest.raises(MokusError, match=said):
        module_paths(pico, EditSettings(layers=layers, modules=modules))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rows_that_go_on_from_a_layer_are_encoded_as_from_the_first(pico: Model, layer: int) -> None:
    """With shifts in that layer and above that were not there on the way to it, and with their gradients; several in a line."""
    texts, text_encoder = (
        ["What is my favourite toy?", "a photo of a red ball", "it", "a red ball"],
        pico.pipe.text_encoder,
    )
    rows = Rows.of(pico, texts, [7, 8])
    entering = Entering(pico, rows, layer)
    layers = len(text_encoder.model.language_model.layers)
    above = {path: shift for path, shift in random_shifts(pico).items() if int(path.split(".")[3]) >= layer}
    assert above and layers > 2
    live = {path: LowRankShift(shift.A, shift.B.clone().requires_grad_()) for path, shift in above.items()}
    factors = [shift.B for shift in live.values()]
    assert len(entering.own) < len(texts)
    there = rows.last(rows.lengths.tolist())
    found = []
    for encode in (lambda: rows.encode(pico), lambda: entering.states().told):
        with applied(text_encoder, live):
            states = encode()[there]
        found.append((states.detach(), *torch.autograd.grad(states[:, ::2].sum(), factors)))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(one.abs().max()))
    assert len(text_encoder.model.language_model.layers) == layers


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_tails_of_prompts_that_go_on_from_a_layer(pico: Model, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Asked for again and again, with other shifts each time, while the layers below are run no more."""
    monkeypatch.setattr(encoder, "CHUNK", chunk)
    texts, text_encoder = [*TEXTS, "it", "a photo of a red ball in the snow", "it"], pico.pipe.text_encoder
    layers = text_encoder.model.language_model.layers
    lowest = min(int(path.split(".")[3]) for path in random_shifts(pico))
    assert lowest > 0
    runs = [0, 0]  # of the lowest layer, of the highest
    passing = EnteringTails(pico, texts, lowest)
    for i, layer in enumerate((layers[0], layers[-1])):
        layer.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    try:
        found = []
        for shifts in ({}, random_shifts(pico), {}):
            with applied(text_encoder, shifts):
                found.append(passing.tails(pico))
        assert runs[0] == 0 < runs[1]
    finally:
        for layer in (layers[0], layers[-1]):
            layer._forward_hooks.clear()
    with applied(text_encoder, random_shifts(pico)):
        wanted = tails(pico, texts)
    assert torch.allclose(found[1], wanted, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1], atol=1e-2)
    assert torch.allclose(found[0], tails(pico, texts), atol=1e-5 * float(wanted.abs().max()))


def test_a_shift_below_must_be_there_on_the_way(pico: Model) -> None:
    shifts, rows = random_shifts(pico), Rows.of(pico, TEXTS[:2])
    lowest = min(int(path.split(".")[3]) for path in shifts)
    without = Entering(pico, rows, lowest + 1)
    with applied(pico.pipe.text_encoder, shifts):
        there = rows.last(rows.lengths.tolist())
        wanted = rows.encode(pico)[there]
        assert torch.allclose(Entering(pico, rows, lowest + 1).states().told[there], wanted, atol=1e-5)
        assert not torch.allclose(without.states().told[there], wanted, atol=1e-2)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 9, 2, 8, 4, 4, 7], [6] * 11])
def test_lines_hold_every_token_once_and_none_sees_another_row(lengths: list[int]) -> None:
    prefix, longest = 2, max(lengths) + 1
    rows = torch.arange(1.0, len(lengths) * longest + 1).view(len(lengths), longest, 1)
    lines = Lines.of(lengths, longest, prefix, rows)
    there = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    assert torch.equal(lines.taken_up(lines.laid(rows))[..., 0], rows[..., 0] * there)
    assert lines.at.shape[1] <= 2 * max(lengths) and len(lines.at) <= max(1, (len(lengths) + 1) // 2)
    sees = lines.mask[:, 0] == 0
    assert sees[..., :prefix].all()
    for row, place in there.nonzero().tolist():
        line, at = divmod(int(lines.where[row, place]), lines.at.shape[1])
        seen = lines.laid(rows)[line, sees[line, at, prefix:], 0]
        assert seen.tolist() == rows[row, : place + 1, 0].tolist()
        assert lines.positions[line, at] == prefix + place
