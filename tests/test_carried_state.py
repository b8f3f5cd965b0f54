"""Hidden states carried from batch to batch, through fairseq's commands."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from fairseq.optim import FairseqOptimizer
from fairseq.tasks import FairseqTask
from fairseq_run import TASK, read_log, run, train, train_arguments, valid_losses

from fairseq_lightrnn.core.network import RegularisedLSTM
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models.carried_state import CarriedState
from fairseq_lightrnn.tasks.lightrnn_language_modeling import LightRNNLanguageModelingTask
from fairseq_lightrnn.tasks.table_task import TableTask

CARRY = "--carry-hidden-state"
KINDS = [
    {"table_shape": "1d"},
    {"table_shape": "2d"},
    {"table_shape": "3d"},
    {"arch": "lightrnn_lm_gated", "num_layers": 2},
]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def unbroken_loss(path: Path, split: str, lanes: int) -> float:
    """Scores each lane of a split as one text; returns bits a word."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    sentences = data_utils.load_indexed_dataset(f"{task.args.data}/{split}", task.dictionary, None)
    text = torch.cat([torch.tensor([task.dictionary.eos()]), *sentences])
    loss, start = 0.0, 0
    decoder = model.eval().decoder
    for size in [len(part) for part in np.array_split(np.arange(len(text) - 1), lanes)]:
        lane = text[None, start : start + size + 1]
        with torch.no_grad():
            features = decoder(lane[:, :-1], target_tokens=lane[:, 1:])[0]
            loss -= decoder.words.log_probs(features, lane[:, 1:]).sum().item()
        start += size
    return loss / (len(text) - 1) / math.log(2)


def eval_loss(data: Path, path: Path, *flags: Any) -> float:
    """Returns the loss of fairseq-eval-lm in bits a word, unrounded."""
    import fairseq_cli.eval_lm as command

    results: dict[str, float] = {}
    original = command.eval_lm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "eval_lm", lambda **kw: results.update(original(**kw)) or results)
        run("eval-lm", data, *TASK, "--path", path, "--cpu", CARRY, "--num-workers", 0, *flags)
    return float(results["loss"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7])
def test_training_losses_are_those_of_unbroken_lanes(
    data: Path, tmp_path: Path, kind: dict[str, Any], length: int
) -> None:
    records = train(
        data, tmp_path, CARRY, lr=0.0, dropout=0.0, tokens_per_sample=length, batch_size=5,
        max_epoch=1, **kind,
    )  # fmt: skip
    logged = next(float(record["train_loss"]) for record in records if "train_wps" in record)
    expected = unbroken_loss(tmp_path / "checkpoint1.pt", "train", lanes=5)
    assert logged == pytest.approx(expected, abs=1e-4)


def test_random_blocks_have_the_losses_of_unbroken_lanes(data: Path, tmp_path: Path) -> None:
    """Whatever the blocks of an epoch; of one that is resumed in the middle, too."""
    flags = {"lr": 0.0, "dropout": 0.0, "tokens_per_sample": 9, "batch_size": 5, "max_epoch": 3}
    switches = [CARRY, "--random-block-lengths"]
    records = train(data, tmp_path, *switches, save_interval_updates=4, **flags)
    expected = unbroken_loss(tmp_path / "checkpoint1.pt", "train", lanes=5)
    losses = [float(record["train_loss"]) for record in records if "train_wps" in record]
    assert losses == pytest.approx([expected] * len(losses), abs=1e-4)
    updates = {record["epoch"]: record["train_num_updates"] for record in records
               if "train_wps" in record}  # fmt: skip
    ends = [0, *(int(updates[epoch]) for epoch in (1, 2, 3))]
    assert len(set(np.diff(ends))) > 1  # epochs differ in their number of blocks


