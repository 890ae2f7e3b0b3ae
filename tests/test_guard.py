"""gaf.Guard: the average, unless something is broken; and the name of what is."""

import io
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

import gaf
from gaf.rules.contract import private_copy
from gaf.rules.drift import Drift
from gaf.rules.finding import Finding
from gaf.rules.judging import has_overflow
from gaf.rules.row_sums import RowSums
from gaf.rules.watch import FADE, NormWatch, StepWatch, medians_of_others
from helpers.comparing import same

K = pytest.mark.parametrize("k", [2, 3, 4, 5, 8])
K_FROM_3 = pytest.mark.parametrize("k", [3, 4, 5, 8])


def rows(k: int, n: int = 200) -> Tensor:
    """Gaussian rows around a common direction: cosines of about 0.3 to the others."""
    return torch.randn(k, n, dtype=torch.float64) + 0.3


def used(policy: gaf.Guard, k: int, steps: int = 50, n: int = 200) -> gaf.Guard:
    """The policy after ordinary steps."""
    for _ in range(steps):
        assert gaf.aggregate(rows(k, n), policy)[1].accepted.all()
        assert policy.findings == []
    return policy


def others(g: Tensor, row: int) -> Tensor:
    return torch.cat([g[:row], g[row + 1 :]])


def named(policy: gaf.Guard) -> list[tuple[int | None, str]]:
    return [(finding.row, finding.kind) for finding in policy.findings]


# --- nothing is broken -------------------------------------------------------------------------


@K
def test_nothing_broken_is_the_average_with_exact_weights(k: int) -> None:
    g = rows(k)
    update, decision = gaf.aggregate(g, gaf.Guard())
    assert decision.weights.tolist() == [1 / k] * k
    assert torch.equal(update, gaf.aggregate(g, gaf.Mean())[0])
    for i in range(k):
        rest = others(g, i).sum(0)
        want = 1 - g[i] @ rest / g[i].norm() / rest.norm()
        assert decision.distances[i].item() == pytest.approx(want.item(), rel=1e-12)


def test_a_row_of_zeros_counts() -> None:
    g = rows(4)
    g[2] = 0
    update, decision = gaf.aggregate(g, used(gaf.Guard(), 4))
    assert decision.weights.tolist() == [0.25] * 4
    assert decision.distances.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(update, g.mean(0))


@pytest.mark.parametrize("g", [torch.zeros(4, 3), torch.ones(4, 3), torch.eye(4)])
def test_rows_without_scatter_are_averaged_for_ever(g: Tensor) -> None:
    policy = gaf.Guard(cosine_z=6, spike="clip")
    for _ in range(200):
        assert torch.equal(gaf.aggregate(g, policy)[0], g.mean(0))
        assert policy.findings == []


def test_one_row_steps_unless_it_is_not_finite() -> None:
    policy = used(gaf.Guard(), 1, 30)
    assert gaf.aggregate(1e6 * rows(1), policy)[1].stepped
    assert not gaf.aggregate(math.nan * rows(1), policy)[1].stepped


def test_norms_that_fall_together_by_orders_of_magnitude_are_usual() -> None:
    policy = gaf.Guard(spike="skip")
    for step in range(400):
        assert gaf.aggregate(10 ** (-step / 50) * rows(4), policy)[1].stepped
        assert policy.findings == []


# --- what is broken is left out ----------------------------------------------------------------


@K_FROM_3
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_left_out(k: int, bad: float) -> None:
    g, policy = rows(k), gaf.Guard()
    g[1, 7] = bad
    update, decision = gaf.aggregate(g, policy)
    assert decision.accepted.tolist() == [i != 1 for i in range(k)]
    assert named(policy) == [(1, "not finite")]
    torch.testing.assert_close(update, others(g, 1).mean(0))


