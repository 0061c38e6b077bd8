"""The demo is what a newcomer runs first: it works as a subprocess, on whatever is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def demo(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "decode_demo.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )


@pytest.fixture
def checkpoint(tmp_path):
    """A file with a scored layer 3 and a hash layer 0."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {
        "layers.0.ffn.gate.weight": torch.randn(32, 64).bfloat16(),
        "layers.0.ffn.gate.tid2eid": torch.randint(32, (100, 6)),
        "layers.3.ffn.gate.weight": torch.randn(32, 64).bfloat16(),
        "layers.3.ffn.gate.bias": torch.randn(32),
    }
    save_file(tensors, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_the_demo_routes_every_layer_and_checks_itself():
    result = demo("--tokens", 2, "--layers", 2)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("layer ")] == ["layer 0", "layer 1"]
    assert sum(line.startswith("  token ") for line in lines) == 4
    assert "against the reference: passed" in result.stdout
    assert ", 0 wrong" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_demo_says_that_it_ran_the_reference():
    result = demo("--tokens", 1, "--layers", 1)
    assert "the CPU, because no CUDA device was found: this is the fp64 reference" in result.stdout
    assert "us per call" not in result.stdout


def test_a_checkpoint_layer_is_routed(checkpoint):
    result = demo("--tokens", 2, "--checkpoint", checkpoint, "--layer", 3)
    assert result.returncode == 0, result.stderr
    assert "32 experts, hidden size 64" in result.stdout
    assert "small.safetensors" in result.stdout
    assert "\nlayer 3\n" in result.stdout


def test_a_hash_layer_is_reported_as_not_for_this_demo(checkpoint):
    result = demo("--checkpoint", checkpoint, "--layer", 0)
    assert result.returncode != 0
    assert "layer 0 is a hash layer" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_layer_is_reported_in_one_line(checkpoint):
    result = demo("--checkpoint", checkpoint, "--layer", 7)
    assert result.returncode != 0
    assert result.stderr.startswith("decode_demo: no router for layer 7")
    assert len(result.stderr.splitlines()) == 1


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "routing.png"
    result = demo("--tokens", 2, "--layers", 2, "--plot", picture)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
