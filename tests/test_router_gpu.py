"""Router and the ops on a GPU: graphs, torch.compile, threads and streams, several devices."""

import copy
import threading
import time

import pytest
import torch
from cases import FLASH
from oracle import assert_routing
from test_ops import same
from torch import Tensor

from cute_router import Router, RouterSpec, dense_decode

pytestmark = pytest.mark.gpu(capability=(9, 0))

E, K = FLASH
VOCAB = 1000
SECONDS = 5.0
THREADS = 4
STREAMS = 2  # of each thread


def router_of(mode: str, device: str = "cuda", seed: int = 0) -> Router:
    """A router of DeepSeek-V4-Flash's sizes with random tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": (torch.randn(E, K, generator=generator) * K**-0.5).bfloat16()}
    if mode == "hash":
        tensors["tid2eid"] = torch.randint(E, (VOCAB, 6), generator=generator)
    else:
        tensors["bias"] = torch.randn(E, generator=generator) * 0.1
    router = Router(
        RouterSpec(E, K),
        mode,
        device=device,
        routed_scaling_factor=1.5,
        vocab_size=VOCAB if mode == "hash" else None,
    )
    router.load_weights(tensors.items())
    return router


def call_of(N: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """Hidden states and token ids."""
    x = torch.randn(N, K, device=device).bfloat16()
    return x, torch.randint(VOCAB, (N,), device=device)


@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_a_captured_router_gives_the_eager_bits_for_what_its_inputs_hold_at_replay(mode):
    router = router_of(mode)
    for N in (1, 8, 64):
        x, token_ids = call_of(N)
        router(x, token_ids)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = router(x, token_ids)
        for _ in range(3):
            for static, new in zip((x, token_ids), call_of(N), strict=True):
                static.copy_(new)
            graph.replay()
            assert same(captured, router(x, token_ids))


@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_a_captured_router_sees_weights_that_are_loaded_into_it(mode):
    router, other = router_of(mode), router_of(mode, seed=1)
    call = call_of(8)
    router(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router(*call)
    router.load_weights(other.state_dict().items())
    graph.replay()
    assert same(captured, other(*call))


@pytest.mark.parametrize("compile_mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_a_compiled_router_gives_the_eager_bits(mode, compile_mode):
    torch._dynamo.reset()
    router = router_of(mode)

    def layer(x, token_ids):
        weights, ids = router(x * 2, token_ids)
        return weights * 4, ids + 1

    fast = torch.compile(layer, fullgraph=True, dynamic=True, mode=compile_mode)
    for N in (2, 8, 33, 64, 65, 200):
        for _ in range(3):  # warm-up, capture and replay of torch's own graphs
            call = call_of(N)
            got = tuple(t.clone() for t in fast(*call))
            assert same(got, layer(*call))


def test_a_compiled_step_gives_the_eager_gradients():
    torch._dynamo.reset()
    router = router_of("dense")
    router.weight.requires_grad_()

    def loss(x):
        return (router(x).weights ** 2).sum()

    grads = []
    x = call_of(33)[0].requires_grad_()
    for step in (loss, torch.compile(loss, fullgraph=True, dynamic=True)):
        x.grad = router.weight.grad = None
        step(x).backward()
        grads.append((x.grad.float(), router.weight.grad.float()))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2.0**-20)


def test_weights_written_by_the_kernel_ahead_are_the_ones_that_route():
    router, x = router_of("dense"), call_of(8)[0]
    router(x)
    for seed in range(50):
        source = router_of("dense", seed=seed)
        router.load_state_dict(source.state_dict())
        loaded = router(x)
        copied = copy.deepcopy(source)(x)
        torch.cuda.synchronize()
        expected = source(x)
        assert same(loaded, expected)
        assert same(copied, expected)


def test_handles_route_on_the_gpu():
    for mode in ("dense", "hash"):
        router, call = router_of(mode), call_of(8)
        assert same(torch.ops.cute_router.route_by_handle(router.handle, *call), router(*call))


def test_threads_and_streams_share_a_router():
    router = router_of("dense")
    inputs = [call_of(N)[0] for N in (1, 2, 8, 17, 64)]
    expected = []
    for x in inputs:
        expected.append(router(x))
        torch.cuda.synchronize()
        assert_routing(
            expected[-1],
            x,
            router.weight,
            router.e_score_correction_bias,
            routed_scaling_factor=1.5,
        )
    failures: list[str] = []
    end = time.monotonic() + SECONDS

    def work(number: int) -> None:
        streams = [torch.cuda.Stream() for _ in range(STREAMS)]
        rounds = 0
        while time.monotonic() < end and not failures:
            results = []
            for i in range(20):
                which = (number + rounds + i) % len(inputs)
                with torch.cuda.stream(streams[i % STREAMS]):
                    results.append((which, router(inputs[which])))
            for stream in streams:
                stream.synchronize()
            failures.extend(
                f"thread {number}, round {rounds}, N={inputs[which].shape[0]}"
                for which, routing in results
                if not same(routing, expected[which])
            )
            rounds += 1
        if rounds == 0:
            failures.append(f"thread {number} did nothing")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:5]


def test_a_router_moves_to_the_gpu_and_keeps_its_bits():
    router = router_of("dense", "cpu")
    moved = copy.deepcopy(router).to("cuda", torch.float16)
    assert moved.weight.is_cuda
    assert same(moved.cpu().state_dict().values(), router.state_dict().values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_routers_on_several_devices_give_the_same_bits(mode):
    router = router_of(mode, "cuda:0")
    twin = copy.deepcopy(router).to("cuda:1")
    call = call_of(8, "cuda:0")
    there = twin(*(t.to("cuda:1") for t in call))
    assert there.weights.device == there.ids.device == torch.device("cuda:1")
    assert same([t.cpu() for t in there], [t.cpu() for t in router(*call)])
    with pytest.raises(ValueError, match="W must be on cuda:1 as x is; got cuda:0"):
        dense_decode(call[0].to("cuda:1"), router.weight)
