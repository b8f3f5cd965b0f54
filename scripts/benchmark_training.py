"""Measures how fast language models train: updates on a Zipf text, for vocabularies of many sizes.

    python scripts/benchmark_training.py OUTPUT --sizes 10000 33280 415464

LightRNN (the paper's model; the gated one with one table; with a bias and 64 numbers of each word's
own; the recommended one of large vocabularies, with a bias, three further tables and a feed-forward
layer) beside fairseq's ``lstm_lm`` with full and with adaptive softmax and its ``transformer_lm``
with adaptive input and softmax, all of one width, each in a process of its own. An update is what
``fairseq-train`` does: forward through the criterion, backward, gradients clipped at norm 1, Adam.
Words are drawn by Zipf's law, so that a word of rank r has the probability 1/r, and no carried
state is kept.

Measured are words a second (median of the updates; of one thread the processor's seconds, so that
other work does not count), the peak memory of the process, which keeps what it frees, and the share
of the machine's rate of multiplying matrices: multiplications and additions a word (those of matrix
products, counted by torch, and those of the LSTM) times words a second, over the rate at which a
product of two matrices of 2048 × 2048 is computed by the same process, before or after, whichever
is faster.

``--parts`` prints where the time of an update goes, by torch's profiler. Finished measurements are
kept in OUTPUT, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_inference import ONE_TABLE, clock_of, measure_apart, memory
from benchmark_language_model import cutoffs_within
from random_models import build_lstm_lm, build_ours, sized_task
from side_by_side import KEEP_MEMORY, measure_each, write_results

# Flags of the models of the plugin: the class of the model, and what words have.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("LightRNNLanguageModel", {}),
    "gated": ("GatedLanguageModel", ONE_TABLE),
    "gated, linear": ("GatedLanguageModel", {**ONE_TABLE, "output_ffn_dim": 0}),
    "own numbers": ("GatedLanguageModel", {"word_dim": 65}),
    "recommended": ("GatedLanguageModel", {"word_dim": 1, "further_tables": "3"}),
}
PEERS = ("lstm_lm", "lstm_lm adaptive", "transformer_lm adaptive")
SYSTEMS = (*OURS, *PEERS)
_MATRIX = 2048


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUTPUT", help="folder to write to")
    add("--sizes", type=int, nargs="+", default=[10_000, 33_280, 100_000, 415_464, 1_000_000],
        metavar="V", help="vocabulary sizes (default: %(default)s)")  # fmt: skip
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="(default: all)")
    add("--width", type=int, default=200, help="of vectors and networks (default: %(default)s)")
    add("--layers", type=int, default=1, help="of networks (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="texts at once (default: %(default)s)")
    add("--block", type=int, default=35, help="words of each (default: %(default)s)")
    add("--seconds", type=float, default=20.0, help="to measure each for (default: %(default)s)")
    add("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    add("--gpu", action="store_true", help="train on the GPU")
    add("--bf16", action="store_true", help="train in half precision")
    add("--parts", action="store_true", help="print where the time of an update goes")
    add("--worker", nargs=2, metavar=("SYSTEM", "V"), help=argparse.SUPPRESS)
    return parser.parse_args()


def build(system: str, num_words: int, args: argparse.Namespace) -> tuple[Any, Any]:
    """Builds a model with random weights, and the criterion that it is trained with."""
    import torch

    torch.manual_seed(1)
    task = sized_task(num_words)
    if system in OURS:
        from fairseq_lightrnn.criterions import two_component_cross_entropy

        model = build_ours(*OURS[system], task, args)
        return model, two_component_cross_entropy.TwoComponentCrossEntropyCriterion(task)
    return build_peer(system, task, args)


def build_peer(system: str, task: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Builds one of fairseq's own models, and its criterion."""
    from fairseq.criterions.adaptive_loss import AdaptiveLoss
    from fairseq.criterions.cross_entropy import CrossEntropyCriterion

    adaptive = system.endswith("adaptive")
    if system.startswith("lstm_lm"):
        model = build_lstm_lm(task, args, adaptive)
    else:
        from fairseq.models import transformer_lm

        cutoffs = cutoffs_within(len(task.dictionary))
        factor = 4.0 if args.width >= 4 ** (cutoffs.count(",") + 1) else 2.0  # none is 0 wide
        cfg = transformer_lm.TransformerLanguageModelConfig(
            dropout=0.2, decoder_embed_dim=args.width, decoder_output_dim=args.width,
            decoder_input_dim=args.width, decoder_ffn_embed_dim=4 * args.width,
            decoder_layers=max(2, args.layers), decoder_attention_heads=4,
            adaptive_input=True, adaptive_input_cutoff=cutoffs, adaptive_softmax_cutoff=cutoffs,
            adaptive_input_factor=factor, adaptive_softmax_factor=factor,
            tie_adaptive_weights=True, tie_adaptive_proj=True, tokens_per_sample=args.block,
        )  # fmt: skip
        cfg.max_target_positions, cfg.criterion = args.block, "adaptive_loss"
        model = transformer_lm.TransformerLanguageModel.build_model(cfg, task)
    return model, (AdaptiveLoss if adaptive else CrossEntropyCriterion)(task, False)


