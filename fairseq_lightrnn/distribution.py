"""The exact distribution of the next word over the whole vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq_lightrnn.components import ComponentSoftmax, at_least_float32
from fairseq_lightrnn.recurrent import Context, RecurrentComposition

__all__ = ["next_word_log_probs"]

# Contexts times groups conditioned at once; bounds the memory of the expanded contexts.
_EXPANSIONS = 4096
_IMPOSSIBLE = float("-inf")


def next_word_log_probs(
    composition: RecurrentComposition, softmax: ComponentSoftmax, context: Context
) -> Tensor:
    """Computes log P(word | context) for all V words.

    Args:
        composition: reads words; conditions a context on components of the next.
        softmax: predicts components.
        context: of B texts, as ``composition.read`` returned it.

    Returns:
        Log-probabilities in nats, shape (B, V).
    """
    groups = math.prod(softmax.table.shape[:-1])
    parts = []
    for index in torch.arange(len(context.output)).split(max(1, _EXPANSIONS // groups)):
        part = context.select(index.to(context.output.device))
        parts.append(_cell_log_probs(composition, softmax, part))
    return torch.cat(parts).index_select(1, softmax.table.cells)


def _cell_log_probs(
    composition: RecurrentComposition, softmax: ComponentSoftmax, context: Context
) -> Tensor:
    """Returns log-probabilities of shape (B, cells), -inf in empty cells."""
    table = softmax.table
    batch = len(context.output)
    device = context.output.device
    log_probs = torch.zeros(batch, device=device)
    prefix = torch.empty(batch, 0, dtype=torch.long, device=device)
    for component, size in enumerate(table.shape):
        logits = at_least_float32(softmax.logits(component, context.output, prefix))
        # (B · groups, R_i). Prefixes that lead to no word have nothing to normalise.
        scores = torch.log_softmax(logits, dim=1).nan_to_num(nan=_IMPOSSIBLE, neginf=_IMPOSSIBLE)
        log_probs = (log_probs[:, None] + scores).reshape(-1)
        if component + 1 < table.num_components:
            values = torch.arange(size, device=device).repeat(len(prefix))
            index = torch.arange(len(prefix), device=device).repeat_interleave(size)
            prefix = torch.cat([prefix[index], values[:, None]], dim=1)
            context = composition.extend(context.select(index), component, values)
    return log_probs.reshape(batch, -1)
