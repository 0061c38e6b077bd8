#!/usr/bin/env bash
# Runs the decode demo, on the GPU if there is one: scripts/demo.sh [--tokens 8] [--plot out.png] ...
source "$(dirname "$0")/venv.sh"
need checkpoint,plot
exec .venv/bin/python examples/decode_demo.py "$@"
