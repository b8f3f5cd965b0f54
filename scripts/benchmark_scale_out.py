"""Measures what data parallelism costs: bytes that workers all-reduce an update, and its time.

    python scripts/benchmark_scale_out.py OUTPUT --sizes 10000 33280 415464

The systems of ``benchmark_training.py``, trained as there on a Zipf text, by one worker and by two:
processes of one thread each that average their gradients over gloo with torch's
DistributedDataParallel, as ``fairseq-train --ddp-backend pytorch_ddp`` wraps a model. A
communication hook averages the gradients, as DistributedDataParallel does of itself, and counts the
bytes that it is given. Every other update of two workers leaves the averaging out: what that saves
is the all-reduce's share of the time, the wait for the slower worker included.

A measurement that needs more memory than is free is not made, and the table says so; a smaller
``--batch-size`` needs less, and leaves the bytes as they are; an adaptive softmax needs batches
that have words of all its clusters, or workers wait for each other. Finished measurements are kept
in OUTPUT, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmark_inference import memory
from benchmark_training import SYSTEMS, batches, build, steps_of
from side_by_side import measure_each, write_results

WORKERS = 2
_ORDINARY = "lstm_lm"
_WARM_UP = 3  # updates; buckets of gradients are made anew after the first
_FEWEST = 5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUTPUT", help="folder to write to")
    add("--sizes", type=int, nargs="+", default=[10_000, 33_280, 415_464, 1_000_000],
        metavar="V", help="vocabulary sizes (default: %(default)s)")  # fmt: skip
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="(default: all)")
    add("--width", type=int, default=200, help="of vectors and networks (default: %(default)s)")
    add("--batch-size", type=int, default=20, help="texts of a worker (default: %(default)s)")
    add("--block", type=int, default=35, help="words of each (default: %(default)s)")
    add("--seconds", type=float, default=5.0, help="to measure each for (default: %(default)s)")
    add("--worker", nargs=5, metavar=("SYSTEM", "V", "RANK", "WORKERS", "STORE"),
        help=argparse.SUPPRESS)  # fmt: skip
    parser.set_defaults(layers=1, gpu=False, bf16=False)
    return parser.parse_args()


class Exchange:
    """Averages the gradients of all workers, and counts the bytes.

    Attributes:
        on: whether gradients are averaged at all.
        sent: the bytes that were.
    """

    def __init__(self) -> None:
        self.on = True
        self.sent = 0

    # torch reads annotations of a hook, and knows none that are strings.
    def average(self, _, bucket):  # type: ignore[no-untyped-def]
        """Is called by DistributedDataParallel with each bucket of gradients."""
        import torch

        gradients = bucket.buffer()
        if not self.on:
            done = torch.futures.Future()
            done.set_result(gradients)
            return done
        self.sent += gradients.nbytes
        gradients.div_(torch.distributed.get_world_size())
        future = torch.distributed.all_reduce(gradients, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])


def parallel(model: Any, exchange: Exchange) -> Any:
    """Wraps a model as ``--ddp-backend pytorch_ddp`` does, with fairseq's defaults."""
    from fairseq.models.distributed_fairseq_model import DistributedFairseqModel

    flags = Namespace(
        tpu=False, ddp_backend="pytorch_ddp", device_id=0, broadcast_buffers=False,
        bucket_cap_mb=25, find_unused_parameters=False, gradient_as_bucket_view=False,
        ddp_comm_hook="none",
    )  # fmt: skip
    wrapped = DistributedFairseqModel(flags, model, process_group=None, device="cpu")
    wrapped.module.register_comm_hook(None, exchange.average)
    return wrapped


def worker(args: argparse.Namespace) -> None:
    """Does updates as one of some workers; the first prints the figures as JSON."""
    import fairseq_compat

    fairseq_compat.install()
    import torch.distributed.nn.functional  # imported later, it would keep the group for good

    torch.set_num_threads(1)
    system, size, rank, workers, store = args.worker
    free = _free_memory() // int(workers)
    resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    if int(workers) > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(workers)
        )
    found = updates_of(system, int(size), int(rank), int(workers), args)
    if int(workers) > 1:
        gc.collect()  # the model; threads that outlive Python may abort the process
        torch.distributed.destroy_process_group()
    if rank == "0":
        print(json.dumps(found))


