"""The parts of a reallocation around statistics and solver: the table on all workers, reports."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.distributed

from fairseq_lightrnn.allocation.reallocation import Reallocation
from fairseq_lightrnn.tasks._statistics import Gathered, world_size
from fairseq_lightrnn.word_table import WordTable

__all__ = ["broadcast_table", "log_reallocation", "reallocation_report"]

logger = logging.getLogger(__name__)


def broadcast_table(table: WordTable | None, lookup: Any) -> WordTable:
    """Returns the first worker's table on every worker."""
    if world_size() == 1:
        if table is None:
            raise ValueError("the only worker made no table")
        return table
    cells = torch.empty_like(lookup.cells)
    if table is not None:
        cells.copy_(torch.from_numpy(np.array(table.cells)))
    torch.distributed.broadcast(cells, 0)
    return WordTable.from_cells(cells.cpu().numpy(), lookup.shape)


def reallocation_report(
    result: Reallocation, gathered: Gathered, objective: str, row_weight: float
) -> dict[str, Any]:
    """Describes a reallocation, costs in nats per word.

    The solver's costs lack the log-normalisers, which no table changes. The measured losses of the
    old table have them, so that the costs reported are losses: of the first component for
    ``row-first``, of all of them (the first weighted) for ``joint``.
    """
    tokens = gathered.tokens
    losses = gathered.losses.tolist()
    if objective == "joint":
        measured = sum(losses) + (row_weight - 1) * losses[0] * (len(losses) > 1)
    else:
        measured = losses[0]
    return {
        "objective": str(objective),
        "moved": result.moved,
        "words": result.table.num_words,
        "tokens": tokens,
        "cost_before": measured / tokens,
        "cost_after": (measured + result.cost_after - result.cost_before) / tokens,
        "lower_bound": (measured + result.lower_bound - result.cost_before) / tokens,
        "gap": result.gap / tokens,
        "table": result.table.digest(),
    }


def log_reallocation(title: str, report: dict[str, Any], table: WordTable) -> None:
    """Logs a report as one line."""
    seconds = report["seconds"]
    share = report.get("share_of_training")
    parts = [
        f"{title} ({report['objective']}): {report['moved']} of {report['words']} words moved, "
        f"cost {report['cost_before']:.5f} -> {report['cost_after']:.5f} nats per word, lower "
        f"bound {report['lower_bound']:.5f}, gap {report['gap']:.2e}",
        f"statistics {seconds['statistics']:.1f} s, solve {seconds['solve']:.1f} s"
        + ("" if share is None else f", {100 * share:.1f} % of the training time so far"),
        str(table),
    ]
    logger.info("; ".join(parts))
