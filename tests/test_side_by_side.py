"""The books that the training benchmarks keep: epochs, seconds, interrupted runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import fairseq_cli.train
import pytest
import torch
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler.polynomial_decay_schedule import (
    PolynomialDecayLRSchedule,
    PolynomialDecayLRScheduleConfig,
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "side_by_side.py"
# Validation perplexities after epochs 1, 2, …
LOSSES = [8, 7, 6, 6.5]


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with trainings that take no time: 10 CPU seconds an epoch by the clock."""
    spec = importlib.util.spec_from_file_location("side_by_side", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "side_by_side", module)
    spec.loader.exec_module(module)
    module.trained = 0  # epochs that the checkpoint knows
    module.calls = []

    def call(program: Sequence[Any], *arguments: Any, log: Path | None = None) -> tuple[str, Any]:
        flags = list(map(str, arguments))
        goal = int(flags[flags.index("--max-epoch") + 1])
        module.calls.append((program[-1].removeprefix("fairseq_cli."), goal))
        lines, used = [], 0.0
        for epoch in range(module.trained + 1, goal + 1):
            used += 10
            lines.append(f'INFO | {{"epoch": {epoch}, "valid_loss": "{LOSSES[epoch - 1]}"}}')
        module.trained = goal
        with open(flags[flags.index("--log-file") + 1], "a") as file:
            file.writelines(line + "\n" for line in lines * 2)  # fairseq repeats itself
        return "\n".join(lines), SimpleNamespace(ru_utime=used, ru_stime=0.0, ru_maxrss=2048)

    monkeypatch.setattr(module, "_call", call)
    return module


def finish(books: ModuleType, folder: Path) -> dict[str, Any]:
    """Writes what a test writes, and reads the run."""
    last = books.read_lines(folder / "steps.jsonl")[-1]["epoch"]
    (folder / "test.json").write_text(json.dumps({"epoch": last, "test_ppl": 60.0}))
    run = books.read_run(folder)
    assert isinstance(run, dict)
    return run


def test_steps_until_the_epochs_are_done(books: ModuleType, tmp_path: Path) -> None:
    books.train_in_steps(tmp_path, ["data"], epochs=4, step=3)
    assert books.calls == [("train", 3), ("train", 4)]
    assert books.read_run(tmp_path) is None  # not tested yet
    run = finish(books, tmp_path)
    assert run["valid_ppls"] == {1: 256, 2: 128, 3: 64, 4: pytest.approx(2**6.5, abs=1e-3)}
    assert (run["best_epoch"], run["valid_ppl"], run["epochs"]) == (3, 64, 4)
    assert (run["cpu_seconds_per_epoch"], run["peak_mib"]) == (10, 2)


def test_the_perplexity_of_pieces_is_that_of_words(books: ModuleType, tmp_path: Path) -> None:
    books.train_in_steps(tmp_path, ["data"], epochs=2, step=2)
    test = {"epoch": 2, "test_ppl": 9.0, "pieces_per_word": {"valid": 1.5, "test": 1.4}}
    (tmp_path / "test.json").write_text(json.dumps(test))
    run = books.read_run(tmp_path)
    assert run["valid_ppls"] == {1: 2**12, 2: pytest.approx(2**10.5, abs=1e-3)}
    assert run["test_ppl"] == 9  # is that already


def test_more_epochs_make_the_test_outdated(books: ModuleType, tmp_path: Path) -> None:
    books.train_in_steps(tmp_path, [], epochs=2, step=2)
    finish(books, tmp_path)
    assert books.is_tested(tmp_path)
    books.train_in_steps(tmp_path, [], epochs=2, step=2)
    assert books.calls == [("train", 2)]  # nothing was left to do
    books.train_in_steps(tmp_path, [], epochs=3, step=2)
    assert not books.is_tested(tmp_path)


