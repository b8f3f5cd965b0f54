"""Compares what a trained language model does all day: scoring, generating, next-word queries.

    python scripts/benchmark_inference.py --sizes 10000 33278 415000 1000000 --json results.json

LightRNN (the paper's model; the gated one with one table, with a bias and 64 numbers of each word's
own, with a bias and three further tables; with one table of 4√V rows, of three or four components)
beside fairseq's ``lstm_lm`` with full and with adaptive softmax, all of one width. Measured are

- ``score``: words a second through fairseq's ``SequenceScorer``, as ``fairseq-eval-lm`` scores;
- ``greedy``, ``beam5``, ``sample``: words a second through fairseq's ``SequenceGenerator``, as the
  commands have it: LightRNN's tasks ask a model for the words alone that can be chosen;
- ``sample2``: words a second by two-stage sampling, which LightRNN alone has;
- ``next10``: milliseconds for the ten most probable next words, with their probabilities;

each in a process of its own, with the memory that the process held before (``model``: program and
model) and what the measurement took on top at its peak (``work``). Seconds of one thread are the
processor's, so that other work does not count.

Weights are random. The search for the most probable words depends on how sharp the predictions are,
so what needs it (``greedy``, ``beam5``, ``next10``) is measured twice: with random weights, whose
flat predictions are the worst case (``beam5 flat`` …), and with biases that make the perplexity of
a word that of ``--perplexity``, shared alike by its components. No other time depends on weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_language_model import many_rows
from random_models import build_lstm_lm, build_ours, sized_task
from side_by_side import machine, write_whole

ONE_TABLE: dict[str, Any] = {"word_dim": 0, "further_tables": "0"}
# What words have in the models of the plugin, see ``LSTMConfig``.
OURS: dict[str, dict[str, Any]] = {
    "lightrnn": {},
    "gated": ONE_TABLE,
    "gated+words": {"word_dim": 65},
    "gated+tables": {"word_dim": 1, "further_tables": "3"},
    "gated rows": ONE_TABLE,
    "gated 3d": {**ONE_TABLE, "table_shape": "3d"},
    "gated 4d": {**ONE_TABLE, "table_shape": "4d"},
}
MODELS = (*OURS, "full", "adaptive")
SEARCHES = ("greedy", "beam5", "next10")
FLAT = tuple(f"{measure} flat" for measure in SEARCHES)
MEASURES = ("score", "sample", "sample2", *SEARCHES, *FLAT)
ONLY_OURS = ("sample2", *FLAT)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[10_000, 33_278, 415_000, 1_000_000],
        metavar="V", help="vocabulary sizes")  # fmt: skip
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="(default: all)")
    add("--width", type=int, default=200, help="of vectors and LSTM (default: %(default)s)")
    add("--layers", type=int, default=1, help="of the LSTM (default: %(default)s)")
    add("--batch", type=int, default=16, help="sentences scored at once (default: %(default)s)")
    add("--length", type=int, default=32, help="words of a sentence (default: %(default)s)")
    add("--generated", type=int, default=10, help="words generated (default: %(default)s)")
    add("--perplexity", type=float, default=144.0,
        help="of sharp predictions (default: %(default)s)")  # fmt: skip
    add("--seconds", type=float, default=3.0, help="to measure each for (default: %(default)s)")
    add("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures here too")
    add("--worker", nargs=3, metavar=("MODEL", "MEASURE", "V"), help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str, num_words: int, args: argparse.Namespace) -> Any:
    """Builds a fairseq model with random weights."""
    import torch

    torch.manual_seed(1)
    task = sized_task(num_words)
    if name in OURS:
        kind = "LightRNNLanguageModel" if name == "lightrnn" else "GatedLanguageModel"
        shape = {"table_shape": many_rows(num_words)} if name == "gated rows" else {}
        return build_ours(kind, {**OURS[name], **shape}, task, args)
    return build_lstm_lm(task, args, adaptive=name == "adaptive")


def sharpen(decoder: Any, perplexity: float) -> None:
    """Sets biases, falling with the logarithm of a random rank, of this perplexity of a word."""
    import torch

    softmax = decoder.words.head.softmax
    sizes = softmax.table.shape
    entropy = math.log(perplexity) / len(sizes)
    for component, size in enumerate(sizes):
        ranks = torch.randperm(size) + 1.0
        low, high = 0.0, 20.0
        for _ in range(60):
            slope = (low + high) / 2
            log_probs = torch.log_softmax(-slope * ranks.log(), 0)
            flat = -(log_probs.exp() * log_probs).sum() > entropy
            low, high = (slope, high) if flat else (low, slope)
        softmax.component(component)[1].copy_(-low * ranks.log())


def work(name: str, measure: str, model: Any, args: argparse.Namespace) -> Callable[[], int]:
    """Returns what is to be timed: a function that returns how many words it has done."""
    import torch
    from fairseq.search import Sampling
    from fairseq.sequence_generator import SequenceGenerator
    from fairseq.sequence_scorer import SequenceScorer

    from fairseq_lightrnn.tasks.generator import TopWordsGenerator

    dictionary = model.decoder.dictionary
    num_words, eos = len(dictionary), dictionary.eos()
    if measure == "score":
        text = torch.randint(4, num_words, (args.batch, args.length + 1)).to(args.device)
        target = text[:, 1:].contiguous()
        inputs = {"src_tokens": text[:, :-1], "src_lengths": None}
        if name in OURS:
            inputs["target_tokens"] = target
        sample = {
            "net_input": inputs, "target": target, "start_indices": [0] * args.batch,
        }  # fmt: skip
        # As many positions at a time as keep a full softmax within 512 MiB.
        scorer = SequenceScorer(dictionary, softmax_batch=max(1, 2**27 // num_words))
        return lambda: len(scorer.generate([model], sample)) * args.length
    if name in OURS and measure in SEARCHES:
        sharpen(model.decoder, args.perplexity)
    measure = measure.removesuffix(" flat")
    if measure in ("greedy", "beam5", "sample"):
        kind = TopWordsGenerator if name in OURS else SequenceGenerator
        generator = kind(
            [model], dictionary, beam_size=5 if measure == "beam5" else 1,
            max_len_b=args.generated, min_len=args.generated,
            search_strategy=Sampling(dictionary) if measure == "sample" else None,
        )  # fmt: skip
        source = torch.full((1, 1), eos, device=args.device)
        sample = {"net_input": {"src_tokens": source}}

        def generate() -> int:
            generator.generate([model], sample, bos_token=eos)
            return args.generated

        return generate
    return query(name, measure, model, args)


def query(name: str, measure: str, model: Any, args: argparse.Namespace) -> Callable[[], int]:
    """Returns a function that asks for one next word, or draws some in two stages."""
    import torch

    decoder = model.decoder
    num_words = len(decoder.dictionary)
    words = torch.randint(4, num_words, (1, 1)).to(args.device)
    if name not in OURS:

        def dense() -> int:
            output = decoder(words, incremental_state={})
            log_probs = decoder.get_normalized_probs(output, log_probs=True, sample=None)
            log_probs[0, -1].topk(10)
            return 1

        return dense
    from fairseq_lightrnn.core.distribution import sample_words
    from fairseq_lightrnn.core.search import top_words

    core = decoder.core

    def top() -> int:
        found = top_words(core.head, core.read(words), 10)
        top.expanded = int(found.expanded[0])  # type: ignore[attr-defined]
        return 1

    def two_stage() -> int:
        drawn, context = words[:, 0], None
        for _ in range(args.generated):
            context = core.read(drawn[:, None], context)
            drawn = sample_words(core.head, context)
        return args.generated

    return two_stage if measure == "sample2" else top


def clock_of(device: str, threads: int) -> Callable[[], float]:
    """Returns what tells the seconds: of one thread the processor's, whatever else runs."""
    return time.process_time if (device, threads) == ("cpu", 1) else time.perf_counter


