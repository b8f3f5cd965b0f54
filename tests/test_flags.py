"""Flags of models: what they mean, what they come to for a vocabulary, and presets of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq import options
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from tiny_translation import build as build_translation  # noqa: F401  (registers all models)

from fairseq_lightrnn.models.flags import (
    SMALL_VOCABULARY,
    Regularisation,
    TableConfig,
    TableSettings,
    check_numbers,
    check_task,
    further_files,
    parse_regularisation,
    parse_shape,
    preset,
    settle,
    settled,
)

SMALL, LARGE = SMALL_VOCABULARY, SMALL_VOCABULARY + 1
ARCHITECTURES = [
    "lightrnn_lm", "lightrnn_lm_500", "lightrnn_lm_1000", "lightrnn_lm_1500", "lightrnn_lm_gated",
    "lightrnn_transformer_lm", "lightrnn_translation", "lightrnn_translation_gated",
    "lightrnn_transformer", "lightrnn_transformer_iwslt_de_en",
]  # fmt: skip


class TestShapes:
    @pytest.mark.parametrize(
        ("text", "shape"),
        [
            ("2d", (10, 10)),
            ("1d", (100,)),
            ("3d", (5, 5, 4)),
            ("2D", (10, 10)),
            (" 10x10 ", (10, 10)),
            ("20X5", (20, 5)),
            ("20×5", (20, 5)),
            ("100", (100,)),
            ("4x5x5", (4, 5, 5)),
            ("11 x 10", (11, 10)),
        ],
    )
    def test_of_a_hundred_words(self, text: str, shape: tuple[int, ...]) -> None:
        assert parse_shape(text, 100) == shape

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("10", "--table-shape 10: "),
            ("9x10", "--table-shape 9x10: "),
            ("0d", "--table-shape 0d: "),
            ("0x100", "--table-shape 0x100: "),
            ("-5x-20", "--table-shape -5x-20: "),
            ("", "--table-shape : expected sizes joined by x, such as 100x100, or 1d, 2d, 3d"),
            ("x", "--table-shape x: expected sizes joined by x"),
            ("10by10", "--table-shape 10by10: expected sizes"),
            ("d", "--table-shape d: expected sizes"),
            ("2.5d", "--table-shape 2.5d: expected sizes"),
            ("-1d", "--table-shape -1d: expected sizes"),
            (
                "10000000000x10000000000",
                "--table-shape 10000000000x10000000000: a table of shape .* has "
                "100000000000000000000 cells, too many for 100 words; 10x10 would do",
            ),
        ],
    )
    def test_without_meaning(self, text: str, message: str) -> None:
        with pytest.raises(SystemExit, match=message):
            parse_shape(text, 100)


def flags(**values: Any) -> TableConfig:
    return TableConfig(**values)


class TestSettled:
    @pytest.mark.parametrize(
        ("values", "num_words", "expected"),
        [
            ({}, SMALL, (65, 0, 40)),
            ({}, LARGE, (1, 3, 40)),
            ({"word_dim": 0}, SMALL, (0, 0, 40)),
            ({"word_dim": 0}, LARGE, (0, 0, 40)),
            ({"word_dim": 9}, LARGE, (9, 0, 40)),
            ({"further_tables": "2"}, SMALL, (1, 2, 40)),
            ({"further_tables": "0"}, SMALL, (1, 0, 40)),
            ({"further_tables": "0"}, LARGE, (1, 0, 40)),
            ({"further_tables": "a.txt, b.txt"}, LARGE, (1, 2, 40)),
            ({"further_tables": "2", "word_dim": 5}, SMALL, (5, 2, 40)),
            ({"output_ffn_dim": 0}, SMALL, (65, 0, 0)),
            ({"output_ffn_dim": 7}, LARGE, (1, 3, 7)),
            ({"table_shape": "1d"}, SMALL, (0, 0, 40)),
            ({"table_shape": "1d"}, LARGE, (0, 0, 40)),
            ({"table_shape": "1d", "word_dim": 1}, SMALL, (1, 0, 40)),
            ({"table_shape": "3d"}, LARGE, (1, 3, 40)),
        ],
    )
    def test_recommended_models(
        self, values: dict[str, Any], num_words: int, expected: tuple[int, int, int]
    ) -> None:
        """Of 64 numbers of a word's own and hidden states of width 10."""
        found = settled(flags(**values), num_words, 64, 10)
        assert (found.word_dim, found.further_tables, found.output_ffn_dim) == expected

    @pytest.mark.parametrize("num_words", [SMALL, LARGE])
    def test_the_papers_models(self, num_words: int) -> None:
        """They give words nothing, unless flags say so."""
        plain = settled(flags(), num_words, None, 10)
        assert (plain.word_dim, plain.further_tables, plain.output_ffn_dim) == (0, 0, 0)
        assert settled(flags(word_dim=3), num_words, None, 10).word_dim == 3
        more = settled(flags(further_tables="2", output_ffn_dim=5), num_words, None, 10)
        assert (more.word_dim, more.further_tables, more.output_ffn_dim) == (0, 2, 5)

    def test_shape_and_input_table(self) -> None:
        found = settled(flags(table_shape="3d", keep_input_table=True), 100, None, 10)
        assert found == TableSettings((5, 5, 4), 0, 0, 0, True)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"word_dim": -1}, "--word-dim -1: must not be negative"),
            ({"output_ffn_dim": -1}, "--output-ffn-dim -1: must not be negative"),
            (
                {"table_shape": "1d", "further_tables": "2"},
                "--further-tables 2: with --table-shape 1d every word has vectors of its own",
            ),
            ({"table_shape": "3x3"}, "--table-shape 3x3: "),
        ],
    )
    def test_flags_without_meaning(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(SystemExit, match=message):
            settled(flags(**values), 100, None, 10)

    @pytest.mark.parametrize(
        ("value", "files"),
        [(None, []), ("0", []), ("00", []), ("2", []), (3, []), ("a.txt", ["a.txt"]),
         ("a.txt , b.txt", ["a.txt", "b.txt"]), ("", [""]), ("-1", ["-1"])],
    )  # fmt: skip
    def test_files_of_further_tables(self, value: Any, files: list[str]) -> None:
        assert further_files(SimpleNamespace(further_tables=value)) == files


class TestSettle:
    """Checkpoints keep what flags came to, whatever they would come to elsewhere."""

    def config(self, **values: Any) -> Any:
        return MODEL_DATACLASS_REGISTRY["lightrnn_lm_gated"](**values)

    @pytest.mark.parametrize("is_omega", [False, True])
    @pytest.mark.parametrize(
        ("num_words", "expected"),
        [(100, ("10x10", 65, "0", 800)), (LARGE, ("224x224", 1, "3", 800))],
    )
    def test_what_is_kept(self, num_words: int, expected: tuple[Any, ...], is_omega: bool) -> None:
        cfg = self.config()
        cfg._name = "lightrnn_lm_gated"
        if is_omega:
            cfg = OmegaConf.structured(cfg)
        settle(cfg, num_words)
        kept = cfg.table_shape, cfg.word_dim, cfg.further_tables, cfg.output_ffn_dim
        assert kept == expected
        before = MODEL_REGISTRY["lightrnn_lm_gated"].table_settings(cfg, num_words)
        settle(cfg, num_words)
        assert MODEL_REGISTRY["lightrnn_lm_gated"].table_settings(cfg, num_words) == before

    def test_files_stay(self) -> None:
        cfg = self.config(further_tables="a.txt,b.txt")
        cfg._name = "lightrnn_lm_gated"
        settle(cfg, 100)
        assert (cfg.further_tables, cfg.word_dim) == ("a.txt,b.txt", 1)

    def test_other_models_are_left_alone(self) -> None:
        cfg = SimpleNamespace(_name="transformer_lm", table_shape="2d")
        settle(cfg, 100)
        assert vars(cfg) == {"_name": "transformer_lm", "table_shape": "2d"}


class TestRegularisation:
    def test_none(self) -> None:
        assert parse_regularisation(None) == Regularisation(False, 0.0, 0.0, 0.0, 0.0)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("awd", (True, 0.5, 0.1, 2.0, 1.0)),
            ("awd,weight=0.3", (True, 0.3, 0.1, 2.0, 1.0)),
            ("awd, component=0 , change=0", (True, 0.5, 0.0, 2.0, 0.0)),
            ("awd,weight=0,component=0,activation=3,change=1.5", (True, 0.0, 0.0, 3.0, 1.5)),
        ],
    )
    def test_values(self, text: str, expected: tuple[Any, ...]) -> None:
        assert parse_regularisation(text) == Regularisation(*expected)

    @pytest.mark.parametrize("text", ["", "AWD", "weight=0.3", "lstm,weight=0.3"])
    def test_no_preset(self, text: str) -> None:
        with pytest.raises(SystemExit, match=f"--regularise {text}: expected awd, and perhaps"):
            parse_regularisation(text)

    @pytest.mark.parametrize("name", ["component", "weight"])
    @pytest.mark.parametrize("value", ["-0.1", "1.0", "nan", "", "much"])
    def test_rates_that_are_none(self, name: str, value: str) -> None:
        message = f"--regularise awd,{name}={value}: '{name}={value}' is none of weight=P"
        with pytest.raises(SystemExit, match=message):
            parse_regularisation(f"awd,{name}={value}")

    @pytest.mark.parametrize("name", ["activation", "change"])
    @pytest.mark.parametrize("value", ["-0.1", "nan", "inf", ""])
    def test_weights_that_are_none(self, name: str, value: str) -> None:
        with pytest.raises(SystemExit, match=f"'{name}={value}' is none of"):
            parse_regularisation(f"awd,{name}={value}")

    @pytest.mark.parametrize("part", ["locked=1", "dropout=0.1", "weight", "", "weight=1=2"])
    def test_other_names(self, part: str) -> None:
        with pytest.raises(SystemExit, match=f"'{part}' is none of weight=P, component=P"):
            parse_regularisation(f"awd,{part}")


