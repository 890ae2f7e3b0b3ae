"""Configs: every field is documented, unknown keys are refused with the nearest one, bad values with a message that says the fix."""

import ast
import dataclasses
import inspect
import itertools

import pytest

from gaf_lab import config as module
from gaf_lab.config import ConfigError, TrainConfig, from_dict, from_toml
from gaf_lab.presets import PRESETS, preset


def test_every_field_has_a_docstring():
    (tree,) = (n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ClassDef) and n.name == "TrainConfig")
    fields = [(n, after) for n, after in itertools.pairwise(tree.body) if isinstance(n, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(TrainConfig))
    for field, after in fields:
        assert isinstance(after, ast.Expr), field.target.id
        assert isinstance(after.value, ast.Constant), field.target.id


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tau", 2.5, r"tau must lie in \[0, 2\]; got 2.5"),
        ("tau", float("nan"), r"tau must lie in \[0, 2\]; got nan"),
        ("tau", -0.1, r"tau must lie in \[0, 2\]"),
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
        ("k", 2.5, "k must be of type int; got 2.5"),
        ("augment", 1, "augment must be of type bool; got 1"),
        ("policy", "replay-skip", "replay must be set for policy 'replay-skip'"),
        ("noise", "human", "noise 'human' needs a data set with human labels; got 'mnist5k'"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_the_fix(field, value, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TrainConfig(), **{field: value})


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("taus = 0.5\n")
    with pytest.raises(ConfigError, match=r"run.toml: unknown key 'taus'. Did you mean 'tau'\?"):
        from_toml(path, TrainConfig())


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'cifar100_gaf'. Did you mean 'cifar100-gaf'"):
        preset("cifar100_gaf")


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
    assert found == dataclasses.replace(TrainConfig(), tau=1.0, policy="mean", milestones=(0.25, 0.5))


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_comes_back_from_its_record(name):
    config = PRESETS[name]
    assert from_dict(config.plain(), TrainConfig(), "record") == config
    assert from_dict(config.plain(), TrainConfig(), "record").hash == config.hash


def test_the_hash_differs_where_the_config_does():
    assert len({c.hash for c in PRESETS.values()}) == len(set(PRESETS.values()))
    assert dataclasses.replace(TrainConfig(), seed=1).hash != TrainConfig().hash


def test_the_papers_preset_is_section_4_1():
    c = preset("cifar100-gaf")
    assert (c.dataset, c.model, c.stem, c.k, c.b, c.lr, c.momentum, c.nesterov, c.weight_decay, c.schedule, c.tau, c.average) == (
        "cifar100", "resnet18", "imagenet", 2, 100, 0.01, 0.9, True, 0.01, "plateau", 0.97, "mean"
    )  # fmt: skip
    assert c.passes * 50_000 / (c.k * c.b) == 500_000  # iterations
    code = preset("cifar100-gaf-code")
    assert (code.tau, code.average) == (1.0, "halving")
