"""The paper's figures as plans: their settings, paired arms, and controls that replay GAF."""

import dataclasses
from pathlib import Path

import pytest
import torch

from gaf_lab.paper import estimate, items, scales
from gaf_lab.paper.estimate import START_SECONDS
from gaf_lab.paper.notes import note_conditions
from gaf_lab.paper.places import arm_names, arms_by_position
from gaf_lab.paper.plans import make_plan
from gaf_lab.records.run import Run
from gaf_lab.settings import presets
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.plan import folder_name
from gaf_lab.sweeps.jobs import jobs

IDS = tuple(items.ITEMS)


@pytest.mark.parametrize("scale", ["smoke", "small", "full"])
@pytest.mark.parametrize("reading", ["paper", "code"])
@pytest.mark.parametrize("name", IDS)
def test_every_run_that_is_replayed_is_planned_before_and_of_the_same_point_and_seed(
    name, reading, scale, tmp_path
):
    configs = make_plan(name, scale, reading)
    assert bool(configs) == (name != "fig2")
    assert len({config.hash for config in configs}) == len(configs)
    named = {folder_name(config): config for config in configs}
    for config in configs:
        if config.replay is not None:
            recorded = named[config.replay.name]
            assert recorded.policy == "gaf"
            assert list(named).index(config.replay.name) < configs.index(config)
            same = dataclasses.replace(
                config, policy="gaf", replay=None, label=recorded.label, average=recorded.average
            )
            assert same.hash == recorded.hash
    assert set(
        jobs(configs, tmp_path, data_folder=None, keep_checkpoints=True, command=None)
    ) == set(named)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_no_control_would_repeat_gafs_run(k):
    arms = scales.with_controls(dataclasses.replace(presets.CIFAR100_GAF, k=k))
    kept = ["mean", "gaf", "random-skip", *(["random-subset"] if k > 2 else [])]
    assert [arm.policy for arm in arms] == kept


@pytest.mark.parametrize("scale", ["smoke", "small", "full"])
@pytest.mark.parametrize("reading", ["paper", "code"])
@pytest.mark.parametrize("name", IDS)
def test_at_each_place_of_a_figure_an_arms_name_is_one_config(name, reading, scale):
    item, configs = items.ITEMS[name], make_plan(name, scale, reading)
    runs = [
        Run(Path(folder_name(config)), {"arm": config.arm, "config": config.plain()}, [], None)
        for config in configs
    ]
    of = [arm for arms in arms_by_position(item, runs).values() for arm in arms]
    assert {arm.name for arm in of} <= set(arm_names(item, runs))
    # there the code's batch of 128 has a length for each b
    if (name, reading, scale) != ("fig9", "code", "smoke"):
        assert [arm.name for arm in of] == [arm.kind for arm in of]


@pytest.mark.parametrize("name", [name for name in IDS if name != "fig2"])
def test_seeds_are_paired(name):
    configs = make_plan(name, "full", seeds=3)
    bare = [
        (c.seed, dataclasses.replace(c, seed=0, replay=c.replay and Path("any")).hash)
        for c in configs
    ]
    unseeded = [{found for of, found in bare if of == seed} for seed in range(3)]
    assert unseeded[0] == unseeded[1] == unseeded[2]


def test_table1_at_full_is_the_presets_of_the_paper_and_of_its_code():
    for reading, gaf, mean, end in (
        ("paper", presets.CIFAR100_GAF, presets.CIFAR100_MEAN, 0.97),
        ("code", presets.CIFAR100_GAF_CODE, presets.CIFAR100_MEAN_CODE, 1.0),
    ):
        configs = [
            c for c in make_plan("table1", "full", reading, seeds=1) if c.dataset == "cifar100"
        ]
        filtered = {c.noise_rate: c for c in configs if c.policy == "gaf"}
        assert tuple(filtered) == items.NOISE_RATES
        assert filtered[0.4].hash == dataclasses.replace(gaf, noise_rate=0.4).hash
        # best on clean labels, says the paper; what the code always has
        assert filtered[0.0].tau == 1.0
        assert filtered[0.75].tau == end
        averaged = next(c for c in configs if c.policy == "mean" and c.noise_rate == 0.4)
        assert dataclasses.replace(averaged, tau=mean.tau).hash == mean.hash
    human = [c for c in make_plan("table1", "full", seeds=1) if c.dataset == "cifar100n"]
    assert human[1].hash == presets.CIFAR100N_GAF.hash


