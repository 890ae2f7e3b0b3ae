"""Plans: the runs of a file; a control follows the run of its seed and point; refusals."""

import dataclasses
from pathlib import Path

import pytest

from gaf_lab.commands.plans import find_plan
from gaf_lab.paper.plans import make_plan
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import folder_name, follow, from_file
from gaf_lab.settings.presets import PRESETS

FILE = """
seeds = [3, 5]

[base]
dataset = "digits"
passes = 2

[grid]
noise_rate = [0.2, 0.4]
k = [4, 8]

[[arms]]
policy = "random-subset"
replay = "GAF"

[[arms]]
policy = "mean"
tau = 0.5

[[arms]]
k = 4

[[arms]]
label = "after the control"
policy = "replay-skip"
replay = "random subset"
"""


@pytest.fixture
def plan(tmp_path):
    """The configs of a plan with that text."""

    def made(text, *args):
        (tmp_path / "plan.toml").write_text(text)
        return from_file(tmp_path / "plan.toml", *args)

    return made


def test_a_file_is_every_seed_times_every_point_times_every_arm_and_the_nearest_table_wins(plan):
    configs = plan(FILE)
    keys = [(c.seed, c.noise_rate, c.policy, c.k) for c in configs]
    arms = ["random-subset", "mean", "gaf", "replay-skip"]
    assert keys == [
        (s, n, a, 4 if a == "gaf" else k)
        for s in (3, 5)
        for n in (0.2, 0.4)
        for k in (4, 8)
        for a in arms
    ]
    assert {(c.dataset, c.passes, c.model) for c in configs} == {
        ("digits", 2.0, TrainConfig().model)
    }
    assert {c.tau for c in configs if c.policy == "mean"} == {0.5}
    assert {c.seed for c in plan(FILE, range(2))} == {0, 1}
    assert plan("[base]") == [TrainConfig()]


def test_an_arm_follows_the_arm_that_it_names_at_its_own_seed_and_point_through_chains_too(plan):
    configs = plan(FILE)
    for subset, _, gaf, chained in (configs[i : i + 4] for i in range(0, len(configs), 4)):
        assert (subset.seed, subset.noise_rate) == (gaf.seed, gaf.noise_rate)
        assert subset.replay == Path(folder_name(gaf))
        assert chained.replay == Path(folder_name(subset))
        assert chained == follow(dataclasses.replace(chained, replay=Path("any")), subset)


def test_a_folder_is_named_by_arm_seed_and_hash_wherever_the_replayed_folder_lies(
    tmp_path,
):
    config = TrainConfig(label="Loss: GCE, q = 0.7!", seed=4)
    assert folder_name(config) == f"loss-gce-q-0-7-s4-{config.hash}"
    bare = follow(TrainConfig(policy="replay-skip", replay=Path("any")), config)
    assert folder_name(bare) == folder_name(
        dataclasses.replace(bare, replay=tmp_path / bare.replay)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [0", "plan.toml: must be TOML"),
        ("", r"plan.toml: must have a table \[base\], \[grid\] or \[\[arms\]\]; it is empty"),
        ("# nothing", "it is empty. docs/sweeps.md has an example."),
        (
            "[base]\nk = '8'",
            'plan.toml: k must be an integer; got a string, "8". It is written as in k = 8.',
        ),
        (
            "[grid]\n"
            + "\n".join(
                f"{name} = [{', '.join(['0.1'] * 300)}]" for name in ("tau", "lr", "heldout")
            ),
            (
                "plan.toml: the number of runs must be at most 100,000; got 27,000,000. Take "
                "values out of the grid."
            ),
        ),
        (
            "sedes = [0]",
            "unknown key 'sedes'. Did you mean 'seeds'. Known keys: seeds, base, grid, arms.",
        ),
        (
            "seeds = 3",
            (
                r"seeds must be a list of different whole numbers, such as \[0, 1, 2\]; got 3. "
                r"docs/sweeps.md has an example."
            ),
        ),
        ("seeds = [1, 1]", r"seeds must be a list of different .*; got \[1, 1\]"),
        ("seeds = [true]", r"seeds must be a list of different .*; got \[true\]"),
        ("seeds = []", r"seeds must be a list of different .*; got \[\]"),
        ("grid = [1]", r"grid must be a table of lists, \[grid\]; got \[1\]"),
        ("[grid]\ntau = 0.9", r"tau in \[grid\] must be a list of values; got 0.9"),
        ("[grid]\ntau = []", r"tau in \[grid\] must be a list of values; got \[\]"),
        ("arms = [1]", r"arms must be tables of config keys, \[\[arms\]\]; got 1"),
        ("[base]\ntua = 0.9", "plan.toml: unknown key 'tua'. Did you mean 'tau'"),
        ("[grid]\ntau = [0.9, 3.0]", r"plan.toml: tau must lie in \[0, 2\]; got 3.0"),
        ("[base]\nseed = 3", r"seed must stand in the list of seeds, .*Write seeds = \[0, 1, 2\]."),
        (
            '[[arms]]\n[[arms]]\npolicy = "replay-skip"\nreplay = 3',
            r"replay in \[\[arms\]\] must be the name of another arm; got 3",
        ),
        (
            '[[arms]]\n[[arms]]\npolicy = "replay-skip"\nreplay = "gaf"',
            "replay must name an arm; got 'gaf'. .*Arms: GAF, replay skip.",
        ),
        (
            '[[arms]]\n[[arms]]\ntau = 0.9\n[[arms]]\npolicy = "replay-skip"\nreplay = "GAF"',
            "2 arms are called 'GAF'. Give each its own",
        ),
        (
            '[[arms]]\npolicy = "replay-skip"\nreplay = "replay skip"',
            "replay must lead to an arm that replays none; it goes round among",
        ),
    ],
)
def test_what_is_no_plan_is_refused(plan, text, message):
    with pytest.raises(
        ConfigError, match=message.replace("Did you mean 'seeds'.", "Did you mean 'seeds'\\?")
    ):
        plan(text)


def test_a_plan_is_found_by_its_file_its_preset_or_the_papers_name(plan, tmp_path):
    configs = plan(FILE)
    more = {"scale": "smoke", "reading": "paper"}
    assert find_plan(str(tmp_path / "plan.toml"), None, **more) == configs
    assert find_plan("demo-gaf", None, **more) == [PRESETS["demo-gaf"]]
    assert [c.seed for c in find_plan("demo-gaf", 3, **more)] == [0, 1, 2]
    assert find_plan("fig6", 2, **more) == make_plan("fig6", "smoke", "paper", 2)
    with pytest.raises(
        ConfigError,
        match=f"{tmp_path / 'other.toml'}: must exist; it does not. docs/sweeps.md has the format.",
    ):
        find_plan(str(tmp_path / "other.toml"), None, **more)
    with pytest.raises(
        ConfigError,
        match=(
            r"needs a TOML file, a preset or a figure of the paper; got 'demo-gfa'. Did you "
            r"mean 'demo-gaf'"
        ),
    ):
        find_plan("demo-gfa", None, **more)
    with pytest.raises(ConfigError, match="seeds must be at least 1; got 0."):
        find_plan("demo-gaf", 0, **more)
