"""Workers on several hosts, under SLURM, three of them, and in other numbers than before."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import CARRY, assert_same_training, coordinates, load, run
from test_launchers import SCRIPTS, flags, start

# Two hosts with a cable between them; HOST stands for the number of each in a command.
HOSTS = r"""
mount -t tmpfs none /run && mkdir /run/netns &&
ip netns add host0 && ip netns add host1 &&
ip link add cable netns host0 type veth peer name cable netns host1 || exit 1
for host in 0 1; do
    ip -n host$host addr add 10.0.0.$((host + 1))/24 dev cable &&
    ip -n host$host link set lo up && ip -n host$host link set cable up || exit 1
done
for host in 0 1; do
    ip netns exec host$host "${@//HOST/$host}" &
done
wait -n && wait -n
status=$?
kill $(jobs -p) 2> /dev/null
wait
exit $status
"""
GLOO = ("--distributed-backend", "gloo", "--ddp-backend", "pytorch_ddp")
TWO = ("--distributed-world-size", 2, *GLOO)


def hosts(*command: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command on two hosts, each a network namespace."""
    return subprocess.run(
        ["unshare", "-rnm", "bash", "-c", HOSTS, "hosts", *map(str, command)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_workers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training of two workers on one host."""
    save_dir = tmp_path_factory.mktemp("two")
    start(SCRIPTS / "fairseq-train", data, *flags(save_dir), *TWO)
    return save_dir


@pytest.mark.slow
def test_two_hosts_train_as_one(data: Path, tmp_path: Path, two_workers: Path) -> None:
    """With folders of their own, too, from which they do not go on."""
    try:
        tried = hosts("true")
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces: {error}")
    if tried.returncode:
        pytest.skip(f"no network namespaces: {tried.stderr.strip()}")
    command = [
        SCRIPTS / "torchrun", "--nnodes", 2, "--node_rank", "HOST", "--nproc_per_node", 1,
        "--master_addr", "10.0.0.1", "--master_port", 29500, SCRIPTS / "fairseq-train", data,
        *flags(tmp_path / "HOST"), *GLOO,
    ]  # fmt: skip
    done = hosts(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training(two_workers / "checkpoint_last.pt", tmp_path / "0" / "checkpoint_last.pt")
    assert not (tmp_path / "1" / "checkpoint_last.pt").exists()
    again = hosts(*command, "--max-epoch", 3)
    assert again.returncode != 0
    assert "1 of 2 workers see this checkpoint; give all hosts a --save-dir" in again.stderr


@pytest.mark.slow
def test_slurm(data: Path, tmp_path: Path, two_workers: Path) -> None:
    """As ``srun --ntasks-per-node 2 fairseq-train`` would start them; SLURM itself is not here."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho localhost\n")
    scontrol.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    workers = [*TWO, "--distributed-port", port]
    tasks = [
        subprocess.Popen(
            [*map(str, (SCRIPTS / "fairseq-train", data, *flags(tmp_path), *workers))],
            stderr=subprocess.PIPE, text=True,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1",
                "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task),
            },
        )
        for task in range(2)
    ]  # fmt: skip
    errors = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors[0][-3000:]
    assert_same_training(two_workers / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt")


def assert_close_training(one: Path, other: Path) -> None:
    """The same tables, and parameters but for the order of sums."""
    first, second = (load(path / "checkpoint_last.pt")["model"] for path in (one, other))
    assert first.keys() == second.keys()
    assert first["decoder.reallocations.round"] >= 1
    for name, value in coordinates(first).items():
        assert torch.equal(value, second[name])
    for name, value in first.items():
        if name != "decoder.carried_state.states":  # padding at the end of an epoch is read too
            torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_three_workers(data: Path, tmp_path: Path) -> None:
    run("train", data, *flags(tmp_path / "1", update_freq=3))
    start(
        SCRIPTS / "fairseq-train", data, *flags(tmp_path / "3"),
        "--distributed-world-size", 3, *GLOO,
    )  # fmt: skip
    assert_close_training(tmp_path / "1", tmp_path / "3")


class TestOtherNumbersOfWorkers:
    """A training goes on in the middle of an epoch, before a reallocation."""

    def train(self, workers: int, data: Path, save_dir: Path, carry: bool, **more: Any) -> None:
        """Trains with one worker or two, which read as much text in an update."""
        values: dict[str, Any] = {"max_epoch": 3, "reallocate_epochs": "1,2"}
        values["batch_size"] = 8 // workers if carry else 8
        values["update_freq"] = 1 if carry else 2 // workers
        switches = [CARRY] if carry else []
        arguments = [data, *flags(save_dir, **{**values, **more}), *switches]
        if workers == 1:
            run("train", *arguments)
        else:
            start(SCRIPTS / "fairseq-train", *arguments, *TWO)

    @pytest.mark.slow
    @pytest.mark.parametrize("carry", [False, True])
    @pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
    def test_it_is_as_if_it_had_never_stopped(
        self, data: Path, tmp_path: Path, carry: bool, before: int, after: int
    ) -> None:
        whole, on = tmp_path / "1", tmp_path / "on"
        for workers in {1, before}:
            self.train(workers, data, tmp_path / str(workers), carry, save_interval_updates=7)
        (middle, *_) = sorted((tmp_path / str(before)).glob("checkpoint_2_*.pt"))
        self.train(after, data, on, carry, restore_file=middle)
        assert_close_training(whole, on)
        (report, *_) = (on / "reallocations.jsonl").read_text().splitlines()
        assert '"epoch": 2' in report

    @pytest.mark.slow
    def test_other_lanes_end_in_a_sentence(self, data: Path, tmp_path: Path) -> None:
        self.train(1, data, tmp_path, True, save_interval_updates=7)
        (middle, *_) = sorted(tmp_path.glob("checkpoint_2_*.pt"))
        arguments = flags(tmp_path / "on", restore_file=middle)  # as large batches as before
        result = subprocess.run(
            [*map(str, (SCRIPTS / "fairseq-train", data, *arguments, CARRY, *TWO))],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode != 0
        assert "of 8 lanes in blocks of 12 words, this training has 16 lanes" in result.stderr
        assert "Traceback" not in result.stderr
