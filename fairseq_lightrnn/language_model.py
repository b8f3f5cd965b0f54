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
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
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
    find_device,
    find_dictionary,
    language_model_tables,
    load_state,
)
from fairseq_lightrnn.core.distribution import next_word_log_probs, sample_words
from fairseq_lightrnn.core.scoring import DEFAULT_BATCH_WORDS, Scorer
from fairseq_lightrnn.core.search import top_words
from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.errors import value_errors
from fairseq_lightrnn.models.lightrnn_transformer import (
    LightRNNTransformerDecoder,
    TransformerText,
)
from fairseq_lightrnn.models.vocabulary import vocabulary_digest
from fairseq_lightrnn.sentence_score import SentenceScore
from fairseq_lightrnn.tasks.lightrnn_language_modeling import LightRNNLanguageModelingTask

__all__ = ["LanguageModel", "SentenceScore"]

logger = logging.getLogger(__name__)

# Words of a prompt that are read at once.
_READ_AT_ONCE = 2048
_PROMPTS_AT_ONCE = 64
# Words whose vectors are looked up at once.
_WORDS = 1 << 14


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
            data: folder of ``dict.txt``, or such a file; by default that which the model was
                trained on, or that of the checkpoint, where a word table file does as well.
            device: where to compute.

        Raises:
            ValueError: if there is no such checkpoint, dictionary or device, or they do not fit.
        """
        checkpoint = find_checkpoint(path)
        device = find_device(device)
        state = load_state(checkpoint)
        tables = language_model_tables(checkpoint, state)
        settings = OmegaConf.create(OmegaConf.to_container(state["cfg"].task))
        digest = state["model"].get("decoder.vocabulary.digest")
        known = None if digest is None else int(digest)
        dictionary = find_dictionary(checkpoint, tables, data, settings.data, known)
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
        self,
        text: str | Sequence[str],
        *,
        context: str | Sequence[str] | None = None,
        carry_hidden_state: bool = False,
        details: bool = False,
    ) -> Any:
        """Scores a sentence, or several.

        Args:
            text: words between spaces; the end of sentence is added.
            context: what comes before the text, from the beginning of a sentence, and is not
                scored; of several sentences one for each, or the same for all.
            carry_hidden_state: of several sentences, predict each from all before it.
            details: compute entropies and ranks too, which takes a pass over the vocabulary for
                each word.

        Returns:
            A :class:`SentenceScore`, or a list of them if a list was given.

        Raises:
            ValueError: if there is a list of contexts that is not as long as that of the sentences,
                or a context and the state is to be carried too.
        """
        sentences = [text] if isinstance(text, str) else text
        contexts = repeat(context) if isinstance(context, str) else context
        if isinstance(contexts, Sequence) and len(contexts) != len(sentences):
            raise ValueError(
                f"{len(sentences)} sentences need as many contexts, or one str for all, not "
                f"{len(contexts)}"
            )
        scores = list(
            self.score_lines(
                sentences, contexts=contexts, carry_hidden_state=carry_hidden_state, details=details
            )
        )
        return scores[0] if isinstance(text, str) else scores

    def score_lines(
        self,
        lines: Iterable[str | None],
        *,
        contexts: Iterable[str] | None = None,
        carry_hidden_state: bool = False,
        details: bool = False,
        batch_words: int = DEFAULT_BATCH_WORDS,
    ) -> Iterator[SentenceScore]:
        """Scores any number of sentences in bounded memory; see :meth:`score`.

        Sentences are batched. None among the lines asks for the scores of all before it, of a text
        whose next line may be long in coming. There is a context for each other line, or none.

        Raises:
            ValueError: if there are fewer contexts than lines, or the state is to be carried too.
        """
        if contexts is not None:
            if carry_hidden_state:
                raise ValueError(
                    "context and carry_hidden_state exclude each other: a sentence that goes on "
                    "from the one before has a context already"
                )
            yield from self._score_after(lines, iter(contexts), details, batch_words)
            return
        eos = self.dictionary.eos()

        def sentences() -> Iterator[tuple[list[str], np.ndarray] | None]:
            for line in lines:
                if line is None:
                    yield None
                    continue
                tokens, ids = self.encode(line)
                yield [*tokens, self.dictionary[eos]], np.append(ids, eos)

        yield from self._score(sentences(), carry_hidden_state, details, batch_words)

    def _score_after(
        self,
        lines: Iterable[str | None],
        contexts: Iterator[str],
        details: bool,
        batch_words: int,
    ) -> Iterator[SentenceScore]:
        """Scores sentences with their contexts before them, and leaves the contexts' scores out."""
        known: deque[int] = deque()

        def whole() -> Iterator[str | None]:
            number = 0
            for line in lines:
                if line is None:
                    yield None
                    continue
                number += 1
                context = next(contexts, None)
                if context is None:
                    raise ValueError(f"sentence {number} has no context: there are too few")
                known.append(len(self.encode(context)[0]))
                yield f"{context} {line}"

        options: dict[str, Any] = {"details": details, "batch_words": batch_words}
        for score in self.score_lines(whole(), **options):
            yield score.after(known.popleft())

    def log_probs(self, text: str, *, context: str = "") -> Iterator[np.ndarray]:
        """Yields the log-probabilities of all words at each place of a sentence.

        Args:
            text: words between spaces; the last place is that of the end of sentence.
            context: what comes before it.

        Yields:
            Float32 of shape (V,), in nats, by the numbers of the dictionary.
        """
        state = self._read([context])
        words = self.encode(text)[1].tolist()
        for place in range(len(words) + 1):
            with torch.no_grad():  # not while others compute between two places
                log_probs = next_word_log_probs(self.decoder.head, state)[0].cpu().numpy()
                for word in words[place : place + 1]:
                    state = self.decoder.read(torch.tensor([[word]], device=self.device), state)
            yield log_probs

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
    def _read(self, prefixes: Sequence[str]) -> Any:
        """Reads texts of as many words each."""
        ids = [np.append(self.start, self.encode(prefix)[1]) for prefix in prefixes]
        words = torch.from_numpy(np.stack(ids)).to(self.device)
        context = None
        for part in words.split(max(1, _READ_AT_ONCE // len(words)), dim=1):
            context = self.decoder.read(part, context)
        return context

    def _groups(self, prefixes: Sequence[str]) -> Iterator[list[int]]:
        """Yields which texts can be read together: those of as many words."""
        groups = defaultdict(list)
        for number, prefix in enumerate(prefixes):
            groups[len(self.encode(prefix)[0])].append(number)
        for group in groups.values():
            for start in range(0, len(group), _PROMPTS_AT_ONCE):
                yield group[start : start + _PROMPTS_AT_ONCE]

    @torch.no_grad()
    def next_words(self, prefix: str | Sequence[str] = "", k: int = 10) -> Any:
        """Returns the k most probable next words with their probabilities, exactly.

        Args:
            prefix: what comes before, from the beginning of a sentence; or several of these.
            k: how many words.

        Returns:
            Pairs of a word and its probability; a list of such lists if several were given.
        """
        prefixes = [prefix] if isinstance(prefix, str) else prefix
        results: list[list[tuple[str, float]]] = [[] for _ in prefixes]
        for group in self._groups(prefixes):
            found = top_words(self.decoder.head, self._read([prefixes[n] for n in group]), k)
            probabilities = found.log_probs.exp().tolist()
            for number, words, ps in zip(group, found.words.tolist(), probabilities, strict=True):
                pairs = zip(words, ps, strict=True)
                results[number] = [(self.dictionary[word], p) for word, p in pairs]
        return results[0] if isinstance(prefix, str) else results

    @torch.no_grad()
    def sample(
        self,
        prefix: str | Sequence[str] = "",
        *,
        max_words: int = 50,
        count: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[Any]:
        """Continues a text at random, or several.

        Args:
            prefix: the text to continue, from the beginning of a sentence; or several.
            max_words: stop after so many words where the model does not end the sentence; a
                transformer also stops where it can look back no further.
            count: how many texts are made of each.
            temperature: of the words' probabilities.
            top_k: draw from this many most probable words only.
            top_p: draw from the fewest most probable words with this much probability.
            seed: of the random numbers; None continues torch's own.

        Returns:
            The texts, prefix included, without the end of sentence; a list of such lists if several
            were given.
        """
        if count < 1:
            raise ValueError(f"count {count}: at least 1 text must be asked for")
        generator = None
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        options = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator,
        }  # fmt: skip
        prefixes = [prefix] if isinstance(prefix, str) else prefix
        results: list[list[str]] = [[] for _ in prefixes]
        for group in self._groups(prefixes):
            texts = self._continue([prefixes[n] for n in group], count, max_words, options)
            for place, number in enumerate(group):
                results[number] = texts[place * count : (place + 1) * count]
        return results[0] if isinstance(prefix, str) else results

    def _continue(
        self, prefixes: Sequence[str], count: int, max_words: int, options: dict[str, Any]
    ) -> list[str]:
        """Continues each of some texts of as many words a few times: those of a text together."""
        texts = [self.encode(prefix)[0] for prefix in prefixes for _ in range(count)]
        going = list(range(len(texts)))
        index = torch.arange(len(prefixes), device=self.device).repeat_interleave(count)
        context = self._read(prefixes).select(index)
        if self.decoder.most_words is not None:
            # The last word that is drawn need not be read.
            room = self.decoder.most_words - len(self.start) - len(texts[0])
            max_words = min(max_words, room + 1)
        for number in range(1, max_words + 1):
            words = sample_words(self.decoder.head, context, **options)
            left = words.ne(self.dictionary.eos()).nonzero().squeeze(1)
            going = [going[index] for index in left.tolist()]
            if not going:
                break
            words = words[left]
            for text, word in zip(going, words.tolist(), strict=True):
                texts[text].append(self.dictionary[word])
            if number == max_words:
                break
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
        return f"{vocabulary_digest(self.dictionary.symbols):012x}"

    def table_digest(self) -> str:
        """Returns twelve hexadecimal digits that name the words' cells in all of their tables."""
        seats = (module for module in self.model.modules() if isinstance(module, Seats))
        digests = [one.table().digest() for one in seats]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]

    def parameter_digest(self) -> str:
        """Returns twelve hexadecimal digits that name the model's parameters."""
        content = hashlib.sha256()
        for name, value in sorted(self.model.named_parameters()):
            content.update(name.encode())
            content.update(value.detach().float().cpu().numpy().tobytes())
        return content.hexdigest()[:12]
