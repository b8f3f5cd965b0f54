"""A trained language model, from checkpoint to answer in a few lines of Python.

::

    from fairseq_lightrnn.language_model import LanguageModel

    model = LanguageModel.from_pretrained("checkpoints")
    print(model.score("the cat sat on the mat").perplexity)
    print(model.next_words("the cat sat on the", 5))
    print(model.sample("the cat", seed=1))
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.tokenizer import tokenize_line
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_lightrnn import register  # noqa: F401  (fairseq must know the model and its task)
from fairseq_lightrnn.checkpoint import (
    build_model,
    find_checkpoint,
    find_dictionary,
    language_model_tables,
    load_state,
)
from fairseq_lightrnn.core.distribution import sample_words
from fairseq_lightrnn.core.scoring import DEFAULT_BATCH_WORDS, Scorer
from fairseq_lightrnn.core.search import top_words
from fairseq_lightrnn.errors import value_errors
from fairseq_lightrnn.models.lightrnn_transformer import (
    LightRNNTransformerDecoder,
    TransformerText,
)
from fairseq_lightrnn.tasks.lightrnn_language_modeling import LightRNNLanguageModelingTask

__all__ = ["LanguageModel", "SentenceScore", "find_device"]

logger = logging.getLogger(__name__)

# Words of a prompt that are read at once.
_READ_AT_ONCE = 2048
# Words whose vectors are looked up at once.
_WORDS = 1 << 14


@dataclass(frozen=True)
class SentenceScore:
    """The score of a sentence of n words, the end of sentence among them.

    Attributes:
        tokens: the words as they were written, n of them.
        ids: their ids, shape (n,); that of ``<unk>`` for words that the model does not know.
        component_log_probs: in nats, shape (n, k), of each coordinate given those before it.
        entropy: of the distribution that each word was predicted from, in nats, or None.
        rank: of each word in that distribution, from 1, or None.
    """

    tokens: list[str]
    ids: np.ndarray
    component_log_probs: np.ndarray
    entropy: np.ndarray | None = None
    rank: np.ndarray | None = None

    @property
    def log_probs(self) -> np.ndarray:
        """The words' log-probabilities in nats, shape (n,)."""
        return np.asarray(self.component_log_probs.sum(axis=1))

    @property
    def log_prob(self) -> float:
        """The sentence's log-probability in nats."""
        return float(self.component_log_probs.sum())

    @property
    def perplexity(self) -> float:
        """The sentence's perplexity per word, its end counted as a word."""
        return float(np.exp(-self.log_prob / len(self.tokens)))


