"""fairseq's generators, which ask a model for no more words than a beam search can choose."""

from collections.abc import Callable
from typing import Any

from fairseq.search import BeamSearch
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from torch import Tensor

from fairseq_lightrnn.models._seated import SeatedDecoder, Wanted

__all__ = ["generator_class"]


class _TopWordsMixin:
    """Tells the decoder which words matter, wherever the search is a beam search and no more.

    A beam search of width b takes its 2·b candidates from the 2·b most probable words after each
    hypothesis. Three more make up for words that fairseq may rule out: padding, the end of the
    text, and the unknown word. The end and the unknown word are wanted in any case, since the
    longest text has to end and ``--unkpen`` may favour the unknown word.
    """

    model: Any
    search: Any
    lm_model: Any
    repeat_ngram_blocker: Any
    token_indices_to_suppress: Any
    temperature: float
    beam_size: int
    eos: int
    unk: int

    def _generate(
        self, sample: dict[str, Any], prefix_tokens: Tensor | None = None, **kwargs: Any
    ) -> Any:
        generate: Callable[..., Any] = super()._generate  # type: ignore[misc]
        decoder = self._decoder() if self._chooses_top_words() else None
        if decoder is None:
            return generate(sample, prefix_tokens=prefix_tokens, **kwargs)
        given = 0 if prefix_tokens is None else prefix_tokens.size(1)
        decoder.wanted = Wanted(2 * self.beam_size + 3, (self.eos, self.unk), given)
        try:
            return generate(sample, prefix_tokens=prefix_tokens, **kwargs)
        finally:
            decoder.wanted = None

    def _chooses_top_words(self) -> bool:
        others = (self.lm_model, self.repeat_ngram_blocker, self.token_indices_to_suppress)
        return (
            type(self.search) is BeamSearch
            and self.temperature == 1
            and all(other is None for other in others)
        )

    def _decoder(self) -> SeatedDecoder | None:
        """Returns the decoder, if there is one only: ensembles average whole distributions."""
        decoders = [getattr(model, "decoder", None) for model in self.model.models]
        return (
            decoders[0] if len(decoders) == 1 and isinstance(decoders[0], SeatedDecoder) else None
        )


class TopWordsGenerator(_TopWordsMixin, SequenceGenerator):
    """fairseq's generator."""


class TopWordsGeneratorWithAlignment(_TopWordsMixin, SequenceGeneratorWithAlignment):
    """fairseq's generator for ``--print-alignment``."""


def generator_class(print_alignment: str | None) -> tuple[type[SequenceGenerator], dict[str, Any]]:
    """Returns the generator that ``--print-alignment`` asks for, and its further arguments."""
    if print_alignment:
        return TopWordsGeneratorWithAlignment, {"print_alignment": print_alignment}
    return TopWordsGenerator, {}
