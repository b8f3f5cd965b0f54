"""Draws the perplexity of a training run, epoch by epoch, with its reallocations marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["plot_perplexity"]


def plot_perplexity(
    path: str | Path,
    valid_ppl: Mapping[int, float],
    train_ppl: Mapping[int, float],
    reallocation_epochs: Sequence[int],
    test_ppl: float,
) -> None:
    """Writes the picture.

    Args:
        path: PNG file to write.
        valid_ppl: validation perplexity by epoch.
        train_ppl: training perplexity by epoch; measured with dropout and while learning.
        reallocation_epochs: the epochs after which words were reallocated.
        test_ppl: perplexity of the test split in the end.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for label, values, style in (
        ("training (with dropout)", train_ppl, "o--"),
        ("validation", valid_ppl, "o-"),
    ):
        epochs = sorted(values)
        axes.plot(epochs, [values[epoch] for epoch in epochs], style, label=label, markersize=4)
    for number, epoch in enumerate(reallocation_epochs):
        # A label that begins with an underscore stays out of the legend.
        label = "words reallocated" if number == 0 else "_again"
        axes.axvline(epoch + 0.5, color="tab:red", linestyle=":", label=label)
    axes.axhline(test_ppl, color="0.6", linewidth=1, label=f"test at the end: {test_ppl:.1f}")
    axes.set_yscale("log")
    # On a logarithmic axis the default labels are powers of ten, of which there may be none here.
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity per word")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
