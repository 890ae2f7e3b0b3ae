"""Policies of a user's own."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gaf
from gaf.rules.decision import Decision
from helpers.accumulating import ROWS_OF_2, line, loss_of


@dataclass(frozen=True)
class LastOnly(gaf.GAF):
    """Overrides the call: must see the whole Gram matrix."""

    def __call__(self, gram: Tensor) -> Decision:
        accepted = torch.zeros(len(gram), dtype=torch.bool)
        accepted[-1] = True
        return Decision(
            accepted.double(),
            accepted,
            torch.tensor(True),
            torch.zeros(len(gram), dtype=torch.float64),
        )


def fed(policy: gaf.GAF) -> tuple[gaf.Accumulator, nn.Parameter]:
    p = nn.Parameter(torch.zeros(2))
    acc = gaf.Accumulator(SGD([p], 1.0), policy)
    for row in ROWS_OF_2:
        acc.backward(torch.dot(p, row))
    return acc, p


def test_a_policy_that_overrides_the_call_gets_the_gram_matrix() -> None:
    acc, p = fed(LastOnly())
    acc.step()
    torch.testing.assert_close(p.data, -ROWS_OF_2[-1])


@dataclass(frozen=True)
class Uneven(gaf.GAF):
    """Overrides only the conclusion, with weights that the running sum cannot give."""

    def conclude(self, accepted: Tensor, distances: Tensor) -> Decision:
        weights = torch.arange(len(accepted), dtype=torch.float64)
        return Decision(weights, accepted, torch.tensor(True), distances)


def test_a_policy_that_streams_cannot_weigh_rows_apart() -> None:
    acc, _ = fed(Uneven())
    with pytest.raises(ValueError, match="must weigh them alike; got weights"):
        acc.step()


def test_a_decision_has_one_weight_per_row() -> None:
    acc, _ = fed(lambda gram: gaf.GAF()(gram[:2, :2]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one weight for each of the 3 rows; got shape \(2,\)"):
        acc.step()


def test_a_policy_that_returns_plain_numbers_is_refused() -> None:
    model, optimizer = line()
    numbers: Any = [1.0], [True], True, [0.0]
    acc = gaf.Accumulator(optimizer, lambda K: Decision(*numbers))
    acc.backward(loss_of(model))
    with pytest.raises((TypeError, ValueError), match="Decision"):
        acc.step()


def test_scope_group_is_for_data_parallel_engines() -> None:
    with pytest.raises(
        ValueError, match=r"scope must be 'all' or 'layer'; got 'group'.*Use gaf\.attach"
    ):
        gaf.Accumulator(SGD([nn.Parameter(torch.ones(2))], 0.1), gaf.GAF(scope="group"))
