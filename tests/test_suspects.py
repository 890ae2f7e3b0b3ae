"""gaf.Audit against a sum written out, and what it finds: bad data that come together.

On one device and on several ranks.
"""

import math

import pytest
import torch
from torch import nn

import gaf
from gaf.record.audit import value_per_row
from gaf.record.excess import Excess
from gaf.record.recent import WINDOW

NAN = math.nan


def steps(n: int, count: int, k: int = 3, b: int = 4):
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield (
            list(torch.randint(n, (k, b), generator=draw)),
            torch.rand(k, dtype=torch.float64, generator=draw).tolist(),
        )


def written_out(n: int, found) -> torch.Tensor:
    """Each item's mean of value - mean over the last 100 steps, one appearance at a time."""
    excess = [[] for _ in range(n)]
    for t, (members, values) in enumerate(found):
        past = [v for _, row in found[max(t - WINDOW + 1, 0) : t + 1] for v in row if v == v]
        for items, value in zip(members, values, strict=True):
            for item in items.tolist() if value == value else []:
                excess[item].append(value - sum(past) / len(past))
    return torch.tensor(
        [sum(one) / len(one) if one else NAN for one in excess], dtype=torch.float64
    )


def test_the_score_is_the_mean_excess_over_the_last_hundred_steps():
    found = list(steps(6, 250))
    found[7] = (found[7][0], [0.5, NAN, 0.1])
    excess = Excess(7)  # the last item is never drawn
    for members, values in found:
        excess.add(members, values)
    # float64 sums of 500 terms
    torch.testing.assert_close(
        excess.scores(), written_out(7, found), rtol=1e-12, atol=1e-12, equal_nan=True
    )
    assert excess.scores()[6].isnan()


def test_the_start_is_as_far_as_those_compared_with_it_were():
    assert value_per_row([0.0, 0.4, 0.8], [0.0, 0.4, 0.8]) == pytest.approx([0.6, 0.4, 0.8])
    # k = 2: both are as far from each other
    assert value_per_row([0.0, 0.3], [0.0, 0.3]) == [0.3, 0.3]
    # the start need not be the first
    assert value_per_row([1.0, 0.0, 1.0], [0.9, 0.0, 0.8]) == [1.0, 1.0, 1.0]


def test_absent_rows_say_nothing():
    found = value_per_row([NAN, 0.0, 0.7], [NAN, 0.0, 0.7])
    assert math.isnan(found[0])
    assert found[1:] == [0.7, 0.7]
    assert all(map(math.isnan, value_per_row([NAN, 0.0], [NAN, 0.0])))
    assert all(map(math.isnan, value_per_row([NAN, NAN], [NAN, NAN])))


def test_a_level_that_changes_as_training_goes_on_is_taken_out():
    """Item 0 is seen early, at low distances, item 1 late; after 100 steps neither is suspected."""
    excess = Excess(2)
    for t in range(400):
        excess.add(
            [torch.tensor([0 if t < 100 else 1])]
            if not 100 <= t < 200
            else [torch.tensor([], dtype=torch.long)],
            [float(t >= 100)],
        )
    assert excess.scores().tolist() == [0.0, 0.0]


def test_a_saved_audit_goes_on_as_if_it_had_not_been_cut_off():
    found = list(steps(5, 160))
    whole, first, second = Excess(5), Excess(5), Excess(5)
    for members, values in found:
        whole.add(members, values)
    for members, values in found[:120]:
        first.add(members, values)
    state = first.state_dict()
    second.load_state_dict(state)
    for members, values in found[120:]:
        second.add(members, values)
    assert second.scores().equal(whole.scores())
    # the state was its own
    assert first.scores().equal(torch.as_tensor(state["sums"] / state["counts"]))


def test_ranks_that_each_know_their_own_members_add_up_to_one_that_knows_all():
    found = list(steps(5, 50))
    whole, ranks = Excess(5), [Excess(5) for _ in range(3)]
    nothing = torch.tensor([], dtype=torch.long)
    for members, values in found:
        whole.add(members, values)
        for i, rank in enumerate(ranks):
            rank.add([items if i == j else nothing for j, items in enumerate(members)], values)
    sums, counts = sum(rank.sums for rank in ranks), sum(rank.counts for rank in ranks)
    # the order of addition differs
    torch.testing.assert_close(sums / counts, whole.scores(), rtol=1e-12, atol=1e-12)


def trained(bad: int, k: int = 4) -> gaf.Audit:
    """Linear regression from k shards, the targets of one negated.

    Each micro-batch comes from one shard.
    """
    x = torch.randn(k, 64, 8)
    y = x.sum(-1, keepdim=True)
    y[bad] *= -1
    model = nn.Linear(8, 1)
    acc = gaf.Accumulator(torch.optim.SGD(model.parameters(), 0.02), gaf.GAF(tau=0.9))
    audit = gaf.Audit(k)
    for step in range(60):
        order = torch.arange(k).roll(step)  # each shard starts in its turn
        for shard in order:
            pick = torch.randint(64, (8,))
            acc.backward((model(x[shard][pick]) - y[shard][pick]).square().mean())
        decision = acc.step()
        audit.record(order[:, None], decision if step % 2 else acc.outcome)
    return audit


@pytest.mark.parametrize("bad", [0, 2])
def test_the_bad_shard_stands_out(bad):
    scores = trained(bad).scores()
    assert scores.argmax() == bad
    assert scores[bad] > 0.05 > scores[[i for i in range(4) if i != bad]].max()


def test_skipped_steps_count_too():
    """Two opposite rows: none is accepted; both are equally suspect.

    And more so than a pair that agreed.
    """
    audit = gaf.Audit(4)
    for members, second in (([0, 1], -1.0), ([2, 3], 1.0)):
        _, decision = gaf.aggregate(torch.tensor([[1.0, 0.0], [second, 0.0]]), gaf.GAF(0.5))
        audit.record(torch.tensor(members)[:, None], decision)
    assert audit.scores().tolist() == [0.0, 0.0, -1.0, -1.0]
    assert audit.counts.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([[0], [1], [2]], "members for each of the 2 micro-gradients that were measured; got 3"),
        ([[0], [3]], r"members must lie in \[0, 3\); got 3. Give the n"),
        ([[0], [-1]], r"got -1. Give the n"),
        ([[0.0], [1.0]], "must be whole numbers; got torch.float32"),
    ],
)
def test_members_that_cannot_be_are_refused(members, message):
    _, decision = gaf.aggregate(torch.eye(2), gaf.GAF(0.5))
    with pytest.raises(ValueError, match=message):
        gaf.Audit(3).record([torch.tensor(items) for items in members], decision)


def test_an_audit_of_nothing_and_a_state_of_another_size_are_refused():
    with pytest.raises(ValueError, match="n must be a whole number of at least 1; got 0"):
        gaf.Audit(0)
    with pytest.raises(ValueError, match="must be of 3 items; got 2"):
        gaf.Audit(3).load_state_dict(gaf.Audit(2).state_dict())


def test_members_may_be_lists_and_who_was_never_seen_is_no_suspect() -> None:
    audit = gaf.Audit(6)
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    audit.record([[0], [1], [2]], gaf.aggregate(rows, gaf.GAF(0.5))[1])
    # as its docstring has it
    assert audit.scores().nan_to_num(nan=-2).argsort(descending=True)[:3].tolist() == [2, 0, 1]
