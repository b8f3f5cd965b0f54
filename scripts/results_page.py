"""Writes ``examples/RESULTS.md``: every figure that a benchmark committed, and where it is from.

    python scripts/results_page.py

Each JSON file of a folder of ``examples`` becomes a section: commit, machine, versions, checksums
of the texts, then a table of its runs, means of seeds with half of their range. Pages of the
folders tell what the figures mean and how to repeat them; the words here are theirs alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from side_by_side import mean_and_spread

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PAGE = EXAMPLES / "RESULTS.md"
# Of runs: what a training is not compared by, or what stands in another column.
LEFT_OUT = {
    "epoch", "best_epoch", "vocabulary_parameters", "signatures", "bootstrap", "valid_ppls",
    "reallocated_after", "import_seconds", "first", "unknown_words", "log", "command", "sha256",
    "valid_ppl_after_updates",
}  # fmt: skip
HEADER = """# All figures

What benchmarks measured, from the files that they wrote; `python scripts/results_page.py` makes
this page. The page of each folder says what was compared, by which commands, and what did not help.
± is half the range of the seeds.
"""


def flat(record: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Returns the numbers and words of a record, those of records within it under joined names."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{before} {key}".strip()
        if key in LEFT_OUT:
            continue
        if isinstance(value, dict):
            found |= flat(value, "" if key == "scores" else name)
        elif isinstance(value, list) and all(isinstance(one, (int, float)) for one in value):
            found[name] = " / ".join(map(shown, value))
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            found[name] = value
    return found


def shown(value: Any) -> str:
    """Returns a figure as a cell of a table."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) > 9999 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def joined(values: list[Any]) -> str:
    """Returns the mean of numbers, with half of their range; of words, those that differ."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    if not numbers or len(numbers) < len(values):
        return shown(" ".join(dict.fromkeys(map(str, values))))
    if len(set(numbers)) == 1:
        return shown(numbers[0])
    return mean_and_spread(numbers)


def rows_of(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the runs of a report as rows of a table, runs of several seeds as one."""
    rows = []
    for key in ("results", "steps"):
        for record in report.get(key, []):
            rows.append({name: shown(value) for name, value in flat(record).items()})
    for key in ("first_words", "first_half"):
        if key in report:
            rows += _named(key.replace("_", " "), report[key])
    for key in ("instances", "runs"):
        for name, record in report.get(key, {}).items():
            rows += _named(name, record)
    for system, runs in report.get("systems", {}).items():
        seeds = runs if all(str(seed).isdigit() for seed in runs) else {"": runs}
        known = [flat(run) for run in seeds.values()]
        row = {"system": shown(system), "seeds": " ".join(seeds) or "1"}
        for name in known[0]:
            row[name] = joined([run[name] for run in known if name in run])
        rows.append(row)
    return rows


def _named(name: str, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns a row for a named record, or one for each solver of it."""
    solvers = record.get("solvers") or {"": record}
    rows = []
    for solver, found in solvers.items():
        row = {"name": shown(name), **({"solver": shown(solver)} if solver else {})}
        rows.append(row | {key: shown(value) for key, value in flat(found).items()})
    return rows


def table(rows: list[dict[str, str]]) -> Iterable[str]:
    """Yields the lines of a table with a column for whatever any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    yield "| " + " | ".join(name.replace("_", " ") for name in names) + " |"
    yield "|---" * len(names) + "|"
    for row in rows:
        yield "| " + " | ".join(row.get(name, "") for name in names) + " |"


def origin(report: Mapping[str, Any]) -> Iterable[str]:
    """Yields where the figures of a report are from."""
    commits = report.get("commit") or report.get("commits") or "not kept"
    if isinstance(commits, dict):
        commits = "; ".join(f"{name}: {commit}" for name, commit in commits.items())
    yield f"Commit {commits}."
    machine = report.get("machine") or {}
    parts = [f"{machine['cores']} cores"] if "cores" in machine else []
    parts += [machine["gpu"]] if "gpu" in machine else []
    versions = report.get("versions") or {key: machine[key] for key in machine if key != "cores"}
    parts += [f"{name} {number}" for name, number in versions.items() if name != "processor"]
    if parts:
        yield f"Machine: {', '.join(parts)}."
    sums = report.get("sha256") or {}
    sums = sums if isinstance(sums, dict) else {"text": sums}
    if sums:
        known = ", ".join(f"{name} {value}" for name, value in sums.items())
        yield f"SHA-256 of the texts begins with: {known}."
    totals = {
        name.replace("_", " "): value
        for name, value in report.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    } | flat({"exponent of": report.get("exponents", {})})
    if totals:
        told = ", ".join(f"{name} {shown(value)}" for name, value in totals.items())
        yield f"As a whole: {told}."
    if isinstance(report.get("note"), str):
        yield f"Note: {report['note']}."


def page() -> str:
    """Returns the whole page."""
    lines = [HEADER]
    for folder in sorted(path for path in EXAMPLES.iterdir() if path.is_dir()):
        reports = sorted(folder.glob("*.json"))
        if reports:
            lines += [f"## [{folder.name}]({folder.name}/README.md)", ""]
        for path in reports:
            report = json.loads(path.read_text(encoding="utf-8"))
            lines += [f"### [{path.name}]({folder.name}/{path.name})", "", *origin(report), ""]
            rows = rows_of(report)
            lines += [*table(rows), ""] if rows else []
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
