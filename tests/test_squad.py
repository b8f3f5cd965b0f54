"""Questions and answers out of SQuAD's format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "question_answering" / "squad.py"
QUESTIONS = [
    {"question": "Who wrote it?", "answers": [{"text": "Li, et al."}, {"text": "Li"}]},
    {"question": "When was it not?", "answers": [], "is_impossible": True},
    {"question": "Since 2016?", "answers": [{"text": "Yes"}], "is_impossible": False},
]


def run(squad: Path, prefix: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, squad, prefix], capture_output=True, text=True, check=False
    )


def test_questions_with_an_answer_become_pairs(tmp_path: Path) -> None:
    squad = tmp_path / "squad.json"
    paragraphs = [{"context": "…", "qas": QUESTIONS}]
    squad.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    done = run(squad, tmp_path / "new" / "train")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 questions")
    assert (tmp_path / "new" / "train.q").read_text() == "who wrote it ?\nsince 2016 ?\n"
    assert (tmp_path / "new" / "train.a").read_text() == "li , et al .\nyes\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not in SQuAD's format"), ("[]", "not in SQuAD's"), ('{"data": []}', "no question")],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    squad = tmp_path / "squad.json"
    squad.write_text(text)
    done = run(squad, tmp_path / "train")
    assert done.returncode == 1
    assert str(squad) in done.stderr and message in done.stderr
    assert not list(tmp_path.glob("train*"))
