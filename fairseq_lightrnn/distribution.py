"""The exact distribution of the next word: log-probabilities, entropy, ranks and samples.

Everything here is exact; nothing but :func:`next_word_log_probs` builds a tensor as wide as the
vocabulary. The words are met block by block: a block is some prefixes (all coordinates of a word
but the last, for two components the rows) and the words of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fairseq_lightrnn.components import ComponentSoftmax, at_least_float32
from fairseq_lightrnn.top_words import EXPANSIONS, TopWords, component_log_probs, top_words

if TYPE_CHECKING:
    from fairseq_lightrnn.composition import Context, Prediction

__all__ = [
    "TopWords",
    "coordinate_log_probs",
    "next_word_entropy",
    "next_word_entropy_and_rank",
    "next_word_log_probs",
    "sample_words",
    "top_words",
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
    composition: Prediction,
    softmax: ComponentSoftmax,
    context: Context,
    own: Tensor | None = None,
) -> Iterator[_Block]:
    """Yields every word after every context once.

    ``own`` is what :meth:`ComponentSoftmax.own_logits_of_all` says of the contexts, if known.
    """
    context = composition.to_extend(context)
    batch, device = len(context.output), context.output.device
    dtype = at_least_float32(context.output).dtype
    log_probs = torch.zeros(batch, dtype=dtype, device=device)
    prefix = torch.empty(batch, 0, dtype=torch.long, device=device)
    text = torch.arange(batch, device=device)
    return _descend(composition, softmax, _Prefixes(context, log_probs, prefix, text), own)


def _descend(
    composition: Prediction, softmax: ComponentSoftmax, known: _Prefixes, own: Tensor | None
) -> Iterator[_Block]:
    context, log_probs, prefix, text = known
    last = prefix.size(1) + 1 == softmax.table.num_components
    group = softmax.table.flatten(prefix)
    of_words = own[text, group] if last and own is not None else None
    scores = log_probs[:, None] + component_log_probs(softmax, context, prefix, of_words)
    if last:
        yield _Block(text, group, scores)
        return
    for longer in _lengthen(composition, known, scores):
        yield from _descend(composition, softmax, longer, own)


def _lengthen(composition: Prediction, known: _Prefixes, scores: Tensor) -> Iterator[_Prefixes]:
    """Yields the prefixes that are longer by one value and lead to a word.

    Args:
        composition: conditions contexts on components.
        known: N prefixes.
        scores: log-probabilities of the longer ones, shape (N, R), -inf where there is no word.
    """
    context, _, prefix, text = known
    component, size = prefix.size(1), scores.size(1)
    parents, values = torch.isfinite(scores).nonzero(as_tuple=True)
    every = len(values) == scores.numel()
    count = max(1, EXPANSIONS // size) * size if every else EXPANSIONS  # whole texts
    for index, value in zip(parents.split(count), values.split(count), strict=True):
        if every:
            some = context.select(index[::size])
            extended = composition.extend_to_all(some, component, size)
        else:
            extended = composition.extend(context.select(index), component, value)
        longer = torch.cat([prefix[index], value[:, None]], dim=1)
        yield _Prefixes(extended, scores[index, value], longer, text[index])


def next_word_log_probs(
    composition: Prediction, softmax: ComponentSoftmax, context: Context
) -> Tensor:
    """Computes log P(word | context) for all V words.

    Args:
        composition: reads words; conditions a context on components of the next.
        softmax: predicts components.
        context: of B texts, as ``composition.read`` returned it.

    Returns:
        Log-probabilities in nats, shape (B, V).
    """
    table = softmax.table
    batch, groups = len(context.output), math.prod(table.shape[:-1])
    output = at_least_float32(context.output)
    cells = output.new_full((batch, groups, table.shape[-1]), float("-inf"))
    own = softmax.own_logits_of_all(context.output)
    for block in _blocks(composition, softmax, context, own):
        cells[block.text, block.group] = block.log_probs.to(cells.dtype)
    return cells.reshape(batch, -1).index_select(1, table.cells)


def coordinate_log_probs(
    composition: Prediction, softmax: ComponentSoftmax, context: Context, words: Tensor
) -> Tensor:
    """Computes the log-probability of one word after each context.

    Args:
        composition: conditions a context on components of the next word.
        softmax: predicts components.
        context: of B texts.
        words: of shape (B,).

    Returns:
        Log-probabilities in nats of each coordinate given those before it, shape (B, k).
    """
    coordinates = softmax.table(words)
    scores = []
    for component, value in enumerate(coordinates.unbind(1)):
        log_probs = component_log_probs(softmax, context, coordinates[:, :component])
        scores.append(log_probs.gather(1, value[:, None]))
        if component + 1 < coordinates.size(1):
            context = composition.extend(context, component, value)
    return torch.cat(scores, dim=1)


def next_word_entropy(
    composition: Prediction, softmax: ComponentSoftmax, context: Context
) -> Tensor:
    """Computes the entropy of the next word, in nats, float64 of shape (B,)."""
    entropy = context.output.new_zeros(len(context.output), dtype=torch.float64)
    for block in _blocks(composition, softmax, context):
        entropy.index_add_(0, block.text, _entropy_terms(block.log_probs))
    return entropy


def _entropy_terms(log_probs: Tensor) -> Tensor:
    terms = torch.special.entr(log_probs.exp())  # -p log p, and 0 for p = 0
    return terms.sum(1, dtype=torch.float64)


def next_word_entropy_and_rank(
    composition: Prediction, softmax: ComponentSoftmax, context: Context, words: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the next word's entropy and the rank of given words, in one pass.

    Args:
        composition: conditions a context on components of the next word.
        softmax: predicts components.
        context: of B texts.
        words: of shape (B,).

    Returns:
        Entropies in nats, float64 of shape (B,); ranks, integers of shape (B,): 1 plus the number
        of words that are more probable than the given one.
    """
    own = coordinate_log_probs(composition, softmax, context, words).sum(1)
    cells = softmax.table.cells[words]
    columns = torch.arange(softmax.table.shape[-1], device=words.device)
    entropy = own.new_zeros(len(words), dtype=torch.float64)
    rank = torch.ones(len(words), dtype=torch.long, device=words.device)
    for block in _blocks(composition, softmax, context):
        entropy.index_add_(0, block.text, _entropy_terms(block.log_probs))
        # Rounding must not let a word outrank itself.
        other = block.group[:, None] * len(columns) + columns != cells[block.text, None]
        better = (block.log_probs > own[block.text, None]) & other
        rank.index_add_(0, block.text, better.sum(1))
    return entropy, rank


