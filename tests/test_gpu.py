"""What the GPU computes is what the CPU computes: training, moving words, scoring, searching."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import (
    TASK,
    TINY_TRANSFORMER,
    TRANSLATION,
    close_log_files,
    read_log,
    run,
    train_arguments,
    valid_losses,
)

from fairseq_lightrnn.commands.reallocate import main as reallocate
from fairseq_lightrnn.commands.score import main as score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICES = ("cpu", "cuda")
EXTRAS = {"word_dim": 6, "output_ffn_dim": 16, "further_tables": 2}
GATED = {"arch": "lightrnn_lm_gated", **EXTRAS}
MODELS: dict[str, dict[str, Any]] = {
    "recurrent": {},
    "three components": {"table_shape": "3d", "reallocation_objective": "joint"},
    "one component": {"table_shape": "1d"},
    "gated": {**GATED, "component_vectors": "separate"},
    "gated, as recommended": {"arch": "lightrnn_lm_gated"},
    "gated, joint": {**GATED, "reallocation_objective": "joint"},
    "gated, words moved where they are predicted": {**GATED, "keep_input_table": ""},
    "gated, one set of vectors": {**GATED, "component_vectors": "shared"},
    "transformer": {"arch": "lightrnn_transformer_lm", **EXTRAS},
}
TRANSLATORS: dict[str, dict[str, Any]] = {
    "recurrent": {"arch": "lightrnn_translation"},
    "gated": {"arch": "lightrnn_translation_gated", **EXTRAS},
    "transformer": {"arch": "lightrnn_transformer", **TINY_TRANSFORMER, **EXTRAS},
}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Convolutions and LSTMs round to 10 bits on the GPU by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def train(data: Path, folder: Path, device: str, *arguments: Any, **flags: Any) -> list[float]:
    """Trains and returns the validation losses."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"dropout": 0, "lr": 0.005, **flags}
    switches = [f"--{name.replace('_', '-')}" for name, value in values.items() if value == ""]
    values = {name: value for name, value in values.items() if value != ""}
    line = train_arguments(data, folder, *arguments, *switches, **values)
    try:
        run("train", *(part for part in line if device == "cpu" or part != "--cpu"))
    finally:
        close_log_files()
    return valid_losses(read_log(folder))


@pytest.mark.parametrize("name", MODELS)
def test_language_models_learn_the_same(data: Path, tmp_path: Path, name: str) -> None:
    carried = "" if name not in ("three components", "transformer") else None
    moved = None if name == "one component" else 1
    losses = [
        train(
            data, tmp_path / device, device, carry_hidden_state=carried, reallocate_epochs=moved,
            **MODELS[name],
        )
        for device in DEVICES
    ]  # fmt: skip
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    if moved is not None:
        records = [
            json.loads((tmp_path / device / "reallocations.jsonl").read_text())
            for device in DEVICES
        ]
        for key in ("loss_before", "loss_after"):
            assert records[1][key] == pytest.approx(records[0][key], abs=0.01)


def test_every_regulariser_trains_and_resumes(data: Path, tmp_path: Path) -> None:
    flags = {
        **GATED, "carry_hidden_state": "", "dropout": 0.2, "num_layers": 2,
        "regularise": "awd,weight=0.2,activation=1", "optimizer": "nt_asgd", "lr": 1,
        "nonmonotone_interval": 1, "random_block_lengths": "",
    }  # fmt: skip
    whole = train(data, tmp_path / "whole", "cuda", **flags)
    train(data, tmp_path / "parts", "cuda", **{**flags, "max_epoch": 2})
    assert train(data, tmp_path / "parts", "cuda", **flags) == pytest.approx(whole, abs=1e-3)


def eval_lm(data: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture, *flags: str) -> float:
    caplog.clear()
    run("eval-lm", data, *TASK, "--path", checkpoint, "--tokens-per-sample", 12,
        "--carry-hidden-state", "--batch-size", 4, *flags)  # fmt: skip
    found = re.search(r"Loss \(base 2\): ([0-9.]+)", caplog.text)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("name", ["recurrent", "gated, words moved where they are predicted"])
def test_a_model_scores_and_moves_words_alike(
    data: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(data, tmp_path, "cuda", carry_hidden_state="", reallocate_epochs=1, **MODELS[name])
    checkpoint = tmp_path / "checkpoint_best.pt"
    on_cpu, on_gpu = (eval_lm(data, checkpoint, caplog, *flags) for flags in (("--cpu",), ()))
    assert on_gpu == pytest.approx(on_cpu, abs=1e-3)

    text = tmp_path / "text.txt"
    text.write_text("w1 w7 w9\nw3 w21 w27 w2\n")
    scores, reports = [], []
    for device in DEVICES:
        out, report = tmp_path / f"{device}.tsv", tmp_path / f"{device}.json"
        score([str(part) for part in (checkpoint, text, "--data", data, "--level", "word",
                                      "--output", out, "--device", device)])  # fmt: skip
        scores.append([float(number) for number in re.findall(r"-\d+\.\d+", out.read_text())])
        reallocate([str(part) for part in (checkpoint, data, "--output", tmp_path / "new.pt",
                                           "--report", report, "--device", device)])  # fmt: skip
        reports.append(json.loads(report.read_text()))
    assert scores[0]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    for key in ("loss_before", "loss_after"):
        assert reports[1][key] == pytest.approx(reports[0][key], abs=1e-4)


def search_alike(capsys: pytest.CaptureFixture[str], *arguments: Any) -> int:
    """Compares what a beam of 3 finds on the CPU and on the GPU; returns how much that is."""
    found = []
    for device in (["--cpu"], []):
        capsys.readouterr()
        run("generate", *arguments, "--beam", 3, *device)
        found.append(re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", capsys.readouterr().out, re.M))
    for (key, log_prob, words), (key_of_gpu, of_gpu, words_of_gpu) in zip(*found, strict=True):
        assert (key_of_gpu, words_of_gpu) == (key, words)
        assert float(of_gpu) == pytest.approx(float(log_prob), abs=1e-3)
    return len(found[0])


@pytest.mark.parametrize("name", TRANSLATORS)
def test_translation_models_learn_and_search_alike(
    pairs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"tokens_per_sample": None, "label_smoothing": 0.1, **TRANSLATORS[name]}
    losses = [
        train(pairs, tmp_path / device, device, *TRANSLATION, reallocate_epochs=1, **flags)
        for device in DEVICES
    ]
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    checkpoint = tmp_path / "cpu" / "checkpoint_best.pt"
    flags_of_search = ["--nbest", 2, "--batch-size", 5]
    assert search_alike(capsys, pairs, *TRANSLATION, "--path", checkpoint, *flags_of_search) == 24


def test_language_models_generate_alike(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(data, tmp_path, "cuda", sample_break_mode="eos", **GATED)
    assert search_alike(
        capsys, data, *TASK, "--path", tmp_path / "checkpoint_best.pt", "--sample-break-mode",
        "eos", "--prefix-size", 2, "--max-len-b", 8,
    )  # fmt: skip
