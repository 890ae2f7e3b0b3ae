"""Configs: documented fields; unknown keys and bad values are refused with the fix."""

import ast
import dataclasses
import inspect
import itertools
import shlex
from pathlib import Path

import pytest

import gaf
from gaf_lab.commands.train import parse_train
from gaf_lab.paper.arms import every_arm
from gaf_lab.records import run as records
from gaf_lab.settings import config as module
from gaf_lab.settings import fields, sample_fields
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import from_file
from gaf_lab.settings.presets import PRESETS, find_preset
from gaf_lab.settings.reading import from_dict, from_toml
from gaf_lab.training.console import label_noise
from gaf_lab.training.make import learning_rate, make_policy


def test_every_field_has_a_docstring():
    trees = [
        n
        for file in (fields, sample_fields)
        for n in ast.parse(inspect.getsource(file)).body
        if isinstance(n, ast.ClassDef)
    ]
    written = [
        (n, after)
        for tree in trees
        for n, after in itertools.pairwise(tree.body)
        if isinstance(n, ast.AnnAssign)
    ]
    assert len(written) == len(dataclasses.fields(TrainConfig))
    for field, after in written:
        assert isinstance(after, ast.Expr), field.target.id
        assert isinstance(after.value, ast.Constant), field.target.id


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tau", 2.5, r"tau must lie in \[0, 2\]; got 2.5"),
        ("tau", float("nan"), r"tau must lie in \[0, 2\]; got nan"),
        ("tau", -0.1, r"tau must lie in \[0, 2\]"),
        ("tau", "auto", "tau must be a number; got 'auto'.*--threshold auto"),
        ("min_accepted", 0, "min_accepted must be at least 1 and at most k = 8"),
        (
            "min_accepted",
            9,
            "min_accepted must be at least 1 and at most k = 8, or no step is ever taken; got 9",
        ),
        ("k", 0, "k must be at least 1; got 0"),
        ("b", 0, "b must be at least 1; got 0"),
        ("noise_rate", 1.0, r"noise_rate must lie in \[0, 1\); got 1.0"),
        ("noise_rate", -0.2, r"noise_rate must lie in \[0, 1\)"),
        ("heldout", 1.0, r"heldout must lie in \[0, 1\)"),
        ("passes", 0.0, "passes must be above 0"),
        ("lr", float("nan"), "lr must be above 0"),
        ("dataset", "cifar-100", "dataset must be one of .*Did you mean 'cifar100'"),
        ("model", "resnet-18", "model must be one of .*Did you mean 'resnet18'"),
        ("policy", "gaff", "policy must be one of .*Did you mean 'gaf'"),
        ("k", 2.5, "k must be an integer; got a float, 2.5. It is written as in k = 8."),
        ("k", True, "k must be an integer; got a boolean, true"),
        ("k", 2**70, r"k must fit into 64 bits; got 1.18e\+21"),
        (
            "augment",
            1,
            "augment must be a boolean; got an integer, 1. It is written as in augment = false.",
        ),
        ("label", 3, "label must be a string; got an integer, 3."),
        (
            "milestones",
            (0.5, "a"),
            r'milestones must be an array of floats; got an array, \[0.5, "a"\]',
        ),
        ("threshold_by", "high", 'threshold_by must be a float; got a string, "high"'),
        ("replay", "runs/a", 'replay must be a path, in TOML a string; got a string, "runs/a"'),
        (
            "k",
            99_999_999,
            (
                r"k and b must not make a step hold more samples than the whole run, 160,000; "
                r"got k = 99,999,999 and b = 20"
            ),
        ),
        ("b", 99_999_999, r"k and b must not make a step hold more samples than the whole run"),
        (
            "passes",
            1e12,
            (
                r"passes must need fewer than 1,000,000,000 steps; got 1e\+12, which need "
                r"2.5e\+13. Lower passes."
            ),
        ),
        ("eval_every", 1e-300, "eval_every must be at least 1e-06 and finite; got 1e-300"),
        ("size", 10**6, r"size must lie in \[16, 4096\]; got 1000000"),
        ("policy", "replay-skip", "replay must be set for policy 'replay-skip'"),
        ("noise", "human", "noise 'human' needs a data set with human labels; got 'mnist5k'"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_the_fix(field, value, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TrainConfig(), **{field: value})


FLOATS = [
    field.name
    for field in dataclasses.fields(TrainConfig)
    if field.type in (float, float | None, tuple[float, ...])
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", FLOATS)
def test_no_field_takes_what_is_no_number(name, value):
    given = (value,) if name == "milestones" else value
    with pytest.raises(ConfigError, match=rf"^{name} (must|needs) .*; got .*{value}.*\. "):
        dataclasses.replace(TrainConfig(), **{name: given})


@pytest.mark.parametrize(
    "field", dataclasses.fields(TrainConfig), ids=[f.name for f in dataclasses.fields(TrainConfig)]
)
@pytest.mark.parametrize("text", ["[1, [2]]", '"?"', "{a = 1}", "1979-05-27", "true"])
def test_a_wrong_type_is_told_in_the_words_of_toml(tmp_path, field, text):
    """Never in Python's: no field takes a mixed array, a table or a date."""
    if (field.name, text) == ("task", '"?"'):
        pytest.skip("a string, which must also name a function")
    path = tmp_path / "run.toml"
    path.write_text(f"{field.name} = {text}\n")
    if (text == "true" and field.type is bool) or (
        text == '"?"' and field.type in (str, Path | None)
    ):
        assert from_toml(path, TrainConfig()) is not None
        return
    with pytest.raises(
        ConfigError, match=rf"^config file {path}: {field.name} must be .*; got "
    ) as error:
        from_toml(path, TrainConfig())
    for word in (
        "'str'",
        "class",
        "list",
        "dict",
        "tuple",
        "bool ",
        "int ",
        "NoneType",
        "datetime",
    ):
        assert word not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"label = '\xff'", "must be UTF-8, as TOML is; byte 10 is not. Save it as UTF-8."),
        (b"k = 3 4", "must be TOML; "),
        (None, "must be a file; it is a folder."),
    ],
)
@pytest.mark.parametrize("read", [lambda path: from_toml(path, TrainConfig()), from_file])
def test_a_file_that_is_no_toml_is_named(tmp_path, read, content, message):
    path = tmp_path / "run.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^(config|sweep) file {path}: {message}"):
        read(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    path.write_text("k = 3")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"must be readable; it is not \(Permission denied\)"):
        from_toml(path, TrainConfig())


