"""The paper's composition of a word: one recurrent step for every component.

A word enters the recurrent network as k steps, its component vectors one after the other, through
the same weights (arXiv 1610.09893, section 3.1 and figure 2). The output after a word's last
component predicts the first component of the next word, the output after its i-th component the
next one. So k·T steps score T words, in one fused LSTM call.
"""

from __future__ import annotations

from torch import Tensor

from fairseq_lightrnn.composition import Composition, Context, State

__all__ = ["RecurrentComposition"]


class RecurrentComposition(Composition):
    """Reads words and predicts the next ones, with one recurrent step for every component.

    The carried state of :meth:`forward` is that after all that was read: the last word, but for
    its last component.
    """

    def forward(
        self,
        coordinates: Tensor,
        state: State | None = None,
        activations: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """See :meth:`Composition.forward`."""
        batch, words, components = coordinates.shape
        # The last component of the last word predicts nothing here.  (B, (T+1)·k - 1, dim)
        inputs = self.embedding(coordinates).reshape(batch, words * components, -1)[:, :-1]
        if state is not None:
            inputs = inputs[:, components - 1 :]  # these were read at the end of the text before
        outputs, state = self.lstm(self.dropout_in(inputs), state)
        raw = outputs[:, -(words - 1) * components :]
        outputs = self.dropout_out(raw)
        if activations is not None:
            activations.update(raw=raw, dropped=outputs)
        outputs = outputs.reshape(batch, words - 1, components, -1)
        return self._with_query(outputs, outputs[:, :, :1]), state

    def read(self, coordinates: Tensor, context: Context | None = None) -> Context:
        """See :meth:`Composition.read`."""
        batch, words, components = coordinates.shape
        inputs = self.embedding(coordinates).reshape(batch, words * components, -1)
        outputs, state = self.lstm(self.dropout_in(inputs), context and context.state)
        base = self.dropout_out(outputs[:, -1])
        return Context(self._with_query(base, base), state, base)

    def extend(self, context: Context, component: int, coordinate: Tensor) -> Context:
        """See :meth:`Composition.extend`."""
        inputs = self.embedding(coordinate[:, None], component)
        outputs, state = self.lstm(self.dropout_in(inputs), context.state)
        output = self.dropout_out(outputs[:, -1])
        return Context(self._with_query(output, context.base), state, context.base)
