"""Means, paired differences and curves against values that can be worked out in the head."""

from pathlib import Path

import numpy as np
import pytest

from gaf_lab.records.run import Run
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import Arm, baseline_of, group_by_arm, group_by_point
from gaf_lab.settings.config import TrainConfig

KEYS = (
    "heldout_accuracy",
    "test_accuracy",
    "memorised",
    "corrected",
    "acceptance",
    "distance_mean",
)


def run(
    arm="averaging", seed=0, status="finished", step=100, samples=1000, seconds=60.0, **columns
) -> Run:
    """One evaluation per entry of the columns, every `step` steps and `samples` samples.

    80 of 100 steps are taken.
    """
    count = max(map(len, columns.values()), default=0)
    evals = [
        dict.fromkeys(KEYS)
        | {
            "step": step * i,
            "steps_taken": step * i * 8 // 10,
            "samples": samples * i,
            "seconds": 7.0 * i,
        }
        | {key: values[i - 1] for key, values in columns.items()}
        for i in range(1, count + 1)
    ]
    header = {"arm": arm, "config": {"seed": seed}}
    return Run(Path(), header, evals, {"status": status, "seconds": seconds} if status else None)


def only(*runs: Run) -> Arm:
    (arm,) = group_by_arm(runs)
    return arm


def arm_of(values, name="averaging") -> Arm:
    return only(*(run(name, seed, test_accuracy=[value]) for seed, value in enumerate(values)))


def test_arms_keep_the_order_of_first_appearance():
    runs = [run("b", 0), run("a", 0), run("b", 1)]
    assert [(arm.name, [r.seed for r in arm.runs]) for arm in group_by_arm(runs)] == [
        ("b", [0, 1]),
        ("a", [0]),
    ]


def test_the_baseline_is_averaging_or_else_the_first():
    assert baseline_of(group_by_arm([run("GAF"), run("averaging")])).name == "averaging"
    assert baseline_of(group_by_arm([run("GAF"), run("other")])).name == "GAF"


def test_mean_and_sample_deviation():
    found = st.spread_over_seeds(arm_of([0.5, 0.6, 0.7]), measures.LAST)
    assert found is not None
    assert (found.mean, found.deviation, found.n) == (pytest.approx(0.6), pytest.approx(0.1), 3)


def test_one_seed_has_a_mean_and_no_deviation():
    assert st.spread_over_seeds(arm_of([0.5]), measures.LAST) == st.Spread(0.5, None, 1)


def test_without_a_value_there_is_no_mean():
    assert st.spread_over_seeds(only(run(test_accuracy=[None])), measures.LAST) is None
    assert st.spread_over_seeds(only(run()), measures.LAST) is None


def test_selected_follows_the_held_out_labels_and_last_the_order():
    one = run(heldout_accuracy=[0.3, 0.5, 0.5, 0.2], test_accuracy=[0.6, 0.88, 0.9, 0.64])
    assert (measures.SELECTED.value(one), measures.LAST.value(one)) == (0.88, 0.64)


def test_nothing_is_selected_where_nothing_was_held_out():
    one = run(test_accuracy=[0.6, 0.7])
    assert (measures.SELECTED.value(one), measures.LAST.value(one)) == (None, 0.7)


def test_last_passes_over_missing_values():
    assert measures.MEMORISED.value(run(memorised=[0.1, 0.2, None])) == 0.2


def test_acceptance_weighs_each_line_by_its_steps():
    one = run(acceptance=[1.0, 0.5])
    one.evals[1]["step"] = 400  # 100 steps at 1, then 300 at 1/2
    assert measures.ACCEPTANCE.value(one) == pytest.approx(0.625)
    assert measures.ACCEPTANCE.value(run(acceptance=[None, 0.5])) == 0.5
    assert measures.ACCEPTANCE.value(run(acceptance=[None])) is None


def test_share_of_steps_taken():
    assert measures.STEPS_TAKEN.value(run(test_accuracy=[0.1, 0.2])) == 0.8
    assert measures.STEPS_TAKEN.value(run(step=0, test_accuracy=[0.1])) is None


def test_seconds_come_from_the_end_or_from_the_last_line():
    assert measures.SECONDS.value(run(test_accuracy=[0.1], seconds=60.0)) == 60.0
    assert measures.SECONDS.value(run(test_accuracy=[0.1, 0.2], status="")) == 14.0
    assert measures.SECONDS.value(run(status="")) is None


