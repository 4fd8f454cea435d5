#!/usr/bin/env bash
# Every check and measurement on a GPU machine, in one command:  benchmarks/gpu.sh DIR [all|first|second|rest] [MINUTES] [--upstream CHECKOUT] [--only WORD,WORD]
#
# Builds the extension, checks every kernel, then measures, most valuable first. Each result is in DIR at once; a stage that hangs or
# crashes costs only its own seconds. Needs no network; torch, triton, pytest, pytest-xdist and hypothesis must be installed and, to build,
# nvcc, setuptools, pybind11 and ninja. benchmarks/gpu/__main__.py lists the stages. What is in .triton-ahead (benchmarks/gpu/ahead.py)
# is not compiled again.
set -u
case "${1:--h}" in -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2;; esac
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TRITON_DEFAULT_FP_FUSION=1

# Only an installation maps kernels/ to nanogpt_fast.kernels; a run from the sources needs a link.
if ! "$python" -c 'import nanogpt_fast.kernels' 2>/dev/null && [ ! -e nanogpt_fast/kernels ]; then
  ln -s ../kernels nanogpt_fast/kernels && trap 'rm -f nanogpt_fast/kernels' EXIT
fi
"$python" -m benchmarks.gpu "$out" "$@"
