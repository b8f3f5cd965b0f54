"""Processes that are killed, files that are damaged, disks that are full: nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fairseq_run import (
    TASK,
    assert_same_training,
    eval_lm,
    load,
    run,
    train,
    train_arguments,
    train_translation,
)  # fmt: skip

from fairseq_lightrnn.damage import checkpoint_damage
from fairseq_lightrnn.errors import UsageError

HERE = Path(__file__).parent
TRAINING = {
    "arch": "lightrnn_lm_gated", "initial_table": "cooccurrence", "further_tables": 1,
    "reallocate_epochs": "1,2", "max_epoch": 3, "save_interval_updates": 7,
    "keep_interval_updates": 1,
}  # fmt: skip

# Starts trainings and kills them, each in a process of its own, until one comes to its end.
KILLER = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import fairseq_compat
fairseq_compat.install()
from fairseq_cli import train
import fairseq_lightrnn.allocation.initial_table, fairseq_lightrnn.allocation.descent

rounds, longest, chance = int(sys.argv[2]), float(sys.argv[3]), random.Random(int(sys.argv[4]))
killed, started = 0, time.monotonic()
while killed <= rounds:
    child = os.fork()
    if child == 0:
        log = os.open(sys.argv[5], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv[1:] = sys.argv[6:]
        status = 1
        try:
            train.cli_main()
            status = 0
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(status)
    if killed < rounds:
        # Late enough to get on in the end, early enough to hit every part of the work.
        time.sleep(longest * chance.uniform(0.2, 1.1))
        os.kill(child, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed += 1
        continue
    seconds = time.monotonic() - started
    print(json.dumps({"killed": killed, "status": os.WEXITSTATUS(status), "seconds": seconds}))
    break
"""


def killer(log: Path, rounds: int, longest: float, *arguments: str) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(HERE), str(rounds), str(longest), "1", str(log),
         *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.stdout, result.stderr[-2000:]
    found: dict[str, float] = json.loads(result.stdout)
    assert found["status"] == 0, log.read_text()[-3000:]
    return found


def reallocations(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "reallocations.jsonl").read_text().splitlines()
    timed = ("seconds", "share_of_training")
    return [
        {name: value for name, value in json.loads(line).items() if name not in timed}
        for line in lines
    ]