def find_device(name: str | torch.device) -> torch.device:
    """Returns a device.

    Raises:
        ValueError: if there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).splitlines()[:1])
        raise ValueError(f"there is no device {str(name)!r} here ({reason})") from None
    return device


class LanguageModel:
    """A model with its dictionary, ready to be asked.

    Args:
        model: one of the language models of this package, recurrent or a transformer.
        dictionary: its dictionary.
        add_bos_token: whether it was trained on texts with ``<s>`` before the ``</s>`` that all
            texts begin with.
        carried_hidden_state: whether it was trained to go on from the hidden state of the text
            before.

    Attributes:
        decoder: reads and predicts words: of a recurrent model its ``Decoder``.
        table: the word table in force.
        start: the ids of the words that the first word of a text is predicted from: ``</s>``, or
            ``<s> </s>`` with ``--add-bos-token``.
    """

    def __init__(
        self,
        model: Any,
        dictionary: Dictionary,
        add_bos_token: bool = False,
        carried_hidden_state: bool = False,
    ) -> None:
        self.model = model.eval()
        self.dictionary = dictionary
        self.carried_hidden_state = carried_hidden_state
        decoder = model.decoder
        is_transformer = isinstance(decoder, LightRNNTransformerDecoder)
        self.decoder: Any = TransformerText(decoder) if is_transformer else decoder.core
        self.table = decoder.words.table
        self.start = [dictionary.bos()] * bool(add_bos_token) + [dictionary.eos()]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        data: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> LanguageModel:
        """Loads a checkpoint.

        Args:
            path: a checkpoint, or a folder of checkpoints, of which the best is taken.
            data: folder of ``dict.txt``; by default that which the model was trained on, or that of
                the checkpoint, where a word table file does as well.
            device: where to compute.

        Raises:
            ValueError: if there is no such checkpoint, dictionary or device, or they do not fit.
        """
        checkpoint = find_checkpoint(path)
        device = find_device(device)
        state = load_state(checkpoint)
        tables = language_model_tables(checkpoint, state)
        settings = OmegaConf.create(OmegaConf.to_container(state["cfg"].task))
        dictionary = find_dictionary(checkpoint, tables, data, settings.data)
        with value_errors():
            task = LightRNNLanguageModelingTask(
                settings, dictionary, dictionary, targets=["future"]
            )
        model = build_model(task, state, checkpoint)
        return cls(
            model.float().to(device),
            dictionary,
            bool(settings.add_bos_token),
            bool(settings.carry_hidden_state),
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.table.cells.device  # type: ignore[no-any-return]

    def encode(self, text: str) -> tuple[list[str], np.ndarray]:
        """Returns the words of a text and their ids, without an end of sentence."""
        tokens = tokenize_line(text) if text.strip() else []
        return tokens, np.array([self.dictionary.index(token) for token in tokens], dtype=np.int64)

    def score(
        self, text: str | Sequence[str], *, carry_hidden_state: bool = False, details: bool = False
    ) -> Any:
        """Scores a sentence, or several.

        Args:
            text: words between spaces; the end of sentence is added.
            carry_hidden_state: of several sentences, predict each from all before it.
            details: compute entropies and ranks too, which takes a pass over the vocabulary for
                each word.

        Returns:
            A :class:`SentenceScore`, or a list of them if a list was given.
        """
        sentences = [text] if isinstance(text, str) else text
        scores = list(
            self.score_lines(sentences, carry_hidden_state=carry_hidden_state, details=details)
        )
        return scores[0] if isinstance(text, str) else scores

    def score_lines(
        self,
        lines: Iterable[str | None],
        *,
        carry_hidden_state: bool = False,
        details: bool = False,
        batch_words: int = DEFAULT_BATCH_WORDS,
    ) -> Iterator[SentenceScore]:
        """Scores any number of sentences in bounded memory; see :meth:`score`.

        Sentences are batched. None among the lines asks for the scores of all before it, of a text
        whose next line may be long in coming.
        """
        eos = self.dictionary.eos()

        def sentences() -> Iterator[tuple[list[str], np.ndarray] | None]:
            for line in lines:
                if line is None:
                    yield None
                    continue
                tokens, ids = self.encode(line)
                yield [*tokens, self.dictionary[eos]], np.append(ids, eos)

        return self._score(sentences(), carry_hidden_state, details, batch_words)

    def score_ids(
        self,
        sentences: Iterable[np.ndarray],
        *,
        carry_hidden_state: bool = False,
        details: bool = False,
        batch_words: int = DEFAULT_BATCH_WORDS,
    ) -> Iterator[SentenceScore]:
        """Scores sentences given as word ids, ends of sentences among them where wanted."""
        with_tokens = (([self.dictionary[word] for word in ids], ids) for ids in sentences)
        return self._score(with_tokens, carry_hidden_state, details, batch_words)

    def _score(
        self,
        sentences: Iterable[tuple[list[str], np.ndarray] | None],
        carried: bool,
        details: bool,
        batch_words: int,
    ) -> Iterator[SentenceScore]:
        scorer = Scorer(self.decoder, self.start, batch_words=batch_words, details=details)
        waiting: list[tuple[list[str], np.ndarray]] = []

        def ids() -> Iterator[np.ndarray | None]:
            for sentence in sentences:
                if sentence is not None:
                    waiting.append(sentence)
                yield sentence and sentence[1]

        read = 0
        for scores in scorer.score(ids(), carried):
            yield SentenceScore(*waiting[read], scores.log_probs, scores.entropy, scores.rank)
            read += 1
            if read == len(waiting):
                waiting.clear()
                read = 0

    @torch.no_grad()
    def _read(self, prefix: str) -> Any:
        words = torch.from_numpy(np.append(self.start, self.encode(prefix)[1])).to(self.device)
        context = None
        for part in words[None].split(_READ_AT_ONCE, dim=1):
            context = self.decoder.read(part, context)
        return context

    @torch.no_grad()
    def next_words(self, prefix: str = "", k: int = 10) -> list[tuple[str, float]]:
        """Returns the k most probable next words with their probabilities, exactly.

        Args:
            prefix: what comes before, from the beginning of a sentence.
            k: how many words.
        """
        found = top_words(self.decoder.head, self._read(prefix), k)
        words, probabilities = found.words[0].tolist(), found.log_probs[0].exp().tolist()
        return [(self.dictionary[word], p) for word, p in zip(words, probabilities, strict=True)]

    @torch.no_grad()
    def sample(
        self,
        prefix: str = "",
        *,
        max_words: int = 50,
        count: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """Continues a text at random.

        Args:
            prefix: the text to continue, from the beginning of a sentence.
            max_words: stop after so many words where the model does not end the sentence.
            count: how many texts.
            temperature: of the words' probabilities.
            top_k: draw from this many most probable words only.
            top_p: draw from the fewest most probable words with this much probability.
            seed: of the random numbers; None continues torch's own.

        Returns:
            The texts, prefix included, without the end of sentence.
        """
        if count < 1:
            raise ValueError(f"count {count}: at least 1 text must be asked for")
        generator = None
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        texts: list[list[str]] = [self.encode(prefix)[0] for _ in range(count)]
        going = list(range(count))
        context = self._read(prefix).select(
            torch.zeros(count, dtype=torch.long, device=self.device)
        )
        for _ in range(max_words):
            words = sample_words(
                self.decoder.head, context, temperature=temperature, top_k=top_k, top_p=top_p,
                generator=generator,
            )  # fmt: skip
            left = words.ne(self.dictionary.eos()).nonzero().squeeze(1)
            going = [going[index] for index in left.tolist()]
            if not going:
                break
            words = words[left]
            for text, word in zip(going, words.tolist(), strict=True):
                texts[text].append(self.dictionary[word])
            context = self.decoder.read(words[:, None], context.select(left))
        return [" ".join(text) for text in texts]

    @torch.no_grad()
    def embedding(self, word: str) -> Tensor:
        """Returns the vector that a word is read by, shape (d,): all that it has, added up.

        Raises:
            ValueError: if the dictionary does not hold the word.
        """
        number = self.dictionary.indices.get(word)
        if number is None:
            raise ValueError(f"{word!r} is not in the dictionary")
        return self._vectors(torch.tensor(number, device=self.device))

    def _vectors(self, words: Tensor) -> Tensor:
        vectors: Tensor = self.decoder.reader.sum(words)
        return vectors

    @torch.no_grad()
    def distances(self, word: str) -> Tensor:
        """Returns the Euclidean distances of all words' vectors from a word's, shape (V,).

        Raises:
            ValueError: if the dictionary does not hold the word.
        """
        own = self.embedding(word)
        words = torch.arange(self.table.num_words, device=self.device)
        vectors = (self._vectors(some) for some in words.split(_WORDS))
        return torch.cat([(some - own).norm(dim=1) for some in vectors])

    def vocabulary_digest(self) -> str:
        """Returns twelve hexadecimal digits that name the words and their order."""
        content = "\n".join(self.dictionary.symbols)
        return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def parameter_digest(self) -> str:
        """Returns twelve hexadecimal digits that name the model's parameters."""
        content = hashlib.sha256()
        for name, value in sorted(self.model.named_parameters()):
            content.update(name.encode())
            content.update(value.detach().float().cpu().numpy().tobytes())
        return content.hexdigest()[:12]
