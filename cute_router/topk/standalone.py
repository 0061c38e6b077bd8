"""Host entry of topk: the kernel of short rows, or that of long ones."""

from torch import Tensor

from cute_router.topk import radix, rows


def launch(scores: Tensor, lengths: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """Queue topk of each row of a matrix on the current stream of its device."""
    kind = rows if rows.serves(scores.shape[1], values.shape[1]) else radix
    kind.launch(scores, lengths, values, indices)
