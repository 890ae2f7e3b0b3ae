"""Thresholds that adapt: what they compute, against closed forms and simulations.

And that they learn the same from rows that stream, from stacked rows and over ranks.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gaf
from gaf.rules.agreement import noise_squared
from gaf.rules.sequential import Seen
from gaf.rules.thresholds import Threshold

KINDS: list[Callable[[], Threshold]] = [
    lambda: gaf.SignalTau(0.7),
    lambda: gaf.NoiseFloorTau(1.0),
    lambda: gaf.QuantileTau(0.4, half_life=20),
    lambda: gaf.MovingAverageTau(0.02),
    lambda: gaf.ScheduleTau([(0, 1.2), (4, 0.7), (9, 0.9)]),
]


def rows(k: int, n: int, signal: float, seed: int) -> Tensor:
    """k micro-gradients of n coordinates: a common first coordinate, and unit noise in all."""
    noise = torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise[:, 0] += signal
    return noise


def seen(gram: Tensor, tau: float = 2.0) -> Seen:
    """What a policy of that tau learns from this Gram matrix."""
    told: list[Seen] = []
    policy = gaf.GAF(tau)
    object.__setattr__(policy, "learn", told.append)
    policy(gram)
    return told[0]


def now(threshold: Threshold) -> float:
    return float(threshold.tau_on(torch.device("cpu")))


@pytest.mark.usefixtures("unchecked")
def test_the_signals_tau_is_one_minus_kappa_times_the_expected_cosine():
    """All rows are accepted, so no selection biases <s, g> / c: |g|^2 / E|g_i|^2 is known."""
    thresholds = [gaf.SignalTau(kappa, window=1e9) for kappa in (0.0, 0.5, 1.0, 2.0)]
    for step in range(200):
        one = seen(gaf.gram(rows(8, 100, 3.0, step)))
        for threshold in thresholds:
            threshold.learn(one)
    assert [now(threshold) for threshold in thresholds] == pytest.approx(
        [1 - kappa * 9 / 109 for kappa in (0.0, 0.5, 1.0, 2.0)], abs=0.01
    )
    unbiased = 1 - now(thresholds[2])
    assert [1 - now(threshold) for threshold in thresholds] == pytest.approx(
        [0, unbiased / 2, unbiased, 2 * unbiased]
    )


@pytest.mark.parametrize("k", [4, 8, 10])
@pytest.mark.usefixtures("unchecked")
def test_quadruples_of_rows_give_the_trace_of_the_squared_covariance_whatever_the_gradient(k: int):
    scales = torch.linspace(0.2, 2.0, 30, dtype=torch.float64)
    g = torch.full((30,), 5.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = [
        float(
            noise_squared(
                gaf.gram(g + scales * torch.randn(k, 30, generator=generator, dtype=torch.float64))
            )
        )
        for _ in range(4000)
    ]
    mean = sum(found) / len(found)
    spread = (sum((f - mean) ** 2 for f in found) / len(found)) ** 0.5
    assert abs(mean - float((scales**4).sum())) < 4 * spread / len(found) ** 0.5


def bare(gram: Tensor) -> Seen:
    """Rows of which only the Gram matrix is looked at."""
    unknown = torch.full_like(gram[0], math.nan)
    return Seen(unknown > 0, unknown, gram.diagonal(), unknown, gram)


@pytest.mark.parametrize(
    ("k", "z", "steps"), [(8, 1.0, 500), (4, 2.0, 1500), (2, 2.0, 3000), (3, 0.5, 3000)]
)
@pytest.mark.usefixtures("unchecked")
def test_the_noise_floor_is_that_of_the_effective_dimension(k: int, z: float, steps: int):
    """Pure noise of unit covariance in n coordinates: d_eff = n.

    With less than four rows from the variance of K_12 over steps.
    """
    threshold, generator = gaf.NoiseFloorTau(z, window=1e9), torch.Generator().manual_seed(0)
    for g in torch.randn(steps, k, 64, generator=generator, dtype=torch.float64):
        threshold.learn(bare(g @ g.T))
    assert now(threshold) == pytest.approx(1 - z / 8, abs=0.007 * max(z, 1))


@pytest.mark.usefixtures("unchecked")
def test_at_two_standard_deviations_a_fortieth_of_pure_noise_passes():
    """The share of a normal distribution above 2, with the threshold learned from the noise."""
    threshold, generator = gaf.NoiseFloorTau(2.0), torch.Generator().manual_seed(0)
    taus, distances = [], []
    for g in torch.randn(3000, 4, 400, generator=generator, dtype=torch.float64):
        gram = g @ g.T
        taus.append(now(threshold))
        distances.append(float(1 - gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()))
        threshold.learn(bare(gram))
    passed = sum(d <= tau for d, tau in zip(distances[100:], taus[100:], strict=True)) / 2900
    assert abs(passed - 0.0228) < 4 * (0.0228 / 2900) ** 0.5


@pytest.mark.usefixtures("unchecked")
def test_the_quantiles_tau_comes_to_accept_the_share_that_was_asked_for():
    for p in (0.1, 0.7):
        threshold, shares = gaf.QuantileTau(p, cap=2.0, rate=0.02), []
        for step in range(500):
            one = seen(gaf.gram(rows(8, 100, 3.0, step)), now(threshold))
            threshold.learn(one)
            shares.append(int(one.accepted[1:].sum()) / 7)
        assert sum(shares[200:]) / 300 == pytest.approx(p, abs=0.02)


def test_the_quantiles_share_halves_and_tau_stays_below_its_cap():
    threshold = gaf.QuantileTau(0.8, half_life=10, cap=0.9, rate=0.5)
    policy, highest = gaf.GAF(threshold), 0.0
    for step in range(20):
        policy(gaf.gram(rows(4, 50, 0.0, step)))
        highest = max(highest, float(threshold.tau_on(torch.device("cpu"))))
    assert threshold.state_dict()["state"][1] == pytest.approx(0.2)
    assert highest == 0.9


def test_the_moving_average_is_that_of_the_distances_that_were_compared():
    threshold = gaf.MovingAverageTau(0.1, window=4, cap=2.0)
    policy, total, weight = gaf.GAF(threshold), 0.0, 0.0
    for step in range(6):
        distances = policy(gaf.gram(rows(5, 40, 2.0, step))).distances[1:]
        total, weight = total * 0.75 + float(distances.mean()), weight * 0.75 + 1
        assert float(policy.tau_on(torch.device("cpu"))) == pytest.approx(total / weight - 0.1)


def test_a_schedule_goes_in_straight_lines_between_its_points():
    threshold = gaf.ScheduleTau([(2, 1.0), (6, 0.6), (8, 1.4)])
    policy, taus = gaf.GAF(threshold), []
    for step in range(11):
        taus.append(float(policy.tau_on(torch.device("cpu"))))
        policy(gaf.gram(rows(3, 10, 1.0, step)))
    assert taus == pytest.approx([1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 1.0, 1.4, 1.4, 1.4])


# One rule, whichever way the rows come


class Stacks:
    """The same policy as a plain callable, which keeps the rows and judges their Gram matrix."""

    def __init__(self, policy: gaf.GAF) -> None:
        self.policy = policy

    def __call__(self, gram: Tensor) -> gaf.Decision:
        return self.policy(gram)


def train(
    policy: gaf.GAF,
    steps: int,
    k: int,
    stack: bool = False,
    anew: Callable[[], gaf.GAF] | None = None,
) -> tuple[list[float], Tensor]:
    """tau of each step, and the weights at the end.

    anew: makes a policy that takes over with the other's state after every step.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    acc = gaf.Accumulator(
        torch.optim.SGD(model.parameters(), lr=0.3), Stacks(policy) if stack else policy
    )
    x, y = torch.randn(400, 12, dtype=torch.float64), torch.randint(0, 3, (400,))
    taus = []
    for step in range(steps):
        for i in range(k):
            index = torch.arange(8) + 8 * ((step * k + i) % 50)
            acc.backward(nn.functional.cross_entropy(model(x[index]), y[index]))
        taus.append(float((policy if stack else acc.policy).tau_on(torch.device("cpu"))))
        acc.step()
        if anew is not None:
            state = acc.state_dict()
            acc.policy = anew()
            acc.load_state_dict(state)
    return taus, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("k", [2, 5])
