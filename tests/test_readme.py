"""Runs the commands of README.md, in order and in this process, on a tiny corpus."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from fairseq_run import TASK, TRANSLATION, run, write_pairs, write_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """Splits a block into commands; a pipe gives the one before it as input to the next."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def fairseq_commands() -> list[list[str]]:
    found = [command for block in blocks("bash") for command in commands(block)]
    return [command for command in found if any(part.startswith("fairseq-") for part in command)]


def test_fairseq_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, (split, sentences) in enumerate({"train": 400, "valid": 30, "test": 30}.items()):
        write_text(tmp_path / f"{split}.txt", sentences, seed)
        write_pairs(tmp_path, split, sentences // 4, seed)
        for ours, theirs in (("src", "en"), ("tgt", "de")):
            (tmp_path / f"{split}.{ours}").rename(tmp_path / f"{split}.{theirs}")
    names = []
    for command in fairseq_commands():
        if "|" in command:
            pipe = command.index("|")
            monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(command[1:pipe]) + "\n"))
            command = command[pipe + 1 :]
        name, *arguments = command
        names.append(name)
        arguments = [TASK[1] if part == "fairseq_lightrnn" else part for part in arguments]
        run(name.removeprefix("fairseq-"), *arguments)
    assert names == [
        "fairseq-preprocess",
        "fairseq-train",
        "fairseq-eval-lm",
        "fairseq-interactive",
        "fairseq-preprocess",
        "fairseq-train",
        "fairseq-generate",
    ]
    assert (tmp_path / "checkpoints" / "further_word_table3.txt").exists()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("H-0") for line in lines)
    assert "BLEU = " in lines[-1]
    (block,) = (block for block in blocks("python") if "from_pretrained" in block)
    exec(block, {})
    perplexity, words = capsys.readouterr().out.splitlines()
    assert float(perplexity) > 1
    assert len(eval(words)) == 5


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("python") if "WordTable" in block)
    scope: dict[str, object] = {}
    exec(block, scope)
    line = next(line for line in block.splitlines() if "coordinates_of" in line)
    expression, shown = line.split("#")
    assert repr(eval(expression, scope)) == shown.strip().replace("], [", "],\n       [")
    assert scope["shape"] == (3, 2)
    assert (tmp_path / "table.txt").exists()


def test_scripts_and_files_that_are_named_exist() -> None:
    for script in re.findall(r"bash (scripts/\S+\.sh)", README):
        assert (ROOT / script).is_file(), script
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_flags_that_are_named_exist() -> None:
    from fairseq import options

    known = set(options.get_preprocessing_parser()._option_string_actions)
    for task, arch in (
        (TASK, "lightrnn_lm"),
        (TRANSLATION, "lightrnn_translation"),
        (TRANSLATION, "lightrnn_transformer"),
    ):
        argv = ["fairseq-train", "data", *task, "--arch", arch]
        argv += ["--criterion", "two_component_cross_entropy", "--optimizer", "nt_asgd"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            parser = options.get_training_parser()
            options.parse_args_and_arch(parser)
        known |= set(parser._option_string_actions)
    table = "\n".join(line for line in README.splitlines() if line.startswith("| `--"))
    flags = re.findall(r"`(--[a-z-]+)", table)
    assert len(flags) > 15
    assert [flag for flag in flags if flag not in known] == []
