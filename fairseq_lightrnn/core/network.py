"""The recurrent network and what keeps it from overfitting, as in AWD-LSTM (arXiv 1708.02182).

Locked dropout (arXiv 1512.05287), weight-dropped recurrent matrices, and the two penalties on the
activations of the last layer. None of it changes the parameters of a model, their names, or what
the model does in evaluation.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn

from fairseq_lightrnn.core.features import query_layer
from fairseq_lightrnn.core.softmax import at_least_float32

__all__ = [
    "Dropout",
    "FeedForward",
    "LockedDropout",
    "RegularisedLSTM",
    "State",
    "locked_dropout",
    "mean_square",
    "mean_square_change",
]


_LEVELS = 2**15

State = tuple[Tensor, Tensor]
"""Hidden and cell state of an LSTM, each of shape (layers, B, d)."""


class FeedForward(nn.Module):
    """A feed-forward layer with a connection around it: ``h + B dropout(relu(A h))``.

    An ordinary softmax sums over words in every row's place; logits of rows that are linear in h
    say less than that.

    Args:
        dim: d, the width of inputs and outputs.
        inner_dim: the number of its units.
        dropout: of these units.
    """

    def __init__(self, dim: int, inner_dim: int, dropout: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, inner_dim)
        self.dropout = dropout
        self.outer = nn.Linear(inner_dim, dim)

    def forward(self, outputs: Tensor) -> Tensor:
        """Returns outputs of shape (…, d) in the same shape."""
        hidden: Tensor = self.outer(self.dropout(F.relu(self.inner(outputs))))
        return outputs + hidden


class Dropout(nn.Dropout):
    """torch's dropout, with masks that a CPU draws in a quarter of the time.

    On a CPU torch draws a mask number by number, which takes a sixth of the time of an update of
    the recommended model. Here 15 random bits decide of an entry, so that the rate is exact to
    2^-16.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drops entries in training, and scales what remains."""
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        count = input.numel()
        drawn = torch.empty((count + 1) // 2, dtype=torch.int32).random_()  # 31 bits each
        bits = drawn.view(torch.int16)[:count] & (_LEVELS - 1)
        kept = (bits >= round(self.p * _LEVELS)).view(input.shape)
        return input * kept.to(input.dtype).mul_(1 / (1 - self.p))


def locked_dropout(inputs: Tensor, rate: float) -> Tensor:
    """Drops the same features of a sequence at every step, and scales what remains.

    Args:
        inputs: shape (B, …, d). All axes but the first and the last share one mask.
        rate: the probability of a feature to be dropped.
    """
    mask = inputs.new_ones(inputs.size(0), *(1 for _ in inputs.shape[1:-1]), inputs.size(-1))
    return inputs * F.dropout(mask, rate)


class LockedDropout(Dropout):
    """Dropout with one mask for each sequence, shared over time (variational dropout)."""

    def forward(self, input: Tensor) -> Tensor:
        """Applies :func:`locked_dropout` to (B, …, d) in training."""
        return locked_dropout(input, self.p) if self.training and self.p else input


class RegularisedLSTM(nn.LSTM):
    """torch's LSTM over (B, T, d) with dropout that its fused kernel does not know.

    Parameters, their names and evaluation are those of ``nn.LSTM``. Each forward in training
    drops entries of the recurrent matrices ``weight_hh_l…``, the same at all steps, and scales what
    remains. With locked dropout the layers run one after the other, each in the fused kernel.

    Args:
        input_size: width of the inputs.
        hidden_size: width of the layers.
        num_layers: the layers.
        dropout: dropout between the layers.
        dropout_in: dropout on the inputs.
        locked: use one mask of each for a sequence, shared over time.
        weight_dropout: the probability of an entry of a recurrent matrix to be dropped.
        output_size: width that the last layer's outputs are projected to, if that is another.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        dropout_in: float = 0.0,
        locked: bool = False,
        weight_dropout: float = 0.0,
        output_size: int | None = None,
    ) -> None:
        # nn.LSTM warns of a dropout that has no layers to stand between.
        dropout = dropout if num_layers > 1 else 0.0
        super().__init__(input_size, hidden_size, num_layers, batch_first=True, dropout=dropout)
        self.locked = locked
        self.weight_dropout = weight_dropout
        self.dropout_in = LockedDropout(dropout_in) if locked else Dropout(dropout_in)
        self.project: nn.Linear | None = None
        if output_size is not None and output_size != hidden_size:
            # What the numbers of shared vectors are multiplied with is a query too.
            self.project = query_layer(hidden_size, output_size, bias=True)

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See ``nn.LSTM.forward``; inputs must have a batch axis."""
        outputs, state = self._layers(self.dropout_in(input), hx)
        return self._projected(outputs), state

    def _projected(self, outputs: Tensor) -> Tensor:
        return outputs if self.project is None else self.project(outputs)

    def _layers(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        layer_by_layer = self.locked and self.dropout > 0
        if not self.training or not (layer_by_layer or self.weight_dropout):
            return super().forward(input, hx)  # type: ignore[no-any-return]
        weights = self._dropped_weights()
        if hx is None:
            zeros = input.new_zeros(self.num_layers, input.size(0), self.hidden_size)
            hx = zeros, zeros
        if not layer_by_layer:
            return _fused(input, hx, weights, self.dropout)
        size = len(weights) // self.num_layers
        outputs, states = input, []
        for layer in range(self.num_layers):
            if layer:
                outputs = locked_dropout(outputs, self.dropout)
            before = hx[0][layer : layer + 1], hx[1][layer : layer + 1]
            own = weights[layer * size : (layer + 1) * size]
            outputs, after = _fused(outputs, before, own, 0.0)
            states.append(after)
        hidden, cell = (torch.cat(parts) for parts in zip(*states, strict=True))
        return outputs, (hidden, cell)

    def branch(
        self, inputs: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Takes one step from each of B states with each of R inputs, without dropout.

        What inputs and states add to the gates of the first layer is computed once for each of
        them, rather than for each pair.

        Args:
            inputs: of shape (R, input_size).
            state: hidden and cell state, each of shape (layers, B, d).

        Returns:
            The outputs, shape (B, R, d), and the states, each of shape (layers, B·R, d).
        """
        outputs, hidden_states, cell_states = inputs, [], []
        for weights, hidden, cell in zip(self.all_weights, *state, strict=True):
            of_inputs, of_states, *biases = weights
            gates = F.linear(outputs, of_inputs, biases[0])  # (R, 4d), then (B, R, 4d)
            gates = gates + F.linear(hidden, of_states, biases[1])[:, None]
            enter, keep, new, leave = gates.chunk(4, dim=-1)
            cells = keep.sigmoid() * cell[:, None] + enter.sigmoid() * new.tanh()
            outputs = leave.sigmoid() * cells.tanh()
            hidden_states.append(outputs.flatten(0, 1))
            cell_states.append(cells.flatten(0, 1))
        return self._projected(outputs), (torch.stack(hidden_states), torch.stack(cell_states))

    def _dropped_weights(self) -> list[Tensor]:
        """Returns the weights in the order of the fused kernel, recurrent matrices dropped."""
        weights: list[Tensor] = []
        for name in self._flat_weights_names:
            weight = getattr(self, name)
            if self.weight_dropout and name.startswith("weight_hh"):
                weight = F.dropout(weight, self.weight_dropout)
            weights.append(weight)
        return weights

    def extra_repr(self) -> str:
        """Adds what ``nn.LSTM`` does not know to its description."""
        return f"{super().extra_repr()}, locked={self.locked}, weight_dropout={self.weight_dropout}"


