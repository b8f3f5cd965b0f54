"""fairseq's other ways to start, and several workers, each in processes of their own.

Importing torch and fairseq takes a process seconds, so each way to start is tried once, and what
one process makes is made in this one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import TASK, TRANSLATION, coordinates, load, run, train

SCRIPTS = Path(sys.executable).parent


def flags(save_dir: Path, *task: Any, **values: Any) -> list[str]:
    """Returns flags of a training that reallocates after its first epoch."""
    defaults = {
        "arch": "lightrnn_lm", "optimizer": "adam", "lr": 0.01, "embed-dim": 8, "hidden-size": 8,
        "batch-size": 8, "max-epoch": 2, "seed": 1, "num-workers": 0, "save-dir": save_dir,
        "dropout": 0.0, "reallocate-epochs": 1, "initial-table": "cooccurrence",
        "further-tables": 1, "label-smoothing": 0.1, "criterion": "two_component_cross_entropy",
    }  # fmt: skip
    defaults.update({name.replace("_", "-"): value for name, value in values.items()})
    task = task or (*TASK, "--tokens-per-sample", 12)
    given = {name: value for name, value in defaults.items() if value is not None}
    pairs = (part for name, value in given.items() for part in (f"--{name}", value))
    return [str(part) for part in ("--cpu", *task, *pairs)]


def translation_flags(save_dir: Path, **values: Any) -> list[str]:
    return flags(save_dir, *TRANSLATION, arch="lightrnn_translation_gated", **values)


def start(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def model_of(save_dir: Path) -> dict[str, torch.Tensor]:
    """Returns a trained model's state, in which words were reallocated once."""
    state = load(save_dir / "checkpoint_last.pt")["model"]
    (reallocations,) = (value for name, value in state.items() if name.endswith(".round"))
    assert reallocations == 1
    return state


def tokens_of(save_dir: Path) -> int:
    """Returns how many words the one reallocation's statistics are of."""
    (record,) = map(json.loads, (save_dir / "reallocations.jsonl").read_text().splitlines())
    assert record["tokens"] > 0
    return record["tokens"]


def assert_same_model(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert coordinates(one)
    for name, value in coordinates(one).items():
        assert torch.equal(value, other[name])
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one_worker(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that one worker does with --update-freq 2."""
    save_dir = tmp_path_factory.mktemp("one")
    run("train", data, *flags(save_dir, update_freq=2))
    return save_dir


@pytest.mark.parametrize(
    "backend",
    [  # the others are one, which torchrun's workers below have too
        "pytorch_ddp",
        pytest.param("legacy_ddp", marks=pytest.mark.slow),
        pytest.param("no_c10d", marks=pytest.mark.slow),
    ],
)
def test_two_workers_equal_one_with_update_freq_2(
    data: Path, tmp_path: Path, one_worker: Path, backend: str
) -> None:
    start(
        SCRIPTS / "fairseq-train", data, *flags(tmp_path), "--distributed-world-size", 2,
        "--distributed-backend", "gloo", "--ddp-backend", backend,
    )  # fmt: skip
    assert_same_model(model_of(one_worker), model_of(tmp_path))
    assert tokens_of(one_worker) == tokens_of(tmp_path)


def test_two_workers_of_torchrun_translate_as_one(pairs: Path, tmp_path: Path) -> None:
    """Decoder states of all workers together make the reallocation."""
    run("train", pairs, *translation_flags(tmp_path / "1", update_freq=2))
    start(
        SCRIPTS / "torchrun", "--standalone", "--nproc_per_node", 2,
        SCRIPTS / "fairseq-train", pairs, *translation_flags(tmp_path / "2"),
        "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp",
    )  # fmt: skip
    assert_same_model(model_of(tmp_path / "1"), model_of(tmp_path / "2"))
    assert tokens_of(tmp_path / "1") == tokens_of(tmp_path / "2")


def test_python_module(data: Path, tmp_path: Path, one_worker: Path) -> None:
    start(sys.executable, "-m", "fairseq_cli.train", data, *flags(tmp_path, update_freq=2))
    assert_same_model(model_of(one_worker), model_of(tmp_path))


HYDRA_CONFIG = """\
# @package _group_
common: {{seed: 1, cpu: true, user_dir: "{user_dir}"}}
task:
  _name: lightrnn_language_modeling
  data: ???
  tokens_per_sample: 12
  reallocate_epochs: "1"
model: {{_name: lightrnn_lm, embed_dim: 8, hidden_size: 8, dropout: 0.0, further_tables: "1"}}
criterion: {{_name: two_component_cross_entropy, label_smoothing: 0.1}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{lr: [0.01], max_epoch: 2, update_freq: [2]}}
dataset: {{batch_size: 8, num_workers: 0}}
"""


def test_hydra(data: Path, tmp_path: Path, one_worker: Path) -> None:
    """All architectures are in test_hydra.py, without the process."""
    (tmp_path / "lightrnn.yaml").write_text(HYDRA_CONFIG.format(user_dir=TASK[1]))
    start(
        SCRIPTS / "fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "lightrnn",
        f"task.data={data}", f"checkpoint.save_dir={tmp_path}", f"hydra.run.dir={tmp_path}/hydra",
    )  # fmt: skip
    assert_same_model(model_of(one_worker), model_of(tmp_path))


def test_mistakes_end_in_one_sentence(data: Path, tmp_path: Path) -> None:
    arguments = flags(tmp_path, criterion="adaptive_loss", label_smoothing=None)
    result = subprocess.run(
        [SCRIPTS / "fairseq-train", data, *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode != 0
    assert "use --criterion two_component_cross_entropy" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("size", [0, 300, -500])
def test_a_truncated_checkpoint_is_named(
    data: Path, tmp_path: Path, one_worker: Path, size: int
) -> None:
    path = tmp_path / "checkpoint_last.pt"
    shutil.copy(one_worker / path.name, path)
    path.write_bytes(path.read_bytes()[:size])
    message = "checkpoint_last.pt: the checkpoint is truncated"
    with pytest.raises(SystemExit, match=message):
        train(data, tmp_path, max_epoch=2)
    with pytest.raises(SystemExit, match=message):
        run("eval-lm", data, *TASK, "--path", path, "--cpu")
