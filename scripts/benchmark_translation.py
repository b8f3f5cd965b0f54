"""Trains translation models of one width side by side and compares translations, speed and size.

    python scripts/benchmark_translation.py OUTPUT --source en --target de --train PREFIX
        --valid PREFIX --test 2016=PREFIX 2017=PREFIX [--pieces 8000]

PREFIX.en and PREFIX.de hold one sentence a line. Without ``--pieces`` their words, split at spaces,
are the vocabulary, all of them; with it, that many pieces of a sentencepiece model of the training
text. OUTPUT receives binarised data, a folder for each run, ``results.json`` and ``results.md``.
Finished runs are kept, interrupted ones go on from their last checkpoint.

Systems (``--systems``): fairseq's ``lstm`` and ``transformer``, and this plugin's models, each with
the settings that are recommended: ``lightrnn-gated`` (``--arch lightrnn_translation_gated``) and
``lightrnn-transformer``; ``-further``: either with a bias and three further tables instead of
numbers of words' own; ``lightrnn``: the paper's composition (``--arch lightrnn_translation``).
All are trained alike, with a learning rate that falls to nothing, and tested with the checkpoint of
the best validation perplexity. ``results.json`` has sacrebleu's paired bootstrap of every system
against fairseq's own. Question answering is translation here: ``--metrics answers`` counts exact
matches and common words.

Training speed is target words per CPU second of the training processes, their start and validation
included; decoding speed is what fairseq-generate reports, so measure it on an idle machine.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from pieces import make_splitter, write_pieces
from side_by_side import (
    PLUGIN,
    Systems,
    add_gpu_flag,
    call,
    checksum,
    collect,
    device_flags,
    is_tested,
    keep_settings,
    machine,
    mean_and_spread,
    train_in_steps,
    write_results,
    write_test,
)

SYSTEMS = (
    "lstm", "lightrnn", "lightrnn-gated", "lightrnn-gated-further",
    "transformer", "lightrnn-transformer", "lightrnn-transformer-further",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUTPUT", help="folder to write to")
    add("--source", required=True, help="suffix of the source files")
    add("--target", required=True, help="suffix of the target files")
    add("--train", required=True, metavar="PREFIX", help="of the training text")
    add("--valid", required=True, metavar="PREFIX", help="of the validation text")
    add("--test", required=True, nargs="+", metavar="NAME=PREFIX", help="of texts to test on")
    add("--pieces", type=int, metavar="N", help="split words into pieces, N of them")
    add("--metrics", choices=["translations", "answers"], default="translations",
        help="BLEU and chrF, or exact matches and F1 of words (default: %(default)s)")  # fmt: skip
    add("--table-text", choices=["target", "both"], default="target",
        help="text whose neighbours make LightRNN's tables (default: %(default)s)")  # fmt: skip
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM",
        help="what to compare (default: all of the above)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[1], help="of each system (default: %(default)s)")
    add("--epochs", type=int, default=12, help="(default: %(default)s)")
    add("--step", type=int, default=4, help="epochs of a process (default: %(default)s)")
    add("--width", type=int, default=256, help="of vectors and networks (default: %(default)s)")
    add("--layers", type=int, default=1, help="of LSTMs (default: %(default)s)")
    add("--transformer-layers", type=int, default=3, help="(default: %(default)s)")
    add("--dropout", type=float, default=0.3, help="(default: %(default)s)")
    add("--label-smoothing", type=float, default=0.1, help="(default: %(default)s)")
    add("--lr", type=float, default=0.002,
        help="of Adam in the first epoch, from which it falls (default: %(default)s)")  # fmt: skip
    add("--max-tokens", type=int, default=2000, help="of a batch (default: %(default)s)")
    add("--transformer-lr", type=float, default=0.001,
        help="as --lr, for transformers (default: %(default)s)")  # fmt: skip
    add("--word-dim", type=int, metavar="N",
        help="a bias and N-1 numbers of every word's own, in systems that have them (default: what "
        "is recommended for the vocabulary)")  # fmt: skip
    add("--beam", type=int, default=5, help="(default: %(default)s)")
    add_gpu_flag(parser)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> dict[str, str]:
    """Returns the prefixes of the texts to be binarised, split into pieces if that is asked for."""
    names = {"train": args.train, "valid": args.valid}
    names.update(dict(test.split("=", 1) for test in args.test))
    if args.pieces is None:
        return names
    folder = args.out / "pieces"
    languages = (args.source, args.target)
    texts = [Path(f"{args.train}.{language}") for language in languages]
    splitter = make_splitter(folder / "model", texts, args.pieces)
    for name, prefix in names.items():
        for language in languages:
            write_pieces(splitter, Path(f"{prefix}.{language}"), folder / f"{name}.{language}")
    return {name: str(folder / name) for name in names}


def binarise(args: argparse.Namespace) -> Path:
    """Makes fairseq's binary data, unless they are there."""
    data: Path = args.out / "bin"
    if not (data / "complete").exists():
        prefixes = prepare(args)
        tests = [prefix for name, prefix in prefixes.items() if name not in ("train", "valid")]
        call(
            "preprocess", "--source-lang", args.source, "--target-lang", args.target,
            "--trainpref", prefixes["train"], "--validpref", prefixes["valid"],
            "--testpref", ",".join(tests), "--destdir", data,
        )  # fmt: skip
        (data / "complete").touch()
    return data


