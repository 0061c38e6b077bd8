"""Decode's plans without a GPU: as on an H200, up to the kernels that they ask for."""

from typing import Any

import pytest

from cute_router.gemm import decode


def as_on_an_h200(patch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations whose kernels are asked for from now on; no plan is remembered."""
    asked: list[Any] = []
    patch.setattr(decode, "target_for", lambda device: ("sm_90", "sm_90a"))
    patch.setattr(decode, "max_cluster", lambda device: 16)
    patch.setattr(decode, "workspace", lambda device: None)
    patch.setattr(decode.torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(decode.compiler, "kernel", asked.append)
    decode.plan_of.cache_clear()
    return asked