@K_FROM_3
@pytest.mark.parametrize("steps", [0, 50])
def test_a_row_that_is_far_too_long_is_left_out(k: int, steps: int) -> None:
    g, policy = rows(k), used(gaf.Guard(), k, steps)
    g[1] *= 1000
    update, _ = gaf.aggregate(g, policy)
    torch.testing.assert_close(update, others(g, 1).mean(0))
    (finding,) = policy.findings
    assert (finding.row, finding.kind) == (1, "norm")
    assert finding.value == pytest.approx(g[1].norm().item())
    usual = statistics.median_low(others(g, 1).norm(dim=1).tolist())
    assert finding.expected == pytest.approx(usual)


@pytest.mark.parametrize(("ratio", "left_out"), [(9.0, False), (11.0, True)])
def test_the_ratio_is_a_limit(ratio: float, left_out: bool) -> None:
    """Both to the others and to the largest norm of late."""
    g = torch.eye(4)
    policy = gaf.Guard()
    for _ in range(30):
        gaf.aggregate(g, policy)
    g[3] *= ratio
    assert gaf.aggregate(g, policy)[1].accepted[3] == (not left_out)


def test_norms_that_scatter_by_a_factor_of_ten_are_usual() -> None:
    policy = gaf.Guard(drift=None)
    for _ in range(200):
        g = rows(4) * 10 ** torch.randn(4, 1).clamp(-2, 2).double()
        gaf.aggregate(g, policy)
        if policy._past.norms.seen > 40:
            assert policy.findings == []


def test_of_two_rows_the_past_shows_which_one_has_changed() -> None:
    short, long = rows(2), rows(2)
    short[0] *= 1e-3
    policy = used(gaf.Guard(), 2)
    assert gaf.aggregate(short, policy)[1].stepped
    assert policy.findings == []
    long[1] *= 1e3
    assert not gaf.aggregate(long, policy)[1].stepped
    assert named(policy) == [(1, "norm")]


def test_a_row_that_is_broken_for_ever_stays_out() -> None:
    policy = used(gaf.Guard(), 4)
    for _ in range(200):
        g = rows(4, 50)
        g[3] *= 300
        assert gaf.aggregate(g, policy)[1].accepted.tolist() == [True, True, True, False]


@pytest.mark.parametrize(("k", "bad"), [(1, 1), (2, 1), (3, 2), (4, 2), (8, 4)])
def test_half_of_the_rows_or_more_broken_is_a_skip(k: int, bad: int) -> None:
    g, policy = rows(k), gaf.Guard()
    g[:bad, 0] = math.nan
    update, decision = gaf.aggregate(g, policy)
    assert not decision.stepped
    assert not decision.accepted.any()
    assert not update.any()
    assert [f.row for f in policy.findings] == list(range(bad))


def test_nothing_is_learned_from_what_is_broken() -> None:
    policy = used(gaf.Guard(spike="skip"), 4)
    before = policy.state_dict()
    g = rows(4)
    g[0] *= 1e4
    gaf.aggregate(g, policy)
    after = policy.state_dict()
    assert after["norms"]["largest"] <= before["norms"]["largest"]
    assert after["step"] == before["step"]
    assert after["cosine_drift"] == before["cosine_drift"]
    assert after["norm_drift"]["baselines"][0] == before["norm_drift"]["baselines"][0]


@K_FROM_3
def test_a_row_that_points_away_is_left_out_if_asked_for(k: int) -> None:
    for limit, expected in ((None, []), (6.0, [(2, "cosine")])):
        policy = used(gaf.Guard(cosine_z=limit), k, n=8000)
        g = rows(k, 8000)
        g[2] *= -1
        gaf.aggregate(g, policy)
        assert named(policy) == expected


# --- a step that is too long -------------------------------------------------------------------


