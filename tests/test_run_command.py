"""``lightrnn-export``, ``lightrnn-run`` and the Python class, against the checkpoint's model."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fairseq_run import move_in_further_tables, train
from scipy.stats import chisquare

from fairseq_lightrnn.commands import export as export_command
from fairseq_lightrnn.commands import exported as run_command
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.runtime.model import ExportedModel

KINDS: dict[str, dict[str, Any]] = {
    "paper": {"arch": "lightrnn_lm"},
    "own numbers": {"arch": "lightrnn_lm_gated", "word_dim": 3},
    "further tables": {"arch": "lightrnn_lm_gated", "further_tables": "2", "num_layers": 2},
    "input tables": {"arch": "lightrnn_lm_gated", "further_tables": "2"},
    "three components": {"arch": "lightrnn_lm", "table_shape": "4x4x4"},
    "softmax": {"arch": "lightrnn_lm", "table_shape": "1d"},
    "transformer": {"arch": "lightrnn_transformer_lm", "word_dim": 3},
}  # fmt: skip
FLAGS = {
    "input tables": ["--keep-input-table"], "further tables": ["--keep-input-table"],
    "three components": ["--carry-hidden-state"],
}  # fmt: skip
TEXTS = ["w1 w8 unheard-of", "", "w3 w21 w5 w5 w7 w9 w11", "w2"]


def trained(data: Path, folder: Path, *more: str, **flags: Any) -> Path:
    train(data, folder, *more, max_epoch=2, **flags)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A model, its checkpoint's folder, and its export, and that folder."""
    checkpoint = trained(
        data,
        tmp_path_factory.mktemp("trained"),
        *FLAGS.get(request.param, []),
        **KINDS[request.param],
    )
    if request.param == "input tables":
        move_in_further_tables(checkpoint)
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_command.main([str(checkpoint), "-o", str(folder), "--text", str(data / "../valid.txt")])
    return SimpleNamespace(
        checkpoint=checkpoint,
        model=LanguageModel.from_pretrained(checkpoint),
        folder=folder,
        exported=ExportedModel.load(folder),
    )


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recommended model's export."""
    checkpoint = trained(data, tmp_path_factory.mktemp("trained"), **KINDS["own numbers"])
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_command.main([str(checkpoint), "-o", str(folder)])
    return folder


@pytest.fixture(scope="module")
def short_checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer that can look back on 12 words."""
    folder = tmp_path_factory.mktemp("trained")
    return trained(data, folder, tokens_per_sample=12, arch="lightrnn_transformer_lm")


@pytest.fixture(scope="module")
def short(short_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its export."""
    folder = tmp_path_factory.mktemp("x") / "model"
    export_command.main([str(short_checkpoint), "-o", str(folder)])
    return folder


def test_scores_are_the_checkpoints(pair: Any) -> None:
    for carried in (False, True) if pair.model.decoder.carries_state else (False,):
        theirs = pair.model.score(TEXTS, carry_hidden_state=carried)
        ours = pair.exported.score(TEXTS, carry_hidden_state=carried)
        for one, two in zip(theirs, ours, strict=True):
            assert one.tokens == two.tokens
            np.testing.assert_allclose(
                two.component_log_probs, one.component_log_probs, rtol=1e-4, atol=1e-5
            )
    assert ours[0].ids[2] == pair.exported.unknown


def test_perplexity_is_noted(pair: Any) -> None:
    metrics = json.loads((pair.folder / "model.json").read_text())["metrics"]
    assert metrics["text"] == "given"
    assert abs(metrics["difference"]) < 1e-4
    assert metrics["perplexity"]["export"] > 1


def test_suggestions_are_the_checkpoints(pair: Any) -> None:
    texts = ["", "w1", "w1 w8 w3"]
    found = pair.exported.next_words(texts, 5)
    for text, ours in zip(texts, found, strict=True):
        theirs = pair.model.next_words(text, 5)
        assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], rel=1e-3)
        assert pair.exported.next_words(text, 5) == [
            (word, pytest.approx(p, rel=1e-4)) for word, p in ours
        ]


