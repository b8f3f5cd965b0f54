"""What stands on top of any network and predicts words component by component."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairseq_lightrnn.core.conditioning import Conditioner, Context
from fairseq_lightrnn.core.network import State
from fairseq_lightrnn.core.seats import PredictedTable
from fairseq_lightrnn.core.softmax import ComponentSoftmax

__all__ = ["ComponentHead"]


class ComponentHead(nn.Module):
    """Predicts words from a network's outputs, each component conditioned on those before it.

    Args:
        conditioner: how components are conditioned on each other.
        softmax: predicts each.
    """

    def __init__(self, conditioner: Conditioner, softmax: ComponentSoftmax) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.softmax = softmax

    @property
    def table(self) -> PredictedTable:
        """The word table in force."""
        return self.softmax.table

    def hidden(self, outputs: Tensor, upcoming: Tensor) -> Tensor:
        """Conditions outputs on the words that are to be predicted from them.

        Args:
            outputs: of the network, shape (B, T, steps, d).
            upcoming: the words, integers of shape (B, T).

        Returns:
            Hidden states that predict each of their components, shape (B, T, k, d).
        """
        return self.conditioner.predict(outputs, self.table(upcoming))

    def start(
        self, output: Tensor, state: State | None = None, source: Tensor | None = None
    ) -> Context:
        """Returns what is known of the next word; see :meth:`Conditioner.start`."""
        context = self.conditioner.start(output, state, source)
        return context._replace(queries=self.softmax.ask(context.output))

    def hidden_of(self, context: Context, upcoming: Tensor) -> Tensor:
        """Conditions contexts on the words that are to be predicted from them.

        Args:
            context: of N texts, before any component is known.
            upcoming: the words, integers of shape (N,).

        Returns:
            Hidden states that predict each of their components, shape (N, k, d).
        """
        hidden = [context.output]
        for component, value in enumerate(self.table(upcoming)[:, :-1].unbind(1)):
            context = self.extend(context, component, value)
            hidden.append(context.output)
        return torch.stack(hidden, dim=1)

    def extend(self, context: Context, component: int, value: Tensor) -> Context:
        """See :meth:`Conditioner.extend`."""
        return self.conditioner.extend(context, component, value)

    def extend_to_all(self, context: Context, component: int, size: int) -> Context:
        """See :meth:`Conditioner.extend_to_all`."""
        return self.conditioner.extend_to_all(context, component, size)

    def to_extend(self, context: Context) -> Context:
        """See :meth:`Conditioner.to_extend`."""
        return self.conditioner.to_extend(context)
