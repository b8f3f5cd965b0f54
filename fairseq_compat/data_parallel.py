"""``--distributed-world-size N --cpu``: data-parallel training of CPU workers, over gloo.

fairseq 0.12.2 counts GPUs where it should count processes: without any it either stops at an
assertion or starts no worker at all and reports success.
"""

from __future__ import annotations

import functools
import gc
import os
import socket
import warnings
from types import ModuleType
from typing import Any

from fairseq_compat import worker

__all__ = ["train_on_cpu_workers", "wrap_cpu_models"]

# What torchrun tells the workers that it starts.
_LAUNCHED = {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"}


def train_on_cpu_workers(module: ModuleType) -> None:
    """Mends ``fairseq.distributed.utils``: launching, the backend, object gathering, the end."""
    for name, mend in {
        "call_main": _launching,
        "distributed_init": _choosing_gloo,
        "distributed_main": _leaving_gloo,
        "all_gather_list": _gathering_in_main_memory,
    }.items():
        if hasattr(module, name):
            setattr(module, name, mend(module, getattr(module, name)))


def _launching(module: ModuleType, call_main: Any) -> Any:
    @functools.wraps(call_main)
    def launch(cfg: Any, main: Any, **kwargs: Any) -> None:
        settings = cfg.distributed_training
        if settings.distributed_no_spawn or cfg.common.tpu or settings.pipeline_model_parallel:
            return call_main(cfg, main, **kwargs)
        if not cfg.common.cpu:
            _check_visible_gpus(settings)
            return call_main(cfg, main, **kwargs)
        if settings.distributed_init_method is None:
            if settings.distributed_port > 0 or _LAUNCHED.issubset(os.environ):
                module.infer_init_method(settings)
            elif settings.distributed_world_size > 1:
                settings.distributed_init_method = f"tcp://localhost:{_free_port()}"
                settings.distributed_num_procs = None  # all workers are on this machine
        if settings.distributed_init_method is None or settings.distributed_no_spawn:
            return call_main(cfg, main, **kwargs)
        return _spawn_cpu_workers(cfg, main, kwargs)

    return launch


def _check_visible_gpus(settings: Any) -> None:
    import torch

    # With an explicit --distributed-init-method fairseq would start min(GPUs, world size) = 0
    # workers and end as if it had trained.
    if settings.distributed_init_method is not None and not torch.cuda.is_available():
        raise SystemExit(
            f"--distributed-world-size {settings.distributed_world_size}: no GPU is visible; "
            "add --cpu to train on the CPU"
        )


def _spawn_cpu_workers(cfg: Any, main: Any, kwargs: dict[str, Any]) -> None:
    """Starts this machine's workers: --distributed-num-procs, or else all from this rank on."""
    import torch

    settings = cfg.distributed_training
    first = max(settings.distributed_rank or 0, 0)
    missing = settings.distributed_world_size - first
    asked = settings.distributed_num_procs or 1
    workers = min(asked, missing) if asked > 1 else missing
    if workers < 1:
        raise SystemExit(
            f"--distributed-world-size {settings.distributed_world_size} with --distributed-rank "
            f"{first} leaves no worker to start on the CPU; give a world size above the rank, or "
            "start one process per worker and add --distributed-no-spawn"
        )
    settings.distributed_num_procs = workers
    settings.distributed_rank = None  # each worker counts its own from start_rank
    torch.multiprocessing.spawn(
        fn=worker.run, args=(main, cfg, {**kwargs, "start_rank": first}), nprocs=workers
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _choosing_gloo(module: ModuleType, distributed_init: Any) -> Any:
    @functools.wraps(distributed_init)
    def init(cfg: Any) -> int:
        common = getattr(cfg, "common", cfg)  # old callers pass an argparse.Namespace
        settings = getattr(cfg, "distributed_training", cfg)
        if getattr(common, "cpu", False) and settings.distributed_backend == "nccl":
            settings.distributed_backend = "gloo"  # the default, nccl, connects GPUs only
        return distributed_init(cfg)

    return init


def _leaving_gloo(module: ModuleType, distributed_main: Any) -> Any:
    """Leaves the process groups when all is done: their threads may abort a process that ends.

    A thread of gloo asks for Python's lock to let go of a tensor, and where Python ends meanwhile,
    that is the end of the process (``terminate called without an active exception``). Threads end
    with the last reference to their group.
    """

    @functools.wraps(distributed_main)
    def run(*args: Any, **kwargs: Any) -> None:
        # Imported later, as DistributedDataParallel does, its functions keep the group for good.
        import torch.distributed.nn.functional

        distributed_main(*args, **kwargs)
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            vars(module.get_global_group).pop("_global_group", None)
            gc.collect()  # models that average their gradients in the group are cycles
            torch.distributed.destroy_process_group()

    return run


def _gathering_in_main_memory(module: ModuleType, all_gather_list: Any) -> Any:
    @functools.wraps(all_gather_list)
    def gather(data: Any, group: Any = None, max_size: int = 16384) -> Any:
        import torch

        group = module.get_global_group() if group is None else group
        if not module.use_xla() and torch.distributed.get_backend(group) == "gloo":
            # fairseq keeps its buffers, allocated on the GPU, as attributes of the function of
            # this name in its module, which is the one you are reading.
            size = max_size * module.get_world_size(group)
            buffer = getattr(gather, "_buffer", None)
            if buffer is None or buffer.numel() < size:
                gather._buffer = torch.empty(size, dtype=torch.uint8)  # type: ignore[attr-defined]
                gather._cpu_buffer = torch.empty(  # type: ignore[attr-defined]
                    max_size, dtype=torch.uint8
                )
        return all_gather_list(data, group, max_size)

    return gather


def wrap_cpu_models(module: ModuleType) -> None:
    """``--ddp-backend pytorch_ddp``: torch refuses device numbers for a model on the CPU."""
    if not hasattr(module, "DistributedDataParallel"):
        return
    wrap = module.DistributedDataParallel

    @functools.wraps(wrap, updated=())
    def wrap_on_its_device(module: Any, **kwargs: Any) -> Any:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            kwargs.update(device_ids=None, output_device=None)
        with warnings.catch_warnings():  # torch 2.13 has a new name for an argument
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return wrap(module=module, **kwargs)

    module.DistributedDataParallel = wrap_on_its_device  # type: ignore[attr-defined]
