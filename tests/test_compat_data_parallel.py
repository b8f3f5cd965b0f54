"""Which workers ``--distributed-world-size N --cpu`` starts, without starting any."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import fairseq.distributed.utils as distributed_utils
import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import omegaconf_no_object_check
from omegaconf import OmegaConf

from fairseq_compat import data_parallel, worker

TORCHRUN = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects what would be started: ("spawn", processes, first rank) or ("run", rank)."""
    started: list[Any] = []

    def spawn(fn: Any, args: Any, nprocs: int, **kwargs: Any) -> None:
        assert fn is worker.run
        _, cfg, settings = args
        assert cfg.distributed_training.distributed_rank is None
        started.append(("spawn", nprocs, settings["start_rank"]))

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    monkeypatch.setattr(
        distributed_utils,
        "distributed_main",
        lambda device, main, cfg, kwargs: started.append(
            ("join", cfg.distributed_training.distributed_rank)
        ),
    )
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return started


def config(cpu: bool = True, **settings: Any) -> Any:
    with omegaconf_no_object_check():
        cfg = OmegaConf.structured(FairseqConfig())
    cfg.common.cpu = cpu
    # The defaults count the GPUs of the machine that runs the tests.
    for name, value in {"world_size": 1, "num_procs": 1, **settings}.items():
        cfg.distributed_training[f"distributed_{name}"] = value
    return cfg


def launch(launches: list[Any], cfg: Any) -> list[Any]:
    distributed_utils.call_main(cfg, lambda cfg: launches.append("run"))
    return launches


def test_one_worker_runs_in_this_process(launches: list[Any]) -> None:
    assert launch(launches, config()) == ["run"]


def test_plain_flags_start_that_many_workers(launches: list[Any]) -> None:
    cfg = config(world_size=3)
    assert launch(launches, cfg) == [("spawn", 3, 0)]
    assert cfg.distributed_training.distributed_init_method.startswith("tcp://localhost:")


def test_workers_are_not_counted_by_gpus(launches: list[Any]) -> None:
    assert launch(launches, config(world_size=8, num_procs=4)) == [("spawn", 8, 0)]


def test_each_machine_starts_its_share(launches: list[Any]) -> None:
    cfg = config(world_size=4, num_procs=2, rank=2, init_method="tcp://first:1234")
    assert launch(launches, cfg) == [("spawn", 2, 2)]
    assert cfg.distributed_training.distributed_init_method == "tcp://first:1234"


def test_torchrun_starts_the_workers_itself(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launch(launches, config()) == [("join", 1)]


def test_a_world_without_workers_is_refused(launches: list[Any]) -> None:
    cfg = config(world_size=2, rank=2, init_method="tcp://first:1234")
    with pytest.raises(SystemExit, match="--distributed-world-size 2 with --distributed-rank 2"):
        launch(launches, cfg)


def test_no_gpu_and_no_cpu_flag_does_not_end_in_silence(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = config(cpu=False, world_size=2, init_method="tcp://first:1234")
    with pytest.raises(SystemExit, match="add --cpu"):
        launch(launches, cfg)
    assert launches == []


@pytest.mark.parametrize("namespace", [False, True])
@pytest.mark.parametrize(
    ("cpu", "asked", "used"),
    [(True, "nccl", "gloo"), (True, "mpi", "mpi"), (False, "nccl", "nccl")],
)
def test_cpu_workers_connect_over_gloo(namespace: bool, cpu: bool, asked: str, used: str) -> None:
    if namespace:
        cfg: Any = SimpleNamespace(cpu=cpu, distributed_backend=asked)
    else:
        cfg = config(cpu=cpu, backend=asked)
    init = mock.Mock(return_value=1)
    assert data_parallel._choosing_gloo(mock.Mock(), init)(cfg) == 1
    init.assert_called_once_with(cfg)
    assert getattr(cfg, "distributed_training", cfg).distributed_backend == used


def test_models_on_a_gpu_keep_their_device_numbers() -> None:
    made = mock.Mock()
    module: Any = SimpleNamespace(DistributedDataParallel=made)
    made.__name__ = made.__qualname__ = "DistributedDataParallel"
    data_parallel.wrap_cpu_models(module)
    on_gpu = mock.Mock()
    on_gpu.parameters.return_value = [SimpleNamespace(device=torch.device("cuda", 1))]
    module.DistributedDataParallel(module=on_gpu, device_ids=[1], output_device=1)
    made.assert_called_once_with(module=on_gpu, device_ids=[1], output_device=1)
