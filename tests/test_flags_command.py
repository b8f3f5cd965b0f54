"""``lightrnn-flags``: every flag of the plugin, once, and the committed page of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from fairseq import options
from fairseq_run import TASK, TRANSLATION, USER_DIR

from fairseq_lightrnn.commands.flags import main, markdown_page, text_page

PAGE = Path(__file__).parent.parent / "examples" / "FLAGS.md"


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def options_of(*flags: str) -> set[str]:
    """The flags that fairseq-train has once these are given."""
    with mock.patch.object(sys, "argv", ["fairseq-train", "data", *flags]):
        parser = options.get_training_parser()
        options.parse_args_and_arch(parser)
    return set(parser._option_string_actions)


def test_the_committed_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--markdown") == PAGE.read_text(encoding="utf-8"), (
        "lightrnn-flags --markdown > examples/FLAGS.md"
    )


@pytest.mark.parametrize("page", [text_page, markdown_page])
def test_each_flag_is_there_once(page) -> None:
    pattern = r"^  (--\S+)" if page is text_page else r"^\| `(--[a-z-]+)"
    named = [name for name in re.findall(pattern, page(), re.MULTILINE) if name != "--arch"]
    assert len(named) == len(set(named)) > 25
    flags = ["--optimizer", "nt_asgd", "--criterion", "two_component_cross_entropy"]
    for task, arch, stock in (
        (TASK, "lightrnn_lm_gated", ["language_modeling", "--arch", "lstm_lm"]),
        (TASK, "lightrnn_transformer_lm", ["language_modeling", "--arch", "transformer_lm"]),
        (TRANSLATION, "lightrnn_translation", ["translation", "--arch", "lstm"]),
        (TRANSLATION, "lightrnn_transformer", ["translation", "--arch", "transformer"]),
    ):
        ours = options_of(*task, "--arch", arch, *flags)
        theirs = options_of("--task", *stock, "--optimizer", "adam")
        new = ours - theirs
        assert len(new) > 10
        assert new <= set(named)


def test_presets_have_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    page = output(capsys, "--markdown")
    published = next(line for line in page.splitlines() if "| `lightrnn_lm_500` |" in line)
    assert "`--embed-dim 500 --hidden-size 500 --num-layers 2 --dropout 0.2`" in published
    gated = next(line for line in page.splitlines() if "| `lightrnn_lm_gated` |" in line)
    assert "`--word-dim 65 --output-ffn-dim 800`" in gated
    assert "`--word-dim 1 --further-tables 3 --output-ffn-dim 800`" in gated


def test_the_path_for_user_dir(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--user-dir") == f"{USER_DIR}\n"
    assert output(capsys).startswith(f"--user-dir {USER_DIR}\n")
    assert USER_DIR not in output(capsys, "--markdown")


def test_as_a_module(tmp_path: Path) -> None:
    """As on a command line, from any folder."""
    found = subprocess.run(
        [sys.executable, "-m", "fairseq_lightrnn", "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == text_page()
