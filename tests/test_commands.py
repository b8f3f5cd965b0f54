"""What all commands have in common: how they read their flags, and how they end."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fairseq_run import CARRY, eval_lm, train

from fairseq_lightrnn.commands import start
from fairseq_lightrnn.commands.run import command
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.models.lightrnn_lm import LightRNNLanguageModel

TEXT = "w1 w8 w15\nw3 unheard-of w9\n\nw2\n"
NBEST = "0 ||| w1 w8 ||| -1\n0 ||| w8 w1 ||| -2\n"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model, in which the newest checkpoint was cut short."""
    folder = tmp_path_factory.mktemp("trained")
    train(data, folder, max_epoch=1, sample_break_mode="eos", initial_table="random")
    last = folder / "checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:3000])
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def main(name: str) -> Any:
    return importlib.import_module(f"fairseq_lightrnn.commands.{name}").main


def output(capsys: pytest.CaptureFixture[str], name: str, *arguments: Any) -> str:
    capsys.readouterr()
    assert main(name)([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def command_line(name: str, *arguments: Any) -> list[str]:
    return [sys.executable, "-m", f"fairseq_lightrnn.commands.{name}", *map(str, arguments)]


class TestFlags:
    """Options stand where one likes."""

    def test_score(self, trained: Path, data: Path, text: Path, capsys: Any) -> None:
        expected = output(capsys, "score", trained, text, text, "--data", data, "--base", "e")
        for order in (
            [trained, "--data", data, text, text, "--base", "e"],
            [trained, text, "--base", "e", text, "--data", data],
            ["--base", "e", "--data", data, trained, text, text],
        ):
            assert output(capsys, "score", *order) == expected

    def test_rescore(self, trained: Path, tmp_path: Path, capsys: Any) -> None:
        nbest = tmp_path / "nbest.txt"
        nbest.write_text(NBEST)
        expected = output(capsys, "rescore", trained, nbest, "--lm-weight", 1, "--best")
        for order in (
            [trained, "--lm-weight", 1, nbest, "--best"],
            ["--best", "--lm-weight", 1, trained, nbest],
        ):
            assert output(capsys, "rescore", *order) == expected

    def test_table(self, trained: Path, data: Path, capsys: Any) -> None:
        table = trained / "word_table.txt"
        expected = output(capsys, "table", "search", table, "w1", "--data", data, "--limit", 3)
        for order in (
            ["search", table, "--data", data, "w1", "--limit", 3],
            ["search", "--limit", 3, table, "w1", "--data", data],
            ["--data", data, "search", table, "--limit", 3, "w1"],
        ):
            assert output(capsys, "table", *order) == expected

    def test_reallocate(self, trained: Path, data: Path, tmp_path: Path) -> None:
        best, out = trained / "checkpoint_best.pt", tmp_path / "new.pt"
        assert main("reallocate")([*map(str, ("--output", out, best, "--words", 50, data))]) == 0
        assert out.exists()


class TestInput:
    def test_any_kind_of_file(
        self, trained: Path, text: Path, tmp_path: Path, capsys: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        expected = output(capsys, "score", trained, text)
        packed = tmp_path / "text.gz"
        packed.write_bytes(gzip.compress(TEXT.encode()))
        assert output(capsys, "score", trained, packed) == expected
        for given in ([], ["-"]):
            stream = io.TextIOWrapper(io.BytesIO(gzip.compress(TEXT.encode())))
            monkeypatch.setattr("sys.stdin", stream)
            assert output(capsys, "score", trained, *given) == expected
        for path in (text, packed):
            reader = os.open(path, os.O_RDONLY)  # as of <(…)
            assert output(capsys, "score", trained, f"/dev/fd/{reader}") == expected
            os.close(reader)

    def test_the_standard_input_is_read_once(
        self, trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = trained / "word_table.txt"
        for file, name, *arguments in (
            (text, "score", trained, "-", "-"),
            (text, "extend", trained, "-", "--drop", "-", "-o", tmp_path / "new"),
            (table, "table", "compare", "-", "-"),
        ):
            stream = io.TextIOWrapper(io.BytesIO(file.read_bytes()))
            monkeypatch.setattr("sys.stdin", stream)
            with pytest.raises(SystemExit, match="-: the standard input can be read once"):
                main(name)([str(argument) for argument in arguments])
        assert not (tmp_path / "new").exists()

    def test_a_word_table_of_a_pipe(self, trained: Path, data: Path, capsys: Any) -> None:
        table = trained / "word_table.txt"
        for flags in ([], ["--data", data]):
            reader, writer = os.pipe()
            os.write(writer, table.read_bytes())
            os.close(writer)
            found = output(capsys, "table", "show", f"/dev/fd/{reader}", *flags)
            assert found == output(capsys, "table", "show", table, *flags)
            os.close(reader)

    def test_byte_order_marks_are_no_text(
        self, trained: Path, text: Path, tmp_path: Path, capsys: Any
    ) -> None:
        marked = tmp_path / "marked.txt"
        marked.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
        assert output(capsys, "score", trained, marked) == output(capsys, "score", trained, text)
        marked.write_bytes(b"\xef\xbb\xbf" + NBEST.encode())
        assert len(output(capsys, "rescore", trained, marked, "--best").splitlines()) == 1

    @pytest.mark.parametrize("flags", [["--level", "word", CARRY], ["--format", "json"]])
    def test_each_line_is_answered(
        self, trained: Path, text: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The next line comes when the last has been answered; the answers are a file's."""
        flags = ["--level", "sentence", *flags]
        line = command_line("score", trained, *flags)
        rows = output(capsys, "score", trained, *flags, text).splitlines()
        header = [] if "json" in flags else [rows.pop(0)]
        with subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, bufsize=1,
        ) as process:  # fmt: skip
            assert process.stdin and process.stdout
            for sentence, words in zip(TEXT.splitlines(), (4, 4, 1, 2), strict=True):
                process.stdin.write(sentence + "\n")
                if header:
                    assert process.stdout.readline() == header.pop() + "\n"
                for _ in range(words if "word" in flags else 1):
                    assert _same(process.stdout.readline(), rows.pop(0))
            process.stdin.close()
            assert process.stdout.read() == ""
        assert rows == []


def _same(one: str, two: str) -> bool:
    """Whether lines are the same but for rounding, which batches change."""
    if one.startswith("{"):
        return dict(json.loads(one)) == pytest.approx(json.loads(two), abs=1e-4)
    pairs = zip(one.split(), two.split(), strict=True)
    return all(a == b or float(a) == pytest.approx(float(b), abs=1e-4) for a, b in pairs)


class TestEnds:
    """One sentence on the standard error that begins with the command's name, and status 1."""

    def refused(self, name: str, message: str, *arguments: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            main(name)([*map(str, arguments)])
        sentence = str(caught.value)
        assert sentence.startswith(f"lightrnn-{name}: ")
        assert message in sentence
        assert "\n" not in sentence

    def test_mistakes(self, trained: Path, data: Path, text: Path, tmp_path: Path) -> None:
        best, table = trained / "checkpoint_best.pt", trained / "word_table.txt"
        cut, missing = trained / "checkpoint_last.pt", tmp_path / "missing"
        out, nbest = tmp_path / "new", tmp_path / "nbest.txt"
        nbest.write_text(NBEST)
        page = ["table", "there is no folder", "page", table, "--output", missing / "page"]
        for mistake in (
            page,
            ["table", "there is no folder", "export", table, "--output", missing / "table"],
            ["table", "File exists", "export", table, "--format", "cntk", "--output", text],
            ["table", "is a folder", "export", table, "--output",
             tmp_path],
            ["table", "not a checkpoint", "show", cut],
            ["score", "there is no device 'foo' here", best, text, "--device", "foo"],
            ["score", "there is no device 'meta' here", best, text, "--device", "meta"],
            ["score", "not a checkpoint of fairseq", cut, text],
            ["score", "it is a folder", best, tmp_path],
            ["score", "--split dev: there is no", best, "--split", "dev", "--data", data],
            ["rescore", "there is no device", best, nbest, "--device", "cuda:77"],
            ["reallocate", "not a checkpoint of fairseq", cut, data, "--output", out],
            ["reallocate", f"{missing}", best, missing, "--output", out],
            ["reallocate", "dev", best, data, "--output", out, "--split", "dev"],
            ["reallocate", "there is no device", best, data, "--output", out, "--device", "foo"],
            ["reallocate", "--words 0: must", best, data, "--output", out, "--words", 0],
            ["reallocate", "--memory nan: must", best, data, "--output", out, "--memory", "nan"],
            ["reallocate", "--max-tokens -1: must", best, data, "--output", out, "--max-tokens",
             "-1"],
            ["reallocate", "--memory 1e-09: ", best, data, "--output", out, "--memory", 1e-9],
        ):  # fmt: skip
            self.refused(*mistake)
        assert not out.exists()

    def test_on_a_command_line(self, trained: Path, text: Path) -> None:
        line = command_line("score", trained, text, "--device", "foo")
        found = subprocess.run(line, capture_output=True, text=True)
        assert found.returncode == 1
        assert found.stdout == ""
        (sentence,) = found.stderr.splitlines()
        assert sentence.startswith("lightrnn-score: there is no device 'foo' here (")

    def test_a_newest_checkpoint_cut_short_matters_to_nobody(
        self, trained: Path, data: Path, text: Path, tmp_path: Path, capsys: Any
    ) -> None:
        best = trained / "checkpoint_best.pt"
        assert output(capsys, "score", best, text) == output(capsys, "score", trained, text)
        assert main("reallocate")([*map(str, (best, data, "--output", tmp_path / "new.pt"))]) == 0

    def test_nobody_listens(self, trained: Path, tmp_path: Path) -> None:
        """As by ``| head``."""
        (tmp_path / "long.txt").write_text("w1 w8\n" * 30_000)
        for line in (
            command_line("score", trained, tmp_path / "long.txt", "--level", "word"),
            command_line("table", "show", trained / "word_table.txt"),
        ):
            reader, writer = os.pipe()
            os.close(reader)
            found = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
            os.close(writer)
            assert found.returncode == 141
            # But for what the command says of the hidden state when it starts.
            assert not found.stderr or found.stderr.startswith("each sentence starts afresh")
            assert len(found.stderr.splitlines()) <= 1

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
    def test_a_full_disk(self, trained: Path) -> None:
        line = command_line("table", "show", trained / "word_table.txt")
        with open("/dev/full", "w") as full:
            found = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (found.returncode, found.stderr) == (
            1, "lightrnn-table: No space left on device\n"
        )  # fmt: skip

    def test_interrupted(self, trained: Path) -> None:
        line = command_line("score", trained, "--level", "sentence")
        heeded = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        with subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=heeded,  # a shell lets what it starts in the background ignore it
        ) as process:  # fmt: skip
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write("w1\n")
            process.stdin.flush()
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
            assert "Traceback" not in process.stderr.read()

    def test_a_fault_of_ours_is_shown(self) -> None:
        def fail(args: Any) -> None:
            raise KeyError("ours")

        with pytest.raises(KeyError):
            command("name", lambda arguments: None)(fail)([])  # type: ignore[arg-type,return-value]


class TestPython:
    """The library raises what a program can catch."""

    def test_an_event_loop_survives(self, trained: Path, data: Path, tmp_path: Path) -> None:
        def wrong_dictionary() -> None:
            (tmp_path / "dict.txt").write_text("w1 5\n")
            LanguageModel.from_pretrained(trained, tmp_path)

        calls = [
            lambda: LanguageModel.from_pretrained(tmp_path / "missing"),
            lambda: LanguageModel.from_pretrained(trained / "checkpoint_last.pt"),
            lambda: LanguageModel.from_pretrained(trained, device="foo"),
            wrong_dictionary,
        ]

        async def attempt(call: Any) -> str:
            try:
                call()
            except Exception as error:
                assert type(error) is ValueError
                return str(error)
            return "nothing"

        async def attempts() -> list[str]:
            return await asyncio.gather(*(asyncio.create_task(attempt(call)) for call in calls))

        found = asyncio.run(attempts())
        assert "no such checkpoint" in found[0]
        assert "a damaged one" in found[1]
        assert "there is no device 'foo'" in found[2]
        assert "has 5 words, the model" in found[3]

    def test_adapters_end_fairseqs_commands_in_a_sentence(self, data: Path, tmp_path: Path) -> None:
        code = (
            "import sys, fairseq_compat\nfairseq_compat.install()\n"
            "from fairseq_cli.train import cli_main\ncli_main()"
        )
        user_dir = Path(importlib.import_module("fairseq_lightrnn").__file__ or "").parent
        found = subprocess.run(
            [sys.executable, "-c", code, data, "--user-dir", user_dir, "--cpu",
             "--task", "lightrnn_language_modeling", "--arch", "lightrnn_lm", "--optimizer", "adam",
             "--batch-size", "4", "--save-dir", tmp_path, "--table-shape", "2x2"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 1
        assert "Traceback" not in found.stderr
        assert "--table-shape 2x2: a table of shape 2x2 has 4 cells" in found.stderr

    def test_so_do_spawned_workers(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import sys, torch.multiprocessing as mp\n"
            "import fairseq_lightrnn.register\n"
            "from fairseq_lightrnn.errors import UsageError\n"
            "def work(rank, kind):\n"
            "    raise (UsageError if kind == 'usage' else KeyError)('--flag 3: too few')\n"
            "if __name__ == '__main__':\n"
            "    mp.spawn(work, (sys.argv[1],), nprocs=2)\n"
        )
        for kind, traceback in (("usage", False), ("fault", True)):
            found = subprocess.run([sys.executable, script, kind], capture_output=True, text=True)
            assert found.returncode == 1
            assert ("Traceback" in found.stderr) == traceback
            if not traceback:
                assert found.stderr.splitlines()[-1] == "--flag 3: too few"

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
    def test_the_hub_interface_of_fairseq(self, trained: Path, data: Path) -> None:
        hub = LightRNNLanguageModel.from_pretrained(
            str(trained), "checkpoint_best.pt", data_name_or_path=str(data)
        )
        ours = LanguageModel.from_pretrained(trained)
        for sentence in ("w1 w8 w15", "w3"):
            found = hub.score(sentence)
            expected = ours.score(sentence).log_probs[:-1]  # stock scores no end either
            assert found["positional_scores"].numpy() == pytest.approx(expected, abs=1e-5)
        assert hub.sample("w1 w8", beam=2).startswith("w1 w8")


@pytest.mark.parametrize("mode", ["eos", "complete", "none"])
@pytest.mark.parametrize("flag", ["", "--add-bos-token", CARRY])
def test_the_same_as_eval_lm(data: Path, tmp_path: Path, capsys: Any, mode: str, flag: str) -> None:
    """Whatever changes what a model reads: its score of a split is that of fairseq-eval-lm.

    A sentence at a time is ``--sample-break-mode eos``; with a carried state all are one block.
    """
    if flag == CARRY and mode != "none":
        pytest.skip("a carried state crosses the ends of sentences")
    flags = [flag] if flag else []
    train(
        data, tmp_path, *flags, max_epoch=1, sample_break_mode=mode, initial_table="random",
        lr=0.05,
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoint_last.pt"
    carried = [] if mode == "eos" else [CARRY]
    text = ["--sample-break-mode", mode, "--tokens-per-sample", 5000, "--max-tokens", 5000]
    expected = eval_lm(data, checkpoint, "--gen-subset", "test", *text, *flags)
    found = json.loads(
        output(
            capsys,
            "score",
            checkpoint,
            "--data",
            data,
            "--split",
            "test",
            "--format",
            "json",
            *carried,
        )  # fmt: skip
    )
    assert -found["logprob"] / found["words"] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", ["flags", "reallocate", "rescore", "score"])
def test_a_missing_fairseq_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq_lightrnn.commands.start.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"^lightrnn-{name}: fairseq is not installed: pip "):
        getattr(start, name)()


def test_every_command_of_the_package_starts() -> None:
    text = (Path(__file__).parent.parent / "setup.py").read_text()
    found = re.findall(r'"(lightrnn-[a-z]+) = ([a-z_.]+):([a-z]+)"', text)
    assert len(found) == 8
    for _, module, function in found:
        assert callable(getattr(importlib.import_module(module), function))
