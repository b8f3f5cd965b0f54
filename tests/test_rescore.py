"""``lightrnn-rescore``, on a small trained model."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fairseq_run import preprocess, train

from fairseq_lightrnn.commands.rescore import main
from fairseq_lightrnn.language_model import LanguageModel

NBEST = """\
0 ||| w1 w8 w15 ||| TM= -1 ||| -1.0
0 ||| w8 w1 w15 w4 ||| TM= -2 ||| -0.5
0 ||| unheard-of ||| TM= -3 ||| -4.0
1 ||| w3 w9 ||| TM= -1 ||| -1.0
1 ||| w9 w3 ||| TM= -1 ||| -1.0
"""
ARPA = """\
\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<unk>\t0
0\t<s>\t-0.3
-0.5\t</s>\t0
-0.7\tw1\t-0.2
-0.9\tw8\t0

\\2-grams:
-0.2\t<s> w1
-0.1\tw1 w8

\\end\\
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = preprocess(tmp_path_factory.mktemp("data"))
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, max_epoch=1, sample_break_mode="eos", initial_table="random")
    return save_dir / "checkpoint_last.pt"


@pytest.fixture
def nbest(tmp_path: Path) -> Path:
    path = tmp_path / "lists.txt"
    path.write_text(NBEST)
    return path


