"""``lightrnn-score``, on a small trained model."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import TINY_TRANSFORMER, run, train

from fairseq_lightrnn.commands.score import main
from fairseq_lightrnn.language_model import LanguageModel

TEXT = "w1 w8 w15\nw3 unheard-of w9 w9\n\nw2\n"


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, max_epoch=2, sample_break_mode="eos")
    return save_dir / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def transformer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("transformer")
    sizes = {k: v for k, v in TINY_TRANSFORMER.items() if not k.startswith("encoder")}
    train(
        data, save_dir, arch="lightrnn_transformer_lm", max_epoch=1, sample_break_mode="eos",
        **sizes,
    )  # fmt: skip
    return save_dir


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def summary(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def table(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    names = header.split("\t")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


class TestCorpus:
    def test_binarised_split_equals_eval_lm(
        self, data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import fairseq_cli.eval_lm as command

        results: dict[str, float] = {}
        original = command.eval_lm
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                command, "eval_lm", lambda *a, **k: results.update(original(*a, **k)) or results
            )
            run(
                "eval-lm", data, "--path", checkpoint, "--cpu", "--num-workers", 0, "--gen-subset",
                "test", "--sample-break-mode", "eos", "--task", "lightrnn_language_modeling",
            )  # fmt: skip
        ours = summary(capsys, checkpoint, "--data", data, "--split", "test")
        assert -ours["logprob"] / ours["words"] == pytest.approx(float(results["loss"]), abs=1e-5)
        assert ours["perplexity"] == pytest.approx(float(results["perplexity"]), abs=0.01)
        assert ours["sentences"] == 20

    def test_text_equals_binarised(
        self, data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ours = summary(capsys, checkpoint, data.parent / "test.txt")
        split = summary(capsys, checkpoint, "--data", data, "--split", "test")
        assert ours == split

    def test_unknown_words_and_ends_are_told_apart(
        self, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = table(capsys, checkpoint, text, "--level", "word")
        log_probs = [float(word["logprob"]) for word in words]
        tokens = "w1 w8 w15 </s> w3 unheard-of w9 w9 </s> </s> w2 </s>"
        assert " ".join(word["token"] for word in words) == tokens
        both = summary(capsys, checkpoint, text)
        assert (both["sentences"], both["words"], both["unknown"]) == (4, 12, 1)
        assert both["logprob"] == pytest.approx(sum(log_probs), abs=1e-4)
        assert both["perplexity"] == pytest.approx(2 ** (-sum(log_probs) / 12), rel=1e-5)
        known = sum(log_probs) - log_probs[5]
        assert both["perplexity_without_unknown"] == pytest.approx(2 ** (-known / 11), rel=1e-5)
        assert both["row_perplexity"] * both["column_perplexity"] == pytest.approx(
            both["perplexity"]
        )
        inner = summary(capsys, checkpoint, text, "--no-eos")
        assert (inner["words"], inner["unknown"]) == (8, 1)
        no_ends = sum(
            p for p, word in zip(log_probs, words, strict=True) if word["token"] != "</s>"
        )
        assert inner["perplexity"] == pytest.approx(2 ** (-no_ends / 8), rel=1e-5)

    @pytest.mark.parametrize(
        ("base", "unit"), [("2", math.log(2)), ("e", 1.0), ("10", math.log(10))]
    )
    def test_base(
        self, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str], base: str,
        unit: float,
    ) -> None:  # fmt: skip
        model = LanguageModel.from_pretrained(checkpoint)
        nats = sum(score.log_prob for score in model.score_lines(TEXT.splitlines()))
        ours = summary(capsys, checkpoint, text, "--base", base)
        assert ours["logprob"] == pytest.approx(nats / unit)
        assert f"|base:{base}|" in ours["signature"]

    @pytest.mark.parametrize("flags", [[], ["--carry-hidden-state"]])
    def test_batches_do_not_matter(
        self, data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
    ) -> None:
        arguments = [checkpoint, data.parent / "test.txt", *flags]
        values = [summary(capsys, *arguments, "--batch-words", n) for n in (1, 17, 5000)]
        for value in values[1:]:
            assert value["perplexity"] == pytest.approx(values[0]["perplexity"], abs=1e-3)
            assert value["logprob"] / value["words"] == pytest.approx(
                values[0]["logprob"] / values[0]["words"], abs=1e-5
            )

    def test_state_is_carried_as_in_training(
        self, data: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(data, tmp_path, "--carry-hidden-state", max_epoch=1, initial_table="random")
        found = {}
        for flag in ("", "--carry-hidden-state", "--no-carry-hidden-state"):
            capsys.readouterr()
            assert main([*map(str, (tmp_path, text, "--format", "json")), *flag.split()]) == 0
            captured = capsys.readouterr()
            found[flag] = json.loads(captured.out)
            said = "as in training, each sentence is predicted from all before it"
            assert captured.err.startswith(said) == (flag == "")
        default, carried, reset = found.values()
        assert default == carried
        assert "|state:carried|" in default["signature"]
        assert "|state:reset|" in reset["signature"]
        assert reset["perplexity"] != pytest.approx(carried["perplexity"], rel=1e-6)

    def test_signature_names_what_matters(
        self, data: Path, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plain = summary(capsys, checkpoint, text)["signature"]
        fields = dict(field.split(":") for field in plain.split("|"))
        model = LanguageModel.from_pretrained(checkpoint)
        assert fields["table"] == model.table_digest()
        assert fields["words"] == str(len(model.dictionary))
        assert (fields["unk"], fields["eos"], fields["state"]) == ("scored", "in", "reset")
        other = summary(capsys, checkpoint, text, "--no-eos", "--carry-hidden-state")["signature"]
        assert "|eos:out|state:carried|" in other
        one, two = (
            summary(capsys, checkpoint.with_name(f"checkpoint{epoch}.pt"), text)["signature"]
            for epoch in (1, 2)
        )
        assert one.split("|")[0] != two.split("|")[0]
        assert one.split("|")[1:] == two.split("|")[1:] == plain.split("|")[1:]


class TestLevels:
    def test_sentences(
        self, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = table(capsys, checkpoint, text, "--level", "sentence")
        model = LanguageModel.from_pretrained(checkpoint)
        expected = model.score(TEXT.splitlines())
        assert [row["sentence_id"] for row in rows] == ["1", "2", "3", "4"]
        assert [row["words"] for row in rows] == ["4", "5", "1", "2"]
        for row, score in zip(rows, expected, strict=True):
            assert float(row["logprob"]) == pytest.approx(score.log_prob / math.log(2), abs=1e-5)
            assert float(row["perplexity"]) == pytest.approx(score.perplexity, rel=1e-5)
        assert rows[0].keys() >= {"row_logprob", "column_logprob", "unknown"}

    def test_words_with_entropy_and_rank(
        self, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = table(capsys, checkpoint, text, "--level", "word", "--entropy", "--base", "e")
        assert " ".join(rows[0]) == (
            "sentence_id token_id token logprob surprisal row_logprob column_logprob entropy rank "
            "unknown"
        )
        model = LanguageModel.from_pretrained(checkpoint)
        every = dict(model.next_words("", len(model.dictionary)))
        first = rows[0]
        assert float(first["logprob"]) == pytest.approx(math.log(every["w1"]), abs=1e-5)
        assert float(first["surprisal"]) == -float(first["logprob"])
        parts = float(first["row_logprob"]) + float(first["column_logprob"])
        assert parts == pytest.approx(float(first["logprob"]), abs=3e-6)
        assert int(first["rank"]) == 1 + list(every).index("w1")
        entropy = -sum(p * math.log(p) for p in every.values())
        assert float(first["entropy"]) == pytest.approx(entropy, abs=1e-5)

    def test_unknown_words_are_marked_and_nothing_is_quoted(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "text.txt"
        file.write_text('w1 " NA\n"w3 w8\n')
        rows = table(capsys, checkpoint, file, "--level", "word")
        assert [row["token"] for row in rows] == ["w1", '"', "NA", "</s>", '"w3', "w8", "</s>"]
        assert [row["unknown"] for row in rows] == ["0", "1", "1", "0", "1", "0", "0"]
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "quoting=3" in capsys.readouterr().out

    def test_json_lines(
        self, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main([str(checkpoint), str(text), "--level", "word", "--format", "json"])
        captured = capsys.readouterr()
        records = [json.loads(line) for line in captured.out.splitlines()]
        assert [len(record["tokens"]) for record in records] == [4, 5, 1, 2]
        assert [word["unknown"] for word in records[1]["tokens"]] == [
            False, True, False, False, False,
        ]  # fmt: skip
        assert json.loads(captured.err.splitlines()[-1])["words"] == 12

    def test_carried_state_changes_all_but_the_first_sentence(
        self, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        reset = table(capsys, checkpoint, text, "--level", "sentence")
        carried = table(capsys, checkpoint, text, "--level", "sentence", "--carry-hidden-state")
        same = [
            float(one["logprob"]) == pytest.approx(float(two["logprob"]), abs=1e-5)
            for one, two in zip(reset, carried, strict=True)
        ]
        assert same == [True, False, False, False]


class TestInput:
    def test_standard_input(
        self, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        expected = summary(capsys, checkpoint, text)
        stream = io.TextIOWrapper(io.BytesIO(TEXT.encode()))
        monkeypatch.setattr("sys.stdin", stream)
        assert summary(capsys, checkpoint) == expected

    def test_several_files_are_one_text(
        self, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = table(capsys, checkpoint, text, text, "--level", "sentence")
        assert [row["sentence_id"] for row in rows] == list("12345678")

    def test_nothing(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty.txt").touch()
        ours = summary(capsys, checkpoint, tmp_path / "empty.txt")
        assert (ours["sentences"], ours["words"], ours["perplexity"]) == (0, 0, None)
        rows = table(capsys, checkpoint, tmp_path / "empty.txt", "--level", "word")
        assert rows == []

    def test_windows_line_ends_and_other_separators(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "text.txt"
        file.write_bytes("w1 w8 w15\r\nw3\u2028w9\r\n".encode())
        rows = table(capsys, checkpoint, file, "--level", "sentence")
        assert [row["words"] for row in rows] == ["4", "3"]

    def test_a_very_long_line(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = np.random.default_rng(0).integers(40, size=100_000)
        (tmp_path / "long.txt").write_text(" ".join(f"w{word}" for word in words) + "\n")
        ours = summary(capsys, checkpoint, tmp_path / "long.txt")
        assert ours["words"] == 100_001


class TestBadInput:
    """Each mistake ends in one sentence that names the flag or file; no file is half-written."""

    def refused(self, message: str, *arguments: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert isinstance(caught.value, ValueError)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_bytes_that_are_not_utf8(self, checkpoint: Path, tmp_path: Path) -> None:
        file, out = tmp_path / "latin.txt", tmp_path / "out.tsv"
        file.write_bytes(b"w1 w2\nw3 caf\xe9\n")
        message = f"{file}: line 2 is not UTF-8 (byte 0xe9 at column 7)"
        self.refused(message, checkpoint, file, "--level", "word", "--output", out)
        assert list(tmp_path.iterdir()) == [file]

    def test_missing_files(self, data: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
        missing = tmp_path / "missing"
        self.refused(f"{missing}: no such checkpoint", missing, text)
        self.refused("has none of checkpoint_best.pt", tmp_path, text)
        self.refused(f"{missing}: no such text file", checkpoint, missing)
        self.refused("no such dictionary; --data", checkpoint, text, "--data", missing)
        self.refused("there is no folder", checkpoint, text, "--output", missing / "out")
        for read in (text, checkpoint):
            self.refused(f"{read}: is what is read", checkpoint, text, "--output", read)
        self.refused("--split dev: there is no", checkpoint, "--data", data, "--split", "dev")

    def test_flags_that_contradict(self, data: Path, checkpoint: Path, text: Path) -> None:
        self.refused("--split test and text", checkpoint, text, "--split", "test", "--data", data)
        self.refused("--split test needs --data", checkpoint, "--split", "test")
        self.refused("--entropy needs --level word", checkpoint, text, "--entropy")
        self.refused("--batch-words 0: must", checkpoint, text, "--batch-words", 0)

    def test_damaged_and_foreign_checkpoints(
        self, checkpoint: Path, text: Path, tmp_path: Path
    ) -> None:
        damaged = tmp_path / "damaged.pt"
        damaged.write_bytes(checkpoint.read_bytes()[:5000])
        self.refused(f"{damaged}: not a checkpoint of fairseq, or a damaged one", damaged, text)
        self.refused("not a checkpoint of fairseq", text, text)

    def test_checkpoint_of_another_version(
        self, checkpoint: Path, text: Path, tmp_path: Path
    ) -> None:
        state = torch.load(checkpoint, weights_only=False)
        state["model"]["decoder.other"] = state["model"].pop("decoder.core.head.softmax.bias")
        torch.save(state, tmp_path / "old.pt")
        self.refused("old.pt: does not fit the model that it describes", tmp_path / "old.pt", text)

    def test_dictionary_of_another_model(
        self, checkpoint: Path, text: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "dict.txt").write_text("w1 5\nw2 3\n")
        message = f"{tmp_path / 'dict.txt'}: has 6 words, the model of {checkpoint} has 48"
        self.refused(message, checkpoint, text, "--data", tmp_path)

    def test_dictionary_beside_the_checkpoint(
        self, data: Path, checkpoint: Path, text: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """A folder of checkpoint and dictionary can go anywhere."""
        expected = summary(capsys, checkpoint, text)
        moved = tmp_path / "moved"
        moved.mkdir()
        (moved / "checkpoint_best.pt").write_bytes(checkpoint.read_bytes())
        hidden = data.with_name("hidden")
        data.rename(hidden)
        try:
            self.refused("its dictionary is neither", moved, text)
            (moved / "dict.txt").write_bytes((hidden / "dict.txt").read_bytes())
            assert summary(capsys, moved, text) == expected
            # The recorded folder has other data by now, of as many words.
            data.mkdir()
            lines = (hidden / "dict.txt").read_text().splitlines()
            (data / "dict.txt").write_text("\n".join(lines[::-1]) + "\n")
            assert summary(capsys, moved, text) == expected
            self.refused(f"{data / 'dict.txt'}: has other words", moved, text, "--data", data)
            shutil.rmtree(data)
        finally:
            hidden.rename(data)


class TestTransformer:
    def test_batches_do_not_matter(
        self, data: Path, transformer: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = [transformer, data.parent / "test.txt"]
        values = [summary(capsys, *arguments, "--batch-words", n) for n in (1, 17, 5000)]
        assert "|state:reset|" in values[0]["signature"]
        for value in values[1:]:
            assert value["perplexity"] == pytest.approx(values[0]["perplexity"], abs=1e-3)

    def test_what_it_cannot_do_is_said(self, transformer: Path, tmp_path: Path) -> None:
        (tmp_path / "long.txt").write_text("w1 " * 40 + "\n")
        for flags, message in (
            (["--carry-hidden-state"], "--carry-hidden-state: this model, a transformer, has no"),
            ([], "a text of 41 words, its beginning included, is longer than the 12"),
        ):
            with pytest.raises(SystemExit, match=message):
                main([*map(str, (transformer, tmp_path / "long.txt")), *flags])