def test_what_never_counts_accepted_rows_may_ask_for_any_number():
    assert TrainConfig(k=1).min_accepted == 2
    assert TrainConfig(k=4, min_accepted=4).min_accepted == 4
    assert TrainConfig(policy="mean", k=4, min_accepted=9).k == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "40% symmetric label noise"),
        ({"noise": "asymmetric", "noise_rate": 0.125}, "12.5% asymmetric label noise"),
        ({"dataset": "cifar100n", "noise": "human"}, "human labels"),
        ({"noise": "none"}, ""),
        ({"noise_rate": 0.0}, ""),
    ],
)
def test_wrong_labels_in_words(changes, words):
    assert label_noise(TrainConfig(**changes)) == words


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("taus = 0.5\n")
    with pytest.raises(ConfigError, match=r"run.toml: unknown key 'taus'. Did you mean 'tau'\?"):
        from_toml(path, TrainConfig())


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match="unknown preset 'cifar100_gaf'. Did you mean 'cifar100-gaf'"
    ):
        find_preset("cifar100_gaf")


def test_a_missing_and_a_broken_toml_file_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.toml: must exist"):
        from_toml(tmp_path / "nowhere.toml", TrainConfig())
    broken = tmp_path / "broken.toml"
    broken.write_text("tau = = 3")
    with pytest.raises(ConfigError, match="broken.toml: must be TOML"):
        from_toml(broken, TrainConfig())


