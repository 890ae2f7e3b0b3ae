"""The policies against the paper's algorithm on vectors, closed forms, and a loop over starts."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gaf
from gaf.rules.decision import as_skip
from gaf.rules.ring import mean_pairwise_cosine
from gaf.rules.sequential import halving_weights

STARTS, AVERAGES = ("first", "best", "worst"), ("mean", "halving")


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def at_angles(*degrees: float) -> Tensor:
    """Unit vectors in the plane."""
    return matrix([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def decide(rows: Tensor, *args: Any, **kwargs: Any) -> gaf.Decision:
    return gaf.GAF(*args, **kwargs)(gaf.gram(rows))


# Small integers make K exact, and with it the many ties, cancelled sums and equal rows.
BAD = st.sampled_from([math.nan, math.inf, -math.inf])
TAUS = st.sampled_from(
    [0.0, 0.25, 0.5, 1 - math.sqrt(0.5), 0.97, 1.0, 1.25, 1.5, 1 + math.sqrt(0.5), 2.0]
) | st.floats(0, 2)


@st.composite
def integer_rows(draw: st.DrawFn, least: int = 1, most: int = 6) -> Tensor:
    k, n = draw(st.integers(least, most)), draw(st.integers(1, 4))
    rows = draw(
        st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=k, max_size=k)
    )
    found = matrix([[float(x) for x in row] for row in rows])
    if draw(st.booleans()):
        found[draw(st.integers(0, k - 1)), draw(st.integers(0, n - 1))] = draw(BAD)
    return found


@st.composite
def real_rows(draw: st.DrawFn, least: int = 1) -> Tensor:
    """In general position, of very different lengths, with a common direction."""
    k, n, seed = draw(st.integers(least, 7)), draw(st.integers(2, 20)), draw(st.integers(0, 2**31))
    rng = torch.Generator().manual_seed(seed)
    lengths = 10 ** torch.empty(k, 1, dtype=torch.float64).uniform_(-3, 3, generator=rng)
    return lengths * (
        torch.randn(k, n, generator=rng, dtype=torch.float64)
        + 0.5 * torch.randn(n, generator=rng, dtype=torch.float64)
    )


ROWS = integer_rows() | real_rows()


# --- the paper's algorithm


@given(ROWS, TAUS, st.sampled_from(AVERAGES), st.integers(1, 4))
def test_gaf_on_the_gram_matrix_is_the_papers_algorithm_on_the_vectors(
    rows: Tensor, tau: float, average: str, least: int
) -> None:
    update, decision = gaf.aggregate(rows, gaf.GAF(tau, average=average, min_accepted=least))
    want, accepted = gaf.reference(rows, tau, average, least)
    assert decision.accepted.tolist() == accepted
    assert decision.stepped.item() == (want is not None)
    want = torch.zeros_like(update) if want is None else want
    # float64 roundings, relative to the longest accepted row; accepted rows may cancel below it
    scale = rows[decision.accepted].abs().max().item() if any(accepted) else 1.0
    torch.testing.assert_close(update, want, rtol=0, atol=1e-14 * scale)


def distance_to(total: Tensor, g: Tensor) -> float:
    lengths = total.norm() * g.norm()
    return min(max(1 - (torch.dot(total, g) / lengths).item(), 0.0), 2.0) if lengths > 0 else 1.0


def naive_run(
    rows: Tensor, order: list[int], tau: float, average: str
) -> tuple[list[int], list[float]]:
    """Rows accepted, in the order of the visit, and the distances by row, by a loop on vectors."""
    total, taken, distances = None, [], [math.nan] * len(rows)
    for i in order:
        g = rows[i]
        if not g.isfinite().all() or g.norm() == 0:
            continue
        distances[i] = 0.0 if total is None else distance_to(total, g)
        if distances[i] <= tau + 1e-12:
            total = g if total is None else (total + g) / 2 if average == "halving" else total + g
            taken.append(i)
    return taken, distances


def naive_weights(taken: list[int], k: int, average: str) -> list[float]:
    weights = [0.0] * k
    for c, i in enumerate(taken):
        if average == "halving":
            weights = [w / 2 for w in weights]
            weights[i] = 0.5 if c else 1.0
        else:
            weights[i] = 1 / len(taken)
    return weights


def naive_outcomes(rows: Tensor, tau: float, start: str, average: str, least: int) -> list[tuple]:
    """What section 6 of the design allows: one outcome, or several if sets tie within rounding."""
    k = len(rows)
    least = 1 if k == 1 else least
    sound = [bool(g.isfinite().all()) and g.norm().item() > 0 for g in rows]
    runs = []
    for s in range(k):
        if sound[s]:
            taken, distances = naive_run(rows, [(s + j) % k for j in range(k)], tau, average)
            cosines = [1 - distance_to(rows[i], rows[j]) for i, j in combinations(sorted(taken), 2)]
            runs.append(
                (len(taken), math.fsum(cosines) / max(len(cosines), 1), s, taken, distances)
            )
    if start == "worst":
        runs = [(-count, -cosine, *rest) for count, cosine, *rest in runs if count >= least]
    if not runs or abs(max(runs)[0]) < least:
        return []
    count = max(run[0] for run in runs)
    cosine = max(run[1] for run in runs if run[0] == count)
    tied = [run for run in runs if run[0] == count and run[1] > cosine - 1e-9]
    # the same set ties exactly: the lowest start
    first_of_its_set = {frozenset(run[3]): run for run in reversed(tied)}
    return [
        (naive_weights(taken, k, average), sorted(taken), distances)
        for *_, taken, distances in first_of_its_set.values()
    ]


@given(ROWS, TAUS, st.sampled_from(("best", "worst")), st.sampled_from(AVERAGES), st.integers(1, 4))
def test_best_and_worst_are_what_a_naive_loop_over_the_starts_finds(
    rows: Tensor, tau: float, start: str, average: str, least: int
) -> None:
    decision = decide(rows, tau, start=start, average=average, min_accepted=least)
    outcomes = naive_outcomes(rows, tau, start, average, least)
    assert decision.stepped.item() == bool(outcomes)
    if not outcomes:
        assert not decision.accepted.any()
        assert not decision.weights.any()
        return
    found = decision.weights.tolist(), decision.accepted.nonzero()[:, 0].tolist()
    assert found in [(weights, taken) for weights, taken, _ in outcomes]
    want = matrix(
        next(distances for weights, taken, distances in outcomes if (weights, taken) == found)
    )
    # 1e-6: a sum that cancelled to 1e-9 of its terms has a direction of so many digits only
    torch.testing.assert_close(decision.distances, want, rtol=0, atol=1e-6, equal_nan=True)


# --- identities


@given(ROWS, TAUS, st.sampled_from(STARTS), st.sampled_from(AVERAGES), st.integers(-40, 40))
def test_one_factor_on_all_rows_changes_no_decision(
    rows: Tensor, tau: float, start: str, average: str, power: int
) -> None:
    """Powers of two, so that K is scaled exactly, and then every bit of the decision stays."""
    policy = gaf.GAF(tau, start=start, average=average)
    a, b = policy(gaf.gram(rows)), policy(gaf.gram(rows * 2.0**power))
    assert torch.equal(a.weights, b.weights)
    assert torch.equal(a.accepted, b.accepted)
    torch.testing.assert_close(a.distances, b.distances, rtol=0, atol=0, equal_nan=True)


@given(real_rows(), st.sampled_from(STARTS), st.floats(1e-8, 1e8))
def test_any_factor_on_all_rows_accepts_the_same(rows: Tensor, start: str, factor: float) -> None:
    a, b = decide(rows, 0.9, start=start), decide(rows * factor, 0.9, start=start)
    assume(((a.distances - 0.9).abs() > 1e-9).all())  # not within rounding of the threshold
    assert torch.equal(a.accepted, b.accepted)


@given(ROWS, st.sampled_from(STARTS))
def test_tau_2_is_the_mean_of_the_present_rows(rows: Tensor, start: str) -> None:
    present = rows.isfinite().all(1) & (rows != 0).any(1)
    update, decision = gaf.aggregate(rows, gaf.GAF(2.0, start=start, min_accepted=1))
    assert torch.equal(decision.accepted, present)
    want = (
        rows[present].mean(0) if present.any() else torch.zeros(rows.shape[1], dtype=torch.float64)
    )
    scale = rows[present].abs().max().item() if present.any() else 1.0
    torch.testing.assert_close(update, want, rtol=0, atol=1e-14 * scale)  # both in float64


@given(integer_rows(), TAUS, st.sampled_from(STARTS), st.sampled_from(AVERAGES), st.integers(1, 3))
def test_every_decision_is_well_formed(
    rows: Tensor, tau: float, start: str, average: str, least: int
) -> None:
    """Absent rows are never accepted; weights are positive for accepted rows alone.

    They sum to 1, or are all zero on a skip.
    """
    k, d = len(rows), decide(rows, tau, start=start, average=average, min_accepted=least)
    absent = ~(rows.isfinite().all(1) & (rows != 0).any(1))
    assert not (d.accepted & absent).any()
    assert torch.equal(d.distances.isnan(), absent)
    assert torch.equal(d.weights > 0, d.accepted)
    # at most six roundings of 1/k
    assert d.weights.sum().item() == pytest.approx(1.0 if d.stepped else 0.0, abs=1e-15)
    assert d.accepted.sum().item() >= ((1 if k == 1 else least) if d.stepped else 0)
    assert d.stepped or not d.accepted.any()
    shown = d.distances[~absent]
    assert ((shown >= 0) & (shown <= 2)).all()
    assert absent.all() or (shown == 0).any()  # the start
    assert (shown[d.accepted[~absent]] <= tau + 1e-12).all()  # TIE


@given(ROWS, TAUS)
def test_best_accepts_at_least_as_many_as_first(rows: Tensor, tau: float) -> None:
    best, first = (
        decide(rows, tau, start=s, min_accepted=1).accepted.sum() for s in ("best", "first")
    )
    assert best >= first


@given(ROWS, TAUS)
def test_worst_accepts_at_most_as_many_as_best_and_steps_where_best_does(
    rows: Tensor, tau: float
) -> None:
    worst, best = (decide(rows, tau, start=s) for s in ("worst", "best"))
    assert worst.accepted.sum() <= best.accepted.sum()
    assert worst.stepped == best.stepped


@given(real_rows(least=2), TAUS, st.data())
def test_best_and_worst_choose_the_same_set_when_the_ring_is_turned(
    rows: Tensor, tau: float, data: st.DataObject
) -> None:
    """Of rows in general position, where no two sets tie."""
    turn = data.draw(st.integers(1, len(rows) - 1))
    for start in ("best", "worst"):
        here, there = decide(rows, tau, start=start), decide(rows.roll(turn, 0), tau, start=start)
        assert torch.equal(here.accepted.roll(turn, 0), there.accepted)


def test_the_sequential_rule_depends_on_the_order() -> None:
    """At 60 degrees and tau = 1/2 neighbours agree; from the middle row on, all three do."""
    # 100 lies 75 from the sum at 25
    assert decide(at_angles(0, 50, 100), 0.5).accepted.tolist() == [True, True, False]
    assert decide(at_angles(0, 100, 50), 0.5).accepted.tolist() == [True, False, True]
    assert decide(at_angles(100, 50, 0), 0.5).accepted.tolist() == [True, True, False]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("average", AVERAGES)
def test_for_two_rows_halving_is_the_mean_and_the_start_does_not_matter(
    start: str, average: str
) -> None:
    assert decide(at_angles(0, 59), 0.5, start=start, average=average).weights.tolist() == [
        0.5,
        0.5,
    ]
    assert not decide(at_angles(0, 61), 0.5, start=start, average=average).stepped


# --- closed forms


def test_distances_are_one_minus_the_cosine_to_the_running_sum() -> None:
    """0 and 60 degrees sum to 30; 120 lies 90 from that: not accepted. So 150 is 120 from 30."""
    d = decide(at_angles(0, 60, 120, 150), 0.75)
    # roundings of cosines
    torch.testing.assert_close(d.distances, matrix([[0, 0.5, 1.0, 1.5]])[0], rtol=0, atol=1e-15)
    assert d.accepted.tolist() == [True, True, False, False]
    assert d.weights.tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("degrees", [0, 60, 90, 120, 180])
def test_a_distance_equal_to_tau_is_accepted_and_one_just_above_it_is_not(degrees: int) -> None:
    """The tie is 1e-12 wide, since rounding must not decide it."""
    rows, tau = at_angles(0, degrees), {0: 0.0, 60: 0.5, 90: 1.0, 120: 1.5, 180: 2.0}[degrees]
    assert decide(rows, tau).stepped
    assert degrees == 0 or not decide(rows, tau - 1e-9).stepped


def test_five_accepted_rows_have_halving_weights_16ths_to_a_half() -> None:
    assert decide(torch.ones(5, 3), 0.5, average="halving").weights.tolist() == [
        1 / 16,
        1 / 16,
        1 / 8,
        1 / 4,
        1 / 2,
    ]


def test_halving_passes_over_what_is_not_accepted() -> None:
    rows = matrix([[0.0], [1.0], [-1.0], [1.0], [math.nan], [1.0]])
    assert decide(rows, 0.5, average="halving").weights.tolist() == [0, 0.25, 0, 0.25, 0, 0.5]
    assert halving_weights(torch.tensor([False, False])).tolist() == [0, 0]


def test_halving_changes_later_decisions() -> None:
    """After 0, 0 and 80 degrees the mean points to about 23, halving to 40.

    110 is within 80 degrees of the second only.
    """
    rows, tau = at_angles(0, 0, 80, 110), 1 - math.cos(math.radians(80.1))
    assert decide(rows, tau, average="mean").accepted.tolist() == [True, True, True, False]
    assert decide(rows, tau, average="halving").accepted.tolist() == [True] * 4


def test_halving_from_the_best_start_weighs_in_the_order_of_the_visit() -> None:
    """Row 0 opposes. From row 1 the visit is 1, 2, 3, from row 3 around the ring 3, 1, 2.

    The lowest start is kept.
    """
    assert decide(
        matrix([[-1.0], [1.0], [1.0], [1.0]]), 0.5, start="best", average="halving"
    ).weights.tolist() == [0, 0.25, 0.25, 0.5]


def test_equal_counts_are_decided_by_the_highest_mean_cosine() -> None:
    """Two pairs: 10 degrees apart and 20 degrees apart, at right angles and more to each other."""
    rows = at_angles(0, 20, 180, 190)
    assert decide(rows, 0.5, start="best").accepted.tolist() == [False, False, True, True]
    assert decide(rows, 0.5, start="worst").accepted.tolist() == [True, True, False, False]
    assert decide(rows, 0.5, start="first").accepted.tolist() == [True, True, False, False]


def test_the_higher_mean_cosine_wins_by_however_little() -> None:
    rows = at_angles(0, 20.001, 180, 200)
    assert decide(rows, 0.5, start="best").accepted.tolist() == [False, False, True, True]
    assert decide(rows, 0.5, start="worst").accepted.tolist() == [True, True, False, False]


def test_best_escapes_a_bad_first_row_and_worst_seeks_the_fewest_that_step() -> None:
    rows = at_angles(180, 0, 5, 10, 185)
    assert decide(rows, 0.5, start="first").accepted.tolist() == [True, False, False, False, True]
    assert decide(rows, 0.5, start="best").accepted.tolist() == [False, True, True, True, False]
    assert decide(rows, 0.5, start="worst").accepted.tolist() == [True, False, False, False, True]
    assert decide(rows, 0.5, start="worst", min_accepted=3).accepted.tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_exact_ties_go_to_the_lowest_start() -> None:
    d = decide(torch.eye(4), 0.5, start="best", min_accepted=1)
    assert d.accepted.tolist() == [True, False, False, False]
    assert d.distances.tolist() == [0, 1, 1, 1]


def test_rows_that_cancelled_leave_a_sum_at_distance_1_from_everything() -> None:
    rows = matrix([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, 5.0]])
    d = decide(rows, 2.0)
    assert d.distances.tolist() == [0, 2, 1, 0]
    assert decide(rows[:3], 1.99).accepted.tolist() == [True, False, True]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_an_absent_row_is_passed_over_wherever_it_stands(start: str, bad: float) -> None:
    for i in range(3):
        rows = torch.ones(3, 2)
        rows[i] = bad
        d = decide(rows, 0.5, start=start)
        assert d.accepted.tolist() == [j != i for j in range(3)]
        assert d.weights.tolist() == [0.5 * (j != i) for j in range(3)]
        assert math.isnan(d.distances[i])
        assert not decide(rows, 0.5, start=start, min_accepted=3).stepped


@pytest.mark.parametrize("start", STARTS)
def test_nothing_present_is_a_skip_with_every_distance_nan(start: str) -> None:
    d = decide(torch.zeros(3, 2), 2.0, start=start, min_accepted=1)
    assert (d.stepped.item(), d.accepted.tolist(), d.weights.tolist()) == (
        False,
        [False] * 3,
        [0.0] * 3,
    )
    assert d.distances.isnan().all()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("average", AVERAGES)
def test_one_row_steps_whatever_min_accepted_says_unless_it_is_absent(
    start: str, average: str
) -> None:
    for least in (1, 2, 5):
        d = decide(torch.ones(1, 2), 0.0, start=start, average=average, min_accepted=least)
        assert (
            d.weights.tolist(),
            d.accepted.tolist(),
            d.stepped.item(),
            d.distances.tolist(),
        ) == ([1.0], [True], True, [0.0])
        assert not decide(
            torch.zeros(1, 2), 0.0, start=start, average=average, min_accepted=least
        ).stepped


@pytest.mark.parametrize("start", STARTS)
def test_min_accepted_is_reached_exactly(start: str) -> None:
    rows = matrix([[1.0], [1.0], [1.0], [-1.0]])
    assert decide(rows, 0.5, start=start, min_accepted=3).stepped
    assert not decide(rows, 0.5, start=start, min_accepted=4).stepped


def test_the_mean_pairwise_cosine_of_a_set_does_not_depend_on_who_asks() -> None:
    """The same accepted rows from two starts tie to the bit: rounding must not choose."""
    gram = gaf.gram(torch.randn(9, 30, dtype=torch.float64))
    accepted = torch.rand(64, 9) < 0.6
    twice = mean_pairwise_cosine(gram, torch.cat([accepted, accepted.flip(0)]))
    assert torch.equal(twice[:64], twice[64:].flip(0))
    unit = gram / gram.diagonal().sqrt() / gram.diagonal().sqrt()[:, None]
    for row, found in zip(accepted, twice, strict=False):
        pairs = [unit[i, j].item() for i, j in combinations(row.nonzero()[:, 0].tolist(), 2)]
        # float64 roundings
        assert found.item() == pytest.approx(math.fsum(pairs) / max(len(pairs), 1), abs=1e-14)


# --- averaging, random skips


@given(integer_rows())
def test_mean_weighs_every_row_1_over_k_and_lets_a_nan_through(rows: Tensor) -> None:
    k = len(rows)
    update, decision = gaf.aggregate(rows, gaf.Mean())
    assert decision.weights.tolist() == [1 / k] * k
    assert decision.accepted.all()
    assert decision.stepped
    assert torch.equal(update.isfinite(), rows.isfinite().all(0))


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_means_distances_are_those_of_tau_2_when_the_first_row_is_absent(bad: float) -> None:
    gram = gaf.gram(matrix([[bad, bad], [1.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(
        gaf.Mean()(gram).distances, gaf.GAF(2.0)(gram).distances, rtol=0, atol=0, equal_nan=True
    )


@given(integer_rows())
def test_means_distances_are_those_of_tau_2(rows: Tensor) -> None:
    assume(rows[0].isfinite().all() and rows[0].norm() > 0)  # the case above
    gram = gaf.gram(rows)
    torch.testing.assert_close(
        gaf.Mean()(gram).distances, gaf.GAF(2.0)(gram).distances, rtol=0, atol=0, equal_nan=True
    )


def draws(policy: gaf.RandomSkip, steps: int) -> list[bool]:
    gram = torch.eye(2, dtype=torch.float64)
    return [policy(gram).stepped.item() for _ in range(steps)]


def test_random_skip_averages_as_mean_or_does_nothing() -> None:
    policy, gram = gaf.RandomSkip(0.5), gaf.gram(torch.randn(3, 5))
    seen = [policy(gram) for _ in range(30)]
    assert {d.stepped.item() for d in seen} == {True, False}
    for d in seen:
        assert d.weights.tolist() == [1 / 3 if d.stepped else 0.0] * 3
        assert d.accepted.tolist() == [d.stepped.item()] * 3
        assert torch.equal(d.distances, gaf.Mean()(gram).distances)


@pytest.mark.usefixtures("unchecked")
def test_random_skip_steps_with_its_probability() -> None:
    steps = 1000
    for p in (0.1, 0.5, 0.9):
        # four sigmas
        assert sum(draws(gaf.RandomSkip(p), steps)) / steps == pytest.approx(
            p, abs=4 * math.sqrt(p * (1 - p) / steps)
        )
    assert sum(draws(gaf.RandomSkip(0.0), 200)) == 0
    assert sum(draws(gaf.RandomSkip(1.0), 200)) == 200


def test_random_skip_is_a_function_of_seed_and_step_number() -> None:
    want = draws(gaf.RandomSkip(0.5, seed=3), 100)
    torch.manual_seed(99)
    assert draws(gaf.RandomSkip(0.5, seed=3), 100) == want
    assert draws(gaf.RandomSkip(0.5, seed=4), 100) != want


def test_random_skip_resumes_where_its_state_was_taken() -> None:
    policy = gaf.RandomSkip(0.5, seed=3)
    draws(policy, 41)
    state = policy.state_dict()
    want = draws(policy, 60)
    resumed = gaf.RandomSkip(0.5, seed=3)
    resumed.load_state_dict(state)
    assert draws(resumed, 60) == want
    assert resumed.state_dict() == policy.state_dict()


# --- fields, devices, arguments

POLICIES = [
    *(gaf.GAF(0.7, start=s, average=a) for s in STARTS for a in AVERAGES),
    gaf.Mean(),
    gaf.RandomSkip(0.5),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_fields_of_a_decision_have_their_dtypes_and_shapes(policy: Any, k: int) -> None:
    for d in (policy(gaf.gram(torch.randn(k, 3))), as_skip(policy(gaf.gram(torch.randn(k, 3))))):
        assert (d.weights.dtype, d.accepted.dtype, d.stepped.dtype, d.distances.dtype) == (
            torch.float64,
            torch.bool,
            torch.bool,
            torch.float64,
        )
        assert (d.weights.shape, d.accepted.shape, d.stepped.shape, d.distances.shape) == (
            (k,),
            (k,),
            (),
            (k,),
        )


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_needs_no_value_from_the_device_and_answers_there(policy: Any) -> None:
    """The meta device has no values to look at: asking for one raises."""
    d = policy(torch.empty(5, 5, dtype=torch.float64, device="meta"))
    assert {f.device.type for f in (d.weights, d.accepted, d.stepped, d.distances)} == {"meta"}


class NoLookAtValues(TorchDispatchMode):
    """Raises where a value is fetched to the host, or a shape depends on one."""

    ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.ASKS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_never_fetches_a_value(policy: Any) -> None:
    gram = gaf.gram(torch.randn(5, 7))
    with NoLookAtValues():
        policy(gram)


def test_a_fetched_value_is_noticed() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoLookAtValues():
        bool(torch.eye(2)[0, 0] > 0)


@pytest.mark.parametrize("tau", [math.nan, -0.1, 2.1, math.inf, -math.inf])
def test_a_tau_that_is_no_cosine_distance_is_refused_with_the_value(tau: float) -> None:
    with pytest.raises(
        ValueError, match=r"GAF: tau is a cosine distance and must lie in \[0, 2\]"
    ) as caught:
        gaf.GAF(tau)
    assert f"got {tau}" in str(caught.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value"),
    [("start", "random"), ("start", ""), ("average", "median"), ("average", "Mean")],
)
def test_an_unknown_start_or_average_is_refused_with_the_choices(name: str, value: str) -> None:
    choices = {"start": "'first', 'best', 'worst'", "average": "'mean', 'halving'"}[name]
    with pytest.raises(ValueError, match=f"GAF: {name} must be one of {choices}; got {value!r}"):
        gaf.GAF(0.5, **{name: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "2", None])
def test_min_accepted_must_be_a_whole_number_of_at_least_1(value: Any) -> None:
    with pytest.raises(
        ValueError, match="GAF: min_accepted must be a whole number of at least 1; got"
    ):
        gaf.GAF(0.5, min_accepted=value)


@pytest.mark.parametrize("p", [math.nan, -0.1, 1.1])
def test_a_step_probability_outside_0_to_1_is_refused(p: float) -> None:
    with pytest.raises(
        ValueError, match=rf"RandomSkip: step_probability must lie in \[0, 1\]; got {p}"
    ):
        gaf.RandomSkip(p)


def test_the_ends_of_every_range_are_allowed() -> None:
    assert [gaf.GAF(tau).tau for tau in (0.0, 2.0)] == [0, 2]
    assert [gaf.RandomSkip(p).step_probability for p in (0.0, 1.0)] == [0, 1]


def test_a_gaf_policy_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        gaf.GAF(0.5).tau = 0.7  # type: ignore[misc]


def test_a_decision_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        decide(torch.ones(2, 2), 0.5).weights = torch.zeros(2)  # type: ignore[misc]
