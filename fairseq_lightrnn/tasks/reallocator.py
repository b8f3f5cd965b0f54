"""Moves the words of a model to better cells: gather statistics, solve, report."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.logging import progress_bar
from fairseq.utils import resolve_max_positions, split_paths
from torch import Tensor, nn

from fairseq_lightrnn.allocation.gathering import (
    gather_statistics,
    measure_loss,
    sample_shares,
    statistics_storage,
)
from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.errors import usage_errors
from fairseq_lightrnn.models.word_head import WordHead
from fairseq_lightrnn.workers import rank, table_of_first_worker, world_size

if TYPE_CHECKING:
    from fairseq_lightrnn.allocation.paper import Reallocation
    from fairseq_lightrnn.allocation.reread import Text
    from fairseq_lightrnn.allocation.statistics import AllocationStatistics

__all__ = ["Reallocator", "log_reallocation"]

logger = logging.getLogger(__name__)


class Reallocator:
    """Moves the words of a model that a task trains, as the task's flags ask for.

    Args:
        task: has the text, and the flags of reallocation.
        as_trained: leave out texts of more than ``--max-tokens``, as fairseq's training does. By
            default that is the size of a batch, and a longer text makes one of its own.
    """

    def __init__(self, task: Any, as_trained: bool = False) -> None:
        self.task = task
        self.args = task.args
        self.as_trained = as_trained

    def move_words(
        self,
        model: nn.Module,
        title: str,
        folder: str,
        export: Callable[[AllocationStatistics], None] | None = None,
    ) -> dict[str, Any] | None:
        """Puts a better table into force.

        Args:
            model: whose words are moved; its parameters stay as they are.
            title: of the log.
            folder: where statistics that do not fit into memory may go.
            export: called with the statistics.

        Returns:
            A report, on the first worker, unless there is nothing to move.
        """
        words: WordHead = model.decoder.words  # type: ignore[assignment,union-attr]
        if words.table.num_components == 1:
            logger.info(f"{title}: every word has vectors of its own, there is nothing to move")
            return None
        shards = len(split_paths(self.args.data))
        if shards > 1:
            logger.warning(
                f"{title}: of the {shards} folders of {self.args.data}, words move by the text of "
                "the next epoch's alone, and those that it lacks stay"
            )
        logger.info(f"{title}: gathering statistics")
        started = time.monotonic()
        text, kept = self._text(model)
        with self.gathered(model, folder, text) as (statistics, memory):
            if export is not None:
                export(statistics)
            begun = time.monotonic()
            if self.args.reallocation_objective == "true-loss":
                logger.info(f"{title}: what cells cost")
                report = self._lower_loss(words, statistics, text, memory - kept)
            else:
                logger.info(f"{title}: solving")
                report = self._move_as_measured(words, statistics, text, memory)
        if report is not None:
            report["seconds"] = {
                "statistics": begun - started,
                **(report.get("seconds") or {"solve": time.monotonic() - begun}),
                "total": time.monotonic() - started,
            }
        return report

    def _move_as_measured(
        self, words: WordHead, statistics: AllocationStatistics, text: Text, memory: int
    ) -> dict[str, Any] | None:
        """Moves words by the costs that were measured before any moved, as the paper does."""
        from fairseq_lightrnn.allocation.reread import scored

        report: dict[str, Any] | None = None
        table = words.table
        scores = scored(words.head, text.outputs())
        losses = measure_loss(scores, table.num_components, text.device).tolist()

        def solve() -> WordTable:
            nonlocal report
            found = self._solve(words, statistics, memory)
            objective = str(self.args.reallocation_objective)
            report = _report(found, int(statistics.counts.sum()), losses, objective)
            return found.table

        device = table.coordinates.device
        table.seat(table_of_first_worker(solve, table.num_words, table.shape, device))
        return report

    @contextmanager
    def gathered(
        self, model: nn.Module, folder: str, text: Text | None = None
    ) -> Iterator[tuple[AllocationStatistics, int]]:
        """Yields the statistics of the training split, and the bytes left to a solver.

        Args:
            model: predicts the text, in evaluation mode meanwhile.
            folder: where statistics that do not fit into memory may go, while they are needed.
            text: the split, as the model reads it.
        """
        text = text or self._text(model)[0]
        words: WordHead = model.decoder.words  # type: ignore[assignment,union-attr]
        size = words.table.num_words, words.table.num_components, words.head.softmax.vectors.dim
        memory = self.args.reallocation_memory
        with usage_errors(), ExitStack() as stack:
            with usage_errors(f"--reallocation-memory {memory}"):
                storage = stack.enter_context(statistics_storage(memory, size, folder))
            training = model.training
            model.eval()
            try:
                yield (
                    gather_statistics(text.outputs(), *size, text.device, storage.arguments),
                    storage.memory,
                )
            finally:
                model.train(training)

    def _text(self, model: nn.Module) -> tuple[Text, int]:
        """Returns the training split, as the model reads it, and the bytes that it may take."""
        from fairseq_lightrnn.allocation.reread import Remembered, Text, scored

        words: WordHead = model.decoder.words  # type: ignore[assignment,union-attr]

        def contexts(check: bool = False) -> Iterator[tuple[int, Tensor, Context]]:
            for number, sample, wanted in self.batches(model, check):
                read = _contexts(model, sample)  # each state may be carried to the next batch
                if wanted:
                    yield number, *read

        def outputs(check: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
            for _, sample, wanted in self.batches(model, check):
                read = _read(model, sample)
                if wanted:
                    yield read

        device = words.table.coordinates.device
        if words.input_table is None or self.args.reallocation_objective != "true-loss":
            check = partial(outputs, check=True)
            return Text(outputs, contexts, lambda: scored(words.head, check()), device), 0
        share = int(self.args.reallocation_memory * (1 << 30)) // 16
        text = Remembered(words.head, contexts, 4 * share)
        sample = Remembered(words.head, partial(contexts, check=True), share)
        return Text(text.outputs, text.read, sample.log_probs, device), 5 * share

    def _lower_loss(
        self, words: WordHead, statistics: AllocationStatistics, text: Text, memory: int
    ) -> dict[str, Any] | None:
        """Takes a step that lowers the loss over the training split, and reports it."""
        from fairseq_lightrnn.allocation.descent import lower_loss

        seconds: dict[str, float] = {}
        done = lower_loss(words.head, statistics, text, memory, int(words.round), seconds)
        if rank() > 0:
            return None
        tables = [words.table, *words.further_tables]
        steps = [
            {
                "moved": step.moved,
                "loss_after": step.loss_after,
                "predicted_gain": step.predicted_gain,
                "gap": step.gap,
                "halvings": step.halvings,
                "table": table.table().digest(),
            }
            for table, step in zip(tables, done, strict=False)  # further tables may stay
        ]
        report: dict[str, Any] = {
            "objective": "true-loss",
            "words": words.table.num_words,
            "tokens": int(statistics.counts.sum()),
            "loss_before": done[0].loss_before,
            **steps[0],
            "seconds": seconds,
        }
        if steps[1:]:
            report |= {
                "loss_after": done[-1].loss_after,
                "predicted_gain": sum(step.predicted_gain for step in done),
                "gap": sum(step.gap for step in done),
                "tables": steps,
            }
        return report

    def _solve(
        self, words: WordHead, statistics: AllocationStatistics, memory: int
    ) -> Reallocation:
        """Finds the words' new cells, as the flags ask for."""
        from fairseq_lightrnn.allocation.assignment import SolverOptions
        from fairseq_lightrnn.allocation.paper import reallocate

        components = range(words.table.num_components)
        vectors, biases = zip(*map(words.head.softmax.component, components), strict=True)
        return reallocate(
            words.table.table(),
            statistics,
            [vector.detach() for vector in vectors],
            [bias.detach() for bias in biases],
            objective=str(self.args.reallocation_objective),
            symbols=self.task.target_dictionary.symbols,
            options=SolverOptions(memory=memory),
        )

    def batches(self, model: Any, check: bool = False) -> Iterator[tuple[int, Any, bool]]:
        """Yields this worker's share of the training split, without fairseq's dummy batches.

        Each comes with a number that is its own among all workers', and with whether it is wanted:
        some are only read on the way.

        Args:
            model: whose longest texts are the longest to be read.
            check: yield those that a new table is measured by.
        """
        args, task, max_tokens = self.args, self.task, self.args.max_tokens
        dataset = task.dataset(args.train_subset)
        limits = [task.max_positions(), model.max_positions()]
        if self.as_trained:
            limits.append(max_tokens)
        elif max_tokens is not None:
            max_tokens = max(max_tokens, int(np.max(dataset.sizes)))
        iterator = task.get_batch_iterator(
            dataset=dataset,
            max_tokens=max_tokens,
            max_sentences=args.batch_size,
            max_positions=resolve_max_positions(*limits),
            ignore_invalid_inputs=True,
            seed=args.seed,
            num_shards=world_size(),
            shard_id=rank(),
            # A cached iterator would be the one that training goes on with.
            disable_iterator_cache=True,
        )
        # Of pairs of texts the last is the one that is predicted.
        lengths = dataset.sizes if np.ndim(dataset.sizes) == 1 else dataset.sizes[:, -1]
        frozen = iterator.frozen_batches
        with usage_errors(f"the split {args.train_subset}"):
            shares = sample_shares(
                args.reallocation_words, int(np.sum(lengths)), len(frozen), task.in_order
            )
        wanted = shares.checked if check else shares.used
        # Batches are dealt to the workers in turn, so that these are the same for any number.
        numbers: Iterable[int] = itertools.count(rank(), world_size())
        if not task.in_order:
            numbers = wanted[rank() :: world_size()]
            iterator = EpochBatchIterator(
                dataset=iterator.dataset,
                collate_fn=iterator.collate_fn,
                batch_sampler=[frozen[number] for number in wanted],
                num_shards=world_size(),
                shard_id=rank(),
            )
        progress = progress_bar.progress_bar(
            iterator.next_epoch_itr(shuffle=False),
            log_format=args.log_format,
            log_interval=args.log_interval,
            prefix="reallocation statistics",
            default_log_format="simple",
        )
        numbered = zip(numbers, progress)  # noqa: B905
        return (
            (number, sample, wanted[0] <= number)
            for number, sample in itertools.takewhile(lambda one: one[0] <= wanted[-1], numbered)
            if sample
        )


