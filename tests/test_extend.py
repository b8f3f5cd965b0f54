"""``lightrnn-extend``: what new words get, and that old words lose no more than that."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import move_in_further_tables, run, train, write_text

from fairseq_lightrnn.commands import extend
from fairseq_lightrnn.core.features import FurtherTables, WordBias
from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.resizing import grown_shape

KINDS: dict[str, dict[str, Any]] = {
    "paper": {"arch": "lightrnn_lm"},
    "own numbers": {"arch": "lightrnn_lm_gated", "word_dim": 3},
    "further tables": {"arch": "lightrnn_lm_gated", "further_tables": "2"},
    "three components": {"arch": "lightrnn_lm", "table_shape": "5x5x4"},
    "input table": {"arch": "lightrnn_lm_gated", "table_shape": "10x6"},
    "input tables": {"arch": "lightrnn_lm_gated", "further_tables": "2"},
    "input tables with room": {
        "arch": "lightrnn_lm_gated", "further_tables": "2", "table_shape": "10x6"
    },
    "softmax": {"arch": "lightrnn_lm", "table_shape": "1d"},
}  # fmt: skip
NEW = ("5", "9", "13", "17")


def lines_with_new_words(data: Path) -> list[str]:
    """Sentences of the corpus in which some words have names that the model does not know.

    Each ends with the first of these, so that little is predicted after one was read.
    """
    lines = []
    for line in (data.parent / "valid.txt").read_text().splitlines() * 2:
        words = [f"new{w[1:]}" if w[1:] in NEW else w for w in line.split()]
        end = next((place for place, word in enumerate(words, 1) if "new" in word), len(words))
        lines.append(" ".join(words[:end]))
    assert sum("new" in line for line in lines) > 10
    return lines


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    more = ["--keep-input-table"] if "input" in request.param else []
    train(data, folder, *more, max_epoch=4, **KINDS[request.param])
    if "input tables" in request.param:
        move_in_further_tables(folder)
    return folder


@pytest.fixture(scope="module")
def extended(
    checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LanguageModel, LanguageModel, list[str]]:
    """A model, the one with new words, and the text that these come from."""
    folder = tmp_path_factory.mktemp("extended")
    lines = lines_with_new_words(data)
    (folder / "new.txt").write_text("\n".join(lines) + "\n")
    extend.main([str(checkpoint), str(folder / "new.txt"), "-o", str(folder / "new")])
    old, new = (LanguageModel.from_pretrained(one) for one in (checkpoint, folder / "new"))
    return old, new, lines


def probabilities(model: LanguageModel, prefix: str) -> dict[str, float]:
    return dict(model.next_words(prefix, len(model.dictionary)))


def by_prefix(model: LanguageModel) -> dict[tuple[int, ...], list[str]]:
    """The words that share all coordinates but the last."""
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for word, coordinates in enumerate(model.table.table().coordinates.tolist()):
        groups[tuple(coordinates[:-1])].append(model.dictionary[word])
    return groups


def check_ratios(old: LanguageModel, new: LanguageModel, prefix: str) -> None:
    """Rows keep their probabilities, and old words of a row their ratios to each other."""
    before, after = probabilities(old, prefix), probabilities(new, prefix)
    assert sum(after.values()) == pytest.approx(1, abs=1e-5)
    for group, words in by_prefix(new).items():
        known = [word for word in words if word in before]
        if not known:
            continue
        ratios = np.array([after[word] / before[word] for word in known])
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
        if group:
            total = sum(before[w] for w in by_prefix(old)[group])
            assert sum(after[word] for word in words) == pytest.approx(total, rel=1e-3)


def test_new_words_get_cells_and_old_ones_keep_their_probabilities(extended: Any) -> None:
    old, new, lines = extended
    counts = Counter(word for line in lines for word in line.split() if "new" in word)
    assert new.dictionary.symbols[: len(old.dictionary)] == old.dictionary.symbols
    assert new.dictionary.symbols[len(old.dictionary) :] == [w for w, _ in counts.most_common()]
    assert new.dictionary.count[-1] == min(counts.values())
    for prefix in ("", "w1", "w1 w8 w3"):
        check_ratios(old, new, prefix)


def check_tables(old: LanguageModel, new: LanguageModel) -> None:
    """Every word has a cell in every table, and the words that stay are read as they were."""
    for table in new.model.modules():
        if isinstance(table, Seats):
            assert len(set(table.table().cells.tolist())) == len(new.dictionary)
    for word in set(old.dictionary.symbols) & set(new.dictionary.symbols):
        torch.testing.assert_close(new.embedding(word), old.embedding(word))


def test_new_words_get_cells_in_all_tables(extended: Any) -> None:
    check_tables(*extended[:2])


def test_new_words_are_read_where_they_are_predicted_or_near(extended: Any) -> None:
    old, new, _ = extended
    words = new.model.decoder.words
    for predicted, read in zip(words.further_tables, words.further_input_tables, strict=False):
        taken = read.table().cells[: len(old.dictionary)]
        free = np.setdiff1d(np.arange(read.table().num_cells), taken)
        first = predicted.table().cells[len(old.dictionary)]
        distance = abs(read.table().cells[len(old.dictionary)] - first)
        assert distance == np.abs(free - first).min()


def test_new_words_are_as_frequent_as_in_their_text(extended: Any) -> None:
    _, new, lines = extended
    if not any(isinstance(one, WordBias) for one in new.decoder.head.softmax.features):
        pytest.skip("words of this model have no bias")
    texts = [" ".join(line.split()[:end]) for line in lines for end in range(len(line.split()) + 1)]
    mass = sum(
        sum(p for word, p in pairs if word.startswith("new"))
        for pairs in new.next_words(texts, len(new.dictionary))
    )
    # That several of a row share its probability, the choice of a bias knows of earlier ones only.
    assert mass == pytest.approx(sum("new" in line for line in lines), rel=0.3)


def test_new_words_sit_better_than_at_random(extended: Any) -> None:
    _, new, lines = extended
    table = new.table.table()
    if any(isinstance(one, FurtherTables) for one in new.decoder.head.softmax.features):
        pytest.skip("cells of further tables are chosen by a word's own score alone: no promise")

    def loss() -> float:
        scores = new.score(lines)
        return -sum(
            score.log_probs[: -1 if "new" in line else None].sum()
            for line, score in zip(lines, scores, strict=True)
        )

    found, others = loss(), []
    count = len({word for line in lines for word in line.split() if "new" in word})
    for seed in range(10):
        cells = table.cells.copy()
        free = np.append(np.flatnonzero(table.words < 0), cells[-count:])
        cells[-count:] = np.random.default_rng(seed).permutation(free)[:count]
        new.table.seat(WordTable.from_cells(cells, table.shape))
        others.append(loss())
    new.table.seat(table)
    assert found <= np.mean(others) + 1e-3


def test_losses_are_those_of_the_new_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a word was seated no other empty cell would have made the text more probable."""
    train(data, tmp_path / "trained", max_epoch=2, arch="lightrnn_lm_gated", table_shape="8x7",
          word_dim=0)  # fmt: skip
    line = "w1 w8 unheard w3"
    one = tmp_path / "one.txt"
    one.write_text(f"{line}\n" * 40)
    monkeypatch.setattr("fairseq_lightrnn.new_words._POSITIONS", 10**6)
    extend.main([str(tmp_path / "trained"), str(one), "-o", str(tmp_path / "new")])
    new = LanguageModel.from_pretrained(tmp_path / "new")
    table, word = new.table.table(), new.dictionary.index("unheard")
    found = new.score(line).log_prob
    best = -np.inf
    for cell in np.flatnonzero(table.words < 0):
        cells = table.cells.copy()
        cells[word] = cell
        new.table.seat(WordTable.from_cells(cells, table.shape))
        # Reading the word changes what follows it; its own place is chosen by what precedes it.
        best = max(best, new.score(line).log_probs[:3].sum())
    new.table.seat(table)
    assert new.score(line).log_probs[:3].sum() > best - 0.05
    assert new.score(line).log_prob == pytest.approx(found)