def model_flags(system: str, args: argparse.Namespace) -> list[Any]:
    """Returns the flags of a system's task, model and criterion."""
    # The plugin's tasks build their own criterion in place of this one.
    flags = [*sizes_of(system, args), "--criterion", "label_smoothed_cross_entropy",
             "--label-smoothing", args.label_smoothing]  # fmt: skip
    if not system.startswith("lightrnn"):
        return ["--task", "translation", "--arch", system, *flags]
    arch = "lightrnn_translation" if system == "lightrnn" else "lightrnn_translation_gated"
    if "transformer" in system:
        arch = "lightrnn_transformer"
    flags += ["--user-dir", PLUGIN, "--task", "lightrnn_translation", "--arch", arch,
              "--table-text", args.table_text]  # fmt: skip
    if system.endswith("-further"):
        flags += ["--further-tables", 3]
    elif system != "lightrnn" and args.word_dim is not None:
        flags += ["--word-dim", args.word_dim]
    return flags


def sizes_of(system: str, args: argparse.Namespace) -> list[Any]:
    """Returns the flags of width and depth, the same for all."""
    width, layers = args.width, args.layers
    if "transformer" in system:
        sizes = {"embed-dim": width, "ffn-embed-dim": 2 * width, "attention-heads": 4,
                 "layers": args.transformer_layers}  # fmt: skip
        sides = ("encoder", "decoder")
        return [part for side in sides for name, size in sizes.items()
                for part in (f"--{side}-{name}", size)]  # fmt: skip
    if system == "lstm":
        return ["--encoder-embed-dim", width, "--encoder-hidden-size", width,
                "--encoder-bidirectional", "--encoder-layers", layers,
                "--decoder-embed-dim", width, "--decoder-hidden-size", width,
                "--decoder-out-embed-dim", width, "--decoder-layers", layers]  # fmt: skip
    return ["--embed-dim", width, "--hidden-size", width, "--num-layers", layers]


def learning_rates(highest: float, epochs: int) -> str:
    """Returns those of the epochs, falling along half a cosine: the last epochs settle."""
    shares = ((1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs))
    return ",".join(f"{highest * share:.2g}" for share in shares)


def train(system: str, seed: int, data: Path, folder: Path, args: argparse.Namespace) -> None:
    """Trains one system."""
    highest = args.transformer_lr if "transformer" in system else args.lr
    flags = [
        data, *model_flags(system, args), "--source-lang", args.source, "--target-lang",
        args.target, "--dropout", args.dropout, "--max-tokens", args.max_tokens,
        "--optimizer", "adam", "--lr", learning_rates(highest, args.epochs), "--lr-scheduler",
        "fixed", "--warmup-updates", 400, "--clip-norm", 1, "--seed", seed,
        "--best-checkpoint-metric", "nll_loss", *device_flags(args),
    ]  # fmt: skip
    train_in_steps(folder, flags, args.epochs, args.step)


