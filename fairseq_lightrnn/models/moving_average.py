"""fairseq's moving average of a model (``--store-ema``), for models that hold more than weights."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models.ema import EMA

__all__ = ["average_weights_alone"]


def average_weights_alone() -> None:
    """Has fairseq's average take over as it is what cannot be averaged.

    Which is integers, such as where words sit, and what changes its size, such as carried states.
    fairseq 0.12.2 stops at both; stock models have neither.
    """
    step = EMA._step_internal
    if getattr(step, "averages_weights_alone", False):
        return

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
    EMA._step_internal = step_internal