def test_an_interrupted_process_costs_no_seconds(books: ModuleType, tmp_path: Path) -> None:
    """Its epochs are in the log and count; its seconds are lost, those of the others stand for
    them.
    """
    books.call("train", "--max-epoch", 1, "--log-file", tmp_path / "train.log")
    books.train_in_steps(tmp_path, [], epochs=3, step=3)
    run = finish(books, tmp_path)
    assert run["valid_ppls"] == {1: 256, 2: 128, 3: 64}
    assert run["cpu_seconds_per_epoch"] == 10


def test_a_process_that_finds_all_epochs_trained(books: ModuleType, tmp_path: Path) -> None:
    books.train_in_steps(tmp_path, [], epochs=1, step=1)
    books.call("train", "--max-epoch", 2, "--log-file", tmp_path / "train.log")
    books.train_in_steps(tmp_path, [], epochs=2, step=1)
    run = finish(books, tmp_path)
    assert (run["epochs"], run["cpu_seconds_per_epoch"]) == (2, 10)


def test_no_process_starts_after_the_seconds_are_spent(books: ModuleType, tmp_path: Path) -> None:
    books.train_in_steps(tmp_path, [], epochs=4, step=1, seconds=15)
    assert books.calls == [("train", 1), ("train", 2)]


def test_parameters_that_are_shared_count_once(books: ModuleType, tmp_path: Path) -> None:
    words = torch.zeros(10, 4)
    model = {"embedding": words, "output": words, "lstm": torch.zeros(3), "table.cells": words[0]}
    torch.save({"model": model}, tmp_path / "checkpoint_best.pt")
    found = books.count_parameters(tmp_path, ("embedding", "output"))
    assert found == {"parameters": 43, "vocabulary_parameters": 40}


def test_a_checkpoint_from_a_gpu_holds_twice_what_is_shared(
    books: ModuleType, tmp_path: Path
) -> None:
    words = torch.arange(40.0)
    model = {"embedding": words, "output": words.clone(), "a": torch.zeros(3), "b": torch.zeros(3)}
    torch.save({"model": model}, tmp_path / "checkpoint_best.pt")
    found = books.count_parameters(tmp_path, ("embedding", "output"))
    assert found == {"parameters": 46, "vocabulary_parameters": 40}


USE = """
import side_by_side
for size in (900, 1):
    print(side_by_side._call(["-m", "fairseq_cli.eat"], size)[1].ru_maxrss >> 10)
"""


def test_memory_is_that_of_each_process(tmp_path: Path) -> None:
    """A small process after a large one. The parent is small too: a child's peak starts there."""
    package = tmp_path / "fairseq_cli"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "eat.py").write_text("import sys\nbytearray(int(sys.argv[1]) << 20)\n")
    path = f"{tmp_path}:{SCRIPT.parent}"
    done = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    large, small = map(int, done.stdout.split())
    assert large > 900
    assert small < 450


def test_a_command_that_fails_leaves_its_log(
    books: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="fairseq_cli.eat no failed:"):
        books.call("eat", "no", log=tmp_path / "log")
    assert "No module named" in (tmp_path / "log").read_text()