def test(system: str, data: Path, folder: Path, args: argparse.Namespace) -> None:
    """Translates every test and scores the translations."""
    if is_tested(folder):
        return
    scores: dict[str, Any] = {}
    for number, test in enumerate(args.test):
        name, prefix = test.split("=", 1)
        subset = f"test{number or ''}"
        flags = ["--path", folder / "checkpoint_best.pt", "--gen-subset", subset,
                 *device_flags(args), "--source-lang", args.source, "--target-lang", args.target,
                 "--beam", args.beam, "--batch-size", 64]  # fmt: skip
        if system.startswith("lightrnn"):
            flags += ["--user-dir", PLUGIN, "--task", "lightrnn_translation"]
        if args.pieces is not None:
            flags += ["--post-process", "sentencepiece"]
        output = call("generate", data, *flags, log=folder / f"{name}.generate.log")
        scores[name] = score(read_translations(folder, name), references(prefix, args), args)
        speed = re.search(r"([0-9.]+) tokens/s", output)
        scores[name]["tokens_per_second"] = float(speed[1]) if speed else None
    write_test(folder, scores=scores)


def read_translations(folder: Path, test: str) -> list[str]:
    """Returns what a run made of a test, line by line."""
    output = (folder / f"{test}.generate.log").read_text(encoding="utf-8")
    found = {int(key): text for key, text in re.findall(r"^D-(\d+)\t\S+\t(.*)$", output, re.M)}
    return [found.get(line, "") for line in range(max(found) + 1)]


def references(prefix: str, args: argparse.Namespace) -> list[str]:
    """Returns the target side of a text."""
    return Path(f"{prefix}.{args.target}").read_text(encoding="utf-8").splitlines()


