"""Small random models of both compositions, and a slow twin of their distribution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax
from fairseq_lightrnn.composition import Composition, Context
from fairseq_lightrnn.frequent_words import FrequentSize
from fairseq_lightrnn.further_tables import FurtherTables
from fairseq_lightrnn.gated import GatedComposition
from fairseq_lightrnn.recurrent import RecurrentComposition
from fairseq_lightrnn.table_lookup import TableLookup
from fairseq_lightrnn.word_table import WordTable

COMPOSITIONS = [RecurrentComposition, GatedComposition]
# (words, shape): full and part-filled tables of one, two and three components
TABLES = [(13, (13,)), (12, (3, 4)), (10, (4, 4)), (24, (2, 3, 4)), (20, (3, 3, 3))]
CASES = [(kind, words, shape) for kind in COMPOSITIONS for words, shape in TABLES]


class Model(NamedTuple):
    composition: Composition
    softmax: ComponentSoftmax

    def context(self, texts: int, seed: int = 0) -> Context:
        words = torch.randint(
            self.softmax.table.num_words, (texts, 3), generator=torch.Generator().manual_seed(seed)
        )
        return self.composition.read(self.softmax.table(words))


def build(
    kind: type[Composition],
    words: int,
    shape: tuple[int, ...],
    seed: int = 0,
    scale: float = 1.0,
    extras: bool = True,
) -> Model:
    """A random model in double precision, with biases and residuals of words, and an FFN.

    And with further tables, and an input table of its own where the composition can have one.
    """
    torch.manual_seed(seed)
    lookup = TableLookup(words, shape)
    residual = 2 if extras else 0
    frequent = FrequentSize(max(1, words // 3), 3) if extras else None
    own_table = extras and not kind.reads_components  # the words are seated elsewhere below
    further = FurtherTables(2, words, shape) if extras else None
    embedding = ComponentEmbedding(shape, 5, lookup, residual, 0.0, frequent, own_table, further)
    cells = np.random.default_rng(seed).permutation(lookup.table().cells)
    lookup.seat(WordTable.from_cells(cells, shape))
    for number, table in enumerate(further.tables if further else (), 1):
        order = np.random.default_rng((seed, number)).permutation(table.table().cells)
        table.seat(WordTable.from_cells(order, shape))
    query = residual + (3 + 6 if extras else 0)
    composition = kind(embedding, 6, 2, query_sizes=[query], ffn_dim=7 if extras else 0)
    softmax = ComponentSoftmax(lookup, 6, None, extras, residual, frequent, further=further)
    model = Model(composition.double().eval(), softmax.double().eval())
    with torch.no_grad():
        for parameter in [*composition.parameters(), *softmax.parameters()]:
            parameter.normal_(std=scale)
    return model


def slow_log_probs(model: Model, context: Context) -> Tensor:
    """One word at a time, one component at a time."""
    table = model.softmax.table
    result = torch.empty(len(context.output), table.num_words, dtype=torch.float64)
    for word in range(table.num_words):
        coordinates = table(torch.full((len(context.output),), word))
        now, total = context, torch.zeros(len(context.output), dtype=torch.float64)
        for component in range(table.num_components):
            logits = model.softmax.logits(component, now.output, coordinates[:, :component])
            value = coordinates[:, component]
            total = total + torch.log_softmax(logits, 1).gather(1, value[:, None])[:, 0]
            if component + 1 < table.num_components:
                now = model.composition.extend(now, component, value)
        result[:, word] = total
    return result
