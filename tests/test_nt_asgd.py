"""``--optimizer nt_asgd`` through fairseq's training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import CARRY, eval_lm, load, read_log, train, valid_losses
from test_averaged_sgd import slow_trigger
from torch import Tensor

from fairseq_lightrnn.optim.nt_asgd import NonmonotoneASGD, NonmonotoneASGDConfig

FLAGS: dict[str, Any] = {"lr": 8, "clip_norm": 0.5, "max_epoch": 5, "dropout": 0.2}
NT_ASGD = FLAGS | {"optimizer": "nt_asgd", "nonmonotone_interval": 0}


def iterates(checkpoint: dict[str, Any]) -> list[Tensor]:
    return [state["iterate"] for state in checkpoint["last_optimizer_state"]["state"].values()]


def parameters(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Returns what an optimiser has changed, in its order."""
    buffers = ("coordinates", "round", "epoch", "block", "states", "digest")
    return {
        name: value
        for name, value in checkpoint["model"].items()
        if name.rpartition(".")[2] not in buffers
    }


@pytest.fixture(scope="module")
def sgd(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by plain SGD, with a checkpoint of every update."""
    folder = tmp_path_factory.mktemp("sgd")
    train(data, folder, CARRY, optimizer="sgd", save_interval_updates=1, **FLAGS)
    return folder


def test_checkpoints_hold_the_mean_of_the_iterates_of_plain_sgd(
    data: Path, tmp_path: Path, sgd: Path
) -> None:
    records = train(data, tmp_path, CARRY, **NT_ASGD)
    losses = valid_losses(records)
    trigger = slow_trigger(losses, 0)
    assert trigger is not None and trigger < 4
    # What has not yet been averaged is plain SGD.
    assert losses[: trigger + 1] == valid_losses(read_log(sgd))[: trigger + 1]

    last = load(tmp_path / "checkpoint_last.pt")
    state = last["last_optimizer_state"]
    assert state["validation_losses"] == losses
    averaged = state["param_groups"][0]["averaged"]
    updates = last["optimizer_history"][-1]["num_updates"]
    assert averaged == 1 + updates * (4 - trigger) // 5
    paths = {
        int(match[1]): path
        for path in sgd.glob("checkpoint_*_*.pt")
        if (match := re.search(r"_(\d+)\.pt$", path.name))
    }
    paths |= {updates // 5 * epoch: sgd / f"checkpoint{epoch}.pt" for epoch in range(1, 6)}
    chosen = [parameters(load(paths[n])) for n in range(updates - averaged + 1, updates + 1)]
    assert len(chosen) == averaged
    for number, (name, value) in enumerate(parameters(last).items()):
        mean = torch.stack([iterate[name] for iterate in chosen]).mean(dim=0)
        torch.testing.assert_close(value, mean)
        assert torch.equal(iterates(last)[number], chosen[-1][name])  # training goes on from it

    path = tmp_path / "checkpoint_last.pt"
    loss = eval_lm(data, path, CARRY, "--gen-subset", "valid", "--batch-size", 8)
    assert loss == pytest.approx(losses[-1], abs=1e-4)


@pytest.mark.parametrize("epoch", [2, 5])
def test_resume_in_mid_epoch(data: Path, tmp_path: Path, epoch: int) -> None:
    """Before averaging begins and after, with every flag of regularisation."""
    flags = NT_ASGD | {
        "save_interval_updates": 5, "arch": "lightrnn_lm_gated", "num_layers": 2, "batch_size": 4,
        "regularise": "awd,weight=0.3,component=0.2", "nonmonotone_interval": 6,
        "reallocate_epochs": 3,
    }  # fmt: skip
    switches = [CARRY, "--random-block-lengths"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(data, whole, *switches, **flags)
    middle = sorted(whole.glob(f"checkpoint_{epoch}_*.pt"))[0]
    begun = load(middle)["last_optimizer_state"]["param_groups"][0]["averaged"] > 0
    assert begun is (epoch == 5)
    train(data, resumed, *switches, restore_file=middle, **flags)
    one, two = (load(folder / "checkpoint5.pt") for folder in (whole, resumed))
    assert one["last_optimizer_state"]["param_groups"][0]["averaged"] > 1
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    assert all(map(torch.equal, iterates(one), iterates(two)))
    for key in ("validation_losses", "param_groups"):
        assert one["last_optimizer_state"][key] == two["last_optimizer_state"][key]


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        ([], {"nonmonotone_interval": -1}, "--nonmonotone-interval -1: must not be negative"),
        ([], {"momentum": 1}, "--momentum 1.0: must be at least 0 and below 1"),
        ([], {"weight_decay": -0.1}, "--weight-decay -0.1: must be a number of at least 0"),
        (["--disable-validation"], {}, "--disable-validation: --optimizer nt_asgd waits for"),
    ],
)
def test_flags_that_have_no_meaning(
    data: Path, tmp_path: Path, arguments: list[str], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        train(data, tmp_path, *arguments, **NT_ASGD | flags)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "amp"])
def test_half_precision_is_refused(precision: str) -> None:
    others = {"lr": [1.0], "fp16": False, "bf16": False, "amp": False, "disable_validation": False}
    cfg = NonmonotoneASGDConfig(**others | {precision: True})
    with pytest.raises(ValueError, match=f"--{precision}: --optimizer nt_asgd averages"):
        NonmonotoneASGD(cfg, [torch.nn.Parameter(torch.zeros(1))])


def test_of_several_validation_subsets_the_first_counts(data: Path, tmp_path: Path) -> None:
    records = train(data, tmp_path, "--valid-subset", "valid,test", **NT_ASGD | {"max_epoch": 2})
    state = load(tmp_path / "checkpoint_last.pt")["last_optimizer_state"]
    assert state["validation_losses"] == valid_losses(records)
    assert len(state["validation_losses"]) == 2
    assert any("test_loss" in record for record in records)
