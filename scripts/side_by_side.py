"""What benchmarks that train several systems share: fairseq's commands as processes, resumable.

Every run has a folder, ``SYSTEM-SEED``: ``steps.jsonl`` holds the CPU seconds and memory of each
training process, ``epochs.jsonl`` the validation of each epoch, ``test.json`` what a test said.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

from fairseq_lightrnn.files import whole_file

__all__ = [
    "KEEP_MEMORY",
    "PLUGIN",
    "TRAIN_FOR_SECONDS",
    "VOCABULARY",
    "Systems",
    "add_gpu_flag",
    "append_line",
    "call",
    "checksum",
    "collect",
    "commit",
    "count_parameters",
    "device_flags",
    "is_tested",
    "keep_settings",
    "last_epoch",
    "machine",
    "mean_and_spread",
    "measure_each",
    "process_used",
    "read_lines",
    "run_measured",
    "train_for",
    "train_in_steps",
    "write_results",
    "write_test",
    "write_whole",
]

Systems = dict[str, dict[str, dict[str, Any]]]
"""By name and seed, what is known of a run."""

PLUGIN = Path(__file__).resolve().parent.parent / "fairseq_lightrnn"
# Parts of the names of parameters that the vocabulary which is predicted makes.
VOCABULARY = (
    "decoder.embed_tokens", "decoder.fc_out", "decoder.output_projection", "adaptive_softmax",
    "core.reader", "head.softmax", "conditioner.gates",
)  # fmt: skip
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Environment of what is measured: by default glibc hands large blocks of memory back and asks for
them anew at each step, and page faults take a third of the time of a softmax over 10,000 words."""
# Updates.
_LOG_INTERVAL = 100
TRAIN_FOR_SECONDS = Path(__file__).resolve().parent / "train_for_seconds.py"
"""A ``fairseq-train`` whose ``--stop-time-hours`` may be the processor's."""
# What fairseq logs after an epoch's validation.
_EPOCH = r"\{\"epoch\": \d+, \"valid_loss\".*\}"


def add_gpu_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--gpu``."""
    parser.add_argument("--gpu", action="store_true",
        help="train and test on the GPU; seconds are then those of the clock, so that they mean "
        "little while several processes share it")  # fmt: skip


def device_flags(args: argparse.Namespace) -> list[str]:
    """Returns the flags of a fairseq command that choose the device."""
    return [] if args.gpu else ["--cpu"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file of JSON lines; none if there is no such file.

    A line that has no end is of a process that was killed while it wrote, and does not count.
    """
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to a file of JSON lines."""
    write_whole(path, "".join(json.dumps(one) + "\n" for one in [*read_lines(path), record]))


def write_whole(path: Path, text: str) -> None:
    """Writes a file, or leaves the one that there is."""
    with whole_file(path) as file:
        file.write(text)


def keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder, or lets one that has runs be gone on with if they have the same settings.

    Raises:
        SystemExit: if they have others; says which, and what to do.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    given = json.loads(json.dumps(settings, default=str))
    known = json.loads(path.read_text()) if path.exists() else given
    for name in {**known, **given}:
        if known.get(name) != given.get(name):
            raise SystemExit(
                f"{out}: its runs have {name} {known.get(name)}, not {given.get(name)}; give "
                "another folder to write to"
            )
    write_whole(path, json.dumps(given, indent=1) + "\n")


def measure_each(
    out: Path,
    settings: dict[str, Any],
    sizes: Iterable[int],
    systems: Iterable[str],
    measure: Callable[[str, int], dict[str, Any]],
) -> dict[str, Any]:
    """Measures systems with vocabularies of some sizes, those left out that were measured before.

    Args:
        out: a folder, which is made. Each record is kept there in a file of the same settings,
            commit, versions and machine, as soon as it is known.
        settings: that the records have in common.
        sizes: words.
        systems: names.
        measure: returns the record of a system and a size, which names them.

    Returns:
        The report: settings, commit, versions, machine, and all records of them as ``results``.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = {"settings": settings, **machine()}
    name = hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()[:12]
    kept = out / f"measured-{name}.jsonl"
    systems = list(systems)
    # What failed once and was measured after all counts as that.
    records = {(one["words"], one["system"]): one for one in read_lines(kept)}
    for size in sizes:
        for system in systems:
            if _failed(records.get((size, system), {"error": "not measured"})):
                records[size, system] = measure(system, size)
                append_line(kept, records[size, system])
                print(records[size, system], flush=True)
    return {**report, "results": list(records.values())}


