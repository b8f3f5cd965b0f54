"""How an exported transformer reads, against fairseq's decoder, for all of its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_exports import Exported, export, text_model
from tiny_models import PAD, build, log_probs, single_precision, words_of

from fairseq_lightrnn.export.graphs import decoder_graphs

WORDS, SHAPE, LIMIT = 20, (3, 3, 3), 64
OPTIONS: list[dict[str, Any]] = [
    {},
    {"decoder_normalize_before": True},
    {"decoder_normalize_before": True, "no_decoder_final_norm": True},
    {"decoder_learned_pos": True},
    {"no_token_positional_embeddings": True},
    {"layernorm_embedding": True, "no_scale_embedding": True},
    {"decoder_input_dim": 6, "decoder_output_dim": 10},
    {"share_decoder_input_output_embed": True, "keep_input_table": False},
    {"activation_fn": "gelu"},
    {"activation_fn": "gelu_accurate", "decoder_layerdrop": 0.5},
    {"scale_attn": True, "scale_fc": True, "scale_heads": True, "scale_resids": True},
    {"quant_noise_pq": 0.1, "quant_noise_pq_block_size": 2, "checkpoint_activations": True},
    {"decoder_attention_heads": 1, "decoder_layers": 3, "decoder_embed_dim": 12},
]


def transformer(scale: float = 0.3, **flags: Any) -> Any:
    """A random one, what it normalises by included."""
    decoder = single_precision(build("transformer", WORDS, SHAPE, scale=scale, **flags))
    with torch.no_grad():
        for name, parameter in decoder.decoder.named_parameters():
            if "layer_norm" in name or "layernorm" in name:
                parameter.add_(torch.randn_like(parameter) * scale)
    return decoder


def exported(form: str = "onnx", **flags: Any) -> Exported:
    return export(transformer(**flags), WORDS, SHAPE, form=form)


def ours(found: Exported, words: np.ndarray, *pieces: int) -> np.ndarray:
    """Scores words (N, T+1) but the first, read in pieces of so many words."""
    position, outputs = found.network.begin(len(words)), []
    for part in np.split(words, np.cumsum(pieces), axis=1):
        position, before = found.network.read(position, part)
        outputs.append(before)
    flat = np.concatenate(outputs, axis=1)[:, 1:].reshape(-1, *outputs[0].shape[2:])
    scores = found.network.score(flat, words[:, 1:].reshape(-1)).sum(axis=1)
    return np.asarray(scores.reshape(len(words), -1))


def theirs(found: Exported, words: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return log_probs(found.decoder, words).numpy()


@pytest.mark.parametrize("flags", OPTIONS, ids=lambda flags: "-".join(flags) or "none")
def test_every_option_is_computed_as_fairseq_does(flags: dict[str, Any]) -> None:
    found, words = exported(**flags), words_of((3, 9), WORDS)
    expected = theirs(found, words)
    numbers = found.number[words.numpy()]
    for pieces in ([], [4], [1] * 8):
        np.testing.assert_allclose(ours(found, numbers, *pieces), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flags", [{}, {"decoder_learned_pos": True}])
def test_programs_of_torch_read_so_too(flags: dict[str, Any]) -> None:
    found, words = exported("torch", **flags), words_of((2, 6), WORDS)
    numbers = found.number[words.numpy()]
    for pieces in ([], [3], [1] * 5):
        scores = ours(found, numbers, *pieces)
        np.testing.assert_allclose(scores, theirs(found, words), rtol=1e-5, atol=1e-5)
    alone = ours(found, numbers[:1], 1, 2)
    np.testing.assert_allclose(alone, theirs(found, words[:1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flags", [{}, {"decoder_learned_pos": True}])
def test_nobody_looks_at_padding(flags: dict[str, Any]) -> None:
    found, words = exported(**flags), words_of((3, 7), WORDS)
    words[0, 2] = words[1, 3:5] = PAD
    numbers = found.number[words.numpy()]
    for pieces in ([], [3], [1] * 6):
        scores = ours(found, numbers, *pieces)
        np.testing.assert_allclose(scores, theirs(found, words), rtol=1e-5, atol=1e-5)


def test_texts_of_different_lengths_are_read_together() -> None:
    model = text_model(exported())
    texts = ["", "w002 w003 w004", "w005", "w002 w003 w004 w005 w006"]
    text = model.text(texts)
    more = ["w007 w008", "w009", "", "w002 w003 w004"]
    text.add(more)
    expected = [
        model.text(f"{one} {two}").log_probs() for one, two in zip(texts, more, strict=True)
    ]
    np.testing.assert_allclose(text.log_probs(), np.concatenate(expected), rtol=1e-5, atol=1e-5)
    text.add("w004")
    alone = model.text("w005 w004").log_probs()
    np.testing.assert_allclose(text.log_probs()[2:3], alone, rtol=1e-5, atol=1e-5)
    together = model.score(texts)
    for one, score in zip(texts, together, strict=True):
        np.testing.assert_allclose(
            model.score(one).log_probs, score.log_probs, rtol=1e-5, atol=1e-5
        )


def test_a_text_is_as_long_as_there_are_positions() -> None:
    found = exported(decoder_learned_pos=True)
    model = text_model(found)
    longest = " ".join(["w002"] * (LIMIT - 1))
    scores = model.score(longest)
    words = np.array([[0] + [2] * (LIMIT - 1) + [0]])
    expected = theirs(found, torch.from_numpy(found.order[words]))
    np.testing.assert_allclose(scores.log_probs, expected[0], rtol=0, atol=1e-4)
    assert model.learn(longest).new == []
    assert len(model.next_words(longest, 3)) == 3
    for ask in (model.score, model.next_words, model.learn):
        with pytest.raises(ValueError, match="a text of more than 64 words"):
            ask(f"{longest} w002")
    text = model.text(["w002", longest])
    before = text.log_probs()
    with pytest.raises(ValueError, match="a text of more than 64 words"):
        text.add(["w003", "w003 w004"])  # neither is read in part
    np.testing.assert_array_equal(text.log_probs(), before)
    drawn = model.sample(longest, count=20, max_words=2, seed=1)
    assert max(len(one.split()) for one in drawn) == LIMIT


def test_what_was_trained_otherwise_is_refused() -> None:
    decoder = transformer()
    decoder.decoder.cfg.quant_noise.scalar = 0.5
    with pytest.raises(ValueError, match="--quant-noise-scalar 0.5: a transformer that was"):
        decoder_graphs(decoder, torch.arange(WORDS))
