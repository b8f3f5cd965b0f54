"""Training, resuming and evaluating language models through fairseq's commands."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_run import (
    CARRY,
    TASK,
    assert_same_training,
    coordinates,
    eval_lm,
    load,
    preprocess,
    read_log,
    run,
    symbols,
    table_of,
    train,
    train_arguments,
    valid_losses,
    valid_records,
    write_text,
)

from fairseq_lightrnn.core.table import WordTable

PREDICTED = "decoder.core.head.softmax.table.coordinates"
READ = "decoder.core.reader.seats.coordinates"
SHAPES = [("1d", (48,)), ("2d", (7, 7)), ("3d", (4, 4, 3)), ("6x9", (6, 9)), ("4x4x3", (4, 4, 3))]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three epochs with a reallocation after the first."""
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, reallocate_epochs=1, save_interval_updates=4)
    return save_dir


class TestTraining:
    def test_loss_falls_and_components_are_logged(self, trained: Path) -> None:
        records = valid_records(read_log(trained))
        losses = valid_losses(records)
        assert losses[-1] < losses[0]
        for record in records:
            assert float(record["valid_row_loss"]) + float(
                record["valid_column_loss"]
            ) == pytest.approx(float(record["valid_loss"]), abs=2e-4)
            assert float(record["valid_row_ppl"]) == pytest.approx(
                2 ** float(record["valid_row_loss"]), abs=0.01
            )

    def test_reallocation_is_reported_and_lowers_the_cost(self, trained: Path) -> None:
        (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        assert (record["epoch"], record["round"], record["objective"]) == (1, 1, "true-loss")
        assert record["loss_after"] < record["loss_before"]
        assert record["predicted_gain"] > 0 and record["gap"] >= 0
        assert 0 < record["moved"] <= record["words"]
        assert set(record["seconds"]) == {"statistics", "costs", "solve", "check", "total"}
        assert 0 < record["share_of_training"] < 1

    def test_loss_before_is_the_training_loss(
        self, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        """The first checkpoint, evaluated on the training split, has the cost that was logged."""
        (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        records = train(
            data, tmp_path, "--reset-optimizer", "--reset-dataloader", "--reset-meters",
            restore_file=trained / "checkpoint1.pt", lr=0.0, max_epoch=1, valid_subset="train",
        )  # fmt: skip
        (valid,) = [r for r in records if "train_wps" in r and "train_lr" not in r]
        loss = float(valid["train_loss"]) * math.log(2)
        assert record["loss_before"] == pytest.approx(loss, abs=1e-4)

    def test_checkpoints_and_files_hold_the_table(self, data: Path, trained: Path) -> None:
        first, last = load(trained / "checkpoint1.pt"), load(trained / "checkpoint_last.pt")
        assert list(coordinates(first["model"])) == [READ]
        before = table_of(trained / "checkpoint1.pt", (7, 7))
        after = table_of(trained / "checkpoint_last.pt", (7, 7))
        assert before != after
        words = symbols(data)
        assert WordTable.load(trained / "word_table.epoch0.txt", words) == before
        assert WordTable.load(trained / "word_table.epoch1.txt", words) == after
        assert WordTable.load(trained / "word_table.txt", words) == after
        assert first["model"]["decoder.reallocations.round"] == 0
        assert last["model"]["decoder.reallocations.round"] == 1
        assert last["model"]["decoder.reallocations.epoch"] == 1

    def test_statistics_of_part_of_the_words(
        self, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        flags = {"reallocate_epochs": 1, "restore_file": trained / "checkpoint1.pt"}
        train(data, tmp_path, max_epoch=2, reallocation_words=437, **flags)
        record = json.loads((tmp_path / "reallocations.jsonl").read_text())
        assert 300 < record["tokens"] < 600  # half of 874, in whole batches
        assert record["loss_after"] <= record["loss_before"]

    @pytest.mark.parametrize("memory", [1.0, 0.5e-5, 1e-6])
    def test_bounded_memory_gives_the_same_table(
        self, data: Path, trained: Path, tmp_path: Path, memory: float
    ) -> None:
        """float64 and float32 in memory and float32 in a file: 12.7 kB, 6.5 kB, 0.4 kB."""
        folders = {None: tmp_path / "all", memory: tmp_path / "bounded"}
        for bound, folder in folders.items():
            train(
                data, folder, max_epoch=2, reallocate_epochs=1, reallocation_memory=bound,
                reallocation_objective="row-first", restore_file=trained / "checkpoint1.pt",
            )  # fmt: skip
        one, other = (table_of(f / "checkpoint2.pt", (7, 7)) for f in folders.values())
        assert one == other
        assert not list(folders[memory].glob("statistics.*"))

    def test_little_memory_moves_frequent_words_alone(self, data: Path, tmp_path: Path) -> None:
        flags = {"reallocate_epochs": 1, "max_epoch": 2, "initial_table": "random"}
        train(data, tmp_path / "all", **flags)
        train(data, tmp_path / "little", reallocation_memory=4e-5, **flags)  # 16 words
        lines = (data / "dict.txt").read_text().splitlines()
        counts = [0] * 4 + [int(line.split()[1]) for line in lines]
        moved = {}
        for name in ("all", "little"):
            before = WordTable.load(tmp_path / name / "word_table.epoch0.txt", symbols(data))
            after = table_of(tmp_path / name / "checkpoint2.pt", (7, 7))
            moved[name] = np.flatnonzero(before.cells != after.cells)
        rank = np.argsort(np.argsort(-np.array(counts), kind="stable"))
        assert len(moved["little"]) and rank[moved["little"]].max() < 20
        assert rank[moved["all"]].max() >= 20
        record = json.loads((tmp_path / "little" / "reallocations.jsonl").read_text())
        assert record["loss_after"] < record["loss_before"]

    @pytest.mark.parametrize("objective", ["row-first", "true-loss"])
    def test_a_kept_input_table_makes_predicted_losses_true(
        self, tmp_path: Path, objective: str
    ) -> None:
        """Nothing is trained after the reallocation: the loss is then what it foretold.

        By the true loss the table is kept without asking for it.
        """
        data, out = preprocess(tmp_path / "data"), tmp_path / "out"
        keep = ["--keep-input-table"] * (objective != "true-loss")
        for suffix in ("bin", "idx"):
            shutil.copy(data / f"train.{suffix}", data / f"valid.{suffix}")
        records = train(
            data, out, *keep, arch="lightrnn_lm_gated", reallocate_epochs=1, max_epoch=2,
            lr="0.01,0", lr_scheduler="fixed", initial_table="random", word_dim=0,
            reallocation_objective=objective,
        )  # fmt: skip
        record = json.loads((out / "reallocations.jsonl").read_text())
        before, after = (load(out / f"checkpoint{epoch}.pt")["model"] for epoch in (1, 2))
        assert torch.equal(before[READ], before[PREDICTED])
        assert torch.equal(after[READ], before[READ])
        assert not torch.equal(after[PREDICTED], before[READ])
        kind, name = ("loss", "loss") if objective == "true-loss" else ("cost", "row_loss")
        losses = [float(r[f"valid_{name}"]) * math.log(2) for r in valid_records(records)]
        foretold = [record[f"{kind}_before"], record[f"{kind}_after"]]
        assert foretold == pytest.approx(losses, abs=1e-4)
        assert losses[1] < losses[0] - 0.02

    def test_a_kept_input_table_stays_with_the_model(self, data: Path, tmp_path: Path) -> None:
        flags = {"arch": "lightrnn_lm_gated", "max_epoch": 2}
        train(data, tmp_path, "--keep-input-table", **flags)
        with pytest.raises(SystemExit, match="give --keep-input-table again"):
            train(data, tmp_path / "b", restore_file=tmp_path / "checkpoint1.pt", **flags)

    def test_a_model_of_a_table_of_another_shape(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path / "a", max_epoch=1, table_shape="7x7")
        for flag in ("restore_file", "finetune_from_model"):
            model = {flag: tmp_path / "a" / "checkpoint1.pt"}
            with pytest.raises(SystemExit, match="does not fit into the shape 12x4"):
                train(data, tmp_path / flag, table_shape="12x4", **model)
            with pytest.raises(SystemExit, match="have 2 components, those of the shape 4x4x4 3"):
                train(data, tmp_path / flag, table_shape="4x4x4", **model)
            with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')} nix.pt: no such"):
                train(data, tmp_path / "c", **{flag: "nix.pt"})

    def test_a_kept_input_table_can_be_asked_for_later(self, data: Path, tmp_path: Path) -> None:
        flags = {"arch": "lightrnn_lm_gated", "component_vectors": "separate"}
        train(data, tmp_path / "a", max_epoch=2, **flags)
        train(
            data, tmp_path / "b", max_epoch=3, reallocate_epochs=2,
            restore_file=tmp_path / "a" / "checkpoint2.pt", **flags,
        )  # fmt: skip
        before = load(tmp_path / "a" / "checkpoint2.pt")["model"]
        after = load(tmp_path / "b" / "checkpoint3.pt")["model"]
        assert torch.equal(after[READ], before[READ])
        assert not torch.equal(after[PREDICTED], before[READ])

    def test_vectors_that_were_shared_keep_one_table(self, data: Path, tmp_path: Path) -> None:
        flags = {"arch": "lightrnn_lm_gated", "max_epoch": 2}
        train(data, tmp_path, **flags)
        with pytest.raises(SystemExit, match="give --component-vectors shared"):
            train(
                data, tmp_path / "b", "--keep-input-table",
                restore_file=tmp_path / "checkpoint1.pt", **flags,
            )  # fmt: skip

    def test_without_a_schedule_the_table_stays(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path, initial_table="random")
        tables = [table_of(tmp_path / f"checkpoint{n}.pt", (7, 7)) for n in (1, 3)]
        assert tables[0] == tables[1]
        assert not (tmp_path / "reallocations.jsonl").exists()

    @pytest.mark.parametrize("objective", ["true-loss", "row-first", "joint"])
    @pytest.mark.parametrize(("asked", "shape"), SHAPES)
    def test_tables_of_any_shape(
        self, data: Path, tmp_path: Path, objective: str, asked: str, shape: tuple[int, ...]
    ) -> None:
        records = train(
            data, tmp_path, table_shape=asked, reallocate_epochs=1,
            reallocation_objective=objective, max_epoch=2, initial_table="random",
        )  # fmt: skip
        assert all(map(math.isfinite, valid_losses(records)))
        if len(shape) == 1:
            assert not (tmp_path / "reallocations.jsonl").exists()
        else:
            record = json.loads((tmp_path / "reallocations.jsonl").read_text())
            kind = "loss" if objective == "true-loss" else "cost"
            assert record[f"{kind}_after"] <= record[f"{kind}_before"] + 1e-9
        names = {1: ["component1"], 2: ["row", "column"], 3: ["component1", "component3"]}
        assert all(f"valid_{name}_ppl" in str(records) for name in names[len(shape)])
        words = table_of(tmp_path / "checkpoint2.pt", shape)
        assert WordTable.load(tmp_path / "word_table.txt", symbols(data)) == words

    @pytest.mark.parametrize("architecture", ["lightrnn_lm", "lightrnn_lm_gated"])
    @pytest.mark.parametrize("shape", ["1d", "2d", "3d"])
    def test_words_with_numbers_of_their_own(
        self, data: Path, tmp_path: Path, architecture: str, shape: str
    ) -> None:
        """Biases and numbers train, are reallocated with their words and evaluate alike."""
        keep = ["--keep-input-table"] * (architecture == "lightrnn_lm_gated")
        records = train(
            data, tmp_path, *keep, arch=architecture, table_shape=shape, word_dim=4,
            reallocate_epochs=1, max_epoch=2,
        )  # fmt: skip
        state = load(tmp_path / "checkpoint2.pt")["model"]
        features = "decoder.core.reader.features"
        assert state[f"{features}.0.bias"].abs().sum() > 0
        assert state[f"{features}.1.numbers"].shape == (48, 3)
        for name in ("numbers", "projection.weight", "query.weight"):
            assert state[f"{features}.1.{name}"].abs().sum() > 0
        gated = any("transforms" in name for name in state)
        assert gated == (architecture == "lightrnn_lm_gated" and shape != "1d")
        loss = eval_lm(
            data, tmp_path / "checkpoint2.pt", "--gen-subset", "valid", "--tokens-per-sample", 12
        )
        assert loss == pytest.approx(valid_losses(records)[-1], abs=6e-5)

    def test_reallocations_after_a_range_of_epochs(self, data: Path, tmp_path: Path) -> None:
        train(
            data, tmp_path, reallocate_epochs="1,3-4", max_epoch=5, initial_table="random",
            reallocation_objective="row-first",
        )  # fmt: skip
        records = [
            json.loads(line) for line in (tmp_path / "reallocations.jsonl").read_text().splitlines()
        ]
        assert [(record["epoch"], record["round"]) for record in records] == [
            (1, 1), (3, 2), (4, 3)
        ]  # fmt: skip
        tables = [table_of(tmp_path / f"checkpoint{epoch}.pt", (7, 7)) for epoch in range(1, 6)]
        assert tables[1] == tables[2]
        for before, after in ((0, 1), (2, 3), (3, 4)):
            assert tables[before] != tables[after]
            file = tmp_path / f"word_table.epoch{before + 1}.txt"
            assert WordTable.load(file, symbols(data)) == tables[after]

    def test_checkpoints_hold_what_is_shared_once(self, data: Path, tmp_path: Path) -> None:
        """Vectors and own numbers that input and output share, and the table of both."""
        train(data, tmp_path, arch="lightrnn_lm_gated", max_epoch=1)
        path = tmp_path / "checkpoint1.pt"
        state = load(path)["model"]
        (model,), _ = checkpoint_utils.load_model_ensemble([str(path)])
        softmax, reader = model.decoder.core.head.softmax, model.decoder.core.reader
        assert softmax.vectors is reader.vectors
        assert list(softmax.features) == list(reader.features)
        parameters = dict(model.named_parameters())  # each once
        counted = ("reallocations.round", "reallocations.epoch", "vocabulary.digest")
        buffers = [READ, *(f"decoder.{name}" for name in counted)]
        carried = [f"decoder.carried_state.{name}" for name in ("block", "states")]
        assert state.keys() == {*parameters, *buffers, *carried}
        for name, value in parameters.items():
            assert torch.equal(value, state[name]), name

    @pytest.mark.parametrize("table", ["random", "frequency", "cooccurrence"])
    def test_initial_tables_are_reproducible(self, data: Path, tmp_path: Path, table: str) -> None:
        tables = []
        for number, seed in enumerate((1, 1, 2)):
            train(data, tmp_path / str(number), initial_table=table, seed=seed, max_epoch=1)
            tables.append(WordTable.load(tmp_path / str(number) / "word_table.txt", symbols(data)))
        assert tables[0] == tables[1]
        if table == "random":
            assert tables[0] != tables[2]

    def test_a_table_file_starts_training_and_sets_the_shape(
        self, data: Path, tmp_path: Path
    ) -> None:
        train(data, tmp_path / "a", table_shape="5x10", max_epoch=1)
        file = tmp_path / "a" / "word_table.txt"
        train(data, tmp_path / "b", initial_table=file, max_epoch=1)
        assert table_of(tmp_path / "b" / "checkpoint1.pt", (5, 10)) == WordTable.load(
            file, symbols(data)
        )

    def test_tensorboard_shows_component_perplexities(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path, max_epoch=1, tensorboard_logdir=tmp_path / "board")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "board" / "valid"))
        events.Reload()
        assert {"row_ppl", "column_ppl", "ppl"} <= set(events.Tags()["scalars"])


class TestResume:
    def test_at_an_epoch_boundary(self, data: Path, trained: Path, tmp_path: Path) -> None:
        train(data, tmp_path, reallocate_epochs=1, restore_file=trained / "checkpoint1.pt")
        assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")
        assert len((tmp_path / "reallocations.jsonl").read_text().splitlines()) == 1

    def test_in_mid_epoch_after_the_reallocation(
        self, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        (middle,) = trained.glob("checkpoint_2_12.pt")
        train(data, tmp_path, reallocate_epochs=1, restore_file=middle)
        assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")
        assert not (tmp_path / "reallocations.jsonl").exists()

    def test_in_the_first_epoch_keeps_the_initial_table(
        self, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        train(
            data, tmp_path, reallocate_epochs=1, restore_file=trained / "checkpoint_1_4.pt",
            initial_table="random",
        )  # fmt: skip
        assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")


KILLED = """
import os, signal, sys
import fairseq_compat
fairseq_compat.install()
from fairseq_lightrnn import files
from fairseq_lightrnn.allocation.true_loss import Market
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def kill_at_the_second(original, seen=[]):
    def replace(*args):
        seen.append(args)
        return kill() if len(seen) > 2 else original(*args)
    return replace
if sys.argv.pop(1) == "solve":
    Market.solve = kill
else:
    files.os.replace = kill_at_the_second(os.replace)
import fairseq_lightrnn.register
from fairseq_cli.train import cli_main
cli_main()
"""


@pytest.mark.parametrize("moment", ["solve", "write"])
def test_a_reallocation_killed_is_done_again(
    data: Path, trained: Path, tmp_path: Path, moment: str
) -> None:
    """kill -9 amid the solve, or amid the writing of the table, loses and changes nothing."""
    arguments = train_arguments(data, tmp_path, reallocate_epochs=1, save_interval_updates=4)
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, *arguments], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    before = WordTable.load(tmp_path / "word_table.txt", symbols(data))
    assert before == table_of(tmp_path / "checkpoint_last.pt", (7, 7))
    train(data, tmp_path, reallocate_epochs=1, save_interval_updates=4)
    assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")
    assert len((tmp_path / "reallocations.jsonl").read_text().splitlines()) == 1


class TestEvaluation:
    @pytest.mark.parametrize("break_mode", ["none", "eos", "complete"])
    def test_eval_lm_equals_validation(self, data: Path, tmp_path: Path, break_mode: str) -> None:
        records = train(data, tmp_path, max_epoch=1, sample_break_mode=break_mode)
        expected = valid_losses(records)[0]
        flags = ["--gen-subset", "valid", "--sample-break-mode", break_mode,
                 "--tokens-per-sample", 12]  # fmt: skip
        path = tmp_path / "checkpoint1.pt"
        whole = eval_lm(data, path, *flags)
        assert whole == pytest.approx(expected, abs=6e-5)
        for extra in (["--batch-size", 1], ["--max-tokens", 50], ["--softmax-batch", 7]):
            assert eval_lm(data, path, *flags, *extra) == pytest.approx(whole, abs=1e-5)

    def test_a_context_window_changes_contexts_only(self, data: Path, trained: Path) -> None:
        """A window over whole sentences must give the losses of those sentences in longer text."""
        path = trained / "checkpoint_best.pt"
        flags = ["--gen-subset", "valid", "--batch-size", 1]
        plain = eval_lm(data, path, *flags, "--tokens-per-sample", 10)
        window = eval_lm(data, path, *flags, "--tokens-per-sample", 1010, "--context-window", 1000)
        whole = eval_lm(data, path, *flags, "--tokens-per-sample", 1000)
        assert window == pytest.approx(whole, abs=1e-5)
        assert window != pytest.approx(plain, abs=1e-3)

    def test_scoring_makes_no_tensor_of_the_vocabulary(self, data: Path, trained: Path) -> None:
        models, _, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(trained / "checkpoint_best.pt")]
        )
        task.load_dataset("valid")
        sample = task.dataset("valid").collater([task.dataset("valid")[0]])
        output = models[0](**sample["net_input"])
        scores = models[0].get_normalized_probs(output, log_probs=True, sample=sample)
        assert scores.shape == (*sample["target"].shape, len(task.target_dictionary))
        assert scores.stride(-1) == 0
        probabilities = models[0].get_normalized_probs(output, log_probs=False, sample=sample)
        torch.testing.assert_close(probabilities.log(), scores)


class TestGeneration:
    def interactive(
        self, data: Path, path: Path, prompt: Path, capsys: pytest.CaptureFixture[str], *flags: Any
    ) -> list[str]:
        run("interactive", data, *TASK, "--path", path, "--cpu", "--input", prompt, *flags)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("H-")]

    def test_interactive_continues_a_prompt(
        self, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("w1 w8\nw3 unheard-of\n")
        lines = self.interactive(
            data, trained / "checkpoint_best.pt", prompt, capsys, "--beam", 3, "--max-len-b", 8
        )
        assert len(lines) == 2
        assert lines[0].split("\t")[2].startswith("w1 w8")

    def test_sampling_follows_its_seed(
        self, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("w1\n")
        flags = ["--sampling", "--beam", 1, "--temperature", 2.0, "--max-len-b", 20]
        texts = [
            self.interactive(
                data, trained / "checkpoint_best.pt", prompt, capsys, *flags, "--seed", seed
            )
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] != texts[2]

    def test_generate_scores_a_split(
        self, data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(
            "generate", data, *TASK, "--path", trained / "checkpoint_best.pt", "--cpu",
            "--gen-subset", "test", "--sample-break-mode", "eos", "--prefix-size", 2, "--beam", 2,
            "--max-len-b", 10, "--num-workers", 0,
        )  # fmt: skip
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("H-") for line in lines) == 20

    def test_generation_equals_scoring(self, data: Path, trained: Path) -> None:
        """Step by step with reordering, the decoder predicts what the whole text predicts."""
        models, _, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(trained / "checkpoint_best.pt")]
        )
        decoder = models[0].eval().decoder
        words = torch.randint(4, 44, (3, 6))
        with torch.no_grad():
            # Every prefix afresh, the distribution after its last word.
            prefixes = [decoder(words[:, : step + 1]) for step in range(6)]
            every = torch.cat([decoder.get_normalized_probs(p, True) for p in prefixes], dim=1)
            targets = decoder(words[:, :-1], target_tokens=words[:, 1:])
            scores = decoder.get_normalized_probs(targets, True, {"target": words[:, 1:]})
            chosen = every[:, :-1].gather(2, words[:, 1:, None])
            torch.testing.assert_close(chosen, scores.gather(2, words[:, 1:, None]))
            torch.testing.assert_close(every.exp().sum(-1), torch.ones(3, 6))
            state: dict[str, Any] = {}
            order = torch.tensor([2, 0])
            for step in range(6):
                log_probs, extra = decoder(words[:, : step + 1], incremental_state=state)
                log_probs = decoder.get_normalized_probs((log_probs, extra), log_probs=True)
                expected = every[:, step : step + 1]
                torch.testing.assert_close(log_probs, expected)
                if step == 3:
                    decoder.reorder_incremental_state_scripting(state, order)
                    words, every = words[order], every[order]