@pytest.mark.parametrize("rounds", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_trainings_killed_at_any_moment_end_as_one_that_was_not(
    data: Path, tmp_path: Path, rounds: int
) -> None:
    """Parameters, tables and optimiser are the same bit for bit, and so is what was reported."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    undisturbed = killer(tmp_path / "whole.log", 0, 0.0, *train_arguments(data, whole, **TRAINING))
    arguments = train_arguments(data, broken, **TRAINING)
    found = killer(tmp_path / "log", rounds, undisturbed["seconds"], *arguments)
    assert found["killed"] > 0
    assert_same_training(whole / "checkpoint_last.pt", broken / "checkpoint_last.pt")
    assert reallocations(whole) == reallocations(broken)
    for name in ("word_table.txt", "word_table.epoch2.txt"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(data, folder, max_epoch=2, arch="lightrnn_lm_gated")
    return folder


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.97, 0.995, 0.9999])
def test_flipped_bytes_are_told_in_a_sentence(trained: Path, tmp_path: Path, share: float) -> None:
    """Of headers, contents and the directory at the end."""
    path = tmp_path / "checkpoint.pt"
    content = (trained / "checkpoint_last.pt").read_bytes()
    at = int(len(content) * share)
    found = []
    for place in range(at, min(at + 40, len(content))):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        found.append(checkpoint_damage(path))
    # Of some bytes nothing depends: padding, dates and the like.
    assert all(note is None or note.startswith("is ") for note in found)
    path.write_bytes(bytes(4096) + content[4096:])  # as after a loss of power
    assert checkpoint_damage(path) == "is damaged"


def test_another_file_than_a_checkpoint_of_the_training_is_not_put_back(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    last = tmp_path / "checkpoint_last.pt"
    shutil.copy(trained / last.name, tmp_path / "checkpoint_avg.pt")
    last.write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"checkpoint_last\.pt: the checkpoint is truncated"):
        train(data, tmp_path, max_epoch=3, arch="lightrnn_lm_gated")


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_last_checkpoint_gives_way_to_the_newest_whole_one(
    data: Path, trained: Path, tmp_path: Path, damage: str
) -> None:
    train(data, tmp_path / "whole", max_epoch=3, arch="lightrnn_lm_gated")
    folder = tmp_path / "damaged"
    shutil.copytree(trained, folder)
    last = folder / "checkpoint_last.pt"
    size = last.stat().st_size
    if damage == "flipped":
        flipped(last, size // 2)
    else:
        os.truncate(last, 0 if damage == "empty" else size // 2)
    assert checkpoint_damage(last) and not checkpoint_damage(folder / "checkpoint2.pt")
    os.truncate(folder / "checkpoint_best.pt", 100)  # the copy that was being written
    train(data, folder, max_epoch=3, arch="lightrnn_lm_gated")
    assert_same_training(tmp_path / "whole" / last.name, last)


def test_a_flipped_bit_of_a_checkpoint_is_named(data: Path, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    shutil.copy(trained / "checkpoint_last.pt", path)
    flipped(path, path.stat().st_size // 2)
    message = r"checkpoint\.pt: the checkpoint is damaged: its part \S+ does not fit its checksum"
    with pytest.raises(UsageError, match=message):
        eval_lm(data, path)
    with pytest.raises(UsageError, match=message):
        train(data, tmp_path / "out", "--restore-file", path, arch="lightrnn_lm_gated")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.bin", -100, r"train\.bin: has \d+ bytes, its index speaks of \d+: it is truncated"),
        ("valid.bin", 0.5, r"valid\.bin: has a word of number \d+, and the dictionary 48 words"),
        ("train.idx", -7, r"train\.idx: is damaged or truncated"),
        ("train.idx", 0.6, r"train\.idx: is damaged or truncated"),
        ("valid.idx", 0.3, r"valid\.idx: is damaged or truncated"),
        ("train.idx", 17, r"train\.idx: is damaged or truncated"),
    ],
)
def test_damaged_binarised_text_is_named(
    data: Path, tmp_path: Path, name: str, damage: float, message: str
) -> None:
    copy = tmp_path / "bin"
    shutil.copytree(data, copy)
    size = (copy / name).stat().st_size
    if damage < 0:
        os.truncate(copy / name, size + int(damage))
    else:
        flipped(copy / name, int(damage) if damage > 1 else int(damage * size))
    for flags in ((), ("--carry-hidden-state",)):
        with pytest.raises(UsageError, match=message):
            train(copy, tmp_path / "out", *flags, max_epoch=1)


def test_a_damaged_part_is_named_before_its_epoch(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "second"
    shutil.copytree(data, copy)
    os.truncate(copy / "train.bin", 100)
    with pytest.raises(UsageError, match=r"second/train\.bin: has 100 bytes"):
        train(f"{data}:{copy}", tmp_path / "out", max_epoch=1)  # type: ignore[arg-type]


def test_damaged_text_to_translate_is_named(pairs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bin"
    shutil.copytree(pairs, copy)
    os.truncate(copy / "train.src-tgt.src.bin", 100)
    with pytest.raises(UsageError, match=r"train\.src-tgt\.src\.bin: has 100 bytes"):
        train_translation(copy, tmp_path / "out", max_epoch=1)
    for file in pairs.glob("train.src-tgt.*"):
        shutil.copy(file, copy / file.name)
        shutil.copy(file, copy / file.name.replace("train", "train1"))
    os.truncate(copy / "train1.src-tgt.tgt.bin", 100)
    with pytest.raises(UsageError, match=r"train1\.src-tgt\.tgt\.bin: has 100 bytes"):
        train_translation(copy, tmp_path / "out", max_epoch=1)


def test_another_dictionary_of_the_source_is_refused(pairs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bin"
    shutil.copytree(pairs, copy)
    train_translation(pairs, tmp_path / "out", max_epoch=1)
    lines = (copy / "dict.src.txt").read_text().splitlines()
    (copy / "dict.src.txt").write_text("\n".join([*lines[1::-1], *lines[2:]]) + "\n")
    with pytest.raises(SystemExit, match="another order"):
        train_translation(copy, tmp_path / "out", max_epoch=2)


def test_another_dictionary_of_as_many_words_is_refused(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "bin"
    shutil.copytree(data, copy)
    lines = (copy / "dict.txt").read_text().splitlines()
    lines[0], lines[1] = lines[1], lines[0]
    (copy / "dict.txt").write_text("\n".join(lines) + "\n")
    path = trained / "checkpoint_last.pt"
    digest = int(load(path)["model"]["decoder.vocabulary.digest"])
    message = f"that of the model's training had {digest:012x}: .*another order"
    with pytest.raises(SystemExit, match=message):
        train(copy, tmp_path / "out", "--restore-file", path, arch="lightrnn_lm_gated")
    with pytest.raises(SystemExit, match=message):
        run("eval-lm", copy, *TASK, "--path", path, "--cpu")


def test_two_trainings_in_one_folder(data: Path, tmp_path: Path) -> None:
    """The second one is refused, and the first goes on."""
    arguments = train_arguments(data, tmp_path, max_epoch=500, no_epoch_checkpoints=None)
    command = [sys.executable, "-m", "fairseq_cli.train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        try:
            while not (tmp_path / "checkpoint_last.pt").exists():
                assert first.poll() is None
                time.sleep(0.05)
            second = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert second.returncode == 1
            assert "another training writes there" in second.stderr.splitlines()[-1]
            assert first.poll() is None
        finally:
            first.kill()
    train(data, tmp_path, max_epoch=1)  # nothing is left of the lock


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_whole_checkpoints(data: Path, small_disk: Path, tmp_path: Path) -> None:
    flags = {"max_epoch": 6, "log_file": tmp_path / "log", "arch": "lightrnn_lm_gated"}
    with pytest.raises((OSError, RuntimeError)):
        run("train", *train_arguments(data, small_disk, **flags))
    kept = [path for path in small_disk.glob("checkpoint*.pt") if checkpoint_damage(path) is None]
    assert kept
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    run("train", *train_arguments(data, small_disk, **flags))
    run("train", *train_arguments(data, tmp_path / "whole", **flags))
    assert_same_training(
        tmp_path / "whole" / "checkpoint_last.pt", small_disk / "checkpoint_last.pt"
    )


@pytest.mark.filterwarnings("ignore:Using .*non-full backward hook")
def test_a_loss_that_is_no_number_ends_the_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        train(data, tmp_path, lr=3e38, max_epoch=4)
    for path in tmp_path.glob("checkpoint*.pt"):
        assert checkpoint_damage(path) is None


DYING = """
import os, signal, sys
import torch
from fairseq_lightrnn.allocation.gathering import gather_statistics

rank, store = int(sys.argv[1]), torch.distributed.FileStore(sys.argv[2], 2)
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)

def outputs():
    for number in range(100):
        if rank == 1 and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield torch.arange(10), torch.randn(10, 2, 4)

gather_statistics(outputs(), 10, 2, 4, "cpu")
"""


def test_a_worker_that_dies_ends_the_statistics_of_the_others(tmp_path: Path) -> None:
    """At once, not after the time that workers wait for each other, which is half an hour."""
    workers = [
        subprocess.Popen([sys.executable, "-c", DYING, str(rank), tmp_path / "store"],
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert workers[1].returncode < 0
    assert workers[0].returncode > 0 and "remote worker" in errors[0], errors[0]