def test_rows_that_stream_teach_what_their_gram_matrix_does(make: Callable[[], Threshold], k: int):
    streamed, weights = train(gaf.GAF(make()), 12, k)
    stacked, others = train(gaf.GAF(make()), 12, k, stack=True)
    assert len(set(streamed)) > 1
    assert streamed == pytest.approx(stacked, abs=1e-9)
    torch.testing.assert_close(weights, others, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("start", ["first", "best", "worst"])
@pytest.mark.usefixtures("unchecked")
def test_a_restored_run_goes_on_bit_for_bit(make: Callable[[], Threshold], start: Any):
    whole, weights = train(gaf.GAF(make(), start=start), 10, 4)
    taus, others = train(
        gaf.GAF(make(), start=start), 10, 4, anew=lambda: gaf.GAF(make(), start=start)
    )
    assert len(set(whole)) > 1
    assert taus == whole
    assert torch.equal(weights, others)


@pytest.mark.parametrize("make", KINDS)
def test_nothing_is_asked_of_the_host_and_the_state_stays_in_its_place(
    make: Callable[[], Threshold],
):
    """On the meta device any look at a value raises."""
    policy = gaf.GAF(make())
    gram = torch.empty(5, 5, dtype=torch.float64, device="meta")
    policy(gram)
    place = policy.tau._state  # type: ignore[union-attr]
    policy(gram)
    assert policy.tau._state is place  # type: ignore[union-attr]
    assert policy.tau_on(torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("make", KINDS[:4])
@pytest.mark.parametrize(
    "bad", [[0.0, 0.0, 0.0], [math.nan, 1.0, 1.0], [math.inf, 1.0, math.nan], [1.0, 0.0, 0.0]]
)
def test_what_cannot_be_measured_leaves_no_mark(make: Callable[[], Threshold], bad: list[float]):
    """Absent rows, or one present row alone: no NaN in the state, and tau stays in [0, 2]."""
    policy = gaf.GAF(make())
    for step in range(3):
        policy(gaf.gram(rows(3, 20, 1.0, step)))
    before = float(policy.tau_on(torch.device("cpu")))
    policy(torch.diag(torch.tensor(bad, dtype=torch.float64)))
    after = float(policy.tau_on(torch.device("cpu")))
    assert 0 <= after <= 2
    if sum(b > 0 and math.isfinite(b) for b in bad) < 2:
        assert after == before
    assert all(map(math.isfinite, policy.state_dict()["tau"]["state"]))


def test_the_scale_of_the_rows_makes_no_difference():
    """tau is of angles: rows twice as long teach the same."""
    for make in KINDS:
        one, two = gaf.GAF(make()), gaf.GAF(make())
        for step in range(5):
            gram = gaf.gram(rows(6, 30, 2.0, step))
            one(gram)
            two(4 * gram)
        assert float(one.tau_on(gram.device)) == pytest.approx(
            float(two.tau_on(gram.device)), rel=1e-12
        )


# Free of the rows' scale, and of those that are absent


ALL: list[Callable[[], Any]] = [*KINDS, lambda: gaf.SignalTau(), lambda: "auto"]


def taus_and_scales(
    make: Callable[[], Any], scaler: torch.amp.GradScaler | None, stack: bool
) -> tuple[list[float], list[float]]:
    """tau of each step, and the scale that it had.

    In each step one row is zero, and in some another one overflows.
    """
    p = nn.Parameter(torch.zeros(50))
    policy: Any = gaf.GAF(make(), min_accepted=1)
    watched = policy if stack else None
    acc = gaf.Accumulator(
        torch.optim.SGD([p], 0.0), Stacks(policy) if stack else policy, scaler=scaler
    )
    taus, scales = [], []
    for step in range(24):
        taus.append(float((watched or acc.policy).tau_on(torch.device("cpu"))))
        scales.append(1.0 if scaler is None else scaler.get_scale())
        noise = rows(6, 50, 3.0 if step < 12 else 1.0, step).float() * (1 + step % 3)
        noise[step % 6] = math.inf if step in (4, 13, 14, 15) else 0.0
        for row in noise:
            acc.backward((p * row).sum())
        acc.step()
    return taus, scales


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("stack", [False, True], ids=["streamed", "stacked"])
@pytest.mark.usefixtures("unchecked")
def test_a_gradscaler_whose_scale_grows_and_falls_changes_no_tau(
    make: Callable[[], Any], stack: bool
):
    """Scales are powers of two, so that scaled rows hold the same digits: bit for bit."""
    plain, _ = taus_and_scales(make, None, stack)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scaled, scales = taus_and_scales(make, scaler, stack)
    moves = [b / a for a, b in pairwise(scales)]
    assert {0.5, 1.0, 2.0} == set(moves)
    assert len(set(plain)) > 4
    assert scaled == plain


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("start", ["first", "best"])
def test_each_steps_own_scale_makes_no_difference(make: Callable[[], Any], start: Any):
    """The loss is divided by another number in each step, no power of two: up to rounding."""
    one, two = gaf.GAF(make(), start=start), gaf.GAF(make(), start=start)
    for step in range(12):
        gram = gaf.gram(rows(6, 30, 2.0, step))
        gram[step % 6] = gram[:, step % 6] = 0.0
        one(gram)
        two(gram * 10.0 ** (2 * (step % 5) - 4))
        now = float(one.tau_on(gram.device))
        assert float(two.tau_on(gram.device)) == pytest.approx(now, rel=1e-9)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_absent_rows_teach_nothing_and_hinder_nothing(make: Callable[[], Any], bad: float, k: int):
    """k present rows among absent ones, in every step: the same tau as from the k alone."""
    alone, among = gaf.GAF(make()), gaf.GAF(make())
    for step in range(8):
        present = rows(k, 30, 2.0, step)
        absent = torch.full((1, 30), bad, dtype=torch.float64)
        place = step % (k + 1)
        alone(gaf.gram(present))
        among(gaf.gram(torch.cat([absent, present[:place], absent, present[place:]])))
        tau = float(alone.tau_on(torch.device("cpu")))
        assert float(among.tau_on(torch.device("cpu"))) == pytest.approx(tau, abs=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_steps_with_few_rows_do_not_thin_out_what_quadruples_have_shown():
    """Pure noise of 64 coordinates, d_eff = 64; five and three rows in turn are present."""
    threshold, generator = gaf.NoiseFloorTau(2.0, window=1e9), torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 5, 64, generator=generator, dtype=torch.float64)
    noise[::2, 3:] = 0.0
    for g in noise:
        threshold.learn(bare(g @ g.T))
    assert now(threshold) == pytest.approx(1 - 2 / 8, abs=0.014)


# what the first version saved: sums in the units of the rows, here those of a loss scale of 1024
OLDER = {
    "SignalTau": ([40.0 * 2**20, 100.0 * 2**20], 1 - 0.7 * 0.4),
    "NoiseFloorTau": ([50.0, 5000.0, 50 * 100.0**2 / 400, 3.0, 7.0], 1 - 1.0 / 20),
    "QuantileTau": ([0.83, 0.2], 0.83),
    "MovingAverageTau": ([50.0, 41.0], 0.82 - 0.02),
    "ScheduleTau": ([4.0], 0.7),
}


@pytest.mark.parametrize("make", KINDS)
def test_the_state_of_an_older_run_goes_on_at_its_tau(make: Callable[[], Threshold]):
    policy = gaf.GAF(make())
    kind = type(policy.tau).__name__
    state, tau = OLDER[kind]
    policy.load_state_dict({"tau": {"kind": kind, "state": state}})
    assert float(policy.tau_on(torch.device("cpu"))) == pytest.approx(tau)
    for step in range(30):  # and it learns on: what it held does not outweigh all that follows
        policy(gaf.gram(rows(6, 30, 5.0, step)))
    assert float(policy.tau_on(torch.device("cpu"))) != pytest.approx(tau, abs=1e-3)


def test_an_older_state_with_the_variance_of_pairs_and_one_of_nothing_go_on_too():
    threshold = gaf.NoiseFloorTau(1.0)
    threshold.load_state_dict(
        {"kind": "NoiseFloorTau", "state": [10.0, 1000.0, 0.0, 0.0, 10 * 100.0**2 / 25]}
    )
    assert now(threshold) == pytest.approx(1 - 1 / 5)
    with pytest.raises(ValueError, match="NoiseFloorTau: the state must hold 5 numbers; it holds"):
        threshold.load_state_dict({"kind": "NoiseFloorTau", "state": [0.0] * 6})
    fresh = gaf.NoiseFloorTau(initial=0.9)
    fresh.load_state_dict({"kind": "NoiseFloorTau", "state": None})
    assert now(fresh) == pytest.approx(0.9)
    for kind, size in ((gaf.NoiseFloorTau, 5), (gaf.SignalTau, 2)):
        fresh = kind(initial=0.9)
        fresh.load_state_dict({"kind": kind.__name__, "state": [0.0] * size})
        assert now(fresh) == pytest.approx(0.9)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"kind": "SignalTau", "state": [1.0], "version": 2},
            "SignalTau: the state must hold 2 numbers; it holds .1.0.",
        ),
        (
            {"kind": "SignalTau", "state": [1.0, 2.0, 3.0]},
            "SignalTau: the state must hold 2 numbers; it holds .1.0, 2.0, 3.0.",
        ),
        (
            {"kind": "SignalTau", "state": 3.0},
            "SignalTau: the state must hold 2 numbers; it holds 3.0. Load what",
        ),
        (
            {"state": [1.0, 2.0]},
            "SignalTau: the state must be of the same kind of threshold; it is of {'state'",
        ),
        (None, "SignalTau: the state must be of the same kind of threshold; it is of None"),
    ],
)
def test_a_state_of_another_form_is_refused(state: Any, message: str):
    with pytest.raises(ValueError, match=message):
        gaf.GAF(gaf.SignalTau()).load_state_dict({"tau": state})


