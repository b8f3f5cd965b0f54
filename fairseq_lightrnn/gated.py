"""The gated composition of a word: one recurrent step a word.

A word is read as the sum of its component vectors. The output h of that step predicts the first
component; a later component i is predicted from h through gates that the earlier ones open::

    g_i = tanh((W_i h + u_i) ⊙ 2σ(Σ_j gate_ij[c_j]) + Σ_j shift_ij[c_j])        for j < i

with c_j the word's j-th coordinate. So neither training nor the distribution over the vocabulary
needs a recurrent step for a component. The prediction asks nothing of what made h: a transformer
predicts in the same way (:class:`GatedPredictor`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding
from fairseq_lightrnn.composition import (
    Composition,
    Context,
    FeedForward,
    Prediction,
    State,
    query_layer,
)

__all__ = ["GatedComposition", "GatedPrediction", "GatedPredictor"]


class GatedPrediction(Prediction):
    """Predicts the components of a word from one output h, of whatever network.

    To be mixed into a module that has the attributes of :class:`Prediction`.

    Attributes:
        transforms: W_i and u_i of the components but the first.
        gates: for those components, the gates and shifts of the values of all before it.
    """

    reads_components = False
    transforms: nn.ModuleList
    gates: nn.ModuleList

    def _add_gates(self, shape: Sequence[int], dim: int) -> None:
        later = range(1, len(shape))
        self.transforms = nn.ModuleList(nn.Linear(dim, dim) for _ in later)
        self.gates = nn.ModuleList(ComponentEmbedding(shape[:i], 2 * dim) for i in later)

    def predict(self, base: Tensor, upcoming: Tensor) -> Tensor:
        """Conditions outputs on the words that are to be predicted from them.

        Args:
            base: outputs h, shape (B, T, d).
            upcoming: coordinates of the words after them, integers of shape (B, T, k).

        Returns:
            What predicts each component of these words, shape (B, T, k, d + e).
        """
        projections = self._project(base)
        outputs = [
            self._output(projections, upcoming[..., :component])
            for component in range(upcoming.size(-1))
        ]
        return self._with_query(torch.stack(outputs, dim=2), outputs[0][:, :, None])

    def context(self, base: Tensor, state: State | None = None) -> Context:
        """Returns the context that predicts the next word from outputs h of shape (B, d)."""
        prefix = torch.empty(len(base), 0, dtype=torch.long, device=base.device)
        projections = self._project(base)
        query = base[:, :0] if self.query is None else self.query(projections[0])
        output = torch.cat([self._output(projections, prefix), query], dim=-1)
        # All that does not depend on components, so that no prefix computes it again.
        return Context(output, state, torch.cat([*projections, query], dim=-1), prefix)

    def extend(self, context: Context, component: int, coordinate: Tensor) -> Context:
        """See :meth:`Prediction.extend`."""
        projections, query, known = self._parts(context)
        prefix = torch.cat([known, coordinate[:, None]], dim=1)
        output = torch.cat([self._output(projections, prefix), query], dim=-1)
        return context._replace(output=output, prefix=prefix)

    def extend_to_all(self, context: Context, component: int, size: int) -> Context:
        """See :meth:`Prediction.extend_to_all`."""
        if component:
            return super().extend_to_all(context, component, size)
        projections, query, _ = self._parts(context)
        texts = torch.arange(len(query), device=query.device).repeat_interleave(size)
        needed = context._replace(output=query, base=context.base if self.transforms[1:] else None)
        longer = needed.select(texts)
        # The gates of a value are looked up once, not for every text.
        values = torch.arange(size, device=query.device)[None, :, None]
        output = self._output([part[:, None] for part in projections], values)  # (B, R, d)
        return longer._replace(
            output=torch.cat([output.flatten(0, 1), longer.output], dim=-1),
            prefix=values[0].repeat(len(query), 1),
        )

    def _parts(self, context: Context) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """Returns what a context knows: projections, query and prefix."""
        if context.base is None or context.prefix is None:
            raise ValueError("the context to extend must come from this composition's read")
        width = context.output.size(-1) - (0 if self.query is None else self.query.out_features)
        projections = context.base.split(width, dim=-1)
        return projections, context.base[:, (len(self.transforms) + 1) * width :], context.prefix

    def _project(self, base: Tensor) -> list[Tensor]:
        """Returns h and, for every component but the first, W_i h + u_i."""
        base = self._feed_forward(base)
        return [base, *(transform(self.dropout_hidden(base)) for transform in self.transforms)]

    def _output(self, projections: Sequence[Tensor], prefix: Tensor) -> Tensor:
        """Returns what predicts the component after a prefix (…, i): (…, d)."""
        component = prefix.size(-1)
        if component == 0:
            return self.dropout_out(projections[0])
        gate, shift = self.gates[component - 1](prefix).sum(dim=-2).chunk(2, dim=-1)
        gated = projections[component] * (2 * torch.sigmoid(gate)) + shift
        return self.dropout_out(torch.tanh(gated))


class GatedPredictor(GatedPrediction):
    """A gated prediction on its own, to be put on top of any network.

    Args:
        shape: the k sizes of the table.
        dim: d, the width of the network's outputs.
        dropout_out: dropout on what predicts a component, and on what is transformed to do so.
        query_sizes: the widths of what the words' output residuals are multiplied with; their sum
            is e.
        ffn_dim: units of the feed-forward layer before all predictions; 0 for none.
        ffn_dropout: dropout of these units.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        dropout_out: float = 0.0,
        query_sizes: Sequence[int] = (),
        ffn_dim: int = 0,
        ffn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout_out = self.dropout_hidden = nn.Dropout(dropout_out)
        self.query = query_layer(dim, query_sizes)
        self.ffn = FeedForward(dim, ffn_dim, nn.Dropout(ffn_dropout)) if ffn_dim else None
        self._add_gates(shape, dim)


class GatedComposition(GatedPrediction, Composition):
    """Reads words and predicts the next ones, with one recurrent step a word.

    Takes the arguments of :class:`Composition`. The carried state of :meth:`forward` is that after
    all words but the last.
    """

    def __init__(self, embedding: ComponentEmbedding, hidden_size: int, *args: Any, **kwargs: Any):
        super().__init__(embedding, hidden_size, *args, **kwargs)
        self._add_gates(embedding.shape, hidden_size)

    def forward(
        self,
        coordinates: Tensor,
        state: State | None = None,
        activations: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """See :meth:`Composition.forward`."""
        base, state = self._run(coordinates[:, :-1], state)
        outputs = self.predict(base, coordinates[:, 1:])
        if activations is not None:
            activations.update(raw=base, dropped=outputs[:, :, 0, : base.size(-1)])
        return outputs, state

    def _run(self, coordinates: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Returns the recurrent outputs after words (B, T, k), shape (B, T, d)."""
        return self.lstm(self.dropout_in(self.embedding(coordinates).sum(dim=-2)), state)

    def _last_output(self, coordinates: Tensor, state: State | None) -> tuple[Tensor, State]:
        outputs, state = self._run(coordinates, state)
        return outputs[:, -1], state

    def _context(self, output: Tensor, state: State | None) -> Context:
        return self.context(output, state)
