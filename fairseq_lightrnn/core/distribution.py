"""The exact distribution of the next word: log-probabilities, entropy, ranks and samples.

Everything here is exact; nothing but :func:`next_word_log_probs` builds a tensor as wide as the
vocabulary. The words are met block by block: a block is some prefixes (all coordinates of a word
but the last, for two components the rows) and the words of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.search import (
    EXPANSIONS,
    TopWords,
    component_log_probs,
    require_numbers,
    top_words,
)
from fairseq_lightrnn.core.softmax import at_least_float32

__all__ = [
    "coordinate_log_probs",
    "next_word_entropy_and_rank",
    "next_word_log_probs",
    "sample_words",
]

_FIRST_NUCLEUS = 64


class _Block(NamedTuple):
    """The words of N prefixes: ``log_probs[n, j]`` is that of cell ``group[n] · R_k + j``.

    Attributes:
        text: which text of the batch the prefix continues, shape (N,).
        group: the row-major number of the prefix, shape (N,).
        log_probs: shape (N, R_k), -inf in empty cells.
    """

    text: Tensor
    group: Tensor
    log_probs: Tensor


class _Prefixes(NamedTuple):
    """N prefixes of the next word.

    Attributes:
        context: conditioned on them.
        log_probs: theirs, shape (N,).
        prefix: their coordinates, shape (N, i).
        text: which text of the batch each continues, shape (N,).
    """

    context: Context
    log_probs: Tensor
    prefix: Tensor
    text: Tensor


def _blocks(
    head: ComponentHead,
    context: Context,
    featured: Tensor | None = None,
) -> Iterator[_Block]:
    """Yields every word after every context once.

    ``featured`` is what :meth:`ComponentSoftmax.feature_logits_of_all` says of the contexts, if
    known: it is shared by texts (1, …), or of each (B, …).
    """
    context = head.to_extend(context)
    batch, device = len(context.output), context.output.device
    dtype = at_least_float32(context.output).dtype
    log_probs = torch.zeros(batch, dtype=dtype, device=device)
    prefix = torch.empty(batch, 0, dtype=torch.long, device=device)
    text = torch.arange(batch, device=device)
    return _descend(head, _Prefixes(context, log_probs, prefix, text), featured)


def _descend(head: ComponentHead, known: _Prefixes, featured: Tensor | None) -> Iterator[_Block]:
    context, log_probs, prefix, text = known
    last = prefix.size(1) + 1 == head.table.num_components
    group = head.table.number(prefix)
    of_words = None
    if last and featured is not None:
        of_words = featured[text if len(featured) > 1 else 0, group]
    scores = log_probs[:, None] + component_log_probs(head, context, prefix, of_words)
    if last:
        yield _Block(text, group, scores)
        return
    for longer in _lengthen(head, known, scores):
        yield from _descend(head, longer, featured)


def _lengthen(head: ComponentHead, known: _Prefixes, scores: Tensor) -> Iterator[_Prefixes]:
    """Yields the prefixes that are longer by one value and lead to a word.

    Args:
        head: predicts words.
        known: N prefixes.
        scores: log-probabilities of the longer ones, shape (N, R), -inf where there is no word.
    """
    require_numbers(scores)
    context, _, prefix, text = known
    component, size = prefix.size(1), scores.size(1)
    parents, values = torch.isfinite(scores).nonzero(as_tuple=True)
    every = len(values) == scores.numel()
    count = max(1, EXPANSIONS // size) * size if every else EXPANSIONS  # whole texts
    for index, value in zip(parents.split(count), values.split(count), strict=True):
        if every:
            some = context.select(index[::size])
            extended = head.extend_to_all(some, component, size)
        else:
            extended = head.extend(context.select(index), component, value)
        longer = torch.cat([prefix[index], value[:, None]], dim=1)
        yield _Prefixes(extended, scores[index, value], longer, text[index])


def next_word_log_probs(head: ComponentHead, context: Context) -> Tensor:
    """Computes log P(word | context) for all V words.

    Args:
        head: predicts words.
        context: of B texts, before any component of the next word is known.

    Returns:
        Log-probabilities in nats, shape (B, V).
    """
    table = head.table
    batch, groups = len(context.output), math.prod(table.shape[:-1])
    output = at_least_float32(context.output)
    cells = output.new_full((batch, groups, table.shape[-1]), float("-inf"))
    featured = head.softmax.feature_logits_of_all(context.queries)
    for block in _blocks(head, context, featured):
        cells[block.text, block.group] = block.log_probs.to(cells.dtype)
    return cells.reshape(batch, -1).index_select(1, table.cells)


def coordinate_log_probs(head: ComponentHead, context: Context, words: Tensor) -> Tensor:
    """Computes the log-probability of one word after each context.

    Args:
        head: predicts words.
        context: of B texts.
        words: of shape (B,).

    Returns:
        Log-probabilities in nats of each coordinate given those before it, shape (B, k).
    """
    coordinates = head.table(words)
    scores = []
    for component, value in enumerate(coordinates.unbind(1)):
        log_probs = component_log_probs(head, context, coordinates[:, :component])
        scores.append(log_probs.gather(1, value[:, None]))
        if component + 1 < coordinates.size(1):
            context = head.extend(context, component, value)
    return torch.cat(scores, dim=1)


def _entropy_terms(log_probs: Tensor) -> Tensor:
    terms = torch.special.entr(log_probs.exp())  # -p log p, and 0 for p = 0
    return terms.sum(1, dtype=torch.float64)


def next_word_entropy_and_rank(
    head: ComponentHead, context: Context, words: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the next word's entropy and the rank of given words, in one pass.

    Args:
        head: predicts words.
        context: of B texts.
        words: of shape (B,).

    Returns:
        Entropies in nats, float64 of shape (B,); ranks, integers of shape (B,): 1 plus the number
        of words that are more probable than the given one.

    Raises:
        FloatingPointError: if a prediction is not a number.
    """
    own = coordinate_log_probs(head, context, words).sum(1)
    cells = head.table.cells[words]
    columns = torch.arange(head.table.shape[-1], device=words.device)
    entropy = own.new_zeros(len(words), dtype=torch.float64)
    rank = torch.ones(len(words), dtype=torch.long, device=words.device)
    for block in _blocks(head, context):
        entropy.index_add_(0, block.text, _entropy_terms(block.log_probs))
        # Rounding must not let a word outrank itself.
        other = block.group[:, None] * len(columns) + columns != cells[block.text, None]
        better = (block.log_probs > own[block.text, None]) & other
        rank.index_add_(0, block.text, better.sum(1))
    require_numbers(entropy)
    return entropy, rank


