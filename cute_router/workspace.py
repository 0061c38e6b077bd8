"""Scratch memory of the kernels whose CTAs meet in global memory (see `gemm.exchange`).

A slot is used by launches that follow one another, never by two at once: there is one for each
(device, stream), and one for each (capture, stream) of a CUDA graph, which stays with the graph
for good. (Two executables made from one captured graph must therefore not run at once.) Slots are
cut from slabs that are initialised once, outside any stream of the user's, so that neither an eager
call nor a capture ever queues more than its kernel.
"""

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cute_router.driver import result_of

SLAB_BYTES = 8 << 20
GRAIN = 64  # words: slots start on 256-byte lines


class Workspace:
    """The scratch slots of one device; words are int32, EMPTY but for the zeros at their head."""

    def __init__(self, device: int, head: int):
        self.device = device
        self.head = head  # words at the start of a slot that are zero
        self._lock = threading.Lock()
        self._slots: dict[Any, Tensor] = {}
        self._slabs: list[Tensor] = []
        self._used = 0  # words of the last slab

    def slot(self, stream: int, words: int) -> Tensor:
        """The slot of `stream` (a raw handle, the current one), with at least `words` words."""
        key: Any = stream
        if torch.cuda.is_current_stream_capturing():
            key = (stream, capture_id(stream))
        slot = self._slots.get(key)
        if slot is None or slot.numel() < words:
            with self._lock:
                slot = self._slots[key] = self._cut(words)
        return slot

    def _cut(self, words: int) -> Tensor:
        """A new slot. An outgrown one is not used again: its last launch may still run."""
        words = -(-words // GRAIN) * GRAIN
        if not self._slabs or self._used + words > self._slabs[-1].numel():
            self._slabs.append(new_slab(self.device, max(SLAB_BYTES // 4, words)))
            self._used = 0
        slot = self._slabs[-1][self._used : self._used + words]
        self._used += words
        set_words(slot[: self.head], 0)
        return slot


class _Memory:
    """Device memory as `torch.as_tensor` takes it."""

    def __init__(self, pointer: int, words: int):
        self.__cuda_array_interface__ = {
            "shape": (words,),
            "typestr": "<i4",
            "data": (pointer, False),
            "version": 3,
        }


def new_slab(device: int, words: int) -> Tensor:
    """`words` words of EMPTY that are never freed.

    They come from the driver, not from torch: inside a capture torch's allocator would give memory
    of the graph's pool, which the graph uses for other tensors too.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device), _outside_capture():
        pointer = _check(driver.cuMemAlloc(words * 4))
        slab = torch.as_tensor(_Memory(int(pointer), words), device=f"cuda:{device}")
        set_words(slab, 0xFFFFFFFF)
    return slab


def set_words(words: Tensor, value: int) -> None:
    """Fill with a 32-bit value now, on a stream of our own, whatever the current one is doing."""
    from cuda.bindings import driver

    with torch.cuda.device(words.device), _outside_capture():
        stream = _check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        _check(driver.cuMemsetD32Async(words.data_ptr(), value, words.numel(), stream))
        _check(driver.cuStreamSynchronize(stream))
        _check(driver.cuStreamDestroy(stream))


class _outside_capture:
    """Allow this thread, while a capture is under way, calls that no graph records."""

    def __enter__(self) -> None:
        from cuda.bindings import runtime

        relaxed = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self.mode = _check(runtime.cudaThreadExchangeStreamCaptureMode(relaxed))

    def __exit__(self, *_: object) -> None:
        from cuda.bindings import runtime

        _check(runtime.cudaThreadExchangeStreamCaptureMode(self.mode))


def capture_id(stream: int) -> int:
    """The number of the capture that `stream` is in."""
    from cuda.bindings import driver

    return int(_check(driver.cuStreamGetCaptureInfo(stream))[1])


_check = partial(result_of, purpose="for the scratch memory of cute_router")
