"""`scoring.rough` is as near to the activation as short lists rely on, but for its instructions.

Those are not run here. The PTX ISA gives them relative errors of 2^-22 (ex2, of an argument that is
rounded), 2^-23 (sqrt) and 1 ulp (rcp); the bound leaves room for 2^-20 and the argument's rounding.
"""

import numpy as np
import pytest

pytest.importorskip("cutlass")

from cute_router.epilogue.scoring import FLUSHED, LOG2_E, ROUGH, ROUGH_LOG1P

LOWEST = -126 / LOG2_E  # exp(l) below this is 0 to ex2.approx.ftz


def room_of(logit: np.ndarray) -> np.ndarray:
    """The relative error that instructions may add."""
    return 2.0**-20 + np.abs(logit) * 2.0**-23


def test_rough_sqrtsoftplus_is_within_its_bound():
    logit = np.concatenate([np.linspace(LOWEST, -1, 400001), np.linspace(-1, 300, 400001)])
    e = np.exp(-np.abs(logit))
    about = np.sqrt(np.maximum(logit, 0) + e * np.polyval(ROUGH_LOG1P[::-1], e))
    exact = np.sqrt(np.maximum(logit, 0) + np.log1p(e))
    room = np.where(logit < 0, room_of(logit), 2.0**-20)
    u = ROUGH["sqrtsoftplus"]
    assert (exact <= about * (1 + u) * (1 - room)).all()
    assert (exact >= about * (1 - u) * (1 + room)).all()


def test_rough_sigmoid_is_within_its_bound():
    logit = np.linspace(LOWEST, 100, 100001)
    assert (room_of(logit) < ROUGH["sigmoid"]).all()  # all that it is off by


def test_what_is_0_to_rough_is_less_than_flushed():
    assert np.exp(LOWEST / 2) < FLUSHED  # sqrtsoftplus, and sigmoid is less
