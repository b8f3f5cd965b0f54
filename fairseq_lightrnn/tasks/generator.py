"""fairseq's generator, which asks a model for no more words than a beam search can choose."""

from typing import Any

from fairseq.search import BeamSearch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from fairseq_lightrnn.models.word_head import WANTED, Wanted, WordHead

__all__ = ["TopWordsGenerator"]


class _AskingModel(EnsembleModel):
    """Tells the decoder at each step which words matter.

    It does so in the states of a generation, so that generations that share a model, in threads
    say, do not share the request.
    """

    wanted: Wanted | None = None

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> Any:
        if self.wanted is not None:
            incremental_states[0][WANTED] = self.wanted
        return super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)


class TopWordsGenerator(SequenceGenerator):
    """Finds what fairseq's generator finds, from the words that can be chosen.

    A beam search of width b takes its 2·b candidates from the 2·b most probable words after each
    hypothesis. Three more make up for words that fairseq may rule out: padding, the end of the
    text, and the unknown word. The end is wanted in any case, since the longest text has to end,
    and so is the unknown word where a negative ``--unkpen`` favours it. All other searches, and
    ensembles, which average whole distributions, see all words.
    """

    def __init__(self, models: list[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(_AskingModel(models), *args, **kwargs)

    def _generate(
        self, sample: dict[str, Any], prefix_tokens: Tensor | None = None, **kwargs: Any
    ) -> Any:
        self.model.wanted = None
        if self._chooses_top_words():
            always = (self.eos, self.unk) if self.unk_penalty < 0 else (self.eos,)
            given = 0 if prefix_tokens is None else prefix_tokens.size(1)
            self.model.wanted = Wanted(2 * self.beam_size + 3, always, given)
        return super()._generate(sample, prefix_tokens=prefix_tokens, **kwargs)

    def _chooses_top_words(self) -> bool:
        decoders = [getattr(model, "decoder", None) for model in self.model.models]
        others = (self.lm_model, self.repeat_ngram_blocker, self.token_indices_to_suppress)
        return (
            len(decoders) == 1
            and isinstance(getattr(decoders[0], "words", None), WordHead)
            and type(self.search) is BeamSearch
            and self.temperature == 1
            and all(other is None for other in others)
        )
