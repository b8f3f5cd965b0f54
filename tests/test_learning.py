"""What an exported model learns on the device, against sums over all words."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_exports import Exported, export, text_model, write
from tiny_models import CONDITIONERS, KINDS

from fairseq_lightrnn.commands import exported as run_command
from fairseq_lightrnn.core.conditioning import Gated, Recurrent
from fairseq_lightrnn.runtime.learning import Rows, read_each, with_words_moved
from fairseq_lightrnn.runtime.model import ExportedModel
from fairseq_lightrnn.runtime.network import Network, Position
from fairseq_lightrnn.runtime.new_words import with_new_words
from fairseq_lightrnn.runtime.search import every_word

TABLES = [(13, (16,)), (10, (4, 4)), (20, (3, 3, 3))]
CASES = [
    (kind, words, shape, extras)
    for kind in KINDS
    for words, shape in TABLES
    for extras in (True, False)
]
TEXT = "w002 anew w003 w003\nw005 w004\nanew w002 further w007 anew\n"


@pytest.fixture(scope="module", params=CASES, ids=str)
def found(request: pytest.FixtureRequest) -> Exported:
    return export(*request.param, scale=0.6)


@pytest.fixture(params=[False, True], ids=["apart", "carried"])
def model(found: Exported, request: pytest.FixtureRequest) -> ExportedModel:
    if request.param and not found.network.memory.carries:
        pytest.skip("a transformer has nothing to carry")
    return text_model(found, request.param)


def some_positions(model: ExportedModel) -> Position:
    return model.text(["", "w002", "w003 w005 w004"]).position


def probabilities(network: Network, position: Position) -> np.ndarray:
    return np.exp(every_word(network, position).astype(np.float64))


def rows_of(network: Network) -> dict[tuple[int, ...], list[int]]:
    """The words of each row, that is of all coordinates but the last."""
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for word, coordinates in enumerate(network.seating.coordinates.tolist()):
        rows[tuple(coordinates[:-1])].append(word)
    return rows


def seat(model: ExportedModel) -> None:
    """Seats new words of the text, and moves nothing."""
    _, _, position = read_each(model, [line.split() for line in TEXT.splitlines()])
    learnt, left = with_new_words(
        model.network, model.learnt, {"anew": [1, 8, 12], "further": [10]}, position
    )
    assert not left
    model._take(learnt)


def test_new_words_take_from_their_row_alone(model: ExportedModel) -> None:
    position = some_positions(model)
    before = probabilities(model.network, position)
    old_rows = rows_of(model.network)
    seat(model)
    after = probabilities(model.network, position)
    assert after.shape[1] == before.shape[1] + 2
    np.testing.assert_allclose(after.sum(1), 1, atol=1e-5)
    for row, words in rows_of(model.network).items():
        old = old_rows[row]
        np.testing.assert_allclose(after[:, words].sum(1), before[:, old].sum(1), rtol=1e-4)
        ratios = after[:, old] / before[:, old]
        np.testing.assert_allclose(ratios, np.repeat(ratios[:, :1], len(old), 1), rtol=1e-3)
        assert (ratios < 1 + 1e-4).all()


def test_new_words_take_empty_cells_of_every_table(model: ExportedModel) -> None:
    before = model.network.seating.empty()
    seat(model)
    assert model.learnt.cells.shape == (len(before), 2)
    for cells, empty in zip(model.learnt.cells, before, strict=True):
        assert empty[cells].all()
        empty[cells] = False
    assert (model.network.seating.empty() == before).all()
    assert (before.sum(axis=1) == before[0].sum()).all()


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_a_seat_is_the_best_of_all_seats(kind: Any) -> None:
    model = text_model(export(kind, 10, (4, 4), scale=0.6))
    shipped = model.network
    _, _, position = read_each(model, [line.split() for line in TEXT.splitlines()])
    places = [1, 8, 12]
    learnt, _ = with_new_words(shipped, model.learnt, {"anew": places}, position)

    def loss(cell: int, bias: float) -> float:
        cells = np.array([cell, *learnt.cells[1:, 0]])[:, None]
        one = replace(learnt, cells=cells, biases=np.array([bias], np.float32))
        new = probabilities(shipped.with_learnt(one), position)[:, -1]
        row = shipped.seating.words[cell // 4]
        mass = probabilities(shipped, position)[:, row[row >= 0]].sum(1)
        return float(-np.log(new[places]).sum() - (mass * np.log1p(-new / mass)).sum())

    chosen = float(learnt.biases[0])
    best = loss(int(learnt.cells[0, 0]), chosen)
    for cell in np.flatnonzero(shipped.seating.empty()[0]):
        if (shipped.seating.words[cell // 4] >= 0).any():
            for bias in (*np.linspace(-6, 6, 13), chosen):
                assert best <= loss(cell, bias) + 1e-3


def test_the_gradient_is_that_of_the_loss() -> None:
    random = np.random.default_rng(0)
    members = np.array([[4, 2, -1, 7], [1, 9, 3, -1]])[[0, 1, 1, 0, 1]]
    words, taught = np.array([2, 9, 3, 2, 9]), np.array([2, 3, 9])
    log_probs = np.where(members < 0, -np.inf, random.normal(size=members.shape))
    queries = random.normal(size=(5, 2))
    rows = Rows(log_probs, members, words, queries, taught)

    def loss(biases: np.ndarray, numbers: np.ndarray) -> float:
        total = 0.0
        for row in range(5):
            logits = log_probs[row].copy()
            for place, word in enumerate(taught):
                logits[members[row] == word] += biases[place] + numbers[place] @ queries[row]
            chosen = logits[members[row] == words[row]][0]
            total += np.log(np.exp(logits).sum()) - chosen
        return total

    biases, numbers = random.normal(size=3), random.normal(size=(3, 2))
    value, by_biases, by_numbers = rows.gradient(biases, numbers)
    assert value == pytest.approx(loss(biases, numbers), rel=1e-12)
    for place in np.ndindex(3):
        step = np.zeros(3)
        step[place] = 1e-6
        slope = (loss(biases + step, numbers) - loss(biases - step, numbers)) / 2e-6
        assert by_biases[place] == pytest.approx(slope, abs=1e-7)
    for place in np.ndindex(3, 2):
        step = np.zeros((3, 2))
        step[place] = 1e-6
        slope = (loss(biases, numbers + step) - loss(biases, numbers - step)) / 2e-6
        assert by_numbers[place] == pytest.approx(slope, abs=1e-7)


def test_moved_biases_reweight_the_words_of_a_row(model: ExportedModel) -> None:
    position = some_positions(model)
    before = probabilities(model.network, position)
    _, words, where = read_each(model, [["w002", "w003"], ["w002"]])
    learnt = with_words_moved(model.network, model.learnt, words, where)
    learnt = replace(learnt, numbers=np.zeros_like(learnt.numbers))
    assert learnt.moved.tolist() == [0, 2, 3]
    assert (np.abs(learnt.added) > 0).any()
    added = np.zeros(before.shape[1])
    added[learnt.moved] = learnt.added
    model._take(learnt)
    after = probabilities(model.network, position)
    for row in rows_of(model.network).values():
        weights = before[:, row] * np.exp(added[row])
        expected = weights * before[:, row].sum(1, keepdims=True) / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(after[:, row], expected, rtol=1e-3, atol=1e-7)


def test_the_text_gets_more_probable_each_time_within_bounds(model: ExportedModel) -> None:
    def loss() -> float:
        scores = model.score(TEXT.splitlines(), carry_hidden_state=model.carry_hidden_state)
        return -sum(float(score.log_probs[score.ids != model.unknown].sum()) for score in scores)

    assert model.learn(TEXT).new == ["anew", "further"]
    losses = [loss()]
    for _ in range(3):
        assert model.learn(TEXT).new == []
        losses.append(loss())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    for _ in range(10):
        model.learn(TEXT)
    assert 0 < np.abs(model.learnt.added).max() <= 3


def test_answers_stay_exact(model: ExportedModel) -> None:
    model.learn(TEXT)
    text = model.text(["", "w002 anew"])
    every = probabilities(model.network, text.position)
    np.testing.assert_allclose(every.sum(1), 1, atol=1e-5)
    assert model.vocabulary[every.shape[1] - 1] == "further"
    for typed in ("", "an", "w00", "f"):
        found = text.complete(typed, 4)
        for of_text, pairs in zip(every, found, strict=True):
            good = [n for n in range(len(of_text)) if model.vocabulary[n].startswith(typed)]
            expected = np.sort(of_text[good])[::-1][:4]
            np.testing.assert_allclose([p for _, p in pairs], expected, rtol=1e-4)
            assert all(word.startswith(typed) for word, _ in pairs)
            for word, p in pairs:
                number = model.vocabulary.find(word)
                assert of_text[number] == pytest.approx(p, rel=1e-4)
    # Scores take another way to the same words.
    score = model.score("w002 anew further")
    for place, word in enumerate(score.tokens):
        position = model.text(" ".join(score.tokens[:place])).position
        number = model.vocabulary.find(word)
        expected_p = probabilities(model.network, position)[0, number]
        assert np.exp(score.log_probs[place]) == pytest.approx(expected_p, rel=1e-4)


def answers(model: ExportedModel) -> bytes:
    log_probs = model.text(["", "w002 w003"]).log_probs()
    return log_probs.tobytes() + str(model.complete("w002 w", 3)).encode()


def test_forgetting_restores_what_was_shipped(model: ExportedModel) -> None:
    before = answers(model)
    model.learn(TEXT)
    assert answers(model) != before
    model.forget()
    assert answers(model) == before
    assert model.vocabulary.find("anew") is None


def test_what_was_saved_is_what_was_learnt(model: ExportedModel, tmp_path: Path) -> None:
    model.learn(TEXT)
    expected = answers(model)
    model.save_learnt(tmp_path / "learnt.npz")
    model.forget()
    model.load_learnt(tmp_path / "learnt.npz")
    assert answers(model) == expected
    model.learn("w004 w004")  # goes on from there
    assert model.vocabulary.find("further") is not None
    assert answers(model) != expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(export(Gated, 10, (4, 4)), tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_learns_beside_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    (tmp_path / "mail.txt").write_text(TEXT)
    learnt = ["--learnt", str(tmp_path / "learnt")]
    run_command.main([str(folder), "learn", str(tmp_path / "mail.txt"), *learnt])
    assert capsys.readouterr().out == "new words\t2\nwords without a cell\t0\n"
    summaries = []
    for more in ([], learnt):
        run_command.main([str(folder), "score", str(tmp_path / "mail.txt"), *more])
        lines = capsys.readouterr().out.splitlines()
        summaries.append(dict(line.split("\t") for line in lines))
    assert [one["unknown"] for one in summaries] == ["4", "0"]
    assert "words:12|learnt:" in summaries[1]["signature"]
    (tmp_path / "typed.txt").write_text("w002 an\n")
    run_command.main([str(folder), "complete", str(tmp_path / "typed.txt"), *learnt])
    assert capsys.readouterr().out.splitlines()[1].split("\t")[1] == "anew"
    run_command.main([str(folder), "learn", str(tmp_path / "mail.txt"), *learnt])
    assert capsys.readouterr().out.startswith("new words\t0\n")
    assert contents(folder) == before


def test_words_without_a_cell_stay_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(export(Recurrent, 12, (3, 4), False), tmp_path / "model")
    (tmp_path / "mail.txt").write_text(TEXT)
    arguments = ["learn", str(tmp_path / "mail.txt"), "--learnt", str(tmp_path / "learnt")]
    run_command.main([str(tmp_path / "model"), *arguments])
    found = capsys.readouterr()
    assert found.out == "new words\t0\nwords without a cell\t2\n"
    assert "no empty cell is left for anew, further" in found.err


def other(folder: Path) -> None:
    description = json.loads((folder / "model.json").read_text())
    description["files"]["more"] = description["files"]["read.onnx"]
    (folder / "more").write_bytes((folder / "read.onnx").read_bytes())
    (folder / "model.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    "action, name, message",
    [
        ("score", "learnt", "learnt: belongs to another model"),
        ("learn", "learnt", "learnt: belongs to another model"),
        ("score", "nowhere", "nowhere: no such file of what a model has learnt"),
        ("score", "mail.txt", "mail.txt: is damaged, or not what a model has learnt"),
        ("learn", "model/learnt", "is in the folder of the model, which stays as it is"),
        ("learn", None, "learn needs --learnt FILE"),
    ],
)
def test_files_that_are_refused(
    folder: Path, tmp_path: Path, action: str, name: str | None, message: str
) -> None:
    (tmp_path / "mail.txt").write_text(TEXT)
    arguments = ["learn", str(tmp_path / "mail.txt"), "--learnt", str(tmp_path / "learnt")]
    run_command.main([str(folder), *arguments])
    other(folder)
    before = contents(folder)
    learnt = [] if name is None else ["--learnt", str(tmp_path / name)]
    with pytest.raises(SystemExit, match=message):
        run_command.main([str(folder), action, str(tmp_path / "mail.txt"), *learnt])
    assert contents(folder) == before


def test_long_texts_are_learnt_block_by_block(model: ExportedModel) -> None:
    def lines() -> Iterator[str]:
        for number in range(700):
            yield f"w002 w003 new{number % 3} w004"

    shipped: Any = len(model.vocabulary)
    assert sorted(model.learn(lines()).new) == ["new0", "new1", "new2"]
    assert len(model.vocabulary) == shipped + 3
