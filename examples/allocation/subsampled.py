"""What a reallocation loses when its statistics are gathered over part of the text.

    python examples/allocation/subsampled.py CHECKPOINT DATA --words 400000 200000 100000 50000

Gathers statistics over all words of the training split and over fewer (``--reallocation-words``),
reallocates from each, and prices every table by the statistics of all words: what share of the gain
that all words bring does it keep?
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmark_allocation import load

from fairseq_lightrnn.allocation.paper import reallocate

OBJECTIVES = ("row-first", "joint")


def export(checkpoint: Path, data: Path, words: int | None, folder: Path) -> float:
    """Writes the statistics to a new folder; returns the seconds that took."""
    some = [] if words is None else ["--words", words]
    command = [
        Path(sys.executable).with_name("lightrnn-reallocate"), checkpoint, data, *some,
        "--objective", "row-first", "--output", folder.with_suffix(".pt"), "--export", folder,
        "--max-tokens", 4096,
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run([str(part) for part in command], check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--words", type=int, nargs="+", default=[400_000, 200_000, 100_000, 50_000])
    args = parser.parse_args()
    print("| words | of the rows' gain (row-first) | of the whole gain (joint) | seconds in all |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        everything = None
        best: dict[str, float] = {}
        for words in (None, *args.words):
            folder = Path(scratch) / f"words-{words}"
            seconds = export(args.checkpoint, args.data, words, folder)
            instance = load(folder)
            everything = everything or instance
            rows_before, columns_before = everything.cost(everything.table.cells)
            shares = []
            for objective in OBJECTIVES:
                found = reallocate(
                    instance.table, instance.statistics, instance.vectors, instance.biases,
                    objective=objective,
                )  # fmt: skip
                rows, columns = everything.cost(found.table.cells)
                gain = rows_before - rows
                if objective == "joint":
                    gain += columns_before - columns
                best.setdefault(objective, gain)
                shares.append(f"{100 * gain / best[objective]:.1f} %")
            used = int(instance.counts.sum())
            print(f"| {used:,} | {shares[0]} | {shares[1]} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
