#!/usr/bin/env bash
# Runs compute-sanitizer's memcheck, racecheck and synccheck over small calls of every kernel; exits
# with an error if one of them finds any. Needs a GPU and takes minutes.
#
# PYTHON names the interpreter (default: .venv's, else python3), COMPUTE_SANITIZER the tool. No tool
# sees every race through the asynchronous proxy or distributed shared memory; for those there is
# tests/test_decode_stress.py.
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

status=0
for tool in memcheck racecheck synccheck; do
    echo "== $tool"
    # API errors are left out: libraries probe for functions that a driver may not have.
    "${COMPUTE_SANITIZER:-compute-sanitizer}" --tool "$tool" --error-exitcode 1 \
        --report-api-errors no "$PYTHON" tests/sanitizer_cases.py || status=1
done
exit $status
