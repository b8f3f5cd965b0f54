"""fairseq's other ways to start, and several workers, each in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import TASK, run, train

SCRIPTS = Path(sys.executable).parent


def flags(save_dir: Path, **values: Any) -> list[str]:
    defaults = {
        "arch": "lightrnn_lm", "criterion": "two_component_cross_entropy", "optimizer": "adam",
        "lr": 0.01, "embed-dim": 8, "hidden-size": 8, "tokens-per-sample": 12, "batch-size": 8,
        "max-epoch": 2, "seed": 1, "num-workers": 0, "save-dir": save_dir, "dropout": 0.0,
        "reallocate-epochs": 1, "initial-table": "cooccurrence", "further-tables": 1,
    }  # fmt: skip
    defaults.update({name.replace("_", "-"): value for name, value in values.items()})
    switches = ["--cpu", "--reallocation-regather"]
    return [*switches, *TASK, *(str(p) for n, v in defaults.items() for p in (f"--{n}", v))]


def start(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def model_of(save_dir: Path) -> dict[str, torch.Tensor]:
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=False)["model"]
    assert state["decoder.reallocation_round"] == 1
    return state


@pytest.fixture(scope="module")
def one_worker(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The model that one worker makes with --update-freq 2."""
    save_dir = tmp_path_factory.mktemp("one")
    start(SCRIPTS / "fairseq-train", data, *flags(save_dir, update_freq=2))
    return model_of(save_dir)


def assert_same_model(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert torch.equal(one["decoder.table.coordinates"], other["decoder.table.coordinates"])
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


def test_two_workers_equal_one_with_update_freq_2(
    data: Path, tmp_path: Path, one_worker: dict[str, torch.Tensor]
) -> None:
    start(
        SCRIPTS / "fairseq-train", data, *flags(tmp_path), "--distributed-world-size", 2,
        "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp",
    )  # fmt: skip
    assert_same_model(one_worker, model_of(tmp_path))
    (record,) = map(json.loads, (tmp_path / "reallocations.jsonl").read_text().splitlines())
    assert record["tokens"] > 0


def test_torchrun(data: Path, tmp_path: Path, one_worker: dict[str, torch.Tensor]) -> None:
    start(
        SCRIPTS / "torchrun", "--standalone", "--nproc_per_node", 2,
        SCRIPTS / "fairseq-train", data, *flags(tmp_path), "--distributed-backend", "gloo",
        "--ddp-backend", "legacy_ddp",
    )  # fmt: skip
    assert_same_model(one_worker, model_of(tmp_path))


def test_python_module(data: Path, tmp_path: Path, one_worker: dict[str, torch.Tensor]) -> None:
    start(sys.executable, "-m", "fairseq_cli.train", data, *flags(tmp_path, update_freq=2))
    assert_same_model(one_worker, model_of(tmp_path))


def translation_flags(save_dir: Path, **values: Any) -> list[str]:
    task = ["--task", "lightrnn_translation", "--arch", "lightrnn_translation_gated"]
    return [*without(flags(save_dir, **values), "task", "arch", "tokens-per-sample"), *task]


def without(arguments: list[str], *names: str) -> list[str]:
    """Leaves flags out, each with its value."""
    for name in names:
        place = arguments.index(f"--{name}")
        arguments = arguments[:place] + arguments[place + 2 :]
    return arguments


def test_two_workers_translate_as_one(pairs: Path, tmp_path: Path) -> None:
    """Decoder states of all workers together make the reallocation."""
    start(SCRIPTS / "fairseq-train", pairs, *translation_flags(tmp_path / "1", update_freq=2))
    start(
        SCRIPTS / "fairseq-train", pairs, *translation_flags(tmp_path / "2"),
        "--distributed-world-size", 2, "--distributed-backend", "gloo", "--ddp-backend",
        "legacy_ddp",
    )  # fmt: skip
    assert_same_model(model_of(tmp_path / "1"), model_of(tmp_path / "2"))
    lines = [(tmp_path / name / "reallocations.jsonl").read_text() for name in "12"]
    assert len({json.loads(line)["tokens"] for line in lines}) == 1


HYDRA_CONFIG = """\
# @package _group_
common: {{seed: 1, cpu: true, user_dir: "{user_dir}"}}
task:
  _name: lightrnn_language_modeling
  data: ???
  tokens_per_sample: 12
  reallocate_epochs: "1"
  reallocation_regather: true
model: {{_name: lightrnn_lm, embed_dim: 8, hidden_size: 8, dropout: 0.0, further_tables: "1"}}
criterion: {{_name: two_component_cross_entropy}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{lr: [0.01], max_epoch: 2, update_freq: [2]}}
dataset: {{batch_size: 8, num_workers: 0}}
"""


def test_hydra(data: Path, tmp_path: Path, one_worker: dict[str, torch.Tensor]) -> None:
    (tmp_path / "lightrnn.yaml").write_text(HYDRA_CONFIG.format(user_dir=TASK[1]))
    start(
        SCRIPTS / "fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "lightrnn",
        f"task.data={data}", f"checkpoint.save_dir={tmp_path}", f"hydra.run.dir={tmp_path}/hydra",
    )  # fmt: skip
    assert_same_model(one_worker, model_of(tmp_path))


def test_mistakes_end_in_one_sentence(data: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [SCRIPTS / "fairseq-train", data, *flags(tmp_path, criterion="cross_entropy")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode != 0
    assert "use --criterion two_component_cross_entropy" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("size", [0, 300, -500])
def test_a_truncated_checkpoint_is_named(data: Path, tmp_path: Path, size: int) -> None:
    train(data, tmp_path, max_epoch=1)
    path = tmp_path / "checkpoint_last.pt"
    path.write_bytes(path.read_bytes()[:size])
    message = "checkpoint_last.pt: the checkpoint is truncated"
    with pytest.raises(SystemExit, match=message):
        train(data, tmp_path, max_epoch=2)
    with pytest.raises(SystemExit, match=message):
        run("eval-lm", data, *TASK, "--path", path, "--cpu")


TRANSLATION_CONFIG = """\
# @package _group_
common: {{seed: 1, cpu: true, user_dir: "{user_dir}"}}
task:
  _name: lightrnn_translation
  data: ???
  reallocate_epochs: "1"
model: {{_name: lightrnn_translation, embed_dim: 8, hidden_size: 8, composition: gated}}
criterion: {{_name: two_component_cross_entropy, label_smoothing: 0.1}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{lr: [0.01], max_epoch: 2}}
dataset: {{batch_size: 8, num_workers: 0}}
"""


def test_hydra_trains_translations(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "lightrnn.yaml").write_text(TRANSLATION_CONFIG.format(user_dir=TASK[1]))
    start(
        SCRIPTS / "fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "lightrnn",
        f"task.data={pairs}", f"checkpoint.save_dir={tmp_path}", f"hydra.run.dir={tmp_path}/hydra",
    )  # fmt: skip
    model_of(tmp_path)
