"""Further word tables: definition, oracles, and training with them through fairseq's commands."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq_run import TASK, TRANSLATION, run, symbols, train, train_translation, valid_losses
from tiny_models import COMPOSITIONS, build
from torch import Tensor

from fairseq_lightrnn.allocation.clustering import table_of_vectors, unexplained
from fairseq_lightrnn.allocation.cooccurrence import CoOccurrence
from fairseq_lightrnn.allocation.initial_table import cooccurrence_vectors, initial_table
from fairseq_lightrnn.commands.reallocate import main as reallocate
from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax
from fairseq_lightrnn.distribution import next_word_log_probs, top_words
from fairseq_lightrnn.further_tables import FurtherTables
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.table_lookup import TableLookup
from fairseq_lightrnn.tasks._table_maker import TableMaker
from fairseq_lightrnn.word_table import WordTable, balanced_cells

WORDS, SHAPE, DIM = 10, (3, 4), 5


def seated(seed: int) -> WordTable:
    cells = np.random.default_rng(seed).permutation(balanced_cells(WORDS, SHAPE))
    return WordTable.from_cells(cells, SHAPE)


@pytest.fixture
def further() -> FurtherTables:
    tables = FurtherTables(2, WORDS, SHAPE)
    for seed, table in enumerate(tables.tables, 1):
        table.seat(seated(seed))
    return tables


def rows(word: int) -> list[int]:
    """The rows of the matrix of vectors that a word has: its row and column in either table."""
    first, second = (seated(seed).coordinates[word] for seed in (1, 2))
    return [first[0], 3 + first[1], 7 + second[0], 10 + second[1]]


def table_in_force() -> TableLookup:
    lookup = TableLookup(WORDS, SHAPE)
    lookup.seat(seated(0))
    return lookup


def test_places_of_words(further: FurtherTables) -> None:
    assert further.num_vectors == 14
    words = torch.tensor([[0, 9], [4, 4]])
    assert further(words).tolist() == [[rows(int(word)) for word in line] for line in words]


def test_scores_are_summed_for_each_word(further: FurtherTables) -> None:
    scores = torch.randn(3, 14, dtype=torch.float64)
    words = torch.tensor([[0, 9], [4, 4], [7, 2]])
    expected = [
        [scores[n, rows(int(word))].sum().item() for word in line] for n, line in enumerate(words)
    ]
    assert further.sum_scores(scores, words).tolist() == [
        pytest.approx(line, abs=1e-12) for line in expected
    ]
    alike = further.sum_scores(scores, words[1])
    assert torch.equal(alike, further.sum_scores(scores, words[1].expand(3, -1)))


def test_words_are_read_by_all_their_cells(further: FurtherTables) -> None:
    table = table_in_force()
    embedding = ComponentEmbedding(SHAPE, DIM, table, further=further)
    assert embedding.further_weight is not None
    for word in range(WORDS):
        row, column = seated(0).coordinates[word]
        expected = embedding.weight[row] + embedding.weight[3 + column]
        expected = expected + embedding.further_weight[rows(word)].sum(0)
        read = embedding(table(torch.tensor([word]))).sum(1)[0]
        assert torch.allclose(read, expected, atol=1e-6)
    # A row alone is no word yet.
    assert torch.equal(embedding(torch.tensor([2])), embedding.weight[None, 2])


def test_words_are_predicted_by_all_their_cells(further: FurtherTables) -> None:
    """Against a loop over words: a softmax over rows, then one over the words of the row."""
    table = table_in_force()
    softmax = ComponentSoftmax(table, DIM, None, True, 2, further=further).double()
    with torch.no_grad():
        for parameter in softmax.parameters():
            parameter.normal_()
    hidden = torch.randn(2, DIM + 2 + DIM, dtype=torch.float64)
    first, second, query = hidden[0, :DIM], hidden[1, :DIM], hidden[1, DIM:]
    assert softmax.word_bias is not None and softmax.residual is not None
    assert softmax.further_weight is not None

    def logit(word: int) -> Tensor:
        column = 3 + seated(0).coordinates[word][1]
        total = softmax.weight[column] @ second + softmax.bias[column] + softmax.word_bias[word]
        total = total + softmax.residual[word] @ query[:2]
        return total + sum(softmax.further_weight[row] @ query[2:] for row in rows(word))

    by_row = torch.log_softmax(softmax.weight[:3] @ first + softmax.bias[:3], 0)
    total = 0.0
    for word in range(WORDS):
        row = seated(0).coordinates[word][0]
        others = [other for other in range(WORDS) if seated(0).coordinates[other][0] == row]
        normaliser = torch.logsumexp(torch.stack([logit(other) for other in others]), 0)
        expected = [by_row[row].item(), (logit(word) - normaliser).item()]
        scores = softmax(hidden[None], table(torch.tensor([word])))[0]
        assert scores.tolist() == pytest.approx(expected, abs=1e-12)
        total += math.exp(sum(expected))
    assert total == pytest.approx(1, abs=1e-12)


def test_gradients(further: FurtherTables) -> None:
    table = table_in_force()
    embedding = ComponentEmbedding(SHAPE, DIM, table, further=further).double()
    softmax = ComponentSoftmax(table, DIM, further=further).double()
    coordinates = table(torch.arange(WORDS))
    hidden = torch.randn(WORDS, 2, 2 * DIM, dtype=torch.float64, requires_grad=True)

    def scores(hidden: Tensor, read: Tensor, predict: Tensor) -> Tensor:
        parts = {"further_weight": read, "weight": embedding.weight}
        vectors = torch.func.functional_call(embedding, parts, (coordinates,)).sum(1)
        parts = {"further_weight": predict, "weight": softmax.weight, "bias": softmax.bias}
        outputs = hidden + torch.cat([vectors, vectors], dim=-1)[:, None]
        return torch.func.functional_call(softmax, parts, (outputs, coordinates))

    read = torch.randn(14, DIM, dtype=torch.float64, requires_grad=True)
    predict = torch.randn(14, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scores, (hidden, read, predict))


@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_words_move_and_keep_their_further_cells(kind: type) -> None:
    """Seats of the first table are exchanged: what further tables add follows the words."""
    model = build(kind, 10, (4, 4))
    context = model.context(3)
    query = context.output[:, 6:]
    before = model.softmax._further_logits(query, torch.arange(10))
    cells = np.random.default_rng(5).permutation(model.softmax.table.table().cells)
    model.softmax.table.seat(WordTable.from_cells(cells, (4, 4)))
    assert torch.equal(model.softmax._further_logits(query, torch.arange(10)), before)
    every = next_word_log_probs(model.composition, model.softmax, context)
    assert every.exp().sum(1).tolist() == pytest.approx([1] * 3, abs=1e-9)
    best = top_words(model.composition, model.softmax, context, 4)
    assert torch.equal(best.words, every.topk(4).indices)


def test_a_number_of_tables() -> None:
    with pytest.raises(ValueError, match="0 further tables: expected at least 1"):
        FurtherTables(0, WORDS, SHAPE)


def load(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=False)["model"]
    return state


@pytest.mark.parametrize("architecture", ["lightrnn_lm", "lightrnn_lm_gated"])
def test_training(
    data: Path, tmp_path: Path, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tables differ, are written, stay through a reallocation and a resume, and can be given."""
    flags = {"arch": architecture, "max_epoch": 3, "reallocate_epochs": 1, "dropout": 0}
    with caplog.at_level(logging.INFO):
        losses = valid_losses(train(data, tmp_path / "a", further_tables=2, **flags))
    assert "initial further table 2: WordTable(48 words, 7×7" in caplog.text
    states = [load(tmp_path / "a" / f"checkpoint{epoch}.pt") for epoch in (1, 3)]
    names = [f"decoder.further.tables.{number}.coordinates" for number in (0, 1)]
    for number, name in enumerate(names, 1):
        assert torch.equal(states[0][name], states[1][name])
        file = tmp_path / "a" / f"further_word_table{number}.txt"
        table = WordTable.load(file, symbols(data))
        assert table == WordTable(states[0][name].numpy(), (7, 7))
    first = states[0]["decoder.table.coordinates"]
    assert not torch.equal(first, states[1]["decoder.table.coordinates"])
    assert not torch.equal(states[0][names[0]], states[0][names[1]])
    assert not torch.equal(states[0][names[0]], first)
    assert states[1]["decoder.softmax.further_weight"].abs().sum() > 0

    train(data, tmp_path / "b", further_tables=2, **{**flags, "max_epoch": 2})
    train(data, tmp_path / "b", further_tables=2, **flags)  # goes on from checkpoint_last.pt
    resumed = load(tmp_path / "b" / "checkpoint3.pt")
    assert all(torch.equal(value, resumed[name]) for name, value in states[1].items())

    files = ",".join(str(tmp_path / "a" / f"further_word_table{n}.txt") for n in (1, 2))
    tables = {"initial_table": tmp_path / "a" / "word_table.epoch0.txt", "further_tables": files}
    given = valid_losses(train(data, tmp_path / "c", **tables, **flags))
    assert given == losses
    for file in (tmp_path / "a").glob("*word_table*.txt"):  # a checkpoint needs none of them
        file.unlink()
    path = tmp_path / "c" / "checkpoint3.pt"
    run("eval-lm", data, *TASK, "--path", path, "--cpu", "--num-workers", 0)
    assert LanguageModel.from_pretrained(path, data).score("w1 w2").perplexity > 1
    new = tmp_path / "new.pt"
    reallocate([str(path), str(data), "--output", str(new)])
    train(data, tmp_path / "d", restore_file=new, further_tables=2, **{**flags, "max_epoch": 4})
    gone_on = load(tmp_path / "d" / "checkpoint4.pt")
    assert all(torch.equal(gone_on[name], states[0][name]) for name in names)


