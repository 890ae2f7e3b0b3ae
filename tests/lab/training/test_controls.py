"""The controls repeat what was recorded and look at nothing else."""

import pytest
import torch

import gaf
from gaf_lab.training.controls import RandomSubset, ReplaySkip


def grams(count, k=6):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = torch.randn(k, 20, generator=generator)
        yield gaf.gram(rows)


def test_replay_skip_averages_all_rows_exactly_when_the_recorded_run_stepped():
    rows = [0, 3, 2, 0, 6]
    policy = ReplaySkip(rows)
    for count, gram in zip(rows, grams(5), strict=True):
        decision = policy(gram)
        assert bool(decision.stepped) == (count > 0)
        assert torch.equal(
            decision.weights, torch.full((6,), 1 / 6 if count else 0.0, dtype=torch.float64)
        )


def test_random_subset_takes_the_recorded_number_of_rows_with_equal_weights():
    rows = [0, 3, 2, 0, 6]
    policy = RandomSubset(rows, seed=0)
    for count, gram in zip(rows, grams(5), strict=True):
        decision = policy(gram)
        assert int(decision.accepted.sum()) == count
        assert bool(decision.stepped) == (count > 0)
        assert decision.weights.sum().item() == pytest.approx(1.0 if count else 0.0)
        assert set(decision.weights[decision.accepted].tolist()) <= {1 / max(count, 1)}


def test_random_subsets_are_uniform_and_do_not_depend_on_the_gradients():
    policy, other = RandomSubset([2] * 600, seed=1), RandomSubset([2] * 600, seed=1)
    counts = torch.zeros(6)
    for step in range(600):
        a = policy(torch.eye(6, dtype=torch.float64))
        if step < 50:
            assert torch.equal(a.accepted, other(torch.ones(6, 6, dtype=torch.float64)).accepted)
        counts += a.accepted
    # each row is drawn with probability 1/3: 200 of 600, standard deviation sqrt(600 * 2/9) = 12
    assert (counts - 200).abs().max() < 4 * 12


@pytest.mark.parametrize("make", [ReplaySkip, lambda rows: RandomSubset(rows, seed=3)])
def test_a_resumed_replay_goes_on_where_it_was(make):
    rows = [2, 0, 3, 1, 0, 4]
    whole, first, second = make(rows), make(rows), make(rows)
    expected = [whole(g) for g in grams(6)]
    for g in list(grams(6))[:3]:
        first(g)
    second.load_state_dict(first.state_dict())
    for g, want in list(zip(grams(6), expected, strict=True))[3:]:
        assert torch.equal(second(g).weights, want.weights)


def test_a_record_that_is_too_short_is_named():
    policy = ReplaySkip([1])
    (gram,) = grams(1)
    policy(gram)
    with pytest.raises(
        ValueError, match="recorded run must be as long as this one; it has 1 steps"
    ):
        policy(gram)


def test_with_two_rows_they_take_gafs_own_steps():
    generator = torch.Generator().manual_seed(0)
    grams = [x @ x.T for x in torch.randn(40, 2, 5, generator=generator).double()]
    found = [gaf.GAF(1.0)(gram) for gram in grams]
    rows = [int(decision.accepted.sum()) if decision.stepped else 0 for decision in found]
    assert set(rows) == {0, 2}
    for control in (ReplaySkip(rows), RandomSubset(rows, 1)):
        for gram, decision in zip(grams, found, strict=True):
            assert torch.equal(control(gram).weights, decision.weights)
