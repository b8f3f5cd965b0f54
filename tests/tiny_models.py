"""Small random language models of every kind, and a slow twin of their distribution."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_translation import dictionary
from torch import Tensor, nn

from fairseq_lightrnn.core.attention import Attention
from fairseq_lightrnn.core.conditioning import Conditioner, Context, Gated, Recurrent
from fairseq_lightrnn.core.decoder import Decoder
from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, WordBias, WordFeature
from fairseq_lightrnn.core.network import FeedForward, LockedDropout, RegularisedLSTM
from fairseq_lightrnn.core.reader import ComponentVectors, Reader
from fairseq_lightrnn.core.seats import PredictedTable, Seats
from fairseq_lightrnn.core.softmax import ComponentSoftmax
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.models.lightrnn_transformer import (
    LightRNNTransformerLanguageModel,
    TransformerText,
)
from fairseq_lightrnn.models.transformer_flags import TransformerLMConfig

DIM, HIDDEN, UNITS, PAD = 5, 6, 7, 1
CONDITIONERS: list[type[Conditioner]] = [Recurrent, Gated]
KINDS: list[Any] = [*CONDITIONERS, "transformer"]
# (words, shape): full and part-filled tables of one, two and three components
TABLES = [(13, (13,)), (12, (3, 4)), (10, (4, 4)), (24, (2, 3, 4)), (20, (3, 3, 3))]
CASES = [(kind, words, shape) for kind in KINDS for words, shape in TABLES]


def shuffled(shape: tuple[int, ...], cells: np.ndarray, *seed: int) -> WordTable:
    """A table of the same cells, with the words in a random order."""
    return WordTable.from_cells(np.random.default_rng(seed).permutation(cells), shape)


def shuffle_tables(tables: list[Seats], seed: int) -> None:
    """Seats the words of each table at random, whatever the others do."""
    for number, table in enumerate(tables):
        table.seat(shuffled(table.shape, table.table().cells, seed, number))


def words_of(shape: tuple[int, ...], num_words: int, seed: int = 0) -> Tensor:
    """Random words but for padding, which a transformer does not look at."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(max(num_words - 1, 1), shape, generator=generator)
    return words + (words >= PAD)


def build(
    kind: Any,
    words: int,
    shape: tuple[int, ...],
    seed: int = 0,
    scale: float = 1.0,
    extras: bool = True,
    **more: Any,
) -> Any:
    """A random model in double precision and evaluation mode.

    With ``extras`` it has every feature of words and a feed-forward layer; and input tables of
    their own where it can have them.
    """
    if kind == "transformer":
        return build_transformer(words, shape, seed, scale, extras, **more)
    decoder = build_recurrent(kind, words, shape, seed, extras, **more).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=scale)
    return decoder


def build_recurrent(
    kind: type[Conditioner],
    words: int,
    shape: tuple[int, ...],
    seed: int = 0,
    extras: bool = True,
    *,
    layers: int = 2,
    memory_dim: int = 0,
    dropout: float = 0.0,
    dropout_in: float = 0.0,
    dropout_out: float = 0.0,
    locked: bool = False,
    weight_dropout: float = 0.0,
    component_dropout: float = 0.0,
    shared: bool = False,
) -> Decoder:
    """The core's modules put together, as they start."""
    width = DIM if shared else HIDDEN
    torch.manual_seed(seed)
    table = PredictedTable(words, shape)
    own_table = extras and kind is Gated
    sizes = words, shape, DIM, width
    further = FurtherTables(2, *sizes, keep_input=own_table, query_dim=HIDDEN - 1)
    features: list[WordFeature] = [WordBias(words), OwnNumbers(words, 2, DIM, width), further]
    seats = Seats(words, shape) if own_table else table
    read_by = [seats] if own_table else []
    shuffle_tables([table, *read_by, *further.tables, *further.kept_tables], seed)
    features = features if extras else []
    vectors = ComponentVectors(shape, DIM)
    reader = Reader(seats, vectors, features, component_dropout)
    softmax = ComponentSoftmax(
        table, vectors if shared else ComponentVectors(shape, HIDDEN), features
    )
    network = RegularisedLSTM(
        DIM, HIDDEN, layers, dropout, dropout_in, locked, weight_dropout, width
    )
    attention = Attention(width, memory_dim) if memory_dim else None
    out: nn.Module = (LockedDropout if locked else nn.Dropout)(dropout_out)
    ffn = FeedForward(width, UNITS, out) if extras else None
    conditioner: Conditioner
    if kind is Recurrent:
        conditioner = Recurrent(reader, network, out, ffn, attention)
    else:
        conditioner = Gated(shape, width, out, ffn)
    return Decoder(reader, network, conditioner, softmax, attention).double()


