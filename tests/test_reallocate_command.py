from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import TINY_TRANSFORMER, symbols, train, train_translation, valid_losses

from fairseq_lightrnn.allocation.paper import reallocate as solve
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.commands.reallocate import main
from fairseq_lightrnn.core.table import WordTable

TABLE, ROUND = "decoder.core.reader.seats.coordinates", "decoder.reallocations.round"


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
    for key in ("loss_before", "loss_after", "predicted_gain"):
        assert report[key] == pytest.approx(record[key], abs=1e-6)
    new, old = load(tmp_path / "new.pt"), load(trained / "checkpoint1.pt")
    changed = [
        name for name in old["model"] if not torch.equal(new["model"][name], old["model"][name])
    ]
    assert changed == [TABLE, ROUND]


def test_the_same_table_with_carried_state(data: Path, tmp_path: Path) -> None:
    """Statistics of a model that carries its state are those of its lanes."""
    train(
        data, tmp_path, "--carry-hidden-state", reallocate_epochs=1, max_epoch=2,
        initial_table="random", batch_size=4, max_tokens=None,
    )  # fmt: skip
    with pytest.raises(SystemExit, match="--max-tokens 9: the model carries its hidden state"):
        reallocate(tmp_path / "checkpoint1.pt", data, tmp_path / "new.pt", "--max-tokens", 9)
    report = reallocate(tmp_path / "checkpoint1.pt", data, tmp_path / "new.pt")
    record = json.loads((tmp_path / "reallocations.jsonl").read_text())
    assert report["table"] == record["table"]
    assert report["loss_before"] == pytest.approx(record["loss_before"], abs=1e-6)


def test_exported_statistics_give_the_same_table(data: Path, trained: Path, tmp_path: Path) -> None:
    checkpoint, folder = trained / "checkpoint1.pt", tmp_path / "export"
    flags = ["--export", folder, "--objective", "row-first"]
    report = reallocate(checkpoint, data, tmp_path / "new.pt", *flags)
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
    assert new["model"][TABLE].equal(torch.from_numpy(table.coordinates.astype("int32")))
    before = WordTable(old["model"][TABLE].numpy(), (7, 7))
    moved = int((before.cells != table.cells).sum())
    assert report == {"moved": moved, "words": 48, "table": table.digest()}
    train(data, tmp_path / "on", restore_file=tmp_path / "new.pt", max_epoch=2)
    after = load(tmp_path / "on" / "checkpoint2.pt")["model"][TABLE]
    assert after.equal(new["model"][TABLE])
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
        "--words", 400, "--memory", 1,
    )  # fmt: skip
    records = train(data, tmp_path / "on", restore_file=tmp_path / "new.pt", max_epoch=4)
    assert len(valid_losses(records)) == 2
    assert load(tmp_path / "on" / "checkpoint4.pt")["model"][ROUND] == 2


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
        table_shape=shape,
    )  # fmt: skip
    # Better than guessing (5.6 bits) and than where the first training stood after its first epoch.
    assert valid_losses(records)[-1] < 5.51


@pytest.mark.parametrize("vectors", ["separate", "shared"])
def test_what_does_not_depend_on_the_shape_is_kept(
    data: Path, tmp_path: Path, vectors: str
) -> None:
    train(
        data, tmp_path, max_epoch=1, initial_table="random", word_dim=3, component_vectors=vectors
    )
    checkpoint = tmp_path / "checkpoint1.pt"
    reallocate(checkpoint, data, tmp_path / "new.pt", "--table-shape", "6x8")
    new, old = load(tmp_path / "new.pt"), load(checkpoint)
    assert new["cfg"]["model"]["table_shape"] == "6x8"
    assert new["model"].keys() == old["model"].keys()
    changed = {
        name
        for name, value in old["model"].items()
        if value.shape != new["model"][name].shape or not value.equal(new["model"][name])
    }
    names = ["core.reader.vectors.weight", "core.head.softmax.bias"]
    if vectors == "separate":
        names.append("core.head.softmax.vectors.weight")
    assert changed == {TABLE, *(f"decoder.{name}" for name in names)}


