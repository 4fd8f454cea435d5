#!/usr/bin/env bash
# Everything that a GPU machine can tell, in one command:  benchmarks/gpu.sh DIR [MINUTES]
#
# Builds the extension, runs the GPU tests and verify, then measures in the order of value: GPT-2 124M's training step beside
# nanoGPT's, generation, every kernel beside its peers. Each result is written as soon as it is had; the whole ends inside the
# minutes (default 9). Needs no network: torch, triton, pytest, and, to build, nvcc, setuptools, pybind11 and ninja are there.
#
# DIR gets summary.txt (also the last lines printed), results.jsonl, doctor.txt, build.txt, tests.txt, verify.txt, measured.txt.
# NANOGPT_FAST_COMMIT names the commit where the tree came without its history.
# NANOGPT_FAST_DRY_RUN=1 goes the same way on a CPU, on tiny shapes, in a minute: it tries the machinery and measures nothing.
set -u
if [ $# -lt 1 ]; then sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
minutes=${2:-9}
cd "$(dirname "$0")/.." || exit 2
dry=${NANOGPT_FAST_DRY_RUN:-}
python=${PYTHON:-python3}
total=$((minutes * 60))
reserve=15  # seconds for the summary
results=$out/results.jsonl
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TRITON_DEFAULT_FP_FUSION=1
: > "$out/stages.txt"
failed=0

# stage NAME PERCENT FILE COMMAND...: run the command within its percentage of all the time, and within what is left. It is
# told to end 25 seconds before it is ended, and a command that watches the clock (@MINUTES@) a little earlier still.
stage() {
  local name=$1 limit=$((total * $2 / 100)) file=$out/$3 began=$SECONDS grace=25 left hundredths before status
  shift 3
  left=$((total - SECONDS - reserve))
  [ "$limit" -lt "$left" ] || limit=$left
  [ "$limit" -ge 75 ] || grace=$((limit / 3))
  if [ "$limit" -lt 6 ]; then echo "$name: not begun, no time is left" | tee -a "$out/stages.txt"; return; fi
  limit=$((limit - grace))
  hundredths=$((limit * 90 / 60))  # of a minute, nine tenths of the limit
  set -- "${@//@MINUTES@/$((hundredths / 100)).$(printf %02d $((hundredths % 100)))}"
  touch "$file"; before=$(($(wc -l < "$file") + 1))
  echo "== $name (at most $limit s): $*" | tee -a "$file"
  timeout -k "$grace" "$limit" "$@" >> "$file" 2>&1
  status=$?
  case $status in
    0) status=passed ;;
    124 | 137) status="ran out of its time; what it had written counts" ;;
    *) status="FAILED (exit status $status, see ${file##*/})"; failed=1 ;;
  esac
  tail -n +$((before + 1)) "$file" | tail -n 12 | cut -c 1-200
  echo "$name: $status, $((SECONDS - began)) s" | tee -a "$out/stages.txt"
}

# The package maps kernels/ to nanogpt_fast.kernels, which only an installation knows; for a run from the sources a link does.
if ! "$python" -c 'import nanogpt_fast.kernels' 2>/dev/null && [ ! -e nanogpt_fast/kernels ]; then
  ln -s ../kernels nanogpt_fast/kernels && trap 'rm -f nanogpt_fast/kernels' EXIT
fi

if [ -n "$dry" ]; then
  stage "tests" 25 tests.txt "$python" -m pytest -q -p no:cacheprovider tests/test_devices.py
  stage "train" 25 measured.txt "$python" -m nanogpt_fast bench train --model=tiny --device=cpu --only="one import" --rounds=2 \
    --minutes=@MINUTES@ --json="$results"
  stage "generate" 20 measured.txt "$python" -m nanogpt_fast bench generate --model=tiny --device=cpu --batch_sizes=1 \
    --prompt=4 --tokens=8 --rounds=1 --minutes=@MINUTES@ --json="$results"
  stage "kernels" 30 measured.txt "$python" -m benchmarks.run --device cpu --quick --rounds 2 --implementations ours,eager \
    --minutes @MINUTES@ --json "$results"
else
  # Only this GPU's architecture: seconds instead of a minute.
  arch=$("$python" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))' 2>/dev/null)
  stage "build" 15 build.txt env NANOGPT_FAST_CUDA=1 NANOGPT_FAST_CUDA_ARCHS="$arch" "$python" setup.py build_ext --inplace
  stage "doctor" 8 doctor.txt "$python" -m nanogpt_fast doctor
  workers=$("$python" -c 'import xdist; print("-n 8")' 2>/dev/null)  # pytest-xdist, where it is installed
  # shellcheck disable=SC2086
  stage "tests" 24 tests.txt "$python" -m pytest -q -p no:cacheprovider $workers --maxfail=30 tests/kernels \
    tests/test_sample_cuda.py
  stage "verify" 10 verify.txt "$python" -m nanogpt_fast verify --quick
  stage "train" 32 measured.txt "$python" -m nanogpt_fast bench train --model=gpt2 --minutes=@MINUTES@ --json="$results"
  stage "generate" 14 measured.txt "$python" -m nanogpt_fast bench generate --rounds=3 --minutes=@MINUTES@ --json="$results"
  stage "kernels" 100 measured.txt "$python" -m benchmarks.run --without "compile max-autotune" --minutes @MINUTES@ \
    --json "$results"
fi

{ cat "$out/stages.txt"; echo; "$python" -m benchmarks.report --summary "$results"; } > "$out/summary.txt" 2>&1
rm -f "$out/stages.txt"
echo; echo "== summary"; cat "$out/summary.txt"
exit $failed
