"""Translation models: what holds for every decoder that wears a word table."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from argparse import Namespace
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from tiny_translation import CASES, DECODERS, batch, build, dictionary, log_probs, task
from torch import Tensor, nn

from fairseq_lightrnn.core.features import OwnNumbers, WordBias
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.models.lightrnn_translation import LightRNNTranslationEncoder

EOS, PAD = 2, 1


def distributions(model: Any, source: dict[str, Tensor], words: Tensor) -> Tensor:
    """Log-probabilities of all words after every prefix of texts (B, T), afresh: (B, T, V)."""
    encoded = model.encoder.forward_torchscript(source)
    outputs = [
        model.decoder(words[:, : step + 1], encoder_out=encoded) for step in range(words.size(1))
    ]
    return torch.cat([model.get_normalized_probs(output, True) for output in outputs], dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("decoder", "words", "shape"), CASES)
def test_every_context_has_a_distribution(decoder: str, words: int, shape: Any) -> None:
    """Every word in turn as the target, by its features, equals what generation sees."""
    model, source = build(decoder, words, shape), batch(2)
    past = torch.randint(4, words, (2, 2))
    fast = distributions(model, source, torch.cat([torch.full((2, 1), EOS), past], 1))[:, -1]
    every = torch.arange(words)
    for row in range(2):
        repeated = {name: value[row : row + 1].expand(words, *value.shape[1:]).contiguous()
                    for name, value in source.items()}  # fmt: skip
        targets = torch.cat([past[row].expand(words, -1), every[:, None]], dim=1)
        slow = log_probs(model, repeated, targets)[:, -1]
        torch.testing.assert_close(fast[row].double(), slow, atol=1e-6, rtol=1e-5)
        assert slow.exp().sum().item() == pytest.approx(1, abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("decoder", "words", "shape"), CASES)
def test_generation_equals_scoring(decoder: str, words: int, shape: Any) -> None:
    """Step by step, reordered and with texts dropped, as fairseq's searches ask the model."""
    model, source = build(decoder, words, shape), batch(3)
    target = torch.randint(4, words, (3, 5))
    expected = log_probs(model, source, target)
    ensemble = EnsembleModel([model])
    encoded = ensemble.forward_encoder(source)
    texts = torch.cat([torch.full((3, 1), EOS), target], dim=1)
    states: Any = [{}]
    for step in range(5):
        scores, attention = ensemble.forward_decoder(texts[:, : step + 1], encoded, states)
        chosen = scores.gather(1, texts[:, step + 1, None])[:, 0]
        torch.testing.assert_close(chosen.double(), expected[:, step], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(attention.sum(1), torch.ones(len(texts)).to(attention))
        if step == 2:
            order = torch.tensor([2, 0])
            ensemble.reorder_incremental_state(states, order)
            encoded = ensemble.reorder_encoder_out(encoded, order)
            texts, expected = texts[order], expected[order]


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_changes_nothing(decoder: str) -> None:
    """A text alone, and in a batch with longer sources and targets."""
    model, source = build(decoder, 12, (3, 4)), batch(3)
    target = torch.randint(4, 12, (3, 5))
    target[2, 2:] = torch.tensor([EOS, PAD, PAD])
    together = log_probs(model, source, target)
    alone = {"src_tokens": source["src_tokens"][2:, 2:], "src_lengths": source["src_lengths"][2:]}
    torch.testing.assert_close(together[2:, :3], log_probs(model, alone, target[2:, :3]))


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_attention_is_aligned_with_the_source_as_given(decoder: str) -> None:
    model, source = build(decoder, 12, (3, 4)), batch(3)
    target = torch.randint(4, 12, (3, 4))
    previous = torch.cat([torch.full((3, 1), EOS), target[:, :-1]], dim=1)
    _, extra = model(**source, prev_output_tokens=previous, target_tokens=target)
    attention = extra["attn"] if torch.is_tensor(extra["attn"]) else extra["attn"][0]
    assert attention.shape == (3, 4, 5)
    padding = source["src_tokens"].eq(PAD)
    assert (attention.transpose(1, 2)[padding] == 0).all()
    assert (attention.transpose(1, 2)[~padding] > 0).all()


@torch.no_grad()
def test_the_encoder_is_that_of_fairseq() -> None:
    """Outputs follow the padding of the source; states do not depend on it."""
    encoder = LightRNNTranslationEncoder(dictionary(11), 4, 3, bidirectional=True).eval()
    source = batch(3)
    outputs, hidden, cell, padding = encoder(**source)
    assert torch.equal(padding.t(), source["src_tokens"].eq(PAD))
    for row, length in enumerate(source["src_lengths"].tolist()):
        alone = encoder(source["src_tokens"][row : row + 1, -length:], torch.tensor([length]))
        torch.testing.assert_close(outputs[-length:, row], alone[0][:, 0])
        torch.testing.assert_close(hidden[:, row], alone[1][:, 0])
        torch.testing.assert_close(cell[:, row], alone[2][:, 0])


def slow_best(model: Any, source: dict[str, Tensor], longest: int) -> tuple[float, list[int]]:
    """The most probable translation of so many words or fewer, of all there are."""
    words = [word for word in range(len(model.decoder.dictionary)) if word not in (EOS, PAD)]
    best: tuple[float, list[int]] = (-math.inf, [])
    for length in range(longest + 1):
        texts = [[*text, EOS] for text in itertools.product(words, repeat=length)]
        repeated = {name: value.expand(len(texts), *value.shape[1:]).contiguous()
                    for name, value in source.items()}  # fmt: skip
        scores = log_probs(model, repeated, torch.tensor(texts)).sum(1)
        place = int(scores.argmax())
        best = max(best, (float(scores[place]), texts[place]))
    return best


@torch.no_grad()
@pytest.mark.parametrize(("decoder", "words", "shape"), CASES)
def test_the_widest_beam_finds_the_best_of_all_translations(
    decoder: str, words: int, shape: Any
) -> None:
    """fairseq's widest beam, one less than the words, holds every translation of one word."""
    model, source, longest = build(decoder, words, shape), batch(2), 2
    # fairseq ends a text by the better half of its candidates alone: let none be improbable.
    for parameter in model.decoder.words.head.softmax.parameters():
        parameter *= 0.3
    generator = SequenceGenerator(
        [model], model.decoder.dictionary, beam_size=words - 1, max_len_a=0, max_len_b=longest,
        min_len=0, normalize_scores=False,
    )  # fmt: skip
    found = generator.generate([model], {"net_input": source})
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in source.items()}
        score, text = slow_best(model, alone, longest)
        assert found[row][0]["tokens"].tolist() == text
        assert float(found[row][0]["score"]) == pytest.approx(score, abs=1e-4)


