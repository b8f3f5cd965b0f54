"""Further word tables through fairseq's commands: made, kept, resumed, given as files."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq_run import (
    TASK,
    TRANSLATION,
    run,
    symbols,
    train,
    train_translation,
    valid_losses,
)
from torch import Tensor

from fairseq_lightrnn.allocation import descent
from fairseq_lightrnn.allocation.clustering import table_of_vectors
from fairseq_lightrnn.allocation.cooccurrence import CoOccurrence
from fairseq_lightrnn.allocation.initial_table import TableMaker, cooccurrence_vectors
from fairseq_lightrnn.allocation.sums import sums_of_tables
from fairseq_lightrnn.commands.reallocate import main as reallocate
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.language_model import LanguageModel


def load(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=False)["model"]
    return state


def named(state: dict[str, Tensor], end: str) -> str:
    """The name under which a checkpoint holds what ends so."""
    (name,) = [name for name in state if name.endswith(end)]
    return name


def first_table(state: dict[str, Tensor]) -> Tensor:
    """The table in force; words may be read by it too, or by another one."""
    names = [name for name in state if name.endswith(".coordinates") and ".tables." not in name]
    own = [name for name in names if name.endswith("softmax.table.coordinates")]
    (name,) = own or names
    return state[name]


def output_vectors(state: dict[str, Tensor]) -> Tensor:
    """Those of further tables."""
    return state[named(state, ".output_vectors")]


@pytest.mark.parametrize(
    "architecture", ["lightrnn_lm", "lightrnn_lm_gated", "lightrnn_transformer_lm"]
)
def test_training(
    data: Path,
    tmp_path: Path,
    architecture: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tables differ, are written, survive a resume, and can be given.

    Words move in them where they are read by others, which stay.
    """
    # In so short a text hardly a move brings three nats.
    monkeypatch.setattr(descent, "_WORTH_A_FURTHER_MOVE", 0.1)
    flags = {"arch": architecture, "max_epoch": 3, "reallocate_epochs": 1, "dropout": 0}
    with caplog.at_level(logging.INFO):
        losses = valid_losses(train(data, tmp_path / "a", further_tables=2, **flags))
    assert "initial further table 2: WordTable(48 words, 7×7" in caplog.text
    states = [load(tmp_path / "a" / f"checkpoint{epoch}.pt") for epoch in (1, 3)]
    names = [named(states[0], f".tables.{number}.coordinates") for number in (0, 1)]
    moves = architecture != "lightrnn_lm"
    read_by = [name.replace(".tables.", ".kept_tables.") if moves else name for name in names]
    for number, (name, kept) in enumerate(zip(names, read_by, strict=True), 1):
        assert torch.equal(states[0][name], states[1][name]) != moves
        for state in states:
            assert torch.equal(state[kept], states[0][name])
        for state, epoch in zip(states, (".epoch0", ""), strict=True):
            file = tmp_path / "a" / f"further_word_table{number}{epoch}.txt"
            table = WordTable.load(file, symbols(data))
            assert table == WordTable(state[name].numpy(), (7, 7))
    first = first_table(states[0])
    assert not torch.equal(first, first_table(states[1]))
    assert not torch.equal(states[0][names[0]], states[0][names[1]])
    assert not torch.equal(states[0][names[0]], first)
    assert output_vectors(states[1]).abs().sum() > 0

    train(data, tmp_path / "b", further_tables=2, **{**flags, "max_epoch": 2})
    train(data, tmp_path / "b", further_tables=2, **flags)  # goes on from checkpoint_last.pt
    resumed = load(tmp_path / "b" / "checkpoint3.pt")
    assert all(torch.equal(value, resumed[name]) for name, value in states[1].items())

    files = ",".join(str(tmp_path / "a" / f"further_word_table{n}.epoch0.txt") for n in (1, 2))
    tables = {"initial_table": tmp_path / "a" / "word_table.epoch0.txt", "further_tables": files}
    given = valid_losses(train(data, tmp_path / "c", **tables, **flags))
    assert given == losses
    for file in (tmp_path / "a").glob("*word_table*.txt"):  # a checkpoint needs none of them
        file.unlink()
    path = tmp_path / "c" / "checkpoint3.pt"
    run("eval-lm", data, *TASK, "--path", path, "--cpu", "--num-workers", 0)
    model = LanguageModel.from_pretrained(path, data)
    assert model.score("w1 w2").perplexity > 1
    digests = model.parameter_digest(), model.table_digest()
    moved = model.decoder.head.softmax.features[-1].tables[1]
    moved.seat(WordTable.from_cells(np.roll(moved.table().cells, 1), moved.shape))
    assert model.parameter_digest() == digests[0]
    assert model.table_digest() != digests[1]
    new = tmp_path / "new.pt"
    reallocate([str(path), str(data), "--output", str(new)])
    train(data, tmp_path / "d", restore_file=new, further_tables=2, **{**flags, "max_epoch": 4})
    gone_on = load(tmp_path / "d" / "checkpoint4.pt")
    for name, kept in zip(names, read_by, strict=True):
        assert torch.equal(gone_on[kept], states[0][name])


