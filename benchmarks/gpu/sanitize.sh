#!/usr/bin/env bash
# Runs the ops' cases on the GPU under compute-sanitizer: bad addresses, races in shared memory, missing barriers.
#   benchmarks/gpu/sanitize.sh [python] [seconds per tool, default 300]
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3} seconds=${2:-300}

if ! command -v compute-sanitizer >/dev/null; then
  echo "sanitize.sh: skipped, no compute-sanitizer on PATH (it comes with the CUDA toolkit)"
  exit 0
fi
# -P: the source tree's folder pyengine/, without compiled modules, would shadow the installed package.
if ! "$python" -P -c 'import sys, torch; from pyengine import _cuda; sys.exit(not (torch.cuda.is_available() and _cuda.device_count()))' 2>/dev/null; then
  echo "sanitize.sh: skipped, needs a GPU, PyTorch with CUDA and pyengine built with CUDA"
  exit 0
fi

failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for tool in memcheck racecheck synccheck; do
  echo "== $tool"
  code=0
  timeout "$seconds" compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=pyengine \
    "$python" benchmarks/gpu/ops.py --check-only --small >"$log" 2>&1 || code=$?
  grep -v '^checked ' "$log"
  if grep -q 'Device not supported' "$log"; then
    echo "sanitize.sh: skipped, compute-sanitizer does not support this device here"
    exit 0
  fi
  cases=$(grep -c '^checked ' "$log")
  findings=$(grep -E '^=+ (ERROR SUMMARY|RACECHECK SUMMARY): [1-9]|^=+ (Invalid|Error: Race|Barrier error|Warning: Race)' "$log" | head -1)
  if [ $code = 124 ] && [ -z "$findings" ]; then
    echo "$tool: stopped after $seconds s and $cases cases without a finding"
  elif [ $code != 0 ]; then
    failed=1
  elif [ "$cases" = 0 ]; then
    echo "$tool: checked nothing, no case was run"
    failed=1
  fi
done
exit $failed