def batches(
    num_words: int, args: argparse.Namespace, device: str, seed: int = 1
) -> Callable[[], dict[str, Any]]:
    """Returns a function that draws a batch of text by Zipf's law."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(1, num_words - 3, dtype=torch.float64).reciprocal().cumsum(0)

    def draw() -> dict[str, Any]:
        size = args.batch_size, args.block + 1
        drawn = torch.rand(size, generator=generator, dtype=torch.float64) * steps[-1]
        text = (torch.searchsorted(steps, drawn) + 4).clamp(max=num_words - 1).to(device)
        lengths = torch.full(size[:1], args.block)
        target = text[:, 1:].contiguous()
        inputs = {"src_tokens": text[:, :-1].contiguous(), "src_lengths": lengths}
        return {"net_input": inputs, "target": target, "ntokens": target.numel()}

    return draw


def steps_of(
    system: str,
    model: Any,
    criterion: Any,
    draw: Callable[[], dict[str, Any]],
    args: argparse.Namespace,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Callable[[], Any], Callable[[], float]]:
    """Returns what computes the loss of a batch, and what does an update and returns its seconds.

    Args:
        system: its name.
        model: on its device, perhaps wrapped for several workers.
        criterion: that it is trained with.
        draw: a batch.
        args: the device and its numbers.
        clock: measures the seconds.
    """
    import fairseq.trainer  # noqa: F401  (training multiplies matrices in its own way)
    import torch

    optimizer = build_optimizer(list(model.parameters()), args)

    def loss_of(sample: dict[str, Any]) -> Any:
        inputs = sample["net_input"]
        if system in OURS:
            sample = {**sample, "net_input": {**inputs, "target_tokens": sample["target"]}}
        return criterion(model, sample)[0] / sample["ntokens"]

    def update() -> float:
        sample = draw()
        start = clock()
        optimizer.zero_grad()
        optimizer.backward(loss_of(sample))
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        if args.gpu:
            torch.cuda.synchronize()
        return clock() - start

    return lambda: loss_of(draw()), update


def build_optimizer(parameters: list[Any], args: argparse.Namespace) -> Any:
    """Builds fairseq's Adam; with ``--bf16`` it keeps weights in single precision too."""
    from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    config = FairseqAdamConfig(adam_betas="(0.9, 0.999)", lr=[0.002])
    if not args.bf16:
        return FairseqAdam(config, parameters)
    exact = FP16Optimizer.build_fp32_params(config, parameters, flatten=False)
    common = argparse.Namespace(bf16=True, fp16_scale_window=1)  # nothing is scaled
    cfg = argparse.Namespace(common=common, optimizer=config)
    return FP16Optimizer(cfg, parameters, FairseqAdam(config, exact), exact)


