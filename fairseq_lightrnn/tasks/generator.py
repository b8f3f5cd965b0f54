"""fairseq's generator, which asks a model for no more words than it can choose."""

from typing import Any

import torch
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.search import BeamSearch, Sampling
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from fairseq_lightrnn.models.next_words import FOUND, WANTED, Draws, MostProbable, Wanted
from fairseq_lightrnn.models.word_head import WordHead

__all__ = ["TopWordsGenerator", "forbid_repetitions"]


class _Request:
    """What is asked of a decoder at each step of a generation, and what it found."""

    wanted: Wanted | None = None
    found: MostProbable | Draws | None = None


class _AskingModel(EnsembleModel):
    """Tells the decoder at each step which words matter.

    It does so in the states of a generation, so that generations that share a model, in threads
    say, do not share the request.
    """

    def __init__(self, models: list[Any], request: _Request) -> None:
        super().__init__(models)
        self.request = request

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> Any:
        if self.request.wanted is not None:
            incremental_states[0][WANTED] = self.request.wanted
        result = super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)
        self.request.found = incremental_states[0].pop(FOUND, None)
        return result


class _FoundBeams(BeamSearch):
    """fairseq's beam search over what was found."""

    request: _Request

    def step(self, step: int, lprobs: Tensor, scores: Any, *more: Any) -> Any:
        return _named(self.request.found, *super().step(step, lprobs, scores, *more))


class _FoundSamples(Sampling):
    """fairseq's sampling from what was found, or of words that are drawn without all the others."""

    request: _Request

    def step(self, step: int, lprobs: Tensor, scores: Any, *more: Any) -> Any:
        found = self.request.found
        if not isinstance(found, Draws):
            return _named(found, *super().step(step, lprobs, scores, *more))
        batch, beams = lprobs.shape[:2]
        allowed = lprobs.flatten(0, 1) > float("-inf")
        words, log_probs = (part.view(batch, beams) for part in found.draw(allowed))
        if step == 0:  # all hypotheses are alike
            return log_probs, words, torch.zeros_like(words)
        numbers = torch.arange(beams, device=words.device).repeat(batch, 1)
        return log_probs + scores[:, :, step - 1], words, numbers


def _named(
    found: MostProbable | Draws | None, scores: Tensor, places: Tensor, beams: Tensor
) -> Any:
    """Returns what a search chose, its words by their own numbers."""
    if not isinstance(found, MostProbable):
        return scores, places, beams
    batch = torch.arange(len(places), device=places.device)[:, None]
    words = found.words.view(len(places), -1, found.words.size(1))
    return scores, words[batch, beams, places], beams


class _Repetitions(NGramRepeatBlock):
    """Rules out what would repeat words; fairseq's own looks for the last words in the padding."""

    def _no_repeat_ngram(
        self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int
    ) -> Tensor:
        size = self.no_repeat_ngram_size
        text = tokens[:, 1 : step + 1]  # after an end of sentence
        if text.size(1) >= size:
            known = text.unfold(1, size, 1)
            begun = text[:, None, text.size(1) - size + 1 :]
            free = lprobs.gt(-torch.inf).sum(dim=1) > 1  # not where a prompt goes on
            repeated = known[..., :-1].eq(begun).all(dim=-1) & free[:, None]
            texts, places = repeated.nonzero(as_tuple=True)
            lprobs[texts, known[texts, places, -1]] = -torch.inf
        return lprobs


def forbid_repetitions(generator: Any) -> None:
    """Has any of fairseq's generators heed ``--no-repeat-ngram-size``."""
    blocker = getattr(generator, "repeat_ngram_blocker", None)
    if blocker is not None:
        generator.repeat_ngram_blocker = _Repetitions(blocker.no_repeat_ngram_size)


class TopWordsGenerator(SequenceGenerator):
    """Finds what fairseq's generator finds, from the words that can be chosen.

    A beam search of width b takes its 2·b candidates from the 2·b most probable words after each
    hypothesis, and sampling from the k most probable words (``--sampling-topk``) needs no others.
    Three more make up for words that fairseq may rule out: padding, the end of the text, and the
    unknown word. The end is wanted in any case, since the longest text has to end, and so is the
    unknown word where a negative ``--unkpen`` favours it. Plain sampling draws a word component by
    component. All other searches, and ensembles, which average whole distributions, see all words.
    """

    search: Any

    def __init__(self, models: list[Any], dictionary: Any, **options: Any) -> None:
        self._request = request = _Request()
        super().__init__(_AskingModel(models, request), dictionary, **options)
        if type(self.search) is BeamSearch:
            self.search = _FoundBeams(dictionary)
            self.search.request = request
        elif type(self.search) is Sampling:
            old = self.search
            self.search = _FoundSamples(dictionary, old.sampling_topk, old.sampling_topp)
            self.search.request = request

    @property
    def vocab_size(self) -> int:
        """How many words the last distribution was of: those that were found, or all."""
        found = self._request.found
        return self._num_words if found is None else found.log_probs.size(1)

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self._num_words = size

    def _generate(
        self, sample: dict[str, Any], prefix_tokens: Tensor | None = None, **kwargs: Any
    ) -> Any:
        self._request.found = None
        given = 0 if prefix_tokens is None else prefix_tokens.size(1)
        self._request.wanted = self._wanted(given)
        return super()._generate(sample, prefix_tokens=prefix_tokens, **kwargs)

    def _wanted(self, given: int) -> Wanted | None:
        """Returns what a generation wants after so many given words; None for all words."""
        decoders = [getattr(model, "decoder", None) for model in self.model.models]
        others = (self.lm_model, self.repeat_ngram_blocker, self.token_indices_to_suppress)
        if (
            len(decoders) != 1
            or not isinstance(getattr(decoders[0], "words", None), WordHead)
            or self.temperature != 1
            or any(other is not None for other in others)
        ):
            return None
        always = (self.eos, self.unk) if self.unk_penalty < 0 else (self.eos,)
        first = 1 + max(self.pad, self.eos, self.unk)
        if isinstance(self.search, _FoundBeams):
            return Wanted(2 * self.beam_size + 3, always, first, given)
        if not isinstance(self.search, _FoundSamples) or self.search.sampling_topp > 0:
            return None
        if self.search.sampling_topk > 0:
            return Wanted(self.search.sampling_topk + 3, always, first, given)
        return None if self.unk_penalty else Wanted(0, (), first, given)
