"""What all tests share: fairseq is mended before any of them imports it, and none is timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import fairseq_compat

fairseq_compat.install()

# A busy machine must not fail a test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny corpus, binarised; tests only read it."""
    from fairseq_run import preprocess  # imports fairseq, which not every test needs

    return preprocess(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny parallel corpus, binarised; tests only read it."""
    from fairseq_run import preprocess_pairs

    return preprocess_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Nothing is to be trained."""
    import torch

    with torch.no_grad():
        yield
