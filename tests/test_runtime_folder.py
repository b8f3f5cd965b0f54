"""Folders of exported models: packed numbers, hashes, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.runtime.folder import pack, read_folder, unpack, write_folder

FILES = {"one.onnx": b"one" * 100, "words.npz": b"words"}


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_numbers_survive_packing(numbers: list[int]) -> None:
    array = np.array(numbers, dtype=np.int64)
    found = unpack(pack({"a": array, "b": np.zeros((2, 3), dtype=np.int64)}))
    assert found["a"].tolist() == numbers
    assert found["b"].tolist() == [[0, 0, 0]] * 2


def test_nineteen_bits_take_nineteen_bits() -> None:
    cells = np.random.default_rng(0).permutation(1 << 18)
    assert len(pack({"cells": cells})) < 18.5 / 8 * len(cells)


def test_all_stand_in_row_major_order() -> None:
    array = np.asfortranarray(np.arange(600).reshape(20, 30))
    with np.load(io.BytesIO(pack({"a": array}))) as stored:
        planes = stored["a"]
    assert planes.flags.c_contiguous
    assert (planes[0] + 256 * planes[1].astype(int)).tolist() == array.tolist()


def test_equal_content_gives_equal_bytes() -> None:
    assert pack({"a": np.arange(9)}) == pack({"a": np.arange(9)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "model", FILES, {"note": "é"})
    return tmp_path / "model"


def test_what_was_written_is_read(folder: Path) -> None:
    description, files = read_folder(folder)
    assert files == FILES
    assert description["note"] == "é"
    write_folder(folder, FILES, {"note": "again"})  # over itself
    assert read_folder(folder)[0]["note"] == "again"


def test_files_that_the_new_export_has_no_more_are_removed(folder: Path) -> None:
    (folder / "notes.txt").write_text("the user's")
    write_folder(folder, {"two.pt2": b"two"}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "notes.txt", "two.pt2"]


@pytest.mark.parametrize("content", ['{"format": "layers-model"}', "[]", "no JSON"])
def test_the_model_json_of_somebody_else_is_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match="holds something else than an exported model; name a new"):
        write_folder(tmp_path, FILES, {})
    assert (tmp_path / "model.json").read_text() == content


@pytest.mark.parametrize("damage", [b"", b"one", b"one" * 99 + b"onf"])
def test_damaged_files_are_named(folder: Path, damage: bytes) -> None:
    (folder / "one.onnx").write_bytes(damage)
    with pytest.raises(ValueError, match=r"one\.onnx: is damaged, or of another export"):
        read_folder(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "words.npz").unlink()
    with pytest.raises(ValueError, match=r"words\.npz: is missing"):
        read_folder(folder)
    (folder / "model.json").unlink()
    with pytest.raises(ValueError, match=r"model\.json is missing"):
        read_folder(folder)
    with pytest.raises(ValueError, match="no such folder"):
        read_folder(folder / "nowhere")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"format": 1}', '{"format": "fairseq_lightrnn export"}', "\xff"]
)
def test_damaged_descriptions_are_named(folder: Path, text: str) -> None:
    (folder / "model.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"model\.json: is damaged"):
        read_folder(folder)


def test_other_versions_are_refused(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
    with pytest.raises(ValueError, match="another version"):
        read_folder(folder)


def test_folders_of_version_2_are_read(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    assert read_folder(folder)[1] == FILES


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something else"):
        write_folder(tmp_path, FILES, {})
    with pytest.raises(ValueError, match="is a file"):
        write_folder(tmp_path / "letter.txt", FILES, {})
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
