"""Transformer language models with a word table, as fairseq's generator and our scorer ask them."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.models.transformer import TransformerDecoderBase
from tiny_models import (
    PAD,
    TABLES,
    build,
    contexts,
    language_task,
    log_probs,
    transformer_flags,
    words_of,
)
from tiny_translation import dictionary
from torch import Tensor, nn

from fairseq_lightrnn.core.distribution import next_word_log_probs
from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, WordBias
from fairseq_lightrnn.models.lightrnn_transformer import (
    LightRNNTransformerLanguageModel,
    TransformerText,
)
from fairseq_lightrnn.models.transformer_flags import transformer_config

EOS = 2


def model_of(words: int, shape: tuple[int, ...], **flags: Any) -> Any:
    """A model as it starts."""
    cfg = transformer_flags(shape, **flags)
    return LightRNNTransformerLanguageModel.build_model(cfg, language_task(words))


def scores(decoder: Any, words: Tensor) -> Tensor:
    """Scores words 1 … T of texts (B, T+1) as training does: (B, T)."""
    targets = words[:, 1:].contiguous()
    features = decoder(words[:, :-1], target_tokens=targets)
    found = decoder.get_normalized_probs(features, True, {"target": targets})
    return found.gather(2, targets[..., None])[..., 0]


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_generation_equals_scoring(words: int, shape: tuple[int, ...]) -> None:
    """Step by step from fairseq's store of keys and values, reordered and with texts dropped."""
    decoder = build("transformer", words, shape).decoder
    text = torch.cat([torch.full((3, 1), EOS), words_of((3, 5), words)], dim=1)
    expected, store = scores(decoder, text), {}
    for step in range(5):
        output = decoder(text[:, : step + 1], incremental_state=store)
        every = decoder.get_normalized_probs(output, True)
        assert every.shape == (len(text), 1, words)
        chosen = every[:, 0].gather(1, text[:, step + 1, None])[:, 0]
        torch.testing.assert_close(chosen.double(), expected[:, step], atol=1e-5, rtol=1e-5)
        afresh = decoder.get_normalized_probs(decoder(text[:, : step + 1]), True)
        torch.testing.assert_close(afresh, every, atol=1e-5, rtol=1e-5)
        if step == 2:
            order = torch.tensor([2, 0])
            decoder.reorder_incremental_state_scripting(store, order)
            text, expected = text[order], expected[order]


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_reading_word_by_word_equals_the_whole_text(words: int, shape: tuple[int, ...]) -> None:
    text = build("transformer", words, shape)
    lines = words_of((3, 7), words)
    whole = log_probs(text, lines)
    torch.testing.assert_close(whole, scores(text.decoder, lines))
    context = None
    for step in range(6):
        context = text.read(lines[:, step : step + 1], context)
        assert context.history is not None and context.history.size(1) == step + 1
        every = next_word_log_probs(text.head, context)
        chosen = every.gather(1, lines[:, step + 1, None])[:, 0]
        torch.testing.assert_close(chosen, whole[:, step])
    order = torch.tensor([1, 1, 0])
    again = text.read(lines[order, 6:], context.select(order))
    torch.testing.assert_close(again.output, text.read(lines).output[order])


def test_padding_after_a_text_changes_nothing() -> None:
    text = build("transformer", 12, (3, 4))
    lines = words_of((2, 8), 12)
    padded = torch.cat([lines, torch.full((2, 3), PAD)], dim=1)
    torch.testing.assert_close(scores(text.decoder, padded)[:, :7], scores(text.decoder, lines))


