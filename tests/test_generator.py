"""The generators of the tasks, against those of fairseq that see whole distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.search import DiverseBeamSearch, DiverseSiblingsSearch, Sampling
from fairseq.sequence_generator import SequenceGenerator
from scipy.stats import chi2_contingency
from tiny_translation import DECODERS, banned, batch, build, log_probs
from torch import Tensor

from fairseq_lightrnn.models import next_words, word_head
from fairseq_lightrnn.models.next_words import FOUND, WANTED, Wanted
from fairseq_lightrnn.tasks.generator import TopWordsGenerator, forbid_repetitions

EOS, PAD, UNK = 2, 1, 3
TABLES = [(30, (5, 6)), (46, (7, 7)), (58, (3, 4, 5))]
# Where the most probable words are enough, and where they are not.
PLAIN: list[dict[str, Any]] = [
    {},
    {"beam_size": 1},
    {"beam_size": 5, "len_penalty": 0.5},
    {"unk_penalty": 4.0},
    {"unk_penalty": -3.0},
    {"min_len": 4, "max_len_b": 4},
]
WHOLE: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"tokens_to_suppress": ("w0", "w3")},
    {"search_strategy": DiverseBeamSearch},
    {"search_strategy": DiverseSiblingsSearch},
]


class Calls:
    """Counts how often a decoder predicts all words, and how often the most probable ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole = self.few = 0
        whole, few = word_head.next_word_log_probs, next_words.top_words

        def count_whole(*args: Any) -> Any:
            self.whole += 1
            return whole(*args)

        def count_few(*args: Any) -> Any:
            self.few += 1
            return few(*args)

        monkeypatch.setattr(word_head, "next_word_log_probs", count_whole)
        monkeypatch.setattr(next_words, "top_words", count_few)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Tables are so small that a search may look at all of their rows."""
    monkeypatch.setattr(next_words, "_SEARCHED_SHARE", 2.0)
    return Calls(monkeypatch)


def translate(
    kind: Any, models: list[Any], prefix: list[list[int]] | None = None, **options: Any
) -> list[list[dict[str, Any]]]:
    """Translates three texts."""
    dictionary = models[0].decoder.dictionary
    options = {"beam_size": 3, "max_len_b": 6, **options}
    if "search_strategy" in options:
        numbers = (3, 0.5) if options["search_strategy"] is DiverseBeamSearch else (0.5,)
        options["search_strategy"] = options["search_strategy"](dictionary, *numbers)
    generator = kind(models, dictionary, **options)
    if kind is TopWordsGenerator:
        forbid_repetitions(generator)  # as tasks do
    tokens = None if prefix is None else torch.tensor(prefix)
    found = generator.generate(models, {"net_input": batch(3)}, prefix_tokens=tokens)
    return found  # type: ignore[no-any-return]


def assert_same(found: Any, expected: Any) -> None:
    for texts, others in zip(found, expected, strict=True):
        for text, other in zip(texts, others, strict=True):
            assert text["tokens"].tolist() == other["tokens"].tolist()
            for name in ("score", "positional_scores", "attention"):
                torch.testing.assert_close(text[name], other[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("words", "shape"), TABLES)
@pytest.mark.parametrize("options", PLAIN, ids=str)
def test_beam_search_needs_the_most_probable_words_only(
    decoder: str, words: int, shape: Any, options: dict[str, Any], calls: Calls
) -> None:
    model = build(decoder, words, shape)
    expected = translate(SequenceGenerator, [model], **options)
    assert calls.whole > 0
    assert calls.few == 0
    calls.whole = 0
    found = translate(TopWordsGenerator, [model], **options)
    assert_same(found, expected)
    assert calls.whole == 0
    assert calls.few > 0


class Forbidding(NGramRepeatBlock):
    """The twin: text by text. fairseq's looks for the last words of a text in its padding."""

    def forward(
        self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int
    ) -> Tensor:
        for row, text in enumerate(tokens[:, 1 : step + 1].tolist()):
            lprobs[row, banned(text, self.no_repeat_ngram_size)] = -torch.inf
        return lprobs


