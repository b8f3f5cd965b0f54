from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import symbols, train, valid_losses

from fairseq_lightrnn.allocation.reallocation import reallocate as solve
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.commands.reallocate import main
from fairseq_lightrnn.word_table import WordTable


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, reallocate_epochs=1, max_epoch=2, initial_table="random")
    return save_dir


def reallocate(checkpoint: Path, data: Path, output: Path, *flags: Any) -> dict[str, Any]:
    report = output.with_suffix(".json")
    main([str(p) for p in (checkpoint, data, "--output", output, "--report", report, *flags)])
    return json.loads(report.read_text())


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def test_the_same_table_as_in_training(data: Path, trained: Path, tmp_path: Path) -> None:
    """After epoch 1, the command does what training does after epoch 1."""
    report = reallocate(trained / "checkpoint1.pt", data, tmp_path / "new.pt")
    record = json.loads((trained / "reallocations.jsonl").read_text())
    same = ("objective", "moved", "words", "tokens", "table")
    assert {key: report[key] for key in same} == {key: record[key] for key in same}
    for key in ("cost_before", "cost_after", "lower_bound"):
        assert report[key] == pytest.approx(record[key], abs=1e-6)
    new, old = load(tmp_path / "new.pt"), load(trained / "checkpoint1.pt")
    changed = [
        name for name in old["model"] if not torch.equal(new["model"][name], old["model"][name])
    ]
    assert changed == [
        "decoder.reallocation_round", "decoder.table.coordinates",
    ]  # fmt: skip


def test_a_margin(data: Path, trained: Path, tmp_path: Path) -> None:
    report = reallocate(trained / "checkpoint1.pt", data, tmp_path / "new.pt", "--margin", 100)
    assert report["moved"] == 0
    assert report["gap"] == pytest.approx(0, abs=1e-9)
    for flags, message in (
        (("--margin", -1), "--margin -1.0: must not be negative"),
        (("--margin", 1, "--table-shape", "6x8"), "--margin: --table and --table-shape seat"),
    ):
        with pytest.raises(SystemExit, match=message):
            reallocate(trained / "checkpoint1.pt", data, tmp_path / "new.pt", *flags)