def rescore(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[str]:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_scores_are_added_and_lists_sorted(
    checkpoint: Path, nbest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = rescore(capsys, checkpoint, nbest, "--lm-weight", 0.7, "--length-weight", 0.25)
    model = LanguageModel.from_pretrained(checkpoint)
    expected = []
    for line in NBEST.splitlines():
        key, text, features, score = line.split(" ||| ")
        lm = model.score(text).log_prob
        total = float(score) + 0.7 * lm + 0.25 * len(text.split())
        expected.append((key, text, features, lm, total))
    expected.sort(key=lambda row: (row[0], -row[4]))
    for line, (key, text, features, lm, total) in zip(lines, expected, strict=True):
        found = re.fullmatch(r"(\d) \|\|\| (.*) \|\|\| (.*) LightRNN= (\S+) \|\|\| (\S+)", line)
        assert found and found.groups()[:3] == (key, text, features)
        assert float(found[4]) == pytest.approx(lm, abs=1e-4)
        assert float(found[5]) == pytest.approx(total, abs=1e-4)


def test_no_weight_keeps_the_order_of_scores(
    checkpoint: Path, nbest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = rescore(capsys, checkpoint, nbest, "--lm-weight", 0, "--best")
    assert best == ["w8 w1 w15 w4", "w3 w9"]


def test_kaldi_ids_stand_before_the_text(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nbest = tmp_path / "lists.txt"
    nbest.write_text("utt1 ||| w1 w2 ||| -1\nutt1 ||| w2 ||| -2\nutt2 ||| w3 ||| -1\n")
    best = rescore(capsys, checkpoint, nbest, "--lm-weight", 0, "--best")
    assert best == ["utt1 w1 w2", "utt2 w3"]
    nbest.write_text("1 ||| w1 w2 ||| -1\nutt2 ||| w3 ||| -1\n")
    best = rescore(capsys, checkpoint, nbest, "--lm-weight", 0, "--best")
    assert best == ["1 w1 w2", "utt2 w3"], "of all lists or of none"


def test_two_flags_do_not_write_one_file(checkpoint: Path, nbest: Path, tmp_path: Path) -> None:
    path = tmp_path / "one"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(SystemExit, match=f"--output {nbest}: is what is read here"):
        main([str(checkpoint), str(nbest), "--output", str(nbest)])
    flags = ["--save-weights", str(path), "--output", str(tmp_path / "link")]
    with pytest.raises(SystemExit, match="--save-weights .*one: --output writes this file"):
        main([str(checkpoint), str(nbest), *flags])
    assert not path.exists()


def test_tuned_weights_can_be_used_again(
    checkpoint: Path, nbest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "refs.txt").write_text("unheard-of\nw9 w3\n")
    weights = tmp_path / "weights.json"
    main([
        str(checkpoint), str(nbest), "--tune", str(tmp_path / "refs.txt"), "--save-weights",
        str(weights), "--best",
    ])  # fmt: skip
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("WER 200.00 -> ")
    tuned = json.loads(weights.read_text())
    again = rescore(capsys, checkpoint, nbest, "--weights", weights, "--best")
    assert captured.out.splitlines() == again
    flags = ["--lm-weight", tuned["lm"], "--length-weight", tuned["length"]]
    assert rescore(capsys, checkpoint, nbest, *flags, "--best") == again


def test_bleu(
    checkpoint: Path, nbest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "refs.txt").write_text("w1 w8 w15 w4 w5\nw9 w3\n")
    main([
        str(checkpoint), str(nbest), "--tune", str(tmp_path / "refs.txt"), "--metric", "bleu",
        "--best",
    ])  # fmt: skip
    found = re.search(r"BLEU (\S+) -> (\S+) with --lm-weight", capsys.readouterr().err)
    assert found and float(found[2]) >= float(found[1])


class TestKenLM:
    @pytest.fixture
    def arpa(self, tmp_path: Path) -> Path:
        pytest.importorskip("kenlm", reason="the package kenlm is not installed")
        path = tmp_path / "model.arpa"
        path.write_text(ARPA)
        return path

    def test_words_are_interpolated(
        self, checkpoint: Path, arpa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        nbest = tmp_path / "lists.txt"
        nbest.write_text("0 ||| w1 w8 ||| 0\n")
        ours = LanguageModel.from_pretrained(checkpoint).score("w1 w8").log_probs
        theirs = [-0.2, -0.1, -0.5]  # the file's, in base 10
        expected = sum(
            math.log(0.75 * math.exp(one) + 0.25 * 10**two)
            for one, two in zip(ours, theirs, strict=True)
        )
        (line,) = rescore(
            capsys, checkpoint, nbest, "--kenlm", arpa, "--kenlm-weight", 0.25, "--lm-weight", 1
        )
        assert float(line.split(" ||| ")[-1]) == pytest.approx(expected, abs=1e-4)
        kenlm = float(line.split("KenLM= ")[1].split()[0])
        assert kenlm == pytest.approx(sum(theirs) * math.log(10), abs=1e-4)

    def test_the_share_is_tuned(
        self, checkpoint: Path, arpa: Path, nbest: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        (tmp_path / "refs.txt").write_text("w1 w8 w15\nw3 w9\n")
        main([str(checkpoint), str(nbest), "--kenlm", str(arpa), "--tune",
              str(tmp_path / "refs.txt")])  # fmt: skip
        assert re.search(r"--kenlm-weight (0|1|0\.\d)$", capsys.readouterr().err.strip())

    def test_no_model(self, checkpoint: Path, nbest: Path, arpa: Path) -> None:
        for content in (b"nothing\n", bytes(range(255, 0, -1)) * 12):
            arpa.write_bytes(content)
            with pytest.raises(SystemExit, match=f"--kenlm {arpa}: not a KenLM model"):
                main([str(checkpoint), str(nbest), "--kenlm", str(arpa)])


class TestBadInput:
    def refused(self, message: str, *arguments: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_flags_and_files(
        self, checkpoint: Path, nbest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = tmp_path / "missing"
        self.refused(f"{missing}: no such checkpoint", missing, nbest)
        self.refused(f"{missing}: no such text file", checkpoint, missing)
        self.refused(f"{missing}: no such text file", checkpoint, nbest, "--tune", missing)
        self.refused(f"--weights {missing}: no such file", checkpoint, nbest, "--weights", missing)
        self.refused(f"--kenlm {missing}: no such file", checkpoint, nbest, "--kenlm", missing)
        self.refused("needs --kenlm", checkpoint, nbest, "--kenlm-weight", 0.5)
        self.refused("exclude", checkpoint, nbest, "--weights", missing, "--tune", missing)
        self.refused("--kenlm-weight 2.0: must be between", checkpoint, nbest, "--kenlm", missing,
                     "--kenlm-weight", 2)  # fmt: skip
        monkeypatch.setitem(sys.modules, "kenlm", None)
        self.refused("pip install kenlm", checkpoint, nbest, "--kenlm", nbest)
        bad = tmp_path / "weights.json"
        bad.write_text("[1]")
        self.refused("not a file that --save-weights wrote", checkpoint, nbest, "--weights", bad)

    def test_folders_are_looked_for_first(
        self, checkpoint: Path, nbest: Path, tmp_path: Path
    ) -> None:
        for flag in ("--output", "--save-weights"):
            path = tmp_path / "absent" / "file"
            self.refused(f"{flag} {path}: there is no folder", checkpoint, nbest, flag, path)
            self.refused(f"{flag} {tmp_path}: is a folder", checkpoint, nbest, flag, tmp_path)

    def test_numbers_are_finite(self, checkpoint: Path, nbest: Path, tmp_path: Path) -> None:
        self.refused("--lm-weight nan: must be finite", checkpoint, nbest, "--lm-weight", "nan")
        self.refused("--length-weight inf: must", checkpoint, nbest, "--length-weight", "inf")
        self.refused("whose score comes to -inf", checkpoint, nbest, "--lm-weight", "1e308")
        weights = tmp_path / "weights.json"
        weights.write_text('{"lm": NaN, "length": 0}')
        self.refused("--lm-weight nan: must", checkpoint, nbest, "--weights", weights)
        nbest.write_text("0 ||| w1 ||| -1\n0 ||| w2 ||| nan\n")
        self.refused(f"{nbest}: line 2 has the score 'nan'", checkpoint, nbest, "--best")

    def test_weights_that_would_be_ignored(
        self, checkpoint: Path, nbest: Path, tmp_path: Path
    ) -> None:
        for flag in ("--lm-weight", "--length-weight"):
            message = f"--tune and {flag} exclude each other"
            self.refused(message, checkpoint, nbest, "--tune", nbest, flag, 1)
        self.refused("--metric bleu needs --tune", checkpoint, nbest, "--metric", "bleu")
        weights = tmp_path / "weights.json"
        weights.write_text('{"lm": 1, "length": 0, "kenlm": 0.5}')
        self.refused("give it with --kenlm", checkpoint, nbest, "--weights", weights)

    def test_numeric_ids_of_kaldi(
        self, checkpoint: Path, nbest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The id is no word of the reference: these are the first choices, without an error."""
        (tmp_path / "refs.txt").write_text("1 w3 w9\n0 w8 w1 w15 w4\n")
        rescore(capsys, checkpoint, nbest, "--tune", tmp_path / "refs.txt")
        main([str(checkpoint), str(nbest), "--tune", str(tmp_path / "refs.txt")])
        assert capsys.readouterr().err.splitlines()[-1].startswith("WER 0.00 -> 0.00")
        flags = ["--tune", tmp_path / "refs.txt", "--reference-format", "moses"]
        main([*map(str, (checkpoint, nbest, *flags))])
        assert not capsys.readouterr().err.splitlines()[-1].startswith("WER 0.00")
        self.refused("needs --tune", checkpoint, nbest, "--reference-format", "moses")

    def test_lists_and_references(self, checkpoint: Path, nbest: Path, tmp_path: Path) -> None:
        (tmp_path / "refs.txt").write_text("w1\n")
        self.refused("no reference for the n-best list 1", checkpoint, nbest, "--tune",
                     tmp_path / "refs.txt")  # fmt: skip
        (tmp_path / "empty").write_text("")
        self.refused("empty: holds no n-best list to tune on", checkpoint, tmp_path / "empty",
                     "--tune", tmp_path / "refs.txt")  # fmt: skip
        nbest.write_text("0 ||| w1\nw2 w3\n")
        self.refused(f"{nbest}: line 2 has 1 fields", checkpoint, nbest)