def test_one_component_is_an_ordinary_softmax_decoder() -> None:
    """k = 1: loss and gradients of nn.Embedding, nn.LSTM, attention, nn.Linear, cross-entropy."""
    for decoder in ("recurrent", "gated"):
        model, source = build(decoder, 9, (9,), extras=False), batch(2)
        ours = model.decoder
        softmax, vectors = ours.words.head.softmax, ours.core.reader.vectors
        cells, attention = ours.words.table.cells, ours.core.attention
        embedding = nn.Embedding(9, 5).double()
        output = nn.Linear(6, 9).double()
        with torch.no_grad():
            embedding.weight.copy_(vectors.weight[cells])
            output.weight.copy_(softmax.vectors.weight[cells])
            output.bias.copy_(softmax.bias[cells])
        target = torch.randint(4, 9, (2, 4))
        previous = torch.cat([torch.full((2, 1), EOS), target[:, :-1]], dim=1)
        memory, hidden, cell, padding = model.encoder(**source)
        state = ours.first_hidden(hidden), ours.first_cell(cell)
        h, _ = ours.core.network(embedding(previous), state)
        scores = torch.einsum("btd,md,sbm->bts", h, attention.key.weight, memory)
        weights = scores.masked_fill(padding.t()[:, None], -math.inf).softmax(-1)
        context = torch.einsum("bts,sbm->btm", weights, memory)
        attended = torch.tanh(torch.cat([h, context], -1) @ attention.combination.weight.t())
        expected = nn.functional.cross_entropy(
            output(attended).flatten(0, 1), target.flatten(), reduction="sum"
        )
        loss = -log_probs(model, source, target).sum()
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(softmax.vectors.weight.grad[cells], output.weight.grad)
        gradient = vectors.weight.grad[cells]
        torch.testing.assert_close(gradient, embedding.weight.grad)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_one_component_is_the_transformer_of_fairseq(shared: bool) -> None:
    flags = {"share_decoder_input_output_embed": shared}
    model, source = build("transformer", 9, (9,), extras=False, **flags), batch(2)
    words, cfg = model.decoder.words, model.decoder.cfg
    cells, softmax = words.table.cells, words.head.softmax
    stock = TransformerDecoderBase(cfg, dictionary(9), nn.Embedding(9, 8, PAD)).double().eval()
    state = {
        name: value for name, value in model.decoder.state_dict().items()
        if name in stock.state_dict()
    }  # fmt: skip
    state["embed_tokens.weight"] = words.reader.vectors.weight[cells]
    state["output_projection.weight"] = softmax.vectors.weight[cells]
    stock.load_state_dict(state)
    softmax.bias.zero_()
    target = torch.randint(4, 9, (2, 4))
    previous = torch.cat([torch.full((2, 1), EOS), target[:, :-1]], dim=1)
    logits, _ = stock(previous, encoder_out=model.encoder(**source))
    expected = torch.log_softmax(logits, -1).gather(2, target[..., None])[..., 0]
    torch.testing.assert_close(log_probs(model, source, target), expected)


