"""Compares exported language models on one core: bytes, memory, speed and perplexity.

    python scripts/benchmark_export.py FOLDER OUTPUT --seconds 200

FOLDER holds text as for ``benchmark_language_model.py``. OUTPUT receives the tables, the trained
models, their exports and what was measured, all of which a second run keeps, ``results.json`` and
``results.md``.

Word tables are made once, before. Every system is trained for so many seconds of the processor,
the start of its process and its checkpoint among them. Then it is exported, and measured in
processes of its own, with one thread:

* ``bytes``: of all files, of the vocabulary and the word tables among them, and of the vocabulary;
* ``load``: seconds from the folder to a model that answers; ``import``: of numpy and onnxruntime;
  all times are those of the processor, in one thread, so that other processes do not count;
* ``memory``: MiB of the process at its peak beyond that after the imports;
* ``score``: words a second; ``perplexity``: of the test's first ``--test-words`` words as one text,
  those left out that are not in the vocabulary; ``difference``: by how much that of the export is
  above that of the checkpoint, both with these words;
* ``suggest``: milliseconds from a further word of the test to the three most probable next ones,
  median and 99th percentile; ``complete``: those that begin with its first letter; with
  ``--browser`` suggestions in Chromium too, by the clock.

Systems are those of ``benchmark_language_model.py``: ``lstm_lm`` and ``lstm_lm-adaptive`` are
fairseq's, exported by the same exporter and quantiser, their words front-coded too. ``kenlm`` is a
5-gram of the whole training text in a trie of eight bits. These peers are compared in int8 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

SYSTEMS = ("recommended", "gated-further-bias", "gated", "recurrent", "lstm_lm",
           "lstm_lm-adaptive", "kenlm")  # fmt: skip
_TABLES = "word_table.txt", *(f"further_word_table{number}.txt" for number in (1, 2, 3))


def parse() -> argparse.Namespace:
    from language_model_runs import add_training_flags

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_training_flags(parser, width=200, dropout=0.1, lanes=32)
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="(default: all)")
    add("--quantize", nargs="+", default=["none", "fp16", "int8", "int4"], metavar="HOW",
        help="(default: %(default)s)")  # fmt: skip
    add("--seconds", type=float, default=200, help="of training (default: %(default)s)")
    add("--test-words", type=int, default=50_000, metavar="N", help="(default: %(default)s)")
    add("--browser", action="store_true", help="measure suggestions of int8 in Chromium too")
    add("--train-only", action="store_true", help="export and measure nothing")
    args = parser.parse_args()
    if len(args.seeds) > 1:
        parser.error("--seeds: one at a time, each with an OUTPUT of its own")
    return args


def flags_of(system: str, data: Path, folder: Path, args: argparse.Namespace) -> list[Any]:
    """Returns the flags of a training."""
    from benchmark_language_model import model_flags
    from language_model_runs import training_flags

    return [
        *training_flags(system, args.seeds[0], data, args), "--lr", args.lr,
        *model_flags(system, args, count_words(data)),
        "--save-dir", folder, "--disable-validation", "--no-epoch-checkpoints",
        "--no-save-optimizer-state", "--num-workers", 0, "--log-format", "json",
    ]  # fmt: skip


def count_words(data: Path) -> int:
    """Returns the words of a dictionary, fairseq's own among them."""
    from fairseq.data import Dictionary

    return len(Dictionary.load(str(data / "dict.txt")))