def worker(args: argparse.Namespace) -> None:
    """Measures one system and prints the figures as JSON."""
    import fairseq_compat

    fairseq_compat.install()
    import torch

    torch.set_num_threads(args.threads)
    system, num_words = args.worker[0], int(args.worker[1])
    device = "cuda" if args.gpu else "cpu"
    model, criterion = build(system, num_words, args)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model.train().to(device, dtype)
    clock = clock_of(device, args.threads)
    draw = batches(num_words, args, device)
    loss, update = steps_of(system, model, criterion, draw, args, clock)
    rate = matrix_rate(device, dtype, clock)
    operations = count_operations(system, lambda: loss().backward(), args)
    for _ in range(3):
        update()
    if args.parts:
        show_parts(update)
    times: list[float] = []
    while len(times) < 5 or sum(times) < args.seconds:
        times.append(update())
    seconds, words = statistics.median(times), args.batch_size * args.block
    rate = max(rate, matrix_rate(device, dtype, clock))  # a machine is not always equally fast
    print(json.dumps({
        "words_per_second": round(words / seconds),
        "updates": len(times),
        "megaflop_per_word": round(operations / words / 1e6, 3),
        "gigaflop_per_second": round(operations / seconds / 1e9, 1),
        "matrix_gigaflop_per_second": round(rate / 1e9, 1),
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20 if args.gpu
                          else memory("VmHWM")),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }))  # fmt: skip


def count_operations(system: str, run: Callable[[], None], args: argparse.Namespace) -> float:
    """Counts the multiplications and additions of matrix products, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    lstm_steps = {"paper": 2, "transformer_lm adaptive": 0}.get(system, 1)
    # torch counts no LSTM: four gates, each a product with the input and with the state, three
    # times over: forward, and backward to activations and to weights.
    words = args.batch_size * args.block
    lstm = 3 * words * lstm_steps * args.layers * 2 * 4 * 2 * args.width**2
    return float(counter.get_total_flops() + lstm)


def matrix_rate(device: str, dtype: Any, clock: Callable[[], float]) -> float:
    """Returns the operations a second of a product of large matrices."""
    import torch

    left = torch.randn(_MATRIX, _MATRIX, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        start = clock()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 2.0 * _MATRIX**3 / statistics.median(times[2:])


def show_parts(update: Callable[[], float]) -> None:
    """Prints where the time of three updates goes."""
    from torch.profiler import profile

    with profile() as found:
        for _ in range(3):
            update()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)


def measure(system: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one system in a process of its own."""
    found, told = measure_apart(__file__, [system, str(size)], args.threads, **KEEP_MEMORY)
    if args.parts:
        print(told)
    return {"words": size, "system": system, **found}


def summarise(results: list[dict[str, Any]]) -> str:
    """Returns the figures as a table."""
    lines = ["| words | system | words a second | of adaptive | of the matrix rate | peak GiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    speeds = {(record["words"], record["system"]): record.get("words_per_second")
              for record in results}  # fmt: skip
    for record in results:
        head = f"| {record['words']:,} | {record['system']} |"
        if "error" in record:
            lines.append(f"{head} {record['error']} | | | |")
            continue
        peer = speeds.get((record["words"], PEERS[1]))
        ratio = f"{record['words_per_second'] / peer:.2f} ×" if peer else ""
        share = record["gigaflop_per_second"] / record["matrix_gigaflop_per_second"]
        lines.append(
            f"{head} {record['words_per_second']:,} | {ratio} | {share:.0%} | "
            f"{record['peak_mib'] / 1024:.2f} |"
        )
    return "\n".join(lines)


def draw_curves(results: list[dict[str, Any]], path: Path) -> None:
    """Draws words a second over the size of the vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for system in SYSTEMS:
        points = [(record["words"], record["words_per_second"]) for record in results
                  if record["system"] == system and "error" not in record]  # fmt: skip
        if points:
            style = "--" if system in PEERS else "-"
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=system)
    axes.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel="words a second in training")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    args = parse()
    if args.worker:
        worker(args)
        return
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out", "worker", "parts", "sizes", "systems")}  # fmt: skip
    report = measure_each(
        args.out, settings, args.sizes, args.systems,
        lambda system, size: measure(system, size, args),
    )  # fmt: skip
    write_results(args.out, report, summarise(report["results"]))
    draw_curves(report["results"], args.out / "results.png")


if __name__ == "__main__":
    main()
