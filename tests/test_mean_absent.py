"""Absent rows (zero, NaN or infinite) under Mean and RandomSkip.

They count in the update, in no distance, and once in the statistics.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gaf
from gaf.device.rows import rows_without_waiting
from gaf.record.outcome import Outcome
from gaf.record.telemetry import Telemetry

NAN, INF = math.nan, math.inf
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def stacked(policy: Any) -> Callable[[Tensor], gaf.Decision]:
    return lambda gram: policy(gram)


def accumulator(
    engine: str, policy: Any, p: list[nn.Parameter], patch: pytest.MonkeyPatch
) -> gaf.Accumulator:
    if engine == "on a device":
        patch.setattr("gaf.device.accumulate.rows_for", rows_without_waiting)
    return gaf.Accumulator(SGD(p, 0.0), stacked(policy) if engine == "stacked" else policy)


def micro_gradients(dtype: torch.dtype, bad: float) -> Tensor:
    """Eight rows of 5 + 3 coordinates. Rows 0, 3, 5 are absent, row 3 by one coordinate alone."""
    rows = (torch.randn(8, 8) + 1).to(dtype)
    rows[0] = rows[5] = bad
    rows[3, 6] = bad
    return rows if bad else torch.where(torch.arange(8)[:, None] == 3, 0, rows)


@pytest.mark.parametrize("engine", ["streamed", "on a device", "stacked"])
@pytest.mark.parametrize("policy", [gaf.Mean(), gaf.RandomSkip(1.0)], ids=repr)
@pytest.mark.parametrize("bad", [0.0, NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_absent_rows_count_in_the_update_and_in_no_distance(
    engine: str, policy: Any, bad: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = micro_gradients(dtype, bad)
    p, q = (nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (5, 3))
    acc = accumulator(engine, policy, [p, q], monkeypatch)
    for _ in range(2):  # the second macro-batch begins anew
        for i, row in enumerate(rows):
            if i == 6:  # one that fails leaves no trace
                with pytest.raises(ZeroDivisionError):
                    failing_backward(acc, p, q)
            loss = (p * row[:5]).sum() + (0 if i == 1 else (q * row[5:]).sum())
            acc.backward(loss)
        decision = acc.decide()
        update, stats = torch.cat([p.grad, q.grad]), acc.stats()
        acc.step()
    rows[1, 5:] = 0  # as it was without a loss on q
    want = gaf.aggregate(rows.double(), gaf.GAF(2.0))[1].distances
    # sums in half precision, of eight rows
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(decision.distances, want, rtol=0, atol=tolerance, equal_nan=True)
    assert want.isnan().tolist() == [i in (0, 3, 5) for i in range(8)]
    mean = rows.double().mean(0)
    torch.testing.assert_close(
        update.double(),
        mean,
        rtol=4 * torch.finfo(dtype).eps,
        atol=4 * torch.finfo(dtype).eps,
        equal_nan=True,
    )
    assert [stats[key] for key in ("accepted", "rejected", "absent")] == [10, 0, 6]
    assert stats["acceptance"] == 1


def failing_backward(acc: gaf.Accumulator, p: nn.Parameter, q: nn.Parameter) -> None:
    """Delivers q's gradient, then fails."""

    def fail(grad: Tensor) -> Tensor:
        raise ZeroDivisionError

    scaled = p * 1.0
    scaled.register_hook(fail)
    acc.backward(scaled.sum() + 100 * q.sum())


@pytest.mark.parametrize("policy", [gaf.Mean(), gaf.RandomSkip(1.0)], ids=repr)
@pytest.mark.parametrize("bad", [0.0, NAN, INF])
def test_a_gram_matrix_gives_later_rows_their_distances_too(policy: Any, bad: float) -> None:
    rows = micro_gradients(torch.float64, bad)
    update, decision = gaf.aggregate(rows, policy)
    want = gaf.aggregate(rows, gaf.GAF(2.0))[1].distances
    torch.testing.assert_close(decision.distances, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(update, rows.mean(0), equal_nan=True)


# --- counts


@pytest.mark.parametrize("engine", ["streamed", "on a device", "stacked"])
@pytest.mark.parametrize(
    "policy",
    [
        gaf.Mean(),
        gaf.RandomSkip(0.5),
        gaf.GAF(0.6),
        gaf.GAF(0.6, start="best"),
        gaf.GAF(0.6, max_norm_ratio=2.0),
        gaf.GAF(0.6, average="halving", min_accepted=3),
    ],
    ids=repr,
)
def test_every_micro_gradient_is_accepted_rejected_or_absent(
    engine: str, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = nn.Parameter(torch.zeros(6))
    acc = accumulator(engine, policy, [p], monkeypatch)
    generator = torch.Generator().manual_seed(0)
    absent = 0
    for step in range(12):
        for i in range(5):
            row = torch.randn(6, generator=generator) + 0.5
            factor = (0.0, NAN, 1.0)[min((step * i) % 7, 2)]
            absent += factor != 1
            acc.backward((p * row).sum() * factor)
        acc.step()
    stats = acc.stats()
    parts = [stats[key] for key in ("accepted", "rejected", "absent")]
    assert sum(parts) == stats["micro_gradients"] == 60
    assert 0 <= stats["acceptance"] <= 1
    if isinstance(policy, gaf.Mean) or policy.max_norm_ratio is None:
        assert parts[2] == absent


def test_layers_that_decide_for_themselves_count_each_micro_gradient_once() -> None:
    """A micro-gradient is absent if every layer's is, and accepted if any layer accepts it."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    acc = gaf.Accumulator(SGD(model.parameters(), 0.0), gaf.GAF(0.6, scope="layer"), model=model)
    first, second = model[0].weight, model[1].weight
    for a, b in ((1.0, NAN), (0.0, 1.0), (1.0, 1.0), (NAN, 0.0), (1.0, -1.0)):
        acc.backward(a * first.sum() + b * second.sum())
    acc.step()
    stats = acc.stats()
    assert [stats[key] for key in ("accepted", "rejected", "absent")] == [4, 0, 1]
    assert stats["acceptance"] == 1


def test_steps_that_measured_nothing_do_not_raise_the_acceptance_of_others() -> None:
    """A policy put in between steps: what a plain all-reduce took was compared with nothing."""
    telemetry = Telemetry()
    measured = Outcome(True, [True, True, False], [0.0, 0.2, 0.9], [0.5, 0.5, 0.0], [1.0] * 3, 0.5)
    telemetry.record(measured, gaf.GAF(0.5))
    for _ in range(3):
        telemetry.record(
            Outcome(True, [True] * 3, [NAN] * 3, [1 / 3] * 3, [1.0] * 3, NAN).without_measures(),
            gaf.Mean(),
        )
    stats = telemetry.stats()
    assert stats["acceptance"] == 0.5
    assert stats["accepted"] + stats["rejected"] + stats["absent"] == stats["micro_gradients"] == 12
