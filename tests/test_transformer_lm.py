"""``--arch lightrnn_transformer_lm`` through fairseq's commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import (
    CARRY,
    TASK,
    assert_same_training,
    coordinates,
    eval_lm,
    load,
    read_log,
    run,
    symbols,
    table_of,
    train,
    valid_losses,
)

from fairseq_lightrnn.core.table import WordTable

ARCH = {"arch": "lightrnn_transformer_lm"}
READ = "decoder.embed_tokens.reader.seats.coordinates"
PREDICTED = "decoder.head.softmax.table.coordinates"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three epochs with a reallocation after the first."""
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, reallocate_epochs=1, save_interval_updates=4, criterion=None, **ARCH)
    return save_dir


class TestTraining:
    def test_loss_falls_and_the_reallocation_lowers_the_cost(self, trained: Path) -> None:
        losses = valid_losses(read_log(trained))
        assert losses[-1] < losses[0] - 0.05
        (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        assert (record["epoch"], record["round"], record["objective"]) == (1, 1, "true-loss")
        assert record["loss_after"] < record["loss_before"]
        assert record["predicted_gain"] > 0 and record["gap"] >= 0
        assert 0 < record["moved"] <= record["words"]

    def test_loss_before_is_the_training_loss(
        self, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        records = train(
            data, tmp_path, "--reset-optimizer", "--reset-dataloader", "--reset-meters",
            "--keep-input-table", restore_file=trained / "checkpoint1.pt", lr=0.0, max_epoch=1,
            valid_subset="train", **ARCH,
        )  # fmt: skip
        (valid,) = [r for r in records if "train_wps" in r and "train_lr" not in r]
        loss = float(valid["train_loss"]) * math.log(2)
        assert record["loss_before"] == pytest.approx(loss, abs=1e-4)

    def test_checkpoints_and_files_hold_the_table(self, data: Path, trained: Path) -> None:
        assert list(coordinates(load(trained / "checkpoint1.pt")["model"])) == [READ, PREDICTED]
        before = table_of(trained / "checkpoint1.pt", (7, 7))
        after = table_of(trained / "checkpoint_last.pt", (7, 7))
        assert before != after
        words = symbols(data)
        assert WordTable.load(trained / "word_table.epoch0.txt", words) == before
        assert WordTable.load(trained / "word_table.txt", words) == after

    def test_checkpoints_hold_what_is_shared_once(self, trained: Path) -> None:
        path = trained / "checkpoint_last.pt"
        state = load(path)["model"]
        (model,), _ = checkpoint_utils.load_model_ensemble([str(path)])
        decoder = model.decoder
        softmax = decoder.words.head.softmax
        assert list(softmax.features) == list(decoder.embed_tokens.reader.features)
        parameters = dict(model.named_parameters())  # each once
        counted = ("reallocations.round", "reallocations.epoch", "vocabulary.digest")
        ours = {READ, PREDICTED, *(f"decoder.{name}" for name in counted)}
        of_fairseq = {"decoder.version", "decoder.embed_positions._float_tensor"}
        packed = {name for name in state if name.startswith("decoder.layers.")} - {*parameters}
        assert state.keys() - packed == {*parameters, *ours, *of_fairseq}
        for name, value in parameters.items():
            assert torch.equal(value, state[name]), name

    def test_the_recommended_settings_are_written_down(self, trained: Path) -> None:
        cfg = load(trained / "checkpoint_last.pt")["cfg"]["model"]
        assert cfg["table_shape"] == "7x7"
        assert cfg["word_dim"] == 65
        assert str(cfg["further_tables"]) == "0"
        assert cfg["output_ffn_dim"] == 32


class TestResume:
    @pytest.mark.parametrize(
        "middle", ["checkpoint1.pt", "checkpoint_1_4.pt", "checkpoint_2_12.pt"]
    )
    def test_bit_for_bit(self, data: Path, trained: Path, tmp_path: Path, middle: str) -> None:
        """At an epoch's end, and before and after the reallocation in mid-epoch."""
        train(data, tmp_path, reallocate_epochs=1, restore_file=trained / middle, **ARCH)
        assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")

    def test_with_every_feature(self, data: Path, tmp_path: Path) -> None:
        flags = {"further_tables": 2, "word_dim": 3, "reallocate_epochs": 1, "max_epoch": 2, **ARCH}
        switches = ["--keep-input-table"]
        whole, resumed = tmp_path / "a", tmp_path / "b"
        records = train(data, whole, *switches, **flags)
        train(data, resumed, *switches, restore_file=whole / "checkpoint1.pt", **flags)
        assert_same_training(whole / "checkpoint2.pt", resumed / "checkpoint2.pt")
        assert len(coordinates(load(whole / "checkpoint2.pt")["model"])) == 6
        loss = eval_lm(
            data, whole / "checkpoint2.pt", "--gen-subset", "valid", "--tokens-per-sample", 12
        )
        assert loss == pytest.approx(valid_losses(records)[-1], abs=6e-5)


class TestEvaluation:
    def test_eval_lm_equals_validation(self, data: Path, trained: Path) -> None:
        path = trained / "checkpoint_last.pt"
        flags = ["--gen-subset", "valid", "--tokens-per-sample", 12]
        whole = eval_lm(data, path, *flags)
        assert whole == pytest.approx(valid_losses(read_log(trained))[-1], abs=6e-5)
        for extra in (["--batch-size", 1], ["--softmax-batch", 7]):
            assert eval_lm(data, path, *flags, *extra) == pytest.approx(whole, abs=1e-5)

    def test_a_context_window_changes_contexts_only(self, data: Path, trained: Path) -> None:
        path = trained / "checkpoint_last.pt"
        flags = ["--gen-subset", "valid", "--batch-size", 1, "--tokens-per-sample", 12]
        plain = eval_lm(data, path, *flags)
        window = eval_lm(data, path, *flags, "--context-window", 6)
        assert window != pytest.approx(plain, abs=1e-5)
        assert window == pytest.approx(plain, abs=1.0)


class TestGeneration:
    def test_interactive_continues_prompts(
        self, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One by one and in batches."""
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("w1 w8\nw3 unheard-of w2 w5\nw7\n")
        texts = []
        for flags in ([], ["--buffer-size", 3, "--batch-size", 3]):
            capsys.readouterr()
            run(
                "interactive", data, *TASK, "--path", trained / "checkpoint_last.pt", "--cpu",
                "--input", prompt, "--beam", 3, "--max-len-b", 8, *flags,
            )  # fmt: skip
            lines = capsys.readouterr().out.splitlines()
            texts.append([line.split("\t")[2] for line in lines if line.startswith("H-")])
        assert texts[0] == texts[1]
        for text, start in zip(texts[0], ("w1 w8", "w3 <unk> w2 w5", "w7"), strict=True):
            assert text.startswith(start)

    def test_generate_continues_a_split(
        self, data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        run(
            "generate", data, *TASK, "--path", trained / "checkpoint_last.pt", "--cpu",
            "--gen-subset", "test", "--sample-break-mode", "eos", "--prefix-size", 2, "--beam", 2,
            "--max-len-b", 10, "--num-workers", 0,
        )  # fmt: skip
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        targets = {fields[0][2:]: fields[1] for fields in lines if fields[0].startswith("T-")}
        texts = {fields[0][2:]: fields[2] for fields in lines if fields[0].startswith("H-")}
        assert len(texts) == 20
        for number, text in texts.items():
            assert text.split()[:2] == targets[number].split()[:2]

    @torch.no_grad()
    def test_generation_equals_scoring(self, trained: Path) -> None:
        """Step by step with reordering, the decoder predicts what the whole text predicts."""
        (model,), _ = checkpoint_utils.load_model_ensemble([str(trained / "checkpoint_last.pt")])
        decoder = model.eval().decoder
        words = torch.randint(4, 44, (3, 6))
        prefixes = [decoder(words[:, : step + 1]) for step in range(6)]
        every = torch.cat([decoder.get_normalized_probs(p, True) for p in prefixes], dim=1)
        targets = decoder(words[:, :-1], target_tokens=words[:, 1:])
        scores = decoder.get_normalized_probs(targets, True, {"target": words[:, 1:]})
        chosen = every[:, :-1].gather(2, words[:, 1:, None])
        torch.testing.assert_close(chosen, scores.gather(2, words[:, 1:, None]))
        torch.testing.assert_close(every.exp().sum(-1), torch.ones(3, 6))
        state: dict[str, Any] = {}
        order = torch.tensor([2, 0])
        for step in range(6):
            output = decoder(words[:, : step + 1], incremental_state=state)
            log_probs = decoder.get_normalized_probs(output, log_probs=True)
            torch.testing.assert_close(log_probs, every[:, step : step + 1])
            if step == 3:
                decoder.reorder_incremental_state_scripting(state, order)
                words, every = words[order], every[order]


@pytest.mark.parametrize(
    ("switches", "flags", "message"),
    [
        (["--adaptive-input"], {}, "--adaptive-input: component vectors are no adaptive input"),
        (
            ["--character-embeddings"], {},
            "--character-embeddings: words are read by their components",
        ),
        (
            [], {"adaptive_softmax_cutoff": "10"},
            "--adaptive-softmax-cutoff: a component softmax is no adaptive one",
        ),
        (
            ["--share-decoder-input-output-embed", "--keep-input-table"], {},
            "--share-decoder-input-output-embed and --keep-input-table: give one of them",
        ),
        (
            ["--share-decoder-input-output-embed"], {"decoder_output_dim": 6},
            "--share-decoder-input-output-embed needs --decoder-output-dim (6) equal to",
        ),
        ([CARRY], {}, "--carry-hidden-state: --arch lightrnn_transformer_lm has no hidden state"),
        ([], {"word_dim": -1}, "--word-dim -1: must not be negative"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(
    data: Path, tmp_path: Path, switches: list[str], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        train(data, tmp_path, *switches, **flags, **ARCH)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
