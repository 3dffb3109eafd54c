#!/bin/sh
# Make a virtual environment and install ip2p into it for development: scripts/install.sh [VENV]
#
# torch comes first, on its own, so that no GPU build comes along where none is wanted:
#   IP2P_TORCH=cpu   a CPU build      (the default where no NVIDIA GPU is seen)
#   IP2P_TORCH=any   what pip's own settings give; on Linux that may be a GPU build of several GB
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}

fail() { echo "install: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python was not found. Install Python 3.10 or newer, or name one: PYTHON=python3.12 make demo"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old; ip2p needs 3.10 or newer. Name one: PYTHON=python3.12 make demo"
if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"
  "$python" -m venv "$venv"
fi
py=$venv/bin/python
pip() { "$py" -m pip --disable-pip-version-check "$@"; }

# The lock is made with Python 3.11; on 3.10 the ranges of pyproject.toml choose.
lock=requirements-dev.lock
"$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || lock=
torch=$(grep '^torch==' requirements-dev.lock)

cpu_torch() {
  # Where pip's settings offer a build marked +cpu, that is it; else ask uv, which knows where CPU builds lie.
  pip install --quiet "$torch+cpu" 2>/dev/null && return
  pip install --quiet uv 2>/dev/null &&
    "$py" -m uv pip install --quiet --python "$py" --torch-backend=cpu "$torch" 2>/dev/null && return
  echo "install: no CPU build of $torch could be had; taking the one that pip offers" >&2
  return 1
}

if ! "$py" -c 'import torch' 2>/dev/null; then
  want=${IP2P_TORCH:-}
  if [ -z "$want" ]; then
    want=any
    # Other systems' ordinary builds hold no CUDA.
    if [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidiactl ]; then want=cpu; fi
  fi
  echo "install: $torch ($want build)"
  { [ "$want" = cpu ] && cpu_torch; } || pip install --quiet "$torch"
fi

if [ -n "$lock" ]; then
  echo "install: the versions of $lock"
  # torch is there by now; its line must not bring another build.
  grep -v '^torch==' "$lock" >"$venv/rest.lock"
  pip install --quiet -r "$venv/rest.lock"
  pip install --quiet --no-deps -e .
else
  echo "install: Python 3.10, so the ranges of pyproject.toml rather than the lock"
  pip install --quiet -e '.[dev]'
fi

# A reader of settings that tests use; it asks for an old Pillow and a GUI.
pip install --quiet --no-deps sd-prompt-reader==1.3.5

"$py" -c 'import skia' ||
  fail "skia, which draws the storybook, misses a system library. On Debian or Ubuntu: apt-get install libgl1 libegl1 libfontconfig1"
