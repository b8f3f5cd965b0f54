"""Flags of the word table that all architectures have, and what they mean."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_lightrnn.components import ComponentEmbedding, WordEmbedding
from fairseq_lightrnn.errors import UsageError, usage_errors
from fairseq_lightrnn.frequent_words import FrequentSize
from fairseq_lightrnn.further_tables import FurtherTables
from fairseq_lightrnn.table_lookup import TableLookup
from fairseq_lightrnn.word_table import check_shape, default_shape

__all__ = [
    "SourceTableConfig",
    "TableConfig",
    "check_input_table",
    "check_numbers",
    "check_task",
    "frequent_size",
    "further_count",
    "further_files",
    "further_tables",
    "parse_shape",
    "query_sizes",
    "shared_residuals",
    "source_embedding",
    "table_shape",
]


@dataclass
class TableConfig(FairseqDataclass):
    num_components: int = field(
        default=2,
        metadata={
            "help": "components of the word table: 2 are rows and columns, 1 is an ordinary "
            "softmax, 3 or more shrink very large vocabularies further"
        },
    )
    table_shape: Optional[str] = field(
        default=None,
        metadata={
            "help": "sizes of the word table, such as 100x100 (default: the smallest that is "
            "nearly square, or that of the --initial-table file)"
        },
    )
    word_bias: bool = field(
        default=False, metadata={"help": "give every word a bias of its own: 1 number a word"}
    )
    input_residual_dim: int = field(
        default=0, metadata={"help": "numbers of its own that every word adds to its input vector"}
    )
    output_residual_dim: int = field(
        default=0, metadata={"help": "numbers of its own with which every word is predicted"}
    )
    keep_input_table: bool = field(
        default=False,
        metadata={
            "help": "read words by the initial table for good, so that reallocation moves them in "
            "the table that predicts them alone and unsettles nothing that was learnt of reading"
        },
    )
    share_residuals: bool = field(
        default=False,
        metadata={
            "help": "use the same numbers of words' own for input and output; needs "
            "--input-residual-dim equal to --output-residual-dim"
        },
    )
    frequent_words: int = field(
        default=0,
        metadata={
            "help": "give that many words, the first of the dictionary (fairseq sorts it by "
            "count), --frequent-residual-dim further numbers of their own"
        },
    )
    frequent_residual_dim: int = field(
        default=64,
        metadata={
            "help": "further numbers of each of the --frequent-words, as many for input as for "
            "output"
        },
    )
    further_tables: str = field(
        default="0",
        metadata={
            "help": "read and predict words by their cells in further tables too, which are never "
            "reallocated: how many to make (random ones if --initial-table is random, otherwise "
            "each of what co-occurrence tells beyond those before it), or table files, joined by "
            "commas; of the target's words, where there is a source. A checkpoint has them: to go "
            "on from it, their number is enough"
        },
    )
    output_ffn_dim: int = field(
        default=0,
        metadata={
            "help": "units of a feed-forward layer that outputs pass before they predict anything, "
            "with a connection around it (four times their width is a good size); 0 for none"
        },
    )


@dataclass
class SourceTableConfig(TableConfig):
    source_table: ChoiceEnum(["none", "own", "shared"]) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "how source words are embedded: none gives each a vector of its own; own seats "
            "them in a word table of theirs; shared uses table and input vectors of the target, "
            "for a joined dictionary"
        },
    )
    source_table_shape: Optional[str] = field(
        default=None,
        metadata={
            "help": "sizes of the table of --source-table own, such as 100x100 (default: the "
            "smallest that is nearly square, or that of the --initial-source-table file)"
        },
    )


def parse_shape(text: str, flag: str = "--table-shape") -> tuple[int, ...]:
    """Reads the value of a flag such as ``--table-shape``, for example ``100x100``."""
    try:
        return tuple(int(size) for size in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise UsageError(f"{flag} {text}: expected sizes joined by x, such as 100x100") from None


def table_shape(cfg: Any, num_words: int, flag: str = "--table-shape") -> tuple[int, ...]:
    """Returns the shape that a flag and ``--num-components`` ask for.

    Args:
        cfg: the model's configuration.
        num_words: V.
        flag: ``--table-shape`` or ``--source-table-shape``.

    Raises:
        UsageError: if they contradict each other or the vocabulary.
    """
    value = getattr(cfg, flag[2:].replace("-", "_"))
    if value is None:
        with usage_errors("--num-components"):
            return default_shape(num_words, cfg.num_components)
    with usage_errors(f"{flag} {value}"):
        shape = check_shape(parse_shape(value, flag), num_words)
    if len(shape) != cfg.num_components:
        raise UsageError(
            f"{flag} {value} has {len(shape)} components, --num-components is "
            f"{cfg.num_components}; make them equal"
        )
    return shape


def frequent_size(cfg: Any, num_words: int) -> FrequentSize | None:
    """Returns what ``--frequent-words`` and ``--frequent-residual-dim`` ask for.

    Raises:
        UsageError: if there are not so many words.
    """
    if cfg.frequent_words == 0:
        return None
    if not 0 < cfg.frequent_words <= num_words:
        raise UsageError(
            f"--frequent-words {cfg.frequent_words}: the dictionary has {num_words} words; give "
            "from 0 to that many"
        )
    return FrequentSize(cfg.frequent_words, cfg.frequent_residual_dim)


def shared_residuals(cfg: Any, embedding: ComponentEmbedding) -> ComponentEmbedding | None:
    """Returns the input vectors whose residuals the output shares, if ``--share-residuals`` is on.

    Raises:
        UsageError: if there are none, or they differ in size.
    """
    if not cfg.share_residuals:
        return None
    if cfg.input_residual_dim != cfg.output_residual_dim:
        raise UsageError(
            f"--share-residuals needs --input-residual-dim ({cfg.input_residual_dim}) equal to "
            f"--output-residual-dim ({cfg.output_residual_dim})"
        )
    if embedding.residual is None and embedding.frequent is None:
        raise UsageError(
            "--share-residuals: there are none; give --input-residual-dim and "
            "--output-residual-dim, or --frequent-words"
        )
    return embedding


def further_files(cfg: Any) -> list[str]:
    """Returns the files that ``--further-tables`` names, if any."""
    value = str(getattr(cfg, "further_tables", 0)).strip()
    return [] if value.isdecimal() else [file.strip() for file in value.split(",")]


def further_count(cfg: Any) -> int:
    """Returns how many tables ``--further-tables`` asks for."""
    return len(further_files(cfg)) or int(getattr(cfg, "further_tables", 0))


def further_tables(cfg: Any, num_words: int, shape: tuple[int, ...]) -> FurtherTables | None:
    """Returns the tables that ``--further-tables`` asks for, not yet seated.

    Raises:
        UsageError: if there can be none.
    """
    count = further_count(cfg)
    if count == 0:
        return None
    if len(shape) == 1:
        raise UsageError(
            f"--further-tables {cfg.further_tables}: with --num-components 1 every word has "
            "vectors of its own; leave one of them out"
        )
    return FurtherTables(count, num_words, shape)


def query_sizes(cfg: Any, dim: int) -> tuple[int, int, int]:
    """Returns the widths of what words' residuals, further tables and frequent words' residuals
    are multiplied with.

    Args:
        cfg: the model's configuration.
        dim: the width of the output vectors.
    """
    frequent = cfg.frequent_residual_dim if cfg.frequent_words else 0
    further = dim if further_count(cfg) else 0
    return cfg.output_residual_dim, further, frequent


def check_numbers(cfg: Any, sizes: tuple[str, ...], dropouts: tuple[str, ...] = ()) -> None:
    """Refuses sizes below 1, negative residuals and dropouts that are no probability."""
    for name in (*sizes, "frequent_residual_dim"):
        if getattr(cfg, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least 1")
    for name in ("input_residual_dim", "output_residual_dim", "output_ffn_dim"):
        if getattr(cfg, name) < 0:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(cfg, name)}: must not be negative"
            )
    for name in dropouts:
        value = getattr(cfg, name)
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 0 and below 1")


def check_input_table(cfg: Any, flag: str, shared: bool) -> None:
    """Refuses a flag that has input and output share vectors of two tables."""
    if cfg.keep_input_table and shared:
        raise UsageError(
            f"--keep-input-table and {flag}: give one of them; rows and columns of two tables are "
            "of different words, and have nothing to share"
        )


def check_task(task: Any, architecture: str, name: str) -> None:
    """Refuses a task that is not the one that an architecture is for."""
    if architecture not in getattr(task, "architectures", ()):
        raise UsageError(
            f"--arch {architecture} needs a task that seats words in a table: use --task {name}"
        )


def source_embedding(
    cfg: Any,
    task: Any,
    dim: int,
    table: TableLookup,
    embedding: ComponentEmbedding,
) -> WordEmbedding | None:
    """Returns what ``--source-table`` embeds source words with, or None for ordinary vectors.

    Args:
        cfg: a :class:`SourceTableConfig`.
        task: knows the dictionaries.
        dim: the width of the encoder's input.
        table: the word table of the target.
        embedding: the input vectors of the target.

    Raises:
        UsageError: if table and vectors cannot be shared, or a flag has no meaning.
    """
    source, target = task.source_dictionary, task.target_dictionary
    kind = str(cfg.source_table)
    if kind != "own" and cfg.source_table_shape is not None:
        raise UsageError(
            f"--source-table-shape {cfg.source_table_shape} belongs to --source-table own"
        )
    if kind == "own":
        shape = table_shape(cfg, len(source), "--source-table-shape")
        own = TableLookup(len(source), shape)
        frequent = frequent_size(cfg, len(source))
        vectors = ComponentEmbedding(shape, dim, own, cfg.input_residual_dim, frequent=frequent)
        return WordEmbedding(own, vectors, source.pad(), owns_table=True)
    if kind == "shared":
        if source.symbols != target.symbols:
            raise UsageError(
                f"--source-table shared: the dictionaries of {task.args.source_lang} "
                f"({len(source)} words) and {task.args.target_lang} ({len(target)} words) differ; "
                "preprocess with --joined-dictionary, or use --source-table own"
            )
        if embedding.weight.size(1) != dim:
            raise UsageError(
                f"--source-table shared: the encoder's vectors have width {dim}, the decoder's "
                f"{embedding.weight.size(1)}; make them equal"
            )
        return WordEmbedding(table, embedding, source.pad())
    return None
