#!/usr/bin/env bash
# Checks style and types, then runs the tests; those that need a GPU skip where there is none.
# Arguments go to pytest: scripts/test.sh -k reference
source "$(dirname "$0")/venv.sh"
need test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two files at a time: a file compiles its kernels once. By name: files with few tests, which would
# come last, are not the short ones.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
