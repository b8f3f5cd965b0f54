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

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import (
    TASK,
    preprocess,
    read_log,
    run,
    symbols,
    train,
    train_arguments,
    valid_losses,
    valid_records,
    write_text,
)

from fairseq_lightrnn.allocation import reallocate
from fairseq_lightrnn.tasks._statistics import gather_statistics
from fairseq_lightrnn.word_table import WordTable


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three epochs with a reallocation after the first."""
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, reallocate_epochs=1, save_interval_updates=4)
    return save_dir


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def table_of(state: dict[str, Any], shape: tuple[int, ...]) -> WordTable:
    return WordTable(state["model"]["decoder.table.coordinates"].numpy(), shape)


def assert_same_training(first: Path, second: Path) -> None:
    """Parameters, buffers (the table among them) and optimiser state are equal bit for bit."""
    one, two = load(first), load(second)
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    moments = [state["last_optimizer_state"]["state"] for state in (one, two)]
    for index, values in moments[0].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[1][index][name]))


def eval_lm(caplog: pytest.LogCaptureFixture, data: Path, path: Path, *flags: Any) -> float:
    """Returns the loss in bits a word that fairseq-eval-lm computes, unrounded."""
    import fairseq_cli.eval_lm as command

    results = {}
    original = command.eval_lm

    def spy(*args: Any, **kwargs: Any) -> dict[str, float]:
        results.update(original(*args, **kwargs))
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "eval_lm", spy)
        run("eval-lm", data, *TASK, "--path", path, "--cpu", "--num-workers", 0, *flags)
    return float(results["loss"])


class TestTraining:
    def test_loss_falls_and_components_are_logged(self, trained: Path) -> None:
        records = valid_records(read_log(trained))
        losses = valid_losses(records)
        assert losses[-1] < losses[0] - 0.05
        for record in records:
            assert float(record["valid_row_loss"]) + float(
                record["valid_column_loss"]
            ) == pytest.approx(float(record["valid_loss"]), abs=2e-4)
            assert float(record["valid_row_ppl"]) == pytest.approx(
                2 ** float(record["valid_row_loss"]), abs=0.01
            )

    def test_reallocation_is_reported_and_lowers_the_cost(self, trained: Path) -> None:
        (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        assert (record["epoch"], record["round"], record["objective"]) == (1, 1, "row-first")
        assert record["cost_after"] < record["cost_before"]
        assert record["lower_bound"] == pytest.approx(record["cost_after"], abs=1e-9)
        assert 0 < record["moved"] <= record["words"]
        assert set(record["seconds"]) == {"statistics", "solve", "total"}
        assert 0 < record["share_of_training"] < 1

    def test_cost_before_is_the_training_loss_of_the_rows(
        self, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        """The first checkpoint, evaluated on the training split, has the cost that was logged."""
        (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        records = train(
            data, tmp_path, "--reset-optimizer", "--reset-dataloader", "--reset-meters",
            restore_file=trained / "checkpoint1.pt", lr=0.0, max_epoch=1, valid_subset="train",
        )  # fmt: skip
        (valid,) = [r for r in records if "train_wps" in r and "train_lr" not in r]
        row_loss = float(valid["train_row_loss"]) * math.log(2)
        assert record["cost_before"] == pytest.approx(row_loss, abs=1e-4)

    def test_checkpoints_and_files_hold_the_table(self, data: Path, trained: Path) -> None:
        names = [name for name in load(trained / "checkpoint1.pt")["model"] if "table" in name]
        assert names == ["decoder.table.coordinates"]
        first, last = load(trained / "checkpoint1.pt"), load(trained / "checkpoint_last.pt")
        before, after = table_of(first, (7, 7)), table_of(last, (7, 7))
        assert before != after
        words = symbols(data)
        assert WordTable.load(trained / "word_table.epoch0.txt", words) == before
        assert WordTable.load(trained / "word_table.epoch1.txt", words) == after
        assert WordTable.load(trained / "word_table.txt", words) == after
        assert first["model"]["decoder.reallocation_round"] == 0
        assert last["model"]["decoder.reallocation_round"] == 1
        assert last["model"]["decoder.reallocation_epoch"] == 1

    def test_statistics_of_part_of_the_words(
        self, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        flags = {"reallocate_epochs": 1, "restore_file": trained / "checkpoint1.pt"}
        train(data, tmp_path, max_epoch=2, reallocation_words=437, **flags)
        record = json.loads((tmp_path / "reallocations.jsonl").read_text())
        assert 300 < record["tokens"] < 600  # half of 874, in whole batches
        assert record["cost_after"] < record["cost_before"]

    @pytest.mark.parametrize("memory", [1.0, 0.5e-5, 1e-6])
    def test_bounded_memory_gives_the_same_table(
        self, data: Path, trained: Path, tmp_path: Path, memory: float
    ) -> None:
        """float64 and float32 in memory and float32 in a file: 12.7 kB, 6.5 kB, 0.4 kB."""
        train(
            data, tmp_path, max_epoch=2, reallocate_epochs=1, reallocation_memory=memory,
            restore_file=trained / "checkpoint1.pt",
        )  # fmt: skip
        one, other = (load(folder / "checkpoint2.pt") for folder in (tmp_path, trained))
        assert table_of(one, (7, 7)) == table_of(other, (7, 7))
        assert not list(tmp_path.glob("statistics.*"))

    def test_a_row_weight_is_part_of_the_cost(self, data: Path, tmp_path: Path) -> None:
        train(
            data, tmp_path, max_epoch=2, reallocate_epochs=1, reallocation_objective="joint",
            reallocation_row_weight=3.0,
        )  # fmt: skip
        record = json.loads((tmp_path / "reallocations.jsonl").read_text())
        # About 1.9 nats of rows, thrice, and of columns: perplexities of 7 each.
        assert 6.5 < record["cost_after"] < record["cost_before"] < 8.5

    def test_a_margin_keeps_words_where_they_are(
        self, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        flags = {"max_epoch": 2, "reallocate_epochs": 1, "initial_table": "random"}
        moved = []
        for margin in (0.0, 0.1, 100.0):
            folder = tmp_path / str(margin)
            train(data, folder, reallocation_margin=margin, **flags)
            moved.append(json.loads((folder / "reallocations.jsonl").read_text())["moved"])
        assert moved[0] > moved[1] > moved[2] == 0

    def test_a_kept_input_table_makes_predicted_losses_true(self, tmp_path: Path) -> None:
        """Nothing is trained after the reallocation: the rows' loss is then what it foretold."""
        data, out = preprocess(tmp_path / "data"), tmp_path / "out"
        for suffix in ("bin", "idx"):
            shutil.copy(data / f"train.{suffix}", data / f"valid.{suffix}")
        records = train(
            data, out, "--keep-input-table", "--reallocation-regather", arch="lightrnn_lm_gated",
            reallocate_epochs=1, max_epoch=2, lr="0.01,0", lr_scheduler="fixed",
            initial_table="random",
        )  # fmt: skip
        record = json.loads((out / "reallocations.jsonl").read_text())
        name = "decoder.composition.embedding.input_table.coordinates"
        before, after = (load(out / f"checkpoint{epoch}.pt")["model"] for epoch in (1, 2))
        assert torch.equal(before[name], before["decoder.table.coordinates"])
        assert torch.equal(after[name], before[name])
        assert not torch.equal(after["decoder.table.coordinates"], before[name])
        losses = [float(r["valid_row_loss"]) * math.log(2) for r in valid_records(records)]
        assert [record["cost_before"], record["cost_after"]] == pytest.approx(losses, abs=1e-4)
        assert losses[1] < losses[0] - 0.02

    @pytest.mark.parametrize("architecture", ["lightrnn_lm_ptb", "lightrnn_lm_gated"])
    def test_checkpoints_older_than_a_flag_load(
        self, data: Path, tmp_path: Path, architecture: str
    ) -> None:
        """fairseq gives presets no defaults of the flags that their checkpoints lack."""
        train(data, tmp_path, arch=architecture, max_epoch=1, output_ffn_dim=0)
        path = tmp_path / "checkpoint1.pt"
        state = load(path)
        for name in (
            "keep_input_table",
            "output_ffn_dim",
            "frequent_words",
            "frequent_residual_dim",
        ):
            del state["cfg"]["model"][name]
        torch.save(state, path)
        (model,), _ = checkpoint_utils.load_model_ensemble([str(path)], {"data": str(data)})
        assert model.decoder.input_vectors.input_table is None
        assert model.decoder.composition.ffn is None

    def test_a_kept_input_table_stays_with_the_model(self, data: Path, tmp_path: Path) -> None:
        flags = {"arch": "lightrnn_lm_gated", "max_epoch": 2}
        train(data, tmp_path, "--keep-input-table", **flags)
        with pytest.raises(Exception, match="Cannot load model parameters") as refusal:
            train(data, tmp_path / "b", restore_file=tmp_path / "checkpoint1.pt", **flags)
        assert "give --keep-input-table again" in str(refusal.value.__context__)

    def test_a_kept_input_table_can_be_asked_for_later(self, data: Path, tmp_path: Path) -> None:
        flags = {"arch": "lightrnn_lm_gated", "reallocate_epochs": 1}
        train(data, tmp_path / "a", max_epoch=2, **flags)
        train(
            data, tmp_path / "b", "--keep-input-table", max_epoch=3,
            restore_file=tmp_path / "a" / "checkpoint2.pt", **flags,
        )  # fmt: skip
        state = load(tmp_path / "b" / "checkpoint3.pt")["model"]
        name = "decoder.composition.embedding.input_table.coordinates"
        assert torch.equal(state[name], state["decoder.table.coordinates"])

    @pytest.mark.parametrize(("components", "shape"), [(2, (7, 7)), (3, (4, 4, 3))])
    def test_later_components_from_statistics_gathered_again(
        self, data: Path, tmp_path: Path, components: int, shape: tuple[int, ...]
    ) -> None:
        """As if the command had re-seated the words of the checkpoint, component by component."""
        flags = {"num_components": components, "table_shape": "x".join(map(str, shape))}
        train(
            data, tmp_path, "--reallocation-regather", reallocate_epochs=1, max_epoch=2,
            initial_table="random", **flags,
        )  # fmt: skip
        path = tmp_path / "checkpoint1.pt"
        model, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(path)], {"data": str(data), "reallocate_epochs": None}
        )[::2]
        task.load_dataset("train")
        decoder = model[0].decoder
        for component in range(components):
            gathered = gather_statistics(model[0], task.training_batches())
            found = reallocate(
                decoder.table.table(), gathered.statistics,
                *zip(*(decoder.softmax.vectors(i) for i in range(components)), strict=True),
                fixed_components=component,
            )  # fmt: skip
            decoder.table.seat(found.table)
        assert table_of(load(tmp_path / "checkpoint2.pt"), shape) == found.table

    def test_without_a_schedule_the_table_stays(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path, initial_table="random")
        tables = [table_of(load(tmp_path / f"checkpoint{n}.pt"), (7, 7)) for n in (1, 3)]
        assert tables[0] == tables[1]
        assert not (tmp_path / "reallocations.jsonl").exists()

    @pytest.mark.parametrize("objective", ["row-first", "joint"])
    @pytest.mark.parametrize(("components", "shape"), [(1, (48,)), (2, (6, 9)), (3, (4, 4, 3))])
    def test_any_number_of_components(
        self, data: Path, tmp_path: Path, objective: str, components: int, shape: tuple[int, ...]
    ) -> None:
        records = train(
            data, tmp_path, num_components=components, table_shape="x".join(map(str, shape)),
            reallocate_interval=1, reallocation_objective=objective, max_epoch=2,
            initial_table="random",
        )  # fmt: skip
        assert all(map(math.isfinite, valid_losses(records)))
        record = json.loads((tmp_path / "reallocations.jsonl").read_text())
        assert record["cost_after"] <= record["cost_before"] + 1e-9
        names = {1: ["component1"], 2: ["row", "column"], 3: ["component1", "component3"]}
        assert all(f"valid_{name}_ppl" in str(records) for name in names[components])

    @pytest.mark.parametrize("architecture", ["lightrnn_lm", "lightrnn_lm_gated"])
    @pytest.mark.parametrize("components", [1, 2, 3])
    def test_words_with_numbers_of_their_own(
        self,
        data: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        architecture: str,
        components: int,
    ) -> None:
        """Biases and residuals train, are reallocated with their words and evaluate alike."""
        keep = ["--keep-input-table"] * (architecture == "lightrnn_lm_gated")
        records = train(
            data, tmp_path, "--word-bias", *keep, arch=architecture, num_components=components,
            input_residual_dim=3, output_residual_dim=2, frequent_words=9,
            frequent_residual_dim=4, reallocate_epochs=1, max_epoch=2,
        )  # fmt: skip
        state = load(tmp_path / "checkpoint2.pt")["model"]
        assert state["decoder.softmax.word_bias"].abs().sum() > 0
        assert state["decoder.softmax.residual"].shape == (48, 2)
        assert state["decoder.composition.embedding.residual.weight"].abs().sum() > 0
        for side in ("composition.embedding.frequent.residual.weight", "softmax.frequent.residual"):
            assert state[f"decoder.{side}"].shape == (9, 4)
            assert state[f"decoder.{side}"].abs().sum() > 0
        gated = any("transforms" in name for name in state)
        assert gated == (architecture == "lightrnn_lm_gated" and components > 1)
        loss = eval_lm(
            caplog, data, tmp_path / "checkpoint2.pt", "--gen-subset", "valid",
            "--tokens-per-sample", 12,
        )  # fmt: skip
        assert loss == pytest.approx(valid_losses(records)[-1], abs=6e-5)

    @pytest.mark.parametrize("table", ["random", "frequency", "cooccurrence"])
    def test_initial_tables_are_reproducible(self, data: Path, tmp_path: Path, table: str) -> None:
        tables = []
        for number, seed in enumerate((1, 1, 2)):
            train(data, tmp_path / str(number), initial_table=table, table_seed=seed, max_epoch=1)
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
        assert table_of(load(tmp_path / "b" / "checkpoint1.pt"), (5, 10)) == WordTable.load(
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
            initial_table="random", table_seed=7,
        )  # fmt: skip
        assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")


