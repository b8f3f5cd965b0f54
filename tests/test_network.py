"""Dropouts and penalties against their definitions; masks are recovered from what they leave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import CONDITIONERS, HIDDEN, build_recurrent
from torch import Tensor, nn

from fairseq_lightrnn.core.conditioning import Recurrent
from fairseq_lightrnn.core.decoder import Decoder
from fairseq_lightrnn.core.network import (
    Dropout,
    FeedForward,
    LockedDropout,
    RegularisedLSTM,
    mean_square,
    mean_square_change,
)

SHAPES = [(12,), (3, 4), (2, 3, 2)]
RATE = 0.4
SCALE = 1 / (1 - RATE)


def hand_written_lstm(
    inputs: Tensor, weights: list[Tensor], hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one step at a time: inputs (B, T, n), states (B, d)."""
    weight_in, weight_hidden, bias_in, bias_hidden = weights
    outputs = []
    for step in range(inputs.size(1)):
        gates = inputs[:, step] @ weight_in.T + bias_in + hidden @ weight_hidden.T + bias_hidden
        entry, forget, new, out = gates.chunk(4, dim=1)
        cell = forget.sigmoid() * cell + entry.sigmoid() * new.tanh()
        hidden = out.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs, dim=1), hidden, cell


def layer_weights(lstm: nn.LSTM, layer: int) -> list[Tensor]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [getattr(lstm, f"{name}_l{layer}") for name in names]


def recurrent_masks(outputs: Tensor, lstm: nn.LSTM) -> list[Tensor]:
    """Dropped entries of recurrent matrices have no gradient."""
    matrices = [layer_weights(lstm, layer)[1] for layer in range(lstm.num_layers)]
    gradients = torch.autograd.grad(outputs.square().sum(), matrices, retain_graph=True)
    return [gradient.ne(0) for gradient in gradients]


def mask_between(outputs: Tensor, lstm: nn.LSTM) -> Tensor:
    """Features that the second layer of (B, T, d) outputs does not see have no gradient: (B, d)."""
    weight = layer_weights(lstm, 1)[0]
    gradients = [
        torch.autograd.grad(own.square().sum(), weight, retain_graph=True)[0] for own in outputs
    ]
    return torch.stack([gradient.ne(0).any(dim=0) for gradient in gradients])


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("weight_dropout", [0.0, RATE])
@pytest.mark.parametrize("locked", [False, True])
def test_lstm_is_the_hand_written_one_with_masks(
    carried: bool, weight_dropout: float, locked: bool
) -> None:
    torch.manual_seed(1)
    dropout = RATE if locked else 0.0
    lstm = RegularisedLSTM(4, 8, 2, dropout, 0.0, locked, weight_dropout).double()
    inputs = torch.randn(3, 7, 4).double()
    states = torch.randn(2, 2, 3, 8).double() if carried else torch.zeros(2, 2, 3, 8).double()
    outputs, (hidden, cell) = lstm(inputs, tuple(states) if carried else None)
    masks = recurrent_masks(outputs, lstm)
    between = mask_between(outputs, lstm)
    assert all(bool(mask.all()) is not bool(weight_dropout) for mask in masks)
    assert bool(between.all()) is not locked

    expected = inputs
    for layer in range(2):
        weights = layer_weights(lstm, layer)
        if weight_dropout:
            weights[1] = weights[1] * masks[layer] * SCALE
        if layer and locked:
            expected = expected * between[:, None] * SCALE
        expected, *state = hand_written_lstm(expected, weights, *states[:, layer])
        torch.testing.assert_close(hidden[layer], state[0])
        torch.testing.assert_close(cell[layer], state[1])
    torch.testing.assert_close(outputs, expected)


def test_masks_differ_between_sequences_calls_and_seeds() -> None:
    lstm = RegularisedLSTM(4, 16, 2, RATE, 0.0, True, RATE).double()
    inputs = torch.randn(3, 5, 4).double()
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        outputs, _ = lstm(inputs)
        found.append((outputs, recurrent_masks(outputs, lstm), mask_between(outputs, lstm)))
    assert torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][1][0], found[1][1][0])
    assert not torch.equal(found[0][1][0], found[0][1][1])
    between = found[0][2]
    assert len({tuple(mask.tolist()) for mask in between}) == 3


