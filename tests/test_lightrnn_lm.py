"""The LSTM language models: what their flags and presets build, and how they are asked."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from tiny_translation import dictionary
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Gated, Recurrent
from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, WordBias
from fairseq_lightrnn.core.network import LockedDropout
from fairseq_lightrnn.models.lightrnn_lm import LightRNNDecoder, LSTMConfig

ARCHITECTURES = ["lightrnn_lm", "lightrnn_lm_gated"]
EOS = 2


class Words:
    """As much of a fairseq dictionary as a model needs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def pad(self) -> int:
        return 1

    @property
    def symbols(self) -> list[str]:
        return [str(word) for word in range(self.count)]


def config(architecture: str, **values: Any) -> LSTMConfig:
    """Returns the configuration that ``--arch`` and flags give."""
    return MODEL_DATACLASS_REGISTRY[architecture](**values)


def build(architecture: str, words: int | Any, **flags: Any) -> LightRNNDecoder:
    """Returns the decoder that ``--arch`` and flags give, for so many words or a dictionary."""
    model, cfg = MODEL_REGISTRY[architecture], config(architecture, **flags)
    words = Words(words) if isinstance(words, int) else words
    return LightRNNDecoder(cfg, model.table_settings(cfg, len(words)), words, model.conditioner)


def count(decoder: LightRNNDecoder) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())


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
    decoder = build(architecture, 793_471)
    assert decoder.words.table.shape == (891, 891)
    assert count(decoder) == independent
    assert round(count(decoder) / 1e6, 1) == millions


def test_flags_overrule_presets() -> None:
    cfg = config("lightrnn_lm_1500", hidden_size=64)
    assert (cfg.hidden_size, cfg.embed_dim, cfg.num_layers) == (64, 1500, 2)


@pytest.mark.parametrize(
    ("architecture", "conditioner"),
    [("lightrnn_lm", Recurrent), ("lightrnn_lm_1000", Recurrent), ("lightrnn_lm_gated", Gated)],
)
def test_conditioners_of_architectures(architecture: str, conditioner: type) -> None:
    decoder = build(architecture, 100, embed_dim=4, hidden_size=4)
    assert type(decoder.core.head.conditioner) is conditioner


def test_the_paper_gives_words_rows_and_columns_alone() -> None:
    softmax = build("lightrnn_lm", 100).core.head.softmax
    assert len(softmax.features) == 0
    assert softmax.vectors.weight.shape == (20, 200)


def test_the_recommended_model_of_a_small_vocabulary() -> None:
    decoder = build("lightrnn_lm_gated", 100)
    bias, own = decoder.core.head.softmax.features
    assert isinstance(bias, WordBias) and isinstance(own, OwnNumbers)
    assert own.numbers.shape == (100, 64)
    assert decoder.core.head.softmax.vectors is decoder.core.reader.vectors
    assert all(one is two for one, two in zip(
        decoder.core.reader.features, decoder.core.head.softmax.features, strict=True
    ))  # fmt: skip


def test_the_recommended_model_of_a_large_vocabulary() -> None:
    decoder = build("lightrnn_lm_gated", 50_001, embed_dim=4, hidden_size=4)
    bias, further = decoder.core.head.softmax.features
    assert isinstance(bias, WordBias) and isinstance(further, FurtherTables)
    assert len(decoder.words.further_tables) == 3
    assert decoder.core.head.softmax.vectors is not decoder.core.reader.vectors


def test_a_feed_forward_layer() -> None:
    def ffn(architecture: str, **flags: Any) -> Any:
        return build(architecture, 100, **flags).core.head.conditioner.ffn

    assert ffn("lightrnn_lm_gated", output_ffn_dim=7).inner.weight.shape == (7, 200)
    assert ffn("lightrnn_lm_gated", hidden_size=10).inner.weight.shape == (40, 10)
    assert ffn("lightrnn_lm_gated", output_ffn_dim=0) is None
    assert ffn("lightrnn_lm") is None


def test_sharing_halves_the_component_vectors() -> None:
    own, shared = (
        build("lightrnn_lm", 100, component_vectors=kind) for kind in ("separate", "shared")
    )
    assert shared.core.head.softmax.vectors is shared.core.reader.vectors
    assert count(own) - count(shared) == 20 * 200


