"""Dropouts and penalties against their definitions; masks are recovered from what they leave."""

from __future__ import annotations

import copy

import pytest
import torch
from test_lightrnn_lm import Words, config
from tiny_models import COMPOSITIONS
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding
from fairseq_lightrnn.composition import Composition
from fairseq_lightrnn.models.lightrnn_lm import LightRNNDecoder
from fairseq_lightrnn.regularisation import (
    LockedDropout,
    RegularisedLSTM,
    mean_square,
    mean_square_change,
)
from fairseq_lightrnn.table_lookup import TableLookup

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
    lstm = RegularisedLSTM(4, 8, 2, dropout, locked, weight_dropout).double()
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
    lstm = RegularisedLSTM(4, 16, 2, RATE, True, RATE).double()
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
    lstm = RegularisedLSTM(2, 3, 2, RATE if locked else 0.0, locked, RATE).double()
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
    lstm = RegularisedLSTM(4, 8, 2, RATE, True, RATE)
    assert list(lstm.state_dict()) == list(plain.state_dict())
    lstm.load_state_dict(plain.state_dict())
    inputs = torch.randn(3, 5, 4)
    for ours, theirs in zip(lstm.eval()(inputs)[1], plain.eval()(inputs)[1], strict=True):
        assert torch.equal(ours, theirs)


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


def composition(kind: type[Composition], shape: tuple[int, ...], **rates: float) -> Composition:
    torch.manual_seed(3)
    table = TableLookup(12, shape)
    embedding = ComponentEmbedding(shape, 5, table, 2)
    made = kind(embedding, 6, 2, query_sizes=[2], **rates).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def texts(shape: tuple[int, ...]) -> Tensor:
    words = torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(1))
    return TableLookup(12, shape)(words)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_weight_dropout_of_compositions(kind: type[Composition], shape: tuple[int, ...]) -> None:
    """Every block has a mask of its own, with which it is what evaluation computes."""
    model = composition(kind, shape, weight_dropout=RATE)
    evaluated = copy.deepcopy(model).eval()
    state, masks = None, []
    for _ in range(2):
        outputs, after = model(texts(shape), state)
        masks.append(recurrent_masks(outputs, model.lstm))
        with torch.no_grad():
            for layer, mask in enumerate(masks[-1]):
                dropped = layer_weights(model.lstm, layer)[1] * mask * SCALE
                layer_weights(evaluated.lstm, layer)[1].copy_(dropped)
        expected, state = evaluated(texts(shape), state)
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(after, state)
    assert not torch.equal(masks[0][0], masks[1][0])


def mask_of(dropped: Tensor, whole: Tensor) -> Tensor:
    """Returns what dropout has kept, the rest being scaled."""
    kept = dropped.ne(0)
    torch.testing.assert_close(dropped, whole * kept * SCALE)
    assert 0 < kept.double().mean() < 1
    return kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", COMPOSITIONS)
