from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from fairseq_run import preprocess, train, valid_losses, valid_records
from torch import Tensor, nn

from fairseq_lightrnn.criterions.two_component_cross_entropy import (
    TwoComponentCrossEntropyCriterion,
    component_names,
)

PAD = 1


class Scores(nn.Module):
    """A model whose features are the log-probabilities of the components."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = nn.Parameter(log_probs)
        self.decoder = self

    def component_log_probs(self, features: Tensor, words: Tensor) -> Tensor:
        return features

    def forward(self, src_tokens: Tensor) -> tuple[Tensor, None]:
        return self.log_probs, None


@pytest.fixture
def criterion() -> TwoComponentCrossEntropyCriterion:
    dictionary = type("Words", (), {"pad": lambda self: PAD})()
    task = type("Task", (), {"target_dictionary": dictionary})()
    return TwoComponentCrossEntropyCriterion(task)


def batch(target: Tensor) -> dict[str, Any]:
    return {
        "net_input": {"src_tokens": target},
        "target": target,
        "ntokens": int(target.ne(PAD).sum()),
    }


@pytest.mark.parametrize("components", [1, 2, 3])
def test_padding_adds_nothing(criterion, components: int) -> None:
    target = torch.tensor([[5, 6, 7], [5, PAD, PAD]])
    model = Scores(-torch.rand(2, 3, components))
    loss, sample_size, log = criterion(model, batch(target))
    real = target.ne(PAD)
    torch.testing.assert_close(loss, -model.log_probs[real].sum())
    assert sample_size == 4
    for name, component in zip(component_names(components), range(components), strict=True):
        expected = -model.log_probs[..., component][real].sum().item()
        assert log[f"{name}_loss"].item() == pytest.approx(expected)
    loss.backward()
    assert (model.log_probs.grad[~real] == 0).all()
    assert (model.log_probs.grad[real] == -1).all()


def test_losses_of_single_words(criterion) -> None:
    target = torch.tensor([[5, 6, PAD]])
    model = Scores(-torch.rand(1, 3, 2))
    losses, _, _ = criterion(model, batch(target), reduce=False)
    torch.testing.assert_close(losses, -(model.log_probs.sum(-1) * target.ne(PAD)).view(-1))


def test_metrics_are_bits_and_perplexities_per_word(criterion) -> None:
    log = [
        {"loss": 8.0, "row_loss": 6.0, "column_loss": 2.0, "ntokens": 3, "sample_size": 3},
        {"loss": 2.0, "row_loss": 1.0, "column_loss": 1.0, "ntokens": 1, "sample_size": 1},
    ]
    with metrics.aggregate() as values:
        criterion.reduce_metrics(log)
        smoothed = values.get_smoothed_values()
    assert smoothed["loss"] == pytest.approx(10 / 4 / math.log(2), abs=1e-4)
    assert smoothed["ppl"] == pytest.approx(math.exp(10 / 4), abs=0.01)
    assert smoothed["row_ppl"] == pytest.approx(math.exp(7 / 4), abs=0.01)
    assert smoothed["column_ppl"] == pytest.approx(math.exp(3 / 4), abs=0.01)


def test_update_freq_adds_batches_up(tmp_path: Path) -> None:
    """Two batches of 4 before an update are one of 8; without dropout the runs are one."""
    data = preprocess(tmp_path / "data")
    flags = {"max_epoch": 2, "dropout": 0.0, "initial_table": "random", "optimizer": "sgd"}
    one = train(data, tmp_path / "one", batch_size=8, **flags)
    two = train(
        data, tmp_path / "two", batch_size=4, update_freq=2, required_batch_size_multiple=4, **flags
    )
    updates = [valid_records(records)[-1]["valid_num_updates"] for records in (one, two)]
    if updates[0] == updates[1]:
        assert valid_losses(one) == pytest.approx(valid_losses(two), abs=2e-3)
    assert valid_losses(two)[-1] < valid_losses(two)[0] + 1e-6
