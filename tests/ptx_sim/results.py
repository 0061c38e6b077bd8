"""A launch's results in the simulator, and the parameters of its extras, as `Extras` has them."""

import struct

import numpy as np
import torch
from torch import Tensor

from cute_router import Extras, Routing
from cute_router.extras import ExtrasSpec
from cute_router.reference import unpacked
from ptx_sim.memory import GlobalMemory

POISON = 0x7F7F7F7F
# What a kernel may not touch before its wait for the one ahead.
DEPENDENT = frozenset(("weights", "ids", "num_valid", "valid", "second_mask", "map", "logits_out"))


class Results:
    """Weights and ids (N, k + shared) of a launch; no weights where ids are packed words."""

    def __init__(self, memory: GlobalMemory, N: int, k: int, spec: ExtrasSpec):
        self.shape = (N, k + spec.shared)
        count = N * self.shape[1]
        self.dtype = getattr(torch, spec.ids)
        self.weights = None if spec.packed else np.full(count, POISON, np.uint32)
        self.ids = np.full(count * self.dtype.itemsize // 4, POISON, np.uint32)
        written = {"weights": self.weights, "ids": self.ids}
        self.params = [
            struct.pack("<Qi4x", memory.add(name, words), N)
            for name, words in written.items()
            if words is not None
        ]

    def routing(self) -> Routing:
        """What the launch has written."""
        ids = torch.from_numpy(self.ids.view(np.int32)).view(self.dtype).reshape(self.shape)
        if self.weights is None:
            return unpacked(ids)
        return Routing(torch.from_numpy(self.weights.view(np.float32)).reshape(self.shape), ids)


class ExtraParams:
    """The parameters of a kernel's extras; `fixed`: whether E is built into it."""

    def __init__(self, memory: GlobalMemory, extras: Extras | None, *, fixed: bool = True):
        self.memory = memory
        self.params: list[bytes] = []
        self.logits: np.ndarray | None = None
        self.extras = extras
        if extras is None:
            return
        self.add("num_valid", extras.num_valid)
        self.add("valid", extras.valid, sized=True)
        self.add("second_bias", extras.second_bias)
        self.add("second_mask", extras.second_bias_mask, sized=True)
        self.add("map", extras.expert_map, sized=not fixed)
        if extras.out_logits is not None:
            self.logits = np.full(extras.out_logits.numel(), POISON, np.uint32)
            address = memory.add("logits_out", self.logits)
            self.params.append(struct.pack("<Qi4x", address, extras.out_logits.shape[0]))
        if extras.shared_experts:
            self.params.append(struct.pack("<f", extras.shared_weight))

    def add(self, name: str, t: Tensor | None, *, sized: bool = False) -> None:
        """The parameter of a tensor, with its size where it is a run-time value."""
        if t is not None:
            data = t.contiguous().view(-1).view(torch.uint8).numpy().copy()
            words = np.pad(data, (0, -data.size % 4)).view(np.uint32)
            address = self.memory.add(name, words, data.size)
            size = struct.pack("<i4x", t.numel()) if sized else b""
            self.params.append(struct.pack("<Q", address) + size)

    def finish(self) -> None:
        """Copy what the launch has written besides its results to where it was wanted."""
        if self.logits is not None and self.extras is not None:
            out = self.extras.out_logits
            out.copy_(torch.from_numpy(self.logits.view(np.float32)).view_as(out))