@pytest.mark.parametrize("update_freq", [1, 2])
def test_longer_random_blocks_take_longer_steps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update_freq: int
) -> None:
    """As in arXiv 1708.02182, section 4.1; the mean where several blocks make a step."""
    rates: list[float] = []
    lengths: list[int] = []

    def spy(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(optimizer.get_lr())
        return step(optimizer, *args, **kwargs)

    def count(task: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(sample["target"].size(1))
        return train_step(task, sample, *args, **kwargs)

    step, train_step = FairseqOptimizer.step, LightRNNLanguageModelingTask.train_step
    monkeypatch.setattr(FairseqOptimizer, "step", spy)
    monkeypatch.setattr(LightRNNLanguageModelingTask, "train_step", count)
    records = train(
        data, tmp_path, CARRY, "--random-block-lengths", optimizer="sgd", lr=0.5, batch_size=5,
        tokens_per_sample=10, max_epoch=1, update_freq=update_freq,
    )  # fmt: skip
    groups = [lengths[i : i + update_freq] for i in range(0, len(lengths), update_freq)]
    assert len(set(lengths)) > 2
    assert rates == pytest.approx([0.5 * np.mean(group) / 10 for group in groups])
    assert {record["train_lr"] for record in records if "train_lr" in record} == {"0.5"}


def test_an_update_that_overflowed_has_no_part_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fairseq lowers the scale of the loss and goes on with the next batch."""
    monkeypatch.setattr(FairseqTask, "train_step", lambda *args: None)
    monkeypatch.setattr(TableTask, "optimizer_step", lambda *args: None)
    task = LightRNNLanguageModelingTask.__new__(LightRNNLanguageModelingTask)
    task.args = SimpleNamespace(
        tokens_per_sample=10, random_block_lengths=True, carry_hidden_state=True
    )
    task._block_lengths, task._update = [], (-1, None)
    rates: list[float] = []
    model = torch.nn.Module()
    optimizer = SimpleNamespace(
        get_lr=lambda: 1.0, set_lr=rates.append, scaler=SimpleNamespace(loss_scale=8.0)
    )
    task.train_step({"block_length": 40}, model, None, optimizer, 3)  # overflows
    optimizer.scaler.loss_scale = 4.0
    for length in (5, 15):
        task.train_step({"block_length": length}, model, None, optimizer, 3)
    task.optimizer_step(optimizer, None, 3)
    assert rates == [1.0, 1.0]  # for blocks of 10, and back
    task.train_step({"block_length": 20}, model, None, optimizer, 4)
    task.optimizer_step(optimizer, None, 4)
    assert rates[2:] == [2.0, 1.0]


def test_blocks_of_an_update_can_be_read_again_or_left_out() -> None:
    """As fairseq does where gradients overflow or are no numbers, and for want of memory."""
    carried = CarriedState().train()

    def read(block: int) -> float | None:
        """Reads a block, whose state is its number, and returns the state before it."""
        before = carried.before("train", block, 1)
        carried.after("train", block, (torch.full((1, 1, 1), block),) * 2)
        return None if before is None else before[0].item()

    assert [read(block) for block in (0, 1, 2)] == [None, 0, 1]
    carried.forget_update()
    for _ in range(2):
        assert [read(block) for block in (3, 4)] == [2, 3]
    assert read(6) == 4  # there was no memory for block 5
    carried.forget_update()
    with pytest.raises(UsageError, match="block 5 of 1 lanes of 'train' cannot follow block 6"):
        read(5)
    saved = carried.state_dict()
    carried.load_state_dict(saved)
    with pytest.raises(UsageError, match="block 9 of 1 lanes of 'train' cannot follow block 6"):
        read(9)
    assert [read(block) for block in (7, 0, 1)] == [6, None, 0]


def test_a_batch_without_memory_is_left_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward, calls = RegularisedLSTM.forward, []

    def sometimes(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.training)
        if sum(calls) == 3 and self.training:
            raise RuntimeError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(RegularisedLSTM, "forward", sometimes)
    train(data, tmp_path, CARRY, batch_size=4, max_epoch=1)
    assert "attempting to recover from OOM" in caplog.text
    assert (tmp_path / "checkpoint1.pt").exists()


def test_half_precision_resumes_in_mid_epoch(data: Path, tmp_path: Path) -> None:
    flags = {"batch_size": 4, "max_epoch": 2}
    train(data, tmp_path / "a", CARRY, "--bf16", save_interval_updates=3, **flags)
    middle = sorted((tmp_path / "a").glob("checkpoint_2_*.pt"))[0]
    train(data, tmp_path / "b", CARRY, "--bf16", restore_file=middle, **flags)
    one, two = (valid_losses(read_log(tmp_path / name))[-1] for name in "ab")
    assert one == pytest.approx(two, abs=0.01)


def test_fairseq_validate(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, CARRY, batch_size=4, max_epoch=1)
    path = tmp_path / "checkpoint1.pt"
    run("validate", data, *TASK, "--path", path, "--cpu", "--batch-size", 4, "--num-workers", 0)


def test_what_evaluation_cannot_do_is_refused(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, CARRY, batch_size=4, max_epoch=1)
    evaluate = ["eval-lm", data, *TASK, "--path", tmp_path / "checkpoint1.pt", "--cpu"]
    for flags, message in {
        ("--add-bos-token",): "--add-bos-token: the model was trained without it; leave it out",
        ("--num-shards", 2, "--shard-id", 1): "--num-shards 2: a carried hidden state reads",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run(*evaluate, *flags, "--num-workers", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_one_pass_whatever_the_batch(
    data: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    records = train(data, tmp_path, CARRY, max_epoch=2, **kind)
    path = tmp_path / "checkpoint2.pt"
    expected = unbroken_loss(path, "valid", lanes=1)
    assert valid_losses(records)[-1] == pytest.approx(expected, abs=1e-4)
    for flags in (
        ["--batch-size", 8],
        ["--batch-size", 3, "--tokens-per-sample", 5],
        ["--tokens-per-sample", 1, "--softmax-batch", 7],
    ):
        loss = eval_loss(data, path, "--gen-subset", "valid", *flags)
        assert loss == pytest.approx(expected, abs=1e-5)
    train_loss = eval_loss(data, path, "--gen-subset", "train", "--batch-size", 4)
    assert train_loss == pytest.approx(unbroken_loss(path, "train", lanes=1), abs=1e-5)


def test_no_state_leaks_into_an_epoch_or_split(data: Path, tmp_path: Path) -> None:
    """With nothing learnt, every epoch and every validation has the same loss."""
    records = train(data, tmp_path, CARRY, lr=0.0, dropout=0.0, max_epoch=3, batch_size=4)
    losses = [record["train_loss"] for record in records if "train_wps" in record]
    assert len(set(losses)) == 1
    assert len(set(valid_losses(records))) == 1


def test_resume_in_mid_epoch_restores_the_state(data: Path, tmp_path: Path) -> None:
    flags = {"batch_size": 4, "reallocate_epochs": 1, "update_freq": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(data, whole, CARRY, save_interval_updates=3, **flags)
    middle = sorted(whole.glob("checkpoint_2_*.pt"))[0]
    assert load(middle)["model"]["decoder.carried_state.states"].shape == (2, 1, 4, 8)
    train(data, resumed, CARRY, restore_file=middle, **flags)
    one, two = (load(folder / "checkpoint3.pt")["model"] for folder in (whole, resumed))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_reallocation_gathers_statistics_of_carried_states(data: Path, tmp_path: Path) -> None:
    """The loss before is that of the unbroken lanes, or of their beginning."""
    for number, flags in enumerate(({}, {"reallocation_words": 300})):
        folder = tmp_path / str(number)
        train(
            data, folder, CARRY, lr=0.0, dropout=0.0, batch_size=4, max_epoch=2,
            reallocate_epochs=1, **flags,
        )  # fmt: skip
        record = json.loads((folder / "reallocations.jsonl").read_text())
        logged = next(r for r in read_log(folder) if "train_wps" in r)
        if not flags:
            assert record["tokens"] == 874
            loss = float(logged["train_loss"]) * math.log(2)
            assert record["loss_before"] == pytest.approx(loss, abs=1e-4)
        else:
            assert 300 <= record["tokens"] < 350


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample-break-mode", "eos"], "--sample-break-mode eos: a carried hidden state crosses"),
        (["--add-bos-token"], "--add-bos-token and --carry-hidden-state exclude each other"),
        (
            ["--random-block-lengths", "--tokens-per-sample", "4"],
            "--tokens-per-sample 4: blocks of --random-block-lengths have at least 5 words",
        ),
        (["--tokens-per-sample", "0"], "--tokens-per-sample 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--batch-size", "-3"], "--batch-size -3: must be at least 1"),
        (
            ["--max-tokens", "100"],
            "--max-tokens has no effect with --carry-hidden-state, which reads --batch-size",
        ),
    ],
)
def test_flags_that_do_not_go_together(
    data: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    batch_size = None if "--max-tokens" in flags else 8
    with pytest.raises(SystemExit, match=message):
        train(data, tmp_path, CARRY, *flags, batch_size=batch_size)


def test_random_blocks_need_a_carried_state(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--random-block-lengths draws the blocks of --carry"):
        train(data, tmp_path, "--random-block-lengths")


def test_resuming_with_other_lanes_is_refused(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, CARRY, batch_size=4, save_interval_updates=3, max_epoch=1)
    middle = sorted(tmp_path.glob("checkpoint_1_*.pt"))[0]
    for flags in ({"batch_size": 3}, {"batch_size": 4, "tokens_per_sample": 13}):
        with pytest.raises(SystemExit, match="epoch of 4 lanes in blocks of 12 words, this"):
            train(data, tmp_path / "on", CARRY, restore_file=middle, max_epoch=1, **flags)


class TestWorkers:
    WORKERS = ["--distributed-world-size", 2, "--distributed-backend", "gloo",
               "--ddp-backend", "legacy_ddp"]  # fmt: skip

    def start(self, data: Path, save_dir: Path, *arguments: Any, **flags: Any) -> None:
        save_dir.mkdir(parents=True)
        command = [Path(sys.executable).parent / "fairseq-train"]
        command += train_arguments(data, save_dir, CARRY, *arguments, dropout=0.0, **flags)
        result = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]

    @pytest.mark.slow
    def test_two_workers_have_the_lanes_of_one(self, data: Path, tmp_path: Path) -> None:
        flags = {"max_epoch": 2, "reallocate_epochs": 1, "save_interval_updates": 7}
        train(data, tmp_path / "one", CARRY, batch_size=8, dropout=0.0, **flags)
        self.start(data, tmp_path / "two", *self.WORKERS, batch_size=4, **flags)
        one, two = (load(tmp_path / name / "checkpoint2.pt")["model"] for name in ("one", "two"))
        for name, value in one.items():
            if name != "decoder.carried_state.states":  # padding at the end of an epoch is read too
                torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)
        losses = [valid_losses(read_log(tmp_path / name)) for name in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], abs=2e-4)

        (middle,) = (tmp_path / "two").glob("checkpoint_2_14.pt")
        self.start(
            data, tmp_path / "on", *self.WORKERS, "--restore-file", middle, batch_size=4,
            max_epoch=2, reallocate_epochs=1,
        )  # fmt: skip
        resumed = load(tmp_path / "on" / "checkpoint2.pt")["model"]
        for name, value in two.items():
            assert torch.equal(value, resumed[name]), name

    @pytest.mark.slow
    def test_two_workers_draw_the_same_blocks_and_average(self, data: Path, tmp_path: Path) -> None:
        flags = {
            "max_epoch": 4, "optimizer": "nt_asgd", "nonmonotone_interval": 0, "lr": 4,
            "clip_norm": 0.2, "regularise": "awd,weight=0,component=0,activation=2,change=0",
        }  # fmt: skip
        random = "--random-block-lengths"
        self.start(data, tmp_path / "one", random, batch_size=8, **flags)
        self.start(data, tmp_path / "two", random, *self.WORKERS, batch_size=4, **flags)
        one, two = (load(tmp_path / name / "checkpoint4.pt") for name in ("one", "two"))
        averaged = [
            saved["last_optimizer_state"]["param_groups"][0]["averaged"] for saved in (one, two)
        ]
        assert averaged[0] == averaged[1] > 1
        for name, value in one["model"].items():
            if name != "decoder.carried_state.states":
                torch.testing.assert_close(value, two["model"][name], rtol=1e-3, atol=1e-4)
