"""How wide clusters can be is asked of the driver, about a kernel of the widest kind."""

from types import SimpleNamespace

import pytest
import torch

from cute_router import arch
from cute_router.gemm.config import MAX_SMEM

driver = pytest.importorskip("cuda.bindings.driver")
OK = driver.CUresult.CUDA_SUCCESS
REFUSED = driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE


@pytest.fixture
def asked(monkeypatch) -> SimpleNamespace:
    """A driver that answers `asked.answer`, and what it was asked."""
    asked = SimpleNamespace(answer=(OK, 7), attributes={}, launch=None, unloaded=0)

    def occupancy(function, launch):
        asked.launch = launch
        return asked.answer

    def unload(module):
        asked.unloaded += 1
        return (OK,)

    monkeypatch.setattr(driver, "cuModuleLoadData", lambda image: (OK, image))
    monkeypatch.setattr(driver, "cuModuleGetFunction", lambda module, name: (OK, name))
    monkeypatch.setattr(
        driver,
        "cuFuncSetAttribute",
        lambda function, name, value: (asked.attributes.update({name: value}), (OK,))[1],
    )
    monkeypatch.setattr(driver, "cuOccupancyMaxActiveClusters", occupancy)
    monkeypatch.setattr(driver, "cuModuleUnload", unload)
    return asked


def test_the_question_is_about_clusters_that_need_all_memory_of_their_sms(asked):
    assert arch.active_clusters(16) == 7
    names = driver.CUfunction_attribute
    assert asked.attributes == {
        names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: MAX_SMEM,
        names.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: 1,
    }
    launch, (attribute,) = asked.launch, asked.launch.attrs
    assert (launch.gridDimX, launch.gridDimY, launch.gridDimZ) == (16, 1, 1)
    assert (launch.blockDimX, launch.sharedMemBytes) == (128, MAX_SMEM)
    assert attribute.id == driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster = attribute.value.clusterDim
    assert (cluster.x, cluster.y, cluster.z) == (16, 1, 1)
    assert asked.unloaded == 1


def test_clusters_that_are_refused_are_none(asked):
    asked.answer = (REFUSED, 0)
    assert arch.active_clusters(16) == 0
    assert asked.unloaded == 1


def test_any_other_answer_of_the_driver_is_an_error(asked):
    asked.answer = (driver.CUresult.CUDA_ERROR_INVALID_CONTEXT, 0)
    with pytest.raises(RuntimeError, match="CUDA reports CUDA_ERROR_INVALID_CONTEXT"):
        arch.active_clusters(16)


@pytest.mark.gpu
def test_the_driver_says_of_this_kernel_what_it_says_of_the_compilers():
    from cutlass.utils import HardwareInfo

    torch.cuda.current_stream().synchronize()
    for size in (1, 2, 4, 8, 16):
        expected = HardwareInfo(0).get_max_active_clusters(size)
        assert arch.active_clusters(size) == expected, size
