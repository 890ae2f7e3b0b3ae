"""Under torch.set_default_device every tensor that the library makes lies where its inputs do.

"meta", whose tensors have no values, stands in for any device other than the data's: what is made
there gives another outcome, or fails.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import gaf
from gaf.device.packs import Apart
from gaf.device.stacked import StackedRows
from gaf.measure.acceptance import measure_acceptance
from gaf.measure.result import Probe
from gaf.ranks.handle import Handle
from gaf.record.excess import Excess
from gaf.record.outcome import Outcome, pack
from gaf.record.telemetry import Telemetry
from gaf.rules import agreement, prediction
from gaf.rules.blas import gram_by_blas, products_by_blas
from gaf.rules.decision import Evidence
from gaf.rules.gram import gram_of

ROWS = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) + 0.5
ROWS[3] = math.nan
DRAWN = torch.randn(24, 5, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(120).view(24, 5) % 3
MODEL = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
THRESHOLDS: list[Callable[[], Any]] = [
    gaf.SignalTau,
    gaf.NoiseFloorTau,
    gaf.QuantileTau,
    gaf.MovingAverageTau,
    lambda: gaf.ScheduleTau({0: 1.0, 4: 0.5}),
    lambda: "auto",
    lambda: 0.7,
]
POLICIES: list[Callable[[], Any]] = [
    *[lambda make=make: gaf.GAF(make()) for make in THRESHOLDS],
    lambda: gaf.GAF(0.9, start="best"),
    lambda: gaf.GAF(0.9, start="worst", average="halving"),
    lambda: gaf.GAF(0.9, average="halving"),
    lambda: gaf.GAF(0.9, max_norm_ratio=1.05),
    gaf.Mean,
    lambda: gaf.RandomSkip(0.5),
]


def parts(found: Any) -> Any:
    """As plain numbers, NaN as a word."""
    if isinstance(found, Tensor):
        assert found.device.type == "cpu"
        return parts(found.tolist())
    if isinstance(found, gaf.Decision | Evidence):
        return parts(list(vars(found).values()))
    if isinstance(found, dict):
        return {key: parts(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [parts(one) for one in found]
    return "nan" if isinstance(found, float) and math.isnan(found) else found


def decisions(make: Callable[[], Any]) -> Any:
    """Three steps, a saved state that goes on, and the threshold's state."""
    policy, other = make(), make()
    found = [gaf.aggregate(ROWS * (1 + step), policy) for step in range(3)]
    if hasattr(policy, "state_dict"):
        other.load_state_dict(policy.state_dict())
        found.append((gaf.aggregate(ROWS, other), other.state_dict()))
    return found


def kept_rows(make: Callable[[], Any]) -> Any:
    rows = StackedRows(make(), Apart([True, False]))
    for row in ROWS:
        rows.add([row[:15], row[15:]])
    decision, evidence = rows.decide()
    return decision, evidence, rows.update(decision.weights.tolist()), pack(decision, evidence)


def judged_by_a_handle() -> Any:
    p = nn.Parameter(ROWS[0].clone())
    optimizer = SGD([p], 0.1)
    handle = Handle([optimizer], gaf.GAF(gaf.NoiseFloorTau()), None, 6, [p])
    handle.begin()
    found = handle.decide(gaf.gram(ROWS), [p])
    handle.end()
    optimizer.step()
    handle.load_state_dict(handle.state_dict())
    return found, handle.last, handle.stats()


def counted() -> Any:
    telemetry = Telemetry()
    K = gaf.gram(ROWS)
    evidence = Evidence(K.diagonal(), K[0, 1], K[0, 0])
    telemetry.record(Outcome.fetch(gaf.GAF(0.9)(K), evidence), gaf.GAF(0.9))
    other = Telemetry()
    other.load_state_dict(telemetry.state_dict())
    return telemetry.stats(), other.stats()


def audited() -> Any:
    audit, other = gaf.Audit(6), Excess(6)
    decision = gaf.aggregate(ROWS, gaf.GAF(0.9))[1]
    for members in ([[0], [1], [], [3], [4], [5]], torch.arange(6, device="cpu")[:, None]):
        audit.record(members, decision)
    other.load_state_dict(audit.state_dict())
    return audit.scores(), other.scores(), audit.counts


def probed() -> Any:
    found = gaf.probe(MODEL, cross_entropy, zip(DRAWN, LABELS, strict=True), k=4, slices=2)
    smaller, advice = found.merged(2), found.recommend()
    return (
        found.gram,
        found.layers,
        found.distances(),
        found.distances("0"),
        vars(found.noise),
        vars(found.noise_in("3")),
        found.predicted(0.9),
        vars(found.measured(0.9)),
        smaller.gram,
        str(found),
        advice.tau,
        vars(advice.measured),
        [t.tolist() for t in MODEL.state_dict().values()],
    )


def measured() -> Any:
    K = gaf.gram(ROWS)[:3, :3].repeat(4, 4) + torch.eye(12, dtype=torch.float64, device="cpu")
    return (
        vars(agreement.noise_of(K, 8)),
        agreement.cosines_of(K),
        agreement.dimension_of(K),
        agreement.noise_squared(K),
        prediction.noise_floor(0.05, 100.0),
        prediction.tau_for(0.5, 4, 3.0, 100.0),
        vars(measure_acceptance(K, 4, 0.9)),
        Probe(5, 4, K, {"all": K}, 0).recommend().tau,
    )


def multiplied() -> Any:
    one, other = ROWS[0], ROWS[1]
    nothing = [[None, torch.empty(0, device="cpu")], [None, None]]
    return (
        gaf.gram(ROWS),
        gaf.gram(ROWS[:2].bfloat16()),
        gaf.gram(1e30 * ROWS[:2]),
        gram_by_blas(ROWS[:2]),
        products_by_blas(one, other),
        gram_of(nothing),
        gram_of([[], []]),
        gram_of([[one], [None]]),
        gaf.gram(torch.empty(2, 0, device="cpu")),
    )


def refer() -> Any:
    alike = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], device="cpu")  # a sum of zero
    return gaf.reference(ROWS, 0.9), gaf.reference(alike, 2.0), gaf.reference(alike, 0.9, "halving")


CALLS: dict[str, Callable[[], Any]] = {
    **{f"decisions {i}": lambda make=make: decisions(make) for i, make in enumerate(POLICIES)},
    **{f"kept rows {i}": lambda make=make: kept_rows(make) for i, make in enumerate(POLICIES)},
    **{
        f.__name__: f
        for f in (judged_by_a_handle, counted, audited, probed, measured, multiplied, refer)
    },
}


@pytest.fixture
def meta() -> Iterator[Callable[[], None]]:
    """Makes "meta" the default device, until the test is over."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("name", CALLS)
def test_another_default_device_changes_nothing(name: str, meta: Callable[[], None]) -> None:
    want = parts(CALLS[name]())
    meta()
    assert torch.zeros(1).device.type == "meta"
    assert parts(CALLS[name]()) == want


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_another_default_dtype_changes_nothing(name: str, dtype: torch.dtype) -> None:
    want = parts(CALLS[name]())
    torch.set_default_dtype(dtype)
    try:
        assert parts(CALLS[name]()) == want
    finally:
        torch.set_default_dtype(torch.float32)
