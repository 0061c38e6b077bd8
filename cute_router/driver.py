"""What CUDA's own functions return, through cuda-python."""

from typing import Any


def result_of(returned: Any, purpose: str) -> Any:
    """What a call returns beside its status: nothing, a value, or several. Raises unless that is
    success, and says what it was for."""
    status, *values = returned
    if int(status) != 0:
        raise RuntimeError(f"CUDA reports {status.name} {purpose}")
    return values[0] if len(values) == 1 else tuple(values)
