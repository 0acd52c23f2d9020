#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, on a machine without network: the kernels against float64, then the benchmarks on
# a random model. Usage: OUT=folder benchmarks/gpu.sh (default ./gpu-out). PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT=${OUT:-./gpu-out}
PYTHON=${PYTHON:-python3}
# The package need not be installed there.
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT" || exit 1
status=0
# Such a machine has its own versions of torch and Python, whose deprecations are no failure of ours.
"$PYTHON" -m pytest -q -m gpu -W default -p no:cacheprovider --junitxml "$OUT/kernels.xml" tests 2>&1 |
  tee "$OUT/kernels.txt" || status=1
"$PYTHON" -m benchmarks --device cuda --model gpt2-random --json "$OUT/benchmarks.json" "$@" 2>&1 |
  tee "$OUT/benchmarks.txt" || status=1
exit "$status"