def test_dropped_weights_keep_their_expectation() -> None:
    torch.manual_seed(1)
    lstm = RegularisedLSTM(2, 60, weight_dropout=RATE)
    kept = torch.stack([lstm._dropped_weights()[1] / lstm.weight_hh_l0 for _ in range(20)])
    assert kept.mean().item() == pytest.approx(1, abs=0.01)
    assert kept.eq(0).float().mean().item() == pytest.approx(RATE, abs=0.01)
    torch.testing.assert_close(lstm._dropped_weights()[0], lstm.weight_ih_l0)


@pytest.mark.parametrize("locked", [False, True])
def test_gradients_of_the_lstm(locked: bool) -> None:
    torch.manual_seed(1)
    lstm = RegularisedLSTM(2, 3, 2, RATE if locked else 0.0, 0.0, locked, RATE).double()
    names = [name for name, _ in lstm.named_parameters()]

    def run(inputs: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(2)
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(lstm, named, (inputs,))[0]

    inputs = torch.randn(2, 3, 2).double().requires_grad_()
    parameters = [parameter.detach().requires_grad_() for parameter in lstm.parameters()]
    assert torch.autograd.gradcheck(run, (inputs, *parameters))


def test_parameters_and_evaluation_are_those_of_torch() -> None:
    plain = nn.LSTM(4, 8, 2, batch_first=True)
    lstm = RegularisedLSTM(4, 8, 2, RATE, RATE, True, RATE)
    assert list(lstm.state_dict()) == list(plain.state_dict())
    lstm.load_state_dict(plain.state_dict())
    inputs = torch.randn(3, 5, 4)
    for ours, theirs in zip(lstm.eval()(inputs)[1], plain.eval()(inputs)[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rate", [0.0, 0.1, RATE, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_does_what_that_of_torch_does(rate: float, dtype: torch.dtype) -> None:
    """As many entries are dropped, the others scaled alike, and gradients are those of the mask."""
    inputs = (torch.rand(301, 303, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    outputs, other = Dropout(rate)(inputs), nn.Dropout(rate)(inputs)
    kept = outputs.detach() != 0
    spread = 5 * (2 * kept.numel() * rate * (1 - rate)) ** 0.5
    assert abs(int(kept.sum()) - int((other != 0).sum())) <= spread
    torch.testing.assert_close(outputs[kept], inputs[kept] / max(1 - rate, 0.1))
    (gradient,) = torch.autograd.grad(outputs.float().sum(), inputs)
    torch.testing.assert_close(gradient != 0, kept)
    # No pattern: rows, columns and neighbours of dropped entries are dropped as often as others.
    if 0 < rate < 1:
        for mean in (kept.double().mean(0), kept.double().mean(1)):
            assert (mean - (1 - rate)).abs().max() < 6 * (rate * (1 - rate) / 300) ** 0.5
        both = (kept.flatten()[1:] & kept.flatten()[:-1]).double().mean()
        assert abs(float(both) - (1 - rate) ** 2) < 0.01


def test_masks_of_dropout_follow_the_seed() -> None:
    dropout, inputs = Dropout(RATE), torch.ones(7, 9)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append([dropout(inputs), dropout(inputs)])
    assert torch.equal(masks[0][0], masks[1][0]) and torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[0][1]) and not torch.equal(masks[0][0], masks[2][0])
    assert dropout(inputs[:0]).shape == (0, 9)
    assert torch.equal(dropout.eval()(inputs), inputs)


def test_locked_dropout_has_one_mask_for_a_sequence() -> None:
    torch.manual_seed(1)
    dropout = LockedDropout(RATE)
    masks = dropout(torch.ones(400, 6, 30))
    assert torch.equal(masks, masks[:, :1].expand_as(masks))
    values = torch.tensor([0.0, SCALE])
    torch.testing.assert_close(masks.unique(), values)
    assert masks.mean().item() == pytest.approx(1, abs=0.03)
    assert len(masks[:, 0].unique(dim=0)) == 400
    inputs = torch.randn(2, 3, 4)
    assert torch.equal(dropout.eval()(inputs), inputs)


@pytest.mark.parametrize("locked", [False, True])
def test_dropout_of_inputs(locked: bool) -> None:
    """It is the only dropout of a single layer; locked, it has one mask for a text."""
    torch.manual_seed(1)
    lstm = RegularisedLSTM(4, 8, 1, RATE, RATE, locked).double()
    calls: list[tuple[Tensor, Tensor]] = []
    lstm.dropout_in.register_forward_hook(lambda _, given, out: calls.append((out, given[0])))
    inputs = torch.randn(3, 7, 4).double()
    outputs, _ = lstm(inputs)
    (call,) = calls
    mask = mask_of(*call)
    assert torch.equal(mask, mask[:, :1].expand_as(mask)) is locked
    torch.testing.assert_close(outputs, nn.LSTM.forward(lstm.eval(), call[0])[0])


@pytest.mark.parametrize("training", [False, True])
def test_outputs_are_projected(training: bool) -> None:
    lstm = RegularisedLSTM(4, 8, 2, weight_dropout=1e-9, output_size=3).double().train(training)
    inputs = torch.randn(2, 5, 4).double()
    outputs, state = lstm(inputs)
    plain, expected_state = nn.LSTM.forward(lstm, inputs)
    torch.testing.assert_close(outputs, plain @ lstm.project.weight.T + lstm.project.bias)
    torch.testing.assert_close(state, expected_state)
    assert RegularisedLSTM(4, 8, output_size=8).project is None


def test_projected_outputs_start_as_large_in_sum_as_the_outputs() -> None:
    """So that a step of Adam moves the logit of a word of few numbers as far."""
    lstm = RegularisedLSTM(4, 400, output_size=20)
    assert lstm.project is not None
    outputs = torch.randn(500, 400)
    ratio = lstm.project(outputs).abs().sum(1).mean() / outputs.abs().sum(1).mean()
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("output_size", [8, 3])
def test_branching_takes_one_step_from_every_state(output_size: int) -> None:
    torch.manual_seed(1)
    lstm = RegularisedLSTM(4, 8, 2, output_size=output_size).double().eval()
    inputs = torch.randn(5, 4).double()
    state = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    outputs, after = lstm.branch(inputs, state)
    assert outputs.shape == (3, 5, output_size)
    for text in range(3):
        for number in range(5):
            own = tuple(part[:, text : text + 1].contiguous() for part in state)
            expected, expected_state = lstm(inputs[None, number : number + 1], own)
            torch.testing.assert_close(outputs[text, number], expected[0, 0])
            for part, expected_part in zip(after, expected_state, strict=True):
                torch.testing.assert_close(part[:, 5 * text + number], expected_part[:, 0])


def decoder(kind: Any, shape: tuple[int, ...], extras: bool = False, **rates: Any) -> Decoder:
    """A random decoder in training, of words that have nothing of their own."""
    made = build_recurrent(kind, 12, shape, 3, extras, **rates)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def texts() -> Tensor:
    return torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CONDITIONERS)
def test_weight_dropout_of_decoders(kind: Any, shape: tuple[int, ...], extras: bool) -> None:
    """Every block has a mask of its own, with which it is what evaluation computes."""
    model = decoder(kind, shape, extras, weight_dropout=RATE)
    evaluated = copy.deepcopy(model).eval()
    state, masks = None, []
    for _ in range(2):
        hidden, after, *_ = model(texts(), state)
        masks.append(recurrent_masks(hidden, model.network))
        with torch.no_grad():
            for layer, mask in enumerate(masks[-1]):
                dropped = layer_weights(model.network, layer)[1] * mask * SCALE
                layer_weights(evaluated.network, layer)[1].copy_(dropped)
        expected, state, *_ = evaluated(texts(), state)
        torch.testing.assert_close(hidden, expected)
        torch.testing.assert_close(after, state)
    assert not torch.equal(masks[0][0], masks[1][0])


def mask_of(dropped: Tensor, whole: Tensor) -> Tensor:
    """Returns what dropout has kept, the rest being scaled."""
    kept = dropped.ne(0)
    torch.testing.assert_close(dropped, whole * kept * SCALE)
    assert 0 < kept.double().mean() < 1
    return kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CONDITIONERS)
@pytest.mark.parametrize("carried", [False, True])
def test_locked_dropout_of_decoders(kind: Any, shape: tuple[int, ...], carried: bool) -> None:
    model = decoder(kind, shape, dropout=RATE, dropout_in=RATE, dropout_out=RATE, locked=True)
    calls: list[tuple[Tensor, Tensor]] = []
    for dropout in (model.network.dropout_in, model.head.conditioner.dropout):
        dropout.register_forward_hook(lambda _, given, out: calls.append((out, given[0])))
    state = model(texts()).state if carried else None
    assert len(calls) == carried * (2 if kind is Recurrent else 2 * len(shape))
    model(texts(), state)
    masks = [mask_of(*call) for call in calls]
    for mask in masks:
        assert torch.equal(mask, mask[:, :1].expand_as(mask))  # shared over time
        assert len(mask[:, 0].unique(dim=0)) > 1  # one for each text
    if carried:  # one for each block
        assert not torch.equal(masks[0][:, 0], masks[len(masks) // 2][:, 0])


@pytest.mark.parametrize("locked", [False, True])
def test_dropout_within_the_feed_forward_layer(locked: bool) -> None:
    torch.manual_seed(3)
    ffn = FeedForward(6, 8, LockedDropout(RATE) if locked else nn.Dropout(RATE)).double()
    for parameter in ffn.parameters():
        nn.init.normal_(parameter)
    calls: list[tuple[Tensor, Tensor]] = []
    ffn.dropout.register_forward_hook(lambda _, given, out: calls.append((out, given[0])))
    inputs = torch.randn(2, 50, 6, dtype=torch.float64)
    outputs = ffn(inputs)
    ((dropped, units),) = calls
    assert torch.equal(units, torch.relu(ffn.inner(inputs)))
    torch.testing.assert_close(outputs, inputs + ffn.outer(dropped))
    kept = dropped.ne(0) | units.eq(0)
    torch.testing.assert_close(dropped, units * kept * SCALE)
    assert 0 < kept.double().mean() < 1
    ever = (dropped.ne(0).any(dim=1) & (units.gt(0) & ~kept).any(dim=1)).any()
    assert bool(ever) is not locked  # a unit is dropped at all steps of a text or at none


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_the_feed_forward_layer_has_the_dropout_of_outputs(kind: Any) -> None:
    model = decoder(kind, (3, 4), True, dropout_out=RATE)
    ffn = model.head.conditioner.ffn
    assert ffn is not None and ffn.dropout.p == RATE
    once, again = (ffn(torch.ones(1, HIDDEN).double()) for _ in range(2))
    assert not torch.equal(once, again)


def test_dropout_of_what_is_transformed_is_one_of_its_own() -> None:
    """Rows are predicted from outputs, columns from a transformation of them: with two masks."""
    model = decoder(CONDITIONERS[1], (3, 4), dropout_out=RATE)
    calls: list[tuple[Tensor, Tensor]] = []
    dropout = model.head.conditioner.dropout
    dropout.register_forward_hook(lambda _, given, out: calls.append((out, given[0])))
    model(texts())
    (predicts, outputs), (transformed, same), _ = calls
    assert torch.equal(outputs, same)
    assert not torch.equal(mask_of(predicts, outputs), mask_of(transformed, same))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CONDITIONERS)
def test_activations_are_the_outputs_that_predict(kind: Any, shape: tuple[int, ...]) -> None:
    model = decoder(kind, shape, dropout_out=RATE)
    network_outputs: list[Tensor] = []
    model.network.register_forward_hook(lambda _, given, out: network_outputs.append(out[0]))
    state = None
    for _ in range(2):
        hidden, state, found, _ = model(texts(), state)
        steps = len(shape) if kind is Recurrent else 1
        assert found is not None and found.raw.size(1) == 5 * steps
        assert torch.equal(found.raw, network_outputs[-1][:, -5 * steps :])
        assert torch.equal(found.dropped, hidden[:, :, :steps].reshape(3, 5 * steps, HIDDEN))
        mask_of(found.dropped, found.raw)


def slow_penalties(raw: Tensor, dropped: Tensor, real: Tensor) -> tuple[float, float]:
    """Activation and temporal activation regularisation, number by number."""
    squares, changes = [], []
    for text in range(raw.size(0)):
        for step in range(raw.size(1)):
            for feature in range(raw.size(2)):
                if real[text, step]:
                    squares.append(dropped[text, step, feature].item() ** 2)
                if step and real[text, step] and real[text, step - 1]:
                    change = raw[text, step, feature] - raw[text, step - 1, feature]
                    changes.append(change.item() ** 2)
    return sum(squares) / max(len(squares), 1), sum(changes) / max(len(changes), 1)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 3, 1], [1, 1, 1], [0, 0, 0]])
def test_penalties_are_means_over_real_steps(lengths: list[int]) -> None:
    torch.manual_seed(1)
    raw, dropped = torch.randn(2, 3, 5, 4).double().requires_grad_()
    real = torch.arange(5) < torch.tensor(lengths)[:, None]
    expected = slow_penalties(raw, dropped, real)
    assert mean_square(dropped, real).item() == pytest.approx(expected[0])
    assert mean_square_change(raw, real).item() == pytest.approx(expected[1])
    for function in (mean_square, mean_square_change):
        inputs = torch.randn(3, 5, 4).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda values, f=function: f(values, real), inputs)