def test_only_finished_runs_count_where_there_are_any():
    arm = only(
        run(seed=0, test_accuracy=[0.8]),
        run(seed=1, test_accuracy=[0.2], status=""),
        run(seed=2, test_accuracy=[0.1], status="diverged"),
    )
    assert (st.spread_over_seeds(arm, measures.LAST), arm.seeds) == (st.Spread(0.8, None, 1), [0])


def test_an_arm_without_finished_runs_is_described_but_not_compared():
    broken = only(run("GAF", test_accuracy=[0.2], status="interrupted"))
    assert st.spread_over_seeds(broken, measures.LAST) == st.Spread(0.2, None, 1)
    assert st.paired_difference(broken, arm_of([0.1]), measures.LAST) is None


def test_differences_pair_the_seeds_that_both_have():
    ours = only(
        *(
            run("GAF", seed, test_accuracy=[value])
            for seed, value in {5: 0.9, 1: 0.8, 2: 0.7}.items()
        )
    )
    theirs = only(
        *(
            run("averaging", seed, test_accuracy=[value])
            for seed, value in {2: 0.5, 1: 0.5, 9: 0.0}.items()
        )
    )
    found = st.paired_difference(ours, theirs, measures.LAST)
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(0.25), 2)  # (0.8 - 0.5 + 0.7 - 0.5) / 2
    assert (found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.3))


def test_no_common_seed_no_difference():
    assert (
        st.paired_difference(
            only(run("a", 0, test_accuracy=[0.5])),
            only(run("b", 1, test_accuracy=[0.5])),
            measures.LAST,
        )
        is None
    )


def test_a_difference_is_antisymmetric():
    a, b = arm_of([0.9, 0.8, 0.85, 0.7], "a"), arm_of([0.5, 0.7, 0.6, 0.1], "b")
    there, back = (
        st.paired_difference(a, b, measures.LAST),
        st.paired_difference(b, a, measures.LAST),
    )
    assert there is not None
    assert back is not None
    assert there.mean == pytest.approx(-back.mean)
    assert there.clear
    assert back.clear


def test_pairing_removes_what_the_seeds_share():
    shift = [0.1, 0.5, 0.9]  # seeds differ widely, arms by 0.02 each time
    found = st.paired_difference(
        arm_of([s + 0.02 for s in shift], "a"), arm_of(shift, "b"), measures.LAST
    )
    assert found is not None
    assert (found.mean, found.low, found.high) == (
        pytest.approx(0.02),
        pytest.approx(0.02),
        pytest.approx(0.02),
    )
    assert found.clear


@pytest.mark.parametrize(
    ("gaps", "told"),
    [
        ([0.1, 0.2, 0.3], True),
        ([-0.1, -0.2, -0.3], True),
        ([-0.1, 0.2, 0.3], False),
        ([0.1, 0.2], False),
        ([0.5], False),
        ([0.0] * 5, False),
    ],
)
def test_a_difference_is_told_by_three_seeds_and_an_interval_without_zero(gaps, told):
    found = st.paired_difference(
        arm_of([0.5 + gap for gap in gaps], "a"), arm_of([0.5] * len(gaps), "b"), measures.LAST
    )
    assert found is not None
    assert found.clear is told


def test_one_pair_has_no_interval():
    found = st.paired_difference(arm_of([0.5], "a"), arm_of([0.4], "b"), measures.LAST)
    assert found is not None
    assert (found.low, found.high, found.n) == (None, None, 1)


def test_runs_that_share_arm_and_seed_count_once():
    twice = only(
        run("a", 0, test_accuracy=[0.4]),
        run("a", 0, test_accuracy=[0.6]),
        run("a", 1, test_accuracy=[0.9]),
    )
    found = st.spread_over_seeds(twice, measures.LAST)
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(0.7), 2)


def test_the_bootstrap_is_reproducible_and_approaches_the_normal_interval():
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    low, high = st.bootstrap(values)
    assert (low, high) == st.bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(400)
    # Monte Carlo error of a 2.5% quantile: about 0.0013
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


@pytest.mark.parametrize("values", [[1.0, 4.0], [1.0, 2.0, 4.0]])
def test_the_bootstrap_of_two_or_three_is_their_range(values):
    assert st.bootstrap(np.array(values)) == (1.0, 4.0)


def test_a_curve_is_mean_and_range_over_seeds():
    found = st.curve(
        only(run(seed=0, test_accuracy=[0.2, 0.4]), run(seed=1, test_accuracy=[0.4, 0.8])),
        "test_accuracy",
    )
    assert found is not None
    assert found.x.tolist() == [1000, 2000]
    np.testing.assert_allclose(
        [found.mean, found.low, found.high], [[0.3, 0.6], [0.2, 0.4], [0.4, 0.8]]
    )