@pytest.mark.parametrize("carried", [False, True])
def test_locked_dropout_of_compositions(
    kind: type[Composition], shape: tuple[int, ...], carried: bool
) -> None:
    model = composition(
        kind, shape, dropout_in=RATE, dropout_between=RATE, dropout_out=RATE, dropout_hidden=RATE,
        locked_dropout=True,
    )  # fmt: skip
    calls: list[tuple[Tensor, Tensor]] = []
    for dropout in (model.dropout_in, model.dropout_out, model.dropout_hidden):
        dropout.register_forward_hook(lambda _, given, out: calls.append((out, given[0])))
    state = model(texts(shape))[1] if carried else None
    assert len(calls) == carried * (2 if kind is COMPOSITIONS[0] else 2 * len(shape))
    model(texts(shape), state)
    masks = [mask_of(*call) for call in calls]
    for mask in masks:
        assert torch.equal(mask, mask[:, :1].expand_as(mask))  # shared over time
        assert len(mask[:, 0].unique(dim=0)) > 1  # one for each text
    if carried:  # one for each block
        assert not torch.equal(masks[0][:, 0], masks[len(masks) // 2][:, 0])


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_dropout_within_the_feed_forward_layer(kind: type[Composition], locked: bool) -> None:
    model = composition(kind, (3, 4), dropout_hidden=RATE, ffn_dim=8, locked_dropout=locked)
    ffn = model.ffn
    assert ffn is not None
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


@pytest.mark.parametrize("component", [0, 1])
def test_dropout_of_what_is_transformed_is_one_of_its_own(component: int) -> None:
    """Rows are predicted from outputs as they are, columns from a transformation of them."""
    model = composition(COMPOSITIONS[1], (3, 4), dropout_hidden=RATE)
    words = texts((3, 4))
    once, again = (model(words)[0][:, :, component] for _ in range(2))
    assert torch.equal(once, again) is (component == 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_activations_are_the_outputs_that_predict(
    kind: type[Composition], shape: tuple[int, ...]
) -> None:
    model = composition(kind, shape, dropout_out=RATE)
    lstm_outputs: list[Tensor] = []
    model.lstm.register_forward_hook(lambda _, given, out: lstm_outputs.append(out[0]))
    state = None
    for _ in range(2):
        found: dict[str, Tensor] = {}
        outputs, state = model(texts(shape), state, found)
        steps = len(shape) if kind is COMPOSITIONS[0] else 1
        assert torch.equal(found["raw"], lstm_outputs[-1][:, -5 * steps :])
        assert torch.equal(found["dropped"], outputs[:, :, :steps, :6].reshape(3, 5 * steps, 6))
        mask_of(found["dropped"], found["raw"])


@pytest.mark.parametrize("shape", SHAPES)
def test_component_dropout_drops_vectors_for_all_their_occurrences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    table = TableLookup(12, shape)
    embedding = ComponentEmbedding(shape, 5, table, 3, dropout=RATE).double()
    nn.init.normal_(embedding.residual.weight)
    words = torch.arange(12).repeat(4).view(4, 12)
    coordinates = table(words)
    vectors = embedding(coordinates)
    assert torch.equal(vectors, vectors[:1].expand_as(vectors))  # the same at every occurrence
    residuals = embedding.projection(embedding.residual.weight)
    scales: dict[tuple[int, int], set[float]] = {}
    residual_scales = []
    for word in range(12):
        for component, value in enumerate(coordinates[0, word].tolist()):
            whole = embedding.weight[sum(shape[:component]) + value]
            last = component == len(shape) - 1
            parts = torch.stack([whole, residuals[word]] if last else [whole], dim=1)
            found = torch.linalg.lstsq(parts, vectors[0, word, component][:, None]).solution[:, 0]
            torch.testing.assert_close(parts @ found, vectors[0, word, component])
            scales.setdefault((component, value), set()).add(round(found[0].item(), 6))
            if last:
                residual_scales.append(round(found[1].item(), 6))
    assert all(len(found) == 1 for found in scales.values())
    possible = {0.0, round(SCALE, 6)}
    assert {abs(scale) for found in scales.values() for scale in found} == possible
    assert {abs(scale) for scale in residual_scales} == possible
    assert torch.equal(embedding.eval()(coordinates), embedding(coordinates))


def test_component_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(1)
    embedding = ComponentEmbedding((40, 50), 3, dropout=RATE)
    coordinates = torch.stack([torch.arange(40), torch.arange(40)], dim=1)
    whole = embedding.eval()(coordinates)
    embedding.train()
    ratios = torch.stack([embedding(coordinates) / whole for _ in range(200)])
    assert ratios.mean().item() == pytest.approx(1, abs=0.02)


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


@pytest.mark.parametrize("kind", ["recurrent", "gated"])
@pytest.mark.parametrize("components", [1, 2, 3])
def test_evaluation_is_untouched_by_every_flag(kind: str, components: int) -> None:
    common = {
        "composition": kind, "num_components": components, "num_layers": 2, "embed_dim": 6,
        "hidden_size": 6, "input_residual_dim": 2, "output_residual_dim": 2, "dropout": 0.3,
    }  # fmt: skip
    flags = {"locked_dropout": True, "component_dropout": 0.3, "weight_dropout": 0.3}
    plain = LightRNNDecoder(config("lightrnn_lm", **common), Words(30))
    regularised = LightRNNDecoder(config("lightrnn_lm", **common, **flags), Words(30))
    regularised.load_state_dict(plain.state_dict())
    words = torch.randint(2, 30, (3, 7))
    for decoder in (plain, regularised):
        decoder.eval()
    for arguments in ({"target_tokens": words.roll(1, 1)}, {}):
        one, two = (decoder(words, **arguments)[0] for decoder in (plain, regularised))
        assert torch.equal(one, two)
    plain.train(), regularised.train()
    torch.manual_seed(1)
    one = plain(words, target_tokens=words.roll(1, 1))[0]
    torch.manual_seed(1)
    assert not torch.equal(one, regularised(words, target_tokens=words.roll(1, 1))[0])


@pytest.mark.parametrize("name", ["component_dropout", "weight_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_rates_that_are_none(name: str, value: float) -> None:
    message = f"--{name.replace('_', '-')} {value}: must be at least 0 and below 1"
    with pytest.raises(ValueError, match=message):
        LightRNNDecoder(config("lightrnn_lm", **{name: value}), Words(30))