def test_a_transformer(data: Path, tmp_path: Path) -> None:
    sizes = {k: v for k, v in TINY_TRANSFORMER.items() if not k.startswith("encoder")}
    train(
        data, tmp_path, arch="lightrnn_transformer_lm", reallocate_epochs=1, max_epoch=2,
        initial_table="random", **sizes,
    )  # fmt: skip
    report = reallocate(tmp_path / "checkpoint1.pt", data, tmp_path / "new.pt")
    record = json.loads((tmp_path / "reallocations.jsonl").read_text())
    assert report["moved"] > 0
    assert report["table"] == record["table"]
    with pytest.raises(SystemExit, match="--table-shape 6x8: gates of another shape cannot"):
        reallocate(tmp_path / "checkpoint1.pt", data, tmp_path / "no.pt", "--table-shape", "6x8")


def test_translation(pairs: Path, tmp_path: Path) -> None:
    train_translation(
        pairs, tmp_path, reallocate_epochs=1, max_epoch=2, initial_table="random",
        source_table="own",
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoint1.pt"
    report = reallocate(checkpoint, pairs, tmp_path / "new.pt")
    record = json.loads((tmp_path / "reallocations.jsonl").read_text())
    assert report["table"] == record["table"]
    report = reallocate(checkpoint, pairs, tmp_path / "new.pt", "--table-shape", "5x8")
    assert report["new_shape"] == [5, 8]
    with pytest.raises(SystemExit, match="4x4x4: the model has a table of the source's words"):
        reallocate(checkpoint, pairs, tmp_path / "no.pt", "--table-shape", "4x4x4")


def test_further_tables_are_not_made_anew(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, max_epoch=1, initial_table="random", further_tables=1)
    with pytest.raises(SystemExit, match="--table-shape 6x8: the model has further tables"):
        reallocate(tmp_path / "checkpoint1.pt", data, tmp_path / "no.pt", "--table-shape", "6x8")


def test_mistakes_end_in_one_sentence(data: Path, trained: Path, tmp_path: Path) -> None:
    checkpoint, output = trained / "checkpoint2.pt", tmp_path / "new.pt"
    for flags, message in [
        (["--table-shape", "2x2"], "--table-shape 2x2: a table of shape 2x2 has 4 cells"),
        (["--words", 0], "--words 0: must be above 0"),
        (["--memory", 1e-9], "--memory 1e-09: the counts of 48 words alone take"),
        (["--table-shape", "6x9", "--objective", "joint"], "--objective joint: words are seated"),
        (["--export", checkpoint / "new"], "--export .*: .*checkpoint2.pt is a file"),
    ]:
        with pytest.raises(SystemExit, match=message):
            reallocate(checkpoint, data, output, *flags)
    with pytest.raises(SystemExit, match="absent.pt: no such checkpoint"):
        reallocate(tmp_path / "absent.pt", data, output)
    with pytest.raises(SystemExit, match="--output .*: there is no folder .* to write into"):
        reallocate(checkpoint, data, tmp_path / "absent" / "new.pt")
    with pytest.raises(SystemExit, match="--output .*: is what is read here; give another file"):
        reallocate(checkpoint, data, checkpoint)
    with pytest.raises(SystemExit, match="--output .*: is a folder, not a file to write"):
        reallocate(checkpoint, data, tmp_path)
    given = {
        "--words": 5, "--objective": "joint", "--split": "valid", "--memory": 1, "--max-tokens": 99,
    }  # fmt: skip
    for flag, value in given.items():
        with pytest.raises(SystemExit, match=f"--table and {flag}: give one of them"):
            reallocate(checkpoint, data, output, "--table", trained / "word_table.txt", flag, value)
    with pytest.raises(SystemExit, match="--report .*new.json: --output writes this file"):
        reallocate(checkpoint, data, tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arch", ["lightrnn_lm", "lightrnn_lm_gated"])
def test_the_shape_that_the_table_has_is_no_new_one(data: Path, tmp_path: Path, arch: str) -> None:
    flags = ["--component-vectors", "separate"]
    train(data, tmp_path, *flags, max_epoch=1, initial_table="random", arch=arch)
    reallocate(tmp_path, data, tmp_path / "a.pt")  # the best checkpoint of a folder
    reallocate(tmp_path / "checkpoint_best.pt", data, tmp_path / "b.pt", "--table-shape", "7x7")
    one, two = load(tmp_path / "a.pt"), load(tmp_path / "b.pt")
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():
        assert torch.equal(two["model"][name], value), name