class Mended(SequenceGenerator):
    """fairseq's generator, which forbids what would repeat words."""

    def __init__(self, *args: Any, no_repeat_ngram_size: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        if no_repeat_ngram_size:
            self.repeat_ngram_blocker = Forbidding(no_repeat_ngram_size)


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_other_searches_see_all_words(decoder: str, options: dict[str, Any], calls: Calls) -> None:
    model = build(decoder, 46, (7, 7))
    expected = translate(Mended, [model], **options)
    assert_same(translate(TopWordsGenerator, [model], **options), expected)
    assert calls.few == 0


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("words", "shape"), TABLES[1:])
def test_given_words_may_be_any(decoder: str, words: int, shape: Any, calls: Calls) -> None:
    """Until the longest prefix ends; padding or the end of the text ends the others."""
    model = build(decoder, words, shape)
    prefix = [[40, 41, 5], [9, EOS, PAD], [22, PAD, PAD]]
    expected = translate(SequenceGenerator, [model], prefix)
    calls.whole = 0
    found = translate(TopWordsGenerator, [model], prefix)
    assert_same(found, expected)
    assert calls.whole == 3
    assert calls.few > 0


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_texts_that_end_early_leave_the_batch(decoder: str, calls: Calls) -> None:
    model = build(decoder, 46, (7, 7))
    words = model.decoder.words
    for component, value in enumerate(words.table(torch.tensor(EOS)).tolist()):
        words.head.softmax.component(component)[1][value] += 30
    expected = translate(SequenceGenerator, [model], max_len_b=12)
    assert_same(translate(TopWordsGenerator, [model], max_len_b=12), expected)
    assert 0 < calls.few < 13


@torch.no_grad()
def test_ensembles_see_all_words(calls: Calls) -> None:
    models = [build("gated", 46, shape) for shape in ((7, 7), (6, 8))]
    expected = translate(SequenceGenerator, models)
    assert_same(translate(TopWordsGenerator, models), expected)
    assert calls.few == 0


@torch.no_grad()
def test_a_vocabulary_of_few_words_is_seen_whole(calls: Calls) -> None:
    model = build("gated", 30, (5, 6))
    translate(TopWordsGenerator, [model], beam_size=14)  # 31 words are wanted
    assert calls.few == 0


@torch.no_grad()
def test_flat_predictions_are_seen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    model = build("gated", 46, (7, 7))  # two of whose rows may be searched
    for parameter in model.parameters():
        parameter.mul_(0.01)
    expected = translate(SequenceGenerator, [model])
    whole = calls.whole
    assert_same(translate(TopWordsGenerator, [model]), expected)
    assert calls.few > 0
    assert calls.whole == 2 * whole


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_half_precision(decoder: str, calls: Calls) -> None:
    """Rounding makes ties, which may be broken either way: scores agree, words need not."""
    model = build(decoder, 46, (7, 7)).half()
    expected = translate(SequenceGenerator, [model], beam_size=2)
    found = translate(TopWordsGenerator, [model], beam_size=2)
    assert calls.few > 0
    for texts, others in zip(found, expected, strict=True):
        scores = [torch.stack([text["score"] for text in some]) for some in (texts, others)]
        torch.testing.assert_close(*scores, atol=2e-2, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_what_is_wanted_is_exact(
    decoder: str, words: int, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_words, "_SEARCHED_SHARE", 2.0)
    model, past = build(decoder, words, shape), torch.tensor([[EOS, 9], [EOS, 4], [EOS, 21]])
    encoded = model.encoder.forward_torchscript(batch(3))
    every = model.get_normalized_probs(model.decoder(past, encoder_out=encoded), True)[:, 0]
    states: dict[str, Any] = {WANTED: Wanted(4, (EOS, UNK), first=4, given=1)}
    model.decoder(past[:, :1], encoder_out=encoded, incremental_state=states)
    output = model.decoder(past, encoder_out=encoded, incremental_state=states)
    few = model.get_normalized_probs(output, True)[:, 0]
    torch.testing.assert_close(model.get_normalized_probs(output, False)[:, 0], few.exp())
    assert few.shape == (3, 4 + 4)
    assert states[FOUND].words[:, :4].tolist() == 3 * [[0, 1, 2, 3]]
    found = torch.full_like(every, -torch.inf)
    found.scatter_reduce_(1, states[FOUND].words, few, "amax")
    wanted = torch.zeros_like(found, dtype=torch.bool).scatter(1, every.topk(4).indices, True)
    wanted[:, [EOS, UNK]] = True
    torch.testing.assert_close(found[wanted].float(), every[wanted].float())
    assert (found[~wanted] == -torch.inf).all()


def sample(kind: Any, model: Any, **options: Any) -> list[list[dict[str, Any]]]:
    """Draws translations of three texts."""
    dictionary = model.decoder.dictionary
    top_k = options.pop("top_k", -1)
    options = {"beam_size": 4, "max_len_b": 3, **options}
    generator = kind(
        [model], dictionary, search_strategy=Sampling(dictionary, sampling_topk=top_k), **options
    )
    found = generator.generate([model], {"net_input": batch(3)})
    return found  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("words", "shape"), TABLES[1:])
