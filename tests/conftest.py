"""What all tests share: fairseq is mended before any of them imports it, and none is timed."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

import fairseq_compat

fairseq_compat.install()

# A busy machine must not fail a test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
