"""Compares ways of allocating words to the cells of a word table: cost, certified gap, time and
memory.

    python scripts/benchmark_allocation.py --sizes 10000 100000 --json
    OUTPUT/results.json

Instances are folders made by ``lightrnn-reallocate --export`` (``--instances``) or synthetic:
word w occurs ``n_w ~ 1 / w`` times (Zipf, at least once, on average 100 times); its summed state
is ``n_w mu_w + sqrt(n_w) xi_w`` with ``mu_w`` and ``xi_w`` Gaussian of standard deviation 0.3 and
0.5 in direction 1, falling with the root of the direction; the output vectors are standard
Gaussian. So costs are of low rank and very unequal, and the noise of rare words is as large as
what is to be learnt, like in statistics of trained models. The table before is random.

Every solver runs in a process of its own, after it has solved a small instance so that nothing is
compiled on the clock. Statistics of more than 4 GiB stay in a memory-mapped file, in ``--scratch``,
as those of a training with ``--reallocation-memory`` do; the memory reported is what a process
holds besides such files.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from allocation_peers import PEERS, Instance
from side_by_side import commit, write_whole

from fairseq_lightrnn.allocation import assignment, joint
from fairseq_lightrnn.allocation.assignment import SolverOptions
from fairseq_lightrnn.allocation.paper import reallocate
from fairseq_lightrnn.core.table import WordTable, balanced_cells, default_shape

_MAPPED_BYTES = 4 << 30  # statistics larger than this are not read into memory

# name: (objective, gap asked, largest V)
OURS = {
    "ours, row-first": ("row-first", None, 10**9),
    "ours, joint": ("joint", 1e-4, 2_000_000),
    "ours, joint, gap 0": ("joint", 0.0, 12_000),
}


def synthetic(num_words: int, dim: int, seed: int, directory: Path | None = None) -> Instance:
    """Draws the synthetic instance that the head of this file describes.

    With a directory, it is written there too, and its sums are never held in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = default_shape(num_words)
    zipf = 1.0 / torch.arange(1, num_words + 1, dtype=torch.float64)
    counts = (100.0 * num_words * zipf / zipf.sum()).round().clamp(min=1.0)
    spectrum = torch.arange(1, dim + 1).float().rsqrt()
    if directory is None:
        sums = torch.empty(2, num_words, dim)
    else:
        directory.mkdir(parents=True)
        sums = torch.from_numpy(
            np.lib.format.open_memmap(
                directory / "sums.npy", mode="w+", dtype="float32", shape=(2, num_words, dim)
            )
        )
    for component in range(2):
        for start in range(0, num_words, 1 << 15):
            n = counts[start : start + (1 << 15), None].float()
            mean = 0.3 * spectrum * torch.randn(len(n), dim, generator=generator)
            noise = 0.5 * spectrum * torch.randn(len(n), dim, generator=generator)
            sums[component, start : start + len(n)] = n * mean + n.sqrt() * noise
    vectors = [torch.randn(size, dim, generator=generator) for size in shape]
    biases = [0.1 * torch.randn(size, generator=generator) for size in shape]
    cells = np.random.default_rng(seed).permutation(balanced_cells(num_words, shape))
    instance = Instance(WordTable.from_cells(cells, shape), sums, counts, vectors, biases)
    if directory is not None:
        np.savez(
            directory / "rest.npz",
            cells=instance.table.cells,
            shape=instance.table.shape,
            counts=instance.counts.numpy(),
            **{f"vectors{i}": instance.vectors[i].numpy() for i in (0, 1)},
            **{f"biases{i}": instance.biases[i].numpy() for i in (0, 1)},
        )
    return instance


def load(directory: Path) -> Instance:
    sums = directory / "sums.npy"
    mapped = sums.stat().st_size > _MAPPED_BYTES
    with np.load(directory / "rest.npz") as rest:
        return Instance(
            WordTable.from_cells(rest["cells"], rest["shape"]),
            torch.from_numpy(np.load(sums, mmap_mode="r+" if mapped else None)),
            torch.from_numpy(rest["counts"]),
            [torch.from_numpy(rest[f"vectors{i}"]) for i in (0, 1)],
            [torch.from_numpy(rest[f"biases{i}"]) for i in (0, 1)],
        )


