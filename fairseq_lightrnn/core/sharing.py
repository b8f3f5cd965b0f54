"""Checkpoints that hold what parts of a model share once."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

from torch import nn

__all__ = ["save_shared_once"]


def save_shared_once(module: nn.Module, preferred: str = "") -> None:
    """Has the state of a module hold each parameter and buffer once, under its first name.

    The same part may be given to several others, which makes names for it in each. Without this a
    checkpoint would list it under all of them, and from a GPU store as many copies.

    Args:
        module: complete; parts that are exchanged later are not noticed.
        preferred: names that begin so come first.
    """
    first: dict[int, str] = {}
    others: dict[str, str] = {}
    named = (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    for name, tensor in sorted(chain(*named), key=lambda one: not one[0].startswith(preferred)):
        known = first.setdefault(id(tensor), name)
        if known != name:
            others[name] = known

    module.register_state_dict_post_hook(partial(_drop, others))
    module.register_load_state_dict_pre_hook(partial(_put_back, others))


def _drop(
    others: dict[str, str], module: nn.Module, state: dict[str, Any], prefix: str, *more: Any
) -> None:
    for name in others:
        state.pop(prefix + name, None)


def _put_back(
    others: dict[str, str], module: nn.Module, state: dict[str, Any], prefix: str, *more: Any
) -> None:
    for name, known in others.items():
        if prefix + known in state:
            state[prefix + name] = state[prefix + known]
        elif prefix + name in state:
            state[prefix + known] = state[prefix + name]
