"""What all tests share: fairseq is mended before any of them imports it."""

from __future__ import annotations

import fairseq_compat

fairseq_compat.install()