@pytest.mark.parametrize("shared", [False, True])
def test_one_component_is_the_language_model_of_fairseq(shared: bool) -> None:
    cfg = transformer_flags((9,), word_dim=0, further_tables="0", output_ffn_dim=0,
                            share_decoder_input_output_embed=shared)  # fmt: skip
    model = LightRNNTransformerLanguageModel.build_model(cfg, language_task(9)).double().eval()
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name:
            parameter.normal_(std=0.5)
    decoder, softmax = model.decoder, model.decoder.words.head.softmax
    softmax.bias.zero_()
    cells = decoder.words.table.cells
    embedding = nn.Embedding(9, 8, PAD)
    stock = TransformerDecoderBase(
        transformer_config(cfg), dictionary(9), embedding, no_encoder_attn=True
    ).double().eval()  # fmt: skip
    state = {name: value for name, value in decoder.state_dict().items()
             if name in stock.state_dict()}  # fmt: skip
    state["embed_tokens.weight"] = decoder.words.reader.vectors.weight[cells]
    state["output_projection.weight"] = softmax.vectors.weight[cells]
    stock.load_state_dict(state)
    lines = words_of((2, 6), 9)
    expected = torch.log_softmax(stock(lines[:, :-1])[0], -1)
    chosen = expected.gather(2, lines[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores(decoder, lines), chosen)
    found = next_word_log_probs(decoder.words.head, TransformerText(decoder).read(lines[:, :-1]))
    torch.testing.assert_close(found, expected[:, -1])


def test_copies_and_pickles_work() -> None:
    text = build("transformer", 12, (3, 4))
    lines = words_of((2, 6), 12)
    expected = log_probs(text, lines)
    copies = copy.deepcopy(text.decoder), pickle.loads(pickle.dumps(text.decoder))
    for other in copies:
        assert torch.equal(log_probs(TransformerText(other), lines), expected)
        fresh = build("transformer", 12, (3, 4), seed=1)
        fresh.decoder.load_state_dict(other.state_dict())
        assert torch.equal(log_probs(fresh, lines), expected)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(log_probs(text, lines), expected)


def test_the_recommended_models() -> None:
    small, large = (
        model_of(words, ("2d",)).decoder.words.head.softmax.features for words in (100, 50_001)
    )
    assert [type(feature) for feature in small] == [WordBias, OwnNumbers]
    assert small[1].numbers.shape == (100, 64)
    assert [type(feature) for feature in large] == [WordBias, FurtherTables]
    assert len(large[1].tables) == 3
    conditioner = model_of(100, ("2d",)).decoder.words.head.conditioner
    assert conditioner.ffn.inner.weight.shape == (32, 8)


def test_vectors_start_as_wide_as_those_of_fairseq() -> None:
    """Sums of a word's vectors have a variance of 1 / width, as its embeddings have."""
    for flags in ({"word_dim": 0}, {"word_dim": 1, "further_tables": "2"}):
        sizes = {"decoder_embed_dim": 256, "decoder_attention_heads": 4, "decoder_layers": 1}
        reader = model_of(10_000, ("2d",), **sizes, **flags).decoder.words.reader
        vectors = reader.sum(torch.arange(0, 10_000, 7))
        assert vectors.var().item() == pytest.approx(1 / 256, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"adaptive_input": True}, "--adaptive-input: component vectors are no adaptive input"),
        ({"adaptive_softmax_cutoff": "5"}, "--adaptive-softmax-cutoff: a component softmax is no"),
        ({"tie_adaptive_weights": True}, "--tie-adaptive-weights: component vectors are no"),
        ({"character_embeddings": True}, "--character-embeddings: words are read by their comp"),
        ({"decoder_embed_dim": 0}, "--decoder-embed-dim 0: must be at least 1"),
        ({"word_dim": -1}, "--word-dim -1: must not be negative"),
        (
            {"share_decoder_input_output_embed": True, "decoder_output_dim": 4},
            r"--share-decoder-input-output-embed needs --decoder-output-dim \(4\) equal to",
        ),
        (
            {"share_decoder_input_output_embed": True, "keep_input_table": True},
            "--share-decoder-input-output-embed and --keep-input-table: give one of them",
        ),
    ],
)
def test_flags_without_meaning(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        model_of(12, (3, 4), **flags)


def test_sizes_follow_the_width() -> None:
    decoder = model_of(12, (3, 4), decoder_input_dim=6, decoder_output_dim=4).decoder
    assert decoder.words.reader.vectors.dim == 6
    assert decoder.words.head.softmax.vectors.dim == 4
    lines = words_of((2, 5), 12)
    assert torch.isfinite(scores(decoder.eval(), lines)).all()


def test_another_task() -> None:
    job = SimpleNamespace(architectures=("lightrnn_translation",))
    with pytest.raises(SystemExit, match="use --task lightrnn_language_modeling"):
        LightRNNTransformerLanguageModel.build_model(transformer_flags((3, 4)), job)


def test_contexts_know_the_texts_behind_them() -> None:
    context = contexts(build("transformer", 12, (3, 4)), 3)
    assert context.state is None and context.history is not None
    assert torch.equal(context.history, words_of((3, 3), 12))
