"""Training, resuming and translating through fairseq's commands."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import (
    TRANSLATION,
    assert_same_training,
    binarise_pairs,
    coordinates,
    load,
    preprocess_pairs,
    read_log,
    run,
    table_of,
    train,
    train_translation,
    valid_losses,
    valid_records,
    write_pairs,
)

from fairseq_lightrnn.allocation.initial_table import TableMaker
from fairseq_lightrnn.commands.reallocate import main as reallocate
from fairseq_lightrnn.commands.table import main as table_command
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.language_model import LanguageModel

ARCHITECTURES = ["lightrnn_translation", "lightrnn_translation_gated", "lightrnn_transformer"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(
    request: pytest.FixtureRequest, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of three epochs with a reallocation after the first."""
    save_dir = tmp_path_factory.mktemp("trained")
    train_translation(
        pairs, save_dir, arch=request.param, reallocate_epochs=1, save_interval_updates=4,
        initial_table="random", lr=0.05,
    )  # fmt: skip
    (save_dir / "arch.txt").write_text(request.param)
    return save_dir


@pytest.fixture(scope="module")
def gated(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt its training text."""
    save_dir = tmp_path_factory.mktemp("gated")
    train_translation(
        pairs, save_dir, arch="lightrnn_translation_gated", embed_dim=32, hidden_size=32,
        max_epoch=16, lr=0.02, save_interval=16,
    )  # fmt: skip
    return save_dir


def arch_of(folder: Path) -> str:
    return (folder / "arch.txt").read_text()


def symbols(data: Path, language: str = "tgt") -> list[str]:
    lines = (data / f"dict.{language}.txt").read_text().splitlines()
    return ["<s>", "<pad>", "</s>", "<unk>", *(line.split()[0] for line in lines)]


def translate(
    capsys: pytest.CaptureFixture[str], data: Path, path: Any, *flags: Any
) -> tuple[dict[str, list[list[str]]], str]:
    """Runs fairseq-generate; returns its lines by kind (S, T, H, …) and number, and the last."""
    capsys.readouterr()
    run(
        "generate", data, *TRANSLATION, "--path", path, "--cpu", "--num-workers", 0,
        "--batch-size", 5, *flags,
    )  # fmt: skip
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    return by_kind(lines), lines[-1]


def by_kind(lines: list[str]) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for kind, number, rest in re.findall(r"^([A-Z])-(\d+)\t(.*)$", "\n".join(lines), re.M):
        found.setdefault(kind, []).append([number, *rest.split("\t")])
    return found


class TestTraining:
    def test_loss_falls_and_the_reallocation_lowers_the_cost(self, trained: Path) -> None:
        losses = valid_losses(read_log(trained))
        assert losses[-1] < losses[0] - 0.02
        (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        assert (record["epoch"], record["round"], record["objective"]) == (1, 1, "true-loss")
        assert record["loss_after"] < record["loss_before"]
        assert record["predicted_gain"] > 0 and record["gap"] >= 0
        assert 0 < record["moved"] <= record["words"]

    def test_loss_before_is_the_training_loss(
        self, pairs: Path, trained: Path, tmp_path: Path
    ) -> None:
        """Statistics come from decoder states: the logged cost is the loss of the first epoch."""
        (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        keep = ["--keep-input-table"] * (arch_of(trained) != "lightrnn_translation")
        records = train_translation(
            pairs, tmp_path, "--reset-optimizer", "--reset-dataloader", "--reset-meters", *keep,
            arch=arch_of(trained), restore_file=trained / "checkpoint1.pt", lr=0.0, max_epoch=1,
            valid_subset="train",
        )  # fmt: skip
        (valid,) = [r for r in records if "train_wps" in r and "train_lr" not in r]
        loss = float(valid["train_loss"]) * math.log(2)
        assert record["loss_before"] == pytest.approx(loss, abs=1e-4)

    def test_checkpoints_and_files_hold_the_table(self, pairs: Path, trained: Path) -> None:
        name, *own = coordinates(load(trained / "checkpoint1.pt")["model"])
        assert re.fullmatch(r"decoder\.(core|embed_tokens)\.reader\.seats\.coordinates", name)
        # Words are read by the table that was, where they can be.
        assert len(own) == (arch_of(trained) != "lightrnn_translation")
        before = table_of(trained / "checkpoint1.pt", (7, 6))
        after = table_of(trained / "checkpoint_last.pt", (7, 6))
        assert before != after
        words = symbols(pairs)
        assert WordTable.load(trained / "word_table.epoch0.txt", words) == before
        assert WordTable.load(trained / "word_table.txt", words) == after

    def test_the_table_comes_from_the_target_side(self, pairs: Path, tmp_path: Path) -> None:
        """The same table as that of a language model's on the target side alone."""
        train_translation(pairs, tmp_path / "pair", max_epoch=1)
        (tmp_path / "bin").mkdir()
        for suffix in ("bin", "idx"):
            for split in ("train", "valid"):
                content = (pairs / f"{split}.src-tgt.tgt.{suffix}").read_bytes()
                (tmp_path / "bin" / f"{split}.{suffix}").write_bytes(content)
        (tmp_path / "bin" / "dict.txt").write_bytes((pairs / "dict.tgt.txt").read_bytes())
        train(tmp_path / "bin", tmp_path / "lm", max_epoch=1)
        texts = [(tmp_path / name / "word_table.txt").read_text() for name in ("pair", "lm")]
        assert texts[0] == texts[1]

    @pytest.mark.parametrize("objective", ["true-loss", "row-first", "joint"])
    @pytest.mark.parametrize("shape", ["1d", "4x4x3"])
    def test_any_number_of_components(
        self, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str,
        shape: str,
    ) -> None:  # fmt: skip
        records = train_translation(
            pairs, tmp_path, table_shape=shape, reallocate_epochs=1, max_epoch=2,
            reallocation_objective=objective, initial_table="random",
        )  # fmt: skip
        assert all(map(math.isfinite, valid_losses(records)))
        if shape == "1d":
            assert not (tmp_path / "reallocations.jsonl").exists()
        else:
            record = json.loads((tmp_path / "reallocations.jsonl").read_text())
            kind = "loss" if objective == "true-loss" else "cost"
            assert record[f"{kind}_after"] <= record[f"{kind}_before"] + 1e-9
        found, _ = translate(capsys, pairs, tmp_path / "checkpoint2.pt", "--beam", 2)
        assert len(found["H"]) == 12

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_words_with_numbers_of_their_own(
        self, pairs: Path, tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train_translation(pairs, tmp_path, arch=arch, word_dim=4, reallocate_epochs=1, max_epoch=2)
        state = load(tmp_path / "checkpoint2.pt")["model"]
        part = "embed_tokens" if "transformer" in arch else "core"
        features = f"decoder.{part}.reader.features"
        assert state[f"{features}.0.bias"].abs().sum() > 0
        assert state[f"{features}.1.numbers"].shape == (40, 3)
        for name in ("numbers", "projection.weight", "query.weight"):
            assert state[f"{features}.1.{name}"].abs().sum() > 0
        found, _ = translate(capsys, pairs, tmp_path / "checkpoint2.pt", "--beam", 2)
        assert len(found["H"]) == 12

    def test_statistics_of_part_of_the_words(
        self, pairs: Path, trained: Path, tmp_path: Path
    ) -> None:
        (whole,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
        train_translation(
            pairs, tmp_path, arch=arch_of(trained), max_epoch=2, reallocate_epochs=1,
            reallocation_words=whole["tokens"] // 2, restore_file=trained / "checkpoint1.pt",
        )  # fmt: skip
        record = json.loads((tmp_path / "reallocations.jsonl").read_text())
        assert 0.3 * whole["tokens"] < record["tokens"] < 0.7 * whole["tokens"]

    def test_label_smoothing_is_logged_beside_the_loss(self, pairs: Path, tmp_path: Path) -> None:
        (record,) = valid_records(
            train_translation(pairs, tmp_path, label_smoothing=0.2, max_epoch=1)
        )
        nll = float(record["valid_nll_loss"])
        assert float(record["valid_loss"]) > nll
        assert float(record["valid_ppl"]) == pytest.approx(2**nll, abs=0.02)
        parts = [float(record[f"valid_{name}_loss"]) for name in ("row", "column")]
        assert sum(parts) == pytest.approx(nll, abs=2e-3)

    def test_bleu_during_training(self, pairs: Path, tmp_path: Path) -> None:
        records = train_translation(
            pairs, tmp_path, "--eval-bleu", "--eval-bleu-print-samples", max_epoch=1,
            eval_bleu_args='{"beam": 2, "max_len_b": 12}', best_checkpoint_metric="bleu",
        )  # fmt: skip
        assert 0 <= float(valid_records(records)[0]["valid_bleu"]) <= 100

    def test_a_table_file_starts_training_and_sets_the_shape(
        self, pairs: Path, tmp_path: Path
    ) -> None:
        train_translation(pairs, tmp_path / "a", table_shape="5x10", max_epoch=1)
        file = tmp_path / "a" / "word_table.txt"
        for arch in ARCHITECTURES:
            train_translation(pairs, tmp_path / arch, arch=arch, initial_table=file, max_epoch=1)
            found = table_of(tmp_path / arch / "checkpoint1.pt", (5, 10))
            assert found == WordTable.load(file, symbols(pairs))

    def test_a_table_of_the_authors_release(self, pairs: Path, tmp_path: Path) -> None:
        """CNTK's pair of files, imported for the dictionary of the target, starts a training."""
        cells = np.random.default_rng(3).permutation(49)[:40]
        table = WordTable.from_cells(cells, (7, 7))
        table.save_cntk(tmp_path / "cntk", symbols(pairs))
        file = tmp_path / "table.txt"
        arguments = ["import", tmp_path / "cntk", "--data", pairs / "dict.tgt.txt"]
        assert table_command([str(part) for part in (*arguments, "--output", file)]) == 0
        train_translation(pairs, tmp_path / "out", initial_table=file, max_epoch=1)
        assert table_of(tmp_path / "out" / "checkpoint1.pt", (7, 7)) == table


class TestResume:
    def test_at_an_epoch_boundary(self, pairs: Path, trained: Path, tmp_path: Path) -> None:
        train_translation(
            pairs, tmp_path, arch=arch_of(trained), lr=0.05, reallocate_epochs=1,
            restore_file=trained / "checkpoint1.pt",
        )  # fmt: skip
        assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")
        assert len((tmp_path / "reallocations.jsonl").read_text().splitlines()) == 1

    def test_in_mid_epoch_after_the_reallocation(
        self, pairs: Path, trained: Path, tmp_path: Path
    ) -> None:
        (middle,) = trained.glob("checkpoint_2_20.pt")
        train_translation(
            pairs,
            tmp_path,
            arch=arch_of(trained),
            lr=0.05,
            reallocate_epochs=1,
            restore_file=middle,
        )
        assert_same_training(tmp_path / "checkpoint3.pt", trained / "checkpoint3.pt")
        assert not (tmp_path / "reallocations.jsonl").exists()


class TestTranslation:
    def test_beam_search_with_bleu_and_alignment(
        self, pairs: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["--beam", 3, "--scoring", "sacrebleu", "--print-alignment", "--max-len-b", 12]
        found, last = translate(capsys, pairs, trained / "checkpoint_best.pt", *flags)
        assert len(found["H"]) == 12
        assert "BLEU = " in last
        for (_, *alignment), (_, source), (_, _, text) in zip(
            found["A"], found["S"], found["H"], strict=True
        ):
            for pair in " ".join(alignment).split():
                place, word = map(int, pair.split("-"))
                assert 0 <= place < len(source.split())
                assert 0 <= word < len(text.split())

    def test_alignment_does_not_depend_on_the_batch(
        self, pairs: Path, gated: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["--beam", 2, "--print-alignment", "--max-len-b", 12]
        together, _ = translate(capsys, pairs, gated / "checkpoint_best.pt", *flags)
        alone, _ = translate(capsys, pairs, gated / "checkpoint_best.pt", *flags, "--batch-size", 1)
        assert sorted(together["A"]) == sorted(alone["A"])
        texts = [sorted((line[0], line[2]) for line in found["D"]) for found in (together, alone)]
        assert texts[0] == texts[1]

    def test_raw_text_whose_words_take_the_place_of_unknown_ones(
        self, pairs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """No word is unknown here, at which fairseq's own models would stop too."""
        for side in ("src", "tgt"):
            shutil.copy(pairs / f"dict.{side}.txt", tmp_path)
            shutil.copy(pairs.parent / f"test.{side}", tmp_path / f"test.src-tgt.{side}")
        flags = ["--beam", 2, "--max-len-b", 12, "--unkpen", 100, "--dataset-impl", "raw"]
        checkpoint = trained / "checkpoint_best.pt"
        more = ["--replace-unk", "", "--print-alignment", "hard"]
        found, _ = translate(capsys, tmp_path, checkpoint, *flags, *more)
        expected, _ = translate(capsys, pairs, checkpoint, *flags[:-2])
        assert [text for _, _, text in found["H"]] == [text for _, _, text in expected["H"]]

    def test_no_word_twice_beside_its_alignment(
        self, pairs: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """fairseq has another generator for it."""
        flags = ["--beam", 2, "--print-alignment", "--min-len", 8, "--max-len-b", 8]
        repeated = []
        for more in ([], ["--no-repeat-ngram-size", 1]):
            found, _ = translate(capsys, pairs, trained / "checkpoint_best.pt", *flags, *more)
            texts = [text.split() for _, _, text in found["H"]]
            repeated.append([text for text in texts if len(set(text)) < len(text)])
        assert repeated[0]
        assert not repeated[1]

    def test_it_has_learnt_to_translate(
        self, pairs: Path, gated: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["--beam", 3, "--gen-subset", "train", "--max-len-a", 1, "--max-len-b", 2]
        found, last = translate(capsys, pairs, gated / "checkpoint_last.pt", *flags)
        assert float(re.search(r"BLEU4? = ([\d.]+)", last).group(1)) > 30

    def test_the_first_words_of_the_references_as_prefixes(
        self, pairs: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found, _ = translate(
            capsys, pairs, trained / "checkpoint_best.pt", "--prefix-size", 2, "--beam", 2
        )
        targets = {number: text for number, text in found["T"]}
        assert len(found["H"]) == 12
        for number, _, text in found["H"]:
            assert text.split()[:2] == targets[number].split()[:2]

    @pytest.mark.parametrize("models", [1, 2])
    def test_scores_of_the_references(
        self, pairs: Path, trained: Path, capsys: pytest.CaptureFixture[str], models: int
    ) -> None:
        """--score-reference of one model, or of an ensemble, against the probabilities of all
        words after every prefix."""
        paths = [str(trained / f"checkpoint{epoch}.pt") for epoch in (1, 3)][:models]
        found, _ = translate(
            capsys, pairs, ":".join(paths), "--score-reference", "--print-alignment"
        )
        ensemble, _, task = checkpoint_utils.load_model_ensemble_and_task(paths)
        sources = {number: text for number, text in found["S"]}
        assert len(found["H"]) == 12
        for number, score, text in found["H"]:
            source = task.source_dictionary.encode_line(sources[number], add_if_not_exist=False)
            target = task.target_dictionary.encode_line(text, add_if_not_exist=False).long()
            total = 0.0
            for step, word in enumerate(target.tolist()):
                past = torch.cat([target[-1:], target[:step]])[None]
                probabilities = []
                for model in ensemble:
                    with torch.no_grad():
                        output = model.eval()(
                            source.long()[None], torch.tensor([len(source)]), past
                        )
                        probabilities.append(model.get_normalized_probs(output, False)[0, -1, word])
                total += math.log2(float(sum(probabilities)) / models)
            assert float(score) == pytest.approx(total / len(target), abs=1e-3)

    def test_an_ensemble_has_a_table_for_each_model(
        self, pairs: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert table_of(trained / "checkpoint1.pt", (7, 6)) != table_of(
            trained / "checkpoint3.pt", (7, 6)
        )
        paths = ":".join(str(trained / f"checkpoint{epoch}.pt") for epoch in (1, 3))
        found, _ = translate(capsys, pairs, paths, "--beam", 2, "--print-alignment")
        assert len(found["H"]) == 12

    def test_interactive(
        self, pairs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Sentences one by one and in batches, unknown words, an empty line, a long sentence."""
        sentences = ["s1 s8", "", "unheard-of s2", " ".join(["s3"] * 40)]
        text = tmp_path / "text.txt"
        text.write_text("".join(line + "\n" for line in sentences))
        results = []
        for flags in ([], ["--buffer-size", 4, "--batch-size", 4]):
            capsys.readouterr()
            run(
                "interactive", pairs, *TRANSLATION, "--path", trained / "checkpoint_best.pt",
                "--cpu", "--input", text, "--beam", 2, "--nbest", 2, "--max-len-b", 5,
                "--print-alignment", *flags,
            )  # fmt: skip
            found = by_kind(capsys.readouterr().out.splitlines())
            assert len(found["H"]) == 2 * len(sentences)
            results.append([hypothesis[2:] for hypothesis in found["H"]])
        assert results[0] == results[1]

    def test_a_text_without_references(
        self, pairs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = tmp_path / "bin"
        data.mkdir()
        for language in ("src", "tgt"):
            name = f"dict.{language}.txt"
            (data / name).write_bytes((pairs / name).read_bytes())
        for suffix in ("bin", "idx"):
            content = (pairs / f"test.src-tgt.src.{suffix}").read_bytes()
            (data / f"test.src-tgt.src.{suffix}").write_bytes(content)
        found, _ = translate(capsys, data, trained / "checkpoint_best.pt", "--beam", 2)
        assert len(found["H"]) == 12
        assert "T" not in found

    def test_pieces_of_words_are_joined(
        self, pairs: Path, gated: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for flags in (["--remove-bpe"], ["--post-process", "sentencepiece"]):
            found, _ = translate(capsys, pairs, gated / "checkpoint_best.pt", "--beam", 2, *flags)
            assert len(found["D"]) == 12


class TestSourceTables:
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_own(
        self, pairs: Path, tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = {"arch": arch, "source_table": "own", "max_epoch": 2, "reallocate_epochs": 1}
        train_translation(pairs, tmp_path / "a", word_dim=3, **flags)
        path = tmp_path / "a" / "checkpoint2.pt"
        numbers = load(path)["model"]["encoder.embed_tokens.reader.features.0.numbers"]
        assert numbers.shape == (40, 2)
        words = symbols(pairs, "src")
        table = WordTable.load(tmp_path / "a" / "source_word_table.txt", words)
        assert table == table_of(path, (7, 6), "encoder")
        assert table == table_of(tmp_path / "a" / "checkpoint1.pt", (7, 6), "encoder")
        found, _ = translate(capsys, pairs, path, "--beam", 2)
        assert len(found["H"]) == 12

        tuned = tmp_path / "tuned"
        train_translation(pairs, tuned, word_dim=3, finetune_from_model=path, **flags)
        assert WordTable.load(tuned / "source_word_table.txt", words) == table

        # With a file for the target, the source's words are seated by co-occurrence.
        other = WordTable.from_cells(np.random.default_rng(1).permutation(45)[:40], (5, 9))
        other.save(tmp_path / "table.txt", symbols(pairs))
        train_translation(pairs, tmp_path / "b", initial_table=tmp_path / "table.txt", **flags)
        path = tmp_path / "b" / "checkpoint2.pt"
        assert table_of(tmp_path / "b" / "checkpoint1.pt", (5, 9)) == other
        assert table_of(path, (7, 6), "encoder") == table
        found, _ = translate(capsys, pairs, path, "--beam", 2)
        assert len(found["H"]) == 12

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_shared(
        self, tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        data = preprocess_pairs(tmp_path / "data", "--joined-dictionary", sentences=60)
        kept = arch != "lightrnn_translation"  # by default
        with caplog.at_level(logging.WARNING):
            train_translation(
                data, tmp_path / "out", arch=arch, source_table="shared", max_epoch=2,
                reallocate_epochs=1,
            )  # fmt: skip
        # Only if words are read by the table that changes.
        assert ("--source-table shared: reallocation heeds" in caplog.text) == (not kept)
        found, _ = translate(capsys, data, tmp_path / "out" / "checkpoint2.pt", "--beam", 2)
        assert len(found["H"]) == 12

    @pytest.mark.parametrize("arch", ARCHITECTURES[1:])
    def test_an_input_table_can_be_kept_later(self, tmp_path: Path, arch: str) -> None:
        data = preprocess_pairs(tmp_path / "data", "--joined-dictionary", sentences=240)
        flags = {"arch": arch, "source_table": "shared", "initial_table": "random", "lr": 0.05}
        if "transformer" not in arch:
            flags["component_vectors"] = "separate"
        train_translation(data, tmp_path / "a", max_epoch=2, **flags)
        train_translation(
            data, tmp_path / "b", max_epoch=3, reallocate_epochs=2,
            restore_file=tmp_path / "a" / "checkpoint2.pt", **flags,
        )  # fmt: skip
        path = tmp_path / "b" / "checkpoint3.pt"
        (before,) = coordinates(load(tmp_path / "a" / "checkpoint2.pt")["model"]).values()
        read, predicted = coordinates(load(path)["model"]).values()
        assert torch.equal(read, before) and not torch.equal(read, predicted)
        (model,), _ = checkpoint_utils.load_model_ensemble([str(path)])
        assert model.encoder.embed_tokens.reader.seats is model.decoder.words.input_table

    def test_a_table_from_the_text_of_both_sides(self, tmp_path: Path) -> None:
        """As from the source side written with the target's words, unknown words and all."""
        for seed, split in enumerate(("train", "valid", "test")):
            write_pairs(tmp_path, split, 60, seed)
            source = tmp_path / f"{split}.src"
            # Half of the source's words are those of the target.
            source.write_text(re.sub("s([0-9]*[02468])\\b", r"t\1", source.read_text()))
        binarise_pairs(tmp_path)
        train_translation(tmp_path / "bin", tmp_path / "out", max_epoch=1, table_text="both")
        words = symbols(tmp_path / "bin", "tgt")
        text = []
        for side in ("tgt", "src"):
            lines = (tmp_path / f"train.{side}").read_text().splitlines()
            known = [
                w if w in words else "<unk>" for line in lines for w in (*line.split(), "</s>")
            ]
            text.append(np.array([words.index(word) for word in known]))
        tables = []
        for texts in (text, text[:1]):
            maker = TableMaker(len(words), np.zeros(len(words), int), lambda texts=texts: texts, 1)
            tables.append(maker.make("cooccurrence", (7, 6)))
        assert WordTable.load(tmp_path / "out" / "word_table.txt", words) == tables[0]
        assert tables[0] != tables[1]

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_resumes_bit_for_bit(self, pairs: Path, tmp_path: Path, arch: str) -> None:
        keep = ["--keep-input-table"] * (arch != "lightrnn_translation")
        flags = {"arch": arch, "source_table": "own", "reallocate_epochs": 1, "max_epoch": 2}
        train_translation(pairs, tmp_path / "a", *keep, **flags)
        train_translation(
            pairs, tmp_path / "b", *keep, restore_file=tmp_path / "a" / "checkpoint1.pt",
            **flags,
        )  # fmt: skip
        assert_same_training(*(tmp_path / name / "checkpoint2.pt" for name in "ab"))


def test_a_checkpoint_is_reallocated_outside_of_training(
    pairs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lightrnn-reallocate does what training did after the first epoch."""
    output = tmp_path / "new.pt"
    arguments = [trained / "checkpoint1.pt", pairs, "--output", output]
    arguments += ["--report", tmp_path / "report.json"]
    assert reallocate([str(argument) for argument in arguments]) == 0
    (record,) = map(json.loads, (trained / "reallocations.jsonl").read_text().splitlines())
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("loss_before", "loss_after"):
        assert report[name] == pytest.approx(record[name], abs=1e-5)
    assert table_of(output, (7, 6)) == table_of(trained / "checkpoint_last.pt", (7, 6))
    found, _ = translate(capsys, pairs, output, "--beam", 2)
    assert len(found["H"]) == 12


class TestBadInput:
    """Each mistake ends in one sentence that names the flag or file, and no traceback."""

    def refused(self, message: str, data: Path, tmp_path: Path, *flags: Any, **values: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            train_translation(data, tmp_path, *flags, **values)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_stock_criterion(self, pairs: Path, tmp_path: Path) -> None:
        self.refused(
            "use --criterion two_component_cross_entropy", pairs, tmp_path,
            criterion="label_smoothed_cross_entropy_with_alignment",
        )  # fmt: skip

    def test_stock_model(self, pairs: Path, tmp_path: Path) -> None:
        self.refused(
            "use one of --arch lightrnn_translation, lightrnn_transformer with this task, or "
            "--task translation with that model", pairs, tmp_path, arch="lstm", embed_dim=None,
            hidden_size=None,
        )  # fmt: skip

    def test_the_model_of_the_other_task(self, pairs: Path, data: Path, tmp_path: Path) -> None:
        self.refused("use --task lightrnn_language_modeling", pairs, tmp_path, arch="lightrnn_lm")
        with pytest.raises(SystemExit, match="use --task lightrnn_translation"):
            train(data, tmp_path, arch="lightrnn_translation")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"table_shape": "5x5"}, "--table-shape 5x5: a table of shape 5x5 has 25 cells"),
            ({"source_table": "shared"}, "preprocess with --joined-dictionary"),
            (
                {"table_text": "both", "initial_table": "random"},
                "--table-text both: --initial-table random looks at no text",
            ),
            ({"label_smoothing": 1.5}, "--label-smoothing 1.5: must be at least 0"),
            ({"source_lang": "xx", "target_lang": "tgt"}, "dict.xx.txt: no such dictionary"),
            ({"train_subset": "training"}, "Dataset not found: training"),
        ],
    )
    def test_flags(self, pairs: Path, tmp_path: Path, values: Any, message: str) -> None:
        self.refused(message, pairs, tmp_path, **values)

    def test_padding_before_targets(self, pairs: Path, tmp_path: Path) -> None:
        self.refused(
            "--left-pad-target: a LightRNN decoder reads", pairs, tmp_path, "--left-pad-target"
        )

    def test_data_of_one_language(self, data: Path, tmp_path: Path) -> None:
        self.refused(
            "give the folder of binarised data, or --source-lang and --target-lang", data, tmp_path
        )

    def test_a_table_of_the_wrong_language(self, pairs: Path, tmp_path: Path) -> None:
        words = symbols(pairs, "src")
        table = WordTable.from_cells(np.arange(len(words)), (7, 6))
        table.save(tmp_path / "table.txt", words)
        self.refused("holds 's", pairs, tmp_path / "a", initial_table=tmp_path / "table.txt")
        self.refused(
            "belongs to another dictionary", pairs, tmp_path / "a",
            initial_table=tmp_path / "table.txt",
        )  # fmt: skip

    def test_data_of_other_dictionaries(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for split, size in {"train": 40, "valid": 5, "test": 5}.items():
            write_pairs(tmp_path, split, size, 9, words=50)
        binarise_pairs(tmp_path)
        with pytest.raises(SystemExit, match="words, the dictionary 5.: give the binarised data"):
            translate(capsys, tmp_path / "bin", trained / "checkpoint_best.pt")

    def test_a_translation_model_is_no_language_model(self, gated: Path) -> None:
        with pytest.raises(ValueError, match="holds a translation model, which fairseq-generate"):
            LanguageModel.from_pretrained(gated)

    def test_an_empty_split(self, pairs: Path, tmp_path: Path) -> None:
        for split in ("train", "valid", "test"):
            for side in ("src", "tgt"):
                (tmp_path / f"{split}.{side}").write_text("")
        dictionaries = ["--srcdict", pairs / "dict.src.txt", "--tgtdict", pairs / "dict.tgt.txt"]
        binarise_pairs(tmp_path, *dictionaries)
        self.refused("valid.src-tgt.src.bin: the split has no text", tmp_path / "bin", tmp_path)

    def test_empty_lines_and_long_sentences(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Empty lines are texts of no word; what is too long is skipped as fairseq does."""
        for split, size in {"train": 30, "valid": 5, "test": 5}.items():
            write_pairs(tmp_path, split, size, 0)
            for side, word in (("src", "s1"), ("tgt", "t1")):
                with (tmp_path / f"{split}.{side}").open("a") as file:
                    file.write("\n")
                    if split != "valid":
                        file.write(" ".join([word] * 40) + "\n")
        binarise_pairs(tmp_path)
        limits = {"max_source_positions": 20, "max_target_positions": 20}
        with caplog.at_level(logging.WARNING):
            train_translation(
                tmp_path / "bin", tmp_path / "out", max_epoch=2, reallocate_epochs=1, **limits
            )
        assert "1 samples have invalid sizes and will be skipped" in caplog.text
        record = json.loads((tmp_path / "out" / "reallocations.jsonl").read_text())
        lines = (tmp_path / "train.tgt").read_text().splitlines()
        short = [line.split() for line in lines if len(line.split()) < 20]
        assert record["tokens"] == sum(len(words) + 1 for words in short)
        path = tmp_path / "out" / "checkpoint2.pt"
        flags = ["--max-source-positions", 20, "--max-target-positions", 20]
        with pytest.raises(Exception, match="Size of sample #6 is invalid"):
            translate(capsys, tmp_path / "bin", path, *flags)
        flags.append("--skip-invalid-size-inputs-valid-test")
        found, _ = translate(capsys, tmp_path / "bin", path, *flags)
        assert len(found["H"]) == 6


def test_activations_are_regularised(pairs: Path, tmp_path: Path) -> None:
    losses = {}
    for weight in (0, 5):
        records = train_translation(
            pairs, tmp_path / str(weight), arch="lightrnn_translation_gated", max_epoch=1,
            regularise=f"awd,weight=0,component=0,activation={weight},change={weight}",
        )  # fmt: skip
        losses[weight] = records[-1]
        assert ("train_ar_penalty" in records[-1]) == (weight > 0)
    assert losses[0]["train_loss"] != losses[5]["train_loss"]


@pytest.mark.parametrize("flag", ["--ignore-prefix-size", "--report-accuracy"])
def test_flags_that_only_fairseqs_criterion_heeds(pairs: Path, tmp_path: Path, flag: str) -> None:
    value = [2] if flag == "--ignore-prefix-size" else []
    with pytest.raises(SystemExit, match=f"^{flag} is unknown to --criterion two_component"):
        train_translation(
            pairs, tmp_path, flag, *value, criterion="label_smoothed_cross_entropy",
            label_smoothing=0.1,
        )  # fmt: skip


def test_vectors_of_source_words_that_have_a_table(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^--encoder-embed-path vectors.txt: with --source-table"):
        train_translation(
            pairs, tmp_path, arch="lightrnn_transformer", source_table="own",
            encoder_embed_path="vectors.txt",
        )  # fmt: skip


def test_tables_are_made_of_all_parts_of_the_text(tmp_path: Path) -> None:
    """fairseq trains on train1 too, if it is there."""
    data = preprocess_pairs(tmp_path / "a")
    words = words_of_tables(data, tmp_path / "one")
    for path in data.glob("train.src-tgt.*"):
        (data / path.name.replace("train.", "train1.")).write_bytes(path.read_bytes())
    assert words_of_tables(data, tmp_path / "two") == 2 * words


def words_of_tables(data: Path, save_dir: Path) -> int:
    """The words of the text that tables are made of, which are those that are trained on."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    parser = options.get_training_parser()
    flags = [*TRANSLATION, "--arch", "lightrnn_translation", "--save-dir", str(save_dir)]
    flags += ["--upsample-primary", "1"]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [str(data), *flags]))
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train", combine=True)
    found = sum(len(piece) for piece in task.table_text())
    assert found == int(task.dataset("train").sizes[:, 1].sum())
    return found
