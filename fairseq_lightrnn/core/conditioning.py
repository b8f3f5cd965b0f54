"""How the later components of a word are predicted, given those before them.

Both ways start from the hidden state after the words so far, which predicts the first component.
:class:`Recurrent` is the paper's: the network reads each component before it predicts the next
(arXiv 1610.09893, section 3.1 and figure 2). :class:`Gated` takes one recurrent step a word; later
components are predicted from its output through gates that the earlier ones open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fairseq_lightrnn.core.attention import Attention
from fairseq_lightrnn.core.network import FeedForward, RegularisedLSTM, State
from fairseq_lightrnn.core.reader import ComponentVectors, Reader
from fairseq_lightrnn.core.softmax import Queries

__all__ = ["Conditioner", "Context", "Gated", "Recurrent"]


class Context(NamedTuple):
    """What is known of B texts after some words, and perhaps some components of the next.

    Attributes:
        output: hidden states of shape (B, d) that predict the next component.
        queries: what features of words are scored with, each (B, e) or None.
        state: the recurrent state behind it, if there is a recurrent network.
        projections: of a gated prediction, what its gates act on, (B, k - 1, d).
        prefix: of a gated prediction, the components that are known, integers of shape (B, i).
        source: what attention read from the source text, shape (B, m), where there is one.
        history: the words so far, integers of shape (B, T), of a network without a state.
    """

    output: Tensor
    queries: Queries = ()
    state: State | None = None
    projections: Tensor | None = None
    prefix: Tensor | None = None
    source: Tensor | None = None
    history: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """The memory that its tensors take."""
        tensors = [*self[:1], *self.queries, *(self.state or ()), *self[3:]]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def select(self, index: Tensor) -> Context:
        """Picks, repeats or reorders the texts of the batch by an index of shape (N,)."""

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, index)

        state = None
        if self.state is not None:
            hidden, cell = self.state
            state = hidden.index_select(1, index), cell.index_select(1, index)
        return Context(
            self.output.index_select(0, index),
            tuple(map(chosen, self.queries)),
            state,
            chosen(self.projections),
            chosen(self.prefix),
            chosen(self.source),
            chosen(self.history),
        )

    def join(self, other: Context) -> Context:
        """Puts the texts of another batch, of which as much is known, behind those of this one."""

        def both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return None if one is None else torch.cat([one, cast(Tensor, two)])

        state = None
        if self.state is not None:
            pairs = zip(self.state, cast(State, other.state), strict=True)
            hidden, cell = (torch.cat(pair, dim=1) for pair in pairs)
            state = hidden, cell
        return Context(
            torch.cat([self.output, other.output]),
            tuple(map(both, self.queries, other.queries)),
            state,
            both(self.projections, other.projections),
            both(self.prefix, other.prefix),
            both(self.source, other.source),
            both(self.history, other.history),
        )


class Conditioner(nn.Module):
    """Predicts the components of a word one after the other.

    Args:
        dropout: on what predicts a component.
        ffn: what outputs of the network pass before they predict anything, or None.

    Attributes:
        steps: how many steps the network takes for a word.
    """

    steps = 1

    def __init__(self, dropout: nn.Module, ffn: FeedForward | None) -> None:
        super().__init__()
        self.dropout = dropout
        self.ffn = ffn

    def predict(self, outputs: Tensor, upcoming: Tensor) -> Tensor:
        """Conditions the network's outputs on the words that are to be predicted from them.

        Args:
            outputs: shape (B, T, steps, d).
            upcoming: coordinates of the words after them, integers of shape (B, T, k).

        Returns:
            Hidden states that predict each component of these words, shape (B, T, k, d).
        """
        raise NotImplementedError

    def start(
        self, output: Tensor, state: State | None = None, source: Tensor | None = None
    ) -> Context:
        """Returns what is known of the next word after outputs (B, d) of the network.

        Args:
            output: after all words so far.
            state: of the network.
            source: what attention read from the source text for this word, shape (B, m).
        """
        raise NotImplementedError

    def extend(self, context: Context, component: int, value: Tensor) -> Context:
        """Conditions a context on one more component of the next word.

        Args:
            context: predicts that component.
            component: its number.
            value: its value, integers of shape (B,).

        Returns:
            The context that predicts the component after it.
        """
        raise NotImplementedError

    def extend_to_all(self, context: Context, component: int, size: int) -> Context:
        """Conditions every context on every value of one more component of the next word.

        Args:
            context: of B texts; predicts that component.
            component: its number.
            size: R, the number of its values.

        Returns:
            The contexts, B·R of them, those of a text side by side.
        """
        texts, values = _every_pair(context, size)
        return self.extend(context.select(texts), component, values)

    def to_extend(self, context: Context) -> Context:
        """Drops from a context what extending it does not need, or every prefix would copy it."""
        return context

    def _feed_forward(self, outputs: Tensor) -> Tensor:
        return outputs if self.ffn is None else self.ffn(outputs)


def _every_pair(context: Context, size: int) -> tuple[Tensor, Tensor]:
    """Returns every text with every value: two arrays of shape (B·R,)."""
    batch, device = len(context.output), context.output.device
    texts = torch.arange(batch, device=device).repeat_interleave(size)
    return texts, torch.arange(size, device=device).repeat(batch)


class Recurrent(Conditioner):
    """The paper's: the network reads every component of a word as a step of its own.

    The output after a word's last component predicts the first component of the next word, the
    output after its i-th component the next one. So k·T steps score T words, in one fused call.

    Args:
        reader: looks up the vectors of the components.
        network: reads them.
        dropout: on what predicts a component.
        ffn: what outputs pass before they predict anything, or None.
        attention: combines outputs with a source text, or None.
    """

    def __init__(
        self,
        reader: Reader,
        network: RegularisedLSTM,
        dropout: nn.Module,
        ffn: FeedForward | None = None,
        attention: Attention | None = None,
    ) -> None:
        super().__init__(dropout, ffn)
        self.reader = reader
        self.network = network
        self.attention = attention
        self.steps = reader.num_components

    def predict(self, outputs: Tensor, upcoming: Tensor) -> Tensor:
        """See :meth:`Conditioner.predict`."""
        return self._finish(outputs)

    def start(
        self, output: Tensor, state: State | None = None, source: Tensor | None = None
    ) -> Context:
        """See :meth:`Conditioner.start`."""
        return Context(self._finish(output), state=state, source=source)

    def extend(self, context: Context, component: int, value: Tensor) -> Context:
        """See :meth:`Conditioner.extend`."""
        inputs = self.reader.component(component, value)[:, None]
        outputs, state = self.network(inputs, context.state)
        output = self._finish(self._combine(outputs[:, -1], context.source))
        return context._replace(output=output, state=state)

    def extend_to_all(self, context: Context, component: int, size: int) -> Context:
        """See :meth:`Conditioner.extend_to_all`."""
        if self.training or context.state is None:  # branches know no dropout
            return super().extend_to_all(context, component, size)
        texts, values = _every_pair(context, size)
        inputs = self.reader.component(component, values[:size])
        outputs, state = self.network.branch(inputs, context.state)  # (B, R, d)
        source = None if context.source is None else context.source[:, None]
        output = self._finish(self._combine(outputs, source)).flatten(0, 1)
        longer = context._replace(output=context.output[:, :0], state=None).select(texts)
        return longer._replace(output=output, state=state)

    def _combine(self, outputs: Tensor, source: Tensor | None) -> Tensor:
        if self.attention is None:
            return outputs
        if source is None:
            raise ValueError("the context to extend must come from a decoder that read a source")
        return self.attention.combine(outputs, source)

    def _finish(self, outputs: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self._feed_forward(outputs)))


class Gated(Conditioner):
    """One step a word: the output h of a network predicts all components, through gates.

    Component i > 0 is predicted from h and the word's coordinates c_j before it, j < i::

        g_i = tanh((W_i h + u_i) ⊙ 2σ(Σ_j gate_ij[c_j]) + Σ_j shift_ij[c_j])

    So neither training nor the distribution over the vocabulary needs a recurrent step for a
    component, and nothing is asked of what made h: a transformer predicts in the same way.

    Args:
        shape: the k sizes of the table.
        dim: d, the width of the network's outputs.
        dropout: on what predicts a component, and on what is transformed to do so.
        ffn: what outputs pass before they predict anything, or None.

    Attributes:
        transforms: W_i and u_i of the components but the first.
        gates: for those components, the gates and shifts of the values of all before it.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        dropout: nn.Module,
        ffn: FeedForward | None = None,
    ) -> None:
        super().__init__(dropout, ffn)
        later = range(1, len(shape))
        self.transforms = nn.ModuleList(nn.Linear(dim, dim) for _ in later)
        self.gates = nn.ModuleList(ComponentVectors(shape[:i], 2 * dim) for i in later)

    def predict(self, outputs: Tensor, upcoming: Tensor) -> Tensor:
        """See :meth:`Conditioner.predict`."""
        base = self._feed_forward(outputs[:, :, 0])
        hidden = [cast(Tensor, self.dropout(base))]
        for component, transform in enumerate(self.transforms, 1):
            projection = transform(self.dropout(base))
            hidden.append(self._gate(projection, upcoming[..., :component]))
        return torch.stack(hidden, dim=2)

    def start(
        self, output: Tensor, state: State | None = None, source: Tensor | None = None
    ) -> Context:
        """See :meth:`Conditioner.start`."""
        base = self._feed_forward(output)
        projections = [transform(self.dropout(base)) for transform in self.transforms]
        return Context(
            self.dropout(base),
            state=state,
            # All that does not depend on components, so that no prefix computes it again.
            projections=torch.stack(projections, dim=1) if projections else base[:, None][:, :0],
            prefix=torch.empty(len(base), 0, dtype=torch.long, device=base.device),
            source=source,
        )

    def extend(self, context: Context, component: int, value: Tensor) -> Context:
        """See :meth:`Conditioner.extend`."""
        projections, prefix = self._known(context)
        prefix = torch.cat([prefix, value[:, None]], dim=1)
        return context._replace(output=self._gate(projections[:, component], prefix), prefix=prefix)

    def extend_to_all(self, context: Context, component: int, size: int) -> Context:
        """See :meth:`Conditioner.extend_to_all`."""
        if component:
            return super().extend_to_all(context, component, size)
        projections, _ = self._known(context)
        texts, values = _every_pair(context, size)
        # The gates of a value are looked up once, not for every text.
        output = self._gate(projections[:, :1], values[None, :size, None])  # (B, R, d)
        needed = projections if len(self.transforms) > 1 else projections[:, :0]
        longer = context._replace(output=context.output[:, :0], projections=needed).select(texts)
        return longer._replace(output=output.flatten(0, 1), prefix=values[:, None])

    def to_extend(self, context: Context) -> Context:
        """See :meth:`Conditioner.to_extend`."""
        return context._replace(state=None, source=None, history=None)

    def _known(self, context: Context) -> tuple[Tensor, Tensor]:
        if context.projections is None or context.prefix is None:
            raise ValueError("the context to extend must come from this decoder's read")
        return context.projections, context.prefix

    def _gate(self, projection: Tensor, prefix: Tensor) -> Tensor:
        """Returns what predicts the component after a prefix (…, i): (…, d)."""
        gates = self.gates[prefix.size(-1) - 1](prefix)
        gates = gates.squeeze(-2) if prefix.size(-1) == 1 else gates.sum(dim=-2)
        gate, shift = gates.chunk(2, dim=-1)
        gated = torch.addcmul(shift, projection, torch.sigmoid(gate), value=2)
        return cast(Tensor, self.dropout(torch.tanh(gated)))
