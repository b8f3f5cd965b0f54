"""Keeps README.md and the pages of examples true: their commands, flags, files and figures."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from fairseq_run import TASK, TRANSLATION, run, write_pairs, write_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(ROOT.glob("examples/*/README.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
GONE = FLAG.findall(
    "--num-components --composition --word-bias --input-residual-dim --output-residual-dim "
    "--share-residuals --frequent-words --frequent-residual-dim --share-component-vectors "
    "--dropout-between --dropout-hidden --locked-dropout --component-dropout --weight-dropout "
    "--activation-regularisation --temporal-activation-regularisation --table-seed "
    "--reallocate-interval --reallocation-margin --reallocation-row-weight --reallocation-regather "
    "--source-table-shape --initial-source-table"
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """Splits a block into commands; a pipe gives the one before it as input to the next."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def fairseq_commands() -> list[list[str]]:
    found = [command for block in blocks("bash") for command in commands(block)]
    return [command for command in found if any(part.startswith("fairseq-") for part in command)]


def test_fairseq_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, (split, sentences) in enumerate({"train": 400, "valid": 30, "test": 30}.items()):
        write_text(tmp_path / f"{split}.txt", sentences, seed)
        write_pairs(tmp_path, split, sentences // 4, seed)
        for ours, theirs in (("src", "en"), ("tgt", "de")):
            (tmp_path / f"{split}.{ours}").rename(tmp_path / f"{split}.{theirs}")
    names = []
    for command in fairseq_commands():
        if "|" in command:
            pipe = command.index("|")
            monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(command[1:pipe]) + "\n"))
            command = command[pipe + 1 :]
        name, *arguments = command
        names.append(name)
        arguments = [TASK[1] if part == "fairseq_lightrnn" else part for part in arguments]
        if "--max-epoch" in arguments:
            arguments[arguments.index("--max-epoch") + 1] = "1"
        run(name.removeprefix("fairseq-"), *arguments)
    assert names == [
        "fairseq-preprocess",
        "fairseq-train",
        "fairseq-eval-lm",
        "fairseq-interactive",
        "fairseq-preprocess",
        "fairseq-train",
        "fairseq-generate",
    ]
    assert (tmp_path / "checkpoints" / "word_table.txt").exists()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("H-0") for line in lines)
    assert "BLEU = " in lines[-1]
    (block,) = (block for block in blocks("python") if "from_pretrained" in block)
    exec(block, {})
    perplexity, words = capsys.readouterr().out.splitlines()
    assert float(perplexity) > 1
    assert len(eval(words)) == 5


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("python") if "WordTable" in block)
    scope: dict[str, object] = {}
    exec(block, scope)
    line = next(line for line in block.splitlines() if "coordinates_of" in line)
    expression, shown = line.split("#")
    assert repr(eval(expression, scope)) == shown.strip().replace("], [", "],\n       [")
    assert scope["shape"] == (3, 2)
    assert (tmp_path / "table.txt").exists()


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for script in re.findall(r"(?:bash|python) ((?:scripts|examples)/\S+\.(?:sh|py))", text):
        assert (ROOT / script).is_file(), script
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    if page in PAGES:
        results = set(re.findall(r"`([a-z0-9-]+\.(?:jsonl?|png|svg))`", text)) - {"weights.json"}
        assert [name for name in results if not (page.parent / name).is_file()] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_named_are_installed(page: Path) -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    installed = set(re.findall(r'"(lightrnn-[a-z]+) = ', setup))
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks("bash", text))
    named = set(re.findall(r"(?:^|\| )(lightrnn-[a-z]+)", lines, re.MULTILINE))
    if page.parent == ROOT:
        named |= set(re.findall(r"(?:`|\$\()(lightrnn-[a-z]+)", text))
    assert named <= installed


