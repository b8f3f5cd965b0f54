"""fairseq's moving average of a model (``--store-ema``), for models that hold more than weights."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.models.ema import EMA

__all__ = ["mend_averages"]

logger = logging.getLogger(__name__)


def mend_averages() -> None:
    """Mends two things of fairseq 0.12.2's average, in this process.

    It stops at what cannot be averaged, integers, such as where words sit, and what changes its
    size, such as carried states; now it takes that over as it is. And it stops at a checkpoint that
    has no average, for which it looks in a model that is gone by then; now it begins from the model
    of the checkpoint, as its log says.
    """
    if getattr(EMA._step_internal, "averages_weights_alone", False):
        return
    EMA._step_internal = _averaging_weights_alone(EMA._step_internal)
    checkpoint_utils.load_checkpoint_to_cpu = _with_average(checkpoint_utils.load_checkpoint_to_cpu)


def _averaging_weights_alone(step: Any) -> Any:
    def step_internal(self: Any, new_model: Any, updates: Any = None) -> None:
        kept = self.fp32_params if self.config.ema_fp32 else self.model.state_dict()
        for name, value in new_model.state_dict().items():
            if not isinstance(value, torch.Tensor) or name not in kept:
                continue
            if kept[name].shape != value.shape:
                self.restore({name: value})
                self.skip_keys.add(name)
            elif not value.is_floating_point():
                self.skip_keys.add(name)
            if self.config.ema_fp32 and name in self.skip_keys:
                kept[name] = value.float() if value.is_floating_point() else value.clone()
        step(self, new_model, updates)

    step_internal.averages_weights_alone = True  # type: ignore[attr-defined]
    return step_internal


def _with_average(load: Any) -> Any:
    @functools.wraps(load)
    def load_checkpoint_to_cpu(path: Any, *args: Any, **kwargs: Any) -> Any:
        state = load(path, *args, **kwargs)
        saved = state.get("extra_state")
        if saved is not None and "ema" not in saved:
            logger.info(f"{path}: has no average of --store-ema, which begins from the model there")
            saved["ema"] = state["model"]
        return state

    return load_checkpoint_to_cpu
