"""RouterSpec accepts exactly the routers that the package promises to run."""

import dataclasses

import pytest

from cute_router import RouterSpec


@pytest.mark.parametrize("E", [1, 7, 144, 160, 256, 300, 384, 1024])
def test_any_number_of_experts_up_to_1024_is_accepted(E):
    spec = RouterSpec(num_experts=E, hidden_size=264, top_k=min(E, 32))
    assert (spec.num_experts, spec.top_k) == (E, min(E, 32))


def test_defaults_are_the_deepseek_v4_router():
    spec = RouterSpec(256, 4096)
    assert dataclasses.astuple(spec) == (256, 4096, 6, "sqrtsoftplus", True, True, 1, 1)


def test_equal_specs_are_one_key():
    assert RouterSpec(256, 4096) == RouterSpec(256, 4096)
    assert len({RouterSpec(256, 4096), RouterSpec(256, 4096), RouterSpec(256, 4096, top_k=8)}) == 2


def test_a_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RouterSpec(256, 4096).top_k = 8


REFUSED = [
    ({"num_experts": 0}, ValueError, "num_experts must be from 1 to 1024; got 0"),
    ({"num_experts": 1025}, ValueError, "num_experts must be from 1 to 1024; got 1025"),
    ({"num_experts": 256.0}, TypeError, "num_experts must be an int; got float"),
    ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1; got 0"),
    ({"hidden_size": 4100}, ValueError, "hidden_size must be a multiple of 8; got 4100"),
    ({"hidden_size": "4096"}, TypeError, "hidden_size must be an int; got str"),
    ({"top_k": 0}, ValueError, "top_k must be from 1 to 32; got 0"),
    ({"top_k": 33}, ValueError, "top_k must be from 1 to 32; got 33"),
    ({"top_k": True}, TypeError, "top_k must be an int; got bool"),
    (
        {"num_experts": 5},
        ValueError,
        "top_k must be at most 5, the number of experts; got 6",
    ),
    ({"scoring": "relu"}, ValueError, "scoring must be one of .*sigmoid.*; got 'relu'"),
    ({"scoring": None}, TypeError, "scoring must be one of .*; got NoneType"),
    ({"renormalize": 1}, TypeError, "renormalize must be a bool; got int"),
    ({"has_bias": None}, TypeError, "has_bias must be a bool; got NoneType"),
    ({"n_group": 0}, ValueError, "n_group must be from 1 to 256; got 0"),
    ({"n_group": 3}, ValueError, "n_group must divide .*; got n_group=3 for 256 experts"),
    ({"n_group": 256}, ValueError, "n_group must leave at least 2 experts in a group"),
    ({"n_group": 8, "topk_group": 9}, ValueError, "topk_group must be from 1 to 8; got 9"),
    ({"n_group": 8, "topk_group": 0}, ValueError, "topk_group must be from 1 to 8; got 0"),
    ({"topk_group": 2}, ValueError, "topk_group must be from 1 to 1; got 2"),
    (
        {"n_group": 64, "topk_group": 1},
        ValueError,
        "top_k must be at most 4, .* topk_group=1 best of n_group=64 groups of 4; got 6",
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), REFUSED, ids=["+".join(case[0]) for case in REFUSED]
)
def test_a_spec_outside_the_limits_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        RouterSpec(**{"num_experts": 256, "hidden_size": 4096} | changes)


def test_groups_may_leave_exactly_top_k_experts():
    assert RouterSpec(256, 4096, top_k=32, n_group=8, topk_group=1).n_group == 8
