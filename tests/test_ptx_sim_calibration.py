"""The simulator gives what an H200 gave for the same sm_90a builds and inputs.

`calibrate_ptx_sim.py` made the record, on the GPU and at the commit that it names.
"""

import pytest
from ptx_sim import calibration
from ptx_sim.calibration import CASES, EXACT, KINDS, RECORD, Case, agreement, name_of
from ptx_sim.launch import simulate

from cute_router.gemm.config import can_implement

recorded = pytest.mark.skipif(
    not RECORD.exists(), reason="no GPU's results yet: tests/ptx_sim/h200.json is absent"
)


@recorded
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_simulator_gives_what_an_h200_gave(case: Case, kind: str):
    source, results = calibration.read(RECORD)
    inputs = calibration.draw(case, kind)
    on_gpu = calibration.unpack(results[name_of(case, kind)], inputs)
    routing = simulate(case.config, *inputs, factor=calibration.FACTOR)
    found = agreement(case, kind, inputs, routing, on_gpu)
    assert found.holds, f"{found}; the GPU's are from {source}"


@recorded
def test_the_record_names_a_hopper_gpu_and_holds_every_case():
    source, results = calibration.read(RECORD)
    assert "H200" in source["machine"]
    assert set(results) == {name_of(case, kind) for case in CASES for kind in KINDS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cases_leave_no_doubt_where_logits_are_exact(case: Case):
    can_implement(case.config)
    for kind in KINDS:
        clear = calibration.decided(case, kind, calibration.draw(case, kind))
        assert clear.all() if kind in EXACT else clear.float().mean() > 0.8


def test_a_file_holds_the_bits_of_its_results(tmp_path):
    case = CASES[0]
    inputs = calibration.draw(case, "special")  # NaN among the weights
    routing = simulate(case.config, *inputs)
    path = tmp_path / "results.json"
    calibration.save(path, {"machine": "this"}, {"case": calibration.pack(inputs, routing)})
    source, results = calibration.read(path)
    again = calibration.unpack(results["case"], inputs)
    assert source == {"machine": "this"}
    assert routing.ids.equal(again.ids)
    assert routing.weights.isnan().any()
    assert routing.weights.numpy().tobytes() == again.weights.numpy().tobytes()
    with pytest.raises(ValueError, match="other inputs"):
        calibration.unpack(results["case"], calibration.draw(case, "ordinary"))


def test_results_that_differ_are_told_apart():
    case, kind = CASES[0], "tie-free"
    inputs = calibration.draw(case, kind)
    routing = simulate(case.config, *inputs)
    assert agreement(case, kind, inputs, routing, routing).holds
    off = routing._replace(weights=routing.weights + 2e-6)
    found = agreement(case, kind, inputs, routing, off)
    assert found.wrong == 0
    assert not found.holds
    with pytest.raises(AssertionError, match="slot 0"):  # no order of near-equals: a wrong one
        agreement(case, kind, inputs, routing, routing._replace(ids=routing.ids.roll(1, -1)))