def _failed(record: dict[str, Any]) -> bool:
    """Tells whether a measurement, with one worker or with two, ended in an error."""
    return any("error" in part for part in (record, record.get("one", {}), record.get("two", {})))


def call(module: str, *arguments: Any, log: Path | None = None) -> str:
    """Runs one of fairseq's commands with one thread and returns what it printed."""
    return _call(["-m", f"fairseq_cli.{module}"], *arguments, log=log)[0]


def _call(
    program: Sequence[Any], *arguments: Any, log: Path | None = None
) -> tuple[str, resource.struct_rusage]:
    """Returns what one of fairseq's commands printed, and what it used of the machine.

    Args:
        program: what Python runs, such as ``-m`` and a module.
        *arguments: of the command.
        log: file that receives what it printed.
    """
    command = [sys.executable, *map(str, program), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as file:
        status, used = run_measured(command, file, {**KEEP_MEMORY, "OMP_NUM_THREADS": "1"})
        file.seek(0)
        output = file.read()
    if log is not None:
        log.write_text(output)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    return output, used


def run_measured(
    command: Iterable[Any], output: IO[str], environment: dict[str, str]
) -> tuple[int, resource.struct_rusage]:
    """Runs a command and returns its exit status, and what it used of the machine.

    Args:
        command: a program and its arguments.
        output: an open file, for what it prints.
        environment: what is set besides this process's own.
    """
    process = subprocess.Popen(
        [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )  # fmt: skip
    return process_used(process)


def process_used(process: subprocess.Popen[Any]) -> tuple[int, resource.struct_rusage]:
    """Waits for a process and returns its exit status, and what it used of the machine."""
    # Not RUSAGE_CHILDREN, whose peak is that of the largest process so far.
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used


def train_in_steps(
    folder: Path, flags: Iterable[Any], epochs: int, step: int, seconds: float | None = None
) -> None:
    """Runs ``fairseq-train``, a few epochs a process, until the epochs or the seconds are spent.

    Args:
        folder: of the run, where checkpoints lie too; what is there is gone on with.
        flags: of the training, but those of the folder, the epochs and the log.
        epochs: of the whole training.
        step: epochs of a process.
        seconds: of the CPU, after which no further process starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        steps = read_lines(folder / "steps.jsonl")
        done = steps[-1]["epoch"] if steps else 0
        if done >= epochs or (seconds is not None and done * _seconds_per_epoch(steps) >= seconds):
            return
        goal = min(done + step, epochs)
        output = _train(folder, [*flags, "--max-epoch", goal])
        _keep_epochs((folder / "train.log").read_text(), folder / "epochs.jsonl")
        # Fewer than the step has, if an interrupted process left some behind.
        trained = len(set(re.findall(_EPOCH, output.text)))
        append_line(folder / "steps.jsonl", {"epoch": goal, "trained": trained, **output.used})


def train_for(
    folder: Path, flags: Iterable[Any], seconds: float, interval: int, clock: bool = False
) -> None:
    """Runs ``fairseq-train`` in one process for so long; epochs need not end.

    Args:
        folder: of the run; an interrupted one is gone on with.
        flags: of the training, as for :func:`train_in_steps`.
        seconds: of the processor, the start of the process and validations included.
        interval: updates between two validations; one more follows when the seconds are over.
        clock: go by the clock instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "steps.jsonl").exists():
        return
    limits = ["--stop-time-hours", seconds / 3600, "--keep-interval-updates", 1]
    every = ["--validate-interval-updates", interval, "--save-interval-updates", interval]
    program = [TRAIN_FOR_SECONDS, "clock" if clock else "cpu"]
    output = _train(folder, [*flags, *limits, *every], program)
    log = re.findall(r"\{\"epoch\": .*\}", (folder / "train.log").read_text())
    records = [json.loads(line) for line in log]
    last = [record for record in records if "update" in record][-1:]
    if not last:
        raise SystemExit(f"{folder}: not {_LOG_INTERVAL} updates in {seconds} seconds; give more")
    length = float(last[0]["num_updates"]) / float(last[0]["update"])  # updates of an epoch
    validations = {
        int(record["valid_num_updates"]): record for record in records if "valid_loss" in record
    }
    for updates, record in validations.items():
        append_line(folder / "epochs.jsonl", _validation(round(updates / length, 4), record))
    passed = round(max(validations) / length, 4)
    # fairseq counts the time of earlier processes too.
    used = {**output.used, "seconds" if clock else "cpu_seconds": seconds}
    append_line(folder / "steps.jsonl", {"epoch": passed, "trained": passed, **used})


class _Training(NamedTuple):
    """What a training process printed, the seconds and memory that it used, and its commit."""

    text: str
    used: dict[str, Any]


def _train(
    folder: Path, flags: list[Any], program: Sequence[Any] = ("-m", "fairseq_cli.train")
) -> _Training:
    """Runs one process of ``fairseq-train``; see :func:`_call`."""
    start = time.monotonic()
    output, used = _call(
        program, *flags, "--save-dir", folder, "--num-workers", 0, "--no-epoch-checkpoints",
        "--log-format", "json", "--log-interval", _LOG_INTERVAL,
        "--log-file", folder / "train.log",
    )  # fmt: skip
    seconds = {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.monotonic() - start, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
        "commit": commit(),
    }
    return _Training(output, seconds)


def _keep_epochs(log: str, path: Path) -> None:
    """Appends the validation of each epoch in a log to a file, unless it is there."""
    known = {record["epoch"] for record in read_lines(path)}
    found = {record["epoch"]: record for record in map(json.loads, re.findall(_EPOCH, log))}
    for epoch, record in found.items():
        if epoch not in known:
            append_line(path, _validation(epoch, record))


def _validation(epoch: float, record: dict[str, Any]) -> dict[str, Any]:
    """Returns what is kept of a validation that fairseq logged."""
    loss = float(record.get("valid_nll_loss", record["valid_loss"]))
    return {"epoch": epoch, "valid_ppl": round(2**loss, 3)}


def _seconds_per_epoch(steps: list[dict[str, Any]], kind: str = "cpu_seconds") -> float:
    """Returns the seconds of an epoch, those of interrupted processes left out."""
    trained = sum(step["trained"] for step in steps)
    return sum(step[kind] for step in steps if step["trained"]) / (trained or 1)


def last_epoch(folder: Path) -> float:
    """Returns the last epoch that a run was trained for."""
    epoch: float = read_lines(folder / "steps.jsonl")[-1]["epoch"]
    return epoch


def is_tested(folder: Path) -> bool:
    """Tells whether a run was tested after its last epoch."""
    path = folder / "test.json"
    return path.exists() and json.loads(path.read_text())["epoch"] == last_epoch(folder)


def write_test(folder: Path, **found: Any) -> None:
    """Keeps what a test of the best checkpoint found, and the numbers of its parameters."""
    result = {"epoch": last_epoch(folder), **found, **count_parameters(folder, VOCABULARY)}
    write_whole(folder / "test.json", json.dumps(result) + "\n")


def read_run(folder: Path) -> dict[str, Any] | None:
    """Returns what is known of one run, or None before its first test."""
    if not (folder / "test.json").exists():
        return None
    test = json.loads((folder / "test.json").read_text())
    epochs = read_lines(folder / "epochs.jsonl")
    steps = read_lines(folder / "steps.jsonl")
    # Of pieces of words, fairseq logs the perplexity a piece.
    pieces = test.get("pieces_per_word", {"valid": 1.0})["valid"]
    for record in epochs:
        record["valid_ppl"] = round(record["valid_ppl"] ** pieces, 3)
    best = min(epochs, key=lambda record: record["valid_ppl"])
    return {
        **test,
        "valid_ppl": best["valid_ppl"],
        "best_epoch": best["epoch"],
        "epochs": last_epoch(folder),
        "valid_ppls": {record["epoch"]: record["valid_ppl"] for record in epochs},
        "reallocated_after": [
            record["epoch"] for record in read_lines(folder / "reallocations.jsonl")
        ],
        # Starts of the processes and validations are part of it.
        "cpu_seconds_per_epoch": round(_seconds_per_epoch(steps), 1),
        "seconds_per_epoch": round(_seconds_per_epoch(steps, "seconds"), 1),
        "peak_mib": round(max(step["peak_mib"] for step in steps)),
        "commit": " ".join(dict.fromkeys(step["commit"] for step in steps if step.get("commit"))),
    }


def collect(out: Path) -> Systems:
    """Returns all runs that were tested."""
    systems: Systems = {}
    for folder in sorted(out.iterdir()):
        system, _, seed = folder.name.rpartition("-")
        run = read_run(folder) if seed.isdigit() else None
        if run is not None:
            systems.setdefault(system, {})[seed] = run
    return systems


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    """Returns a mean, with half the range where there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def count_parameters(folder: Path, vocabulary: Iterable[str]) -> dict[str, int]:
    """Counts the parameters of the best checkpoint.

    Args:
        folder: of the run.
        vocabulary: parts of the names of those that the (target) vocabulary makes.
    """
    import torch

    state = torch.load(folder / "checkpoint_best.pt", map_location="cpu", weights_only=False)
    buffers = ("carried_state.", "version", "_float_tensor")
    # fairseq's transformer encoder keeps copies of its weights that nothing uses.
    copies = tuple(f"{part}_{kind}" for part in ("fc1", "fc2", "in_proj", "out_proj")
                   for kind in ("weight", "bias"))  # fmt: skip
    sizes, seen = {}, set()
    for name, tensor in state["model"].items():
        # Words' places in tables, and what counts reallocations, are integers.
        kept = tensor.is_floating_point() and not name.endswith(copies)
        if not kept or any(part in name for part in buffers):
            continue
        # What input and output share counts once; a checkpoint from a GPU holds it twice.
        varied = bool((tensor != tensor.flatten()[:1]).any())
        content = hashlib.sha256(tensor.numpy()).digest() if varied else tensor.data_ptr()
        sizes[name] = 0 if content in seen else math.prod(tensor.shape)
        seen.add(content)
    own = sum(size for name, size in sizes.items() if any(part in name for part in vocabulary))
    return {"parameters": sum(sizes.values()), "vocabulary_parameters": own}


def checksum(path: Path) -> str:
    """Returns what tells a text: the beginning of its SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def commit() -> str | None:
    """Returns the commit that runs, and whether it was changed; None outside of git."""
    git = ["git", "-C", str(PLUGIN), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None


def machine() -> dict[str, Any]:
    """Returns commit, versions and hardware."""
    import torch

    packages = ("fairseq", "torch", "numpy", "scipy", "sacrebleu")
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), **gpu},
    }


def write_results(out: Path, report: dict[str, Any], table: str) -> None:
    """Writes ``results.json`` and ``results.md``, and prints the latter."""
    write_whole(out / "results.json", json.dumps(report, indent=1) + "\n")
    write_whole(out / "results.md", table + "\n")
    print(table, flush=True)
