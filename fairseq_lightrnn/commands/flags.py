"""``lightrnn-flags``: all flags of the plugin's tasks, architectures, criterion and optimiser.

``fairseq-train --task lightrnn_language_modeling --help`` prints none of them, since fairseq prints
its help before it has looked at ``--user-dir``. Here they are read from the dataclasses that define
them, so that what is printed is what is true.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fairseq_lightrnn.commands.run import command

__all__ = ["main", "markdown_page", "text_page", "user_dir"]

_SIZES = (10_000, 100_000)
_DEFAULT = re.compile(r"\s*\(default: (.*)\)$", re.DOTALL)
# Flags stand between backticks, which plain text goes without.
_ABOUT = (
    "`fairseq-train … --help` shows none of these flags, since fairseq prints its help before it "
    "looks at `--user-dir`. All other flags are fairseq's own, such as `--tokens-per-sample` of "
    "the tasks or `--lr`, and mean what they mean there."
)
_TRANSFORMER = (
    "Besides these the transformers take the flags of fairseq's `transformer_lm` and "
    "`transformer`, such as `--decoder-embed-dim`, and refuse those that a word table takes the "
    "place of, such as `--adaptive-input`."
)


class Flag(NamedTuple):
    """A flag of the command line.

    Attributes:
        name: with its dashes.
        kind: what its value may be; empty for a switch.
        default: in words where it depends on other flags.
        meaning: a sentence.
    """

    name: str
    kind: str
    default: str
    meaning: str


class Group(NamedTuple):
    """Flags that belong together.

    Attributes:
        title: what they belong to.
        about: which command lines may have them.
        flags: each of them.
    """

    title: str
    about: str
    flags: list[Flag]


class Architecture(NamedTuple):
    """An architecture and its own defaults.

    Attributes:
        name: the value of ``--arch``.
        about: what it is.
        defaults: flags that have other defaults than the flags' own.
        settled: what the flags of the word table come to by default, for a vocabulary of each of
            ``_SIZES``.
    """

    name: str
    about: str
    defaults: str
    settled: tuple[str, ...]


def user_dir() -> str:
    """Returns the folder to give to fairseq's ``--user-dir``."""
    return str(Path(__file__).resolve().parent.parent)


def _groups() -> list[Group]:
    """Reads the flags from the dataclasses that define them, each once."""
    from fairseq_lightrnn.criterions.two_component_cross_entropy import (
        TwoComponentCrossEntropyConfig,
    )
    from fairseq_lightrnn.models.flags import TableConfig
    from fairseq_lightrnn.models.lightrnn_lm import LSTMConfig
    from fairseq_lightrnn.models.source import SourceTableConfig
    from fairseq_lightrnn.models.transformer_flags import TransformerLMConfig
    from fairseq_lightrnn.optim.nt_asgd import NonmonotoneASGDConfig
    from fairseq_lightrnn.tasks.flags import TableTaskConfig
    from fairseq_lightrnn.tasks.lightrnn_language_modeling import LightRNNLanguageModelingConfig
    from fairseq_lightrnn.tasks.lightrnn_translation import LightRNNTranslationConfig

    lm, translation = "`--task lightrnn_language_modeling`", "`--task lightrnn_translation`"
    found = [
        ("Where words sit", "of both tasks", TableTaskConfig),
        ("Reading text", f"of {lm}", LightRNNLanguageModelingConfig),
        ("Text of the table", f"of {translation}", LightRNNTranslationConfig),
        ("What words are read and predicted by", "of all architectures", TableConfig),
        ("LSTM", "of architectures that are no transformers", LSTMConfig),
        ("Source words", "of architectures for translation", SourceTableConfig),
        ("Transformer", "of `lightrnn_transformer…`", TransformerLMConfig),
        ("Criterion", "of `--criterion two_component_cross_entropy`, the only one that our tasks "
         "train with: fairseq's `cross_entropy` and `label_smoothed_cross_entropy` become it",
         TwoComponentCrossEntropyConfig),
        ("Optimiser", "of `--optimizer nt_asgd`", NonmonotoneASGDConfig),
    ]  # fmt: skip
    return [Group(title, about, list(_own_flags(config))) for title, about, config in found]


def _own_flags(config: type[Any]) -> Iterator[Flag]:
    """Yields the flags that a dataclass adds to those that it inherits."""
    own = vars(config).get("__annotations__", {})
    for field in fields(config):
        default = _default(field)
        # What begins so is a flag of fairseq's that is known under the same name here.
        if field.name not in own or str(default).startswith("${"):
            continue
        meaning = " ".join(field.metadata["help"].split())
        told = _DEFAULT.search(meaning)
        if told is not None and default is None:
            shown, meaning = told[1], meaning[: told.start()]
        else:
            shown = _show(default)
        yield Flag(f"--{field.name.replace('_', '-')}", _kind(field.type), shown, meaning)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _kind(annotation: Any) -> str:
    """Names what may be given as a flag's value."""
    (kind,) = [one for one in get_args(annotation) if one is not type(None)] or [annotation]
    if kind is bool:
        return ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return {int: "N", float: "X", str: "TEXT"}.get(kind, str(kind))


