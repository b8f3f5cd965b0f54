"""Flags of the word table that all architectures have, and what they mean."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, NamedTuple, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import DictConfig, open_dict

from fairseq_lightrnn.core.table import check_shape, default_shape
from fairseq_lightrnn.errors import UsageError, usage_errors

__all__ = [
    "SMALL_VOCABULARY",
    "Regularisation",
    "TableConfig",
    "TableSettings",
    "check_numbers",
    "check_task",
    "further_files",
    "parse_regularisation",
    "parse_shape",
    "preset",
    "settle",
    "settled",
    "table_shape",
]

SMALL_VOCABULARY = 50_000
"""Words of a vocabulary, at most, in which each may have many numbers of its own by default."""
_FURTHER_TABLES = 3
_FFN_FACTOR = 4


@dataclass
class TableConfig(FairseqDataclass):
    table_shape: str = field(
        default="2d",
        metadata={
            "help": "sizes of the word table, such as 100x100, or how many components it has: 2d, "
            "rows and columns, nearly square; 3d, for very large vocabularies; 1d, an ordinary "
            "softmax. A file given as --initial-table has its own shape"
        },
    )
    word_dim: Optional[int] = field(
        default=None,
        metadata={
            "help": "numbers of every word's own: 0 for none, 1 for a bias, N for a bias and N-1 "
            "numbers that it is read and predicted by (default: none in the paper's models; "
            "otherwise 65, in translation 37, if the vocabulary has at most 50,000 words, and 1 if "
            "it has more or --further-tables is given)"
        },
    )
    further_tables: Optional[str] = field(
        default=None,
        metadata={
            "help": "read and predict words by their cells in further tables too: how many to make "
            "(random ones if --initial-table is random, otherwise each of what co-occurrence tells "
            "beyond those before it, and words after the first 100,000 as they are spelt), or "
            "table files, joined by commas (default: 3 in recommended models of more than 50,000 "
            "words without --word-dim, otherwise 0)"
        },
    )
    keep_input_table: bool = field(
        default=False,
        metadata={
            "help": "read words by the initial tables for good, so that reallocation moves them in "
            "the tables that predict them alone and unsettles nothing that was learnt of reading; "
            "words move in further tables only with it (default: on where a reallocation by the "
            "true loss can have it so, which is in models but the paper's whose input and output "
            "vectors are not shared)"
        },
    )
    output_ffn_dim: Optional[int] = field(
        default=None,
        metadata={
            "help": "units of a feed-forward layer that hidden states pass before they predict "
            "anything, with a connection around it; 0 for none (default: none in the paper's "
            "models, otherwise four times the width)"
        },
    )


class TableSettings(NamedTuple):
    """What the flags of :class:`TableConfig` come to for a vocabulary.

    Attributes:
        shape: of the table.
        word_dim: numbers of every word's own, the bias included.
        further_tables: how many.
        output_ffn_dim: units of the feed-forward layer; 0 for none.
        keep_input_table: whether words are read by a table of their own.
    """

    shape: tuple[int, ...]
    word_dim: int
    further_tables: int
    output_ffn_dim: int
    keep_input_table: bool


def preset(config: type[Any], name: str, **defaults: Any) -> type[Any]:
    """Returns a configuration with other defaults, which argparse and hydra both know.

    Args:
        config: a dataclass of flags.
        name: of the new class.
        defaults: of some of its fields.
    """
    changed = [
        (flag.name, flag.type, field(default=defaults[flag.name], metadata=flag.metadata))
        for flag in fields(config)
        if flag.name in defaults
    ]
    if len(changed) != len(defaults):
        raise ValueError(f"{name}: {config.__name__} has not all of {', '.join(defaults)}")
    return make_dataclass(name, changed, bases=(config,))


def parse_shape(text: str, num_words: int) -> tuple[int, ...]:
    """Reads a shape for so many words, such as ``100x100`` or ``2d``."""
    text = text.strip().lower().replace("×", "x")
    with usage_errors(f"--table-shape {text}"):
        if text.endswith("d") and text[:-1].isdecimal():
            return default_shape(num_words, int(text[:-1]))
        try:
            sizes = [int(size) for size in text.split("x")]
        except ValueError:
            raise UsageError(
                f"--table-shape {text}: expected sizes joined by x, such as 100x100, or 1d, 2d, 3d"
            ) from None
        return check_shape(sizes, num_words)


def table_shape(cfg: Any, num_words: int) -> tuple[int, ...]:
    """Returns the shape that ``--table-shape`` asks for."""
    return parse_shape(cfg.table_shape, num_words)


def further_files(cfg: Any) -> list[str]:
    """Returns the files that ``--further-tables`` names, if any."""
    value = "0" if cfg.further_tables is None else str(cfg.further_tables).strip()
    return [] if value.isdecimal() else [file.strip() for file in value.split(",")]


def settled(cfg: Any, num_words: int, own_numbers: int | None, width: int) -> TableSettings:
    """Says what flags come to, with the defaults of an architecture for a vocabulary.

    Args:
        cfg: a :class:`TableConfig`.
        num_words: V.
        own_numbers: of the architecture: numbers of a word's own, besides its bias, that it gives
            words of a small vocabulary; None in the paper's models, which give words nothing.
        width: of the hidden states.

    Raises:
        UsageError: if a flag has no meaning.
    """
    shape = table_shape(cfg, num_words)
    word_dim, further, ffn_dim = 0, 0, 0
    if own_numbers is not None:
        ffn_dim = _FFN_FACTOR * width
        small, has_rows = num_words <= SMALL_VOCABULARY, len(shape) > 1
        if cfg.word_dim is None and cfg.further_tables is None and has_rows:
            word_dim, further = (1 + own_numbers, 0) if small else (1, _FURTHER_TABLES)
        elif has_rows:
            word_dim = 1
    if cfg.word_dim is not None:
        word_dim = cfg.word_dim
    if cfg.further_tables is not None:
        further = len(further_files(cfg)) or int(cfg.further_tables)
    if cfg.output_ffn_dim is not None:
        ffn_dim = cfg.output_ffn_dim
    for flag, value in (("--word-dim", word_dim), ("--output-ffn-dim", ffn_dim)):
        if value < 0:
            raise UsageError(f"{flag} {value}: must not be negative")
    if further and len(shape) == 1:
        raise UsageError(
            f"--further-tables {cfg.further_tables}: with --table-shape {cfg.table_shape} every "
            "word has vectors of its own; leave one of them out"
        )
    return TableSettings(shape, word_dim, further, ffn_dim, bool(cfg.keep_input_table))


def settle(cfg: Any, num_words: int, moving: bool = False) -> None:
    """Writes what flags come to into a model's configuration, for its checkpoints to keep.

    Args:
        cfg: the flags.
        num_words: V.
        moving: words are to be moved by the true loss, which is that of the new table only if
            words are read by one that stays: they are, where the model can.
    """
    model = ARCH_MODEL_REGISTRY.get(getattr(cfg, "_name", None) or getattr(cfg, "arch", None))
    if not hasattr(model, "table_settings"):
        return
    has_rows = len(table_shape(cfg, num_words)) > 1
    if moving and has_rows and model.can_keep_input_table(cfg):
        _update(cfg, {"keep_input_table": True})
    settings = model.table_settings(cfg, num_words)
    values: dict[str, Any] = {
        "table_shape": "x".join(map(str, settings.shape)),
        "word_dim": settings.word_dim,
        "output_ffn_dim": settings.output_ffn_dim,
    }
    if not further_files(cfg):
        values["further_tables"] = str(settings.further_tables)
    _update(cfg, values)


def _update(cfg: Any, values: dict[str, Any]) -> None:
    if isinstance(cfg, DictConfig):
        with open_dict(cfg):
            cfg.update(values)
    else:
        for name, value in values.items():
            setattr(cfg, name, value)


class Regularisation(NamedTuple):
    """What keeps a recurrent network from overfitting (arXiv 1708.02182); all 0 by default.

    Attributes:
        locked: each dropout has one mask for a text, shared over time.
        weight: dropout of the recurrent matrices.
        component: dropout of whole input vectors.
        activation: weight of the mean square of the outputs after dropout (AR).
        change: weight of the mean square of the change of the outputs between steps (TAR).
    """

    locked: bool = False
    weight: float = 0.0
    component: float = 0.0
    activation: float = 0.0
    change: float = 0.0


# The published values for Penn Treebank.
_AWD = Regularisation(True, 0.5, 0.1, 2.0, 1.0)
_REGULARISERS = ("weight", "component", "activation", "change")


def parse_regularisation(text: str | None) -> Regularisation:
    """Reads ``--regularise``, such as ``awd`` or ``awd,weight=0.3,change=0``.

    Raises:
        UsageError: if it has no such meaning.
    """
    if text is None:
        return Regularisation()
    flag = f"--regularise {text}"
    first, *overrides = (part.strip() for part in text.split(","))
    if first != "awd":
        raise UsageError(
            f"{flag}: expected awd, and perhaps other values: awd,weight=0.3,component=0.05"
        )
    values: dict[str, float] = {}
    for part in overrides:
        name, _, value = part.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = -1.0
        limit = 1.0 if name in ("weight", "component") else float("inf")
        if name not in _REGULARISERS or not 0 <= values[name] < limit:
            raise UsageError(
                f"{flag}: {part!r} is none of weight=P, component=P (probabilities below 1), "
                "activation=W, change=W (weights of at least 0)"
            )
    return _AWD._replace(**values)  # type: ignore[arg-type]


def check_numbers(cfg: Any, sizes: tuple[str, ...], dropouts: tuple[str, ...] = ()) -> None:
    """Refuses sizes below 1 and dropouts that are no probability."""
    for name in sizes:
        if getattr(cfg, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least 1")
    for name in dropouts:
        value = getattr(cfg, name)
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 0 and below 1")


def check_task(task: Any, architecture: str, name: str) -> None:
    """Refuses a task that is not the one that an architecture is for."""
    if architecture not in getattr(task, "architectures", ()):
        raise UsageError(
            f"--arch {architecture} needs a task that seats words in a table: use --task {name}; "
            "models with and without a word table cannot be in one ensemble"
        )