# In GAF


def test_auto_is_a_threshold_of_its_own_for_each_policy():
    one, other = gaf.GAF("auto"), gaf.GAF(tau="auto")
    assert isinstance(one.tau, Threshold)
    assert one.tau is not other.tau
    assert repr(one) == repr(other)
    one(gaf.gram(rows(4, 20, 1.0, 0)))
    # what it has learned is no part of what all ranks must have alike when they attach
    assert repr(one) == repr(other)


def test_stats_tell_the_tau_of_the_last_step():
    policy = gaf.GAF(gaf.ScheduleTau([(0, 1.5), (10, 0.5)]))
    model = nn.Linear(3, 1)
    acc = gaf.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), policy)
    for step in range(4):
        for _ in range(2):
            acc.backward(model(torch.randn(4, 3)).square().mean())
        acc.step()
        assert acc.stats()["tau"] == pytest.approx(1.5 - 0.1 * step)
    assert acc.outcome is not None
    assert acc.stats()["acceptance"] == 1.0


def test_an_adaptive_tau_that_accepts_nothing_is_told_of():
    model = nn.Linear(3, 1)
    acc = gaf.Accumulator(
        torch.optim.SGD(model.parameters(), lr=0.0), gaf.GAF(gaf.ScheduleTau([(0, 0.0)]))
    )
    for step in range(100):
        for _ in range(2):
            acc.backward(model(torch.randn(4, 3)).mean())
        if step < 99:
            acc.step()
    with pytest.warns(
        UserWarning,
        match=(
            r"ScheduleTau\(.*\) came to 0.000 and does not fit this task"
            r".*choose one that accepts more"
        ),
    ):
        acc.step()


