"""399 cases answered in exact rational arithmetic on the vectors, without a Gram matrix."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gaf

CASES = json.loads(Path(__file__).with_name("gaf_cases.json").read_text())

# Besides GAF.__call__ on the Gram matrix, the cases with start="first" go through the Accumulator,
# which streams.
STREAMED = [case for case in CASES if case["start"] == "first"]


def rows_of(case: dict, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([[float(x) for x in row] for row in case["rows"]], dtype=dtype)


def policy_of(case: dict) -> gaf.GAF:
    return gaf.GAF(
        case["tau"], start=case["start"], average=case["average"], min_accepted=case["min_accepted"]
    )


def exact_in_float32(case: dict) -> bool:
    """Not for values that float32 cannot hold, nor for parallel rows that rounding turns apart."""
    values = [abs(x) for row in rows_of(case).tolist() for x in row]
    return not case["name"].startswith("parallel") and all(
        x == 0 or (not 0 < x < 1e-15 and not 1e30 <= x < float("inf")) for x in values
    )


def expect(case: dict, decision: gaf.Decision, update: torch.Tensor, rows: torch.Tensor) -> None:
    assert decision.stepped.item() == case["stepped"]
    assert decision.accepted.tolist() == case["accepted"]
    # The answers are rationals written as float64; weights are exact to one rounding.
    torch.testing.assert_close(
        decision.weights, torch.tensor(case["weights"], dtype=torch.float64), rtol=0, atol=1e-15
    )
    want = torch.zeros(rows.shape[1], dtype=torch.float64)
    for weight, row in zip(case["weights"], rows.double(), strict=True):
        want += weight * row if weight else 0
    used = rows.double()[torch.tensor(case["weights"]) != 0]
    largest = used.abs().max().item() if used.numel() else 0.0
    # At most five roundings per coordinate, each relative to the largest term.
    tolerance = 8 * torch.finfo(rows.dtype).eps * largest
    torch.testing.assert_close(update.double(), want, rtol=0, atol=tolerance)


def case_id(case: dict) -> str:
    return f"{case['name']}-{case['start']}-{case['average']}"


def test_there_are_cases_for_every_start_and_average() -> None:
    assert len(CASES) > 300
    kinds = {(case["start"], case["average"]) for case in CASES}
    assert kinds == {(s, a) for s in ("first", "best", "worst") for a in ("mean", "halving")}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_aggregate_gives_the_exact_answer(case: dict) -> None:
    for dtype in (torch.float64, torch.float32) if exact_in_float32(case) else (torch.float64,):
        rows = rows_of(case, dtype)
        update, decision = gaf.aggregate(rows, policy_of(case))
        expect(case, decision, update, rows)


@pytest.mark.parametrize("case", STREAMED, ids=case_id)
@pytest.mark.filterwarnings("ignore:gaf. One micro-gradient")
def test_the_accumulator_streams_to_the_exact_answer(case: dict) -> None:
    rows = rows_of(case)
    p = nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    acc = gaf.Accumulator(torch.optim.SGD([p], 0.1), policy_of(case))
    for row in rows:
        acc.backward((p * row).sum())
    decision = acc.decide()
    assert (p.grad is not None) == case["stepped"]
    expect(case, decision, torch.zeros_like(p) if p.grad is None else p.grad, rows)


@pytest.mark.parametrize("case", STREAMED, ids=case_id)
def test_the_reference_gives_the_exact_answer(case: dict) -> None:
    update, accepted = gaf.reference(
        rows_of(case), case["tau"], case["average"], case["min_accepted"]
    )
    assert accepted == case["accepted"]
    assert (update is not None) == case["stepped"]
