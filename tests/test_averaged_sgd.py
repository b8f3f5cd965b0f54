from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fairseq_lightrnn.optim.averaged_sgd import AveragedSGD, is_nonmonotone

OPTIONS = [{}, {"momentum": 0.9, "weight_decay": 0.01}]


def slow_trigger(losses: list[float], interval: int) -> int | None:
    """Algorithm 1 of arXiv 1708.02182: the check, from 0, at which averaging is triggered."""
    logs: list[float] = []
    for check, loss in enumerate(losses):
        if check > interval and any(loss > earlier for earlier in logs[: check - interval]):
            return check
        logs.append(loss)
    return None


@given(st.lists(st.integers(0, 8).map(float), max_size=12), st.integers(0, 5))
def test_the_trigger_is_that_of_the_paper(losses: list[float], interval: int) -> None:
    found = (n for n in range(len(losses)) if is_nonmonotone(losses[: n + 1], interval))
    assert next(found, None) == slow_trigger(losses, interval)


@pytest.mark.parametrize(
    ("losses", "interval", "expected"),
    [
        ([5, 4, 3, 2], 1, False),
        ([3, 4], 1, False),  # not yet more than one check before
        ([3, 2, 4], 1, True),
        ([3, 2, 2.5], 1, False),  # better than the best of the first
        ([3, 3], 0, False),  # not worse
        ([3, 4], 0, True),
        ([], 0, False),
    ],
)
def test_triggers(losses: list[float], interval: int, expected: bool) -> None:
    assert is_nonmonotone(losses, interval) is expected


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def update(module: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    optimiser.zero_grad()
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    module(inputs).square().sum().backward()
    optimiser.step()


def values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_are_the_mean_of_the_iterates_of_plain_sgd(options: dict[str, float]) -> None:
    plain, averaged = model(), model()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05, **options)
    optimiser = AveragedSGD(averaged.parameters(), lr=0.05, **options)
    iterates: list[list[Tensor]] = []
    for step in range(12):
        update(plain, sgd, step)
        update(averaged, optimiser, step)
        if step == 4:
            assert not optimiser.averaging
            optimiser.start_averaging()
        if step >= 4:
            iterates.append(values(plain))
        expected = values(plain)
        if iterates:
            expected = [torch.stack(own).mean(dim=0) for own in zip(*iterates, strict=True)]
        torch.testing.assert_close(values(averaged), expected)
    optimiser.zero_grad()
    assert all(map(torch.equal, values(averaged), values(plain)))
    with pytest.raises(ValueError, match="averaging has begun already"):
        optimiser.start_averaging()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("between", [True, False])
def test_resumed_equals_uninterrupted(options: dict[str, float], between: bool) -> None:
    """Saved between steps, as fairseq does, or amid a step, as it does when training breaks off."""
    module = model()
    optimiser = AveragedSGD(module.parameters(), lr=0.05, **options)
    for step in range(6):
        update(module, optimiser, step)
        if step == 2:
            optimiser.start_averaging()
    if not between:
        optimiser.zero_grad()
    saved = copy.deepcopy((module.state_dict(), optimiser.state_dict()))
    resumed = model()
    other = AveragedSGD(resumed.parameters(), lr=0.05, **options)
    memory = [parameter.data_ptr() for parameter in resumed.parameters()]
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for step in range(6, 9):
        update(module, optimiser, step)
        update(resumed, other, step)
        assert all(map(torch.equal, values(module), values(resumed)))
    other.zero_grad()  # training goes on in the memory where cuDNN has put the weights
    assert [parameter.data_ptr() for parameter in resumed.parameters()] == memory


def test_before_averaging_nothing_is_kept() -> None:
    module = model()
    optimiser = AveragedSGD(module.parameters(), lr=0.05)
    update(module, optimiser, 0)
    assert all("average" not in state for state in optimiser.state_dict()["state"].values())