def test_completions_are_the_best_words_that_begin_so(pair: Any) -> None:
    every = pair.exported.next_words("w1 w8", len(pair.exported.vocabulary))
    assert sum(p for _, p in every) == pytest.approx(1, abs=1e-5)
    for typed in ("w1", "w", "madeup", "x", "</"):
        expected = [(word, p) for word, p in every if word.startswith(typed)][:4]
        found = pair.exported.complete(f"w1 w8 {typed}", 4)
        assert [p for _, p in found] == pytest.approx([p for _, p in expected], rel=1e-4)
        assert all(word.startswith(typed) for word, _ in found)
    assert pair.exported.complete("w1 w8 ", 3) == pair.exported.next_words("w1 w8", 3)


def test_texts_grow_word_by_word(pair: Any) -> None:
    text = pair.exported.text(["", "w1"])
    text.add(["w1", ""])
    text.add("w8 w3")
    whole = pair.exported.next_words("w1 w8 w3", 3)
    for found in text.next_words(3):
        assert [word for word, _ in found] == [word for word, _ in whole]
        assert [p for _, p in found] == pytest.approx([p for _, p in whole], rel=1e-4)
    log_probs = text.log_probs()
    assert log_probs.shape == (2, len(pair.exported.vocabulary))
    np.testing.assert_allclose(np.exp(log_probs.astype(float)).sum(1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="words for 1 texts"):
        text.add(["w1"])


def test_samples_follow_the_distribution(pair: Any) -> None:
    every = pair.exported.next_words("w1", len(pair.exported.vocabulary))
    for options, weights in (
        ({}, [p for _, p in every]),
        ({"temperature": 2.0}, [p**0.5 for _, p in every]),
        ({"top_k": 5}, [p for _, p in every[:5]]),
        ({"top_p": 0.5}, nucleus([p for _, p in every], 0.5)),
    ):
        texts = pair.exported.sample("w1", max_words=1, count=1500, seed=1, **options)
        drawn = [text.split()[1] if " " in text else "</s>" for text in texts]
        names = [word for word, _ in every]
        expected = np.array(weights) / sum(weights) * len(drawn)
        counts = np.array([drawn.count(name) for name in names[: len(weights)]])
        assert counts.sum() == len(drawn)
        common = expected >= 5
        classes = [*counts[common], counts[~common].sum()][: common.sum() + (~common).any()]
        hoped = np.array([*expected[common], expected[~common].sum()][: len(classes)])
        assert (
            len(classes) == 1
            or chisquare(classes, hoped * sum(classes) / hoped.sum()).pvalue > 1e-4
        )


def nucleus(probabilities: list[float], mass: float) -> list[float]:
    result: list[float] = []
    while sum(result) < mass:
        result.append(probabilities[len(result)])
    return result


def test_samples_follow_their_seed(pair: Any) -> None:
    draws = [pair.exported.sample("w1", seed=seed, count=2, max_words=9) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert all(text.startswith("w1") and len(text.split()) <= 10 for text in draws[0])


@pytest.mark.parametrize(
    "options",
    [{"count": 0}, {"temperature": 0}, {"top_k": 0}, {"top_p": 2}, {"top_k": 1, "top_p": 1}],
)
def test_impossible_samples(one: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be|exclude"):
        ExportedModel.load(one).sample(**options)


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str, *arguments: Any) -> Any:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    run_command.main(list(map(str, arguments)))
    return capsys.readouterr()


def test_the_command_scores(
    pair: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(TEXTS) + "\n"
    carried = pair.model.carried_hidden_state
    theirs = pair.model.score(TEXTS, carry_hidden_state=carried)
    out = run(monkeypatch, capsys, text, pair.folder, "score").out
    summary = dict(line.split("\t") for line in out.splitlines())
    words = sum(len(score.tokens) for score in theirs)
    perplexity = math.exp(-sum(score.log_prob for score in theirs) / words)
    assert float(summary["perplexity"]) == pytest.approx(perplexity, rel=1e-4)
    assert (summary["sentences"], summary["words"]) == ("4", str(words))
    assert f"model:{pair.model.parameter_digest()}" in summary["signature"]
    found = run(monkeypatch, capsys, text, pair.folder, "score", "--level", "word")
    lines = [line.split("\t") for line in found.out.splitlines()[1:]]
    assert [line[2] for line in lines] == [token for score in theirs for token in score.tokens]
    assert "perplexity" in found.err
    found = run(monkeypatch, capsys, text, pair.folder, "score", "--level", "sentence")
    assert len(found.out.splitlines()) == 5


def test_the_command_suggests_completes_and_samples(
    one: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ExportedModel.load(one)
    out = run(monkeypatch, capsys, "w1\nw1 w8\n", one, "next", "-k", 2).out.splitlines()
    expected = [pair for text in ("w1", "w1 w8") for pair in model.next_words(text, 2)]
    found = [line.split("\t")[1:] for line in out[1:]]
    assert found == [[word, f"{p:.6g}"] for word, p in expected]
    assert [line.split("\t")[0] for line in out[1:]] == ["1", "1", "2", "2"]
    out = run(monkeypatch, capsys, "w1 w2\n", one, "complete", "-k", 3).out.splitlines()
    assert [line.split("\t")[1] for line in out[1:]] == [w for w, _ in model.complete("w1 w2", 3)]
    for text in ("w1\n", "w1\nw8\n"):
        arguments = one, "sample", "--seed", 3, "--max-words", 4
        out = run(monkeypatch, capsys, text, *arguments).out
        assert out == run(monkeypatch, capsys, text, *arguments).out
        lines = out.splitlines()
        assert [line.split()[0] for line in lines] == text.split()
        assert all(len(line.split()) <= 5 for line in lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["next", "--seed", "1"], "--seed is for sample, not for next"),
        (["next", "-k", "0"], "-k 0: must be at least 1"),
        (["score", "no-such-file"], "no-such-file: no such text file"),
        (["score", "-k", "3"], "-k is for next and complete, not for score"),
        (["sample", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["sample", "--top-k", "0"], "--top-k 0: must be at least 1"),
        (["sample", "--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["sample", "--top-p", "1.5"], "--top-p 1.5: must be above 0 and at most 1"),
        (["sample", "--top-k", "2", "--top-p", "0.5"], "--top-k and --top-p: give one of them"),
        (["learn", "--learnt", "-"], "--learnt -: give a file"),
    ],
)
def test_mistakes_end_in_a_sentence(one: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"lightrnn-run: {message}"):
        run_command.main([str(one), *arguments])


def test_a_mixed_up_folder_is_refused(one: Path, pair: Any, tmp_path: Path) -> None:
    for path in one.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "read.onnx").write_bytes((pair.folder / "read.onnx").read_bytes() + b" ")
    with pytest.raises(SystemExit, match=r"read\.onnx: is damaged, or of another export"):
        run_command.main([str(tmp_path), "next"])


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("w1 " * 12, ["next"], "a text of more than 12 words, its beginning included, is longer"),
        ("w1 " * 12, ["score"], "a text of more than 12 words"),
        ("w1 " * 12, ["sample", "--seed", "1"], "a text of more than 12 words"),
        ("w1", ["score", "--carry-hidden-state"], "has no hidden state to carry; leave it out"),
    ],
)
def test_a_transformer_looks_back_so_far_and_no_further(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, capsys, text, short, *arguments)
    run(monkeypatch, capsys, "w1 " * 11, short, "score")


def test_a_drawn_text_ends_where_a_transformer_can_look_back_no_further(
    short: Path, short_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The last word that is drawn need not be read: it is the 13th, the beginning included."""
    known = "w1 " * 11
    for arguments in (["--seed", "1"], [], ["--top-k", "3"]):
        lines = run(monkeypatch, capsys, f"{known}\nw1\n" * 8, short, "sample", *arguments).out
        lengths = [len(line.split()) for line in lines.splitlines()]
        assert len(lengths) == 16 and max(lengths) <= 12
        assert set(lengths[::2]) <= {11, 12}
    exported = ExportedModel.load(short)
    texts = [exported.text([known]) for _ in range(20)]
    drawn = [list(text.draws(1, seed=seed)) for seed, text in enumerate(texts)]
    assert sorted({len(words) for words in drawn}) == [0, 1]
    model = LanguageModel.from_pretrained(short_checkpoint)
    for prefix, most in (("w1", 12), (known, 12)):
        lengths = {len(text.split()) for text in model.sample(prefix, count=200, seed=1)}
        assert max(lengths) == most and len(lengths) > 1
    with pytest.raises(ValueError, match="a text of 13 words, its beginning included, is longer"):
        model.sample(known + "w1")


def test_flags_of_the_export_are_checked_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("something else")
    for flags, message in {
        ("-o", str(tmp_path / "x"), "--format", "flash"): "--format flash: unknown",
        ("-o", str(tmp_path)): f"{tmp_path}: holds something else than an exported model",
        ("-o", str(tmp_path / "x"), "--text", "absent.txt"): "absent.txt: no such text file",
        ("-o", str(tmp_path / "file" / "x")): f"{tmp_path / 'file'} is a file, not a folder",
        ("-o", str(tmp_path / "x"), "--format", "torch", "--opset", "18"): "--opset 18 is of ONNX",
    }.items():
        with pytest.raises(SystemExit, match=message):
            export_command.main(["nowhere", *flags])


@pytest.mark.parametrize("level", ["sentence", "word"])
def test_each_line_of_a_pipe_is_scored_as_it_comes(one: Path, level: str) -> None:
    command = [sys.executable, "-m", "fairseq_lightrnn.commands.exported", one, "score"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [*map(str, command), "--level", level], text=True, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    for number in (1, 2):
        process.stdin.write("w1\n")
        process.stdin.flush()
        if number == 1:
            assert process.stdout.readline().startswith("sentence_id")
        found = [process.stdout.readline() for _ in range(1 if level == "sentence" else 2)]
        assert all(line.startswith(f"{number}\t") for line in found)
    process.communicate()
    assert process.returncode == 0


def test_samples_of_a_seed_are_the_same_however_lines_come(
    one: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ("sample", "--seed", "7", "--max-words", "6")
    together = run(monkeypatch, capsys, "w1\nw1\nw8\n", one, *arguments).out
    monkeypatch.setattr(run_command, "read_chunks", lambda _: iter([["w1"], ["w1", "w8"]]))
    run_command.main([str(one), *arguments])
    apart = capsys.readouterr().out
    assert together == apart
    assert together.splitlines()[0] != together.splitlines()[1]


def test_what_is_learnt_can_be_kept(one: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--learnt .*: there is no folder"):
        run_command.main([str(one), "learn", "--learnt", str(tmp_path / "absent" / "x.npz")])


def test_a_missing_onnxruntime_is_named(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match="onnxruntime is not installed: pip install onnxruntime"):
        run_command.main([str(one), "next"])


@pytest.mark.parametrize(
    "arguments", [["--format", "torch"], ["--quantize", "int8"], ["--quantize", "fp16"]]
)
def test_other_formats(one: Path, pair: Any, tmp_path: Path, arguments: list[str]) -> None:
    export_command.main([str(pair.checkpoint), "-o", str(tmp_path / "model"), *arguments])
    model = ExportedModel.load(tmp_path / "model")
    theirs, ours = pair.model.score(TEXTS), model.score(TEXTS)
    for one_score, two in zip(theirs, ours, strict=True):
        assert two.log_prob == pytest.approx(one_score.log_prob, rel=0.01)


BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "fairseq", "scipy", "numba", "onnx", "omegaconf"}:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Missing())
from fairseq_lightrnn.commands.exported import main
main(sys.argv[1:])
print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def test_numpy_and_onnxruntime_will_do(one: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(one), "next", "-k", "1"],
        input="w1\n", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    word, _ = ExportedModel.load(one).next_words("w1", 1)[0]
    assert done.stdout.splitlines()[1].split("\t")[1] == word
    assert {"numpy", "onnxruntime"} <= set(done.stderr.split())