@pytest.mark.parametrize("top_k", [-1, 5])
def test_samples_have_the_distribution_and_the_scores_of_those_of_fairseq(
    decoder: str, words: int, shape: Any, top_k: int, calls: Calls
) -> None:
    """First words of many draws by a test of chi squared; each word's score by the model itself."""
    model = build(decoder, words, shape)
    torch.manual_seed(1)
    counts = []
    for kind in (SequenceGenerator, TopWordsGenerator):
        calls.whole = 0
        found = sample(kind, model, top_k=top_k, beam_size=12, max_len_b=1)
        first = [[text["tokens"][0] for text in texts] for texts in found]
        for _ in range(40):
            more = sample(kind, model, top_k=top_k, beam_size=12, max_len_b=1)
            for texts, others in zip(first, more, strict=True):
                texts += [text["tokens"][0] for text in others]
        counts.append([torch.bincount(torch.stack(some), minlength=words) for some in first])
    assert calls.whole == 0
    for ours, theirs in zip(counts[1], counts[0], strict=True):
        often = (ours + theirs) > 10
        table = torch.stack([ours[often], theirs[often]]).numpy()
        assert chi2_contingency(table).pvalue > 1e-5
        assert ours.sum() == theirs.sum()


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("top_k", [-1, 5])
def test_scores_of_samples_are_those_of_the_model(decoder: str, top_k: int, calls: Calls) -> None:
    model = build(decoder, 46, (7, 7))
    source = batch(3)
    for number, texts in enumerate(sample(TopWordsGenerator, model, top_k=top_k, min_len=2)):
        own = {name: part[number : number + 1] for name, part in source.items()}
        for text in texts:
            tokens = text["tokens"]
            assert len(tokens) in (3, 4)
            assert tokens[-1] == EOS
            assert not torch.isin(tokens[:-1], torch.tensor([EOS, PAD])).any()
            expected = log_probs(model, own, tokens[None])[0]
            found = text["positional_scores"].double()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert calls.whole == 0


@torch.no_grad()
def test_what_must_not_be_chosen_is_drawn_again_and_in_the_end_ruled_out(calls: Calls) -> None:
    """The end of the text is all but certain, and there may be none."""
    model = build("gated", 46, (7, 7))
    words = model.decoder.words
    for component, value in enumerate(words.table(torch.tensor(EOS)).tolist()):
        words.head.softmax.component(component)[1][value] += 40
    for texts in sample(TopWordsGenerator, model, min_len=3):
        assert all(text["tokens"].tolist().index(EOS) == 3 for text in texts)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"unk_penalty": 1.0}, {"temperature": 0.7}], ids=str)
def test_other_samples_are_of_all_words(options: dict[str, Any], calls: Calls) -> None:
    model = build("gated", 46, (7, 7))
    sample(TopWordsGenerator, model, **options)
    assert calls.few == 0
    assert calls.whole > 0
