"""fairseq's stock commands, models and tasks, each in a process of its own.

All must exit with 0 and print no warning.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import run

import fairseq_compat

SCRIPTS = Path(sys.executable).parent
WITHOUT_FIX = """
import sys
import fairseq_compat
for module in ("fairseq.distributed.utils", "fairseq.models.distributed_fairseq_model"):
    fairseq_compat.FIXES[module] = ()
fairseq_compat.install()
from fairseq_cli.train import cli_main
cli_main()
"""
BY_HAND = """
import fairseq_compat
fairseq_compat.install()
from fairseq_cli.train import cli_main
if __name__ == "__main__":
    cli_main()
"""
LSTM = [
    "--task", "language_modeling", "--arch", "lstm_lm", "--decoder-embed-dim", "8",
    "--decoder-hidden-size", "8", "--decoder-out-embed-dim", "8", "--tokens-per-sample", "20",
]  # fmt: skip
TRANSFORMER = [
    "--task", "translation", "--arch", "transformer", "--encoder-layers", "1",
    "--decoder-layers", "1", "--encoder-embed-dim", "8", "--decoder-embed-dim", "8",
    "--encoder-ffn-embed-dim", "8", "--decoder-ffn-embed-dim", "8",
    "--encoder-attention-heads", "2", "--decoder-attention-heads", "2",
]  # fmt: skip
TRAINING = [
    "--cpu", "--optimizer", "adam", "--lr", "0.01", "--max-tokens", "200", "--seed", "3",
    "--no-progress-bar",
]  # fmt: skip


def start(*command: Any, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def succeed(*command: Any, **options: str) -> str:
    """Runs a command that must end well and without warnings, and returns what it prints."""
    result = start(*command, **options)
    printed = result.stdout + result.stderr
    assert result.returncode == 0, printed[-3000:]
    assert "Warning" not in printed, printed
    return printed


def fairseq(command: str, *arguments: Any, **options: str) -> str:
    return succeed(SCRIPTS / f"fairseq-{command}", *arguments, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up parallel text: train.a and train.b, valid.a and so on."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(1)
    for split, sentences in {"train": 60, "valid": 10, "test": 10}.items():
        lines = [
            [rng.choice("abcdefgh") for _ in range(rng.randint(4, 9))] for _ in range(sentences)
        ]
        for side, words in {"a": lines, "b": [line[::-1] for line in lines]}.items():
            (folder / f"{split}.{side}").write_text("\n".join(map(" ".join, words)) + "\n")
    return folder


def splits(folder: Path, end: str = "") -> list[Any]:
    return [
        part
        for split in ("train", "valid", "test")
        for part in (f"--{split}pref", folder / f"{split}{end}")
    ]


@pytest.fixture(scope="module")
def monolingual(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("monolingual")
    run("preprocess", "--only-source", *splits(text, ".a"), "--destdir", data)
    return data


def weights(save_dir: Path) -> dict[str, torch.Tensor]:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(save_dir / "checkpoint_last.pt"))
    return state["model"]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_cpu_workers_train_with_plain_flags(monolingual: Path, tmp_path: Path) -> None:
    printed = fairseq(
        "train", monolingual, *LSTM, *TRAINING, "--max-epoch", 1, "--save-dir", tmp_path,
        "--distributed-world-size", 2,
    )  # fmt: skip
    assert "training on 2 devices" in printed
    assert weights(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="fairseq would count the GPUs")
def test_two_cpu_workers_do_not_train_without_the_fix(monolingual: Path, tmp_path: Path) -> None:
    training = [monolingual, *LSTM, *TRAINING, "--max-epoch", 1, "--save-dir", tmp_path / "out"]
    command = [sys.executable, "-c", WITHOUT_FIX, *training, "--distributed-world-size", 2]
    refused = start(*command)
    assert refused.returncode != 0
    assert "available devices" in refused.stderr
    if torch.cuda.device_count() == 0:
        silent = start(*command, "--distributed-init-method", "tcp://localhost:29519")
        assert silent.returncode == 0
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_ways_to_start_two_workers_agree(monolingual: Path, tmp_path: Path) -> None:
    training = [monolingual, *LSTM, *TRAINING, "--max-epoch", 1]
    two = ["--distributed-world-size", 2]
    fairseq("train", *training, *two, "--save-dir", tmp_path / "plain")
    fairseq("train", *training, *two, "--save-dir", tmp_path / "legacy", "--ddp-backend",
            "legacy_ddp")  # fmt: skip
    succeed(sys.executable, "-m", "fairseq_cli.train", *training, *two, "--save-dir",
            tmp_path / "module")  # fmt: skip
    succeed(SCRIPTS / "torchrun", "--nproc_per_node", 2, "--master-port", 29521,
            SCRIPTS / "fairseq-train", *training, "--save-dir", tmp_path / "torchrun")  # fmt: skip

    script = tmp_path / "by_hand.py"
    script.write_text(BY_HAND)
    path = [str(Path(fairseq_compat.__file__).parent.parent)]
    path += [entry for entry in sys.path if entry.endswith("site-packages")]
    succeed(sys._base_executable, "-s", script, *training, *two, "--save-dir",
            tmp_path / "by_hand", PYTHONPATH=os.pathsep.join(path))  # fmt: skip

    plain = weights(tmp_path / "plain")
    for other in ("legacy", "module", "torchrun", "by_hand"):
        assert_same(plain, weights(tmp_path / other))


@pytest.mark.slow
def test_two_workers_resume(monolingual: Path, tmp_path: Path) -> None:
    training = [monolingual, *LSTM, *TRAINING, "--distributed-world-size", 2, "--max-epoch"]
    fairseq("train", *training, 2, "--save-dir", tmp_path / "whole")
    fairseq("train", *training, 1, "--save-dir", tmp_path / "parts")
    printed = fairseq("train", *training, 2, "--save-dir", tmp_path / "parts")
    assert "Loaded checkpoint" in printed
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_language_model_commands(text: Path, monolingual: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    fairseq("preprocess", "--only-source", *splits(text, ".a"), "--destdir", data, "--workers", 2)
    for name in ("dict.txt", "train.bin", "train.idx", "valid.bin", "test.bin"):
        assert (data / name).read_bytes() == (monolingual / name).read_bytes()
    fairseq("train", monolingual, *LSTM, *TRAINING, "--max-epoch", 1, "--save-dir", tmp_path)
    checkpoint = ["--path", tmp_path / "checkpoint_best.pt", "--cpu"]
    assert "Perplexity" in fairseq("eval-lm", monolingual, *checkpoint, "--gen-subset", "test")
    task = ["--task", "language_modeling"]
    printed = fairseq("interactive", monolingual, *task, *checkpoint, stdin="a b\nc\n")
    assert "H-1\t" in printed
    printed = fairseq(
        "generate", monolingual, *task, *checkpoint, "--sample-break-mode", "eos",
        "--prefix-size", 2, "--max-len-b", 10, "--batch-size", 4,
    )  # fmt: skip
    assert "Generate test with beam=5" in printed
    printed = fairseq("validate", monolingual, *task, *checkpoint, "--max-tokens", 200)
    assert "valid on 'valid' subset" in printed


@pytest.mark.slow
@pytest.mark.parametrize("command", [["fairseq-hydra-train"], ["-m", "fairseq_cli.hydra_train"]])
def test_hydra_train(command: list[str], monolingual: Path, tmp_path: Path) -> None:
    command = [sys.executable, *command] if command[0] == "-m" else [str(SCRIPTS / command[0])]
    succeed(
        *command, "task=language_modeling", f"task.data={monolingual}", "model=transformer_lm",
        "model.decoder_layers=1", "model.decoder_embed_dim=8", "model.decoder_input_dim=8",
        "model.decoder_output_dim=8", "model.decoder_attention_heads=2",
        "criterion=cross_entropy", "optimizer=adam", "lr_scheduler=fixed", "common.cpu=true",
        "dataset.max_tokens=200", "optimization.lr=[0.01]", "optimization.max_epoch=1",
        "task.tokens_per_sample=20", f"checkpoint.save_dir={tmp_path}", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert weights(tmp_path)


@pytest.mark.slow
def test_translation_commands(text: Path, tmp_path: Path) -> None:
    data, save_dir = tmp_path / "data", tmp_path / "out"
    fairseq("preprocess", "-s", "a", "-t", "b", *splits(text), "--destdir", data)
    training = [
        "train", data, *TRANSFORMER, *TRAINING, "--save-dir", save_dir, "--eval-bleu",
        "--eval-bleu-args", '{"max_len_b": 10}', "--best-checkpoint-metric", "bleu",
        "--maximize-best-checkpoint-metric", "--max-epoch",
    ]  # fmt: skip
    fairseq(*training, 1)
    assert "Loaded checkpoint" in fairseq(*training, 2)
    checkpoint = ["--path", save_dir / "checkpoint_last.pt", "--cpu", "--max-len-b", 10]
    printed = fairseq("generate", data, *checkpoint, "--batch-size", 4, "--scoring", "sacrebleu")
    assert "Generate test with beam=5: BLEU" in printed
    assert "H-0\t" in fairseq("interactive", data, *checkpoint, stdin="a b c\n")
    score = ["-s", text / "test.b", "-r", text / "test.b", "--sacrebleu"]
    assert "BLEU = 100.00" in fairseq("score", *score)
    assert "BLEU = 100.00" in succeed(sys.executable, "-m", "fairseq_cli.score", *score)
