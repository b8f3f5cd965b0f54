"""Runs the graphs of ``--format torch``; the one module here that imports torch."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["OUTPUTS", "TorchGraphs"]

OUTPUTS = "outputs.json"
"""In a ``.pt2`` file: the names of its outputs, in their order."""


class TorchGraphs:
    """Graphs of ``.pt2`` files, run by torch.

    Args:
        files: their contents by name.

    Raises:
        ValueError: if torch cannot load one of them.
    """

    suffix = ".pt2"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._modules: dict[str, Any] = {}
        self._outputs: dict[str, list[str]] = {}
        for name, content in files.items():
            if not name.endswith(self.suffix):
                continue
            graph, more = name.removesuffix(self.suffix), {OUTPUTS: ""}
            try:
                program = torch.export.load(io.BytesIO(content), extra_files=more)
            except Exception as error:  # torch documents none
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{name}: torch {torch.__version__} cannot load it ({reason})"
                ) from None
            self._modules[graph] = program.module()
            self._outputs[graph] = json.loads(more[OUTPUTS])

    def has(self, name: str) -> bool:
        """See :meth:`Graphs.has`."""
        return name in self._modules

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`Graphs.run`."""
        if name != "read" or "hidden" not in inputs or inputs["places"].shape[1] == 1:
            return self._run(name, inputs)
        # torch.export has no loop over time: here ``read`` of an LSTM is a step of a word.
        sequences = {"places", "numbers"} & inputs.keys()
        now, outputs = dict(inputs), []
        for step in range(inputs["places"].shape[1]):
            now |= {one: inputs[one][:, step : step + 1] for one in sequences}
            found = self._run(name, now)
            now |= {"hidden": found["next_hidden"], "cell": found["next_cell"]}
            outputs.append(found["outputs"])
        return {**found, "outputs": np.concatenate(outputs, axis=1)}

    @torch.inference_mode()
    def _run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {
            one: torch.from_numpy(np.ascontiguousarray(value)) for one, value in inputs.items()
        }
        found = self._modules[name](**tensors)
        values = (found,) if isinstance(found, torch.Tensor) else found
        return {one: value.numpy() for one, value in zip(self._outputs[name], values, strict=True)}
