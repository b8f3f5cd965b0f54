"""The folder of an exported model: a JSON file that names all others, with their SHA-256."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_lightrnn.files import check_new_folder, read_text, whole_file

__all__ = [
    "DESCRIPTION",
    "WORDS",
    "check_folder",
    "model_digest",
    "pack",
    "read_folder",
    "unpack",
    "write_folder",
]

DESCRIPTION = "model.json"
WORDS = "words.npz"
_FORMAT = "fairseq_lightrnn export"
_VERSION = 3
_READABLE = 2, 3  # in those of version 2 no word moved in further tables


def check_folder(folder: str | Path) -> None:
    """Refuses a folder that an exported model cannot be written to.

    Raises:
        ValueError: if something else than an exported model has its name.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, the export is a folder")
    if folder.is_dir() and any(folder.iterdir()) and _files_of(folder) is None:
        raise ValueError(f"{folder}: holds something else than an exported model; name a new one")
    if not folder.exists():
        check_new_folder(folder)


def _files_of(folder: Path) -> list[str] | None:
    """Returns the files of the exported model in a folder, but for the first; None if none is."""
    try:
        return list(_read_description(folder / DESCRIPTION)[1])
    except ValueError:
        return None


def _read_description(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the JSON file of an exported model, of whatever version.

    Returns:
        What it says, and the SHA-256 of the others.

    Raises:
        ValueError: if it is not of an exported model.
    """
    try:
        description = json.loads(read_text(path))
        if description["format"] != _FORMAT or "version" not in description:
            raise ValueError
        files = dict(description["files"]).items()
        return description, {name: str(entry["sha256"]) for name, entry in files}
    except (ValueError, TypeError, LookupError, AttributeError):
        raise ValueError(f"{path}: is damaged, or not of an exported model") from None


def write_folder(
    folder: str | Path,
    files: Mapping[str, bytes],
    description: Mapping[str, Any],
    beside: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Writes an exported model; the JSON file comes last, so that nothing half-written is read.

    Files of an earlier export that the new one has no more are removed.

    Args:
        folder: made if it does not exist.
        files: by name.
        description: what else the JSON file is to say.
        beside: files that are no part of the model, by name.

    Returns:
        All that it says.

    Raises:
        ValueError: if something else than an exported model has the folder's name.
    """
    folder = Path(folder)
    check_folder(folder)
    before = _files_of(folder) or []
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    for name, content in {**(beside or {}), **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / name, binary=True) as file:
            file.write(content)
    result = {"format": _FORMAT, "version": _VERSION, **description, "files": hashes}
    with whole_file(folder / DESCRIPTION) as file:
        json.dump(result, file, indent=1, ensure_ascii=False)
        file.write("\n")
    for name in {Path(name).name for name in before} - files.keys():
        (folder / name).unlink(missing_ok=True)
    return result


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Reads an exported model and checks it.

    Returns:
        What its JSON file says, and the content of the others.

    Raises:
        ValueError: if a file is missing or not the one that the JSON file tells of; it is named.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of an exported model")
    if not path.is_file():
        raise ValueError(f"{folder}: holds no exported model ({DESCRIPTION} is missing)")
    description, hashes = _read_description(path)
    if description["version"] not in _READABLE:
        version = description["version"]
        raise ValueError(f"{path}: was written by another version ({version}); export it again")
    contents = {}
    for name, digest in hashes.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: is missing; copy the whole folder again")
        contents[name] = file.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise ValueError(
                f"{file}: is damaged, or of another export (its SHA-256 is not the one that "
                f"{DESCRIPTION} tells); copy the whole folder again"
            )
    return description, contents


def model_digest(description: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a model by what its JSON file says of the others."""
    hashes = {name: entry["sha256"] for name, entry in description["files"].items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Packs arrays of integers from 0 on into a compressed ``.npz``.

    Wider ones than a byte are stored as planes, first all lowest bytes, since that is what deflate
    makes something of: 19-bit numbers take 19 bits. They stand in row-major order, the only one
    that the browser reads.
    """
    stored = {}
    for name, array in arrays.items():
        planes = 1
        while array.size and int(array.max()) >> (8 * planes):
            planes += 1
        shifts = 8 * np.arange(planes).reshape(-1, *[1] * array.ndim)
        stored[name] = (array[None] >> shifts).astype(np.uint8, order="C")
    file = io.BytesIO()
    # numpy's savez_compressed, but at the strongest level and without the time of writing.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, planes_of in stored.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, planes_of, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")
            archive.writestr(info, entry.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return file.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays that :func:`pack` packed: uint8, or int32 of several planes."""
    arrays = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        for name in stored.files:
            planes = stored[name]
            if len(planes) == 1:
                arrays[name] = planes[0]
                continue
            total = planes[0].astype(np.int32)
            for number, plane in enumerate(planes[1:], 1):
                total |= plane.astype(np.int32) << (8 * number)
            arrays[name] = total
    return arrays
