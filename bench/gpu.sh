#!/usr/bin/env bash
# On a machine with a GPU: build, test, look for bad memory accesses, prove the kernels, measure images, within a limit.
#   bench/gpu.sh OUT [SECONDS [PART ...]]
# Parts: build tests sanitizer prove images; all of them in this order unless some are named.  Every part writes into OUT
# as it goes (tests-*.txt, sanitizer-*.txt, prove-*.json, images.json, times.txt), and at its end part-NAME.json, with the
# card's name, its exit status, its seconds and the last line of each of its texts, so that a run that is cut off leaves
# what it had.  The exit status is 1 if any part has failed.  Wheels in .wheels/ are installed if diffusers is missing.  A part that fails does not stop the others.
# GPU_MODELS, GPU_DEVICE, GPU_SECONDS (of a proof) and GPU_IMAGES are arguments for the last two parts; with
#   GPU_DEVICE=cpu GPU_MODELS=sd15 GPU_SECONDS=5 GPU_IMAGES="--rehearse --steps 20" bench/gpu.sh out/rehearsal 200
# it is rehearsed without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: bench/gpu.sh OUT [SECONDS [PART ...]]}" && cd "$1" && pwd)
start=$(date +%s)
deadline=$(( start + ${2:-540} ))
shift $(( $# < 2 ? $# : 2 ))
parts=${*:-build tests sanitizer prove images}
python=${PYTHON:-python3}
models=${GPU_MODELS:-sd15 sdxl}
device=${GPU_DEVICE:-cuda}
dtype=float16
[ "$device" = cuda ] || dtype=float32
status=0
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 DIFFFAST_CACHE="${DIFFFAST_CACHE:-$out/cache}"

left() { local now; now=$(( deadline - $(date +%s) )); echo $(( now > 1 ? now : 1 )); }
# within SECONDS COMMAND...: the command, for so long at most and never beyond the whole limit
within() { local most=$1; shift; timeout -k 5 "$(( most < $(left) ? most : $(left) ))" "$@"; }
note() { echo "$(( $(date +%s) - start )) s: $*" | tee -a "$out/times.txt"; }
fail() { note "FAILED: $*"; status=1; }
# Text as a JSON string.
quote() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\037' | sed 's/[\\"]/\\&/g')"; }
# record PART STATUS SECONDS: what came of a part, complete at once
record() {
  local file lines=
  for file in "$out/$1"*.txt; do
    [ -f "$file" ] && lines+="${lines:+, }$(quote "$(basename "$file")"): $(quote "$(tail -n 1 "$file")")"
  done
  printf '{"card": %s, "part": "%s", "status": %d, "seconds": %d, "last": {%s}}\n' \
    "$(quote "$(cat "$out/card.txt")")" "$1" "$2" "$3" "$lines" > "$out/part-$1.json.new"
  mv "$out/part-$1.json.new" "$out/part-$1.json"
}

# nvcc on PATH may be a wrapper: the toolkit is where its headers are.
if [ -z "${CUDA_HOME:-}" ]; then
  for header in /usr/local/cuda*/include/cuda_runtime.h; do
    [ -f "$header" ] && export CUDA_HOME=${header%/include/*}
  done
fi

build() {
  if ! "$python" -c 'import diffusers' 2>/dev/null; then
    within 60 "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" .wheels/*.whl || return 1
    export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
  fi
  # An extension with the CUDA kernels that loads here (built elsewhere for this torch, say) is taken as it is.
  if [ -f difffast/_C.abi3.so ] && DIFFFAST_BUILD_CPP=0 within 120 "$python" -m pip install --quiet --no-build-isolation \
    --no-deps --editable . && "$python" -c 'from difffast import ops; raise SystemExit(ops.missing("cuda") is not None)'; then
    return 0
  fi
  within 300 "$python" -m pip install --quiet --no-build-isolation --no-deps --editable . > "$out/build.txt" 2>&1
}

# A kernel that reads where it must not spoils everything else in its process: one process for each file and backend.
tests() {
  local name files filter running=()
  while read -r name files filter; do
    within 150 "$python" -m pytest -m gpu $files ${filter:+-k "$filter"} -q -p no:cacheprovider \
      > "$out/tests-$name.txt" 2>&1 & running+=("$!:$name")
  done < <(
    for operator in cross_attention edited_attention joint_attention group_norm_silu skip_norm_silu geglu; do
      for backend in triton cuda; do echo "$operator-$backend tests/ops/test_$operator.py $backend"; done
    done
    echo "pipelines tests/test_gpu.py"
  )
  local each code bad=0
  for each in "${running[@]}"; do
    wait "${each%%:*}"; code=$?
    # 5: no test has this backend.
    if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then bad=1; note "tests-${each#*:}: exit status $code"; fi
    tail -n 1 "$out/tests-${each#*:}.txt"
  done
  return $bad
}

sanitizer() {
  local tool backend bad=0
  command -v compute-sanitizer > /dev/null || { note "there is no compute-sanitizer"; return 1; }
  for tool in memcheck racecheck initcheck synccheck; do
    for backend in cuda triton; do
      within 60 compute-sanitizer --tool $tool --print-limit 20 --error-exitcode 3 "$python" bench/gpu_sanitizer_cases.py \
        --backend $backend > "$out/sanitizer-$tool-$backend.txt" 2>&1 || { bad=1; note "$tool, $backend: failed"; }
      tail -n 1 "$out/sanitizer-$tool-$backend.txt"
    done
  done
  return $bad
}

prove() {
  local model bad=0
  for model in $models; do
    within 90 "$python" -m difffast.tools.cli prove --model "$model" --device "$device" --dtype $dtype \
      --seconds "${GPU_SECONDS:-30}" \
      --report "$out/prove-$model.json" > "$out/prove-$model.txt" 2>&1 || bad=1
    tail -n 3 "$out/prove-$model.txt"
  done
  return $bad
}

images() {
  # Everything above must be over: this part has the card to itself.
  local seconds=$(( $(left) > 10 ? $(left) - 5 : 5 ))
  within "$(left)" "$python" bench/gpu_images.py --out "$out" --models $models --seconds "$seconds" ${GPU_IMAGES:-} \
    > "$out/images.txt" 2>&1; local code=$?
  grep steps "$out/images.txt"
  return $code
}

"$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device")' \
  | tee "$out/card.txt"
for part in $parts; do
  note "$part"
  began=$(date +%s)
  $part; code=$?
  [ "$code" -eq 0 ] || fail "$part"
  record "$part" "$code" "$(( $(date +%s) - began ))"
done
note "done, status $status"
exit "$status"