def test_toml_sets_what_it_names_and_nothing_else(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('tau = 1\npolicy = "mean"\nmilestones = [0.25, 0.5]\n')
    found = from_toml(path, TrainConfig())
    assert found == dataclasses.replace(
        TrainConfig(), tau=1.0, policy="mean", milestones=(0.25, 0.5)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_comes_back_from_its_record(name):
    config = PRESETS[name]
    assert from_dict(config.plain(), TrainConfig(), "record") == config
    assert from_dict(config.plain(), TrainConfig(), "record").hash == config.hash


def test_the_hash_differs_where_the_config_does():
    assert len({c.hash for c in PRESETS.values()}) == len(set(PRESETS.values()))
    assert dataclasses.replace(TrainConfig(), seed=1).hash != TrainConfig().hash


def test_the_papers_preset_is_section_4_1():
    c = find_preset("cifar100-gaf")
    assert (
        c.dataset,
        c.model,
        c.stem,
        c.k,
        c.b,
        c.lr,
        c.momentum,
        c.nesterov,
        c.weight_decay,
        c.schedule,
        c.tau,
        c.average,
    ) == (
        "cifar100",
        "resnet18",
        "imagenet",
        2,
        100,
        0.01,
        0.9,
        True,
        0.01,
        "plateau",
        0.97,
        "mean",
    )
    assert c.passes * 50_000 / (c.k * c.b) == 500_000  # iterations
    code = find_preset("cifar100-gaf-code")
    assert (code.tau, code.average) == (1.0, "halving")


# --- arms ---

ROOT = Path(__file__).parents[3]
ROWS = [
    line.strip("|\n").split(" | ")
    for line in (ROOT / "docs" / "controls.md").read_text().splitlines()
    if line.count(" | ") == 4
][1:]


def in_docs():
    """Arm -> its config as the line in docs/controls.md makes it."""
    return {row[0].strip(): parse_train(shlex.split(row[3].strip("`"))).config for row in ROWS}


def test_every_line_of_the_controls_makes_the_arm_that_it_is_about():
    assert len(ROWS) > 20
    assert {name: config.arm for name, config in in_docs().items()} == {
        name: name for name in in_docs()
    }
    assert len(in_docs()) == len(ROWS)


def test_the_controls_in_the_docs_are_those_of_the_plans():
    plans = {config.arm: config for config in every_arm(TrainConfig())}
    assert len(plans) == len(every_arm(TrainConfig()))  # distinct names
    for name, config in in_docs().items():
        replay = plans[name].replay  # the plan's own name of the folder
        assert dataclasses.replace(config, replay=replay if config.replay else None) == plans[name]
    assert plans.keys() == in_docs().keys()


def test_techniques_are_named_beside_the_policy_that_they_go_with():
    def arm(**changes):
        return dataclasses.replace(TrainConfig(), **changes).arm

    assert arm(loss="gce", ema=0.9) == "GAF + GCE + EMA of weights"
    assert arm(policy="mean", loss="gce", ema=0.9) == "GCE + EMA of weights"
    assert arm(policy="random-skip", sam=0.1, optimizer="adam") == "random skip + SAM, Adam"
    assert arm(start="best", average="halving", label="mine") == "mine"


def test_the_label_is_no_part_of_the_hash_and_of_a_replay_its_name_alone_is():
    base = TrainConfig()
    assert dataclasses.replace(base, label="another").hash == base.hash
    replays = [
        dataclasses.replace(base, policy="replay-skip", replay=Path(path))
        for path in ("a/gaf-0", "b/gaf-0", "a/gaf-1")
    ]
    assert replays[0].hash == replays[1].hash != replays[2].hash


@pytest.mark.parametrize(
    "run", sorted((ROOT / "results" / "demo").iterdir()), ids=lambda path: path.name
)
def test_a_record_keeps_its_hash_when_fields_are_added(run):
    header = records.read(run).header
    config = from_dict(header["config"], TrainConfig(), "record")
    # of a replay, the whole path counted once
    assert (config.hash == header["config_hash"]) == (config.replay is None)
    assert config.arm == header["arm"]


def test_a_field_added_later_counts_once_it_leaves_its_default():
    known = records.read(ROOT / "results" / "demo" / "gaf-0").header["config"]
    assert {
        field.name for field in dataclasses.fields(TrainConfig)
    } == known.keys() | module.LATER.keys() | {"label"}
    for name, value in module.LATER.items():
        assert getattr(TrainConfig(), name) == value
    later = {
        "limit": 100,
        "loss": "gce",
        "gce_q": 0.5,
        "elr_beta": 0.5,
        "elr_lambda": 1.0,
        "label_smoothing": 0.1,
        "mixup": 1.0,
        "sam": 0.1,
        "ema": 0.9,
        "early_stopping": 2,
        "scope": "group",
    }
    hashes = {
        dataclasses.replace(TrainConfig(), **{name: value}).hash for name, value in later.items()
    }
    assert len(hashes | {TrainConfig().hash}) == len(later) + 1


def test_controls_take_over_the_recorded_shares():
    recorded = ROOT / "results" / "demo" / "gaf-0"
    evals = records.read(recorded).evals
    scaled = dataclasses.replace(TrainConfig(), policy="scaled-lr", replay=recorded)
    # every interval but the last has as many micro-gradients as its steps say
    accepted = sum(line["acceptance"] * len(line["rows"]) for line in evals) / evals[-1]["step"]
    assert 0 < accepted < 0.5
    assert learning_rate(scaled) == pytest.approx(0.05 * accepted)
    assert learning_rate(dataclasses.replace(scaled, policy="mean")) == 0.05
    skipping = dataclasses.replace(scaled, policy="random-skip", step_probability=0.9)
    assert make_policy(skipping).step_probability == pytest.approx(
        evals[-1]["steps_taken"] / evals[-1]["step"]
    )
    assert make_policy(dataclasses.replace(skipping, replay=None)).step_probability == 0.9


def test_a_rate_cannot_be_scaled_by_a_run_that_accepted_nothing(tmp_path):
    records.append(tmp_path, {"kind": "run", "config": TrainConfig().plain()})
    records.append(tmp_path, {"kind": "eval", "rows": [0, 0]})
    with pytest.raises(
        ConfigError,
        match=(
            "replay: the recorded run must have accepted something .*; .* did not. Replay "
            "a run with a high"
        ),
    ):
        learning_rate(dataclasses.replace(TrainConfig(), policy="scaled-lr", replay=tmp_path))


def test_a_threshold_has_its_own_default_and_its_argument_is_checked_before_a_run():
    from gaf_lab.training.make import make_tau

    for name, kind in (
        ("signal", gaf.SignalTau),
        ("noise-floor", gaf.NoiseFloorTau),
        ("quantile", gaf.QuantileTau),
        ("moving-average", gaf.MovingAverageTau),
    ):
        config = dataclasses.replace(TrainConfig(), threshold=name, tau=1.0)
        assert repr(make_tau(config)) == repr(kind())
        assert config.arm == f"GAF, {name}"
        assert dataclasses.replace(config, threshold_by=0.5).arm == f"GAF, {name} 0.5"
    assert make_tau(TrainConfig(tau=0.7)) == 0.7
    with pytest.raises(
        ConfigError,
        match=r"threshold_by: QuantileTau: p must be a number of at least 0 and at most 1; got 1.5",
    ):
        make_tau(TrainConfig(threshold="quantile", threshold_by=1.5))
    with pytest.raises(
        ConfigError,
        match="half_life must be at least 0, and goes with threshold 'quantile' alone; got 5",
    ):
        TrainConfig(threshold="signal", half_life=5)


@pytest.mark.parametrize("policy", ["replay-skip", "random-subset"])
def test_a_control_that_would_repeat_the_run_that_it_controls_is_refused(policy):
    base = dataclasses.replace(TrainConfig(), policy=policy, replay=Path("runs/gaf"), k=3)
    with pytest.raises(ConfigError, match=f"k must not be 2 for policy '{policy}'.*random-skip"):
        dataclasses.replace(base, k=2)
    assert dataclasses.replace(base, k=2, min_accepted=1).k == 2  # then GAF may take one row of two
