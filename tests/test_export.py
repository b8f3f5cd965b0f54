"""Graphs that were exported, against the decoder that they were cut from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_exports import CASES, Exported, export
from tiny_models import KINDS, build, log_probs, single_precision, slow_log_probs, words_of

from fairseq_lightrnn.core.conditioning import Gated, Recurrent
from fairseq_lightrnn.export.formats import check_format
from fairseq_lightrnn.runtime.search import every_word

TORCH = [
    (Recurrent, 10, (4, 4)), (Gated, 20, (3, 3, 3)), (Gated, 13, (13,)),
    ("transformer", 20, (3, 3, 3)), ("transformer", 10, (4, 4)),
]  # fmt: skip


def compare(found: Exported, tolerance: float) -> None:
    """Distributions after some words, and scores of texts read in two pieces."""
    network, shape = found.network, found.network.seating.shape
    words = words_of((3, 6), len(found.order))
    numbers = found.number[words.numpy()]
    with torch.no_grad():
        expected = slow_log_probs(found.decoder, found.decoder.read(words)).numpy()
        scores = log_probs(found.decoder, words).numpy()
    middle, first = network.read(network.begin(3), numbers[:, :2])
    position, second = network.read(middle, numbers[:, 2:])
    np.testing.assert_allclose(
        every_word(network, position), expected[:, found.order], rtol=tolerance, atol=tolerance
    )
    outputs = np.concatenate([first, second], axis=1)[:, 1:].reshape(15, network.steps, -1)
    ours = network.score(outputs, numbers[:, 1:].reshape(-1))
    assert ours.shape == (15, len(shape))
    np.testing.assert_allclose(ours.sum(1).reshape(3, 5), scores, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind, words, shape, extras", CASES)
def test_onnx_says_what_the_decoder_says(
    kind: Any, words: int, shape: tuple[int, ...], extras: bool
) -> None:
    compare(export(kind, words, shape, extras), 1e-4)


@pytest.mark.parametrize("kind", [Recurrent, Gated])
@pytest.mark.parametrize("words, shape", [(13, (13,)), (10, (3, 4))])
def test_outputs_that_are_projected(kind: Any, words: int, shape: tuple[int, ...]) -> None:
    decoder = single_precision(build(kind, words, shape, shared=True))
    compare(export(decoder, words, shape), 1e-4)


@pytest.mark.parametrize("kind, words, shape", TORCH)
def test_programs_of_torch_say_so_too(kind: Any, words: int, shape: tuple[int, ...]) -> None:
    compare(export(kind, words, shape, form="torch"), 1e-4)


@pytest.mark.parametrize("form", ["onnx", "torch"])
@pytest.mark.parametrize("kind", [Gated, "transformer"])
def test_half_precision_is_close(kind: Any, form: str) -> None:
    compare(export(kind, 24, (2, 3, 4), form=form, quantise="fp16", scale=0.3), 2e-2)


@pytest.mark.parametrize("quantise, tolerance", [("int8", 0.1), ("int4", 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_is_near_and_still_adds_up(kind: Any, quantise: str, tolerance: float) -> None:
    found = export(kind, 10, (4, 4), quantise=quantise, scale=0.3)
    compare(found, tolerance)
    network = found.network
    position, _ = network.read(network.begin(2), np.array([[1, 2], [3, 4]]))
    total = np.exp(every_word(network, position).astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("flash", "none", 17), "--format flash: unknown; give one of onnx"),
        (("onnx", "int3", 17), "--quantize int3: unknown; give one of none"),
        (("torch", "int8", 17), "--quantize int8: onnxruntime has the quantiser"),
        (("onnx", "none", 7), "--opset 7: give one from 14 to 20"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_format(*arguments)