class TestBadInput:
    """Each mistake ends in one sentence that names the flag or file, and no traceback."""

    def refused(self, message: str, data: Path, tmp_path: Path, *flags: Any, **values: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            train(data, tmp_path, *flags, **values)
        assert isinstance(caught.value, ValueError)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("criterion", ["adaptive_loss", "masked_lm"])
    def test_stock_criterion(self, data: Path, tmp_path: Path, criterion: str) -> None:
        self.refused(
            "use --criterion two_component_cross_entropy", data, tmp_path, criterion=criterion
        )

    def test_stock_task(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "use --task lightrnn_language_modeling", data, tmp_path,
            "--user-dir", TASK[1], "--task", "language_modeling",
        )  # fmt: skip

    def test_stock_model(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "use one of --arch lightrnn_lm, lightrnn_transformer_lm with this task, or --task "
            "language_modeling with that model", data, tmp_path, arch="lstm_lm", embed_dim=None,
            hidden_size=None,
        )  # fmt: skip

    def test_our_criterion_with_stock_task_and_model(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "use one of the lightrnn architectures with it", data, tmp_path, "--user-dir", TASK[1],
            "--task", "language_modeling", arch="lstm_lm", embed_dim=None, hidden_size=None,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"table_shape": "6x7"}, "--table-shape 6x7: a table of shape 6x7 has 42 cells"),
            ({"table_shape": "6by7"}, "--table-shape 6by7: expected sizes joined by x"),
            ({"table_shape": "0d"}, "--table-shape 0d: a table needs at least 1 component"),
            ({"hidden_size": 0}, "--hidden-size 0: must be at least 1"),
            ({"reallocation_words": 0}, "--reallocation-words 0: must be above 0"),
            ({"reallocation_memory": -1}, "--reallocation-memory -1.0: must be above 0"),
            ({"word_dim": -1}, "--word-dim -1: must not be negative"),
            ({"output_ffn_dim": -1}, "--output-ffn-dim -1: must not be negative"),
            ({"dropout": 1.5}, "--dropout 1.5: must be at least 0 and below 1"),
            ({"reallocate_epochs": 3}, "after epoch 3 no epoch of training follows"),
            ({"reallocate_epochs": 4}, "after epoch 4 no epoch of training follows"),
            ({"reallocate_epochs": "1-3"}, "after epoch 3 no epoch of training follows"),
            ({"reallocate_epochs": "2-1"}, "--reallocate-epochs 2-1: the range 2-1 is empty"),
            ({"further_tables": 2, "table_shape": "1d"}, "--further-tables 2: with --table-shape"),
            ({"further_tables": -1}, "--further-tables -1: "),
            ({"regularise": "adam"}, "--regularise adam: expected awd"),
            ({"initial_table": "sorted"}, "--initial-table sorted: neither one of random"),
        ],
    )
    def test_flags(self, data: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
        self.refused(message, data, tmp_path, **values)

    def test_an_input_table_of_the_papers_composition(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--keep-input-table: the paper's model predicts", data, tmp_path,
            "--keep-input-table",
        )  # fmt: skip

    def test_input_tables_of_shared_vectors(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--component-vectors shared and --keep-input-table: give one", data, tmp_path,
            "--keep-input-table", component_vectors="shared", arch="lightrnn_lm_gated",
        )  # fmt: skip

    def test_other_targets(self, data: Path, tmp_path: Path) -> None:
        self.refused("--self-target: a LightRNN", data, tmp_path, "--self-target")

    def test_a_dictionary_cut_short(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--output-dictionary-size 20: a word table seats all", data, tmp_path,
            output_dictionary_size=20,
        )  # fmt: skip

    def test_table_of_another_dictionary(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path / "a", max_epoch=1)
        file = tmp_path / "a" / "word_table.txt"
        file.write_text(file.read_text().replace("\nw3 ", "\nx3 "))
        line = symbols(data).index("w3") + 2
        message = f"{file}: line {line} holds 'x3' where the dictionary has 'w3'; the table"
        self.refused(message, data, tmp_path / "b", initial_table=file)

    def test_truncated_table(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path / "a", max_epoch=1)
        file = tmp_path / "a" / "word_table.txt"
        file.write_text(file.read_text()[:-40])
        self.refused("promises 48 words", data, tmp_path / "b", initial_table=file)

    def test_table_of_another_shape(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path / "a", max_epoch=1)
        self.refused(
            "--table-shape 5x10 is not the shape of the table", data, tmp_path / "b",
            initial_table=tmp_path / "a" / "word_table.txt", table_shape="5x10",
        )  # fmt: skip

    def test_empty_corpus(self, data: Path, tmp_path: Path) -> None:
        empty = tmp_path / "empty.txt"
        empty.touch()
        text = write_text(tmp_path / "text.txt", 20, 0)
        run(
            "preprocess", "--only-source", "--trainpref", empty, "--validpref", text,
            "--srcdict", data / "dict.txt", "--destdir", tmp_path / "bin",
        )  # fmt: skip
        self.refused("train.bin: the split has no text", tmp_path / "bin", tmp_path / "out")

    def test_vocabulary_of_specials(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty.txt"
        empty.touch()
        run(
            "preprocess", "--only-source", "--trainpref", empty, "--validpref", empty,
            "--destdir", tmp_path / "bin",
        )  # fmt: skip
        self.refused("the dictionary has no words", tmp_path / "bin", tmp_path / "out")


def test_tables_and_reallocations_are_logged(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train(data, tmp_path, reallocate_epochs=1, max_epoch=2)
    messages = "\n".join(caplog.messages)
    assert "initial table: cooccurrence, WordTable(48 words, 7×7" in messages
    assert "reallocation after epoch 1: gathering statistics" in messages
    (line,) = (m for m in caplog.messages if m.startswith("reallocation after epoch 1 (true-loss)"))
    for part in ("of 48 words moved", "nats per word", "gain", "predicted", "gap", "statistics",
                 "costs", "solve", "check", "% of the training time so far"):  # fmt: skip
        assert part in line


class TestText:
    def test_tables_are_made_of_all_parts(self, tmp_path: Path) -> None:
        """fairseq trains on train1 too, if it is there."""
        data = preprocess(tmp_path)
        for kind in ("bin", "idx"):
            (data / f"train1.{kind}").write_bytes((data / f"valid.{kind}").read_bytes())
        records = train(data, tmp_path / "out", reallocate_epochs=1, max_epoch=2)
        assert records
        (report,) = map(
            json.loads, (tmp_path / "out" / "reallocations.jsonl").read_text().splitlines()
        )
        splits = [
            (tmp_path / f"{split}.txt").read_text().splitlines() for split in ("train", "valid")
        ]
        assert report["tokens"] == sum(len(line.split()) + 1 for lines in splits for line in lines)
        parser, flags = options.get_training_parser(), [*TASK, "--arch", "lightrnn_lm"]
        arguments = options.parse_args_and_arch(parser, [str(data), *flags])
        task = tasks.setup_task(convert_namespace_to_omegaconf(arguments).task)
        assert sum(len(piece) for piece in task.text("train")) == report["tokens"]

    def test_of_several_folders_one_moves_words(
        self, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        other = preprocess(tmp_path / "other", sentences=30)
        shutil.copy(data / "dict.txt", other / "dict.txt")
        train(f"{data}:{other}", tmp_path / "out", reallocate_epochs=1, max_epoch=2)
        assert f"of the 2 folders of {data}:{other}, words move by the text" in caplog.text

    @pytest.mark.parametrize("flags", [[], [CARRY]])
    def test_that_is_not_there(self, data: Path, tmp_path: Path, flags: list[str]) -> None:
        with pytest.raises(SystemExit, match="nowhere/dict.txt: no such dictionary; was the data"):
            train(tmp_path / "nowhere", tmp_path / "out", *flags)
        with pytest.raises(SystemExit, match="test7.*was it preprocessed"):
            train(data, tmp_path / "out", *flags, train_subset="test7")
