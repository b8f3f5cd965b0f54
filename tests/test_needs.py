"""Flags that have an effect only beside others, and flags of fairseq's own commands."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq_run import CARRY, TASK, TRANSLATION, run, train, train_translation

from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.tasks.flags import NEEDS, check_needs

# For every entry: what gives the flag, and what it needs (None: nothing could make it heeded).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "--reallocation-objective": (
        {"reallocation_objective": "joint"}, {"reallocate_epochs": "1"}
    ),
    "--reallocation-words": ({"reallocation_words": 100}, {"reallocate_epochs": "1"}),
    "--reallocation-memory": ({"reallocation_memory": 1.0}, {"reallocate_epochs": "1"}),
    "--random-block-lengths": ({"random_block_lengths": True}, {"carry_hidden_state": True}),
    "--max-tokens": ({"max_tokens": 100, "carry_hidden_state": True}, None),
    "--max-tokens-valid": ({"max_tokens_valid": 100, "carry_hidden_state": True}, None),
    "--batch-size-valid": ({"batch_size_valid": 4, "carry_hidden_state": True}, None),
    "--skip-remainder-batch": ({"skip_remainder_batch": True, "carry_hidden_state": True}, None),
    "--shorten-method": ({"shorten_method": "truncate", "carry_hidden_state": True}, None),
    "--shorten-data-split-list": (
        {"shorten_data_split_list": "train", "carry_hidden_state": True}, None
    ),
    "--pad-to-fixed-length": ({"pad_to_fixed_length": True, "carry_hidden_state": True}, None),
    "--pad-to-fixed-bsz": ({"pad_to_fixed_bsz": True, "carry_hidden_state": True}, None),
    "--update-ordered-indices-seed": (
        {"update_ordered_indices_seed": True}, {"update_epoch_batch_itr": True}
    ),
    "--sentence-avg": ({"sentence_avg": True}, None),
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "reallocate_epochs": None, "reallocation_objective": "true-loss", "reallocation_words": None,
    "reallocation_memory": 8.0, "carry_hidden_state": False, "random_block_lengths": False,
    "max_tokens": None, "max_tokens_valid": None, "batch_size": 8, "batch_size_valid": 8,
    "skip_remainder_batch": False, "sentence_avg": False, "update_ordered_indices_seed": False,
    "update_epoch_batch_itr": False,
}  # fmt: skip


def check(**flags: Any) -> None:
    check_needs(SimpleNamespace(**{**DEFAULTS, **flags}), SimpleNamespace(keep_input_table=False))


def test_there_is_a_case_for_every_flag() -> None:
    assert [need.flag for need in NEEDS] == list(CASES)


@pytest.mark.parametrize("flag", CASES)
def test_a_flag_without_effect_is_refused(flag: str) -> None:
    given, needed = CASES[flag]
    check()
    with pytest.raises(UsageError, match=f"^{flag} ") as refusal:
        check(**given)
    assert "\n" not in str(refusal.value)
    if needed is None:
        check(**({**given, "carry_hidden_state": False} if "carry_hidden_state" in given else {}))
    else:
        check(**given, **needed)
        check(**needed)


def test_fairseqs_own_defaults_are_not_taken_for_flags() -> None:
    """fairseq fills in what was not given for validation from what was given for training."""
    check(carry_hidden_state=True, max_tokens=None, max_tokens_valid=None)
    check(carry_hidden_state=True, batch_size=3, batch_size_valid=3)
    with pytest.raises(UsageError, match="^--max-tokens "):
        check(carry_hidden_state=True, max_tokens=9, max_tokens_valid=9)


@pytest.mark.parametrize("flag", ["--reallocation-words", "--max-tokens", "--random-block-lengths"])
def test_commands_refuse_it_before_they_train(data: Path, tmp_path: Path, flag: str) -> None:
    given = {
        "--reallocation-words": ["--reallocation-words", 50],
        "--max-tokens": [CARRY, "--max-tokens", 50],
        "--random-block-lengths": ["--random-block-lengths"],
    }[flag]
    with pytest.raises(SystemExit, match=f"^{flag} "):
        train(data, tmp_path, *given)
    assert not list(tmp_path.glob("*.pt"))


def test_an_input_table_that_nothing_moves(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No mistake: lightrnn-reallocate may move the words later."""
    train(data, tmp_path, "--keep-input-table", arch="lightrnn_lm_gated", max_epoch=1)
    assert "--keep-input-table: no epoch of --reallocate-epochs moves words" in caplog.text