def test_biases_of_new_columns_know_what_further_tables_say(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where words have no bias those of their columns are the best there are."""
    train(data, tmp_path / "trained", max_epoch=6, arch="lightrnn_lm_gated", word_dim=0,
          further_tables="2", table_shape="7x7")  # fmt: skip
    checkpoint = tmp_path / "trained" / "checkpoint_best.pt"
    state = torch.load(checkpoint, weights_only=False)
    for name, value in state["model"].items():
        if name.endswith("output_vectors"):
            value.mul_(4)  # as after a longer training
    torch.save(state, checkpoint)
    new_words = {f"w{number}": f"new{number}" for number in (1, 7, 9, 12, 0, 8, 15)}
    lines = (data.parent / "train.txt").read_text().splitlines()[:60]
    lines = [" ".join(new_words.get(word, word) for word in line.split()) for line in lines]
    (tmp_path / "new.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("fairseq_lightrnn.new_words._POSITIONS", 10**6)
    extend.main([str(checkpoint), str(tmp_path / "new.txt"), "-o", str(tmp_path / "new")])
    new = LanguageModel.from_pretrained(tmp_path / "new")
    assert new.table.shape == (7, 8)
    bias = new.decoder.head.softmax.bias
    found = bias[-1].item()
    losses = []
    for change in (0, -0.5, 0.5):
        bias.data[-1] = found + change
        losses.append(-sum(score.log_prob for score in new.score(lines)))
    assert losses[0] == min(losses)


def test_words_are_dropped(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "drop.txt").write_text("w1\nw8\n")
    extend.main([
        str(checkpoint), "--drop", str(tmp_path / "drop.txt"), "-o", str(tmp_path / "new"),
    ])  # fmt: skip
    old, new = (
        LanguageModel.from_pretrained(checkpoint),
        LanguageModel.from_pretrained(tmp_path / "new"),
    )
    assert len(new.dictionary) == len(old.dictionary) - 2
    assert "w1" not in new.dictionary.indices
    check_tables(old, new)
    after, before = probabilities(new, "w3"), probabilities(old, "w3")
    assert sum(after.values()) == pytest.approx(1, abs=1e-5)
    for words in by_prefix(new).values():
        ratios = np.array([after[word] / before[word] for word in words])
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to do"),
        (["known.txt"], "holds no word that the model does not know"),
        (["--drop", "unknown.txt"], "'unheard' is not in the dictionary"),
        (["--drop", "special.txt"], "'<unk>' cannot be dropped"),
        (["unknown.txt", "--min-count", "0"], "--min-count 0: must be at least 1"),
        (["no-such.txt"], "no-such.txt: no such text file"),
        (["--drop", "known.txt", "--min-count", "2"], "--min-count 2 is for words of a text"),
        (["unknown.txt", "-o", "known.txt/new"], "known.txt is a file, not a folder"),
    ],
)
def test_mistakes_end_in_a_sentence(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.chdir(tmp_path)
    train(data, tmp_path / "trained", max_epoch=1)
    for name, words in (("known", "w1"), ("unknown", "unheard"), ("special", "<unk>")):
        (tmp_path / f"{name}.txt").write_text(words + "\n")
    with pytest.raises(SystemExit, match=f"lightrnn-extend: .*{message}"):
        extend.main(["trained", "-o", "new", *arguments])
    assert not (tmp_path / "new").exists()


def test_no_other_folder_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="exists already"):
        extend.main(["nowhere", "text", "-o", str(tmp_path)])


def test_tables_grow_by_columns() -> None:
    assert grown_shape((3, 4), 12) == (3, 4)
    assert grown_shape((3, 4), 13) == (3, 5)
    assert grown_shape((2, 3, 4), 40) == (2, 3, 7)
    assert grown_shape((5,), 9) == (9,)


def test_a_row_without_words_is_room(data: Path, tmp_path: Path) -> None:
    """Of which nothing is known: the model gives it no probability."""
    train(data, tmp_path / "a", max_epoch=1, arch="lightrnn_lm_gated", table_shape="8x8")
    state = torch.load(tmp_path / "a" / "checkpoint_best.pt", weights_only=False)
    for name, value in state["model"].items():
        if name.endswith(".coordinates"):  # six full rows, two empty ones
            places = np.stack(np.unravel_index(np.arange(len(value)), (8, 8)), axis=1)
            value.copy_(torch.from_numpy(places))
    torch.save(state, tmp_path / "a" / "checkpoint_best.pt")
    (tmp_path / "new.txt").write_text("w1 newer w2\nw1 newest w2\n")
    arguments = [str(tmp_path / "a" / "checkpoint_best.pt"), str(tmp_path / "new.txt")]
    extend.main([*arguments, "--data", str(data), "-o", str(tmp_path / "new")])
    model = LanguageModel.from_pretrained(tmp_path / "new")
    assert {"newer", "newest"} <= set(model.dictionary.symbols)
    found = probabilities(model, "w1")
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert 1e-4 < found["newer"] < 0.5


def test_new_text_is_read_from_its_beginning_and_finds_its_own_best(
    data: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    train(data, first, max_epoch=2, save_interval_updates=3)
    middle = next(first.glob("checkpoint_2_*.pt"))
    texts = {split: write_text(tmp_path / split, 60, seed, words=70)
             for seed, split in enumerate(("train", "valid"))}  # fmt: skip
    new = tmp_path / "new"
    extend.main([str(middle), str(texts["train"]), "--data", str(data), "-o", str(new)])
    state = torch.load(new / "checkpoint_best.pt", weights_only=False)
    assert "best" not in state["extra_state"]
    assert state["extra_state"]["train_iterator"]["iterations_in_epoch"] == 0
    run(
        "preprocess", "--only-source", "--trainpref", texts["train"], "--validpref",
        texts["valid"], "--srcdict", new / "dict.txt", "--destdir", new / "bin",
    )  # fmt: skip
    flags = {
        "restore_file": new / "checkpoint_best.pt",
        "table_shape": state["cfg"]["model"]["table_shape"],
    }
    train(new / "bin", tmp_path / "on", max_epoch=3, **flags)
    assert (tmp_path / "on" / "checkpoint_best.pt").exists()


def test_words_that_are_too_rare(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("w1 newer w2\n")
    arguments = [str(checkpoint), str(tmp_path / "new.txt"), "-o", str(tmp_path / "new")]
    with pytest.raises(SystemExit, match="does not know 5 times .--min-count"):
        extend.main([*arguments, "--min-count", "5"])


def test_an_average_of_other_parameters_is_left_out(data: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"arch": "lightrnn_lm_gated"}
    average = ["--store-ema", "--ema-decay", "0.9"]
    train(data, tmp_path / "a", *average, max_epoch=1, **flags)
    (tmp_path / "new.txt").write_text("w1 newer w2\n")
    extend.main([str(tmp_path / "a"), str(tmp_path / "new.txt"), "-o", str(tmp_path / "new")])
    state = torch.load(tmp_path / "new" / "checkpoint_best.pt", weights_only=False)
    assert not {"ema", "ema_fp32_params"} & set(state["extra_state"])
