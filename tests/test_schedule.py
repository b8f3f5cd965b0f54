from __future__ import annotations

import pytest

from fairseq_lightrnn.tasks._schedule import reallocation_epochs


@pytest.mark.parametrize(
    ("epochs", "interval", "max_epoch", "expected"),
    [
        (None, None, 5, []),
        ("", None, 5, []),
        ("3,1", None, 5, [1, 3]),
        ("3", None, 0, [3]),
        (None, 2, 6, [2, 4]),
        (None, 2, 5, [2, 4]),
        (None, 3, 0, [3, 6, 9]),
        (None, 1, 2, [1]),
    ],
)
def test_schedules(epochs, interval, max_epoch, expected) -> None:
    follows = reallocation_epochs(epochs, interval, max_epoch)
    assert [epoch for epoch in range(10) if follows(epoch)] == expected


@pytest.mark.parametrize(
    ("epochs", "interval", "max_epoch", "message"),
    [
        ("1", 1, 5, "exclude each other"),
        (None, 0, 5, "--reallocate-interval 0: must be at least 1"),
        (None, 5, 5, "--reallocate-interval 5: no reallocation before the last epoch"),
        ("3,5", None, 5, "--reallocate-epochs 3,5: after epoch 5 no epoch of training follows"),
        ("7", None, 5, "after epoch 7 no epoch"),
        ("0", None, 5, "epochs are counted from 1"),
        ("1;2", None, 5, "--reallocate-epochs 1;2: expected numbers joined by commas"),
        ("1,", None, 5, "expected numbers"),
    ],
)
def test_senseless_schedules_are_refused(epochs, interval, max_epoch, message) -> None:
    with pytest.raises(ValueError, match=message):
        reallocation_epochs(epochs, interval, max_epoch)