def language_task(words: int) -> Any:
    """As much of a task as a language model needs."""
    return SimpleNamespace(
        target_dictionary=dictionary(words),
        architectures=("lightrnn_lm", "lightrnn_transformer_lm"),
    )


def transformer_flags(shape: tuple[int, ...], **flags: Any) -> TransformerLMConfig:
    """The flags of a tiny transformer."""
    sizes = {"embed_dim": 8, "ffn_embed_dim": 6, "layers": 2, "attention_heads": 2}
    values: dict[str, Any] = {
        **{f"decoder_{name}": value for name, value in sizes.items()},
        "table_shape": "x".join(map(str, shape)), "dropout": 0.0, "tokens_per_sample": 64,
        "max_target_positions": 64,
    }  # fmt: skip
    return TransformerLMConfig(**{**values, **flags})


def build_transformer(
    words: int, shape: tuple[int, ...], seed: int, scale: float, extras: bool, **flags: Any
) -> TransformerText:
    """See :func:`build`."""
    torch.manual_seed(seed)
    of_words = {
        "word_dim": 3 * extras, "further_tables": str(2 * extras * (len(shape) > 1)),
        "output_ffn_dim": UNITS * extras, "keep_input_table": extras,
    }  # fmt: skip
    cfg = transformer_flags(shape, **{**of_words, **flags})
    model = LightRNNTransformerLanguageModel.build_model(cfg, language_task(words))
    model.double().eval()
    head = model.decoder.words
    read_by = [head.input_table] if head.input_table is not None else []
    tables = [head.table, *read_by, *head.further_tables, *head.further_input_tables]
    shuffle_tables(tables, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(std=scale)
    return TransformerText(model.decoder)


def single_precision(decoder: Any) -> Any:
    """The same model in float32."""
    (decoder.decoder if isinstance(decoder, TransformerText) else decoder).float()
    return decoder


def contexts(decoder: Any, texts: int, seed: int = 0) -> Context:
    """What a model knows after three words of each of some texts."""
    return decoder.read(words_of((texts, 3), decoder.head.table.num_words, seed))


def slow_log_probs(decoder: Any, context: Context) -> Tensor:
    """One word at a time, one component at a time."""
    head = decoder.head
    table, softmax = head.table, head.softmax
    result = torch.empty(len(context.output), table.num_words, dtype=torch.float64)
    for word in range(table.num_words):
        coordinates = table(torch.full((len(context.output),), word))
        now, total = context, torch.zeros(len(context.output), dtype=torch.float64)
        for component in range(table.num_components):
            prefix, value = coordinates[:, :component], coordinates[:, component]
            logits = softmax.logits(component, now.output, prefix, now.queries)
            total = total + torch.log_softmax(logits, 1).gather(1, value[:, None])[:, 0]
            if component + 1 < table.num_components:
                now = head.extend(now, component, value)
        result[:, word] = total
    return result


def log_probs(decoder: Any, words: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Scores words 1 … T of texts (B, T+1) as training does: (B, T)."""
    hidden = decoder(words, *arguments, **named).hidden
    scores = decoder.head.softmax(hidden.flatten(0, 1), words[:, 1:].flatten())
    return scores.sum(1).view(len(words), -1)
