#!/usr/bin/env bash
# Every test that needs a CUDA device or runs the kernels on one, in under nine minutes: the kernels
# and the loss first, in as many processes as there are cores.
#
#   bash bench/gpu-tests.sh OUT                      all of them
#   bash bench/gpu-tests.sh OUT -x -k register       what pytest's options choose, to the first failure
#   bash bench/gpu-tests.sh OUT --again FILE.jsonl   what failed or was not run in an earlier OUT
#   bash bench/gpu-tests.sh OUT --dry-run            without a device: they are set up and not run
#   bash bench/gpu-tests.sh OUT --summary            what the files in OUT say; runs nothing
#
# OUT receives log.txt and tests.jsonl, which has each result as soon as it is known, and of a
# failure the traceback and the end of the output. A test that takes two minutes, and one after which
# the device reports an error, fails and ends its process; another process runs those after it. The
# summary comes last on stdout, also after Ctrl-C, with what failed, was skipped or not run; the exit
# code is 0 only where nothing failed and nothing was left. Nothing is installed or fetched: torch 2.11 or newer, triton,
# numpy, pytest, pytest-xdist and hypothesis are enough; a test that needs more is skipped. PYTHON:
# the interpreter (default: python3). COMMIT: the sources' id, where git cannot tell.
top=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$top:$top/kernels${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m bench.gpu tests "$@"