def score(hypotheses: list[str], references: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Compares texts line by line."""
    if len(hypotheses) != len(references):
        raise SystemExit(f"{len(hypotheses)} texts for {len(references)} references")
    if args.metrics == "answers":
        exact = sum(one == other for one, other in zip(hypotheses, references, strict=True))
        common = sum(map(token_f1, hypotheses, references))
        return {
            "exact match": round(100 * exact / len(references), 2),
            "token F1": round(100 * common / len(references), 2),
        }
    metrics = metrics_of(args, references)
    found = {
        name: round(metric.corpus_score(hypotheses, None).score, 2)
        for name, metric in metrics.items()
    }
    signatures = {name: str(metric.get_signature()) for name, metric in metrics.items()}
    return {**found, "signatures": signatures}


def metrics_of(args: argparse.Namespace, references: list[str]) -> dict[str, Any]:
    """Returns sacrebleu's metrics against these references."""
    from sacrebleu.metrics import BLEU, CHRF

    # Words that were split beforehand are compared as they are.
    tokenizer = "13a" if args.pieces is not None else "none"
    return {
        "BLEU": BLEU(tokenize=tokenizer, force=True, references=[references]),
        "chrF": CHRF(references=[references]),
    }


def add_significance(seed: str, systems: Systems, args: argparse.Namespace) -> None:
    """Adds to the scores of a seed's runs sacrebleu's paired bootstrap against fairseq's own model.

    ``interval`` is half the width of the 95 % interval of a score, ``p`` the probability that a
    difference as large as that to fairseq's model comes about by the choice of sentences alone.
    """
    from sacrebleu.significance import PairedTest

    runs = {system: runs[seed] for system, runs in systems.items() if seed in runs}
    for stock in ("lstm", "transformer"):
        peers = [name for name in runs if ("transformer" in name) == (stock == "transformer")]
        if stock not in peers or len(peers) < 2:
            continue
        peers.sort(key=lambda name: name != stock)
        for name, prefix in (test.split("=", 1) for test in args.test):
            texts = [(peer, read_translations(args.out / f"{peer}-{seed}", name)) for peer in peers]
            metrics = metrics_of(args, references(prefix, args))
            _, found = PairedTest(texts, metrics, None, test_type="bs", n_samples=1000)()
            del found["System"]  # the other columns are those of the metrics
            for key, results in zip(metrics, found.values(), strict=True):
                for system, result in zip(peers, results, strict=True):
                    figures = {"interval": round(float(result.ci), 2)}
                    if result.p_value is not None:
                        figures["p"] = round(float(result.p_value), 4)
                    runs[system]["scores"][name].setdefault("bootstrap", {})[key] = figures


def token_f1(hypothesis: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall of words, as SQuAD counts them."""
    common = sum((Counter(hypothesis.split()) & Counter(reference.split())).values())
    total = len(hypothesis.split()) + len(reference.split())
    return 2 * common / total if total else 1.0


def summarise(args: argparse.Namespace) -> None:
    """Writes ``results.json`` and ``results.md`` of all runs in the folder."""
    target = Path(f"{args.train}.{args.target}").read_text(encoding="utf-8")
    words = len(target.split()) + target.count("\n")
    systems = collect(args.out)
    if args.metrics == "translations":
        for seed in sorted({seed for runs in systems.values() for seed in runs}):
            add_significance(seed, systems, args)
    report = {
        "settings": settings_of(args),
        "sha256": checksums(args),
        "target_words": words,
        **machine(),
        "systems": systems,
    }
    write_results(args.out, report, markdown(systems, words, args.gpu))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that all runs of a folder have in common."""
    own = ("out", "train", "valid", "test", "seeds", "systems")
    return {name: value for name, value in vars(args).items() if name not in own}


def checksums(args: argparse.Namespace) -> dict[str, str]:
    """Returns what tells the texts, by their names."""
    prefixes = [args.train, args.valid, *(test.split("=", 1)[1] for test in args.test)]
    paths = [Path(f"{prefix}.{side}") for prefix in prefixes for side in (args.source, args.target)]
    return {path.name: checksum(path) for path in paths}


def markdown(systems: Systems, words: int, gpu: bool) -> str:
    """Returns the runs as a table, means over the seeds."""
    first = next(run for runs in systems.values() for run in runs.values())["scores"]
    measures = [(test, key) for test, found in first.items() for key in found if " " in key
                or key in ("BLEU", "chrF")]  # fmt: skip
    clock = "seconds" if gpu else "cpu_seconds"
    head = ["system", "parameters", "decoder vocabulary", "epochs (best)", "valid perplexity",
            *(f"{test} {key}" for test, key in measures), "seeds",
            f"words/{'' if gpu else 'CPU '}s, training", "words/s, decoding", "MiB"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for system, by_seed in systems.items():
        runs = list(by_seed.values())
        scores = [found for run in runs for found in run["scores"].values()]
        cells = [
            system,
            f"{runs[0]['parameters']:,}",
            f"{runs[0]['vocabulary_parameters']:,}",
            f"{runs[0]['epochs']} ({'/'.join(str(run['best_epoch']) for run in runs)})",
            mean_and_spread([run["valid_ppl"] for run in runs], 2),
            *(mean_and_spread([run["scores"][test][key] for run in runs], 2)
              for test, key in measures),
            str(len(runs)),
            f"{words / mean([run[f'{clock}_per_epoch'] for run in runs]):,.0f}",
            f"{mean([found['tokens_per_second'] or 0 for found in scores]):,.0f}",
            f"{max(run['peak_mib'] for run in runs):,}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    keep_settings(args.out, {**settings_of(args), **checksums(args)})
    data = binarise(args)
    for seed in args.seeds:
        for system in args.systems:
            folder = args.out / f"{system}-{seed}"
            train(system, seed, data, folder, args)
            test(system, data, folder, args)
            summarise(args)


if __name__ == "__main__":
    main()
