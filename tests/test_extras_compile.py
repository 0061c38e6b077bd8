"""Kernels with extras compile for their targets, in the manner of `test_kernels_compile.py`.

And kernels without any are as they were: nothing of the extras is in their code.
"""

import re
from dataclasses import fields, replace
from typing import Any

import pytest

pytest.importorskip("cutlass")

from test_kernels_compile import build, over, uses_local_memory

from cute_router.extras import PLAIN, ExtrasSpec
from cute_router.gemm.config import MAX_SMEM
from cute_router.gemm.config import can_implement as can_implement_decode
from cute_router.gemm.prefill_config import can_implement as can_implement_prefill
from cute_router.heuristics import decode_config
from cute_router.prefill_heuristics import prefill_config, with_extras
from cute_router.spec import HIDDEN_MULTIPLE, MAX_EXPERTS, RouterSpec
from cute_router.topk.config import GateConfig
from cute_router.topk.hash_config import HashConfig, HashGateConfig, HashLogitsConfig

__all__ = ["build"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:This static loop has")

ARCHES = ("sm_90a", "sm_100a")
FLASH, PRO = RouterSpec(256, 4096), RouterSpec(384, 7168)
V3 = RouterSpec(256, 7168, 8, "sigmoid", n_group=8, topk_group=4)
ODD = RouterSpec(300, 264, 8, "softmax", has_bias=False)
EVERY = ExtrasSpec(
    num_valid=True, valid=True, second_bias=True, expert_map=True, logits=True, shared=2
)
FORMS = {
    "every": EVERY,
    "packed": replace(EVERY, packed=True),
    "int64": ExtrasSpec(ids="int64"),
    "num_valid": ExtrasSpec(num_valid=True),
}


def without(extras: ExtrasSpec, *names: str) -> ExtrasSpec:
    return replace(extras, **dict.fromkeys(names, False))


def products() -> dict[Any, str]:
    """Decode and prefill: both ways of choosing, every form."""
    found: dict[Any, str] = {}
    for arch in ARCHES:
        for form, extras in FORMS.items():
            for spec in (FLASH, V3, ODD):
                name = f"{arch}-{form}-E{spec.num_experts}-{spec.scoring}"
                found[decode_config(spec, 8, arch, extras=extras)] = f"decode-{name}"
                found[with_extras(prefill_config(spec, 4096, arch), extras)] = f"prefill-{name}"
        for N in (1, 64):
            found[decode_config(PRO, N, arch, extras=EVERY)] = f"decode-{arch}-every-E384-N{N}"
        found[with_extras(prefill_config(PRO, 4096, arch), EVERY)] = f"prefill-{arch}-every-E384"
    return found


def selections() -> dict[Any, str]:
    """Gates and hash routing: every kernel, every form."""
    found: dict[Any, str] = {}
    chosen = RouterSpec(MAX_EXPERTS, 4096, has_bias=False)
    weighed = replace(chosen, scoring="softmax", hidden_size=HIDDEN_MULTIPLE)
    for arch in (*ARCHES, "sm_80"):
        for form, extras in FORMS.items():
            of_gate, of_hash = without(extras, "logits"), without(extras, "logits", "second_bias")
            pdl = arch != "sm_80"
            for lanes, spec in ((8, FLASH), (32, V3)):
                gate = GateConfig(replace(spec, hidden_size=HIDDEN_MULTIPLE), arch, lanes=lanes)
                name = f"gate-{arch}-{form}-{spec.scoring}"
                found[replace(gate, pdl=pdl, extras=of_gate)] = name
            uniform = replace(of_hash, shared=0)
            found[HashConfig(6, arch, pdl=pdl, extras=uniform)] = f"hash-{arch}-{form}"
            for bits in (64, 0):
                name = f"{arch}-{form}-{'hash' if bits else 'replay'}"
                found[HashGateConfig(chosen, arch, bits, 32, pdl, of_hash)] = f"gated-{name}"
                found[HashLogitsConfig(weighed, arch, bits, 32, extras=of_hash)] = f"logits-{name}"
    return found


PRODUCTS, SELECTIONS = products(), selections()


@over(PRODUCTS | SELECTIONS)
def test_nothing_is_spilled_or_kept_in_local_memory(build):
    assert not uses_local_memory(build)


@over(PRODUCTS | SELECTIONS)
def test_static_synchronisation_analysis_has_no_warning(build):
    assert build.warnings == []


@over(PRODUCTS)
def test_shared_memory_is_within_the_budget_and_the_budget_within_the_limit(build):
    c = build.config
    decode = hasattr(c, "tile_experts") and hasattr(c, "trigger")
    (can_implement_decode if decode else can_implement_prefill)(c)
    assert build.smem <= c.smem_bytes <= MAX_SMEM


def parameters(ptx: str) -> int:
    """How many parameters the kernel has."""
    return len(re.findall(r"^\s*\.param", ptx, re.M))


PLAINS = {
    decode_config(FLASH, 8, "sm_90a"): "decode",
    prefill_config(FLASH, 4096, "sm_90a"): "prefill",
    GateConfig(RouterSpec(256, 8), "sm_90a"): "gate",
    HashConfig(6, "sm_90a"): "hash",
}


@over(PLAINS)
def test_a_kernel_without_extras_takes_and_reads_nothing_for_them(build):
    assert build.config.extras == PLAIN
    wanted = {"DecodeConfig": 9, "PrefillConfig": 8, "GateConfig": 5, "HashConfig": 5}
    assert parameters(build.ptx) == wanted[type(build.config).__name__]
    assert "ld.global.b8" not in build.ptx
    assert "cvt.rn.bf16" not in build.ptx


def test_every_fact_about_extras_is_part_of_the_compile_key():
    for config in PLAINS:
        for field in fields(ExtrasSpec):
            value = {"shared": 1, "ids": "int64"}.get(field.name, True)
            other = replace(config, extras=replace(PLAIN, **{field.name: value}))
            assert other != config
            assert repr(other) != repr(config)


@pytest.mark.parametrize("arch", ARCHES)
def test_a_second_bias_leaves_every_router_a_configuration(arch):
    for E in (1, 300, 512, 1024):
        for k in (1, min(E, 32)):
            for scoring in ("sigmoid", "softmax"):
                spec = RouterSpec(E, 7168, k, scoring)
                for N in (65, 8192):
                    can_implement_prefill(with_extras(prefill_config(spec, N, arch), EVERY))
                for N in (1, 8, 64):
                    can_implement_decode(decode_config(spec, N, arch, extras=EVERY))
