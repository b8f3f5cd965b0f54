"""Trainings that go on from another's checkpoint, and models that are averaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import CARRY, assert_same_training, eval_lm, load, symbols, table_of, train

from fairseq_lightrnn.core.table import WordTable


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of four epochs with reallocations after two of them."""
    folder = tmp_path_factory.mktemp("first")
    train(data, folder, initial_table="random", reallocate_epochs="1,3", max_epoch=4)
    return folder


class TestFromElsewhere:
    @pytest.mark.parametrize("way", ["finetune", "reset"])
    def test_a_new_training_counts_its_own_epochs(
        self, data: Path, first: Path, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        start = first / "checkpoint4.pt"
        flags = {"finetune_from_model": start} if way == "finetune" else {"restore_file": start}
        resets = [] if way == "finetune" else ["--reset-dataloader", "--reset-optimizer"]
        with caplog.at_level(logging.INFO):
            train(data, tmp_path, *resets, reallocate_epochs=1, max_epoch=2, **flags)
        assert "--initial-table cooccurrence is not used" in caplog.text
        (report,) = map(json.loads, (tmp_path / "reallocations.jsonl").read_text().splitlines())
        assert (report["epoch"], report["round"]) == (1, 1)
        assert table_of(tmp_path / "checkpoint1.pt", (7, 7)) == table_of(start, (7, 7))
        assert load(tmp_path / "checkpoint2.pt")["model"]["decoder.reallocations.epoch"] == 1

    def test_it_is_resumed_where_it_was(self, data: Path, first: Path, tmp_path: Path) -> None:
        """The flag that began it is given again, and does not begin it again."""
        flags = {"finetune_from_model": first / "checkpoint4.pt", "reallocate_epochs": 1}
        train(data, tmp_path, max_epoch=2, **flags)
        train(data, tmp_path, max_epoch=3, **flags)
        state = load(tmp_path / "checkpoint3.pt")["model"]
        assert state["decoder.reallocations.epoch"] == state["decoder.reallocations.round"] == 1
        assert len((tmp_path / "reallocations.jsonl").read_text().splitlines()) == 1

    def test_a_checkpoint_to_begin_with_once(self, data: Path, first: Path, tmp_path: Path) -> None:
        """It is gone on from, its epochs and all, until there is a last checkpoint."""
        damaged = tmp_path / "damaged.pt"
        damaged.write_bytes((first / "checkpoint3.pt").read_bytes()[:-500])
        for path, message in (
            (tmp_path / "absent.pt", "--continue-once .*absent.pt: no such checkpoint"),
            (damaged, "damaged.pt: the checkpoint"),
        ):
            with pytest.raises(SystemExit, match=message):
                train(data, tmp_path / "on", continue_once=path, max_epoch=4)
        flags = {"initial_table": "random", "reallocate_epochs": "1,3", "max_epoch": 4}
        train(data, tmp_path / "on", continue_once=first / "checkpoint3.pt", **flags)
        assert_same_training(tmp_path / "on" / "checkpoint4.pt", first / "checkpoint4.pt")
        train(data, tmp_path / "on", continue_once=tmp_path / "absent.pt", **flags)

    def test_its_folder_has_the_tables(self, data: Path, first: Path, tmp_path: Path) -> None:
        start = first / "checkpoint4.pt"
        train(data, tmp_path, finetune_from_model=start, max_epoch=1)
        words = WordTable.load(first / "word_table.txt", symbols(data))
        assert WordTable.load(tmp_path / "word_table.txt", symbols(data)) == words
        train(data, tmp_path / "f", max_epoch=1, further_tables=1, arch="lightrnn_lm_gated")
        train(
            data, tmp_path / "g", finetune_from_model=tmp_path / "f" / "checkpoint1.pt",
            max_epoch=1, further_tables=1, arch="lightrnn_lm_gated",
        )  # fmt: skip
        (tmp_path / "g" / "further_word_table1.txt").unlink()
        train(data, tmp_path / "g", max_epoch=2, further_tables=1, arch="lightrnn_lm_gated")
        for name in ("word_table.txt", "further_word_table1.txt"):
            assert (tmp_path / "g" / name).read_text() == (tmp_path / "f" / name).read_text()

    def test_what_another_training_left_in_the_folder_is_replaced(
        self, data: Path, first: Path, tmp_path: Path
    ) -> None:
        flags = {"initial_table": "random", "reallocate_epochs": "1,2", "max_epoch": 3}
        train(data, tmp_path, seed=2, **flags)
        for path in tmp_path.glob("*.pt"):
            path.unlink()
        train(data, tmp_path, initial_table="random", max_epoch=1)
        assert not (tmp_path / "reallocations.jsonl").exists()
        (tmp_path / "reallocations.jsonl").write_text('{"epoch": 1}\n')
        for path in tmp_path.glob("*.pt"):
            path.unlink()
        train(data, tmp_path, finetune_from_model=first / "checkpoint4.pt", max_epoch=1)
        assert not (tmp_path / "reallocations.jsonl").exists()
        words = WordTable.load(first / "word_table.txt", symbols(data))
        assert WordTable.load(tmp_path / "word_table.txt", symbols(data)) == words

    def test_a_resume_repeats_no_line(self, data: Path, first: Path, tmp_path: Path) -> None:
        """From the checkpoint before a reallocation, whose line stands in the file already."""
        train(data, tmp_path, initial_table="random", reallocate_epochs="1,3", max_epoch=4)
        lines = (tmp_path / "reallocations.jsonl").read_text()
        flags = {"restore_file": tmp_path / "checkpoint3.pt", "reallocate_epochs": "1,3"}
        train(data, tmp_path, max_epoch=4, **flags)
        again = [*map(json.loads, (tmp_path / "reallocations.jsonl").read_text().splitlines())]
        (tmp_path / "reallocations.jsonl").write_text(lines[:-5])  # on a disk that was full
        train(data, tmp_path, max_epoch=4, **flags)
        damaged = (tmp_path / "reallocations.jsonl").read_text().splitlines()
        assert [json.loads(line)["table"] for line in damaged] == [line["table"] for line in again]
        assert [line["epoch"] for line in again] == [1, 3]
        assert again[1]["table"] == json.loads(lines.splitlines()[1])["table"]


class TestMovingAverage:
    @pytest.mark.parametrize(
        ("arch", "more"),
        [
            ("lightrnn_lm_gated", []),
            ("lightrnn_lm_gated", ["--ema-fp32", "--ema-start-update", 5]),
            ("lightrnn_transformer_lm", ["--ema-fp32"]),
        ],
    )
    def test_weights_are_averaged_and_words_sit_as_in_the_model(
        self, data: Path, tmp_path: Path, arch: str, more: list[Any]
    ) -> None:
        flags = ["--store-ema", "--ema-decay", 0.9, *more]
        train(data, tmp_path, *flags, arch=arch, reallocate_epochs=1, max_epoch=2)
        saved = load(tmp_path / "checkpoint2.pt")
        average, model = saved["extra_state"]["ema"], saved["model"]
        assert average.keys() == model.keys()
        for name, value in model.items():
            assert torch.isfinite(average[name]).all()
            if not value.is_floating_point():
                assert torch.equal(average[name], value), name
        differ = [name for name, value in model.items() if not torch.equal(average[name], value)]
        assert len(differ) > 5

    def test_it_is_resumed_and_evaluates(self, data: Path, tmp_path: Path) -> None:
        flags: dict[str, Any] = {"reallocate_epochs": 1, "batch_size": 4, "ema_decay": 0.9}
        switches = [CARRY, "--store-ema", "--ema-fp32"]
        train(data, tmp_path / "a", *switches, save_interval_updates=4, max_epoch=3, **flags)
        (middle,) = (tmp_path / "a").glob("checkpoint_2_*4.pt")
        train(data, tmp_path / "b", *switches, max_epoch=3, restore_file=middle, **flags)
        one, two = (load(tmp_path / name / "checkpoint3.pt") for name in "ab")
        for name, value in one["extra_state"]["ema"].items():
            torch.testing.assert_close(two["extra_state"]["ema"][name], value)
        torch.save({**one, "model": one["extra_state"]["ema"]}, tmp_path / "average.pt")
        losses = [
            eval_lm(data, path, "--gen-subset", "valid")
            for path in (tmp_path / "average.pt", tmp_path / "a" / "checkpoint3.pt")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=0.2)

    @pytest.mark.parametrize("more", [[], ["--ema-fp32"]])
    def test_one_of_a_training_without_begins_from_its_model(
        self, data: Path, tmp_path: Path, more: list[str]
    ) -> None:
        train(data, tmp_path, max_epoch=1)
        first = load(tmp_path / "checkpoint1.pt")["model"]
        flags = ["--store-ema", "--ema-decay", 1, *more]
        train(data, tmp_path, *flags, max_epoch=2)
        saved = load(tmp_path / "checkpoint2.pt")
        average, model = saved["extra_state"]["ema"], saved["model"]
        weights = [name for name, value in model.items() if value.is_floating_point()]
        assert sum(not torch.equal(model[name], first[name]) for name in weights) > 5
        for name in weights:
            torch.testing.assert_close(average[name], first[name], msg=name)


class TestAveragedCheckpoints:
    """fairseq's own script, from its repository; the installed package has none."""

    def average(self, paths: list[Path], output: Path) -> Path:
        states = [load(path) for path in paths]
        model = {}
        for name, value in states[0]["model"].items():
            total = sum(state["model"][name].double() for state in states)
            mean = total / len(states)
            whole = not value.is_floating_point()
            model[name] = (mean.floor() if whole else mean).to(value.dtype)
        torch.save({**states[0], "model": model}, output)
        return output

    def test_across_a_reallocation_is_refused(
        self, data: Path, first: Path, tmp_path: Path
    ) -> None:
        paths = [first / f"checkpoint{epoch}.pt" for epoch in (3, 4)]
        average = self.average(paths, tmp_path / "average.pt")
        with pytest.raises(SystemExit, match="Average those after the last reallocation only"):
            checkpoint_utils.load_model_ensemble_and_task([str(average)])

    def test_between_reallocations_evaluates(self, data: Path, first: Path, tmp_path: Path) -> None:
        paths = [first / f"checkpoint{epoch}.pt" for epoch in (2, 3)]
        average = self.average(paths, tmp_path / "average.pt")
        assert eval_lm(data, average, "--gen-subset", "valid") < 6
