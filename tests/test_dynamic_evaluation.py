"""Models that learn while they are tested, beside a slow twin."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import train

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_dynamic_evaluation as dynamic  # noqa: E402

from fairseq_lightrnn.language_model import LanguageModel  # noqa: E402

BLOCK = 5


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, max_epoch=2, arch="lightrnn_lm_gated", word_dim=3)
    return save_dir


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder)


@pytest.fixture
def learner(model: LanguageModel, data: Path) -> dynamic.Learner:
    words = dynamic.read(data, "train", model)
    return dynamic.Learner(model, list(dynamic.blocks(words, BLOCK, lanes=2))[:4])


def loss_of(model: LanguageModel, part: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    decoded = model.decoder(part, state)
    scores = model.decoder.head.softmax(decoded.hidden.flatten(0, 1), part[0, 1:])
    return -scores.sum(), tuple(tensor.detach() for tensor in decoded.state)


def test_nothing_is_learnt_at_a_rate_of_nothing(
    model: LanguageModel, learner: dynamic.Learner, data: Path
) -> None:
    words = dynamic.read(data, "test", model)
    (score,) = model.score_ids([words[1:].numpy()])
    expected = math.exp(-score.log_prob / len(score.ids))
    assert learner.perplexity(words, BLOCK) == pytest.approx(expected, rel=1e-5)


def test_as_by_hand(model: LanguageModel, learner: dynamic.Learner, data: Path) -> None:
    """Parameter by parameter, in the order of the text."""
    words = dynamic.read(data, "test", model)[:18]
    rate, back = 0.01, 0.1
    found = learner.perplexity(words, BLOCK, rate, back)
    trained = [parameter.detach().clone() for parameter in learner.parameters]
    mean = np.average(
        [usual.mean().item() for usual in learner.usual],
        weights=[usual.numel() for usual in learner.usual],
    )
    state, total = None, 0.0
    for start in range(0, len(words) - 1, BLOCK):
        loss, state = loss_of(model, words[None, start : start + BLOCK + 1], state)
        total += loss.item()
        model.decoder.zero_grad()
        (loss / BLOCK).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter, first, usual in zip(
                learner.parameters, trained, learner.usual, strict=True
            ):
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad / (usual + mean)
                parameter += back * (usual / mean).clamp(max=10) * (first - parameter)
    assert found == pytest.approx(math.exp(total / (len(words) - 1)), rel=1e-4)
    assert found != pytest.approx(learner.perplexity(words, BLOCK), rel=1e-3)


def test_usual_gradients(model: LanguageModel, data: Path) -> None:
    """The root of their mean square over parts of the training text."""
    words = dynamic.read(data, "train", model)
    parts = list(dynamic.blocks(words, BLOCK))[:3]
    learner = dynamic.Learner(model, parts)
    state, squares = None, []
    for part in parts:
        loss, state = loss_of(model, part, state)
        model.decoder.zero_grad()
        (loss / BLOCK).backward()  # type: ignore[no-untyped-call]
        squares.append([
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad**2
            for parameter in learner.parameters
        ])  # fmt: skip
    for usual, *of_parts in zip(learner.usual, *squares, strict=True):
        torch.testing.assert_close(usual, (sum(of_parts) / 3) ** 0.5)


def test_it_forgets_and_steps_that_are_too_large_are_no_number(
    model: LanguageModel, learner: dynamic.Learner, data: Path
) -> None:
    words = dynamic.read(data, "test", model)
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    again = words[1:30].repeat(10)
    assert learner.perplexity(again, BLOCK, 0.003) < 0.9 * learner.perplexity(again, BLOCK)
    assert learner.perplexity(words, BLOCK, 1e30) == math.inf
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_report(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic, "RATES", (0.001, 1e30))
    monkeypatch.setattr(dynamic, "RETURNS", (0.0, 0.01))
    output = tmp_path / "dynamic.json"
    checkpoint = folder / "checkpoint_best.pt"
    flags = [data, checkpoint, "--words", 60, "--batches", 2, "--output", output]
    monkeypatch.setattr(sys, "argv", ["benchmark_dynamic_evaluation.py", *map(str, flags)])
    dynamic.main()
    systems = json.loads(output.read_text())["systems"]
    assert [*systems] == [folder.name]
    (found,) = json.loads(output.read_text())["systems"].values()
    assert found["rate"] == 0.001
    assert found["dynamic_test_ppl"] > 1 and found["test_ppl"] > 1
    assert [ppl is None for *_, ppl in found["tried"]] == [False, False, True, True]

    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], str(folder), *sys.argv[3:]])
    with pytest.raises(SystemExit, match=f"{folder.name} {folder.name}: two folders of a name"):
        dynamic.main()
