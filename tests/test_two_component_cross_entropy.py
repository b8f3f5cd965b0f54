"""The criterion against its definitions, and under the names that fairseq has for it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.logging import metrics
from fairseq_run import preprocess, train, valid_losses, valid_records
from test_network import slow_penalties
from tiny_models import language_task
from torch import Tensor, nn

from fairseq_lightrnn.core.features import WordBias
from fairseq_lightrnn.core.reader import ComponentVectors
from fairseq_lightrnn.core.seats import PredictedTable
from fairseq_lightrnn.core.softmax import ComponentSoftmax
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.criterions.two_component_cross_entropy import (
    TwoComponentCrossEntropyCriterion,
    component_names,
)
from fairseq_lightrnn.models.flags import Regularisation, parse_regularisation
from fairseq_lightrnn.models.lightrnn_lm import (
    GatedLanguageModel,
    LightRNNLanguageModel,
    LSTMConfig,
)
from fairseq_lightrnn.models.word_head import Reallocations, WordHead

PAD = 1


class GivenScores(WordHead):
    """Takes features for the log-probabilities of the components."""

    def __init__(self) -> None:
        """Needs no head."""

    def log_probs(self, features: Tensor, words: Tensor) -> Tensor:
        return features


class Scores(nn.Module):
    """A model whose features are the log-probabilities of the components."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = nn.Parameter(log_probs)
        self.decoder = SimpleNamespace(words=GivenScores())

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


KINDS = {"lightrnn_lm": LightRNNLanguageModel, "lightrnn_lm_gated": GatedLanguageModel}


