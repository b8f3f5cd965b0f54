"""Reads what fairseq's commands and the reallocations wrote into their log files."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "TrainingLog",
    "read_generated",
    "read_reallocations",
    "read_test_perplexity",
    "read_training_log",
]

_TEST_PERPLEXITY = re.compile(r"Loss \(base 2\): \S+, Perplexity: ([0-9.]+|inf)")


@dataclass
class TrainingLog:
    """What ``fairseq-train --log-format json`` logged.

    Attributes:
        valid_ppl: validation perplexity after each epoch.
        train_ppl: training perplexity over each epoch, with dropout.
        words_per_second: speeds logged on the way; the last words of an epoch, validation and
            reallocation are not in them.
        epoch_words_per_second: speed over each epoch, everything included.
        train_seconds: time spent in training steps in each epoch, rounded by fairseq.
    """

    valid_ppl: dict[int, float] = field(default_factory=dict)
    train_ppl: dict[int, float] = field(default_factory=dict)
    words_per_second: list[float] = field(default_factory=list)
    epoch_words_per_second: dict[int, float] = field(default_factory=dict)
    train_seconds: dict[int, float] = field(default_factory=dict)

    def speed(self) -> float:
        """Returns the typical training speed in words per second."""
        return statistics.median(self.words_per_second or self.epoch_words_per_second.values())


def json_records(text: str) -> Iterator[dict]:
    """Yields the JSON objects that end a line of a log."""
    for line in text.splitlines():
        start = line.find("{")
        # Every other record of fairseq's is the configuration, a Python dictionary.
        if start >= 0 and line.rstrip().endswith("}"):
            try:
                record = json.loads(line[start:])
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def read_training_log(path: str | Path) -> TrainingLog:
    """Reads the log of a training run; of an epoch logged twice (a resumed run) the last counts.

    Raises:
        ValueError: no epoch was finished and validated.
    """
    log = TrainingLog()
    for record in json_records(Path(path).read_text(encoding="utf-8")):
        epoch = record.get("epoch")
        if not isinstance(epoch, int):
            continue
        if "valid_ppl" in record:
            log.valid_ppl[epoch] = float(record["valid_ppl"])
        elif "train_ppl" in record:
            log.train_ppl[epoch] = float(record["train_ppl"])
            log.epoch_words_per_second[epoch] = float(record.get("train_wps", 0))
            log.train_seconds[epoch] = float(record.get("train_train_wall", 0))
        elif "wps" in record and float(record["wps"]) > 0:
            log.words_per_second.append(float(record["wps"]))
    if not log.valid_ppl or not log.train_ppl:
        raise ValueError(f"{path}: no finished epoch in this log; train again")
    return log


def read_reallocations(path: str | Path) -> list[dict]:
    """Reads ``reallocations.jsonl``; empty if the words never moved.

    Returns:
        For each reallocation in order of the epochs: ``epoch`` after which it was done, ``moved``
        (words), ``loss_before`` and ``loss_after`` (nats per word) and ``seconds`` in all.

    Raises:
        ValueError: a line is not a record of a reallocation.
    """
    path = Path(path)
    if not path.exists():
        return []
    by_epoch = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            seconds = record["seconds"]
            by_epoch[int(record["epoch"])] = {
                "epoch": int(record["epoch"]),
                "moved": int(record["moved"]),
                "loss_before": float(record["loss_before"]),
                "loss_after": float(record["loss_after"]),
                "seconds": float(seconds["total"] if isinstance(seconds, dict) else seconds),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is no reallocation record ({error!r})"
            ) from error
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def read_test_perplexity(path: str | Path) -> float:
    """Reads the perplexity from the output of ``fairseq-eval-lm``.

    Raises:
        ValueError: it is not there.
    """
    found = _TEST_PERPLEXITY.findall(Path(path).read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{path}: no perplexity in this log; evaluate again")
    return float(found[-1])


def read_generated(path: str | Path) -> str:
    """Reads the first sentence that ``fairseq-interactive`` generated, its prompt included.

    Raises:
        ValueError: it is not there.
    """
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("H-0\t"):
            return line.split("\t", 2)[2].strip()
    raise ValueError(f"{path}: no sentence in this log; continue a prompt again")
