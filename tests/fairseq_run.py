"""Runs fairseq's commands in this process, on a tiny corpus."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import fairseq_compat

fairseq_compat.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from fairseq import checkpoint_utils  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq_cli import eval_lm as eval_lm_command  # noqa: E402
from fairseq_cli import train as train_command  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402

import fairseq_lightrnn.register  # noqa: E402
from fairseq_lightrnn.core.table import WordTable  # noqa: E402

USER_DIR = str(Path(fairseq_lightrnn.register.__file__).parent)
TASK = ["--user-dir", USER_DIR, "--task", "lightrnn_language_modeling"]
TRANSLATION = ["--user-dir", USER_DIR, "--task", "lightrnn_translation"]
CARRY = "--carry-hidden-state"


def tiny_transformer(*sides: str) -> dict[str, Any]:
    """Returns the flags of a tiny transformer, which has sizes of its own."""
    sizes = {"embed_dim": 8, "ffn_embed_dim": 8, "layers": 1, "attention_heads": 2}
    named = {f"{side}_{name}": value for side in sides for name, value in sizes.items()}
    return {"embed_dim": None, "hidden_size": None, **named}


TINY_TRANSFORMER = tiny_transformer("encoder", "decoder")
TINY_TRANSFORMER_LM = tiny_transformer("decoder")


_parse_rule = OverridesParser.parse_rule
_parsed: dict[tuple[str, str], Any] = {}


def parse_once(parser: OverridesParser, text: str, rule: str) -> Any:
    """Parses a setting for hydra, or remembers it: most are the same from command to command."""
    if (text, rule) not in _parsed:
        _parsed[text, rule] = _parse_rule(parser, text, rule)
    return copy.deepcopy(_parsed[text, rule])


def run(command: str, *arguments: Any) -> None:
    """Runs ``fairseq-<command>`` with arguments, as its script does."""
    metrics.reset()
    # What a process of its own would not remember of an earlier training.
    for function in (checkpoint_utils.save_checkpoint, train_command.should_stop_early):
        vars(function).clear()
    module = importlib.import_module(f"fairseq_cli.{command.replace('-', '_')}")
    logging.getLogger().setLevel(logging.INFO)  # fairseq's own choice, which pytest overrules
    argv = [f"fairseq-{command}", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(OverridesParser, "parse_rule", parse_once),
    ):
        module.cli_main()


def write_text(path: Path, sentences: int, seed: int, words: int = 40) -> Path:
    """Writes text in which each word makes some words more likely than others."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(sentences):
        word, line = int(rng.integers(words)), []
        for _ in range(int(rng.integers(2, 12))):
            line.append(f"w{word}")
            word = int(word * 7 + rng.zipf(1.6)) % words
        lines.append(" ".join(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def preprocess(directory: Path, sentences: int = 120) -> Path:
    """Makes binarised data of a tiny corpus and returns their folder."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = {"train": sentences, "valid": 20, "test": 20}
    texts = {
        split: write_text(directory / f"{split}.txt", size, seed)
        for seed, (split, size) in enumerate(splits.items())
    }
    run(
        "preprocess", "--only-source", "--trainpref", texts["train"], "--validpref",
        texts["valid"], "--testpref", texts["test"], "--destdir", directory / "bin",
    )  # fmt: skip
    return directory / "bin"


def write_pairs(directory: Path, split: str, sentences: int, seed: int, words: int = 30) -> None:
    """Writes a text and its translation word by word: s7 becomes t7."""
    source = write_text(directory / f"{split}.src", sentences, seed, words)
    text = source.read_text().replace("w", "s")
    source.write_text(text)
    (directory / f"{split}.tgt").write_text(text.replace("s", "t"))


def preprocess_pairs(directory: Path, *flags: Any, sentences: int = 120) -> Path:
    """Makes binarised data of a tiny parallel corpus and returns their folder."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate({"train": sentences, "valid": 12, "test": 12}.items()):
        write_pairs(directory, split, size, seed)
    binarise_pairs(directory, *flags)
    return directory / "bin"


def binarise_pairs(directory: Path, *flags: Any) -> None:
    """Runs fairseq-preprocess on the texts of a folder."""
    run(
        "preprocess", "--source-lang", "src", "--target-lang", "tgt", "--trainpref",
        directory / "train", "--validpref", directory / "valid", "--testpref", directory / "test",
        "--destdir", directory / "bin", *flags,
    )  # fmt: skip


def train_translation(
    data: Path, save_dir: Path, *arguments: Any, **flags: Any
) -> list[dict[str, Any]]:
    """Trains a tiny translation model on the CPU and returns what fairseq logged in JSON."""
    values: dict[str, Any] = {"arch": "lightrnn_translation", "tokens_per_sample": None}
    if "transformer" in flags.get("arch", ""):
        values |= TINY_TRANSFORMER
    return train(data, save_dir, *TRANSLATION, *arguments, **{**values, **flags})


def train_arguments(data: Path, save_dir: Path, *arguments: Any, **flags: Any) -> list[str]:
    """Returns the arguments with which fairseq-train trains a tiny model on the CPU."""
    if flags.get("arch") == "lightrnn_transformer_lm":
        flags = {**TINY_TRANSFORMER_LM, **flags}
    values = {
        "arch": "lightrnn_lm", "criterion": "two_component_cross_entropy", "optimizer": "adam",
        "lr": 0.01, "embed-dim": 8, "hidden-size": 8, "tokens-per-sample": 12, "batch-size": 8,
        "max-epoch": 3, "seed": 1, "log-format": "json", "log-file": save_dir / "train.log",
        "num-workers": 0, **{name.replace("_", "-"): value for name, value in flags.items()},
    }  # fmt: skip
    pairs = [
        part for name, value in values.items() if value is not None for part in (f"--{name}", value)
    ]
    task = [] if "--task" in arguments else TASK
    return [str(p) for p in (data, "--cpu", "--save-dir", save_dir, *task, *pairs, *arguments)]


def train(data: Path, save_dir: Path, *arguments: Any, **flags: Any) -> list[dict[str, Any]]:
    """Trains a tiny model on the CPU and returns what fairseq logged in JSON."""
    save_dir.mkdir(parents=True, exist_ok=True)
    try:
        run("train", *train_arguments(data, save_dir, *arguments, **flags))
    finally:
        close_log_files()
    return read_log(save_dir)


def close_log_files() -> None:
    """Detaches the --log-file handlers that fairseq adds to two loggers at every start."""
    for name in ("fairseq_cli.train", "fairseq.logging.progress_bar"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


def symbols(data: Path) -> list[str]:
    """Returns the words of a folder of binarised text, by id."""
    lines = (data / "dict.txt").read_text().splitlines()
    return ["<s>", "<pad>", "</s>", "<unk>", *(line.split()[0] for line in lines)]


def read_log(save_dir: Path) -> list[dict[str, Any]]:
    """Returns the JSON records of a training log."""
    lines = (save_dir / "train.log").read_text().splitlines()
    found = (re.search(r"\{\"epoch\".*\}$", line) for line in lines)
    return [json.loads(match.group()) for match in found if match]


def valid_losses(records: list[dict[str, Any]]) -> list[float]:
    """Returns the validation losses in bits a word, epoch by epoch."""
    return [float(record["valid_loss"]) for record in valid_records(records)]


def valid_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what was logged at the end of each epoch's validation.

    fairseq attaches the log file once more at each epoch, and so repeats what it writes.
    """
    by_epoch = {record["epoch"]: record for record in records if "valid_wps" in record}
    return list(by_epoch.values())


def load(path: Path) -> dict[str, Any]:
    """Returns what a checkpoint file holds."""
    state: dict[str, Any] = torch.load(path, weights_only=False)
    return state


def coordinates(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns where words sit in each table of a checkpoint's model: (V, k), by name."""
    return {name: value for name, value in model.items() if name.endswith(".coordinates")}


def move_in_further_tables(folder: Path) -> None:
    """Moves the words at random in those further tables that a model predicts them by."""
    path = folder / "checkpoint_best.pt"
    state = load(path)
    moved = [name for name in coordinates(state["model"]) if ".tables." in name]
    assert moved
    for seed, name in enumerate(moved):
        value = state["model"][name]
        order = torch.randperm(len(value), generator=torch.Generator().manual_seed(seed))
        state["model"][name] = value[order]
    torch.save(state, path)


def table_of(path: Path, shape: tuple[int, ...], side: str = "decoder") -> WordTable:
    """Returns the table that a checkpoint's model predicts words by, or reads the source's by."""
    found = coordinates(load(path)["model"])
    if side == "encoder":
        return WordTable(found["encoder.embed_tokens.reader.seats.coordinates"].numpy(), shape)
    # Its name where words are read by it, or by one of their own.
    shared, own = "reader.seats.coordinates", "head.softmax.table.coordinates"
    for last in (own, shared):
        for name, value in found.items():
            if name.startswith("decoder.") and name.endswith(last):
                return WordTable(value.numpy(), shape)
    raise AssertionError(f"{path} has the tables {', '.join(found)}")


def assert_same_training(first: Path, second: Path) -> None:
    """Parameters, buffers (the tables among them) and optimiser state are equal bit for bit."""
    one, two = load(first), load(second)
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():
        # Of fairseq's transformer: a buffer without a value, and copies that are made on loading.
        if re.search(r"_float_tensor$|layers\.\d+\.(in_proj|out_proj|fc1|fc2)_", name):
            continue
        assert torch.equal(value, two["model"][name]), name
    moments = [state["last_optimizer_state"]["state"] for state in (one, two)]
    assert moments[0].keys() == moments[1].keys()
    for index, values in moments[0].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[1][index][name]))


def eval_lm(data: Path, path: Any, *flags: Any) -> float:
    """Returns the loss in bits a word that fairseq-eval-lm computes, unrounded."""
    results: dict[str, float] = {}
    original = eval_lm_command.eval_lm

    def spy(*args: Any, **kwargs: Any) -> dict[str, float]:
        results.update(original(*args, **kwargs))
        return results

    with mock.patch.object(eval_lm_command, "eval_lm", spy):
        run("eval-lm", data, *TASK, "--path", path, "--cpu", "--num-workers", 0, *flags)
    return float(results["loss"])
