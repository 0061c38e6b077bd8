"""Configurations of the selection kernels."""

from dataclasses import dataclass

from cute_router.spec import RouterSpec


@dataclass(frozen=True)
class GateConfig:
    """One compiled gate kernel: the router's step on given logits.

    spec: the router; its hidden size is not looked at.
    arch: the compile target.
    """

    spec: RouterSpec
    arch: str
    warps: int = 4  # tokens of a CTA