@pytest.mark.parametrize(
    "flags",
    [
        {"arch": "lightrnn_translation_gated", "table_shape": "3d", "label_smoothing": 0.1},
        {"arch": "lightrnn_transformer", "further_tables": 1, "source_table": "own"},
    ],
)
def test_translation(pairs: Path, tmp_path: Path, flags: dict[str, object]) -> None:
    train_translation(pairs, tmp_path, **{"max_epoch": 1, "further_tables": 2, **flags})
    state = load(tmp_path / "checkpoint1.pt")
    assert output_vectors(state).abs().sum() > 0
    assert not any(name.startswith("encoder.") and ".tables." in name for name in state)
    run("generate", pairs, *TRANSLATION, "--path", tmp_path / "checkpoint1.pt",
        "--gen-subset", "test", "--cpu", "--beam", 3)  # fmt: skip


def test_zero_tables(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", max_epoch=1)
    train(data, tmp_path / "b", max_epoch=1, further_tables="00")
    one, other = (load(tmp_path / name / "checkpoint1.pt") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_table_twice(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(data, tmp_path / "a", max_epoch=1)
    file = tmp_path / "a" / "word_table.txt"
    with caplog.at_level(logging.WARNING):
        train(data, tmp_path / "b", max_epoch=1, initial_table=file, further_tables=file)
    assert "further table 1 seats all words as one before it does" in caplog.text


def test_text_of_both_sides(pairs: Path, tmp_path: Path) -> None:
    """Where the first table is made from no text, the further ones still are."""
    flags = {"max_epoch": 1, "table_text": "both", "initial_table": "frequency"}
    train_translation(pairs, tmp_path / "a", further_tables=1, **flags)
    with pytest.raises(SystemExit, match="--table-text both: --initial-table frequency looks at"):
        train_translation(pairs, tmp_path / "b", **flags)


def test_shared_vectors(data: Path, tmp_path: Path) -> None:
    train(
        data, tmp_path, arch="lightrnn_lm_gated", max_epoch=1, further_tables=1,
        component_vectors="shared",
    )  # fmt: skip
    state = load(tmp_path / "checkpoint1.pt")
    assert named(state, ".input_vectors")
    assert not any(name.endswith(".output_vectors") for name in state)


def test_random_tables_of_a_random_start(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, max_epoch=1, initial_table="random", further_tables=1, seed=5)
    table = WordTable.load(tmp_path / "further_word_table1.txt", symbols(data))
    first = WordTable.load(tmp_path / "word_table.txt", symbols(data))
    assert first == TableMaker(48, np.zeros(48), list, 5).make("random", (7, 7))
    assert sorted(table.cells) == sorted(first.cells)
    assert (table.cells == first.cells).mean() < 0.3


def test_another_shape(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, max_epoch=1, further_tables=1)
    with pytest.raises(SystemExit, match="--table-shape 6x8: the model has further tables of"):
        reallocate([
            str(tmp_path / "checkpoint1.pt"), str(data), "--table-shape", "6x8",
            "--output", str(tmp_path / "new.pt"),
        ])  # fmt: skip


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("-1", "--further-tables -1: neither a number of tables nor a file"),
        ("no.txt", "--further-tables no.txt: neither a number"),
        ("2.5", "--further-tables 2.5: neither a number"),
        ("3,", "--further-tables 3: neither a number"),
        ("", "--further-tables : neither a number"),
        (".", "--further-tables .: neither a number"),
    ],
)
def test_values(data: Path, tmp_path: Path, value: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train(data, tmp_path, f"--further-tables={value}")


def test_one_component(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--further-tables 2: with --table-shape 1d every word"):
        train(data, tmp_path, table_shape="1d", further_tables=2)


def test_a_table_of_another_shape(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", max_epoch=1, table_shape="6x8")
    file = tmp_path / "a" / "word_table.txt"
    with pytest.raises(SystemExit, match=r"word_table.txt is a table of shape \(6, 8\), the first"):
        train(data, tmp_path / "b", further_tables=file)


def test_checkpoints_keep_their_number_of_tables(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", max_epoch=1, further_tables=2)
    with pytest.raises(SystemExit, match="made with --further-tables 2, not 0: give it again"):
        train(data, tmp_path / "b", restore_file=tmp_path / "a" / "checkpoint1.pt")


def test_further_tables_are_made_from_what_those_before_do_not_say() -> None:
    random = np.random.default_rng(0)
    text = [random.choice(60, size=4000, p=random.dirichlet(np.ones(60)))]
    maker = TableMaker(60, np.bincount(text[0], minlength=60), lambda: text, 3)
    first = maker.make("cooccurrence", (8, 8))
    second = maker.make("cooccurrence", (8, 8), [first])
    third = maker.make("cooccurrence", (8, 8), [first, second])
    vectors, weights, row_dims = cooccurrence_vectors(text, 60, CoOccurrence(), 3)

    def lacking(*tables: WordTable) -> float:
        left = sums_of_tables(vectors, weights, tables).rest()[:]
        return float((weights * (left**2).sum(axis=1)).sum())

    assert lacking(first) > lacking(first, second) > lacking(first, second, third)
    for seed in range(5):  # tables of the same vectors say much the same
        alike = table_of_vectors(vectors, weights, row_dims=row_dims, shape=(8, 8), seed=seed)
        assert lacking(first, second) < lacking(first, alike)