class TestSourceTables:
    @torch.no_grad()
    @pytest.mark.parametrize("decoder", DECODERS)
    def test_own(self, decoder: str) -> None:
        """Source words are sums of vectors of a table of theirs that travels with the model."""
        model, other = (build(decoder, 12, (3, 4), source_table="own") for _ in range(2))
        words = model.encoder.embed_tokens.reader
        table = WordTable.from_cells(words.seats.table().cells[::-1].copy(), (4, 3))
        words.seats.seat(table)
        assert "encoder.embed_tokens.reader.seats.coordinates" in model.state_dict()
        text = torch.arange(11)
        (own,) = words.features
        expected = words.vectors(words.seats(text)).sum(-2) + own.projection(own.numbers[text])
        torch.testing.assert_close(model.encoder.embed_tokens(text), expected)
        plain = build(decoder, 12, (3, 4), extras=False, source_table="own")
        assert len(plain.encoder.embed_tokens.reader.features) == 0
        other.load_state_dict(model.state_dict())
        assert other.encoder.embed_tokens.reader.seats.table() == table
        source, target = batch(2), torch.randint(4, 12, (2, 3))
        scores = [log_probs(one, source, target) for one in (model, other)]
        torch.testing.assert_close(*scores)

    @pytest.mark.parametrize("decoder", DECODERS)
    def test_own_tables_have_as_many_components_as_the_targets(self, decoder: str) -> None:
        model = build(decoder, 17, (2, 3, 4), source_table="own")
        assert model.encoder.embed_tokens.reader.seats.shape == (3, 2, 2)

    @torch.no_grad()
    @pytest.mark.parametrize("decoder", DECODERS)
    def test_shared(self, decoder: str) -> None:
        model = build(decoder, 12, (3, 4), source_table="shared", source=dictionary(12))
        words = model.encoder.embed_tokens
        reader = model.decoder.words.reader
        assert words.reader is reader
        assert not any(name.startswith("encoder.embed_tokens") for name in model.state_dict())
        text = torch.arange(12)
        torch.testing.assert_close(words(text), reader(text).sum(-2))

    def test_a_shared_table_needs_a_joined_dictionary(self) -> None:
        with pytest.raises(SystemExit, match="preprocess with --joined-dictionary"):
            build("gated", 12, (3, 4), source_table="shared", source=dictionary(12, "s"))

    def test_a_shared_table_needs_one_width(self) -> None:
        with pytest.raises(SystemExit, match="embeddings have width 6, the decoder's 8"):
            build(
                "transformer", 12, (3, 4), source_table="shared", source=dictionary(12),
                encoder_embed_dim=6,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("decoder", "kinds", "units"),
    [
        ("recurrent", [], None),
        ("gated", [WordBias, OwnNumbers], 24),
        ("transformer", [WordBias, OwnNumbers], 32),
    ],
)
def test_what_architectures_give_words(decoder: str, kinds: list[type], units: int | None) -> None:
    """A small vocabulary; the paper's model gives them rows and columns alone."""
    nothing = {"word_dim": None, "further_tables": None, "output_ffn_dim": None}
    head = build(decoder, 12, (3, 4), keep_input_table=False, **nothing).decoder.words.head
    features = list(head.softmax.features)
    assert [type(feature) for feature in features] == kinds
    if kinds:
        assert features[1].numbers.shape == (12, 36)
    ffn = head.conditioner.ffn
    assert (ffn and len(ffn.inner.weight)) == units


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_copies_and_pickles_work(decoder: str) -> None:
    model, source = build(decoder, 12, (3, 4)), batch(2)
    target = torch.randint(4, 12, (2, 4))
    expected = log_probs(model, source, target)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(log_probs(other, source, target), expected)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(log_probs(model, source, target), expected)


