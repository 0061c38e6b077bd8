"""The installed package is light to import, typed, and one version throughout."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cute_router

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", ["cute_router", "cute_router.integrations.transformers"])
def test_importing_the_package_brings_no_kernel_compiler_and_no_other_library(module):
    heavy = {"cutlass", "tvm_ffi", "transformers"}
    code = f"import {module}, sys; print(*({heavy} & set(sys.modules)))"
    imported = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert imported.split() == []


def test_importing_the_package_brings_nothing_but_itself_to_a_process_that_has_torch():
    code = """
import sys, torch
before = set(sys.modules)
import cute_router
packages = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*(packages - set(sys.stdlib_module_names)))
"""
    imported = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert imported.split() == ["cute_router"]


def test_the_version_is_the_one_that_is_published():
    published = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert published
    assert cute_router.__version__ == published[1]


def test_the_package_says_that_it_is_typed():
    assert (Path(cute_router.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", cute_router.__all__)
def test_every_public_name_exists(name):
    assert hasattr(cute_router, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'dense_decoder'"):
        _ = cute_router.dense_decoder