def test_columns_from_statistics_gathered_again(data: Path, tmp_path: Path) -> None:
    """As training does with --reallocation-regather, the table that words are read by kept."""
    train(
        data, tmp_path, "--keep-input-table", "--reallocation-regather", arch="lightrnn_lm_gated",
        reallocate_epochs=1, max_epoch=2, initial_table="random",
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoint1.pt"
    record = json.loads((tmp_path / "reallocations.jsonl").read_text())
    report = reallocate(checkpoint, data, tmp_path / "new.pt", "--regather")
    same = ("objective", "moved", "words", "tokens", "table")
    assert {key: report[key] for key in same} == {key: record[key] for key in same}
    assert report["cost_after"] == pytest.approx(record["cost_after"], abs=1e-6)
    once = reallocate(checkpoint, data, tmp_path / "once.pt")
    assert once["cost_after"] == pytest.approx(record["cost_after"], abs=1e-6)  # the rows
    assert once["table"] != report["table"]
    for flags, message in (
        (("--objective", "joint"), "--regather belongs to --objective row-first"),
        (("--margin", 1), "--margin and --regather: give one of them"),
        (("--table-shape", "6x8"), "--regather: --table and --table-shape seat"),
    ):
        with pytest.raises(SystemExit, match=message):
            reallocate(checkpoint, data, tmp_path / "new.pt", "--regather", *flags)


def test_the_same_table_with_carried_state(data: Path, tmp_path: Path) -> None:
    """Statistics of a model that carries its state are those of its lanes."""
    train(
        data, tmp_path, "--carry-hidden-state", reallocate_epochs=1, max_epoch=2,
        initial_table="random", batch_size=4, max_tokens=None,
    )  # fmt: skip
    report = reallocate(tmp_path / "checkpoint1.pt", data, tmp_path / "new.pt")
    record = json.loads((tmp_path / "reallocations.jsonl").read_text())
    assert report["table"] == record["table"]
    assert report["cost_before"] == pytest.approx(record["cost_before"], abs=1e-6)


def test_exported_statistics_give_the_same_table(data: Path, trained: Path, tmp_path: Path) -> None:
    checkpoint, folder = trained / "checkpoint1.pt", tmp_path / "export"
    report = reallocate(checkpoint, data, tmp_path / "new.pt", "--export", folder)
    with np.load(folder / "rest.npz") as file:
        rest = dict(file)
    statistics = AllocationStatistics(48, 2, 8)
    statistics.sums.copy_(torch.from_numpy(np.load(folder / "sums.npy")))
    statistics.counts.copy_(torch.from_numpy(rest["counts"]))
    result = solve(
        WordTable.from_cells(rest["cells"], rest["shape"]),
        statistics,
        [torch.from_numpy(rest[f"vectors{i}"]) for i in (0, 1)],
        [torch.from_numpy(rest[f"biases{i}"]) for i in (0, 1)],
    )
    assert result.table.digest() == report["table"]
    with pytest.raises(SystemExit, match="exists already"):
        reallocate(checkpoint, data, tmp_path / "new.pt", "--export", folder)


def test_a_table_of_the_users_own(data: Path, trained: Path, tmp_path: Path) -> None:
    """Training goes on from the checkpoint with the words seated as in the file."""
    names = symbols(data)
    cells = np.random.default_rng(5).permutation(48)
    table = WordTable.from_cells(cells, (7, 7))
    table.save(tmp_path / "table.txt", names)
    checkpoint = trained / "checkpoint1.pt"
    report = reallocate(checkpoint, data, tmp_path / "new.pt", "--table", tmp_path / "table.txt")
    new, old = load(tmp_path / "new.pt"), load(checkpoint)
    assert new["model"]["decoder.table.coordinates"].equal(
        torch.from_numpy(table.coordinates.astype("int32"))
    )
    before = WordTable(old["model"]["decoder.table.coordinates"].numpy(), (7, 7))
    moved = int((before.cells != table.cells).sum())
    assert report == {"moved": moved, "words": 48, "table": table.digest()}
    train(data, tmp_path / "on", restore_file=tmp_path / "new.pt", max_epoch=2)
    after = load(tmp_path / "on" / "checkpoint2.pt")["model"]["decoder.table.coordinates"]
    assert after.equal(new["model"]["decoder.table.coordinates"])
    for flags, message in {
        ("--table", "table.txt", "--table-shape", "8x6"): "--table and --table-shape: give one",
        ("--table", tmp_path / "none.txt"): "none.txt",
    }.items():
        with pytest.raises(SystemExit, match=message):
            reallocate(checkpoint, data, tmp_path / "no.pt", *flags)
    WordTable.from_cells(np.arange(48), (8, 6)).save(tmp_path / "table.txt", names)
    with pytest.raises(SystemExit, match="its shape is 8x6, the model's 7x7"):
        reallocate(checkpoint, data, tmp_path / "no.pt", "--table", tmp_path / "table.txt")


def test_training_goes_on_from_the_new_checkpoint(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    reallocate(
        trained / "checkpoint2.pt", data, tmp_path / "new.pt", "--objective", "joint",
        "--row-weight", 2, "--words", 400,
    )  # fmt: skip
    records = train(data, tmp_path / "on", restore_file=tmp_path / "new.pt", max_epoch=4)
    assert len(valid_losses(records)) == 2
    assert load(tmp_path / "on" / "checkpoint4.pt")["model"]["decoder.reallocation_round"] == 2


@pytest.mark.parametrize("shape", ["5x10", "4x4x4", "48"])
def test_another_shape_is_trained_further(
    data: Path, trained: Path, tmp_path: Path, shape: str
) -> None:
    report = reallocate(
        trained / "checkpoint2.pt", data, tmp_path / "new.pt", "--table-shape", shape
    )
    assert report["new_shape"] == [int(size) for size in shape.split("x")]
    records = train(
        data, tmp_path / "on", "--reset-optimizer", restore_file=tmp_path / "new.pt", max_epoch=4,
        table_shape=shape, num_components=len(report["new_shape"]),
    )  # fmt: skip
    # Better than guessing (5.6 bits) and than where the first training stood after its first epoch.
    assert valid_losses(records)[-1] < 5.5


def test_mistakes_end_in_one_sentence(data: Path, trained: Path, tmp_path: Path) -> None:
    checkpoint, output = trained / "checkpoint2.pt", tmp_path / "new.pt"
    for flags, message in [
        (["--table-shape", "2x2"], "--table-shape 2x2: a table of shape 2x2 has 4 cells"),
        (["--words", 0], "--reallocation-words 0: must be above 0"),
        (["--memory", 1e-9], "the counts of 48 words alone take"),
    ]:
        with pytest.raises(SystemExit, match=message):
            reallocate(checkpoint, data, output, *flags)
    with pytest.raises(SystemExit, match="absent.pt: no such checkpoint"):
        reallocate(tmp_path / "absent.pt", data, output)
    with pytest.raises(SystemExit, match="there is no such folder to write into"):
        reallocate(checkpoint, data, tmp_path / "absent" / "new.pt")
    assert list(tmp_path.iterdir()) == []
