"""How components are conditioned on those before them, and what is known of a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CASES, CONDITIONERS, build, contexts
from torch import Tensor, nn

from fairseq_lightrnn.core.conditioning import Context, Gated
from fairseq_lightrnn.core.network import FeedForward

TABLES = [(9,), (3, 4), (2, 3, 4)]


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("units", [0, 7])
@pytest.mark.parametrize("shape", TABLES)
def test_gates_follow_their_equations(shape: tuple[int, ...], units: int) -> None:
    """g_i = tanh((W_i h + u_i) ⊙ 2σ(Σ_j gate_ij) + Σ_j shift_ij), for outputs of any network.

    With a feed-forward layer of h + B relu(A h) in the place of h.
    """
    torch.manual_seed(0)
    ffn = FeedForward(4, units, nn.Identity()) if units else None
    gated = Gated(shape, 4, nn.Identity(), ffn).double()
    base = torch.randn(2, 3, 4, dtype=torch.float64)
    upcoming = torch.stack([torch.randint(size, (2, 3)) for size in shape], dim=-1)
    outputs = gated.predict(base[:, :, None], upcoming)
    assert outputs.shape == (2, 3, len(shape), 4)
    context = gated.start(base[1, 2, None])
    hidden = base[1, 2]
    if ffn is not None:
        inner = (ffn.inner.weight @ hidden + ffn.inner.bias).clamp(min=0)
        hidden = hidden + ffn.outer.weight @ inner + ffn.outer.bias
    for component in range(len(shape)):
        expected = hidden
        if component:
            both = sum(
                gated.gates[component - 1].weight[sum(shape[:j]) + upcoming[1, 2, j]]
                for j in range(component)
            )
            opened = gated.transforms[component - 1](hidden) * 2 * torch.sigmoid(both[:4])
            expected = torch.tanh(opened + both[4:])
            context = gated.extend(context, component - 1, upcoming[1:2, 2, component - 1])
        torch.testing.assert_close(outputs[1, 2, component], expected)
        torch.testing.assert_close(context.output[0], expected)


def known_of(context: Context) -> list[Tensor]:
    """All tensors of a context, those of the state with the texts first."""
    state = [part.transpose(0, 1) for part in context.state or ()]
    others = (context.output, *context.queries, context.projections, context.prefix,
              context.source, context.history)  # fmt: skip
    return [part for part in (*state, *others) if part is not None]


def extended(head: Any, context: Context, component: int, value: int) -> Context:
    """The twin: every text extended by one value, as a call of its own."""
    return head.extend(context, component, torch.full((len(context.output),), value))


@pytest.mark.parametrize(("kind", "words", "shape"), CASES)
def test_extending_to_all_values_is_extending_to_each(
    kind: Any, words: int, shape: tuple[int, ...]
) -> None:
    """What predicts and what is known for further extensions, whatever is dropped before."""
    model = build(kind, words, shape)
    whole = contexts(model, 3)
    every = model.head.to_extend(whole)
    for component, size in enumerate(shape[:-1]):
        found = model.head.extend_to_all(every, component, size)
        assert len(found.output) == 3 * size
        for value in range(size):
            expected = extended(model.head, every, component, value)
            mine = torch.arange(3) * size + value
            torch.testing.assert_close(found.output[mine], expected.output)
            torch.testing.assert_close(
                [query[mine] for query in found.queries if query is not None],
                [query for query in expected.queries if query is not None],
            )
            kept = extended(model.head, whole, component, value)
            torch.testing.assert_close(kept.output, expected.output)
            if component + 2 < len(shape):
                one, two = (
                    extended(model.head, some, component + 1, 0)
                    for some in (found.select(mine), expected)
                )
                torch.testing.assert_close(one.output, two.output)
        whole, every = (extended(model.head, some, component, 1) for some in (whole, every))


@pytest.mark.parametrize(("kind", "words", "shape"), CASES)
def test_contexts_select_and_join_all_that_is_known(
    kind: Any, words: int, shape: tuple[int, ...]
) -> None:
    model = build(kind, words, shape)
    context = contexts(model, 4)
    head, tail = torch.tensor([0, 1]), torch.tensor([2, 3])
    again = context.select(head).join(context.select(tail))
    for one, two in zip(known_of(again), known_of(context), strict=True):
        assert torch.equal(one, two)
    index = torch.tensor([2, 0, 2, 2])
    for one, two in zip(known_of(context.select(index)), known_of(context), strict=True):
        assert torch.equal(one, two[index])


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_states_follow_the_texts(kind: Any) -> None:
    model = build(kind, 12, (3, 4))
    context = contexts(model, 3)
    assert context.state is not None
    hidden, cell = context.state
    index = torch.tensor([2, 0])
    chosen = context.select(index).state
    assert chosen is not None
    assert torch.equal(chosen[0], hidden[:, index]) and torch.equal(chosen[1], cell[:, index])


def test_a_context_that_gates_cannot_extend() -> None:
    model = build(Gated, 12, (3, 4))
    with pytest.raises(ValueError, match="must come from this decoder's read"):
        model.head.extend(Context(contexts(model, 1).output), 0, torch.tensor([0]))


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_training_extends_with_dropout(kind: Any) -> None:
    """Every value of a component is met with masks of its own, and with the right shapes."""
    model = build(kind, 24, (2, 3, 4))
    model.head.conditioner.dropout.p = 0.5
    model.train()
    context = model.head.to_extend(contexts(model, 2))
    found = model.head.extend_to_all(context, 0, 2)
    assert found.output.shape == (4, model.head.softmax.vectors.dim)
    assert not torch.equal(found.output, model.head.extend_to_all(context, 0, 2).output)