def sample_words(
    head: ComponentHead,
    context: Context,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws a next word for every context.

    The temperature t acts on words: a word is drawn with probability proportional to P(word)^(1/t).
    That is not the product of tempered components, so a temperature other than 1 costs a pass over
    the vocabulary, while t = 1 needs one softmax of every component.

    Args:
        head: predicts words.
        context: of B texts.
        temperature: t, above 0.
        top_k: draw from this many most probable words only.
        top_p: draw from the fewest most probable words whose (tempered) probabilities sum to at
            least this (the nucleus of Holtzman et al., arXiv 1904.09751).
        generator: source of random numbers; default torch's own.

    Returns:
        Words of shape (B,).

    Raises:
        ValueError: if a number is out of its range or both ``top_k`` and ``top_p`` are given.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature}: must be above 0")
    if top_k is not None and top_p is not None:
        raise ValueError("top_k and top_p exclude each other")
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k {top_k}: must be at least 1")
        found = top_words(head, context, top_k)
        return _choose(found, found.log_probs / temperature, generator)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p {top_p}: must be above 0 and at most 1")
        return _choose(*_nucleus(head, context, temperature, top_p), generator)
    if temperature == 1:
        return _sample_by_component(head, context, generator)
    return _sample_tempered(head, context, temperature, generator)


def _draw(log_weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws a column of each row of log-weights (N, M), which need not be normalised."""
    weights = torch.softmax(log_weights.double(), dim=1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def _choose(found: TopWords, log_weights: Tensor, generator: torch.Generator | None) -> Tensor:
    return found.words.gather(1, _draw(log_weights, generator)[:, None]).squeeze(1)


def _sample_by_component(
    head: ComponentHead,
    context: Context,
    generator: torch.Generator | None,
) -> Tensor:
    prefix = head.table.coordinates.new_empty(len(context.output), 0, dtype=torch.long)
    for component in range(head.table.num_components):
        value = _draw(component_log_probs(head, context, prefix), generator)
        if component + 1 < head.table.num_components:
            context = head.extend(context, component, value)
        prefix = torch.cat([prefix, value[:, None]], dim=1)
    return head.table.words[head.table.number(prefix)]


def _sample_tempered(
    head: ComponentHead,
    context: Context,
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws a prefix by the tempered weight of all its words, then a word of that prefix."""
    groups = _tempered_groups(head, context, temperature)
    group = _draw(groups, generator)
    table = head.table
    prefix: list[Tensor] = []
    for size in reversed(table.shape[:-1]):
        prefix.insert(0, group % size)
        group = group // size
    coordinates = torch.stack(prefix, dim=1) if prefix else table.words.new_empty(len(groups), 0)
    for component, value in enumerate(coordinates.unbind(1)):
        context = head.extend(context, component, value)
    log_probs = component_log_probs(head, context, coordinates)
    last = _draw(log_probs / temperature, generator)
    return table.words[table.number(torch.cat([coordinates, last[:, None]], dim=1))]


def _tempered_groups(head: ComponentHead, context: Context, temperature: float) -> Tensor:
    """Sums P(word)^(1/t) over the words of every prefix: logarithms, float64 (B, groups)."""
    groups = math.prod(head.table.shape[:-1])
    shape = (len(context.output), groups)
    weights = context.output.new_full(shape, float("-inf"), dtype=torch.float64)
    for block in _blocks(head, context):
        scores = torch.logsumexp(block.log_probs.double() / temperature, dim=1)
        weights[block.text, block.group] = scores
    return weights


def _nucleus(
    head: ComponentHead,
    context: Context,
    temperature: float,
    top_p: float,
) -> tuple[TopWords, Tensor]:
    """Returns the most probable words, and their log-weights: -inf outside of the nucleus."""
    total = torch.zeros(len(context.output), dtype=torch.float64, device=context.output.device)
    if temperature != 1:
        groups = _tempered_groups(head, context, temperature)
        total = torch.logsumexp(groups, dim=1)
    count = _FIRST_NUCLEUS
    while True:
        found = top_words(head, context, count)
        log_weights = found.log_probs.double() / temperature - total[:, None]
        mass = log_weights.exp().cumsum(1)
        if count >= head.table.num_words or bool((mass[:, -1] >= top_p).all()):
            break
        count *= 2
    before = mass - log_weights.exp()
    return found, log_weights.masked_fill(before >= top_p, float("-inf"))