def test_a_spike_is_clipped_to_the_limit_or_skipped() -> None:
    torch.manual_seed(1)
    clip = used(gaf.Guard(spike="clip"), 4)
    watch = StepWatch(6)
    watch.load_state_dict(clip.state_dict()["step"])
    skip = private_copy(clip)
    skip.spike = "skip"
    g = 100 * rows(4)
    update, decision = gaf.aggregate(g, clip)
    # the least deviation, 0.1, is more than such rows have
    assert update.norm().log().item() == pytest.approx(watch.usual + 6 * 0.1, rel=1e-12)
    assert decision.accepted.all()
    torch.testing.assert_close(update / update.norm(), g.mean(0) / g.mean(0).norm())
    (finding,) = clip.findings
    assert (finding.row, finding.kind) == (None, "step norm")
    assert finding.value == pytest.approx(g.mean(0).norm().item())
    assert finding.expected == pytest.approx(math.exp(watch.usual))
    assert not gaf.aggregate(g, skip)[1].stepped
    assert named(skip) == [(None, "step norm")]


def test_norms_that_rose_for_good_become_usual() -> None:
    policy = used(gaf.Guard(spike="skip"), 4)
    stepped = [bool(gaf.aggregate(10 * rows(4), policy)[1].stepped) for _ in range(300)]
    assert not stepped[0]
    assert all(stepped[-100:])


def test_the_usual_norm_is_the_mean_and_its_scatter_that_of_the_distances() -> None:
    watch, norms = StepWatch(6), torch.randn(50).double().tolist()
    distances = []
    for t, norm in enumerate(norms):
        if t:
            distances.append((norm - watch.usual) ** 2)
        watch.learn(norm)
    assert watch.usual == pytest.approx(statistics.mean(norms))
    assert watch.variance == pytest.approx(statistics.mean(distances))


# --- drifts ------------------------------------------------------------------------------------


def alike(k: int, steps: int) -> Iterator[list[float]]:
    for _ in range(steps):
        yield torch.randn(k).double().tolist()


def cusum(values: list[list[float]], limit: float) -> list[tuple[int, int]]:
    """The formulas of gaf.rules.drift, written down again: (step, row) of each drift."""
    k = len(values[0])
    baselines, variance = [0.0] * k, 0.0
    sums = {(i, side): 0.0 for i in range(k) for side in (1, -1)}
    found = []
    for t, row in enumerate(values):
        offsets = [
            row[i] - statistics.mean(row[:i] + row[i + 1 :]) - baselines[i] for i in range(k)
        ]
        deviation = math.sqrt(variance)
        if t >= 20:
            offsets = [max(-3 * deviation, min(3 * deviation, d)) for d in offsets]
            for i, side in sums:
                step = side * offsets[i] / deviation - 0.25
                sums[i, side] = max(0.0, sums[i, side] + step)
        variance += max(1 / (t + 1), 1 / 100) * (statistics.mean(d * d for d in offsets) - variance)
        baselines = [m + d / 500 for m, d in zip(baselines, offsets, strict=True)]
        over = [i for (i, _), total in sums.items() if total > limit]
        if over:
            found.append((t, over[0]))
            break
    return found


@pytest.mark.parametrize("shift", [0.0, 1.5, -1.5, 5.0])
def test_drifts_are_those_of_the_formulas(shift: float) -> None:
    values = list(alike(5, 300))
    for row in values[100:]:
        row[3] += shift
    drift, found = Drift(30), []
    for t, row in enumerate(values):
        found += [(t, one.row) for one in drift.learn(row)]
    assert found[:1] == cusum(values, 30)
    assert [row for _, row in found[:1]] == ([3] if shift else [])


