"""What evaluation takes from the checkpoint, so that no flag has to be given again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fairseq_run import (
    CARRY,
    TASK,
    eval_lm,
    load,
    read_log,
    run,
    train,
    train_translation,
    valid_losses,
)

from fairseq_lightrnn.errors import UsageError

VALID = ["--gen-subset", "valid", "--tokens-per-sample", 12]


@pytest.fixture(scope="module")
def carried(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that was trained with a carried hidden state."""
    folder = tmp_path_factory.mktemp("carried")
    train(data, folder, CARRY, max_epoch=2, lr=0.05, arch="lightrnn_lm_gated")
    return folder


def test_eval_lm_reads_text_as_the_training_did(
    data: Path, carried: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, expected = carried / "checkpoint_last.pt", valid_losses(read_log(carried))[-1]
    with caplog.at_level(logging.INFO):
        forgotten = eval_lm(data, path, *VALID)
    assert f"{CARRY}: the model was trained so" in caplog.messages
    caplog.clear()
    with caplog.at_level(logging.INFO):
        given = eval_lm(data, path, *VALID, CARRY)
    assert "the model was trained so" not in caplog.text
    assert forgotten == given == pytest.approx(expected, abs=1e-4)


def test_sentences_may_begin_anew_all_the_same(
    data: Path, carried: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        eval_lm(data, carried / "checkpoint_last.pt", *VALID, "--sample-break-mode", "eos")
    assert "--sample-break-mode eos: every sentence begins anew" in caplog.text


def test_it_would_be_another_figure(data: Path, carried: Path, tmp_path: Path) -> None:
    """The same parameters, read as those of a training without a carried state."""
    import torch

    state = load(carried / "checkpoint_last.pt")
    state["task_state"]["carry_hidden_state"] = False
    state["cfg"]["task"]["carry_hidden_state"] = False
    torch.save(state, tmp_path / "other.pt")
    other = eval_lm(data, tmp_path / "other.pt", *VALID)
    assert other != pytest.approx(eval_lm(data, carried / "checkpoint_last.pt", *VALID), abs=1e-3)


def test_beginnings_of_texts_cannot_be_forgotten(data: Path, tmp_path: Path) -> None:
    """fairseq-eval-lm looks at --add-bos-token itself, so the flag has to be given."""
    eos = ["--sample-break-mode", "eos"]
    train(data, tmp_path, "--add-bos-token", *eos, max_epoch=1)
    with pytest.raises(UsageError, match="trained with --add-bos-token, .* give the flag here"):
        eval_lm(data, tmp_path / "checkpoint_last.pt", *VALID, *eos)
    assert eval_lm(data, tmp_path / "checkpoint_last.pt", *VALID, *eos, "--add-bos-token") > 0


def test_beginnings_of_texts_have_a_learnt_position_too(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, "--add-bos-token", "--decoder-learned-pos", max_epoch=1,
          arch="lightrnn_transformer_lm")  # fmt: skip
    assert eval_lm(data, tmp_path / "checkpoint_last.pt", *VALID, "--add-bos-token") > 0


def test_an_lstm_has_no_most_positions(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-target-positions 5: an LSTM reads texts of any"):
        train(data, tmp_path, max_target_positions=5)
    assert not list(tmp_path.glob("*.pt"))


def test_a_model_that_was_not_trained_so(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = train(data, tmp_path, max_epoch=1)
    with caplog.at_level(logging.INFO):
        loss = eval_lm(
            data, tmp_path / "checkpoint_last.pt", "--gen-subset", "valid",
            "--tokens-per-sample", 12,
        )  # fmt: skip
    assert loss == pytest.approx(valid_losses(records)[-1], abs=6e-5)
    assert "the model was trained so" not in caplog.text


def test_generation_from_a_carrying_model(
    data: Path, carried: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("w1 w8\n")
    capsys.readouterr()
    run(
        "interactive", data, *TASK, "--path", carried / "checkpoint_last.pt", "--cpu", "--input",
        prompt, "--beam", 2, "--max-len-b", 5,
    )  # fmt: skip
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("H-"))
    assert line.split("\t")[2].startswith("w1 w8")


@pytest.mark.parametrize(
    ("arch", "flags", "expected"),
    [
        ("lightrnn_lm", {}, ("7x7", 0, "0", 0)),
        ("lightrnn_lm", {"word_dim": 3}, ("7x7", 3, "0", 0)),
        ("lightrnn_lm_gated", {}, ("7x7", 65, "0", 32)),
        ("lightrnn_lm_gated", {"table_shape": "1d"}, ("48", 0, "0", 32)),
        ("lightrnn_lm_gated", {"table_shape": "3d"}, ("4x4x3", 65, "0", 32)),
        ("lightrnn_lm_gated", {"further_tables": 2}, ("7x7", 1, "2", 32)),
        ("lightrnn_lm_gated", {"word_dim": 0, "output_ffn_dim": 5}, ("7x7", 0, "0", 5)),
        ("lightrnn_transformer_lm", {"word_dim": 2}, ("7x7", 2, "0", 32)),
    ],
)
def test_what_flags_came_to(
    data: Path, tmp_path: Path, arch: str, flags: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    train(data, tmp_path, arch=arch, max_epoch=1, **flags)
    assert settings(tmp_path) == expected


@pytest.mark.parametrize("arch", ["lightrnn_translation_gated", "lightrnn_transformer"])
def test_what_flags_came_to_in_translation(pairs: Path, tmp_path: Path, arch: str) -> None:
    train_translation(pairs, tmp_path, arch=arch, max_epoch=1)
    assert settings(tmp_path) == ("7x6", 37, "0", 32)


def test_large_vocabularies_have_further_tables(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keep them where another rule would give others."""
    with monkeypatch.context() as patch:
        patch.setattr("fairseq_lightrnn.models.flags.SMALL_VOCABULARY", 47)
        records = train(data, tmp_path, arch="lightrnn_lm_gated", max_epoch=1)
    assert settings(tmp_path) == ("7x7", 1, "3", 32)
    loss = eval_lm(
        data, tmp_path / "checkpoint1.pt", "--gen-subset", "valid", "--tokens-per-sample", 12
    )
    assert loss == pytest.approx(valid_losses(records)[-1], abs=6e-5)


def settings(folder: Path) -> tuple[Any, ...]:
    """Shape, numbers of a word's own, further tables and units of the layer, as saved."""
    cfg = load(folder / "checkpoint1.pt")["cfg"]["model"]
    names = ("table_shape", "word_dim", "further_tables", "output_ffn_dim")
    return tuple(cfg[name] for name in names)