def lightrnn(kind: str, components: int, dropout_out: float = 0.4) -> nn.Module:
    """A language model that has weights of some size, dropout of outputs, and penalties."""
    torch.manual_seed(1)
    cfg = LSTMConfig(
        table_shape=f"{components}d", embed_dim=4, hidden_size=5, dropout=0.0,
        dropout_out=dropout_out, regularise="awd,weight=0,component=0,activation=2,change=3",
    )  # fmt: skip
    model = KINDS[kind].build_model(cfg, language_task(20)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def without_penalties(criterion: Any, model: Any, sample: Any, seed: int = 0) -> Any:
    """Computes the loss of the same model, as if it asked for no penalties."""
    penalties = model.decoder.penalties
    model.decoder.penalties = Regularisation()
    torch.manual_seed(seed)
    found = criterion(model, sample)
    model.decoder.penalties = penalties
    return found


def lm_batch() -> dict[str, Any]:
    text = torch.tensor([[2, 5, 9, 4, 7, 11], [2, 8, 6, PAD, PAD, PAD], [2, 3, PAD, PAD, PAD, PAD]])
    source, target = text[:, :-1].clone(), text[:, 1:].clone()
    source[target.eq(PAD)] = PAD
    made = batch(target)
    made["net_input"] = {"src_tokens": source, "target_tokens": target}
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [1, 2, 3])
def test_penalties_are_added_in_training_alone(criterion, kind: str, components: int) -> None:
    model, sample = lightrnn(kind, components), lm_batch()
    plain, size, plain_log = without_penalties(criterion, model, sample, seed=2)
    torch.manual_seed(2)
    loss, penalised_size, log = criterion(model, sample)
    assert size == penalised_size
    assert {name: log[name] for name in plain_log} == plain_log  # what is reported is the same

    torch.manual_seed(2)
    _, extra = model(**sample["net_input"])
    raw, dropped = extra["activations"]
    assert not torch.equal(raw, dropped)
    steps = components if kind == "lightrnn_lm" else 1
    real = sample["target"].ne(PAD).repeat_interleave(steps, dim=1)
    ar, tar = slow_penalties(raw, dropped, real)
    assert log["ar_penalty"].item() == pytest.approx(size * 2 * ar)
    assert log["tar_penalty"].item() == pytest.approx(size * 3 * tar)
    assert loss.item() == pytest.approx(plain.item() + size * (2 * ar + 3 * tar))

    model.eval(), criterion.eval()
    one, two = without_penalties(criterion, model, sample), criterion(model, sample)
    assert torch.equal(one[0], two[0])
    assert one[1:] == two[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_penalties(criterion, kind: str) -> None:
    model, sample = lightrnn(kind, 2), lm_batch()
    torch.manual_seed(3)
    loss, size, _ = criterion(model, sample)
    torch.manual_seed(3)
    features, extra = model(**sample["net_input"])
    target = sample["target"]
    real = target.ne(PAD)
    expected = -model.decoder.words.log_probs(features, target)[real].sum()
    steps = 2 if kind == "lightrnn_lm" else 1
    squares, changes = [], []
    for text, words in enumerate(real.sum(dim=1).tolist()):
        squares.append(extra["activations"].dropped[text, : words * steps].square())
        changes.append(extra["activations"].raw[text, : words * steps].diff(dim=0).square())
    expected = expected + size * (2 * torch.cat(squares).mean() + 3 * torch.cat(changes).mean())
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_penalties_are_per_word(criterion) -> None:
    """Of two equal batches, loss and words are twice those of one, as fairseq adds them up."""
    model, sample = lightrnn("lightrnn_lm_gated", 2, dropout_out=0.0), lm_batch()
    twice = {"net_input": {}, "target": torch.cat([sample["target"]] * 2)}
    twice["ntokens"] = 2 * sample["ntokens"]
    for name, words in sample["net_input"].items():
        twice["net_input"][name] = torch.cat([words] * 2)
    loss, size, log = criterion(model, sample)
    double_loss, double_size, double_log = criterion(model, twice)
    torch.testing.assert_close(double_loss, 2 * loss)
    assert double_size == 2 * size
    for name in ("ar_penalty", "tar_penalty"):
        torch.testing.assert_close(double_log[name], 2 * log[name])
    with metrics.aggregate() as values:
        criterion.reduce_metrics([log, log])
        smoothed = values.get_smoothed_values()
    expected = log["ar_penalty"].item() / size / math.log(2)
    assert smoothed["ar_penalty"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["activation", "change"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_weights_that_have_no_meaning(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--regularise .*'{name}={value}' is none of"):
        parse_regularisation(f"awd,{name}={value}")


def test_penalties_are_logged_beside_the_loss(data: Path, tmp_path: Path) -> None:
    """With nothing learnt, loss and perplexity are those of a training without penalties."""
    flags, awd = {"max_epoch": 1, "lr": 0.0}, "awd,weight=0.2,component=0.1"
    plain = train(data, tmp_path / "plain", **flags, regularise=f"{awd},activation=0,change=0")
    records = train(data, tmp_path / "penalised", **flags, regularise=awd)
    (one,), (two,) = ([r for r in found if "train_wps" in r][:1] for found in (plain, records))
    for name in ("train_loss", "train_ppl", "train_row_loss", "train_column_ppl"):
        assert one[name] == two[name]
    assert float(two["train_ar_penalty"]) > 0 and float(two["train_tar_penalty"]) > 0
    assert valid_losses(plain) == valid_losses(records)
    assert not any("penalty" in name for record in valid_records(records) for name in record)


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
        self.table = PredictedTable(words, shape)
        cells = np.random.default_rng(words).permutation(self.table.table().cells)
        self.table.seat(WordTable.from_cells(cells, shape))
        vectors = ComponentVectors(shape, 4)
        self.softmax = ComponentSoftmax(self.table, vectors, [WordBias(words)]).double()
        for parameter in self.softmax.parameters():
            nn.init.normal_(parameter)
        head: Any = SimpleNamespace(table=self.table, softmax=self.softmax)
        self.decoder = SimpleNamespace(words=WordHead(head, None, None, Reallocations()))
        # The same output for every prefix: P(w) is a distribution that a test can enumerate.
        self.output = nn.Parameter(torch.randn(len(shape), 4, dtype=torch.float64))

    def forward(self, src_tokens: Tensor) -> tuple[Tensor, None]:
        return self.output.flatten().expand(*src_tokens.shape, -1), None

    def probabilities(self) -> Tensor:
        words = torch.arange(self.table.num_words)
        hidden = self.output.expand(len(words), -1, -1)
        return self.softmax(hidden, words).sum(1).exp()


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


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The validation losses of a training that names the criterion."""
    return valid_losses(train(data, tmp_path_factory.mktemp("plain"), max_epoch=2))


class TestOtherNames:
    """Only one criterion can work, so what names the same loss is taken for it."""

    @pytest.mark.parametrize("criterion", [None, "cross_entropy"])
    def test_left_out(
        self, data: Path, tmp_path: Path, plain: list[float], criterion: str | None,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        with caplog.at_level(logging.INFO):
            records = train(data, tmp_path, criterion=criterion, max_epoch=2)
        assert valid_losses(records) == plain
        (line,) = (message for message in caplog.messages if "in place of" in message)
        assert line.startswith("--criterion two_component_cross_entropy, with label smoothing 0,")
        assert "valid_row_loss" in valid_records(records)[0]

    def test_nothing_is_said_of_its_own_name(
        self, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            train(data, tmp_path, max_epoch=1)
        assert "in place of" not in caplog.text

    def test_label_smoothing(
        self, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        flags = {"label_smoothing": 0.2, "max_epoch": 2}
        named = train(data, tmp_path / "named", **flags)
        with caplog.at_level(logging.INFO):
            other = train(
                data, tmp_path / "other", criterion="label_smoothed_cross_entropy", **flags
            )
        assert valid_losses(other) == valid_losses(named)
        nll = [valid_records(records)[-1]["valid_nll_loss"] for records in (named, other)]
        assert nll[0] == nll[1] < valid_records(named)[-1]["valid_loss"]
        (line,) = (message for message in caplog.messages if "in place of" in message)
        assert "with label smoothing 0.2, in place of label_smoothed_cross_entropy" in line

        # fairseq-validate builds it from the checkpoint.
        path = str(tmp_path / "other" / "checkpoint_last.pt")
        _, cfg, task = checkpoint_utils.load_model_ensemble_and_task([path])
        criterion = task.build_criterion(cfg.criterion)
        assert isinstance(criterion, TwoComponentCrossEntropyCriterion)
        assert criterion.label_smoothing == 0.2


def test_half_precision_rounds_no_shares_of_words() -> None:
    """The shares of label smoothing are counts of words, whatever the model computes in."""
    cfg = LSTMConfig(embed_dim=4, hidden_size=4, table_shape="2d")
    model = GatedLanguageModel.build_model(cfg, language_task(2000))
    table = model.decoder.words.table
    rows = torch.arange(45)[:, None]
    expected = [table.shares(0, rows[:1, :0]), table.shares(1, rows)]
    model.bfloat16()
    found = [table.shares(0, rows[:1, :0]), table.shares(1, rows)]
    for one, two in zip(expected, found, strict=True):
        assert two.dtype == torch.float32 and torch.equal(one, two)
        torch.testing.assert_close(two.sum(1), torch.ones(len(two)))
    words = torch.randint(4, 2000, (2, 5))
    sample = {
        "net_input": {"src_tokens": words, "target_tokens": words, "src_lengths": None},
        "target": words, "ntokens": 10,
    }  # fmt: skip
    task = SimpleNamespace(target_dictionary=model.decoder.dictionary)
    smoothed = TwoComponentCrossEntropyCriterion(task, 0.1).train()  # type: ignore[arg-type]
    loss = smoothed(model, sample)[0]
    assert loss.item() == pytest.approx(10 * math.log(2000), rel=0.05)
