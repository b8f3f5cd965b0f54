"""The gated composition of a word: one recurrent step a word.

A word is read as the sum of its component vectors. The output h of that step predicts the first
component; a later component i is predicted from h through gates that the earlier ones open::

    g_i = tanh((W_i h + u_i) ⊙ 2σ(Σ_j gate_ij[c_j]) + Σ_j shift_ij[c_j])        for j < i

with c_j the word's j-th coordinate. So neither training nor the distribution over the vocabulary
needs a recurrent step for a component.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding
from fairseq_lightrnn.composition import Composition, Context, State

__all__ = ["GatedComposition"]


class GatedComposition(Composition):
    """Reads words and predicts the next ones, with one recurrent step a word.

    Takes the arguments of :class:`Composition`. The carried state of :meth:`forward` is that after
    all words but the last.
    """

    def __init__(self, embedding: ComponentEmbedding, hidden_size: int, *args: Any, **kwargs: Any):
        super().__init__(embedding, hidden_size, *args, **kwargs)
        later = range(1, self.num_components)
        self.transforms = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in later)
        # For component i, the gates and shifts of the values of every component before it.
        self.gates = nn.ModuleList(
            ComponentEmbedding(embedding.shape[:component], 2 * hidden_size) for component in later
        )

    def forward(
        self,
        coordinates: Tensor,
        state: State | None = None,
        activations: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """See :meth:`Composition.forward`."""
        base, state = self.lstm(self.dropout_in(self._inputs(coordinates[:, :-1])), state)
        upcoming = coordinates[:, 1:]
        outputs = [
            self._output(base, upcoming[..., :component])
            for component in range(self.num_components)
        ]
        if activations is not None:
            activations.update(raw=base, dropped=outputs[0])
        return self._with_query(torch.stack(outputs, dim=2), base[:, :, None]), state

    def read(self, coordinates: Tensor, context: Context | None = None) -> Context:
        """See :meth:`Composition.read`."""
        inputs = self.dropout_in(self._inputs(coordinates))
        outputs, state = self.lstm(inputs, context and context.state)
        base = outputs[:, -1]
        prefix = coordinates.new_empty(len(base), 0)
        return Context(self._with_query(self._output(base, prefix), base), state, base, prefix)

    def extend(self, context: Context, component: int, coordinate: Tensor) -> Context:
        """See :meth:`Composition.extend`."""
        if context.base is None or context.prefix is None:
            raise ValueError("the context to extend must come from this composition's read")
        base = context.base
        prefix = torch.cat([context.prefix, coordinate[:, None]], dim=1)
        output = self._with_query(self._output(base, prefix), base)
        return Context(output, context.state, base, prefix)

    def _inputs(self, coordinates: Tensor) -> Tensor:
        """Returns the words' input vectors, (B, T, dim), of coordinates (B, T, k)."""
        return self.embedding(coordinates).sum(dim=-2)

    def _output(self, base: Tensor, prefix: Tensor) -> Tensor:
        """Returns what predicts the component after a prefix (…, i): (…, d)."""
        component = prefix.size(-1)
        if component == 0:
            return self.dropout_out(base)
        gate, shift = self.gates[component - 1](prefix).sum(dim=-2).chunk(2, dim=-1)
        transformed = self.transforms[component - 1](base)
        return self.dropout_out(torch.tanh(transformed * (2 * torch.sigmoid(gate)) + shift))
