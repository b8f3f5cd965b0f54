"""The page of all figures is that of the committed files, and the README's figures are theirs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import results_page  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page(), (
        "run python scripts/results_page.py"
    )


def test_figures_of_the_readme_are_those_of_the_benchmark() -> None:
    report = json.loads((ROOT / "examples/language_model/ladder.json").read_text())
    known = {(row["parameters"], row["test ppl"]) for row in rows(report)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = r"^\|[^|]*\|[^|]*\| ([0-9,]{6,}) \| \**([0-9.]+(?: ± [0-9.]+)?)"
    found = re.findall(row, readme, re.M)
    assert len(found) >= 5
    assert set(found) <= known


def rows(report: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {name.replace("_", " "): value for name, value in row.items()}
        for row in results_page.rows_of(report)
    ]


def test_means_and_ranges() -> None:
    assert results_page.joined([93.35, 93.95]) == "93.7 ± 0.3"
    assert results_page.joined([5]) == results_page.joined([5, 5]) == "5"
    assert results_page.joined(["int8", "int8"]) == "int8"
    record = {"scores": {"2016": {"BLEU": 35.25}}, "suggest_ms": [1.5, 2], "epoch": 3}
    assert results_page.flat(record) == {"2016 BLEU": 35.25, "suggest_ms": "1.5 / 2"}
