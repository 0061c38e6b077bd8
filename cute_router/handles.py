"""Integer handles of living Routers, for ops that can carry a number but no module.

A handle belongs to one Router for as long as that lives, and is never given out again.
"""

from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from cute_router.router import Router

_numbers = count(1)
_routers: "WeakValueDictionary[int, Router]" = WeakValueDictionary()


def register(router: "Router") -> int:
    """A new handle of `router`, released with it."""
    handle = next(_numbers)
    _routers[handle] = router
    return handle


def find(handle: int) -> "Router":
    """The Router of `handle`; `ValueError` where there is none, or is none any more."""
    router = _routers.get(handle)
    if router is None:
        raise ValueError(f"handle must be that of a living cute_router.Router; got {handle}")
    return router
