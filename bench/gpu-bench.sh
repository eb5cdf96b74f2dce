#!/usr/bin/env bash
# The benchmarks on a CUDA device, in under nine minutes: the shapes that matter most first, ours
# and the eager rivals before those that torch.compile makes, as bench/gpu_order.py says.
#
#   bash bench/gpu-bench.sh OUT                       all of them
#   bash bench/gpu-bench.sh OUT bench/bench_step.py   what pytest's options choose
#   bash bench/gpu-bench.sh OUT --again FILE.jsonl    what failed or was not run in an earlier OUT;
#                                                     on the same device its results join these
#   bash bench/gpu-bench.sh OUT --dry-run             without a device: each in its smallest form
#   bash bench/gpu-bench.sh OUT --summary             what the files in OUT say; runs nothing
#
# OUT receives log.txt, benchmarks.jsonl, which has each result as soon as it is known, and at the
# end, also where the time ran out, a JSON file for bench/results from each file of benchmarks, named
# after the device, and roofline.png. A benchmark that takes two and a half minutes, and one after
# which the device reports an error, fails and ends its process; another process runs those after
# it. The tables come last on stdout, also after Ctrl-C, with what failed, was skipped or not run; the
# exit code is 0 only where nothing failed and nothing was left. Nothing is installed or fetched:
# torch 2.11 or newer, triton, numpy, pytest and pytest-benchmark are enough; what needs a package
# that is not there is skipped and named. Without CIFAR-100 (./data) random images take its place.
# PYTHON: the interpreter (default: python3). COMMIT: the sources' id, where git cannot tell.
top=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$top:$top/kernels${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m bench.gpu bench "$@"