def _fused(
    inputs: Tensor, state: tuple[Tensor, Tensor], weights: list[Tensor], dropout: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Runs as many layers as there are states through torch's kernel, in training."""
    hidden, cell = (part.contiguous() for part in state)
    with warnings.catch_warnings():
        # Dropped matrices are new ones: cuDNN has to gather the weights at each call.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
        outputs, hidden, cell = _VF.lstm(
            inputs, (hidden, cell), weights, True, len(hidden), dropout, True, False, True
        )
    return outputs, (hidden, cell)


def mean_square(activations: Tensor, real: Tensor) -> Tensor:
    """Returns the mean square of activations: activation regularisation.

    Args:
        activations: outputs of the last layer after dropout, shape (B, S, d).
        real: booleans of shape (B, S); other steps are padding and do not count.
    """
    squares = at_least_float32(activations).square().mean(dim=-1)
    return squares.masked_fill(~real, 0.0).sum() / real.sum().clamp(min=1)


def mean_square_change(activations: Tensor, real: Tensor) -> Tensor:
    """Returns the mean square of changes between steps: temporal activation regularisation.

    Args:
        activations: outputs of the last layer before dropout, shape (B, S, d).
        real: booleans of shape (B, S); a change counts where both of its steps are real.
    """
    return mean_square(activations[:, 1:] - activations[:, :-1], real[:, 1:] & real[:, :-1])
