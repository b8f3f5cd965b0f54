"""The one writer and the one reader of the package."""

from __future__ import annotations

import gzip
import io
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq_lightrnn.commands.table_page import write_table_page
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.files import (
    check_new_folder,
    check_output,
    check_outputs,
    read_lines,
    read_text,
    text_chunks,
    whole_file,
    whole_folder,
)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Lets no file grow beyond so many bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write(path: Any, text: str = "new\n") -> None:
    with whole_file(path) as file:
        file.write(text)


def received(pipe: Path, write_to: Any) -> bytes:
    """What a reader of a named pipe gets while something is written to it."""
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_to(pipe)
    reader.join()
    return found[0]


class TestWriting:
    def test_a_regular_file_is_whole_or_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write(path)
        assert path.read_text() == "new\n"
        with pytest.raises(ZeroDivisionError), whole_file(path) as file:
            file.write("half")
            file.flush()
            assert path.read_text() == "new\n"
            1 / 0  # noqa: B018
        assert path.read_text() == "new\n"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_is_whole_or_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "folder"
        with pytest.raises(ZeroDivisionError), whole_folder(path) as folder:
            (folder / "file").write_text("half")
            1 / 0  # noqa: B018
        assert list(path.parent.iterdir()) == []
        path.mkdir()  # an empty one is as good as none
        with whole_folder(path) as folder:
            (folder / "file").write_text("whole")
            assert list(path.iterdir()) == []
        assert (path / "file").read_text() == "whole"
        assert list(path.parent.iterdir()) == [path]
        with pytest.raises(ValueError, match="exists already"), whole_folder(path):
            pass

    def test_a_full_disk_names_the_file(self, tmp_path: Path) -> None:
        first, second, folder = (tmp_path / name for name in ("first", "second", "folder"))
        with files_of_at_most(1000):
            for binary in (False, True):
                with pytest.raises(OSError) as full, whole_file(first, binary=binary) as file:
                    file.write(bytes(2000) if binary else " " * 2000)
                assert full.value.filename == str(first)
            with (
                pytest.raises(OSError) as full,
                whole_file(first) as file,
                whole_file(second) as other,
            ):
                other.write("done")
                file.write(" " * 2000)
                file.flush()
            assert full.value.filename == str(first)
            with pytest.raises(OSError) as full, whole_folder(folder) as partial:
                (partial / "file").write_bytes(bytes(2000))
            assert full.value.filename == str(folder)
        assert list(tmp_path.iterdir()) == []

    def test_two_flags_do_not_write_one_file(self, tmp_path: Path) -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        other.symlink_to(one)
        check_outputs({"--a": one, "--b": None, "--c": "-", "--d": "-"})
        check_outputs({"--a": "/dev/null", "--b": "/dev/null"})
        with pytest.raises(ValueError, match=f"--b {other}: --a writes this file"):
            check_outputs({"--a": one, "--b": other})

    def test_what_is_read_is_not_written(self, tmp_path: Path) -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        other.symlink_to(one)
        check_outputs({"--a": one, "--b": "-"}, ["-", None, tmp_path])
        with pytest.raises(ValueError, match=f"--a {other}: is what is read here"):
            check_outputs({"--a": other}, [None, one])

    def test_modes_are_kept_and_new_files_heed_the_umask(self, tmp_path: Path) -> None:
        private, new = tmp_path / "private", tmp_path / "new"
        private.write_text("old")
        private.chmod(0o600)
        before = os.umask(0o027)
        try:
            write(private)
            write(new)
        finally:
            os.umask(before)
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
        assert stat.S_IMODE(new.stat().st_mode) == 0o640

    @pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
    def test_owners_are_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        os.chown(path, 1234, 2345)
        write(path)
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)

    def test_links_are_followed(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        target, link = tmp_path / "folder" / "target", tmp_path / "link"
        link.symlink_to("folder/target")
        for _ in range(2):  # a link to nothing, then to a file
            write(link)
            assert link.is_symlink()
            assert target.read_text() == "new\n"
            target.write_text("old")
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    def test_a_long_name(self, tmp_path: Path) -> None:
        write(tmp_path / ("é" * 127))
        assert (tmp_path / ("é" * 127)).read_text() == "new\n"

    def test_a_pipe_is_written_to(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        assert received(pipe, write) == b"new\n"
        assert stat.S_ISFIFO(pipe.stat().st_mode)

    @pytest.mark.skipif(os.getuid() != 0, reason="only root makes devices")
    def test_a_device_is_written_to(self, tmp_path: Path) -> None:
        device = tmp_path / "null"  # as /dev/null
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            device.write_text("nothing")
        except PermissionError:
            pytest.skip("devices do not work here")
        write(device)
        assert stat.S_ISCHR(device.stat().st_mode)
        assert list(tmp_path.iterdir()) == [device]

    def test_what_is_open_already_is_not_begun_anew(self, tmp_path: Path) -> None:
        """As by ``(command --output /dev/stdout; echo end) > file``."""
        code = (
            "from fairseq_lightrnn.files import whole_file\n"
            "for path in ('/dev/stdout', '-', '/dev/fd/1'):\n"
            "    print('before')\n"
            "    with whole_file(path) as file: print(path, file=file)\n"
        )
        out = tmp_path / "out"
        with out.open("w") as file:
            subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
            subprocess.run(["echo", "end"], stdout=file, check=True)
        lines = ["before", "/dev/stdout", "before", "-", "before", "/dev/fd/1", "end"]
        assert out.read_text().splitlines() == lines

    def test_mistakes_are_named(self, tmp_path: Path) -> None:
        for path, message in (
            (tmp_path / "absent" / "file", "there is no folder .*absent to write into"),
            (tmp_path, "is a folder"),
        ):
            with pytest.raises(ValueError, match=message):
                write(path)
        assert list(tmp_path.iterdir()) == []

    def test_what_may_not_be_written_is_told_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(closed))
        closed = tmp_path / "file"
        with pytest.raises(ValueError, match="--output .*file: is write-protected"):
            check_output(closed, "--output")
        check_output(tmp_path / "new")
        closed = tmp_path
        for path in (tmp_path / "file", tmp_path / "new"):
            with pytest.raises(ValueError, match="nothing may be written into the folder"):
                check_output(path)
        with pytest.raises(ValueError, match="nothing may be written into the folder"):
            check_new_folder(tmp_path / "a" / "b")
        check_output("/dev/null")

    def test_a_new_folder_holds_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        check_new_folder(tmp_path / "a" / "b")
        (tmp_path / "a").mkdir()
        check_new_folder(tmp_path / "a")
        for path, message in {
            tmp_path: "exists already", tmp_path / "file": "exists already",
            tmp_path / "file" / "a": "file is a file, not a folder",
        }.items():  # fmt: skip
            with pytest.raises(ValueError, match=f"-o .*{message}"):
                check_new_folder(path, "-o")

    def test_all_that_is_written_goes_this_way(self, tmp_path: Path) -> None:
        """Tables, pages and checkpoints go into a pipe."""
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        table, symbols = WordTable.from_cells(np.arange(4), (2, 2)), list("abcd")
        assert received(pipe, lambda path: table.save(path, symbols)).endswith(b"d 1 1\n")
        page = received(pipe, lambda path: write_table_page(path, table, symbols, [1, 2, 3, 4]))
        assert page.startswith(b"<!DOCTYPE html>")

        def save(path: Path) -> None:
            with whole_file(path, binary=True) as file:
                torch.save({"model": torch.arange(3)}, file)

        state = torch.load(io.BytesIO(received(pipe, save)), weights_only=True)
        assert state["model"].tolist() == [0, 1, 2]
        assert list(tmp_path.iterdir()) == [pipe]


class TestReading:
    @pytest.mark.parametrize("compressed", [False, True])
    def test_lines(self, tmp_path: Path, compressed: bool) -> None:
        content = "\ufeffone\r\ntwo\u2028\x85\rthree\n\n\ufefffour".encode()
        path = tmp_path / "text"
        path.write_bytes(gzip.compress(content) if compressed else content)
        assert list(read_lines(path)) == ["one", "two\u2028\x85\rthree", "", "\ufefffour"]
        assert read_text(path) == content.decode().removeprefix("\ufeff")

    def test_long_lines_and_many(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = ["x" * size for size in (0, 5000, 3, 0, 100_000, 1)]
        (tmp_path / "text").write_text("\n".join(lines) + "\n")
        monkeypatch.setattr("fairseq_lightrnn.files._READ_AT_ONCE", 7)
        assert list(read_lines(tmp_path / "text")) == lines

    def test_what_is_there_is_read_without_waiting(self) -> None:
        reader, writer = os.pipe()
        chunks = text_chunks(f"/dev/fd/{reader}")
        for lines in (["one"], ["two", "three"]):
            os.write(writer, "".join(line + "\n" for line in lines).encode())
            assert next(chunks) == lines
        os.write(writer, b"end")
        os.close(writer)
        assert list(chunks) == [["end"]]
        os.close(reader)

    @pytest.mark.parametrize("cut", [15, 40, -4])
    def test_damaged_gzip(self, tmp_path: Path, cut: int) -> None:
        content = gzip.compress(os.urandom(500).hex().encode())
        (tmp_path / "text.gz").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"text\.gz: is damaged"):
            list(read_lines(tmp_path / "text.gz"))

    def test_mistakes_are_named(self, tmp_path: Path) -> None:
        for path, message in (
            (tmp_path / "absent", "absent: no such text file"),
            (tmp_path, "no such text file, it is a folder"),
        ):
            with pytest.raises(ValueError, match=message):
                list(read_lines(path))
