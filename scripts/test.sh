#!/usr/bin/env bash
# Does the set-up that is needed and runs the tests; further arguments go to pytest:
#   bash scripts/test.sh                     all tests but the slow ones
#   bash scripts/test.sh -m slow             the slow ones
#   bash scripts/test.sh tests/test_compat.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dev

# Test models are tiny: threads would only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
# The commands under test are found by their names.
export PATH="$PWD/.venv/bin:$PATH"
exec .venv/bin/python -m pytest "$@"
