"""Every test draws the same random numbers; GPU tests skip where no device is good enough."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu(capability=(9, 0))` where the first CUDA device is less."""
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark is not None:
            lacking = missing_device(mark.kwargs.get("capability", (9, 0)))
            if lacking:
                item.add_marker(pytest.mark.skip(reason=lacking))


def missing_device(capability: tuple[int, int]) -> str | None:
    """Why tests that need this compute capability cannot run here, or None."""
    wanted = f"needs a CUDA device of capability {capability[0]}.{capability[1]} or later"
    if not torch.cuda.is_available():
        return f"{wanted}; there is none"
    found = torch.cuda.get_device_capability()
    if found < capability:
        return f"{wanted}; this one has {found[0]}.{found[1]}"
    return None
