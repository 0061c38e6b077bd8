#!/usr/bin/env bash
# Runs compute-sanitizer's memcheck, racecheck and synccheck over small calls of every kernel; exits
# with an error if one of them finds any. Needs a GPU and takes minutes.
#
# PYTHON names the interpreter (default: .venv's, else python3), COMPUTE_SANITIZER the tool. No tool
# sees every race through the asynchronous proxy or distributed shared memory; for those there are the
# simulator (tests/ptx_sim/races.py) and tests/test_decode_stress.py.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Each tensor is an allocation of its own, so that a step past its end leaves it.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

echo "== without a sanitizer"
"$PYTHON" tests/sanitizer_cases.py # also fills the kernel cache: compiling under one is slow

check() { # tool, arguments of the cases
    echo "== $1"
    # API errors are left out: libraries probe for functions that a driver may not have.
    "${COMPUTE_SANITIZER:-compute-sanitizer}" --tool "$1" --error-exitcode 1 \
        --report-api-errors no "$PYTHON" tests/sanitizer_cases.py "${@:2}" || status=1
}

status=0
check memcheck
check racecheck
# Of clusters of 16, synccheck (2025.3) reports every CTA from the ninth on: a barrier that its own
# thread has just initialised is said to miss a wait. The same code in clusters of 8 is clean.
check synccheck --max-cluster 8
exit $status