KILLED = """
import os, signal, sys
import fairseq_compat
fairseq_compat.install()
from fairseq_lightrnn import word_table_files
from fairseq_lightrnn.tasks import _seating
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def kill_at_the_second(original, seen=[]):
    def replace(*args):
        seen.append(args)
        return kill() if len(seen) > 2 else original(*args)
    return replace
if sys.argv.pop(1) == "solve":
    _seating.reallocate = kill
else:
    word_table_files.os.replace = kill_at_the_second(os.replace)
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
    assert before == table_of(load(tmp_path / "checkpoint_last.pt"), (7, 7))
    train(data, tmp_path, reallocate_epochs=1, save_interval_updates=4)
    assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")
    assert len((tmp_path / "reallocations.jsonl").read_text().splitlines()) == 1


class TestEvaluation:
    @pytest.mark.parametrize("break_mode", ["none", "eos", "complete"])
    def test_eval_lm_equals_validation(
        self, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, break_mode: str
    ) -> None:
        records = train(data, tmp_path, max_epoch=1, sample_break_mode=break_mode)
        expected = valid_losses(records)[0]
        flags = ["--gen-subset", "valid", "--sample-break-mode", break_mode,
                 "--tokens-per-sample", 12]  # fmt: skip
        path = tmp_path / "checkpoint1.pt"
        whole = eval_lm(caplog, data, path, *flags)
        assert whole == pytest.approx(expected, abs=6e-5)
        for extra in (["--batch-size", 1], ["--max-tokens", 50], ["--softmax-batch", 7]):
            assert eval_lm(caplog, data, path, *flags, *extra) == pytest.approx(whole, abs=1e-5)

    def test_a_context_window_changes_contexts_only(
        self, data: Path, trained: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A window over whole sentences must give the losses of those sentences in longer text."""
        path = trained / "checkpoint_best.pt"
        flags = ["--gen-subset", "valid", "--batch-size", 1]
        plain = eval_lm(caplog, data, path, *flags, "--tokens-per-sample", 10)
        window = eval_lm(
            caplog, data, path, *flags, "--tokens-per-sample", 1010, "--context-window", 1000
        )
        whole = eval_lm(caplog, data, path, *flags, "--tokens-per-sample", 1000)
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

    def test_stock_criterion(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "use --criterion two_component_cross_entropy", data, tmp_path,
            criterion="cross_entropy",
        )  # fmt: skip

    def test_stock_task(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "use --task lightrnn_language_modeling", data, tmp_path,
            "--user-dir", TASK[1], "--task", "language_modeling",
        )  # fmt: skip

    def test_stock_model(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "use --arch lightrnn_lm", data, tmp_path, arch="lstm_lm", embed_dim=None,
            hidden_size=None,
        )  # fmt: skip

    def test_our_criterion_with_stock_task_and_model(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "use --arch lightrnn_lm", data, tmp_path, "--user-dir", TASK[1], "--task",
            "language_modeling", arch="lstm_lm", embed_dim=None, hidden_size=None,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"table_shape": "6x7"}, "--table-shape 6x7: a table of shape 6x7 has 42 cells"),
            ({"table_shape": "6by7"}, "--table-shape 6by7: expected sizes joined by x"),
            ({"table_shape": "7x7x7"}, "has 3 components, --num-components is 2"),
            ({"num_components": 0}, "--num-components: a table needs at least 1 component"),
            ({"hidden_size": 0}, "--hidden-size 0: must be at least 1"),
            ({"reallocation_words": 0}, "--reallocation-words 0: must be above 0"),
            ({"reallocation_memory": -1}, "--reallocation-memory -1.0: must be above 0"),
            ({"reallocation_row_weight": 2}, "belongs to --reallocation-objective joint"),
            ({"reallocation_margin": -1}, "--reallocation-margin -1.0: must not be negative"),
            ({"output_residual_dim": -1}, "--output-residual-dim -1: must not be negative"),
            ({"output_ffn_dim": -1}, "--output-ffn-dim -1: must not be negative"),
            ({"frequent_words": 49}, "--frequent-words 49: the dictionary has 48 words"),
            ({"frequent_residual_dim": 0}, "--frequent-residual-dim 0: must be at least 1"),
            ({"dropout": 1.5}, "--dropout 1.5: must be at least 0 and below 1"),
            ({"reallocate_epochs": 3}, "after epoch 3 no epoch of training follows"),
            ({"reallocate_epochs": 4}, "after epoch 4 no epoch of training follows"),
            ({"reallocate_interval": 3}, "no reallocation before the last epoch"),
            ({"initial_table": "sorted"}, "--initial-table sorted: neither one of random"),
        ],
    )
    def test_flags(self, data: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
        self.refused(message, data, tmp_path, **values)

    def test_an_input_table_of_the_papers_composition(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--keep-input-table: --composition recurrent predicts", data, tmp_path,
            "--keep-input-table",
        )  # fmt: skip

    def test_input_tables_of_shared_vectors(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--keep-input-table and --share-component-vectors: give one", data, tmp_path,
            "--keep-input-table", "--share-component-vectors", arch="lightrnn_lm_gated",
        )  # fmt: skip

    def test_a_margin_for_columns_gathered_again(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--reallocation-margin and --reallocation-regather: give one", data, tmp_path,
            "--reallocation-regather", reallocation_margin=1,
        )  # fmt: skip

    def test_columns_gathered_again_without_rows_first(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--reallocation-regather belongs to --reallocation-objective row-first", data, tmp_path,
            "--reallocation-regather", reallocation_objective="joint",
        )  # fmt: skip

    def test_shared_vectors_of_two_widths(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--share-component-vectors needs --embed-dim (8) equal to --hidden-size (9)",
            data, tmp_path, "--share-component-vectors", hidden_size=9,
        )  # fmt: skip

    def test_shared_residuals_of_two_widths(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "--share-residuals needs --input-residual-dim (3) equal to --output-residual-dim (2)",
            data, tmp_path, "--share-residuals", input_residual_dim=3, output_residual_dim=2,
        )  # fmt: skip
        self.refused("--share-residuals: there are none", data, tmp_path, "--share-residuals")

    def test_other_targets(self, data: Path, tmp_path: Path) -> None:
        self.refused("--self-target: a LightRNN", data, tmp_path, "--self-target")

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
    (line,) = (m for m in caplog.messages if m.startswith("reallocation after epoch 1 (row-first)"))
    for part in ("of 48 words moved", "nats per word", "lower bound", "gap", "statistics", "solve",
                 "% of the training time so far"):  # fmt: skip
        assert part in line
