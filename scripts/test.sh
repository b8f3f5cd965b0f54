#!/usr/bin/env bash
# Does the set-up that is needed and runs the tests, in as many processes as there are cores; further
# arguments go to pytest:
#   bash scripts/test.sh                     all tests but the slow ones
#   bash scripts/test.sh -m slow             the slow ones
#   bash scripts/test.sh tests/test_compat.py -x
#   bash scripts/test.sh -n 0 --pdb          in one process, for a debugger
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dev

# Test models are tiny: threads would only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
# The many processes under test start faster from compiled modules.
unset PYTHONDONTWRITEBYTECODE
# The commands under test are found by their names.
export PATH="$PWD/.venv/bin:$PATH"
# Every worker imports torch and fairseq, so more than eight gain nothing; a single core needs none.
workers=$(.venv/bin/python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
((workers > 1)) || workers=0
# Workers take long stretches of the tests, so that those of a file share what is trained once, and
# steal from each other at the end.
exec .venv/bin/python -m pytest -n "$workers" --dist worksteal "$@"