@pytest.mark.parametrize("architecture", ["lightrnn_lm", "lightrnn_lm_gated"])
def test_outputs_are_projected_to_shared_vectors_of_another_width(architecture: str) -> None:
    model = build(architecture, 100, component_vectors="shared", embed_dim=5)
    assert model.core.head.softmax.vectors is model.core.reader.vectors
    assert model.core.head.softmax.vectors.weight.shape == (20, 5)
    assert model.core.network.project.weight.shape == (5, 200)
    assert build(architecture, 100, embed_dim=5).core.network.project is None


def test_sharing_leaves_one_set_of_vectors_of_further_tables() -> None:
    flags = {"further_tables": "2", "word_dim": 0}
    own, shared = (
        build("lightrnn_lm_gated", 100, component_vectors=kind, **flags)
        for kind in ("separate", "shared")
    )
    query_dim = 64  # where words are predicted by vectors of their own
    vectors = 20 * 200 + 2 * 20 * query_dim
    assert count(own) - count(shared) == vectors - (200 - query_dim) * 200


def test_words_are_read_and_predicted_by_the_same_numbers() -> None:
    with_numbers, without = (
        build("lightrnn_lm_gated", 100, word_dim=size, component_vectors="separate")
        for size in (7, 1)
    )
    assert count(with_numbers) - count(without) == 100 * 6 + 2 * 6 * 200


