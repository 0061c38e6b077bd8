"""The transformers example works as a subprocess, on whatever is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5.14", reason="needs transformers 5.14 or later")

ROOT = Path(__file__).parent.parent


def example(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "hf_swap.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )


def test_both_models_are_patched_checked_and_unpatched():
    result = example("--batch", 1, "--prompt", 40, "--generate", 3)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("model ")] == [
        "DeepseekV4ForCausalLM",
        "DeepseekV3ForCausalLM",
    ]
    checks = [line for line in lines if line.startswith("check ")]
    assert len(checks) == 4
    assert all(line.endswith(": passed") for line in checks)
    compared = [line.split() for line in lines if ".mlp.gate " in line]
    assert len(compared) == 3 + 2
    for _, equal, _, chosen, *_ in compared:
        assert equal == chosen
    assert all(len(line.split()) == 1 + 3 for line in lines if line.startswith("generated "))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    assert f"runs on   {device}" in result.stdout


def test_a_bad_argument_exits_with_2():
    result = example("--prompt", 0)
    assert result.returncode == 2
    assert "argument --prompt: must be at least 1; got 0" in result.stderr