def make_tables(data: Path, args: argparse.Namespace) -> dict[str, float]:
    """Makes a table and three further ones, unless that is done, and returns their seconds."""
    from side_by_side import run_measured, write_whole

    folder = args.out / "tables"
    kept = folder / "seconds.json"
    if not kept.exists():
        flags = flags_of("gated-further-bias", data, folder, args)
        command = [sys.executable, "-m", "fairseq_cli.train", *flags, "--max-update", 1]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w+") as log:
            code, used = run_measured(command, log, {"OMP_NUM_THREADS": "1"})
            log.seek(0)
            output = log.read()
        if code:
            raise SystemExit(f"the tables: {output[-2000:]}")
        each = re.findall(r"initial (further table \d|table): .* ([0-9.]+) seconds", output)
        seconds = {"all_cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
        write_whole(kept, json.dumps(seconds | {name: float(one) for name, one in each}) + "\n")
    found: dict[str, float] = json.loads(kept.read_text())
    return found


def train(system: str, data: Path, folder: Path, args: argparse.Namespace) -> None:
    """Trains a system for so many seconds of the processor, unless that is done."""
    from benchmark_language_model import LSTMS
    from side_by_side import KEEP_MEMORY, TRAIN_FOR_SECONDS, run_measured, write_whole

    if (folder / "trained.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if system == "kenlm":
        from export_peers import build_kenlm
        from language_model_text import find_text

        built = build_kenlm(find_text(args.text)["train"], data, args.out / "kenlm-int8")
        write_whole(folder / "trained.json", json.dumps({"cpu_seconds": round(built.seconds, 1)}))
        return
    flags = flags_of(system, data, folder, args)
    if system in LSTMS:
        tables = [args.out / "tables" / name for name in _TABLES]
        flags += ["--initial-table", tables[0]]
        if has_further_tables(system, count_words(data)):
            # argparse takes the last of several values.
            flags += ["--further-tables", ",".join(map(str, tables[1:]))]
    flags += ["--stop-time-hours", args.seconds / 3600, "--log-interval", 20]
    command = [sys.executable, TRAIN_FOR_SECONDS, "cpu", *flags]
    with open(folder / "train.txt", "w") as log:
        code, _ = run_measured(command, log, {**KEEP_MEMORY, "OMP_NUM_THREADS": "1"})
    if code:
        raise SystemExit(f"{folder / 'train.txt'}: {system} ended with exit status {code}")
    import torch

    state = torch.load(folder / "checkpoint_last.pt", map_location="cpu", weights_only=False)
    updates = state["optimizer_history"][-1]["num_updates"]
    write_whole(folder / "trained.json", json.dumps({"updates": updates}) + "\n")


def has_further_tables(system: str, num_words: int) -> bool:
    """Tells whether a system's words stand in further tables."""
    from fairseq_lightrnn.models.flags import SMALL_VOCABULARY

    return "further" in system or (system == "recommended" and num_words > SMALL_VOCABULARY)


def export(system: str, quantise: str, data: Path, args: argparse.Namespace) -> Path | None:
    """Exports a trained system, unless that is done, and returns where.

    None if it is a peer: these are compared in eight bits alone.
    """
    from benchmark_language_model import LSTMS
    from export_measures import some_lines
    from language_model_text import find_text

    out: Path = args.out / f"{system}-{quantise}"
    if system not in LSTMS and quantise != "int8":
        return None
    if system == "kenlm" or (out / "model.json").exists():
        return out
    checkpoint = args.out / f"{system}-{args.seeds[0]}" / "checkpoint_last.pt"
    if system.startswith("lstm_lm"):
        from export_peers import export_lstm_lm

        export_lstm_lm(checkpoint, data, quantise, out)
        return out
    from fairseq_lightrnn.export.model import export_model
    from fairseq_lightrnn.language_model import LanguageModel

    text = some_lines(find_text(args.text)["test"], args.test_words)
    export_model(LanguageModel.from_pretrained(checkpoint, data), out, quantise=quantise, text=text)
    return out


def run(system: str, quantise: str, folder: Path, data: Path, args: argparse.Namespace) -> Any:
    """Measures an export in a process of its own, unless that is done."""
    from export_measures import in_browser, sizes
    from language_model_text import find_text
    from side_by_side import write_whole

    browser = args.browser and quantise == "int8"
    kept = args.out / f"{system}-{quantise}{'-browser' if browser else ''}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    text = find_text(args.text)["test"]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"from export_measures import measure; from pathlib import Path; "
        f"measure(Path({str(folder)!r}), Path({str(text)!r}), {args.test_words})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{system} {quantise}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    trained = args.out / f"{system}-{args.seeds[0]}" / "trained.json"
    result = {"system": system, "quantize": quantise, **json.loads(trained.read_text()),
              **sizes(folder, data), **found}  # fmt: skip
    if (folder / "first.onnx").exists():
        metrics = json.loads((folder / "model.json").read_text())["metrics"]
        result["difference"] = metrics["difference"]
        if browser:
            result |= in_browser(folder, text)
    write_whole(kept, json.dumps(result) + "\n")
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| system | stored in | MB | of these words | perplexity | words/s | suggestion, ms "
        "(99 %) | completion, ms (99 %) | load, s | memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        lines.append(
            f"| {one['system']} | {one['quantize']} | {one['bytes'] / 1e6:.2f} | "
            f"{one.get('words_bytes', 0) / 1e6:.2f} | {one['perplexity']:.1f} | "
            f"{one['words_per_second']:,} | {one['suggest_ms'][0]:.2f} ({one['suggest_ms'][1]:.2f})"
            f" | {one['complete_ms'][0]:.2f} ({one['complete_ms'][1]:.2f}) | "
            f"{one['load_seconds']:.2f} | {one['memory_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    import fairseq_compat

    fairseq_compat.install()
    from benchmark_language_model import LSTMS
    from language_model_runs import claim_folder
    from language_model_text import binarise
    from side_by_side import write_results

    args = parse()
    report = claim_folder(args, "quantize", "browser", "train_only", seed=args.seeds[0])
    data, results = binarise(args.text, args.out), []
    has_tables = any(system in LSTMS for system in args.systems)
    seconds = make_tables(data, args) if has_tables else {}
    for system in args.systems:
        train(system, data, args.out / f"{system}-{args.seeds[0]}", args)
    if args.train_only:
        return
    report["versions"] |= {one: version(one) for one in ("onnx", "onnxruntime")}
    for system in args.systems:
        for quantise in args.quantize:
            folder = export(system, quantise, data, args)
            if folder is None:
                continue
            results.append(run(system, quantise, folder, data, args))
            report |= {"words": count_words(data), "tables": seconds, "results": results}
            write_results(args.out, report, table(results))


if __name__ == "__main__":
    main()