def known_flags() -> set[str]:
    """All flags of fairseq with the plugin, of the plugin's commands and of the scripts."""
    from fairseq import options

    known = set(options.get_preprocessing_parser()._option_string_actions)
    known |= set(options.get_generation_parser()._option_string_actions)
    known |= set(options.get_interactive_generation_parser()._option_string_actions)
    known |= set(options.get_eval_lm_parser()._option_string_actions)
    for task, arch, scheduler in (
        (TASK, "lightrnn_lm", "reduce_lr_on_plateau"),
        (TASK, "lightrnn_transformer_lm", "tri_stage"),
        (TRANSLATION, "lightrnn_translation", "inverse_sqrt"),
        (TRANSLATION, "lightrnn_transformer", "fixed"),
    ):
        argv = ["fairseq-train", "data", *task, "--arch", arch, "--lr-scheduler", scheduler]
        argv += ["--criterion", "two_component_cross_entropy", "--optimizer"]
        for optimizer in ("nt_asgd", "adam"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [*argv, optimizer])
                parser = options.get_training_parser()
                options.parse_args_and_arch(parser)
            known |= set(parser._option_string_actions)
    for code in [*ROOT.glob("scripts/*.py"), *ROOT.glob("fairseq_lightrnn/commands/*.py")]:
        known |= set(re.findall(r'"(--[a-z0-9-]+)"', code.read_text(encoding="utf-8")))
    for script in [*ROOT.glob("scripts/*.sh"), *ROOT.glob("examples/*/*.py")]:
        known |= set(FLAG.findall(script.read_text(encoding="utf-8")))
    return known - set(GONE)


def test_flags_that_are_named_exist() -> None:
    known = known_flags()
    for page in DOCUMENTS:
        text = page.read_text(encoding="utf-8")
        code = "\n".join([*blocks("bash", text), *re.findall(r"`([^`\n]+)`", text)])
        assert sorted(set(FLAG.findall(code)) - known) == [], page
    assert len(set(FLAG.findall(README))) > 15


def test_flags_that_are_gone_are_named_nowhere() -> None:
    gone = re.compile(rf"(?<![\w-])(?:{'|'.join(GONE)})(?![\w-])|lightrnn_lm_(?:ptb|wikitext2)")
    texts = [*DOCUMENTS, *(path for path in ROOT.glob("scripts/**/*") if path.is_file())]
    texts += [path for path in ROOT.glob("examples/**/*") if path.is_file()]
    for path in texts:
        if path.suffix in (".md", ".sh", ".py", ".json", ".jsonl"):
            assert gone.findall(path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    ("figures", "num_words", "rungs"),
    [
        ("ladder", 10_008, 11),
        ("ladder-wikitext-2", 33_280, 1),
        ("ladder-wikitext-2-1M", 33_280, 2),
        ("ladder-wikitext-2-3M", 33_280, 2),
    ],
)
def test_rungs_of_the_ladder_have_as_many_parameters_as_its_figures_say(
    figures: str, num_words: int, rungs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's table is that of these figures (test_results_page)."""
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY

    from fairseq_lightrnn import register  # noqa: F401
    from fairseq_lightrnn.models.flags import settle
    from fairseq_lightrnn.models.lightrnn_lm import build_decoder

    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmark_ladder import model_flags

    report = json.loads((ROOT / f"examples/language_model/{figures}.json").read_text())
    assert len(report["systems"]) == rungs
    for rung, runs in report["systems"].items():
        flags = model_flags(rung, report["settings"]["epochs"])
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        architecture = given.pop("--arch")
        config = MODEL_DATACLASS_REGISTRY[architecture]()
        for flag, value in given.items():
            name = flag.removeprefix("--").replace("-", "_")
            if hasattr(config, name):
                setattr(config, name, value)
        model = ARCH_MODEL_REGISTRY[architecture]
        # Words that move are read by a table that stays, which has vectors of its own.
        config._name = architecture
        settle(config, num_words, moving="--reallocate-epochs" in given)
        with torch.device("meta"):
            settings = model.table_settings(config, num_words)
            decoder = build_decoder(config, settings, num_words, model.conditioner)
        count = sum(parameter.numel() for parameter in decoder.parameters())
        assert {run["parameters"] for run in runs.values()} == {count}, rung