def test_the_papers_numbers_are_those_of_its_abstract():
    table = items.TABLE1
    assert all(table["GAF"][x] > table["averaging"][x] for x in table["GAF"])
    assert max(table["GAF"], key=lambda x: table["GAF"][x] - table["averaging"][x]) == 0.6
    assert round(100 * (table["GAF"][0.6] - table["averaging"][0.6])) == 19
    assert (
        round(1000 * (table["GAF"][items.HUMAN_COLUMN] - table["averaging"][items.HUMAN_COLUMN]))
        == 93
    )


def test_figure_7_averages_where_tau_accepts_everything():
    configs = make_plan("fig7", "full", seeds=1)
    assert [c.tau for c in configs if c.policy == "gaf"] == list(scales.PAPER_TAUS)
    assert [c.tau for c in configs if c.policy == "mean"] == [2.0]


def test_all_arms_of_table1_at_small_have_names_and_macro_batches_of_their_own():
    configs = [c for c in make_plan("table1", "small", seeds=1) if c.noise_rate == 0.4]
    assert len({c.arm for c in configs}) == len(configs) == 22
    sizes = {c.arm: c.k * c.b for c in configs}
    assert sizes.pop("larger batch") == 4 * sizes["averaging"]
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("name", [name for name in IDS if name != "fig2"])
def test_smoke_takes_seconds_on_the_real_data(name):
    for config in make_plan(name, "smoke"):
        steps = config.passes * config.limit / (config.k * config.b)
        assert steps <= 18  # the code's batches of 128 are not reduced with the others
        assert config.dataset in ("cifar100", "cifar100n", "noise", "imagenet")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_plan("fig10"), r"must be one of fig1, .*; got 'fig10'. Did you mean 'fig1'"),
        (lambda: make_plan("fig6", "small", "paper", 0), "seeds must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_the_estimate_grows_with_the_work_and_shrinks_with_workers():
    config = dataclasses.replace(scales.SMALL_FASHION, limit=500)
    longer = dataclasses.replace(config, passes=2 * config.passes)
    assert estimate.cost(longer, 1e-3, 1e-4) - START_SECONDS == pytest.approx(
        2 * (estimate.cost(config, 1e-3, 1e-4) - START_SECONDS)
    )
    training, looking = estimate.sample_seconds(config)
    assert training > 0
    assert looking > 0
    threads = torch.get_num_threads()
    seconds = estimate.run_seconds([config, longer], workers=2)
    assert 0 < seconds[config.hash] < seconds[longer.hash]
    assert torch.get_num_threads() == threads


def test_a_sharp_look_costs_twice_the_training():
    config = dataclasses.replace(scales.SMALL_FASHION, policy="mean")
    doubled = estimate.cost(dataclasses.replace(config, sam=0.05), 1e-3, 0.0) - START_SECONDS
    assert doubled == pytest.approx(2 * (estimate.cost(config, 1e-3, 0.0) - START_SECONDS))


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (600.0, "10 min"), (36_000.0, "10.0 h")]
)
def test_times_are_spelled_in_units_that_suit_them(seconds, text):
    assert estimate.format_estimate(seconds) == text


def test_notes_say_what_a_figure_is_not():
    item, plan = items.ITEMS["fig3"], make_plan("fig3", "smoke")
    assert any(
        "reduced ViT on generated pictures stands in" in line
        for line in note_conditions(item, plan, "smoke", "paper", True)
    )
    assert not any(
        "stands in" in line for line in note_conditions(item, plan, "smoke", "paper", False)
    )
    small = note_conditions(
        items.ITEMS["table1"], make_plan("table1", "small"), "small", "paper", False
    )
    assert small[0] == "Small scale: not the paper's setting."
    assert any("fashion-mnist" in line for line in small)
    assert (
        "released code"
        in note_conditions(item, make_plan("fig3", "full", "code"), "full", "code", False)[0]
    )
