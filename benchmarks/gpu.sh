#!/usr/bin/env bash
# Everything that a GPU machine can tell, in one command:  benchmarks/gpu.sh DIR [all|first|second|rest] [MINUTES] [--upstream CHECKOUT] [--only WORD,WORD]
#
# Builds the extension, checks every kernel, then measures in the order of value. Each result is in DIR when it is had; what hangs or
# crashes costs its own seconds. Needs no network: torch, triton, pytest, pytest-xdist, hypothesis and, to build, nvcc, setuptools,
# pybind11 and ninja are there. benchmarks/gpu/__main__.py lists the stages. What .triton-ahead holds (benchmarks/gpu/ahead.py) is not
# compiled again.
set -u
if [ $# -lt 1 ]; then sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TRITON_DEFAULT_FP_FUSION=1

# The package maps kernels/ to nanogpt_fast.kernels, which only an installation knows; for a run from the sources a link does.
if ! "$python" -c 'import nanogpt_fast.kernels' 2>/dev/null && [ ! -e nanogpt_fast/kernels ]; then
  ln -s ../kernels nanogpt_fast/kernels && trap 'rm -f nanogpt_fast/kernels' EXIT
fi
"$python" -m benchmarks.gpu "$out" "$@"
