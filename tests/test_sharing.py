"""Checkpoints hold what parts of a model share once, and give it back to all of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_translation import DECODERS, batch, build, dictionary, log_probs
from torch import nn

from fairseq_lightrnn.core.seats import PredictedTable
from fairseq_lightrnn.core.sharing import save_shared_once
from fairseq_lightrnn.core.table import WordTable


class Pair(nn.Module):
    """Two names for one layer and one table, and a layer and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = self.first
        self.own = nn.Linear(3, 2)
        self.bias = self.first.bias
        self.table = PredictedTable(5, (2, 3))
        self.seats = nn.ModuleList([self.table])
        save_shared_once(self)


KEYS = ["bias", "first.weight", "own.bias", "own.weight", "table.coordinates"]


def test_what_is_shared_is_saved_under_its_first_name() -> None:
    assert sorted(Pair().state_dict()) == KEYS


def test_preferred_names_come_first() -> None:
    module = nn.Module()
    module.encoder, module.decoder = nn.Module(), nn.Module()
    module.encoder.layer = module.decoder.layer = nn.Linear(2, 2)
    module.encoder.own = nn.Linear(2, 2)
    save_shared_once(module, "decoder.")
    assert sorted(module.state_dict()) == [
        "decoder.layer.bias", "decoder.layer.weight", "encoder.own.bias", "encoder.own.weight",
    ]  # fmt: skip


def test_it_is_loaded_by_all_parts() -> None:
    one, two = Pair(), Pair()
    one.table.seat(WordTable.from_cells(torch.tensor([5, 3, 0, 1, 2]).numpy(), (2, 3)))
    state = one.state_dict()
    two.load_state_dict(state)
    assert sorted(state) == KEYS  # what was given is left as it was
    for name, value in one.named_parameters():
        assert torch.equal(value, dict(two.named_parameters())[name])
    assert two.second is two.first and two.bias is two.first.bias
    assert two.table.table() == one.table.table()
    assert two.table.cells.tolist() == one.table.cells.tolist()


def test_a_part_of_a_larger_model() -> None:
    outer, other = nn.ModuleDict({"inner": Pair()}), nn.ModuleDict({"inner": Pair()})
    state = outer.state_dict()
    assert sorted(state) == [f"inner.{key}" for key in KEYS]
    other.load_state_dict(state)
    inner: Any = outer["inner"]
    assert torch.equal(other["inner"].first.weight, inner.first.weight)


def test_other_precisions_keep_their_names() -> None:
    assert sorted(Pair().half().state_dict()) == KEYS


def test_missing_names_are_reported() -> None:
    state = Pair().state_dict()
    del state["first.weight"]
    with pytest.raises(RuntimeError, match="first.weight"):
        Pair().load_state_dict(state)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_share_what_they_share(how: Any) -> None:
    one = Pair()
    two = how(one)
    assert two.second is two.first and two.first is not one.first
    assert sorted(two.state_dict()) == KEYS
    three = Pair()
    two.load_state_dict(three.state_dict())
    assert torch.equal(two.first.weight, three.first.weight)
    assert not torch.equal(one.first.weight, three.first.weight)


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_tensor_of_a_translation_model_is_saved_twice(decoder: str) -> None:
    flags = {"source_table": "shared", "source": dictionary(12)}
    model, other = (build(decoder, 12, (3, 4), **flags) for _ in range(2))
    state = model.state_dict()
    places = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(set(places)) == len(places)
    assert not any(name.startswith("encoder.embed_tokens") for name in state)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(state)
        source, target = batch(2, words=12), torch.randint(4, 12, (2, 3))
        scores = [log_probs(one, source, target) for one in (model, other)]
    assert torch.equal(*scores)