def test_decoder_parameters_for_the_vocabulary() -> None:
    """Component vectors and biases instead of a vector and a bias for every word."""
    model = build("gated", 900, (30, 30), extras=False)
    counts = {name: value.numel() for name, value in model.decoder.named_parameters()}
    assert counts["core.reader.vectors.weight"] == 60 * 5
    softmax = "core.head.softmax"
    assert counts[f"{softmax}.vectors.weight"] + counts[f"{softmax}.bias"] == 60 * 7
    assert sum(counts.values()) < 900 * 3


@pytest.mark.parametrize(
    ("decoder", "flags", "message"),
    [
        ("gated", {"hidden_size": 0}, "--hidden-size 0: must be at least 1"),
        ("gated", {"dropout": 1.0}, "--dropout 1.0: must be at least 0"),
        ("gated", {"word_dim": -1}, "--word-dim -1: must not be negative"),
        ("recurrent", {"keep_input_table": True}, "--keep-input-table: the paper's model predicts"),
        ("transformer", {"share_all_embeddings": True}, "--share-all-embeddings: share"),
        ("transformer", {"adaptive_softmax_cutoff": "5"}, "--adaptive-softmax-cutoff: a component"),
        ("transformer", {"base_layers": 2}, "--base-layers: decoders with a word table have no"),
        ("transformer", {"decoder_embed_dim": 0}, "--decoder-embed-dim 0: must be at least 1"),
        ("transformer", {"word_dim": -1}, "must not be negative"),
    ],
)
def test_flags_without_meaning(decoder: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        build(decoder, 12, (3, 4), **flags)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_state_of_a_model_of_other_dictionaries(decoder: str) -> None:
    state = build(decoder, 12, (3, 4)).state_dict()
    with pytest.raises(SystemExit, match="the model has 12 words, the dictionary 10"):
        build(decoder, 10, (3, 4)).load_state_dict(dict(state))
    other: Dictionary = dictionary(13, "s")
    with pytest.raises(SystemExit, match="encoder has 11 words, the dictionary 13"):
        build(decoder, 12, (3, 4), source=other).load_state_dict(dict(state))


def test_another_task() -> None:
    job = task(dictionary(9), dictionary(9))
    job.architectures = ("lightrnn_lm",)
    from fairseq_lightrnn.models.lightrnn_transformer import LightRNNTransformerModel
    from fairseq_lightrnn.models.lightrnn_translation import LightRNNTranslationModel

    for kind in (LightRNNTransformerModel, LightRNNTranslationModel):
        with pytest.raises(SystemExit, match="use --task lightrnn_translation"):
            kind.build_model(Namespace(), job)
