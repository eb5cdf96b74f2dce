#!/usr/bin/env bash
# Every test marked `gpu` and a selection of all benchmarks on a machine with a CUDA device, in under
# nine minutes. Nothing is installed or fetched: torch 2.11 or newer, triton, numpy, pytest,
# pytest-benchmark, hypothesis, timm, torchvision, matplotlib and tqdm are enough.
#
#   bash bench/gpu.sh [FOLDER]      FOLDER (default: $OUT) receives log.txt, five JSON files and
#                                   roofline.png; the tables come last on stdout
#
# A stage that fails or runs out of its time (what it measured until then is kept) does not stop the
# others, and makes the exit code 1. What needs a package that is not there is skipped and named.
# Without CIFAR-100 (./data) random images take its place. PYTHON: the interpreter (default: python3).
set -uo pipefail

out=${1:-${OUT:-}}
if [ -z "$out" ]; then
  echo "usage: bash bench/gpu.sh FOLDER   (or set OUT)" >&2
  exit 2
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels
python=${PYTHON:-python3}
failed=0
: > "$out/log.txt"

stage() {  # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS status=0 before
  shift 2
  before=$(wc -l < "$out/log.txt")
  echo "==== $name: $*" >> "$out/log.txt"
  # pytest stores its results when it is interrupted
  timeout --signal=INT --kill-after=15 "$limit" "$@" >> "$out/log.txt" 2>&1 || status=$?
  echo "$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - start)) s"
  if [ $status != 0 ]; then
    failed=1
    tail -n "+$((before + 1))" "$out/log.txt" | grep -E '^(FAILED|ERROR)|^E  ' | tail -n 20
  fi
  tail -n "+$((before + 1))" "$out/log.txt" | grep '^SKIPPED' | cut -c1-100 | head -n 10
}

pytest() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" -m pytest -q -rs -p no:cacheprovider "$@"
}

bench() {
  local name=$1 limit=$2
  shift 2
  pytest "$name" "$limit" "bench/bench_$name.py" --device cuda \
    --benchmark-json="$out/$name.json" "$@"
}

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
# a test file that needs more than this machine has must not keep the others from running
pytest tests 130 tests -m gpu --continue-on-collection-errors
bench loss 185
bench step 95
bench end_to_end 40
bench data 45
bench reid 25 -k 'loss or training or features-3368'

stored=$(find "$out" -maxdepth 1 -name '*.json' -size +0 | sort)
if [ -n "$stored" ]; then
  # shellcheck disable=SC2086
  timeout 15 "$python" -m bench.report --plot "$out/roofline.png" $stored || failed=1
fi
exit $failed
