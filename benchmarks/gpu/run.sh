#!/usr/bin/env bash
# Everything that a GPU can tell about pyengine, in one command of at most ten minutes, without a network:
#
#   benchmarks/gpu/run.sh [--output FOLDER] [--minutes 10] [--only STEP,...] [--installed]
#
# builds the extension for this GPU, runs every op case against float64, the `shapes` stream on each GPU backend that is
# here against the CPU plan, compute-sanitizer on the kernels, then the benchmarks with the roofline beside each figure.
# Writes gpu-<name>.json and gpu-<name>.md to benchmarks/results. What is missing is skipped, and it says why. Exit code: 0,
# or 1 if something gave a wrong result. PYTHON chooses the interpreter (default python3), which should have PyTorch with CUDA.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/run.py" "$@"