def test_what_a_policy_learns_under_one_run_does_not_go_into_the_next():
    policy = gaf.GAF("auto")
    first, second = train(policy, 10, 4), train(policy, 10, 4)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert policy.tau._state is None  # type: ignore[union-attr]


def test_the_state_of_another_policy_is_refused():
    with pytest.raises(
        ValueError,
        match=r"GAF: the state must be of a policy of the same kind; it holds \['step'\]",
    ):
        gaf.GAF("auto").load_state_dict(gaf.RandomSkip(0.5).state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaf.SignalTau(-1), r"SignalTau: kappa must be a number of at least 0; got -1"),
        (
            lambda: gaf.SignalTau(window=0.5),
            r"SignalTau: window must be a number of at least 1; got 0.5",
        ),
        (
            lambda: gaf.NoiseFloorTau(math.nan),
            r"NoiseFloorTau: z must be a number of at least 0; got nan",
        ),
        (
            lambda: gaf.QuantileTau(1.5),
            r"QuantileTau: p must be a number of at least 0 and at most 1; got 1.5",
        ),
        (
            lambda: gaf.QuantileTau(half_life=0),
            r"QuantileTau: half_life must be a number above 0; got 0",
        ),
        (
            lambda: gaf.QuantileTau(initial=3.0),
            r"QuantileTau: initial must be a number of at least 0 and at most 2; got 3.0",
        ),
        (
            lambda: gaf.MovingAverageTau(cap=-1),
            r"MovingAverageTau: cap must be a number of at least 0 and at most 2; got -1",
        ),
        (
            lambda: gaf.ScheduleTau([]),
            r"ScheduleTau: points must be \(step, tau\) pairs .* from 0 or more; got \[\]",
        ),
        (lambda: gaf.ScheduleTau([(5, 1.0), (5, 0.5)]), r"ScheduleTau: points must be .* rise"),
        (
            lambda: gaf.ScheduleTau([(0, 2.5)]),
            r"ScheduleTau: tau must be a number of at least 0 and at most 2; got 2.5",
        ),
        (
            lambda: gaf.GAF(3.0),
            r"GAF: tau is a cosine distance and must lie in \[0, 2\], or be .* 'auto'; got 3.0",
        ),
        (lambda: gaf.GAF("auto", scope="group"), r"GAF: with scope 'group' tau must be a number"),
        (
            lambda: gaf.GAF(gaf.SignalTau(), scope="layer"),
            r"GAF: with scope 'layer' tau must be a number",
        ),
    ],
)
def test_what_is_refused_names_the_requirement_and_the_value(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_state_of_another_kind_is_refused_and_that_of_a_number_starts_anew():
    state = gaf.GAF(gaf.SignalTau()).state_dict()
    with pytest.raises(
        ValueError,
        match=r"QuantileTau: the state must be of the same kind of threshold; it is of SignalTau",
    ):
        gaf.GAF(gaf.QuantileTau()).load_state_dict(state)
    gaf.GAF(gaf.QuantileTau()).load_state_dict(gaf.GAF(0.9).state_dict())
    gaf.GAF(0.9).load_state_dict(state)