@K_FROM_3
@pytest.mark.parametrize("first", [0, 300])
@pytest.mark.parametrize("kind", ["cosine drift", "norm drift"])
def test_a_worker_that_is_off_is_named_and_not_left_out(k: int, first: int, kind: str) -> None:
    policy, seen = gaf.Guard(), []
    for step in range(first + 100):
        g = rows(k, 400)
        if step >= first:
            g[1] = torch.randn(400).double() if kind == "cosine drift" else 1.5 * g[1]
        assert gaf.aggregate(g, policy)[1].accepted.all()
        seen += [(step, finding) for finding in policy.findings if finding.kind == kind]
    assert {finding.row for _, finding in seen} == {1}
    step, finding = seen[0]
    assert step - first < 60
    assert finding.steps <= 100
    if kind == "cosine drift":
        assert abs(finding.value) < 0.03 < 0.05 < finding.expected
    else:
        # the run may have begun before the shift
        assert 1.05 < finding.value / finding.expected < 1.6


def test_two_workers_that_are_off_are_both_named() -> None:
    policy, seen = used(gaf.Guard(), 8, 100), set()
    for _ in range(60):
        g = rows(8)
        g[2], g[5] = 1.05 * torch.randn(2, 200)
        gaf.aggregate(g, policy)
        seen |= set(named(policy))
    assert seen == {(2, "cosine drift"), (5, "cosine drift")}


def test_of_two_rows_no_drift_is_attributed() -> None:
    policy = gaf.Guard()
    for _ in range(300):
        g = rows(2)
        g[1] = 3 * torch.randn(200)
        gaf.aggregate(g, policy)
        assert policy.findings == []


def test_a_small_steady_offset_is_absorbed() -> None:
    """As of data that differ a little by worker."""
    drift = Drift(30)
    for row in alike(8, 2000):
        row[3] += 0.2
        assert drift.learn(row) == []
    # d: an eighth of its own is in the others' mean
    assert drift.baselines[3] == pytest.approx(0.2, abs=0.1)


def test_without_drift_there_are_no_reports() -> None:
    policy = gaf.Guard(drift=None)
    for _ in range(100):
        g = rows(4)
        g[1] *= 3
        gaf.aggregate(g, policy)
        assert policy.findings == []


def test_no_false_alarm_in_10000_clean_steps() -> None:
    drift = Drift(20)
    assert [found for row in alike(4, 10_000) for found in drift.learn(row)] == []


@pytest.mark.parametrize(("k", "share"), [(4, 1 / 3), (8, 1 / 2)])
def test_how_often_cosines_are_looked_at_while_nothing_is_wrong(k: int, share: float) -> None:
    drift, looks = Drift(30), 0
    for step, row in enumerate(alike(k, 6000)):
        if step < 20 or step % 4 == 0 or drift.suspects:
            drift.learn(row)
            looks += 1
    assert looks / 6000 == pytest.approx(share, abs=0.06)


# --- what it is to the engines -----------------------------------------------------------------


def run(policy: gaf.Guard, macro: list[Tensor]) -> list[tuple[list[float], list[Finding]]]:
    return [(gaf.aggregate(g, policy)[1].weights.tolist(), policy.findings) for g in macro]


@pytest.mark.parametrize("through", ["json", "torch.save", "copy"])
def test_a_resumed_run_is_the_undisturbed_one(through: str) -> None:
    macro = [rows(4) for _ in range(120)]
    for step, g in enumerate(macro):
        g[0] *= 1000 if step in (40, 70, 100) else 1
        g[2] *= 1 + 0.004 * step
        g *= 30 if step == 90 else 1
    policy = gaf.Guard(spike="clip", cosine_z=5.0)
    run(policy, macro[:60])
    twin: Any = gaf.Guard(spike="clip", cosine_z=5.0)
    state = policy.state_dict()
    if through == "json":
        twin.load_state_dict(json.loads(json.dumps(state)))
    elif through == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
    else:
        twin = private_copy(policy)
    assert same(twin.state_dict(), state)
    want = run(policy, macro[60:])
    assert same(state, twin.state_dict())  # the state is a copy
    assert run(twin, macro[60:]) == want
    assert {f.kind for _, found in want for f in found} == {"norm", "norm drift", "step norm"}