@dataclass
class Flags(FairseqDataclass):
    width: int = field(default=3, metadata={"help": "how wide"})
    depth: int = field(default=1, metadata={"help": "how deep"})
    kind: str = field(default="a", metadata={"help": "of what kind"})


class TestPresets:
    def test_defaults(self) -> None:
        made = preset(Flags, "Deep", depth=4, kind="b")
        assert (made().width, made().depth, made().kind) == (3, 4, "b")
        assert made(depth=2).depth == 2
        assert (Flags().depth, made.__name__) == (1, "Deep")
        assert issubclass(made, Flags)

    def test_help_and_order_stay(self) -> None:
        made = fields(preset(Flags, "Deep", depth=4))
        assert [flag.name for flag in made] == [flag.name for flag in fields(Flags)]
        assert [flag.metadata for flag in made] == [flag.metadata for flag in fields(Flags)]

    def test_unknown_flags(self) -> None:
        with pytest.raises(ValueError, match="Deep: Flags has not all of depth, height"):
            preset(Flags, "Deep", depth=4, height=5)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_argparse_and_hydra_agree(self, architecture: str) -> None:
        """Of every architecture: a command's defaults are the dataclass's, and hydra's."""
        config = MODEL_DATACLASS_REGISTRY[architecture]()
        parser = options.get_training_parser()
        task = "language_modeling" if "_lm" in architecture else "translation"
        line = ["data", "--arch", architecture, "--task", task]
        args = options.parse_args_and_arch(parser, line)
        of_argparse = convert_namespace_to_omegaconf(args).model
        of_hydra = ConfigStore.instance().repo["model"][f"{architecture}.yaml"].node
        assert of_argparse._name == of_hydra._name == architecture
        for flag in fields(config):
            default = getattr(config, flag.name)
            if flag.name != "_name" and not str(default).startswith("${"):
                assert _plain(of_argparse[flag.name]) == _plain(default), flag.name
                assert _plain(of_hydra[flag.name]) == _plain(default), flag.name


def _plain(value: Any) -> Any:
    """A flag's value, whichever of argparse, hydra and dataclasses it comes from."""
    return value if isinstance(value, int | float) else str(getattr(value, "value", value))


def test_numbers_that_are_none() -> None:
    cfg = SimpleNamespace(size=1, zero=0, rate=0.5, whole=1.0, none=None, not_a_number=float("nan"))
    check_numbers(cfg, ("size",), ("rate", "none"))
    with pytest.raises(SystemExit, match="--zero 0: must be at least 1"):
        check_numbers(cfg, ("size", "zero"))
    for name in ("whole", "not_a_number"):
        flag = name.replace("_", "-")
        with pytest.raises(SystemExit, match=f"--{flag} .*: must be at least 0 and below 1"):
            check_numbers(cfg, (), (name,))


def test_another_task() -> None:
    check_task(SimpleNamespace(architectures=("a", "b")), "b", "task_b")
    for job in (SimpleNamespace(architectures=("a",)), object()):
        with pytest.raises(SystemExit, match="--arch b needs a task that seats .* --task task_b"):
            check_task(job, "b", "task_b")