@pytest.fixture(scope="module")
def lstm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lstm")
    train(data, folder, arch="lightrnn_lm_gated", max_epoch=1)
    return folder / "checkpoint1.pt"


@pytest.fixture(scope="module")
def transformer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformer")
    train(data, folder, arch="lightrnn_transformer_lm", max_epoch=1, dropout=0.3)
    return folder / "checkpoint1.pt"


def generate(data: Path, path: Any, *flags: Any) -> None:
    run(
        "generate", data, *TASK, "--path", path, "--cpu", "--gen-subset", "test",
        "--sample-break-mode", "eos", "--num-workers", 0, "--max-len-b", 8, *flags,
    )  # fmt: skip


class TestRetainedDropout:
    """``--retain-dropout`` of fairseq-generate and -interactive; the other commands lack it."""

    MESSAGE = "--retain-dropout: a LightRNN model with an LSTM predicts without dropout"

    def test_of_an_lstm(self, data: Path, lstm: Path) -> None:
        with pytest.raises(UsageError, match=self.MESSAGE):
            generate(data, lstm, "--retain-dropout")

    def test_of_a_translation_with_an_lstm(self, pairs: Path, tmp_path: Path) -> None:
        train_translation(pairs, tmp_path, max_epoch=1)
        with pytest.raises(UsageError, match=self.MESSAGE):
            run(
                "generate", pairs, *TRANSLATION, "--path", tmp_path / "checkpoint1.pt", "--cpu",
                "--retain-dropout", "--num-workers", 0,
            )  # fmt: skip

    def test_of_a_transformer(
        self, data: Path, transformer: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Also of the layer that hidden states pass, which is of the decoder's name."""
        scores = []
        only = ["--retain-dropout-modules", "['LightRNNTransformerDecoder']"]
        for flags in ([], ["--retain-dropout"], ["--retain-dropout", *only]):
            capsys.readouterr()
            generate(data, transformer, "--score-reference", *flags)
            lines = capsys.readouterr().out.splitlines()
            scores.append([line for line in lines if line.startswith("P-")])
        assert len(scores[0]) == 20
        assert scores[0] != scores[1] != scores[2] != scores[0]
        generate(data, transformer, "--retain-dropout", "--beam", 2)
        assert capsys.readouterr().out.count("\nH-") == 20


@pytest.fixture(scope="module")
def stock(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model without a word table."""
    folder = tmp_path_factory.mktemp("stock")
    train(
        data, folder, "--user-dir", TASK[1], "--task", "language_modeling", arch="lstm_lm",
        criterion="cross_entropy", embed_dim=None, hidden_size=None, max_epoch=1,
        decoder_embed_dim=8, decoder_hidden_size=8, decoder_out_embed_dim=8,
    )  # fmt: skip
    return folder / "checkpoint1.pt"


class TestMixedEnsembles:
    @pytest.mark.parametrize("ours_first", [True, False])
    def test_are_refused_as_such(
        self, data: Path, lstm: Path, stock: Path, ours_first: bool
    ) -> None:
        paths = ":".join(map(str, (lstm, stock) if ours_first else (stock, lstm)))
        without = "models with and without"
        with pytest.raises(UsageError, match=f"--arch lstm_lm has no word table, and {without}"):
            generate(data, paths)
        with pytest.raises(UsageError, match=f"{without} a word table cannot be in one ensemble"):
            run(
                "generate", data, "--user-dir", TASK[1], "--task", "language_modeling", "--path",
                paths, "--cpu",
            )  # fmt: skip

    def test_ensembles_of_ours_work(
        self, data: Path, lstm: Path, transformer: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        generate(data, f"{lstm}:{transformer}", "--beam", 2)
        assert capsys.readouterr().out.count("\nH-") == 20


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model"])
def test_truncated_checkpoints_are_named(
    data: Path, lstm: Path, tmp_path: Path, flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(lstm.read_bytes()[:1000])
    with caplog.at_level(logging.INFO), pytest.raises(UsageError, match="damaged.pt: .*truncated"):
        train(data, tmp_path / "out", flag, damaged, arch="lightrnn_lm_gated")