def test_other_rows_start_anew_when_k_changes() -> None:
    policy = gaf.Guard(spike="skip", cosine_z=6)
    for k in (4, 8, 3, 1, 5):
        used(policy, k, 30)


def test_the_loss_scale_drops_out() -> None:
    plain, scaled = gaf.Guard(spike="skip"), gaf.Guard(spike="skip")
    for step in range(120):
        g = rows(4) * (1000 if step == 100 else 1)
        scaled.loss_scale = 2.0 ** (step // 10)
        gaf.aggregate(g, plain)
        gaf.aggregate(g * scaled.loss_scale, scaled)
        assert [astuple(f) for f in scaled.findings] == [
            (f.row, f.kind, pytest.approx(f.value), pytest.approx(f.expected), f.steps)
            for f in plain.findings
        ]


def test_judge_needs_the_row_sums_alone() -> None:
    one, two = gaf.Guard(), gaf.Guard()
    for step in range(60):
        g = rows(4)
        g[3] *= 1000 if step == 40 else 1
        sums = RowSums(g.square().sum(1), g @ g.sum(0))
        want, got = gaf.aggregate(g, one)[1], two.judge(sums)
        torch.testing.assert_close(vars(got), vars(want))


def without_cosines(g: Tensor) -> RowSums:
    return RowSums(g.square().sum(1), torch.full((len(g),), math.nan, dtype=torch.float64))


def test_cosines_are_asked_for_at_first_and_then_every_so_often() -> None:
    for every in (1, 3, 4):
        policy, asked = gaf.Guard(cosine_every=every, drift=None), []
        for step in range(60):
            asked += [step] if policy.needs_cosines else []
            gaf.aggregate(rows(4), policy)
        assert asked == [step for step in range(60) if step < 20 or step % every == 0]
    for policy in (gaf.Guard(cosine_z=6), gaf.Guard(spike="clip")):
        assert used(policy, 4).needs_cosines


def test_a_worker_under_suspicion_is_watched_in_every_step() -> None:
    """It is named about as soon as with a look at every step."""
    delays = {}
    for every in (1, 4):
        torch.manual_seed(1)
        policy, asked = gaf.Guard(cosine_every=every), 0
        for step in range(400):
            g = rows(4, 400)
            if step >= 200:
                g[1] *= -1
            asked += policy.needs_cosines and step >= 200
            found = policy.judge(
                RowSums.of_gram(g @ g.T) if policy.needs_cosines else without_cosines(g)
            )
            assert found.accepted.all()
            if named(policy):
                assert named(policy) == [(1, "cosine drift")]
                delays[every] = step - 199
                break
        if every == 4:
            assert asked > delays[4] / 2
        assert not policy._past.cosine_drift.suspects
    assert delays[1] <= 15
    assert delays[4] <= 2 * delays[1]


def test_norms_are_watched_without_cosines() -> None:
    policy = used(gaf.Guard(), 4)
    before = policy.state_dict()["cosine_drift"]
    g = rows(4)
    decision = policy.judge(without_cosines(g))
    assert decision.weights.tolist() == [0.25] * 4
    assert decision.distances.isnan().all()
    assert policy.state_dict()["cosine_drift"] == before
    for bad in (math.nan, 1e4):
        h = g.clone()
        h[2] *= bad
        decision = policy.judge(without_cosines(h))
        assert decision.accepted.tolist() == [True, True, False, True]
        assert decision.weights[0].item() == 1 / 3
    assert named(policy) == [(2, "norm")]


@pytest.mark.parametrize(("k", "bad", "overflow"), [(2, 1, True), (3, 1, False), (4, 2, True)])
def test_half_of_the_rows_not_finite_is_an_overflow(k: int, bad: int, overflow: bool) -> None:
    norms2 = [math.inf] * bad + [1.0] * (k - bad)
    assert has_overflow(gaf.Guard(), norms2) is overflow
    assert has_overflow(gaf.GAF(), norms2)


def test_the_repr_says_all_but_the_callback() -> None:
    text = (
        "Guard(norm_ratio=10.0, cosine_z=None, cosine_every=4, spike=None, spike_z=6.0, drift=30.0)"
    )
    assert repr(gaf.Guard(on_alarm=print)) == text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm_ratio": 0.5}, "Guard: norm_ratio must be a number of at least 1; got 0.5"),
        ({"cosine_z": 0}, "Guard: cosine_z must be a number above 0; got 0"),
        ({"cosine_every": 0}, "Guard: cosine_every must be a whole number of at least 1; got 0"),
        ({"spike_z": math.nan}, "Guard: spike_z must be a number above 0; got nan"),
        ({"drift": -1}, "Guard: drift must be a number above 0; got -1"),
        ({"spike": "drop"}, "Guard: spike must be one of 'skip', 'clip'; got 'drop'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaf.Guard(**wrong)


@pytest.mark.usefixtures("unchecked")
def test_a_callback_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="on_alarm must be None or a function of one dict; got 3"):
        gaf.Guard(on_alarm=3)


def test_the_state_of_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="the state must be of a Guard; it holds .*step"):
        gaf.Guard().load_state_dict(gaf.RandomSkip(0.5).state_dict())


