"""Which kernel `route` runs: a pure function of the shape, as measured."""

import pytest
import torch

from cute_router.crossover import ALWAYS, decode_tokens
from cute_router.eager import dense_backend


@pytest.mark.parametrize(
    ("E", "K", "most"),
    [(128, 2048, 128), (160, 5120, 128), (256, 4096, 128), (384, 7168, 128), (256, 7168, 96)],
)
def test_decode_serves_as_many_tokens_as_was_measured(E, K, most):
    assert decode_tokens(E, K) == most


@pytest.mark.parametrize("shape", [(0, 64), (2000, 64), (64, 7), (64, 0)])
def test_a_router_that_does_not_exist_is_left_to_the_checks(shape):
    assert decode_tokens(*shape) == ALWAYS


@pytest.mark.parametrize(
    ("N", "few", "many"),
    [(1, True, True), (64, True, True), (96, True, True), (97, True, False), (129, False, False)],
)
def test_a_batch_goes_to_the_kernel_that_serves_it(N, few, many):
    for K, decodes in ((4096, few), (7168, many)):
        x, W = (torch.empty(rows, K, device="meta") for rows in (N, 256))
        assert dense_backend(x, W) == ("gemm.decode" if decodes else "gemm.prefill")


@pytest.mark.parametrize("x", [None, torch.empty(100), torch.empty(2, 100, 8)])
@pytest.mark.parametrize("W", [None, torch.empty(100)])
def test_arguments_that_are_none_are_left_to_the_checks(x, W):
    assert dense_backend(x, W) == "gemm.decode"