def updates_of(
    system: str, num_words: int, rank: int, workers: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Does updates as one of some workers, and returns the figures."""
    import torch

    model, criterion = build(system, num_words, args)
    model.train()
    exchange = Exchange()
    if workers > 1:
        model = parallel(model, exchange)
    draw = batches(num_words, args, "cpu", seed=1 + rank)
    _, update = steps_of(system, model, criterion, draw, args)
    times: dict[bool, list[float]] = {True: [], False: []}

    def step(on: bool) -> None:
        exchange.on, exchange.sent = on, 0
        if workers > 1:
            torch.distributed.barrier()
        times[on].append(update())

    for _ in range(_WARM_UP):
        step(True)
    times[True].clear()
    more = True
    while more:
        if workers > 1:
            step(False)
        step(True)
        spent = torch.tensor([sum(times[True])])
        if workers > 1:
            torch.distributed.broadcast(spent, 0)  # all stop after the same update
        more = len(times[True]) < _FEWEST or float(spent) < args.seconds
    seconds = statistics.median(times[True])
    found: dict[str, Any] = {
        "words_per_second": round(workers * args.batch_size * args.block / seconds),
        "seconds_per_update": round(seconds, 4),
        "updates": len(times[True]),
        "peak_mib": round(memory("VmHWM")),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if workers > 1:
        found["bytes_per_update"] = exchange.sent
        found["all_reduce_share"] = round(1 - statistics.median(times[False]) / seconds, 4)
    return found


def _free_memory() -> int:
    """Returns the bytes that programs may still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/meminfo does not tell the free memory")


def run(system: str, size: int, workers: int) -> dict[str, Any]:
    """Lets some workers do updates, and returns the figures or an error."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--worker", system, str(size), str(rank),
                 str(workers), f"{folder}/store"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(workers)
        ]  # fmt: skip
        told = [process.communicate() for process in started]
    errors = [errors for process, (_, errors) in zip(started, told, strict=True)
              if process.returncode]  # fmt: skip
    if any(re.search("allocate memory|MemoryError|bad_alloc", text) for text in errors):
        return {"error": "not enough memory"}
    if errors:
        return {"error": (errors[0].strip().splitlines() or ["killed"])[-1]}
    found: dict[str, Any] = json.loads(told[0][0].splitlines()[-1])
    return found


def measure(system: str, size: int, batch_size: int) -> dict[str, Any]:
    """Measures one system with one worker and with two."""
    found = {"words": size, "system": system, "batch_size": batch_size}
    return {**found, "one": run(system, size, 1), "two": run(system, size, WORKERS)}


def summarise(results: list[dict[str, Any]]) -> str:
    """Returns the figures as a table."""
    lines = [
        "| words | system | parameters | MB all-reduced an update | ordinary softmax ÷ this | "
        "words a second, 1 worker | 2 workers | gain | all-reduce's share |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    sent = {(record["words"], record["system"]): record["two"].get("bytes_per_update")
            for record in results}  # fmt: skip
    for record in results:
        one, two = record["one"], record["two"]
        cells = [f"{record['words']:,}", record["system"]]
        if "error" in two:
            error = two["error"] if "error" not in one else one["error"]
            lines.append(f"| {' | '.join([*cells, error])} | | | | | | |")
            continue
        ordinary = sent.get((record["words"], _ORDINARY))
        cells += [
            f"{two['parameters']:,}",
            f"{two['bytes_per_update'] / 1e6:,.1f}",
            f"{ordinary / two['bytes_per_update']:.1f}" if ordinary else "",
            f"{one['words_per_second']:,}",
            f"{two['words_per_second']:,}",
            f"{two['words_per_second'] / one['words_per_second']:.2f} ×",
            f"{two['all_reduce_share']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    if args.worker:
        worker(args)
        return
    settings = {name: getattr(args, name) for name in
                ("width", "layers", "block", "seconds", "bf16")}  # fmt: skip
    report = measure_each(
        args.out, settings, args.sizes, args.systems,
        lambda system, size: measure(system, size, args.batch_size),
    )  # fmt: skip
    write_results(args.out, report, summarise(report["results"]))


if __name__ == "__main__":
    main()
