from __future__ import annotations

import pytest

from fairseq_lightrnn.tasks.schedule import reallocation_epochs


@pytest.mark.parametrize(
    ("epochs", "max_epoch", "expected"),
    [
        (None, 5, []),
        ("", 5, []),
        ("3,1", 5, [1, 3]),
        ("3", 0, [3]),
        ("2-4", 5, [2, 3, 4]),
        ("2-4", 0, [2, 3, 4]),
        ("1, 3-4,6", 9, [1, 3, 4, 6]),
        ("2-2", 3, [2]),
        ("1-3,2-4", 5, [1, 2, 3, 4]),
    ],
)
def test_schedules(epochs: str | None, max_epoch: int, expected: list[int]) -> None:
    assert sorted(reallocation_epochs(epochs, max_epoch)) == expected


@pytest.mark.parametrize(
    ("epochs", "max_epoch", "message"),
    [
        ("3,5", 5, "--reallocate-epochs 3,5: after epoch 5 no epoch of training follows"),
        ("3-5", 5, "--reallocate-epochs 3-5: after epoch 5 no epoch of training follows"),
        ("7", 5, "after epoch 7 no epoch"),
        ("0", 5, "epochs are counted from 1"),
        ("0-2", 5, "epochs are counted from 1"),
        ("4-2", 5, "--reallocate-epochs 4-2: the range 4-2 is empty"),
        ("1;2", 5, "--reallocate-epochs 1;2: expected numbers and ranges joined by commas"),
        ("1,", 5, "expected numbers"),
        ("2-", 5, "expected numbers"),
        ("-2", 5, "expected numbers"),
        ("1.5", 5, "expected numbers"),
    ],
)
def test_senseless_schedules_are_refused(epochs: str, max_epoch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reallocation_epochs(epochs, max_epoch)