def test_curves_interpolate_to_the_union_of_the_grids_and_never_beyond():
    coarse, fine = (
        run(seed=0, test_accuracy=[0.0, 1.0], samples=2000),
        run(seed=1, test_accuracy=[0.0, 0.0, 0.0, 0.0, 0.0]),
    )
    # coarse at 2000 and 4000, fine at 1000 .. 5000
    found = st.curve(only(coarse, fine), "test_accuracy")
    assert found is not None
    assert found.x.tolist() == [2000, 3000, 4000]
    np.testing.assert_allclose(found.mean, [0, 0.25, 0.5])


def test_a_curve_leaves_missing_values_and_unfinished_runs_out():
    found = st.curve(
        only(run(test_accuracy=[0.1, None, 0.3]), run(seed=1, test_accuracy=[0.9], status="")),
        "test_accuracy",
    )
    assert found is not None
    assert (found.x.tolist(), found.mean.tolist(), found.n) == ([1000, 3000], [0.1, 0.3], 1)


def test_runs_that_early_stopping_ended_keep_their_last_value():
    """The mean ends at the table's last value, not at one run's while others are still falling."""
    short, long = run(seed=0, test_accuracy=[0.2, 0.7]), run(seed=1, test_accuracy=[0.2, 0.4, 0.9])
    for one in (short, long):
        one.header["config"]["early_stopping"] = 4
    found = st.curve(only(short, long), "test_accuracy")
    assert found is not None
    assert found.x.tolist() == [1000, 2000, 3000]
    np.testing.assert_allclose(found.mean, [0.2, 0.55, 0.8])


def test_no_values_or_no_common_range_no_curve():
    assert st.curve(only(run(test_accuracy=[None])), "test_accuracy") is None
    early, late = (
        run(seed=0, test_accuracy=[0.1, 0.2]),
        run(seed=1, test_accuracy=[0.1, 0.2], samples=9000),
    )
    assert st.curve(only(early, late), "test_accuracy") is None


def test_a_line_written_twice_by_a_resumed_run_counts_once():
    one = run(test_accuracy=[0.1, 0.2, 0.3])
    one.evals[2]["samples"] = 2000
    samples, values = st.values_along(one, "test_accuracy")
    assert (samples.tolist(), values.tolist()) == ([1000, 2000], [0.1, 0.3])


def test_a_curve_can_run_along_the_steps_taken_or_the_seconds():
    # 80, 160 and 160, 320 steps
    one, other = (
        run(seed=0, test_accuracy=[0.0, 1.0]),
        run(seed=1, test_accuracy=[0.0, 1.0], step=200),
    )
    found = st.curve(only(one, other), "test_accuracy", "steps_taken")
    assert found is not None
    assert (found.x.tolist(), found.mean.tolist()) == ([160], [0.5])
    assert st.values_along(one, "test_accuracy", "seconds")[0].tolist() == [7, 14]


def test_evaluations_between_which_no_step_was_taken_count_once():
    one = run(test_accuracy=[0.1, 0.2, 0.3])
    one.evals[1]["steps_taken"] = one.evals[2]["steps_taken"] = 90
    steps, values = st.values_along(one, "test_accuracy", "steps_taken")
    assert (steps.tolist(), values.tolist()) == ([80, 90], [0.1, 0.3])


def test_the_lowest_passes_over_missing_values():
    assert measures.lowest_value(run(distance_mean=[0.9, None, 0.7, 0.8]), "distance_mean") == 0.7
    assert measures.lowest_value(run(distance_mean=[None]), "distance_mean") is None


# --- arms and points of a grid -------------------------------------------------------------------

LEVELS = {0.5: 0.6, 0.9: 0.8}


def planned(accuracy=0.5, folder="", **config) -> Run:
    """A finished run as a sweep would record it."""
    whole = TrainConfig(**config)
    made = run(whole.arm, whole.seed, test_accuracy=[accuracy])
    return Run(
        Path("runs") / (folder or whole.hash),
        made.header | {"config": whole.plain()},
        made.evals,
        made.end,
    )


def gaf_at(taus=LEVELS, seeds=3, **config) -> list[Run]:
    return [
        planned(LEVELS[tau], f"gaf-{tau}-{seed}", tau=tau, seed=seed, **config)
        for tau in taus
        for seed in range(seeds)
    ]


def described(of: list[Arm]) -> dict[str, tuple[float, int]]:
    spreads = {arm.name: st.spread_over_seeds(arm, measures.LAST) for arm in of}
    return {
        name: (round(found.mean, 6), found.n)
        for name, found in spreads.items()
        if found is not None
    }


