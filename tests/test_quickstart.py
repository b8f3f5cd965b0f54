"""The quickstart: reading its logs, summing up, and the whole of it on tiny texts."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq_run import write_text
from test_quickstart_corpus import TOOLS, load

from fairseq_lightrnn.core.table import WordTable, balanced_cells

ROOT = TOOLS.parents[1]
run_log = load("run_log")
progress = load("progress")
plot = load("plot")
summary = load("summary")

TRAINING_LOG = """\
2026-01-01 00:00:00 | INFO | fairseq_cli.train | {'_name': None, 'common': {'seed': 1}}
2026-01-01 00:00:01 | INFO | train_inner | {"epoch": 1, "update": 0.5, "ppl": "900", "wps": "0"}
2026-01-01 00:00:02 | INFO | train_inner | {"epoch": 1, "update": 0.75, "ppl": "500", "wps": "1000"}
2026-01-01 00:00:03 | INFO | valid | {"epoch": 1, "valid_loss": "8", "valid_ppl": "256"}
2026-01-01 00:00:03 | INFO | train | {"epoch": 1, "train_ppl": "600", "train_wps": "900"}
2026-01-01 00:00:04 | INFO | task | reallocation after epoch 1 (true-loss): 9 of 12 words moved
2026-01-01 00:00:05 | INFO | valid | {"epoch": 2, "valid_ppl": "300"}
interrupted, and resumed after epoch 1 {
2026-01-01 00:00:06 | INFO | train_inner | {"epoch": 2, "update": 1.5, "ppl": "300", "wps": "3000"}
2026-01-01 00:00:07 | INFO | valid | {"epoch": 2, "valid_ppl": "200.5"}
2026-01-01 00:00:07 | INFO | train | {"epoch": 2, "train_ppl": "250", "train_wps": "1800"}
"""


def reallocation(epoch: int, **changes: object) -> dict:
    seconds = {"statistics": 1.0, "solve": 0.5, "total": 1.5}
    record = {"epoch": epoch, "round": 1, "moved": 9, "loss_before": 5.5, "loss_after": 5.25}
    return {**record, "gap": 0.125, "seconds": seconds, **changes}


def test_training_log(tmp_path):
    path = tmp_path / "train.log"
    path.write_text(TRAINING_LOG)
    log = run_log.read_training_log(path)
    assert log.valid_ppl == {1: 256.0, 2: 200.5}
    assert log.train_ppl == {1: 600.0, 2: 250.0}
    assert log.speed() == 2000.0
    path.write_text("\n".join(line for line in TRAINING_LOG.splitlines() if "inner" not in line))
    assert run_log.read_training_log(path).speed() == 1350.0
    path.write_text("Traceback (most recent call last):\n")
    with pytest.raises(ValueError, match=r"train\.log: no finished epoch"):
        run_log.read_training_log(path)


def test_reallocations(tmp_path):
    path = tmp_path / "reallocations.jsonl"
    assert run_log.read_reallocations(path) == []
    records = [reallocation(2, moved=3), reallocation(1), reallocation(2, moved=5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    first, second = run_log.read_reallocations(path)
    assert first == {
        "epoch": 1, "moved": 9, "loss_before": 5.5, "loss_after": 5.25, "seconds": 1.5,
    }  # fmt: skip
    assert (second["epoch"], second["moved"]) == (2, 5)  # of a repeated epoch the last
    path.write_text(json.dumps({"epoch": 1}) + "\n")
    with pytest.raises(ValueError, match="line 1 is no reallocation record"):
        run_log.read_reallocations(path)


def test_evaluation_and_generation_logs(tmp_path):
    path = tmp_path / "log"
    path.write_text("x | INFO | fairseq_cli.eval_lm | Loss (base 2): 7.1, Perplexity: 137.19\n")
    assert run_log.read_test_perplexity(path) == 137.19
    path.write_text("S-0\tthis is\nH-0\t-1.5\tthis is it .\nP-0\t-1 -2\n")
    assert run_log.read_generated(path) == "this is it ."
    for read in (run_log.read_test_perplexity, run_log.read_generated):
        path.write_text("something else\n")
        with pytest.raises(ValueError, match="again"):
            read(path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_keeps_all_and_shows_what_is_readable():
    log, screen = io.StringIO(), io.StringIO()
    ticks = iter([0.0, 30.0, 60.0])
    display = progress.Display(screen, epochs=2, clock=lambda: next(ticks))
    progress.copy_and_show(io.StringIO(TRAINING_LOG), log, display)
    assert log.getvalue() == TRAINING_LOG
    bar = "█" * 9 + "░" * 15
    assert [line.strip() for line in screen.getvalue().splitlines()] == [
        "epoch 1 of 2 " + "█" * 6 + "░" * 18 + "  25 %  perplexity 900.0",
        # A quarter of an epoch took 30 s, so 1.25 take 150 s.
        f"epoch 1 of 2 {bar}  38 %  perplexity 500.0  1,000 words/s  2:30 left",
        "epoch 1 of 2 done: perplexity 256.0 on the validation text",
        "epoch 2 of 2 done: perplexity 300.0 on the validation text",
        "epoch 2 of 2 " + "█" * 18 + "░" * 6 + "  75 %  perplexity 300.0  3,000 words/s  0:30 left",
        "epoch 2 of 2 done: perplexity 200.5 on the validation text",
    ]


def test_progress_on_a_terminal_stays_on_one_line():
    screen = Terminal()
    display = progress.Display(screen, epochs=1)
    for share in (0.1, 0.15, 0.2):
        display.show(json.dumps({"epoch": 1, "update": share, "ppl": "9"}))
    assert "\n" not in screen.getvalue()
    assert screen.getvalue().count("\r\033[K") == 3
    display.line("done")
    assert screen.getvalue().endswith("\r\033[K      done\n")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("2026-01-01 00:00:00 | INFO | p | [None] Dictionary: 20032 types",
         "a vocabulary of 20,032 words"),
        ("x | Loss (base 2): 7.1, Perplexity: 137.19", "perplexity 137.2 on the test text"),
        ("H-0\t-1.5\tthis is it .", "this is it ."),
        ("2026-01-01 00:00:00 | INFO | tasks.tables | initial table: cooccurrence, "
         "WordTable(30 words, 6×5, 42fe93f1ce34), 25.3 seconds",
         "a word table of 6×5 cells, made from which words occur together (25 s)"),
        ("{'_name': None, 'common': {'seed': 1}}", None),
        ("{not json}", None),
        ("  12%|#   | 3/25 [00:01<00:08]", None),
        ("Traceback (most recent call last):", None),
    ],
)  # fmt: skip
def test_lines_that_tell_a_newcomer_something(line, shown):
    screen = io.StringIO()
    display = progress.Display(screen)
    for _ in range(2):  # what is repeated is shown once
        display.show(line)
    assert screen.getvalue() == ("" if shown is None else f"      {shown}\n")


@pytest.mark.parametrize(("embed_dim", "hidden_size", "layers"), [(8, 8, 1), (6, 10, 2)])
def test_parameters_of_an_ordinary_lstm(embed_dim, hidden_size, layers):
    vocabulary = 30
    expected = vocabulary * embed_dim + (hidden_size + 1) * vocabulary
    for layer in range(layers):
        width = embed_dim if layer == 0 else hidden_size
        expected += 4 * hidden_size * (width + hidden_size + 2)
    counted = summary.ordinary_lstm_parameters(vocabulary, embed_dim, hidden_size, layers)
    assert counted == expected


def tiny_model(num_words: int = 30) -> object:
    cells = np.random.default_rng(1).permutation(balanced_cells(num_words, (6, 5)))
    return summary.Model(
        symbols=[f"w{word}" for word in range(num_words)],
        counts=np.arange(num_words)[::-1].copy(),
        table=WordTable.from_cells(cells, (6, 5)),
        parameters=123,
        embed_dim=8,
        hidden_size=8,
        num_layers=1,
        epoch=2,
    )


def test_rows_that_are_shown():
    model = tiny_model()
    shown = summary.table_rows(model, rows=3, words=2)
    assert len(shown) == 2  # of 6 rows, the first and the second by the text that they cover
    for row, words in shown.items():
        members = [int(word) for word in model.table.words.reshape(6, 5)[row]]
        best = sorted(members, key=lambda word: -model.counts[word])[:2]
        assert words == [model.symbols[word] for word in best]


def test_summary_and_report(tmp_path):
    for folder in ("logs", "checkpoints", "steps"):
        (tmp_path / folder).mkdir()
    (tmp_path / "logs" / "train.log").write_text(TRAINING_LOG)
    (tmp_path / "logs" / "evaluate.log").write_text("Loss (base 2): 7.1, Perplexity: 137.19\n")
    (tmp_path / "logs" / "continue.log").write_text("H-0\t-1.5\tthis is it .\n")
    (tmp_path / "steps" / "train.seconds").write_text("90\n")
    record = json.dumps(reallocation(1)) + "\n"
    (tmp_path / "checkpoints" / "reallocations.jsonl").write_text(record)
    model = tiny_model()
    found = summary.summarise(tmp_path, model, {"corpus_sha256": "abc"})
    assert found["corpus_sha256"] == "abc"
    assert found["vocabulary"] == 30
    assert found["train_words"] == model.counts.sum()
    assert found["test_ppl"] == 137.19
    assert found["valid_ppl_by_epoch"] == [256.0, 200.5]
    assert [entry["moved"] for entry in found["reallocations"]] == [9]
    assert found["parameters"] == 123
    assert found["parameters_ordinary_lstm"] > 123
    assert found["words_per_second"] == 2000.0
    assert found["seconds"] == {"train": 90}
    assert found["versions"]["torch"] == torch.__version__
    json.dumps(found)
    text = summary.report(found, summary.table_rows(model), tmp_path, "this is")
    assert "Test perplexity   137.2" in text
    assert "after epoch 1: 9 words moved, 1.5 s" in text
    assert "validation perplexity before 256.0, one epoch later 200.5" in text
    assert "this is → it ." in text
    assert str(tmp_path / "table.html") in text


def test_perplexity_picture(tmp_path):
    path = tmp_path / "perplexity.png"
    plot.plot_perplexity(path, {1: 256.0, 2: 200.5}, {1: 600.0, 2: 250.0}, [1], 190.0)
    assert path.read_bytes().startswith(b"\x89PNG")
    # A single epoch and no reallocation can be drawn as well.
    plot.plot_perplexity(path, {1: 256.0}, {1: 600.0}, [], 190.0)


def quickstart(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=arguments[0].parent if arguments and isinstance(arguments[0], Path) else ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "three text files, TRAIN VALID TEST, or none (got 2)"),
        (["a", "b", "c"], "a is not a file that can be read"),
        (["--epochs", "0"], "--epochs 0: give a whole number, at least 1"),
        (["--epochs"], "--epochs needs a value"),
        (["--width", "wide"], "--width wide: give a whole number"),
        (["--tokenize"], "--tokenize is for files of your own"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_mistakes_on_the_command_line_are_named_at_once(tmp_path, arguments, message):
    done = quickstart("--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_empty_files_are_named_at_once(tmp_path):
    texts = [write_text(tmp_path / f"{name}.txt", 5, 1) for name in ("a", "b", "c")]
    texts[1].write_text("")
    done = quickstart(*texts, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert f"{texts[1]} is empty" in done.stderr


def test_help():
    done = quickstart("--help")
    assert done.returncode == 0
    assert "TRAIN VALID TEST" in done.stdout


def steps_shown(output: str) -> set[str]:
    return set(re.findall(r"^\$ (?:\S+ \S+ \|$|(?:python )?)(\S+)", output, re.M))


@pytest.mark.slow
def test_whole_quickstart_on_own_text(tmp_path):
    """Needs the environment that scripts/setup.sh makes, and makes it if it is not there."""
    texts = [
        write_text(tmp_path / f"my {name}.txt", size, seed)
        for seed, (name, size) in enumerate({"train": 300, "valid": 30, "test": 30}.items())
    ]
    out = tmp_path / "a run"
    options = ["--out", out, "--epochs", "3", "--width", "8"]

    first = quickstart(*texts, *options)
    assert first.returncode == 0, first.stdout + first.stderr
    commands = steps_shown(first.stdout)
    assert {
        "fairseq-preprocess", "fairseq-train", "fairseq-eval-lm", "fairseq-interactive"
    } <= commands  # fmt: skip
    figures = json.loads((out / "summary.json").read_text())
    dictionary = (out / "data" / "dict.txt").read_text().splitlines()
    assert figures["vocabulary"] == len(dictionary) + 4
    lines = texts[0].read_text().splitlines()
    assert figures["train_words"] == sum(len(line.split()) + 1 for line in lines)
    assert len(figures["valid_ppl_by_epoch"]) == 3
    assert figures["reallocations"] == []
    assert "Reallocation      none" in first.stdout
    assert "epoch 3 of 3 done" in first.stdout
    # No page of configuration: the complete output is in the log alone.
    assert "'_name'" not in first.stdout
    assert "'_name'" in (out / "logs" / "train.log").read_text()
    best = 1 + int(np.argmin(figures["valid_ppl_by_epoch"]))
    assert figures["checkpoint_epoch"] == best
    assert 1 < figures["test_ppl"] < figures["vocabulary"]
    assert figures["parameters"] > 0
    assert f"Test perplexity   {figures['test_ppl']:.1f}" in first.stdout
    assert figures["generated"].split()[0] in first.stdout
    assert (out / "perplexity.png").stat().st_size > 1000
    assert "w1" in (out / "table.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()}
    again = quickstart(*texts, *options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "fairseq-train" not in steps_shown(again.stdout)
    assert "fairseq-preprocess" not in steps_shown(again.stdout)
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()} == before
    assert json.loads((out / "summary.json").read_text())["test_ppl"] == figures["test_ppl"]

    # Another text must not be answered with what is there.
    shutil.copy(texts[1], texts[2])
    changed = quickstart(*texts, *options)
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert {"fairseq-preprocess", "fairseq-train", "fairseq-eval-lm"} <= steps_shown(changed.stdout)
    assert (
        json.loads((out / "summary.json").read_text())["corpus_sha256"]
        != (figures["corpus_sha256"])
    )

    # A step that fails is named, with what to do and where its output lies.
    (out / "steps" / "evaluate.done").unlink()
    (out / "checkpoints" / "checkpoint_best.pt").write_bytes(b"not a checkpoint")
    failing = quickstart(*texts, *options)
    assert failing.returncode not in (0, 2)
    assert 'the step "evaluate" failed' in failing.stderr
    assert "What to do: " in failing.stderr
    assert "Its last words:" in failing.stderr
    assert str(out / "logs" / "evaluate.log") in failing.stderr
