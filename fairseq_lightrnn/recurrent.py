"""The paper's composition of a word: one recurrent step for every component.

A word enters the recurrent network as k steps, its component vectors one after the other, through
the same weights (arXiv 1610.09893, section 3.1 and figure 2). The output after a word's last
component predicts the first component of the next word, the output after its i-th component the
next one. So k·T steps score T words, in one fused LSTM call.
"""

from __future__ import annotations

import torch
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
        # All but the last component of word 0 were read at the end of the text before.
        already_read = 0 if state is None else self.num_components - 1
        outputs, state = self._run(coordinates, state, already_read)
        predictions = self._predict(outputs)
        if activations is not None:
            dropped = predictions[..., : outputs.size(-1)]
            # (B, T, k, d) -> (B, T·k, d)
            activations.update(raw=outputs.flatten(1, 2), dropped=dropped.flatten(1, 2))
        return predictions, state

    def _run(
        self, coordinates: Tensor, state: State | None, already_read: int = 0
    ) -> tuple[Tensor, State]:
        """Returns the recurrent outputs before each component of words 1 … T, (B, T, k, d).

        The state has read some of the components of word 0.
        """
        batch, words, components = coordinates.shape
        # The last component of the last word predicts nothing here.  (B, (T+1)·k - 1, dim)
        inputs = self.embedding(coordinates).reshape(batch, words * components, -1)[:, :-1]
        outputs, state = self.lstm(self.dropout_in(inputs[:, already_read:]), state)
        outputs = outputs[:, -(words - 1) * components :]
        return outputs.reshape(batch, words - 1, components, -1), state

    def _predict(self, outputs: Tensor) -> Tensor:
        outputs = self.dropout_out(self._feed_forward(outputs))
        return self._with_query(outputs, outputs[:, :, :1])

    def _last_output(self, coordinates: Tensor, state: State | None) -> tuple[Tensor, State]:
        batch, words, components = coordinates.shape
        inputs = self.embedding(coordinates).reshape(batch, words * components, -1)
        outputs, state = self.lstm(self.dropout_in(inputs), state)
        return outputs[:, -1], state

    def _context(self, output: Tensor, state: State | None) -> Context:
        base = self.dropout_out(self._feed_forward(output))
        return Context(self._with_query(base, base), state, base)

    def extend(self, context: Context, component: int, coordinate: Tensor) -> Context:
        """See :meth:`Composition.extend`."""
        output, state = self._step(context, component, coordinate)
        return self._extended(context, output, state)

    def extend_to_all(self, context: Context, component: int, size: int) -> Context:
        """See :meth:`Prediction.extend_to_all`."""
        if self.training or context.state is None:  # branches know no dropout
            return super().extend_to_all(context, component, size)
        values = torch.arange(size, device=context.output.device)
        inputs = self.embedding(values[:, None], component)[:, 0]
        outputs, state = self.lstm.branch(inputs, context.state)  # (B, R, d)

        def one_step(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, None]

        def flat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.expand(-1, size, -1).flatten(0, 1)

        known = context._replace(base=one_step(context.base), source=one_step(context.source))
        extended = self._extended(known, outputs, state)
        return Context(
            extended.output.flatten(0, 1), state, flat(extended.base), source=flat(extended.source)
        )

    def _extended(self, context: Context, output: Tensor, state: State) -> Context:
        """Returns a context after one more component, given the LSTM's output (…, d) after it."""
        output = self.dropout_out(self._feed_forward(output))
        return Context(self._with_query(output, context.base), state, context.base)

    def _step(self, context: Context, component: int, coordinate: Tensor) -> tuple[Tensor, State]:
        """Returns the recurrent output after one more component, shape (B, d), and the state."""
        inputs = self.embedding(coordinate[:, None], component)
        outputs, state = self.lstm(self.dropout_in(inputs), context.state)
        return outputs[:, -1], state
