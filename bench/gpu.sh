#!/usr/bin/env bash
# On a machine with a GPU: build the extension, run the GPU tests, then the benchmark selection, within a time limit.
#   bench/gpu.sh OUT [SECONDS [PYTEST SELECTION ...]]
# OUT receives tests.txt, bench.txt and bench.json. A diffusers wheel in .wheels/ is installed if diffusers is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: bench/gpu.sh OUT [SECONDS [SELECTION ...]]}" && cd "$1" && pwd)
deadline=$(( $(date +%s) + ${2:-540} ))
shift $(( $# < 2 ? $# : 2 ))
left() { echo $(( deadline - $(date +%s) )); }

python=${PYTHON:-python3}
"$python" -c 'import diffusers' 2>/dev/null || "$python" -m pip install --quiet --no-index --no-deps .wheels/*.whl

# nvcc on PATH may be a wrapper: the toolkit is where its headers are.
if [ -z "${CUDA_HOME:-}" ]; then
  for header in /usr/local/cuda*/include/cuda_runtime.h; do
    [ -f "$header" ] && export CUDA_HOME=${header%/include/*}
  done
fi
"$python" -m pip install --quiet --no-build-isolation --no-deps --editable .

export HF_HUB_OFFLINE=1
status=0
timeout "$(left)" "$python" -m pytest -m gpu tests | tee "$out/tests.txt" || status=$?
if [ $# -gt 0 ] && [ "$status" -eq 0 ]; then
  # The cases share nine tenths of what is left: one that is cut off leaves no record.
  timeout "$(left)" "$python" -m pytest -W default --benchmark-enable --benchmark-json="$out/bench.json" -s \
    --size gpu --budget-minutes "$(( $(left) * 9 / 600 ))" "$@" | tee "$out/bench.txt" || status=$?
fi
exit "$status"
