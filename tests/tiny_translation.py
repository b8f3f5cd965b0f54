"""Small random translation models of every architecture, in double precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from torch import Tensor

from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.models import lightrnn_transformer, lightrnn_translation  # noqa: F401

ARCHITECTURES = {
    "recurrent": "lightrnn_translation",
    "gated": "lightrnn_translation_gated",
    "transformer": "lightrnn_transformer",
}
DECODERS = list(ARCHITECTURES)
# (words, shape): full and part-filled tables of one, two and three components
TABLES = [(9, (9,)), (12, (3, 4)), (10, (3, 4)), (17, (2, 3, 4))]
CASES = [(decoder, words, shape) for decoder in DECODERS for words, shape in TABLES]


def dictionary(words: int, letter: str = "w") -> Dictionary:
    """A dictionary of so many words, fairseq's four symbols among them."""
    result = Dictionary()
    for number in range(words - len(result)):
        result.add_symbol(f"{letter}{number}")
    return result


def task(source: Dictionary, target: Dictionary, **values: Any) -> Any:
    """As much of a task as a model needs."""
    defaults = {
        "max_source_positions": 64, "max_target_positions": 64, "left_pad_source": True,
        "source_lang": "src", "target_lang": "tgt",
    }  # fmt: skip
    return SimpleNamespace(
        source_dictionary=source,
        target_dictionary=target,
        architectures=("lightrnn_translation", "lightrnn_transformer"),
        args=SimpleNamespace(**{**defaults, **values}),
    )


def build(
    decoder: str,
    words: int,
    shape: tuple[int, ...],
    extras: bool = True,
    source: Dictionary | None = None,
    **flags: Any,
) -> Any:
    """A random model and tables, with what words can have of their own; and an FFN."""
    values: dict[str, Any] = {
        "table_shape": "x".join(map(str, shape)), "dropout": 0.0, "word_dim": 3 * extras,
        "further_tables": str(2 * extras * (len(shape) > 1)), "output_ffn_dim": 7 * extras,
        "keep_input_table": extras and decoder != "recurrent",
    }  # fmt: skip
    if decoder == "transformer":
        sizes = {"embed_dim": 8, "ffn_embed_dim": 6, "layers": 2, "attention_heads": 2}
        values |= {f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in sizes.items()}
        values |= {"max_source_positions": 64, "max_target_positions": 64}
    else:
        values |= {"embed_dim": 5, "hidden_size": 6, "num_layers": 2}
    architecture = ARCHITECTURES[decoder]
    cfg = MODEL_DATACLASS_REGISTRY[architecture](**{**values, **flags})
    job = task(source or dictionary(11, "s"), dictionary(words))
    model: Any = MODEL_REGISTRY[architecture].build_model(cfg, job)
    own = model.decoder.words
    read_by = [own.input_table] if own.input_table is not None else []
    tables = [own.table, *read_by, *own.further_tables, *own.further_input_tables]
    for number, table in enumerate(tables):
        cells = np.random.default_rng((words, number)).permutation(table.table().cells)
        table.seat(WordTable.from_cells(cells, shape))
    model.double().eval()
    torch.manual_seed(words)  # whatever was drawn to build it
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(std=0.5)
    return model


def batch(texts: int, longest: int = 5, words: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Source texts, the longest first, padded on the left as fairseq does."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((texts, longest), 1)
    lengths = torch.tensor([max(longest - row, 1) for row in range(texts)])
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[-length:] = torch.randint(4, words, (length,), generator=generator)
        row[-1] = 2
    return {"src_tokens": tokens, "src_lengths": lengths}


def log_probs(model: Any, source: dict[str, Tensor], target: Tensor) -> Tensor:
    """Scores targets (B, T) as training does, by their features: (B, T)."""
    previous = torch.cat([torch.full_like(target[:, :1], 2), target[:, :-1]], dim=1)
    output = model(**source, prev_output_tokens=previous, target_tokens=target)
    scores = model.get_normalized_probs(output, True, {"target": target})
    return scores.gather(2, target[..., None])[..., 0]


def banned(past: list[int], size: int) -> list[int]:
    """Words that would make the last words of a text a sequence that it has already."""
    last = past[len(past) - size + 1 :]
    return [
        past[start + size - 1]
        for start in range(len(past) - size + 1)
        if past[start : start + size - 1] == last
    ]