def solve(name: str, instance: Instance) -> dict[str, float]:
    """Runs one solver and returns what it found, its time and the memory of this process."""
    started, used = time.perf_counter(), time.process_time()
    result: dict[str, float] = {}
    if name in OURS:
        objective, gap, _ = OURS[name]
        found = reallocate(
            instance.table,
            instance.statistics,
            instance.vectors,
            instance.biases,
            objective=objective,
            options=SolverOptions(gap),
        )
        cells = found.table.cells
        result["lower_bound"] = found.lower_bound
    else:
        cells = PEERS[name][0](instance)
    result["seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = time.process_time() - used
    assert np.array_equal(np.sort(cells), np.sort(instance.table.cells)), f"{name}: no valid table"
    result["row_cost"], result["column_cost"] = instance.cost(cells)
    return result


def run_alone(name: str, directory: Path, time_limit: float) -> dict[str, float | str]:
    """Runs a solver in a process of its own; its log goes to this one's error stream."""
    command = [sys.executable, __file__, "--solve", name, "--instance", str(directory)]
    load_before = os.getloadavg()[0]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=time_limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {time_limit:.0f} s"}
    if done.returncode:
        return {"error": f"failed with status {done.returncode}"}
    return {**json.loads(done.stdout.splitlines()[-1]), "load_before": round(load_before, 2)}


def child(name: str, directory: Path) -> None:
    """Solves a small instance, then the one asked for, and prints the result."""
    solve(name, synthetic(2500, 8, 0))
    compile_for_float32(name)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("fairseq_lightrnn").setLevel(logging.DEBUG)
    instance = load(directory)
    memory = Memory()
    result = solve(name, instance)
    print(json.dumps({**result, "peak_mib": memory.stop() / 1024}))


class Memory(threading.Thread):
    """Watches how much memory this process holds, mapped files not counted."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            self.look()

    def look(self) -> None:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        self.peak = max(self.peak, int(status.split("RssAnon:")[1].split()[0]))

    def stop(self) -> int:
        """Returns the largest amount seen, in KiB."""
        self.ended.set()
        self.join()
        self.look()
        return self.peak


def compile_for_float32(name: str) -> None:
    """Compiles what only large instances use, so that compilation is not on the clock."""
    if name not in OURS:
        return
    modules = (assignment, joint)
    kept = [module._FLOAT64_LIMIT for module in modules]
    for module in modules:
        module._FLOAT64_LIMIT = 0
    solve(name, synthetic(2500, 8, 0))
    for module, limit in zip(modules, kept, strict=True):
        module._FLOAT64_LIMIT = limit


def compare(
    instance: Instance,
    directory: Path,
    time_limit: float,
    solvers: list[str],
    known: dict[str, dict],
) -> dict[str, object]:
    """Runs the solvers that are meant for this size and works out the gaps.

    Args:
        instance: to be solved.
        directory: where it lies.
        time_limit: seconds for one solver.
        solvers: names.
        known: results that need not be found again.
    """
    num_words = instance.table.num_words
    rows_before, columns_before = instance.cost(instance.table.cells)
    limits = {name: limit for name, (_, limit) in PEERS.items()}
    limits.update({name: limit for name, (_, _, limit) in OURS.items()})
    results = dict(known)
    for name in solvers:
        if num_words <= limits[name] and name not in known:
            results[name] = run_alone(name, directory, time_limit)
            print(f"V = {num_words}: {name}: {results[name]}", flush=True)
    row_bound = results.get("ours, row-first", {}).get("lower_bound")
    joint_bounds = [
        result["lower_bound"]
        for name, result in results.items()
        if "joint" in name and "lower_bound" in result
    ]
    for result in results.values():
        if "error" in result:
            continue
        if row_bound is not None:
            result["row_gap"] = (result["row_cost"] - row_bound) / (rows_before - row_bound)
        if joint_bounds:
            bound = max(joint_bounds)
            cost = result["row_cost"] + result["column_cost"]
            result["joint_gap"] = (cost - bound) / (rows_before + columns_before - bound)
    return {
        "words": num_words,
        "shape": list(instance.table.shape),
        "dim": instance.sums.shape[2],
        "row_cost_before": rows_before,
        "column_cost_before": columns_before,
        "solvers": results,
    }


def markdown(report: dict) -> str:
    """Returns the results as a table; gaps are shares of what can be gained over the table
    before.
    """
    lines = [
        "| instance | solver | gap, rows + columns, % | gap, rows, % | seconds | CPU s | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, instance in report["instances"].items():
        for solver, result in instance["solvers"].items():
            if "error" in result:
                lines.append(f"| {name} | {solver} | | | {result['error']} | | |")
                continue
            lines.append(
                f"| {name} | {solver} | {percent(result.get('joint_gap'))} "
                f"| {percent(result.get('row_gap'))} | {result['seconds']:.2f} "
                f"| {result['cpu_seconds']:.2f} | {result['peak_mib'] / 1024:.2f} |"
            )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.4g}"


def plot(report: dict, path: Path) -> dict[str, float]:
    """Draws seconds against V for the synthetic instances and returns the exponents of growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[tuple[int, float]]] = {}
    for name, instance in report["instances"].items():
        if name.startswith("synthetic"):
            for solver, result in instance["solvers"].items():
                if "error" not in result:
                    series.setdefault(solver, []).append((instance["words"], result["seconds"]))
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    exponents = {}
    for solver, points in series.items():
        sizes, seconds = np.array(sorted(points)).T
        label = solver
        if len(sizes) > 1:
            exponents[solver] = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
            label = f"{solver}: V^{exponents[solver]:.2f}"
        style = "-o" if solver in OURS else "--s"
        axes.loglog(sizes, seconds, style, label=label, linewidth=2 if solver in OURS else 1)
    axes.set_xlabel("words V")
    axes.set_ylabel("seconds")
    axes.grid(True, which="both", alpha=0.3)
    if series:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return exponents


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument(
        "--instances", type=Path, nargs="*", default=[], help="directories of real instances"
    )
    parser.add_argument(
        "--dim", type=int, default=512, help="width of synthetic states (default: 512)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--solvers", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS], metavar="NAME"
    )
    parser.add_argument("--time-limit", type=float, default=1800.0, help="seconds for one solver")
    parser.add_argument(
        "--json", type=Path, help="results; a .png and .md file beside it show them"
    )
    parser.add_argument(
        "--keep", action="store_true", help="add to the results that FILE has already"
    )
    parser.add_argument("--scratch", type=Path, help="folder for synthetic instances")
    parser.add_argument("--solve", help=argparse.SUPPRESS)
    parser.add_argument("--instance", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.keep and not args.json:
        parser.error("--keep: adds to the results of a file; name it with --json")
    if args.solve:
        child(args.solve, args.instance)
        return
    given = [Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:]]
    command = shlex.join(["python", "scripts/benchmark_allocation.py", *given])
    report: dict = {
        "commands": [command],
        "commit": commit(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "instances": {},
    }
    if args.keep and args.json and args.json.exists():
        before = json.loads(args.json.read_text(encoding="utf-8"))
        others = {one["dim"] for name, one in before["instances"].items()
                  if name in {f"synthetic-{size}" for size in args.sizes}} - {args.dim}  # fmt: skip
        if others:
            parser.error(f"--keep: {args.json} has these sizes with --dim {others.pop()}")
        report["commands"] = [*before["commands"], command]
        report["instances"] = before["instances"]

    def work(instance: Instance, name: str, directory: Path) -> None:
        solvers = report["instances"].get(name, {}).get("solvers", {})
        # A solver that failed, or had too little time, may do better now.
        known = {
            solver: result
            for solver, result in solvers.items()
            if "error" not in result or solver not in args.solvers
        }
        report["instances"][name] = compare(
            instance, directory, args.time_limit, args.solvers, known
        )
        if args.json:
            write(report, args.json)

    for path in args.instances:
        work(load(path), path.name, path)
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            directory = Path(scratch) / str(size)
            instance = synthetic(size, args.dim, args.seed, directory)
            work(instance, f"synthetic-{size}", directory)
    print(markdown(report))


def write(report: dict, path: Path) -> None:
    """Writes the results so far, and a table and a picture of them beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report["exponents"] = plot(report, path.with_suffix(".png"))
    write_whole(path.with_suffix(".md"), markdown(report) + "\n")
    write_whole(path, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