def memory(key: str) -> float:
    """Returns a figure of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(args: argparse.Namespace) -> None:
    """Measures one thing and prints it as JSON."""
    import fairseq_compat

    fairseq_compat.install()
    import torch

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    name, measure, size = args.worker
    model = build(name, int(size), args).eval().to(args.device)
    run = work(name, measure, model, args)
    before = memory("VmRSS")
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak begins anew

    clock = clock_of(args.device, args.threads)

    def timed() -> tuple[float, int]:
        start = clock()
        words = run()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return clock() - start, words

    timed()
    runs = [timed()]
    while len(runs) < 3 or sum(seconds for seconds, _ in runs) < args.seconds:
        runs.append(timed())
    seconds = statistics.median(seconds for seconds, _ in runs)
    result = {
        "seconds": seconds,
        "words_per_second": runs[0][1] / seconds,
        "runs": len(runs),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_mib": before,
        "work_mib": max(0.0, memory("VmHWM") - before),
    }
    if hasattr(run, "expanded"):
        result["expanded_rows"] = run.expanded
        result["rows"] = model.decoder.words.table.shape[0]
    print(json.dumps(result))


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures everything, each in a process of its own."""
    results = []
    for size in args.sizes:
        for measure in args.measures:
            for name in args.models:
                if measure in ONLY_OURS and name not in OURS:
                    continue
                found, _ = measure_apart(__file__, [name, measure, str(size)], args.threads)
                record = {"words": size, "model": name, "measure": measure, **found}
                results.append(record)
                print(line(record), flush=True)
    return results


def measure_apart(
    script: str, what: list[str], threads: int, **environment: str
) -> tuple[dict[str, Any], str]:
    """Measures one thing in a process of its own, which a script starts of itself.

    Args:
        script: that is told ``--worker`` and prints the figures as JSON, the last line.
        what: is measured.
        threads: of the CPU.
        **environment: what is set besides this process's own.

    Returns:
        The figures, or an error; and what the process told besides.
    """
    done = subprocess.run(
        [sys.executable, script, *sys.argv[1:], "--worker", *what],
        capture_output=True, text=True,
        env={**os.environ, **environment, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1]}, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def line(record: dict[str, Any]) -> str:
    """Returns a measurement as a line of text."""
    head = f"{record['words']:>9,}  {record['measure']:<11}  {record['model']:<12}"
    if "error" in record:
        return f"{head}  failed: {record['error']}"
    speed = f"{record['words_per_second']:>12,.0f} words/s"
    if record["measure"].startswith("next10"):
        speed = f"{1000 * record['seconds']:>12.2f} ms     "
    memory_used = f"model {record['model_mib']:>6.0f} MiB  work {record['work_mib']:>6.0f} MiB"
    rows = f"  {record['expanded_rows']} of {record['rows']} rows" if "rows" in record else ""
    return f"{head}  {speed}  {memory_used}{rows}"


def main() -> None:
    args = parse()
    if args.worker:
        worker(args)
        return
    results = measure_all(args)
    if args.json:
        settings = {
            key: value for key, value in vars(args).items() if key not in ("json", "worker")
        }
        report = {"settings": settings, **machine(), "results": results}
        write_whole(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