def test_half_a_line_of_a_killed_process_does_not_count(books: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    books.append_line(path, {"epoch": 1})
    path.write_text(path.read_text() + '{"epo')
    assert books.read_lines(path) == [{"epoch": 1}]
    books.append_line(path, {"epoch": 2})
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


@pytest.fixture
def for_seconds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import train_for_seconds

    return train_for_seconds


def test_the_seconds_of_the_processor_go_on(for_seconds: ModuleType) -> None:
    """fairseq's trainer counts those of earlier processes by a name of its own."""
    assert "_previous_training_time" in inspect.getsource(for_seconds.Trainer)
    assert "cumulative_training_time" in inspect.getsource(fairseq_cli.train)
    now = time.process_time()
    earlier = SimpleNamespace(_previous_training_time=5000.0)
    assert 5000 + now <= for_seconds.processor_time(earlier) <= 5000 + time.process_time()


@pytest.mark.parametrize("clock", [True, False])
def test_training_goes_by_the_time_that_is_asked_for(
    for_seconds: ModuleType, monkeypatch: pytest.MonkeyPatch, clock: bool
) -> None:
    trainer = for_seconds.Trainer
    by_clock = trainer.cumulative_training_time
    for name in ("cumulative_training_time", "lr_step_update"):
        monkeypatch.setattr(trainer, name, getattr(trainer, name))  # put back afterwards
    seen = []
    monkeypatch.setattr(for_seconds, "cli_main", lambda: seen.extend(sys.argv))
    kind = "clock" if clock else "cpu"
    flags = ["data", "--cpu", "--stop-time-hours", "1"]
    monkeypatch.setattr(sys, "argv", ["train_for_seconds.py", kind, *flags])
    for_seconds.main()
    assert seen == ["train_for_seconds.py", *flags]
    time_of = by_clock if clock else for_seconds.processor_time
    assert trainer.cumulative_training_time is time_of
    assert trainer.lr_step_update is for_seconds.step_by_time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: time"),
        (["cppu", "data", "--stop-time-hours", "1"], "invalid choice: 'cppu'"),
        (["cpu", "data"], "--stop-time-hours must say for how long"),
        (["cpu", "data", "--stop-time-hours=0"], "--stop-time-hours must say for how long"),
    ],
)
def test_no_time_or_no_end_of_it(
    for_seconds: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_for_seconds.py", *arguments])
    with pytest.raises(SystemExit):
        for_seconds.main()
    assert message in capsys.readouterr().err


def test_a_learning_rate_falls_with_time(for_seconds: ModuleType) -> None:
    """After the warm-up, on a line that ends with the time."""
    config = PolynomialDecayLRScheduleConfig(warmup_updates=10, total_num_update=1000, lr=[0.5])
    schedule = PolynomialDecayLRSchedule(config, MagicMock(FairseqOptimizer))
    trainer = MagicMock(lr_scheduler=schedule)
    trainer.cfg.optimization.stop_time_hours = 2.0

    def rate(updates: int, seconds: float) -> float:
        trainer.get_num_updates.return_value = updates
        trainer.cumulative_training_time.return_value = seconds
        for_seconds.step_by_time(trainer)
        set_rate: float = schedule.optimizer.set_lr.call_args.args[0]
        return set_rate

    assert rate(5, 3600) == 0.25  # warming up
    assert rate(20, 0) == 0.5
    assert rate(30, 3600) == pytest.approx(0.25)
    assert rate(31, 5400) == pytest.approx(0.125)
    assert rate(40, 7300) == 0
    assert "lr_step_update" in inspect.getsource(for_seconds.Trainer.set_num_updates)


@pytest.mark.parametrize("clock", [True, False])
def test_training_for_seconds(
    books: ModuleType, tmp_path: Path, monkeypatch: Any, clock: bool
) -> None:
    """Validations stand at their updates, in epochs."""
    lines = [
        "{'_name': None, 'common': {}}",
        '{"epoch": 1, "update": 0.25, "num_updates": "100", "loss": "9"}',
        'INFO | {"epoch": 1, "valid_loss": "8", "valid_num_updates": "150"}',
        'INFO | {"epoch": 1, "valid_loss": "8", "valid_num_updates": "150"}',
        '{"epoch": 1, "update": 0.5, "num_updates": "200", "loss": "9"}',
        '{"epoch": 1, "valid_loss": "7", "valid_num_updates": "200"}',
    ]

    def call(program: Sequence[Any], *arguments: Any, log: Path | None = None) -> tuple[str, Any]:
        assert program == [books.TRAIN_FOR_SECONDS, "clock" if clock else "cpu"]
        flags = list(map(str, arguments))
        assert flags[flags.index("--stop-time-hours") + 1] == "0.5"
        Path(flags[flags.index("--log-file") + 1]).write_text("\n".join(lines))
        return "", SimpleNamespace(ru_utime=1700.0, ru_stime=0.0, ru_maxrss=2048)

    monkeypatch.setattr(books, "_call", call)
    books.train_for(tmp_path, [], seconds=1800, interval=100, clock=clock)
    run = finish(books, tmp_path)
    assert run["valid_ppls"] == {0.375: 256, 0.5: 128}
    kind = "seconds_per_epoch" if clock else "cpu_seconds_per_epoch"
    assert (run["epochs"], run[kind]) == (0.5, 3600)
    books.train_for(tmp_path, [], seconds=1800, interval=100, clock=clock)
    assert len(books.read_lines(tmp_path / "steps.jsonl")) == 1  # nothing was left to do


def test_systems_that_differ_in_a_size_alone(
    books: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from language_model_report import families

    def runs(parameters: int, *perplexities: float) -> dict[str, dict[str, float]]:
        values = [{"parameters": parameters, "test_ppl": ppl} for ppl in perplexities]
        return {str(seed): value for seed, value in enumerate(values)}

    systems = {
        "own-64": runs(300, 80.0),
        "own-8": runs(100, 92.0, 90.0),
        "plain": runs(50, 100.0),
        "window-2": runs(50, 120.0),
        "window-5": runs(50, 130.0),
    }
    assert families(systems) == {"own": [(100, 91.0), (300, 80.0)]}


def test_parameters_are_what_is_learnt(books: ModuleType, tmp_path: Path) -> None:
    """Places in tables and carried states are not, and what two names share counts once."""
    vectors = torch.arange(6.0).reshape(2, 3)
    model = {
        "decoder.table.coordinates": torch.zeros(5, 2, dtype=torch.int32),
        "decoder.further.tables.0.coordinates": torch.zeros(5, 2, dtype=torch.int32),
        "decoder.reallocation_round": torch.tensor(0),
        "decoder.carried_state.states": torch.zeros(2, 1, 3),
        "decoder.composition.embedding.weight": vectors,
        "decoder.softmax.weight": vectors.clone(),
        "decoder.softmax.bias": torch.zeros(2),
        "decoder.lstm.weight": torch.ones(4, 3),
    }
    torch.save({"model": model}, tmp_path / "checkpoint_best.pt")
    counted = books.count_parameters(tmp_path, ("embedding", "softmax"))
    assert counted == {"parameters": 6 + 2 + 12, "vocabulary_parameters": 6 + 2}


def test_a_folder_has_runs_of_one_comparison(books: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    books.keep_settings(out, {"width": 8, "text": Path("a")})
    books.keep_settings(out, {"width": 8, "text": Path("a")})
    with pytest.raises(SystemExit, match="out: its runs have width 8, not 16; give another folder"):
        books.keep_settings(out, {"width": 16, "text": Path("a")})
    with pytest.raises(SystemExit, match="its runs have lanes None, not 3"):
        books.keep_settings(out, {"width": 8, "text": Path("a"), "lanes": 3})


def test_what_failed_is_measured_again(books: ModuleType, tmp_path: Path) -> None:
    errors = [{"error": "no memory"}, {"two": {"error": "no memory"}}, {"speed": 3}]
    measured = []

    def measure(system: str, size: int) -> dict[str, Any]:
        measured.append(system)
        return {"words": size, "system": system, **errors[len(measured) - 1]}

    for _ in range(4):
        report = books.measure_each(tmp_path, {}, [5], ["paper"], measure)
    assert len(measured) == 3
    assert report["results"] == [{"words": 5, "system": "paper", "speed": 3}]


def test_runs_know_their_commit(books: ModuleType, tmp_path: Path) -> None:
    books.train_in_steps(tmp_path, ["data"], epochs=2, step=1)
    steps = books.read_lines(tmp_path / "steps.jsonl")
    assert finish(books, tmp_path)["commit"] == (steps[0]["commit"] or "")
    (tmp_path / "steps.jsonl").write_text(
        "".join(
            json.dumps({**step, "commit": name}) + "\n"
            for step, name in zip(steps, "ab", strict=True)
        )
    )
    assert finish(books, tmp_path)["commit"] == "a b"
