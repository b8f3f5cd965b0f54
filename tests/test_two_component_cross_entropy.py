from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.logging import metrics
from fairseq_run import preprocess, train, valid_losses, valid_records
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentSoftmax, TableLookup
from fairseq_lightrnn.criterions.two_component_cross_entropy import (
    TwoComponentCrossEntropyCriterion,
    component_names,
)
from fairseq_lightrnn.word_table import WordTable

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


class Smoothed(nn.Module):
    """A model of random outputs, with a real softmax over a part-filled table."""

    def __init__(self, words: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(words)
        self.decoder = self
        self.table = TableLookup(words, shape)
        cells = np.random.default_rng(words).permutation(self.table.table().cells)
        self.table.seat(WordTable.from_cells(cells, shape))
        self.softmax = ComponentSoftmax(self.table, 4, None, True).double()
        for parameter in self.softmax.parameters():
            nn.init.normal_(parameter)
        # The same output for every prefix: P(w) is a distribution that a test can enumerate.
        self.output = nn.Parameter(torch.randn(len(shape), 4, dtype=torch.float64))

    def forward(self, src_tokens: Tensor) -> tuple[Tensor, None]:
        return self.output.expand(*src_tokens.shape, -1, -1), None

    def component_log_probs(self, features: Tensor, words: Tensor) -> Tensor:
        return self.component_log_probs_and_means(features, words)[0]

    def component_log_probs_and_means(self, features: Tensor, words: Tensor) -> Any:
        flat = features.flatten(0, 1), self.table(words.flatten())
        scores, means = self.softmax.forward_with_mean(*flat)
        return scores.view(*words.shape, -1), means.view(*words.shape, -1)

    def probabilities(self) -> Tensor:
        words = torch.arange(self.table.num_words)
        hidden = self.output.expand(len(words), -1, -1)
        return self.softmax(hidden, self.table(words)).sum(1).exp()


def smoothing(epsilon: float) -> TwoComponentCrossEntropyCriterion:
    dictionary = type("Words", (), {"pad": lambda self: PAD})()
    task = type("Task", (), {"target_dictionary": dictionary})()
    return TwoComponentCrossEntropyCriterion(task, epsilon)


@pytest.mark.parametrize(
    ("words", "shape"), [(9, (9,)), (12, (3, 4)), (10, (3, 4)), (17, (2, 3, 4))]
)
def test_label_smoothing_spreads_over_words(words: int, shape: tuple[int, ...]) -> None:
    """Against the definition, evaluated on the probabilities of whole words alone."""
    model, epsilon = Smoothed(words, shape), 0.3
    probabilities = model.probabilities()
    torch.testing.assert_close(probabilities.sum(), torch.ones((), dtype=torch.float64))
    coordinates = model.table.table().coordinates.tolist()

    def log_prob(word: int, component: int) -> Tensor:
        """log P(coordinate | coordinates before it), from sums of words' probabilities."""
        shared = [
            sum(
                probabilities[v] for v in range(words)
                if coordinates[v][:length] == coordinates[word][:length]
            )
            for length in (component, component + 1)
        ]  # fmt: skip
        return torch.log(shared[1] / shared[0])

    target = torch.tensor([[5, 8, 2], [0, 6, PAD]])
    expected, nll = 0.0, 0.0
    for word in target[target.ne(PAD)].tolist():
        for component in range(len(shape)):
            prefix = coordinates[word][:component]
            others = [v for v in range(words) if coordinates[v][:component] == prefix]
            mean = sum(log_prob(v, component) for v in others) / len(others)
            nll -= log_prob(word, component)
            expected -= (1 - epsilon) * log_prob(word, component) + epsilon * mean
    loss, _, log = smoothing(epsilon)(model, batch(target))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log["nll_loss"], nll.detach())
    losses, _, _ = smoothing(epsilon)(model, batch(target), reduce=False)
    torch.testing.assert_close(losses.sum(), loss)
    plain, _, log = smoothing(0.0)(model, batch(target))
    torch.testing.assert_close(plain, nll)
    assert "nll_loss" not in log


def test_label_smoothing_of_one_component_is_that_of_torch() -> None:
    model = Smoothed(9, (9,))
    target = torch.tensor([[5, 8, 2, PAD]])
    logits = model.probabilities().log().expand(4, -1)
    expected = nn.functional.cross_entropy(
        logits, target[0], ignore_index=PAD, label_smoothing=0.2, reduction="sum"
    )
    torch.testing.assert_close(smoothing(0.2)(model, batch(target))[0], expected)


def test_perplexity_is_that_of_the_loss_without_smoothing() -> None:
    log = [{"loss": 9.0, "nll_loss": 8.0, "row_loss": 6.0, "column_loss": 2.0, "sample_size": 4}]
    with metrics.aggregate() as values:
        TwoComponentCrossEntropyCriterion.reduce_metrics(log)
        smoothed = values.get_smoothed_values()
    assert smoothed["loss"] == pytest.approx(9 / 4 / math.log(2), abs=1e-4)
    assert smoothed["ppl"] == pytest.approx(math.exp(8 / 4), abs=0.01)
    assert smoothed["row_ppl"] == pytest.approx(math.exp(6 / 4), abs=0.01)
    assert "nll_ppl" not in smoothed


@pytest.mark.parametrize("epsilon", [-0.1, 1.0])
def test_label_smoothing_out_of_range(epsilon: float) -> None:
    with pytest.raises(SystemExit, match="--label-smoothing .*: must be at least 0 and below 1"):
        smoothing(epsilon)