@pytest.mark.parametrize(
    "flags",
    [
        {"composition": "gated", "num_components": 3, "label_smoothing": 0.1},
        {"arch": "lightrnn_transformer", "further_tables": 1, "source_table": "own"},
    ],
)
def test_translation(pairs: Path, tmp_path: Path, flags: dict[str, object]) -> None:
    train_translation(pairs, tmp_path, **{"max_epoch": 1, "further_tables": 2, **flags})
    state = load(tmp_path / "checkpoint1.pt")
    assert state["decoder.softmax.further_weight"].abs().sum() > 0
    assert not any(name.startswith("encoder.") and "further" in name for name in state)
    run("generate", pairs, *TRANSLATION, "--path", tmp_path / "checkpoint1.pt",
        "--gen-subset", "test", "--cpu", "--beam", 3)  # fmt: skip


def test_zero_tables(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", max_epoch=1)
    train(data, tmp_path / "b", max_epoch=1, further_tables="00")
    one, other = (load(tmp_path / name / "checkpoint1.pt") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_table_twice(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(data, tmp_path / "a", max_epoch=1)
    file = tmp_path / "a" / "word_table.txt"
    with caplog.at_level(logging.WARNING):
        train(data, tmp_path / "b", max_epoch=1, initial_table=file, further_tables=file)
    assert "further table 1 seats all words as one before it does" in caplog.text


def test_text_of_both_sides(pairs: Path, tmp_path: Path) -> None:
    """Where the first table is made from no text, the further ones still are."""
    flags = {"max_epoch": 1, "table_text": "both", "initial_table": "frequency"}
    train_translation(pairs, tmp_path / "a", further_tables=1, **flags)
    with pytest.raises(SystemExit, match="--table-text both: --initial-table frequency looks at"):
        train_translation(pairs, tmp_path / "b", **flags)


def test_shared_vectors(data: Path, tmp_path: Path) -> None:
    train(
        data, tmp_path, "--share-component-vectors", arch="lightrnn_lm_gated", max_epoch=1,
        further_tables=1,
    )  # fmt: skip
    state = load(tmp_path / "checkpoint1.pt")
    read = state["decoder.composition.embedding.further_weight"]
    assert torch.equal(read, state["decoder.softmax.further_weight"])


def test_random_tables_of_a_random_start(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, max_epoch=1, initial_table="random", further_tables=1, table_seed=5)
    table = WordTable.load(tmp_path / "further_word_table1.txt", symbols(data))
    first = WordTable.load(tmp_path / "word_table.txt", symbols(data))
    assert first == initial_table("random", 48, (7, 7), seed=5)
    assert sorted(table.cells) == sorted(first.cells)
    assert (table.cells == first.cells).mean() < 0.3


def test_another_shape(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, max_epoch=1, further_tables=1)
    with pytest.raises(SystemExit, match="--table-shape 6x8: the model has further tables of"):
        reallocate([
            str(tmp_path / "checkpoint1.pt"), str(data), "--table-shape", "6x8",
            "--output", str(tmp_path / "new.pt"),
        ])  # fmt: skip


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("-1", "--further-tables -1: neither a number of tables nor files joined by commas"),
        ("no.txt", "--further-tables no.txt: neither a number"),
        ("2.5", "--further-tables 2.5: neither a number"),
        ("3,", "--further-tables 3,: neither a number"),
        ("", "--further-tables : neither a number"),
        (".", "--further-tables .: neither a number"),
    ],
)
def test_values(data: Path, tmp_path: Path, value: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train(data, tmp_path, f"--further-tables={value}")


def test_one_component(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--further-tables 2: with --num-components 1 every word"):
        train(data, tmp_path, num_components=1, further_tables=2)


def test_a_table_of_another_shape(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", max_epoch=1, table_shape="6x8")
    file = tmp_path / "a" / "word_table.txt"
    with pytest.raises(SystemExit, match=r"word_table.txt is a table of shape \(6, 8\), the first"):
        train(data, tmp_path / "b", further_tables=file)


def test_checkpoints_keep_their_number_of_tables(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", max_epoch=1, further_tables=2)
    with pytest.raises(Exception, match="Cannot load model parameters") as refusal:
        train(data, tmp_path / "b", restore_file=tmp_path / "a" / "checkpoint1.pt")
    assert "made with --further-tables 2, not 0: give it again" in str(refusal.value.__context__)


def test_further_tables_are_made_from_what_those_before_do_not_say() -> None:
    random = np.random.default_rng(0)
    text = [random.choice(60, size=4000, p=random.dirichlet(np.ones(60)))]
    dictionary = Dictionary()
    for word in range(60 - dictionary.nspecial):
        dictionary.add_symbol(f"w{word}")
    maker = TableMaker(dictionary, lambda: text, 3)
    first = maker.make("cooccurrence", (8, 8))
    second = maker.make("cooccurrence", (8, 8), [first])
    third = maker.make("cooccurrence", (8, 8), [first, second])
    vectors, weights, columns = cooccurrence_vectors(text, 60, CoOccurrence(), 3)
    both = np.hstack([vectors, columns])

    def lacking(*tables: WordTable) -> float:
        left = unexplained(both, weights, tables)
        return float((weights * (left**2).sum(axis=1)).sum())

    assert lacking(first) > lacking(first, second) > lacking(first, second, third)
    for seed in range(5):  # tables of the same vectors say much the same
        alike = table_of_vectors(vectors, weights, columns, shape=(8, 8), seed=seed)
        assert lacking(first, second) < lacking(first, alike)
