"""The one way in which this package reads text and writes files.

Written is what the path leads to: devices and pipes get the bytes, symbolic links are followed,
and a regular file appears whole or not at all, with the mode and owner that it had. ``-`` is the
standard input or output. Text is UTF-8; what is compressed by gzip is read as what it holds.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import re
import secrets
import shutil
import stat
import sys
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

__all__ = [
    "STANDARD",
    "check_new_folder",
    "check_output",
    "check_outputs",
    "open_bytes",
    "read_lines",
    "read_text",
    "text_chunks",
    "whole_file",
    "whole_folder",
]

STANDARD = "-"
_BOM = "\ufeff"
_GZIP = b"\x1f\x8b"
_READ_AT_ONCE = 1 << 20
# Paths of files that this process has open already: opened anew, they would begin anew.
_OPEN = re.compile(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)")
# Standard inputs of this process that were read: from a second reading there is nothing to get.
_READ: weakref.WeakSet[Any] = weakref.WeakSet()
# What writing into a full place ends in; the system names no file then.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: str | Path, flag: str = "") -> None:
    """Refuses, before any work is done, what :func:`whole_file` would refuse in the end.

    Raises:
        ValueError: if the path is a folder or in none, or may not be written; the flag is named, if
            there is one.
    """
    path = os.fspath(path)
    if path == STANDARD or _OPEN.fullmatch(path):
        return
    name = f"{flag} {path}" if flag else path
    if os.path.isdir(path):
        raise ValueError(f"{name}: is a folder, not a file to write")
    folder = os.path.dirname(os.path.realpath(path))
    if not path or not os.path.isdir(folder):
        raise ValueError(f"{name}: there is no folder {folder} to write into")
    kept = _status(path)
    if kept is not None and not os.access(path, os.W_OK):
        raise ValueError(f"{name}: is write-protected")
    if kept is None or stat.S_ISREG(kept.st_mode):
        _check_room(folder, name)


def check_outputs(
    paths: Mapping[str, str | Path | None], inputs: Iterable[str | Path | None] = ()
) -> None:
    """Does :func:`check_output` for flags, of which none may write what another writes or reads.

    Args:
        paths: by flag; None is passed over.
        inputs: files that are read; None and the standard input are passed over.

    Raises:
        ValueError: naming flag and path.
    """
    known: dict[str, str] = {}
    read = {os.path.realpath(path) for path in inputs if path not in (None, STANDARD)}
    for flag, path in paths.items():
        if path is None:
            continue
        check_output(path, flag)
        place = os.path.realpath(path)
        if os.fspath(path) == STANDARD or os.path.exists(place) and not os.path.isfile(place):
            continue
        if place in known:
            raise ValueError(f"{flag} {path}: {known[place]} writes this file; give another one")
        if place in read:
            raise ValueError(f"{flag} {path}: is what is read here; give another file")
        known[place] = flag


def check_new_folder(path: str | Path, flag: str = "") -> None:
    """Refuses, before any work is done, a folder that cannot be made, or that holds something.

    Raises:
        ValueError: naming the path, and the flag if there is one.
    """
    path = Path(path)
    name = f"{flag} {path}" if flag else str(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{name}: exists already; give a new folder")
    parent = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not parent.is_dir():
        raise ValueError(f"{name}: {parent} is a file, not a folder")
    _check_room(parent, name)


def _check_room(folder: str | Path, name: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: nothing may be written into the folder {folder}")


@contextmanager
def whole_file(path: str | Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Opens a file for writing.

    Args:
        path: the file; ``-`` is the standard output.
        binary: write bytes instead of text.

    Raises:
        ValueError: as :func:`check_output`.
        OSError: whatever else stands in the way, such as a full disk; it names the path.
    """
    path = os.fspath(path)
    if path == STANDARD:
        if sys.stdout is None:
            raise ValueError("the standard output is closed")
        yield sys.stdout.buffer if binary else sys.stdout
        sys.stdout.flush()
        return
    if not path:
        raise ValueError("the name of a file to write is empty")
    already = _OPEN.fullmatch(path)
    if already is not None:
        number = {"stdout": 1, "stderr": 2}.get(already[1]) or int(already[2] or 0)
        if sys.stdout is not None:
            sys.stdout.flush()
        with _opened(os.dup(number), binary, path) as file:
            yield file
        return
    check_output(path)
    kept = _status(path)
    if kept is not None and not stat.S_ISREG(kept.st_mode):
        with _opened(os.open(path, os.O_WRONLY), binary, path) as file:
            yield file
        return
    target = os.path.realpath(path)
    partial = _partial(target)
    mode = 0o666 if kept is None else stat.S_IMODE(kept.st_mode)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with _opened(descriptor, binary, path) as file:
            if kept is not None:
                with contextlib.suppress(OSError):  # only root can give a file away
                    os.fchown(descriptor, kept.st_uid, kept.st_gid)
                os.fchmod(descriptor, mode)
            yield file
        os.replace(partial, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Makes a folder that appears with all its files or not at all.

    Yields:
        Another folder, of what is to be in it.

    Raises:
        ValueError: as :func:`check_new_folder`.
        OSError: whatever else stands in the way.
    """
    check_new_folder(path)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(_partial(target))
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(target: str | Path) -> str:
    """Returns a name beside that of a whole file or folder, for what is not whole yet."""
    folder, name = os.path.split(target)
    # Short enough for every file system, and hidden if the machine dies.
    return os.path.join(folder, f".{name[:40]}.{secrets.token_hex(8)}")


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


class _Output(io.FileIO):
    """An open file whose errors name a path, as that of a full disk does not by itself."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, "w")
        self._path = path

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = self._path
            raise


def _opened(descriptor: int, binary: bool, path: str) -> IO[Any]:
    file = io.BufferedWriter(_Output(descriptor, path))
    return file if binary else io.TextIOWrapper(file, encoding="utf-8", newline="\n")


@contextmanager
def open_bytes(path: str | Path, what: str = "file") -> Iterator[BinaryIO]:
    """Opens a file, pipe or device for reading, decompressed if it is compressed by gzip.

    Args:
        path: ``-`` is the standard input, which can be read once.
        what: it should be, for errors.

    Raises:
        ValueError: if there is no such file, it is a folder or damaged, or it was read already.
    """
    path = os.fspath(path)
    name = "standard input" if path == STANDARD else path
    with contextlib.ExitStack() as stack:
        if path == STANDARD:
            if sys.stdin is None:
                raise ValueError("the standard input is closed")
            raw: Any = sys.stdin.buffer
            if raw in _READ:
                raise ValueError("-: the standard input can be read once; give files for the rest")
            _READ.add(raw)
        else:
            try:
                raw = stack.enter_context(open(path, "rb"))
            except (FileNotFoundError, NotADirectoryError):
                raise ValueError(f"{path}: no such {what}") from None
            except IsADirectoryError:
                raise ValueError(f"{path}: no such {what}, it is a folder") from None
        if not hasattr(raw, "peek"):
            raw = io.BufferedReader(raw)
        compressed = raw.peek(2)[:2] == _GZIP
        try:
            file: Any = stack.enter_context(gzip.GzipFile(fileobj=raw)) if compressed else raw
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{name}: is damaged, gzip cannot read it ({error})") from None


def text_chunks(path: str | Path, what: str = "text file") -> Iterator[list[str]]:
    """Yields the lines of a text, as many at a time as can be read without waiting for more.

    Only a newline ends a line, with a carriage return before it or not. A byte-order mark at the
    beginning is no part of the text.

    Args:
        path: ``-`` is the standard input.
        what: it should be, for errors.

    Raises:
        ValueError: if there is no such file, or a line is not UTF-8; file, line and byte are named.
    """
    name = "standard input" if os.fspath(path) == STANDARD else os.fspath(path)
    number = 0
    begun: list[bytes] = []  # the pieces of a line whose end has not come

    def decoded(line: bytes) -> str:
        nonlocal number
        number += 1
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: line {number} is not UTF-8 (byte {line[error.start]:#04x} at column "
                f"{error.start + 1}); convert it, for example with iconv -t utf-8"
            ) from None
        return (text.removeprefix(_BOM) if number == 1 else text).removesuffix("\r")

    with open_bytes(path, what) as file:
        while chunk := file.read1(_READ_AT_ONCE):  # type: ignore[attr-defined]
            first, *rest = chunk.split(b"\n")
            begun.append(first)
            if rest:
                lines = [b"".join(begun), *rest[:-1]]
                begun = [rest[-1]]
                yield [decoded(line) for line in lines]
        last = b"".join(begun)
        if last:
            yield [decoded(last)]


def read_lines(path: str | Path, what: str = "text file") -> Iterator[str]:
    """Yields the lines of a text one by one; see :func:`text_chunks`."""
    for chunk in text_chunks(path, what):
        yield from chunk


def read_text(path: str | Path, what: str = "file") -> str:
    """Returns a text with its line ends as they are, but without a byte-order mark.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    with open_bytes(path, what) as file:
        content = file.read()
    try:
        return content.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a {what}, its bytes are not UTF-8 ({error})") from None