def test_runs_of_different_configs_are_never_one_arm():
    assert described(group_by_arm(gaf_at())) == {"GAF, tau 0.5": (0.6, 3), "GAF, tau 0.9": (0.8, 3)}
    assert list(described(group_by_arm(gaf_at([0.5])))) == ["GAF"]


def test_what_differs_is_told_in_the_words_of_the_command_line_and_the_order_of_the_config():
    changes = [
        {"dataset": "digits"},
        {"augment": True, "tau": 0.9},
        {"schedule": "multi-step", "milestones": (0.2, 0.5)},
    ]
    assert [arm.name for arm in group_by_arm(planned(**change) for change in changes)] == [
        "GAF, dataset digits, no augment, schedule constant, milestones 0.5 0.75, tau 0.8",
        "GAF, dataset mnist5k, augment, schedule constant, milestones 0.5 0.75, tau 0.9",
        "GAF, dataset mnist5k, no augment, schedule multi-step, milestones 0.2 0.5, tau 0.8",
    ]


def test_labels_name_an_arm_and_are_no_part_of_it():
    assert described(group_by_arm([planned(seed=0), planned(seed=1, label="GAF")])) == {
        "GAF": (0.5, 2)
    }


def test_a_record_from_before_a_field_is_of_the_same_arm():
    old = planned(seed=1)
    del old.header["config"]["engine"]
    assert len(group_by_arm([planned(seed=0), old])) == 1


def test_averaging_has_no_tau_and_clean_labels_no_rate():
    assert (
        len(
            group_by_arm(
                planned(policy="mean", tau=tau, seed=seed) for seed, tau in enumerate(LEVELS)
            )
        )
        == 1
    )
    assert (
        len(
            group_by_arm(
                planned(noise="none", noise_rate=rate, seed=seed)
                for seed, rate in enumerate((0.0, 0.4))
            )
        )
        == 1
    )


@pytest.mark.parametrize("policy", ["random-skip", "random-subset", "replay-skip", "scaled-lr"])
def test_a_control_is_one_arm_whatever_it_measured_and_one_for_each_tau_that_it_replays(policy):
    controls = [
        planned(
            policy=policy,
            seed=seed,
            replay=Path(f"there/gaf-{tau}-{seed}"),
            step_probability=0.1 * (seed + 1),
        )
        for tau in LEVELS
        for seed in range(3)
    ]
    assert [len(arm.runs) for arm in group_by_arm([*gaf_at([0.5]), *controls[:3]])] == [3, 3]
    names = [arm.name.partition(", tau ")[2] for arm in group_by_arm([*gaf_at(), *controls])]
    assert names == ["0.5", "0.9"] * 2


def against_baseline(runs) -> list[st.Difference]:
    """Each arm against the baseline of its point, at the last evaluation."""
    gaps = []
    for group in group_by_point(group_by_arm(runs)):
        baseline = baseline_of(group)
        gaps += [
            st.paired_difference(arm, baseline, measures.LAST)
            for arm in group
            if arm is not baseline
        ]
    return gaps


def test_only_arms_of_one_point_of_the_grid_are_compared():
    runs = [run for rate in (0.2, 0.4) for run in gaf_at(noise_rate=rate)]
    runs += [
        planned(rate, policy="mean", noise_rate=rate, seed=seed)
        for rate in (0.2, 0.4)
        for seed in range(3)
    ]
    found = {(gap.arm, gap.other): round(gap.mean, 6) for gap in against_baseline(runs)}
    assert found == {
        (f"GAF, noise rate {rate:g}, tau {tau:g}", f"averaging, noise rate {rate:g}"): round(
            level - rate, 6
        )
        for rate in (0.2, 0.4)
        for tau, level in LEVELS.items()
    }


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": "digits"},
        {"noise": "none"},
        {"limit": 100},
        {"k": 4},
        {"b": 10},
        {"passes": 3.0},
    ],
)
def test_arms_of_other_data_or_sizes_are_not_compared(other):
    assert not against_baseline([planned(), planned(policy="mean", **other)])


def test_a_label_says_in_what_sizes_its_arm_departs_and_not_in_what_data():
    runs = [
        planned(),
        planned(policy="mean"),
        planned(policy="mean", b=80, label="larger batch"),
        planned(limit=9, label="few"),
    ]
    assert [(gap.arm, gap.other) for gap in against_baseline(runs)] == [
        ("GAF", "averaging"),
        ("larger batch", "averaging"),
    ]
