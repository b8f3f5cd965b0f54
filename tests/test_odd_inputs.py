"""Texts and dictionaries that are not as one expects, through fairseq's commands."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import (
    CARRY,
    binarise_pairs,
    eval_lm,
    load,
    preprocess_pairs,
    run,
    symbols,
    table_of,
    train,
    train_translation,
    valid_losses,
    valid_records,
    write_text,
)

from fairseq_lightrnn.allocation.paper import reallocate as solve
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.commands import reallocate
from fairseq_lightrnn.core.table import WordTable, default_shape
from fairseq_lightrnn.errors import UsageError

SKIP = "--skip-invalid-size-inputs-valid-test"


def binarise(folder: Path, *flags: Any, **texts: Path) -> Path:
    run(
        "preprocess", "--only-source", *flags, "--destdir", folder / "bin",
        *(part for split, text in texts.items() for part in (f"--{split}pref", text)),
    )  # fmt: skip
    return folder / "bin"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two texts, the second with a line of 60 words."""
    folder = tmp_path_factory.mktemp("texts")
    found = {name: write_text(folder / name, 60, 1) for name in ("train", "valid")}
    with found["valid"].open("a") as file:
        print(*["w1 w2 w3"] * 20, file=file)
    return found


@pytest.fixture(scope="module")
def long(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of these texts, binarised."""
    return binarise(tmp_path_factory.mktemp("long"), **texts)


class TestLongTexts:
    """Lines of more than --max-tokens words, where each line is a text."""

    EOS = ("--sample-break-mode", "eos")

    def test_in_validation_are_refused_before_training(self, long: Path, tmp_path: Path) -> None:
        message = f"a text of 61 words in the split 'valid' is longer than 50.*add {SKIP}"
        with pytest.raises(UsageError, match=message):
            train(long, tmp_path, *self.EOS, batch_size=None, max_tokens=50)
        assert not list(tmp_path.glob("*.pt"))

    def test_in_validation_are_skipped_if_asked_for(self, long: Path, tmp_path: Path) -> None:
        records = train(
            long, tmp_path, *self.EOS, SKIP, batch_size=None, max_tokens=50, max_epoch=1
        )
        (record,) = valid_records(records)
        assert float(record["valid_wpb"]) < 50
        path, flags = tmp_path / "checkpoint1.pt", ["--gen-subset", "valid", *self.EOS]
        some = eval_lm(long, path, *flags, "--max-tokens", 50, SKIP)
        assert some == pytest.approx(valid_losses(records)[0], abs=1e-4)
        assert eval_lm(long, path, *flags) != pytest.approx(some, abs=1e-3)

    def test_of_more_words_than_the_model_looks_back_on(self, long: Path, tmp_path: Path) -> None:
        flags = {"arch": "lightrnn_transformer_lm", "max_epoch": 1, "max_target_positions": 40}
        with pytest.raises(UsageError, match="is longer than 40"):
            train(long, tmp_path / "a", *self.EOS, **flags)
        train(long, tmp_path / "b", *self.EOS, SKIP, **flags)

    def test_in_training_are_left_out_of_reallocations_too(
        self, texts: dict[str, Path], tmp_path: Path
    ) -> None:
        data = binarise(tmp_path, train=texts["valid"], valid=texts["train"])
        words = {}
        for most in (50, 100):
            out = tmp_path / str(most)
            train(
                data, out, *self.EOS, batch_size=None, max_tokens=most, max_epoch=2,
                reallocate_epochs=1,
            )  # fmt: skip
            words[most] = json.loads((out / "reallocations.jsonl").read_text())["tokens"]
        assert words[100] - words[50] == 61

    def test_are_not_lost_by_lightrnn_reallocate(self, long: Path, tmp_path: Path) -> None:
        """Whatever the size of a batch: blocks of 100 words, batches of 30."""
        train(long, tmp_path, tokens_per_sample=100, max_epoch=2, reallocate_epochs=1)
        path, report = tmp_path / "checkpoint1.pt", tmp_path / "report.json"
        reallocate.main(
            [str(path), str(long), "--max-tokens", "30", "--output", str(tmp_path / "new.pt"),
             "--report", str(report)]
        )  # fmt: skip
        trained = json.loads((tmp_path / "reallocations.jsonl").read_text())
        found = json.loads(report.read_text())
        assert (found["tokens"], found["table"]) == (trained["tokens"], trained["table"])

    def test_in_validation_of_a_translation(self, tmp_path: Path) -> None:
        data = preprocess_pairs(tmp_path / "pairs")
        for side in "st":
            with (tmp_path / "pairs" / f"valid.{'src' if side == 's' else 'tgt'}").open(
                "a"
            ) as file:
                print(*[f"{side}1"] * 70, file=file)
        shutil.rmtree(data)
        binarise_pairs(tmp_path / "pairs")
        flags: dict[str, Any] = {"batch_size": None, "max_tokens": 60, "max_epoch": 1}
        with pytest.raises(UsageError, match="a text of 71 words in the split 'valid'"):
            train_translation(data, tmp_path / "a", **flags)
        train_translation(data, tmp_path / "b", SKIP, **flags)


class TestUnknownWords:
    MESSAGE = "of the words of 'valid' are unknown, and no word of the training text is"

    @pytest.mark.parametrize("carry", [[], [CARRY]])
    def test_that_training_never_sees(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, carry: list[str]
    ) -> None:
        text = write_text(tmp_path / "train.txt", 60, 1, words=20)
        (tmp_path / "valid.txt").write_text("w1 never heard of\n" * 3)
        data = binarise(tmp_path, train=text, valid=tmp_path / "valid.txt")
        with caplog.at_level(logging.WARNING):
            train(data, tmp_path / "out", *carry, max_epoch=2)
        (warning,) = [message for message in caplog.messages if self.MESSAGE in message]
        assert warning.startswith("60.00%") and warning.endswith("--thresholdsrc 2")
        caplog.clear()
        train(data, tmp_path / "out", *carry, max_epoch=3)
        assert self.MESSAGE not in caplog.text

    def test_that_training_sees(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        text = write_text(tmp_path / "train.txt", 60, 1)
        with text.open("a") as file:
            print("once", file=file)
        (tmp_path / "valid.txt").write_text("w1 never heard of\n" * 3)
        data = binarise(tmp_path, "--thresholdsrc", 2, train=text, valid=tmp_path / "valid.txt")
        train(data, tmp_path / "out", max_epoch=1)
        assert "are unknown" not in caplog.text

    def test_of_a_translation(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        data = preprocess_pairs(tmp_path / "pairs")
        (tmp_path / "pairs" / "valid.tgt").write_text("unheard of\n" * 12)
        shutil.rmtree(data)
        binarise_pairs(tmp_path / "pairs")
        train_translation(data, tmp_path / "out", max_epoch=1)
        assert self.MESSAGE in caplog.text and "--thresholdtgt 2" in caplog.text


@pytest.mark.parametrize("objective", ["row-first", "joint"])
@pytest.mark.parametrize("num_words", [30, 500])
def test_words_that_never_occur_keep_their_cells(objective: str, num_words: int) -> None:
    """Unless a word that does occur pays less there."""
    random = torch.Generator().manual_seed(1)
    shape = default_shape(num_words)
    table = WordTable.from_cells(torch.randperm(num_words, generator=random).numpy(), shape)
    seen = torch.rand(num_words, generator=random) > 0.4
    statistics = AllocationStatistics(num_words, 2, 4)
    words = seen.nonzero()[:, 0].repeat(3)
    statistics.add(words, torch.randn(len(words), 2, 4, generator=random))
    vectors = [torch.randn(size, 4, generator=random) for size in shape]
    biases = [torch.randn(size, generator=random) for size in shape]
    found = solve(table, statistics, vectors, biases, objective=objective)
    taken = np.isin(table.cells, found.table.cells[seen])
    unseen = ~seen.numpy()
    assert unseen.sum() > (taken & unseen).sum() > 0
    np.testing.assert_array_equal((found.table.cells != table.cells)[unseen], taken[unseen])


@pytest.mark.parametrize("kind", ["frequency", "cooccurrence"])
def test_negative_counts(data: Path, tmp_path: Path, kind: str) -> None:
    """Of a vocabulary of sentencepiece, which has logarithms where fairseq has counts."""
    shutil.copytree(data, tmp_path / "bin")
    words = symbols(data)[4:]
    lines = [f"{word} {-number}" for number, word in enumerate(words)]
    (tmp_path / "bin" / "dict.txt").write_text("\n".join(lines) + "\n")
    train(
        tmp_path / "bin", tmp_path / "out", initial_table=kind, max_epoch=2, reallocate_epochs=1,
        arch="lightrnn_lm_gated", label_smoothing=0.1,
    )  # fmt: skip
    assert load(tmp_path / "out" / "checkpoint2.pt")["model"]["decoder.reallocations.round"] == 1


def test_tables_are_made_from_all_shards(data: Path, tmp_path: Path) -> None:
    """Two shards of text are as one text of both."""
    parts = [write_text(tmp_path / f"{name}.txt", 60, seed) for seed, name in enumerate("ab", 3)]
    both = tmp_path / "both.txt"
    both.write_text("".join(part.read_text() for part in parts))
    valid = data.parent / "valid.txt"
    folders = [
        binarise(tmp_path / path.stem, "--srcdict", data / "dict.txt", train=path, valid=valid)
        for path in (*parts, both)
    ]
    tables = []
    for name, folder in (("shards", f"{folders[0]}:{folders[1]}"), ("one", folders[2])):
        out = tmp_path / f"out-{name}"
        train(folder, out, max_epoch=1)  # type: ignore[arg-type]
        tables.append(WordTable.load(out / "word_table.epoch0.txt", symbols(data)))
    assert tables[0] == tables[1]


def test_cached_data(data: Path, tmp_path: Path) -> None:
    """Trains on it where fairseq's own tasks do not, which want it fetched before; evaluates it."""
    folder = binarise(
        tmp_path, "--srcdict", data / "dict.txt", "--dataset-impl", "cached",
        train=data.parent / "train.txt", valid=data.parent / "valid.txt",
    )  # fmt: skip
    train(data, tmp_path / "mmap", CARRY, max_epoch=1)
    train(folder, tmp_path / "cached", CARRY, "--dataset-impl", "cached", max_epoch=1)
    one, two = (tmp_path / name / "checkpoint1.pt" for name in ("mmap", "cached"))
    assert table_of(one, (7, 7)) == table_of(two, (7, 7))
    for break_mode in ("none", "eos"):
        flags = ["--gen-subset", "valid", "--sample-break-mode", break_mode]
        loss = eval_lm(folder, two, "--dataset-impl", "cached", *flags)
        assert loss == pytest.approx(eval_lm(data, one, *flags), abs=1e-6)
