"""The book of alarms, and what an Accumulator with gaf.Guard writes into it."""

import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import gaf
from gaf.record.alarms import Alarms, Worker
from gaf.rules.finding import Finding
from helpers.accumulating import cpu_scaler, feed, state_of, vector

NAN = Finding(1, "not finite", math.nan, math.nan)
WORKERS = [Worker(0, "a"), Worker(1, "b"), Worker(4, "c", (4, 5))]


def rows(k: int = 4, n: int = 50) -> Tensor:
    return torch.randn(k, n) + 0.5


def test_one_alarm_for_an_episode_and_one_warning_for_a_kind() -> None:
    book, called = Alarms(WORKERS), []
    with pytest.warns(UserWarning, match="rank 1 .host b.: its gradient is not finite at step 120"):
        book.note([NAN], 120, on_alarm=called.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (121, 221, 321, 422):
            book.note([NAN], step, on_alarm=called.append)
    first, second = book.alarms
    assert (first["step"], first["count"], first["last_step"]) == (120, 4, 321)
    assert (second["step"], second["count"], second["last_step"]) == (422, 1, 422)
    assert [alarm["step"] for alarm in called] == [120, 422]
    assert called[0]["count"] == 1  # a copy
    assert list(first) == [
        *("step", "rank", "host", "kind", "value", "expected", "steps", "count", "last_step")
    ]
    assert json.loads(json.dumps(book.alarms, allow_nan=False)) == book.alarms


@pytest.mark.parametrize(
    ("finding", "stepped", "text"),
    [
        (
            NAN,
            False,
            "rank 1 (host b): its gradient is not finite at step 7. The step was skipped.",
        ),
        (
            Finding(2, "norm", 3000.0, 2.0),
            True,
            "ranks 4, 5 (host c): its gradient's norm is 3e+03 where 2 is usual at step 7. "
            "It was left out of the average.",
        ),
        (
            Finding(0, "cosine drift", 0.02, 0.21, 40),
            True,
            "rank 0 (host a): cosine 0.02 against 0.21 for the last 40 steps at step 7. "
            "It was not left out.",
        ),
        (
            Finding(None, "step norm", 41.0, 3.0),
            True,
            "the average's norm is 41 where 3 is usual at step 7. The step was clipped.",
        ),
        (Finding(0, "odd", 1.0, 2.0), True, "rank 0 (host a): odd: 1, expected 2 at step 7."),
    ],
)
def test_what_a_warning_says(finding: Finding, stepped: bool, text: str) -> None:
    with pytest.warns(UserWarning, match="gaf: ") as caught:
        Alarms(WORKERS).note([finding], 7, stepped)
    assert str(caught[0].message).startswith(f"gaf: {text}")


def test_an_accumulator_leaves_the_row_out_and_names_it() -> None:
    heard: list[dict[str, Any]] = []
    p = vector(50)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Guard(on_alarm=heard.append))
    for step in range(30):
        g, before = rows(), p.detach().clone()
        if step >= 20:
            g[2, 3] = math.nan
        feed(acc, p, g)
        if step == 20:
            with pytest.warns(UserWarning, match="gaf: row 2: its gradient is not finite at step"):
                acc.step()
        else:
            acc.step()
        kept = g[[0, 1, 3]] if step >= 20 else g
        torch.testing.assert_close(p.detach(), before - 0.1 * kept.mean(0), rtol=1e-6, atol=1e-7)
    (alarm,) = acc.alarms
    assert (alarm["step"], alarm["row"], alarm["kind"]) == (21, 2, "not finite")
    assert (alarm["value"], alarm["count"], alarm["last_step"]) == (None, 10, 30)
    assert [a["step"] for a in heard] == [21]


def test_half_of_the_rows_broken_leaves_parameters_and_state_bitwise() -> None:
    p = vector(50)
    optimizer = SGD([p], 0.1, momentum=0.9, weight_decay=0.1)
    acc = gaf.Accumulator(optimizer, gaf.Guard())
    feed(acc, p, rows())
    acc.step()
    before, state = p.detach().clone(), state_of(optimizer)
    g = rows()
    g[1:3] = math.inf
    feed(acc, p, g)
    with pytest.warns(
        UserWarning, match="row [12]: its gradient is not finite at step 2. The step"
    ):
        assert not acc.step().stepped
    assert torch.equal(p, before)
    assert torch.equal(state_of(optimizer)[0]["momentum_buffer"], state[0]["momentum_buffer"])
    assert [alarm["row"] for alarm in acc.alarms] == [1, 2]


def test_a_decision_that_was_taken_back_keeps_its_alarm() -> None:
    p = vector(50)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Guard())
    g = rows()
    g[0, 0] = math.nan
    feed(acc, p, g)
    with pytest.warns(UserWarning, match="row 0"):
        acc.decide()
    p.grad = None
    with pytest.raises(RuntimeError, match="it was gone"):
        acc.step()
    assert len(acc.alarms) == 1
    assert acc.stats()["stepped"] == 0


@pytest.mark.parametrize(("bad", "falls"), [(1, False), (2, True), (4, True)])
def test_under_a_scaler_half_of_the_rows_are_an_overflow(bad: int, falls: bool) -> None:
    p, amp = vector(50), cpu_scaler(backoff_factor=0.5)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Guard(), scaler=amp)
    feed(acc, p, rows())
    acc.step()
    scale, before = amp.get_scale(), p.detach().clone()
    g = rows()
    g[:bad, 0] = math.inf
    feed(acc, p, g)
    with warnings.catch_warnings():
        # an overflow is no alarm
        warnings.simplefilter("error" if falls else "ignore")
        acc.step()
    assert amp.get_scale() == (scale / 2 if falls else scale)
    assert len(acc.alarms) == (0 if falls else bad)
    want = before if falls else before - 0.1 * g[bad:].mean(0)
    torch.testing.assert_close(p.detach(), want, rtol=1e-5, atol=1e-6)


def test_an_overflow_at_a_scale_of_1_is_an_alarm() -> None:
    """A smaller scale would not help: the rows are broken."""
    p = vector(50)
    amp = torch.amp.GradScaler("cpu", init_scale=1.0)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.Guard(), scaler=amp)
    g = rows()
    g[:, 0] = math.nan
    feed(acc, p, g)
    with pytest.warns(UserWarning, match="not finite"):
        acc.step()
    assert len(acc.alarms) == 4