def _read(model: nn.Module, sample: Any) -> tuple[Tensor, Tensor]:
    """Returns a batch's target words (N,), and the hidden outputs (N, k, d) that predict them."""
    decoder: Any = model.decoder
    sample = _to_device(sample, decoder.words.table.coordinates.device)
    target = sample["target"]
    features, _ = model(**sample["net_input"])
    real = target.ne(decoder.dictionary.pad())
    return target[real], decoder.words.hidden(features[real])


def _contexts(model: Any, sample: Any) -> tuple[Tensor, Context]:
    """Returns a batch's target words (N,) and what is known before each."""
    decoder: Any = model.decoder
    sample = _to_device(sample, decoder.words.table.coordinates.device)
    target = sample["target"].flatten()
    real = target.ne(decoder.dictionary.pad()).nonzero().squeeze(1)
    with torch.no_grad():
        context = model.contexts(sample["net_input"])
    return target[real], context.select(real)


def _to_device(sample: Any, device: Any) -> Any:
    if isinstance(sample, Tensor):
        return sample.to(device)
    if isinstance(sample, dict):
        return {key: _to_device(value, device) for key, value in sample.items()}
    return sample


def _report(
    found: Reallocation, tokens: int, losses: list[float], objective: str
) -> dict[str, Any]:
    """Describes a reallocation, costs in nats per word.

    The solver's costs lack the log-normalisers, which no table changes. The measured losses of the
    old table's components have them, so that the costs reported are losses: of the first component
    for ``row-first``, of all of them for ``joint``.
    """
    measured = sum(losses) if objective == "joint" else losses[0]

    def cost(solved: float) -> float:
        return measured + (solved - found.cost_before) / tokens

    return {
        "objective": objective,
        "moved": found.moved,
        "words": found.table.num_words,
        "tokens": tokens,
        "cost_before": measured,
        "cost_after": cost(found.cost_after),
        "lower_bound": cost(found.lower_bound),
        "gap": found.gap / tokens,
        "table": found.table.digest(),
    }