@pytest.mark.parametrize("k", range(1, 8))
def test_medians_of_others(k: int) -> None:
    values = torch.randn(k).tolist()
    for i in {0, k - 1} - {0}:
        values[i] = math.nan
    for i, median in enumerate(medians_of_others(values)):
        rest = [v for j, v in enumerate(values) if j != i and not math.isnan(v)]
        assert median == statistics.median_low(rest) if rest else math.isnan(median)


def lengths(factors: dict[int, float], steps: int, k: int = 4) -> list[list[bool]]:
    """Which rows are left out at each step; row 1 is multiplied by what `factors` holds last."""
    rng = torch.Generator().manual_seed(0)
    guard, factor, left_out = gaf.Guard(drift=None), 1.0, []
    for step in range(steps):
        factor = factors.get(step, factor)
        rows = torch.randn(500, generator=rng) + torch.randn(k, 500, generator=rng)
        rows[1] *= factor
        _, decision = gaf.aggregate(rows, guard)
        left_out.append((~decision.accepted).tolist())
    return left_out


ROW_1 = [False, True, False, False]


def test_no_row_raises_the_limit_that_it_is_judged_by() -> None:
    found = lengths({30: 8.0, 31: 70.0}, 60)
    assert found[:31] == [[False] * 4] * 31 and found[31:] == [ROW_1] * 29


def test_a_row_that_grows_from_step_to_step_is_left_out() -> None:
    found = lengths({30 + i: 8.0 ** (i + 1) for i in range(12)}, 42)
    assert found[30] == [False] * 4 and found[31:] == [ROW_1] * 11


def test_a_row_that_was_too_long_from_the_start_is_left_out_after_the_first_steps() -> None:
    found = lengths({0: 50.0}, 40)
    assert found[:20] == [[False] * 4] * 20 and found[20:] == [ROW_1] * 20


def test_the_largest_norm_of_the_others_is_that_of_each_row_by_itself() -> None:
    watch, each = NormWatch(10.0), torch.full((5,), -math.inf)
    rng = torch.Generator().manual_seed(0)
    for _ in range(300):
        norms = 3 * torch.randn(5, generator=rng)
        norms[torch.rand(5, generator=rng) < 0.2] = math.nan
        watch.learn(norms.tolist())
        if not norms.isnan().all():
            each = torch.maximum(each - FADE, norms.nan_to_num(nan=-math.inf))
        for i in range(5):
            others = max(float(v) for j, v in enumerate(each) if j != i)
            assert watch._largest_beside(i, 5) == pytest.approx(others, abs=1e-4)
    again = NormWatch(10.0)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert vars(again) == vars(watch)
