from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq_run import TASK  # noqa: F401  (imports fairseq on every supported Python)

from fairseq_lightrnn.models.lightrnn_lm import LightRNNDecoder, LightRNNLanguageModelConfig


class Words:
    """As much of a fairseq dictionary as a model needs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def pad(self) -> int:
        return 1


def config(architecture: str, **values: Any) -> LightRNNLanguageModelConfig:
    """Returns the configuration that ``--arch`` and flags give."""
    args = SimpleNamespace(**values)
    if architecture in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[architecture](args)
    return LightRNNLanguageModelConfig(**vars(args))


@pytest.mark.parametrize(
    ("architecture", "millions"),
    [("lightrnn_lm_1500", 41.4), ("lightrnn_lm_1000", 19.6), ("lightrnn_lm_500", 5.8)],
)
def test_parameters_of_the_published_models(architecture: str, millions: float) -> None:
    """One Billion Word, 793,471 words; the paper states 41M, 19M and 5.7M."""
    with torch.device("meta"):
        module = torch.nn.Module()
        cfg = config(architecture)
        module.embedding = torch.nn.Embedding(2 * 891, cfg.embed_dim)
        module.lstm = torch.nn.LSTM(cfg.embed_dim, cfg.hidden_size, cfg.num_layers)
        module.output = torch.nn.Linear(cfg.hidden_size, 2 * 891)
    independent = sum(parameter.numel() for parameter in module.parameters())
    decoder = LightRNNDecoder(cfg, Words(793_471))
    assert decoder.table.shape == (891, 891)
    counted = sum(parameter.numel() for parameter in decoder.parameters())
    assert counted == independent
    assert round(counted / 1e6, 1) == millions


def test_flags_overrule_presets() -> None:
    cfg = config("lightrnn_lm_1500", hidden_size=64)
    assert (cfg.hidden_size, cfg.embed_dim, cfg.num_layers) == (64, 1500, 2)


@pytest.mark.parametrize("architecture", ["lightrnn_lm_gated", "lightrnn_translation_gated"])
def test_recommended_architectures(architecture: str) -> None:
    cfg = config(architecture, hidden_size=10)
    assert (str(cfg.composition), cfg.output_ffn_dim) == ("gated", 40)
    assert config(architecture, output_ffn_dim=0).output_ffn_dim == 0
    assert config(architecture).output_ffn_dim == 4 * config(architecture).hidden_size


def test_a_feed_forward_layer() -> None:
    cfg = config("lightrnn_lm_gated", output_ffn_dim=7)
    assert LightRNNDecoder(cfg, Words(100)).composition.ffn.inner.weight.shape == (7, 200)
    assert LightRNNDecoder(config("lightrnn_lm"), Words(100)).composition.ffn is None


def test_sharing_halves_the_component_vectors() -> None:
    own = LightRNNDecoder(config("lightrnn_lm"), Words(100))
    shared = LightRNNDecoder(config("lightrnn_lm", share_component_vectors=True), Words(100))
    assert shared.softmax.weight is shared.composition.embedding.weight
    count = [sum(p.numel() for p in decoder.parameters()) for decoder in (own, shared)]
    assert count[0] - count[1] == 20 * 200


def test_sharing_halves_the_residuals() -> None:
    sizes = {"input_residual_dim": 6, "output_residual_dim": 6, "frequent_words": 10}
    own, shared = (
        LightRNNDecoder(config("lightrnn_lm_gated", share_residuals=share, **sizes), Words(100))
        for share in (False, True)
    )
    assert shared.softmax.residual is shared.composition.embedding.residual.weight
    assert shared.softmax.frequent.residual is shared.composition.embedding.frequent.residual.weight
    count = [sum(p.numel() for p in decoder.parameters()) for decoder in (own, shared)]
    assert count[0] - count[1] == 100 * 6 + 10 * 64


def test_dropouts_follow_the_common_flag_unless_told_otherwise() -> None:
    cfg = config("lightrnn_lm", num_layers=2, dropout=0.3, dropout_out=0.0, dropout_between=0.1)
    composition = LightRNNDecoder(cfg, Words(100)).composition
    rates = composition.dropout_in.p, composition.lstm.dropout, composition.dropout_out.p
    assert rates == (0.3, 0.1, 0.0)
    for hidden, rate in ((None, 0.2), (0.0, 0.0)):
        cfg = config("lightrnn_lm_gated", dropout=0.3, dropout_out=0.2, dropout_hidden=hidden)
        composition = LightRNNDecoder(cfg, Words(100)).composition
        rates = composition.dropout_hidden.p, composition.ffn.dropout.p, composition.dropout_out.p
        assert rates == (rate, rate, 0.2)


def test_targets_that_end_before_padding_are_read_themselves() -> None:
    """The last target of a text has no source word after it, yet its row is input."""
    decoder = LightRNNDecoder(config("lightrnn_lm", dropout=0.0), Words(100)).eval()
    text = torch.tensor([[2, 10, 11, 12]])
    short = decoder.component_log_probs(
        decoder(text[:, :3], target_tokens=text[:, 1:])[0], text[:, 1:]
    )
    source = torch.tensor([[2, 10, 11, 1, 1]])
    target = torch.tensor([[10, 11, 12, 1, 1]])
    padded = decoder.component_log_probs(decoder(source, target_tokens=target)[0], target)
    torch.testing.assert_close(padded[:, :3], short)
