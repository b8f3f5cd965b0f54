#!/usr/bin/env bash
# Installs everything into .venv: requirements, fairseq, the plugin. See `bash scripts/setup.sh --help`.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash scripts/setup.sh [--dev]

Makes the virtual environment .venv, or goes on with the one that is there, and installs into it
  1. requirements.txt, in the versions of constraints.txt
  2. fairseq 0.12.2, without its own requirements, which no longer resolve
  3. this plugin, so that changes to its code take effect at once
  4. with --dev, the tools of scripts/test.sh (requirements-dev.txt) and, where it builds, kenlm
A second run finds everything done and takes no time.

Environment:
  PYTHON   the Python 3.11, 3.12 or 3.13 to make .venv with; by default the first suitable one of
           python3, python3.13, python3.12, python3.11
  PIP_*    pip's own settings, an index or a folder of wheels (PIP_FIND_LINKS) for instance
  CXX      the C++ compiler that fairseq is built with; default g++
TEXT
}

dev=
case "${1-}" in
'') ;;
--dev) dev=yes ;;
-h | --help)
    usage
    exit 0
    ;;
*)
    usage >&2
    exit 2
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
python=$venv/bin/python
fairseq_version=0.12.2

fail() {
    printf '\nsetup: %s\n' "$@" >&2
    exit 1
}

# step NAME ADVICE COMMAND...: runs the command; if it fails, says which step and what to do.
step() {
    local name=$1 advice=$2
    shift 2
    printf 'setup: %s\n' "$name"
    "$@" || fail "this step failed: $name" "$advice"
}

# quietly COMMAND...: shows what the command prints only if it fails.
quietly() {
    local output
    output=$("$@" 2>&1) || {
        printf '%s\n' "$output" >&2
        return 1
    }
}

supported() { # supported PYTHON: whether it runs and is a CPython that we support
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON-}" ]; then
        supported "$PYTHON" || fail \
            "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13; give another or unset PYTHON"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "found no Python 3.11, 3.12 or 3.13; install one, or give its path: PYTHON=/path/to/python bash scripts/setup.sh"
}

version_of() { "$1" -c 'import platform; print(platform.python_version())'; }

make_venv() {
    if [ -e "$venv" ]; then
        supported "$python" || fail \
            "$venv has no working Python 3.11, 3.12 or 3.13; delete the folder and run this again"
        "$python" -m pip --version >/dev/null 2>&1 || fail \
            "$venv has no pip; delete the folder and run this again"
        if [ -n "${PYTHON-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of "$python")" ]; then
            fail "$venv has Python $(version_of "$python"), but PYTHON=$PYTHON is $(version_of "$PYTHON"); unset PYTHON, or delete the folder and run this again"
        fi
        return
    fi
    local chosen
    chosen=$(find_python)
    step "making $venv with Python $(version_of "$chosen")" \
        "Delete $venv and see that Python's venv module is complete (Debian, Ubuntu: apt install python3-venv)." \
        "$chosen" -m venv "$venv"
}

# What an installation depends on. It changes when a file below does, or the folder's place, or the
# Python.
fingerprint() {
    {
        printf '%s\n' "$root" "$("$python" -VV)" "$fairseq_version" "$@"
        cat requirements.txt constraints.txt setup.py pyproject.toml fairseq_lightrnn/version.py "$@"
    } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

installed_version() { # installed_version PACKAGE: prints nothing where it is not installed
    "$python" - "$1" <<'CODE'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    print(version(sys.argv[1]))
except PackageNotFoundError:
    pass
CODE
}

pip_install() {
    PIP_DISABLE_PIP_VERSION_CHECK=${PIP_DISABLE_PIP_VERSION_CHECK-1} "$python" -m pip install "$@"
}

install_fairseq() {
    [ "$(installed_version fairseq)" != "$fairseq_version" ] || return 0
    command -v "${CXX:-g++}" >/dev/null || fail \
        "fairseq is built from source and needs a C++ compiler, but ${CXX:-g++} was not found" \
        "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name yours: CXX=..."
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || fail \
        "fairseq is built from source and needs Python's header files, but Python.h was not found" \
        "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
    step "building and installing fairseq $fairseq_version (about a minute)" \
        "The compiler's or pip's message stands above." \
        quietly pip_install --no-deps "fairseq==$fairseq_version"
}

# stamped FILE FINGERPRINT: whether an earlier run wrote this fingerprint when it was done.
stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

make_venv

stamp=$venv/.setup-stamp
current=$(fingerprint)
if ! stamped "$stamp" "$current"; then
    network="See that the package index can be reached; pip's settings (PIP_INDEX_URL, PIP_FIND_LINKS, a proxy) are honoured. What was installed so far is kept."
    step "installing requirements.txt (most of it is torch)" "$network" \
        pip_install --no-warn-conflicts -r requirements.txt -c constraints.txt
    install_fairseq
    step "installing the plugin" "$network" quietly pip_install --no-deps --editable .
    step "importing fairseq" "Delete $venv and run this again." \
        quietly "$python" -c 'import fairseq.checkpoint_utils'
    printf '%s\n' "$current" >"$stamp"
fi

if [ -n "$dev" ]; then
    dev_stamp=$venv/.setup-stamp-dev
    current=$(fingerprint requirements-dev.txt)
    if ! stamped "$dev_stamp" "$current"; then
        step "installing requirements-dev.txt" \
            "See that the package index can be reached. What was installed so far is kept." \
            quietly pip_install --no-warn-conflicts -r requirements-dev.txt -c constraints.txt
        # It is built from source, and only the tests of re-ranking by a KenLM model need it.
        pip_install --no-deps kenlm -c constraints.txt >/dev/null 2>&1 || printf \
            'setup: kenlm does not build here (it needs cmake and a C++ compiler): its tests will be skipped\n'
        printf '%s\n' "$current" >"$dev_stamp"
    fi
fi

printf 'setup: all is installed in %s (Python %s)\n' "$venv" "$(version_of "$python")"