@pytest.mark.parametrize(
    ("architecture", "flags", "message"),
    [
        (
            "lightrnn_lm_gated",
            {"component_vectors": "shared", "keep_input_table": True},
            "--component-vectors shared and --keep-input-table: give one of them",
        ),
        ("lightrnn_lm", {"keep_input_table": True}, "--keep-input-table: the paper's model"),
        ("lightrnn_lm", {"embed_dim": 0}, "--embed-dim 0: must be at least 1"),
        ("lightrnn_lm", {"num_layers": 0}, "--num-layers 0: must be at least 1"),
        ("lightrnn_lm", {"dropout": 1.0}, "--dropout 1.0: must be at least 0 and below 1"),
        ("lightrnn_lm", {"dropout_in": -0.1}, "--dropout-in -0.1: must be at least 0"),
        ("lightrnn_lm", {"dropout_out": float("nan")}, "--dropout-out nan: must be at least 0"),
        ("lightrnn_lm", {"regularise": "awd,weight=1"}, "--regularise awd,weight=1: 'weight=1' is"),
    ],
)
def test_flags_without_meaning(architecture: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        build(architecture, 100, **flags)


def test_one_component_may_keep_its_input_table() -> None:
    decoder = build("lightrnn_lm", 100, keep_input_table=True, table_shape="1d")
    assert decoder.words.input_table is not None


def test_dropouts_follow_the_common_flag_unless_told_otherwise() -> None:
    core = build("lightrnn_lm", 100, num_layers=2, dropout=0.3, dropout_out=0.0).core
    rates = core.network.dropout_in.p, core.network.dropout, core.head.conditioner.dropout.p
    assert rates == (0.3, 0.3, 0.0)
    core = build("lightrnn_lm_gated", 100, dropout=0.3, dropout_in=0.0, dropout_out=0.2).core
    conditioner: Any = core.head.conditioner
    rates = core.network.dropout_in.p, conditioner.ffn.dropout.p, conditioner.dropout.p
    assert rates == (0.0, 0.2, 0.2)


def test_regularisation_reaches_its_modules() -> None:
    flags = {"num_layers": 2, "dropout": 0.3, "regularise": "awd,weight=0.25,component=0.125"}
    decoder = build("lightrnn_lm", 100, **flags)
    core = decoder.core
    assert core.network.locked and core.network.weight_dropout == 0.25
    assert isinstance(core.network.dropout_in, LockedDropout)
    assert isinstance(core.head.conditioner.dropout, LockedDropout)
    assert core.reader.dropout == 0.125
    assert (decoder.penalties.activation, decoder.penalties.change) == (2.0, 1.0)
    plain = build("lightrnn_lm", 100)
    assert not plain.core.network.locked and plain.core.reader.dropout == 0.0
    assert (plain.penalties.activation, plain.penalties.change) == (0.0, 0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("components", [1, 2, 3])
def test_evaluation_is_untouched_by_every_flag(architecture: str, components: int) -> None:
    common = {
        "table_shape": f"{components}d", "num_layers": 2, "embed_dim": 6, "hidden_size": 6,
        "word_dim": 3, "dropout": 0.3,
    }  # fmt: skip
    flags = {"regularise": "awd,weight=0.3,component=0.3"}
    plain = build(architecture, 30, **common)
    regularised = build(architecture, 30, **common, **flags)
    regularised.load_state_dict(plain.state_dict())
    words = torch.randint(2, 30, (3, 7))
    for decoder in (plain, regularised):
        decoder.eval()
    for arguments in ({"target_tokens": words.roll(1, 1)}, {}):
        one, two = (decoder(words, **arguments)[0] for decoder in (plain, regularised))
        assert torch.equal(one, two)
    plain.train(), regularised.train()
    torch.manual_seed(1)
    one = plain(words, target_tokens=words.roll(1, 1))[0]
    torch.manual_seed(1)
    assert not torch.equal(one, regularised(words, target_tokens=words.roll(1, 1))[0])


def test_targets_that_end_before_padding_are_read_themselves() -> None:
    """The last target of a text has no source word after it, yet its row is input."""
    decoder = build("lightrnn_lm", 100, dropout=0.0).eval()
    text = torch.tensor([[2, 10, 11, 12]])
    short = decoder.words.log_probs(decoder(text[:, :3], target_tokens=text[:, 1:])[0], text[:, 1:])
    source = torch.tensor([[2, 10, 11, 1, 1]])
    target = torch.tensor([[10, 11, 12, 1, 1]])
    padded = decoder.words.log_probs(decoder(source, target_tokens=target)[0], target)
    torch.testing.assert_close(padded[:, :3], short)


def randomised(architecture: str) -> LightRNNDecoder:
    """A random model in double precision, of words with all that they can have of their own."""
    torch.manual_seed(1)
    decoder = build(
        architecture, dictionary(17), table_shape="3x6", embed_dim=5, hidden_size=6, num_layers=2,
        word_dim=3, further_tables="1",
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder


def scores(decoder: Any, words: Tensor) -> Tensor:
    """Scores words 1 … T of texts (B, T+1) as training does: (B, T)."""
    targets = words[:, 1:].contiguous()
    features = decoder(words[:, :-1], target_tokens=targets)[0]
    return decoder.words.log_probs(features, targets).sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_equals_scoring(architecture: str) -> None:
    """Step by step, reordered and with texts dropped."""
    decoder = randomised(architecture)
    words = torch.cat([torch.full((3, 1), EOS), torch.randint(4, 17, (3, 5))], dim=1)
    expected, store = scores(decoder, words), {}
    for step in range(5):
        output = decoder(words[:, : step + 1], incremental_state=store)
        every = decoder.get_normalized_probs(output, True)
        assert every.shape == (len(words), 1, 17)
        chosen = every[:, 0].gather(1, words[:, step + 1, None])[:, 0]
        torch.testing.assert_close(chosen.double(), expected[:, step], atol=1e-5, rtol=1e-5)
        afresh = decoder.get_normalized_probs(decoder(words[:, : step + 1]), True)
        torch.testing.assert_close(afresh, every)
        if step == 2:
            order = torch.tensor([2, 0])
            decoder.reorder_incremental_state(store, order)
            words, expected = words[order], expected[order]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_and_pickles_work(architecture: str) -> None:
    decoder = randomised(architecture)
    words = torch.randint(4, 17, (3, 6))
    expected = scores(decoder, words)
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(scores(other, words), expected)
        fresh = randomised(architecture)
        for parameter in fresh.parameters():
            parameter.zero_()
        fresh.load_state_dict(other.state_dict())
        assert torch.equal(scores(fresh, words), expected)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(scores(decoder, words), expected)