def sample_words(
    composition: Prediction,
    softmax: ComponentSoftmax,
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
        composition: conditions a context on components of the next word.
        softmax: predicts components.
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
        found = top_words(composition, softmax, context, top_k)
        return _choose(found, found.log_probs / temperature, generator)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p {top_p}: must be above 0 and at most 1")
        return _choose(*_nucleus(composition, softmax, context, temperature, top_p), generator)
    if temperature == 1:
        return _sample_by_component(composition, softmax, context, generator)
    return _sample_tempered(composition, softmax, context, temperature, generator)


def _draw(log_weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws a column of each row of log-weights (N, M), which need not be normalised."""
    weights = torch.softmax(log_weights.double(), dim=1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def _choose(found: TopWords, log_weights: Tensor, generator: torch.Generator | None) -> Tensor:
    return found.words.gather(1, _draw(log_weights, generator)[:, None]).squeeze(1)


def _sample_by_component(
    composition: Prediction,
    softmax: ComponentSoftmax,
    context: Context,
    generator: torch.Generator | None,
) -> Tensor:
    prefix = softmax.table.coordinates.new_empty(len(context.output), 0, dtype=torch.long)
    for component in range(softmax.table.num_components):
        value = _draw(component_log_probs(softmax, context, prefix), generator)
        if component + 1 < softmax.table.num_components:
            context = composition.extend(context, component, value)
        prefix = torch.cat([prefix, value[:, None]], dim=1)
    return softmax.table.words[softmax.table.flatten(prefix)]


def _sample_tempered(
    composition: Prediction,
    softmax: ComponentSoftmax,
    context: Context,
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws a prefix by the tempered weight of all its words, then a word of that prefix."""
    groups = _tempered_groups(composition, softmax, context, temperature)
    group = _draw(groups, generator)
    table = softmax.table
    prefix: list[Tensor] = []
    for size in reversed(table.shape[:-1]):
        prefix.insert(0, group % size)
        group = group // size
    coordinates = torch.stack(prefix, dim=1) if prefix else table.words.new_empty(len(groups), 0)
    for component, value in enumerate(coordinates.unbind(1)):
        context = composition.extend(context, component, value)
    log_probs = component_log_probs(softmax, context, coordinates)
    last = _draw(log_probs / temperature, generator)
    return table.words[table.flatten(torch.cat([coordinates, last[:, None]], dim=1))]


def _tempered_groups(
    composition: Prediction, softmax: ComponentSoftmax, context: Context, temperature: float
) -> Tensor:
    """Sums P(word)^(1/t) over the words of every prefix: logarithms, float64 (B, groups)."""
    groups = math.prod(softmax.table.shape[:-1])
    shape = (len(context.output), groups)
    weights = context.output.new_full(shape, float("-inf"), dtype=torch.float64)
    for block in _blocks(composition, softmax, context):
        scores = torch.logsumexp(block.log_probs.double() / temperature, dim=1)
        weights[block.text, block.group] = scores
    return weights


def _nucleus(
    composition: Prediction,
    softmax: ComponentSoftmax,
    context: Context,
    temperature: float,
    top_p: float,
) -> tuple[TopWords, Tensor]:
    """Returns the most probable words, and their log-weights: -inf outside of the nucleus."""
    total = torch.zeros(len(context.output), dtype=torch.float64, device=context.output.device)
    if temperature != 1:
        groups = _tempered_groups(composition, softmax, context, temperature)
        total = torch.logsumexp(groups, dim=1)
    count = _FIRST_NUCLEUS
    while True:
        found = top_words(composition, softmax, context, count)
        log_weights = found.log_probs.double() / temperature - total[:, None]
        mass = log_weights.exp().cumsum(1)
        if count >= softmax.table.num_words or bool((mass[:, -1] >= top_p).all()):
            break
        count *= 2
    before = mass - log_weights.exp()
    return found, log_weights.masked_fill(before >= top_p, float("-inf"))
