"""Tables and curves of benchmarks of language models, from what their runs left in a folder."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from side_by_side import Systems, collect, mean_and_spread, write_results

__all__ = ["summarise"]

# What seconds are called, by their name in the records.
CLOCKS = {"seconds": "s", "cpu_seconds": "CPU s"}


def markdown(systems: Systems, tokens: int, clock: str) -> str:
    """Returns the systems as a table, best test perplexity first."""
    lines = [
        "| system | parameters | of the vocabulary | epochs (best) | valid | test | seeds "
        f"| words/{CLOCKS[clock]} | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def rank(item: tuple[str, dict[str, dict[str, Any]]]) -> float:
        return statistics.mean(run["test_ppl"] for run in item[1].values())

    for system, runs in sorted(systems.items(), key=rank):
        every = list(runs.values())
        speed = statistics.mean(tokens / run[f"{clock}_per_epoch"] for run in every)
        best = "/".join(str(run["best_epoch"]) for run in every)
        lines.append(
            f"| {system} | {every[0]['parameters']:,} | {every[0]['vocabulary_parameters']:,} "
            f"| {every[0]['epochs']} ({best}) "
            f"| {mean_and_spread([run['valid_ppl'] for run in every])} "
            f"| {mean_and_spread([run['test_ppl'] for run in every])} | {len(every)} "
            f"| {speed:,.0f} | {max(run['peak_mib'] for run in every):,} |"
        )
    return "\n".join(lines)


def families(systems: Systems) -> dict[str, list[tuple[int, float]]]:
    """Returns parameters and mean test perplexity of systems that differ in a size alone.

    Those are ``own-8`` and ``own-64``, for example, under the name ``own``; the smallest first.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for system, runs in systems.items():
        name, _, size = system.rpartition("-")
        if name and size.isdecimal():
            perplexity = statistics.mean(run["test_ppl"] for run in runs.values())
            parameters = next(iter(runs.values()))["parameters"]
            found.setdefault(name, []).append((parameters, perplexity))
    return {
        name: sorted(places)
        for name, places in found.items()
        if len({parameters for parameters, _ in places}) > 1
    }


def draw(systems: Systems, path: Path, clock: str | None) -> None:
    """Draws validation perplexity against epochs and seconds, and test against parameters.

    Triangles mark reallocations, lines connect systems that differ in a size alone. Without a
    clock, nothing is drawn against seconds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 if clock is None else 3, figsize=(16, 5))
    by_epoch, by_size = axes[0], axes[-1]
    # Each panel of validations, and how much an epoch of a run is on its axis.
    panels = [(by_epoch, lambda run: 1)]
    by_epoch.set_xlabel("epochs")
    if clock is not None:
        panels.append((axes[1], lambda run: run[f"{clock}_per_epoch"]))
        axes[1].set_xlabel(f"{CLOCKS[clock]} of training")
        axes[1].set_xscale("log")
    colours = pyplot.get_cmap("tab10" if len(systems) <= 10 else "tab20").colors
    for colour, (system, runs) in zip(itertools.cycle(colours), systems.items(), strict=False):
        for run in runs.values():
            for panel, length in panels:
                places = [epoch * length(run) for epoch in run["valid_ppls"]]
                panel.plot(places, run["valid_ppls"].values(), color=colour, label=system)
                for epoch in run["reallocated_after"]:
                    ppl = run["valid_ppls"][epoch]
                    panel.plot(epoch * length(run), ppl, "v", color=colour, markersize=9)
            by_size.scatter(run["parameters"], run["test_ppl"], color=[colour])
            system = "_nolegend_"
    for name, places in families(systems).items():
        by_size.plot(*zip(*places, strict=True), color="grey", linewidth=1, zorder=0)
        by_size.annotate(name, places[-1], fontsize=8)
    by_size.set_xlabel("parameters")
    by_size.set_xscale("log")
    by_size.set_ylabel("test perplexity")
    for panel, _ in panels:
        panel.set_ylabel("validation perplexity")
        panel.set_yscale("log")
    for panel in axes:
        panel.grid(True, which="both", alpha=0.3)
    by_epoch.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def summarise(out: Path, description: dict[str, Any]) -> None:
    """Writes ``results.json``, ``results.md`` and ``results.png`` of all runs in a folder."""
    systems = collect(out)
    if not systems:
        return
    clock = description["clock"]
    # On a GPU that several processes share, seconds compare nothing.
    draw(systems, out / "results.png", None if description["shared"] else clock)
    table = markdown(systems, description["train_tokens"], clock)
    write_results(out, {**description, "systems": systems}, table)
