"""Benchmarks that train: every system's flags are flags of fairseq and the plugin."""

from __future__ import annotations

import runpy
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import pytest
from fairseq_run import train

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import benchmark_ladder  # noqa: E402
import benchmark_language_model  # noqa: E402
import benchmark_scale_out  # noqa: E402
import benchmark_tables  # noqa: E402
import benchmark_translation  # noqa: E402
import language_model_runs  # noqa: E402
from hide_rare_words import hide_rare_words  # noqa: E402

COMMON = {"width": 8, "layers": 1, "dropout": 0.1, "lr": 0.01, "gpu": False, "bf16": False}
BLOCKS = {"block": 35, "batch_size": 32, "transformer_block": 140, "transformer_lr": 0.001}
DATA = Path("data")


def parsed(flags: list[Any]) -> Namespace:
    """What ``fairseq-train`` reads flags as; it stops at those that it does not know."""
    from fairseq import options

    parser = options.get_training_parser()
    args: Namespace = options.parse_args_and_arch(parser, input_args=list(map(str, flags)))
    return args


def language_model(system: str) -> Namespace:
    args = Namespace(
        **{**COMMON, "width": 128},
        **BLOCKS,
        lr_schedule="halved",
        transformer_layers=2,
        transformer_heads=2,
    )
    return parsed([
        *language_model_runs.training_flags(system, 3, DATA, args),
        *language_model_runs.schedule_flags(system, args),
        *benchmark_language_model.model_flags(system, args, num_words=10_000),
    ])  # fmt: skip


@pytest.mark.parametrize("system", benchmark_language_model.SYSTEMS)
def test_language_models(system: str) -> None:
    args = language_model(system)
    assert args.seed == 3
    assert args.batch_size * args.tokens_per_sample == 32 * 35
    ours = system not in language_model_runs.PEERS
    assert args.task == ("lightrnn_language_modeling" if ours else "language_modeling")
    if system.startswith("lstm_lm"):
        assert (args.decoder_embed_dim < args.decoder_hidden_size) == system.endswith("-narrow")


def test_more_rows_than_columns() -> None:
    assert language_model("gated-rows").table_shape == "400x25"


@pytest.mark.parametrize("name", benchmark_ladder.RUNGS)
def test_rungs(name: str) -> None:
    args = parsed([DATA, *language_model_runs.OURS, *benchmark_ladder.model_flags(name, 32)])
    ours = name.startswith("lightrnn")
    assert args.reallocate_epochs == ("4,10" if ours else None)
    assert (getattr(args, "table_shape", None) == "1d") != ours
    rate = {"softmax": 0.002, "narrow": 0.004, "lightrnn": 0.003}[name.partition("-")[0]]
    if name.startswith("narrow-wikitext-2"):
        rate = 0.008
    assert args.num_layers == 2 and args.lr == [rate]
    assert (args.embed_dim < args.hidden_size) == name.startswith("narrow")


@pytest.mark.parametrize("system", benchmark_translation.SYSTEMS)
def test_translation(system: str) -> None:
    args = Namespace(
        **COMMON, label_smoothing=0.1, table_text="both", transformer_layers=2, word_dim=25
    )
    model = parsed([DATA, *benchmark_translation.model_flags(system, args), "--optimizer", "adam"])
    own = "-" in system and not system.endswith("-further")
    assert getattr(model, "word_dim", None) == (25 if own else None)


def table(name: str, **more: Any) -> Namespace:
    args = Namespace(**COMMON, **more, epochs=8)
    model, reallocation = benchmark_tables.flags_of(benchmark_tables.check_name(name), args)
    common = language_model_runs.OURS
    return parsed([DATA, *common, *model, *reallocation, "--optimizer", "adam"])


@pytest.mark.parametrize("name", benchmark_tables.TABLES)
def test_tables(name: str) -> None:
    args = table(name)
    assert args.initial_table == name.split("+")[0]
    objectives = set(name.split("+")) & set(benchmark_tables.OBJECTIVES)
    assert (args.reallocate_epochs is not None) == bool(objectives)


def test_parts_of_a_name() -> None:
    args = table("random+own-64+further-2+width-16+30x40+shared+kept+joint")
    assert (args.word_dim, args.further_tables, args.embed_dim, args.hidden_size) == (
        65,
        "2",
        16,
        16,
    )
    assert (args.table_shape, args.component_vectors, args.keep_input_table) == (
        "30x40", "shared", True
    )  # fmt: skip
    assert (args.reallocate_epochs, str(args.reallocation_objective)) == ("3", "joint")
    assert table("random+row-first+often").reallocate_epochs == "3-7"
    assert table("random+row-first+often+after-1").reallocate_epochs == "1-7"
    assert str(table("random+true-loss").reallocation_objective) == "true-loss"
    assert (table("random+paper").arch, table("random+paper").word_dim) == ("lightrnn_lm", 0)


@pytest.mark.parametrize(
    "name",
    [
        "best",
        "random+own",
        "random+often",
        "random+after-1",
        "random+joint+row-first",
        "random+paper+kept+joint",
    ],
)
def test_names_that_say_nothing(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=name.replace("+", r"\+")):
        benchmark_tables.check_name(name)


def test_two_workers_average_every_gradient_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ["--width", "8", "--batch-size", "2", "--block", "4", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmark_scale_out.py", str(tmp_path), *tiny])
    two = benchmark_scale_out.run("paper", 500, workers=2)
    assert two["bytes_per_update"] == 4 * two["parameters"]
    assert two["words_per_second"] > 0
    one = {"words_per_second": two["words_per_second"]}
    ordinary = {**two, "bytes_per_update": 3 * two["bytes_per_update"]}
    results = [
        {"words": 500, "system": "paper", "one": one, "two": two},
        {"words": 500, "system": "lstm_lm", "one": one, "two": ordinary},
        {"words": 900, "system": "lstm_lm", "one": one, "two": {"error": "too large"}},
    ]
    *_, paper, _, error = benchmark_scale_out.summarise(results).splitlines()
    assert " | 3.0 | " in paper and " | 1.00 × | " in paper
    assert error.startswith("| 900 | lstm_lm | too large |")


def test_rare_words_are_hidden(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.txt").write_text("a b a\nb c\n")
    for split in ("valid", "test"):
        (text / f"{split}.txt").write_text("c a d\n")
    hide_rare_words(text, tmp_path / "hidden", 2)
    assert (tmp_path / "hidden" / "train.txt").read_text() == "a b a\nb <unk>\n"
    assert (tmp_path / "hidden" / "test.txt").read_text() == "<unk> a <unk>\n"
    with pytest.raises(SystemExit, match="is where the text lies"):
        hide_rare_words(text, text / ".", 2)
    assert (text / "train.txt").read_text() == "a b a\nb c\n"


def test_expanded_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(data, tmp_path / "trained", max_epoch=1, arch="lightrnn_lm_gated")
    script = Path(__file__).parents[1] / "examples" / "inference" / "expanded_rows.py"
    arguments = [str(script), str(tmp_path / "trained"), str(data / "../valid.txt"), "20"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.startswith("top 1: mean ")
