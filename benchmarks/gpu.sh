#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, on a machine without network: the kernels against float64 with their times, floors
# and targets, the tests marked gpu, then the benchmarks on a random model of GPT-2's shape.
#
#   OUT=folder benchmarks/gpu.sh              (default ./gpu-out; PYTHON names the interpreter)
#   OUT=folder benchmarks/gpu.sh --dry-run    without a GPU: the same on tiny shapes, kernels through Triton's interpreter
#
# Other arguments go to `python -m benchmarks`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT=${OUT:-./gpu-out}
PYTHON=${PYTHON:-python3}
# The package need not be installed there.
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT" || exit 1
status=0
if [ "${1:-}" = --dry-run ]; then
  shift
  kernels=(--dry-run) tests=(--collect-only) model=(--device cpu --model tiny-random --quick)
else
  kernels=() tests=(--junitxml "$OUT/kernels.xml") model=(--device cuda --model gpt2-random)
fi

"$PYTHON" -m benchmarks.gpu "${kernels[@]}" --json "$OUT/kernels.json" 2>&1 | tee "$OUT/kernel-times.txt" || status=1
# Such a machine has its own versions of torch and Python, whose deprecations are no failure of ours.
"$PYTHON" -m pytest -q -m gpu -W default -p no:cacheprovider "${tests[@]}" tests 2>&1 |
  tee "$OUT/kernels.txt" | if [ -n "${kernels[*]}" ]; then tail -n 1; else cat; fi || status=1
"$PYTHON" -m benchmarks "${model[@]}" --json "$OUT/benchmarks.json" "$@" 2>&1 |
  tee "$OUT/benchmarks.txt" || status=1

if [ -n "${kernels[*]}" ]; then
  echo
  echo "Dry run, exit status $status. On a device, benchmarks/gpu.sh adds:"
  echo "- the kernels compiled: GPT-2 small's shape, 10,000 tokens, 16 rows of each result against float64;"
  echo "- in $OUT/kernels.json, for each kernel and precision: milliseconds, the floors by products, exponentials and"
  echo "  memory at the device's own rates, the fraction of the largest floor, and whether the target is met:"
  echo "  log-probabilities of all heads 33 ms (bf16), 60 ms (bf16x3); losses without each head 40 and 70 ms; exact top 10"
  echo "  and bottom 10 60 ms; gather 2 ms;"
  echo "- the tests marked gpu, run and not only collected, in $OUT/kernels.xml;"
  echo "- the benchmark cases at full size with three repeats, in $OUT/benchmarks.json."
fi
exit "$status"