def log_reallocation(title: str, report: dict[str, Any], table: WordTable) -> None:
    """Logs a report as one line."""
    seconds = report["seconds"]
    share = report.get("share_of_training")
    parts = [
        f"{title} ({report['objective']}): {report['moved']} of {report['words']} words moved, "
        f"{_effect(report)}",
        ", ".join(f"{part} {spent:.1f} s" for part, spent in seconds.items())
        + ("" if share is None else f", {100 * share:.1f} % of the training time so far"),
        str(table),
    ]
    logger.info("; ".join(parts))


def _effect(report: dict[str, Any]) -> str:
    if "loss_after" not in report:
        return (
            f"cost {report['cost_before']:.5f} -> {report['cost_after']:.5f} nats per word, lower "
            f"bound {report['lower_bound']:.5f}, gap {report['gap']:.2e}"
        )
    effects, before = [], report["loss_before"]
    for number, step in enumerate(report.get("tables", [report])):
        moved = f"further table {number}: {step['moved']} words moved, " if number else ""
        after = step["loss_after"]
        halved = f", moves halved {step['halvings']} times" if step["halvings"] else ""
        effects.append(
            f"{moved}loss {before:.5f} -> {after:.5f} nats per word, gain {before - after:.5f} "
            f"(predicted {step['predicted_gain']:.5f}), gap {step['gap']:.2e}{halved}"
        )
        before = after
    return "; ".join(effects)
