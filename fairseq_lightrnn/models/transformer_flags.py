"""Flags of fairseq's transformers as flat dataclasses, which argparse and hydra read alike."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

from argparse import Namespace
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import II

from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models.flags import TableConfig, preset
from fairseq_lightrnn.models.source import SourceTableConfig

__all__ = ["IwsltConfig", "TransformerLMConfig", "TransformerMTConfig", "transformer_config"]

# What a table takes the place of, and what to do instead.
_REFUSED = {
    "share_all_embeddings": "share the target's vectors with --source-table shared and "
    "--share-decoder-input-output-embed",
    "adaptive_softmax_cutoff": "a component softmax is no adaptive one; leave the flag out",
    "adaptive_input": "component vectors are no adaptive input; leave the flag out",
    "tie_adaptive_weights": "component vectors are no adaptive input; leave the flag out",
    "decoder_embed_path": "component vectors belong to no single word; leave the flag out",
    "base_layers": "decoders with a word table have no BASE layers; leave the flag out",
    "character_embeddings": "words are read by their components; leave the flag out",
}
# Sizes of the decoder that are the encoder's, or its embeddings', unless flags say otherwise.
_FOLLOW = {
    "decoder_embed_dim": "encoder_embed_dim",
    "decoder_ffn_embed_dim": "encoder_ffn_embed_dim",
    "decoder_input_dim": "decoder_embed_dim",
    "decoder_output_dim": "decoder_embed_dim",
}
_WIDTH_HELP = "width of the {} component vectors (default: --decoder-embed-dim)"


def _flat_fields(config: type[Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Returns the fields of a dataclass of dataclasses, those of inner ones with a prefix."""
    found: list[tuple[str, Any, Any]] = []
    for flag in fields(config):
        name, kind = prefix + flag.name, flag.type
        if flag.name == "_name":
            continue
        if isinstance(kind, type) and issubclass(kind, FairseqDataclass):
            found += _flat_fields(kind, f"{name}_")
        elif name in _FOLLOW:
            help_text = flag.metadata.get("help", f"width of {name}")
            metadata = {"help": f"{help_text} (default: that of {_FOLLOW[name]})"}
            found.append((name, Optional[int], field(default=None, metadata=metadata)))
        elif name.endswith("layers_to_keep"):
            found.append((name, Optional[str], field(default=None, metadata=flag.metadata)))
        elif name in ("max_source_positions", "max_target_positions"):
            found.append((name, Optional[int], II(f"task.{name}")))
        else:
            found.append((name, kind, _copy(flag)))
    return found


def _copy(flag: "Field[Any]") -> Any:
    if flag.default_factory is not MISSING:
        return field(default_factory=flag.default_factory, metadata=flag.metadata)
    return field(default=flag.default, metadata=flag.metadata)


_FlatTransformer = make_dataclass(
    "_FlatTransformer", _flat_fields(TransformerConfig), bases=(FairseqDataclass,)
)


@dataclass
class TransformerMTConfig(_FlatTransformer, TableConfig, SourceTableConfig):  # type: ignore[misc,valid-type]
    """Flags of ``lightrnn_transformer``: fairseq's, flat, and those of the word table."""


IwsltConfig = preset(
    TransformerMTConfig,
    "IwsltConfig",
    encoder_embed_dim=512,
    encoder_ffn_embed_dim=1024,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
)


@dataclass
class TransformerLMConfig(TransformerLanguageModelConfig, TableConfig):
    """Flags of ``lightrnn_transformer_lm``: fairseq's and those of the word table."""

    decoder_input_dim: Optional[int] = field(  # type: ignore[assignment]
        default=None, metadata={"help": _WIDTH_HELP.format("input")}
    )
    decoder_output_dim: Optional[int] = field(  # type: ignore[assignment]
        default=None, metadata={"help": _WIDTH_HELP.format("output")}
    )


def transformer_config(cfg: Any) -> TransformerConfig:
    """Returns fairseq's configuration of a transformer from flat flags.

    Raises:
        UsageError: if a flag has no meaning with a word table.
    """
    flags = {name: getattr(cfg, name) for name in _names(cfg)}
    for name, advice in _REFUSED.items():
        if flags.get(name):
            raise UsageError(f"--{name.replace('_', '-')}: {advice}")
    for name, other in _FOLLOW.items():
        if flags.get(name) is None and other in flags:
            flags[name] = flags[other]
    for name in ("encoder_embed_dim", "decoder_embed_dim"):
        if name in flags and flags[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {flags[name]}: must be at least 1")
    for side in ("encoder", "decoder"):
        kept = flags.get(f"{side}_layers_to_keep")
        if kept:
            flags[f"{side}_layers"] = len(kept.split(","))
    if flags.get("max_target_positions") is None:
        beginning = bool(flags.get("add_bos_token"))  # is one more word of a text
        flags["max_target_positions"] = flags.get("tokens_per_sample", 1024) + beginning
    made = TransformerConfig.from_namespace(Namespace(**flags))
    if made.share_decoder_input_output_embed:
        _check_shared(made, flags.get("keep_input_table", False))
    return made


def _names(cfg: Any) -> list[str]:
    return list(cfg) if hasattr(cfg, "keys") else [flag.name for flag in fields(cfg)]


def _check_shared(cfg: TransformerConfig, keeps_input_table: bool) -> None:
    if cfg.decoder.output_dim != cfg.decoder.input_dim:
        raise UsageError(
            "--share-decoder-input-output-embed needs --decoder-output-dim "
            f"({cfg.decoder.output_dim}) equal to --decoder-embed-dim ({cfg.decoder.input_dim})"
        )
    if keeps_input_table:
        raise UsageError(
            "--share-decoder-input-output-embed and --keep-input-table: give one of them; rows and "
            "columns of two tables are of different words, and have nothing to share"
        )