def _architectures() -> list[Architecture]:
    """Reads what is registered with fairseq."""
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY

    from fairseq_lightrnn import register  # noqa: F401

    found = []
    # In the order of the modules' names, whichever was imported first.
    for name, model in sorted(ARCH_MODEL_REGISTRY.items(), key=lambda item: item[1].__module__):
        if not hasattr(model, "table_settings"):
            continue
        config = MODEL_DATACLASS_REGISTRY[name]
        settled = tuple(_settled(model, config, size) for size in _SIZES)
        about = " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())
        about = about.replace("``", "`")
        found.append(Architecture(name, about, _changed(config), settled))
    return found


def _changed(config: type[Any]) -> str:
    """Names the defaults by which a preset differs from the flags' own."""
    base = config.__mro__[1]
    if not base.__module__.startswith("fairseq_lightrnn"):
        return ""
    plain = {field.name: _default(field) for field in fields(base)}
    changed = [
        f"--{field.name.replace('_', '-')} {_show(_default(field))}"
        for field in fields(config)
        if field.name in plain and plain[field.name] != _default(field)
    ]
    return " ".join(changed)


def _settled(model: Any, config: type[Any], num_words: int) -> str:
    """Says what the flags of the table come to for a vocabulary."""
    settings = model.table_settings(config(), num_words)
    values = {
        "--word-dim": settings.word_dim,
        "--further-tables": settings.further_tables,
        "--output-ffn-dim": settings.output_ffn_dim,
    }
    return " ".join(f"{name} {value}" for name, value in values.items() if value)


def text_page() -> str:
    """Returns all flags as plain text, for a terminal."""
    lines = [
        f"--user-dir {user_dir()}",
        "    the folder of the plugin: give it to every command of fairseq's that is to know "
        "what follows",
        "",
        *textwrap.wrap(_ABOUT.replace("`", ""), 79),
        "",
        "Architectures (--arch), with the defaults that are their own:",
    ]
    for one in _architectures():
        lines += ["", f"  {one.name}"]
        lines += _wrapped(one.about.replace("`", ""))
        lines += _wrapped(one.defaults)
        for size, text in zip(_SIZES, one.settled, strict=True):
            lines += _wrapped(f"{size:,} words: {text or 'only rows and columns'}")
    for group in _groups():
        lines += ["", *textwrap.wrap(f"{group.title} ({group.about.replace('`', '')}):", 79)]
        for flag in group.flags:
            lines += ["", f"  {flag.name} {flag.kind}".rstrip()]
            lines += _wrapped(f"{flag.meaning} (default: {flag.default})")
    lines += ["", *textwrap.wrap(_TRANSFORMER.replace("`", ""), 79)]
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 79, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
    )


def markdown_page() -> str:
    """Returns all flags as a page of documentation, the same on every machine."""
    small, large = (f"{size:,} words" for size in _SIZES)
    lines = [
        "# Flags of fairseq_lightrnn",
        "",
        "This page is what `lightrnn-flags --markdown` prints. `--user-dir` takes the folder of "
        f"the plugin, which `lightrnn-flags --user-dir` prints. {_ABOUT}",
        "",
        "## Architectures",
        "",
        "The last columns say what the flags of the word table come to where they are not given, "
        "for vocabularies of two sizes.",
        "",
        f"| `--arch` | what it is | its own defaults | {small} | {large} |",
        "|---|---|---|---|---|",
    ]
    for one in _architectures():
        cells = [_code(one.name), one.about, *map(_code, (one.defaults, *one.settled))]
        lines.append(f"| {' | '.join(cells)} |")
    for group in _groups():
        lines += ["", f"## {group.title}", "", f"Flags {group.about}.", ""]
        lines += ["| flag | default | meaning |", "|---|---|---|"]
        for flag in group.flags:
            name = _code(f"{flag.name} {flag.kind}".rstrip())
            lines.append(f"| {name} | {_cell(flag.default)} | {_cell(flag.meaning)} |")
        if group.title == "Transformer":
            lines += ["", _TRANSFORMER]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return "`{}`".format(text.replace("|", "\\|")) if text else ""


def _cell(text: str) -> str:
    """Returns a sentence for a table of Markdown, flags in it as code."""
    marked = re.sub(r"(?<![\w`-])(--[a-z][a-z-]*[a-z])", r"`\1`", text)
    return marked.replace("|", "\\|")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightrnn-flags",
        description="Print all flags that the plugin adds to fairseq, and the path to give to "
        "--user-dir.",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--user-dir", action="store_true", help="print that path alone")
    only.add_argument("--markdown", action="store_true", help="print a page of Markdown")
    return parser.parse_args(arguments)


@command("lightrnn-flags", _parse)
def main(args: argparse.Namespace) -> None:
    """Prints what is asked for."""
    if args.user_dir:
        print(user_dir())
    else:
        print(markdown_page() if args.markdown else text_page(), end="")


if __name__ == "__main__":
    sys.exit(main())
