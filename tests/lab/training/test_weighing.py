"""Weights of samples in the loss: gaf.SampleAgreement's own, and those of an audit.

A run that uses them resumes bit for bit.
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gaf
from gaf_lab.data.sampling import derive_seed
from gaf_lab.records.checkpoint import CheckpointError
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.engines import check_ranks, obstacle
from gaf_lab.training.loop import Training
from gaf_lab.training.objective import Objective
from gaf_lab.training.restart import restart_step, start_again_if_due
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state

CPU = torch.device("cpu")
SMALL = TrainConfig(
    dataset="digits",
    limit=240,
    noise="asymmetric",
    k=2,
    b=24,
    passes=6.0,
    eval_every=1.5,
    lr=0.05,
    policy="mean",
    ema=0.9,
)
AUDIT = {"audit_passes": 3.0, "loss": "elr"}
FOUND = {**AUDIT, "noise": "symmetric"}  # labels of which the audit finds enough to start again
ADAMW = {"optimizer": "adamw", "lr": 0.003, "noise_rate": 0.2}
LOSSES = [{}, {"loss": "gce"}, {"loss": "elr"}, {"label_smoothing": 0.1}]


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


def net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("changes", LOSSES)
def test_the_losses_of_the_samples_have_the_loss_as_their_mean(changes):
    scores, y, index = torch.randn(9, 4).double(), torch.randint(4, (9,)), torch.arange(9)
    of, each = (Objective(changed(**changes), 20, 4, CPU) for _ in range(2))
    for one in (of, each):
        if one.early is not None:
            one.early.targets = one.early.targets.double()
    for _ in range(2):  # the second time ELR has targets
        found = each.each(scores, y, index)
        assert found.shape == (9,)
        assert torch.allclose(found.mean(), of.of(scores, y, index), rtol=1e-12)


@pytest.mark.parametrize("score", ["prototype", "plain-prototype", "vote", "loss"])
def test_the_loss_is_sample_agreements_own(score):
    torch.manual_seed(0)
    model = net()
    objective = Objective(changed(agreement=score), 40, 4, CPU, model)
    losses, kind = nn.CrossEntropyLoss(reduction="none"), score.removeprefix("plain-")
    direct = gaf.SampleAgreement(losses, model[-1], kind, num_samples=40, refine=kind == score)
    x, y = torch.randn(40, 6), torch.randint(4, (40,))
    for step in range(24):
        index = torch.arange(20) + 20 * (step % 2)
        expected = direct(model(x[index]), y[index], index=index)
        found = objective(model, x[index], y[index], index, step, 0)
        assert torch.equal(found, expected)
    assert direct.weights.std() > 0.01  # the weights have an effect by now


def test_an_evaluation_shows_what_the_weights_went_by():
    training = Training(changed(agreement="prototype"), None)
    training.macro_batch()
    assert training.evaluation()["sample_weight"] == 1  # warming up
    while training.step < training.problem.steps:
        training.macro_batch()
    line, criterion = training.evaluation(), training.objective.weighing.criterion
    assert line["separation"] == float(criterion.statistics.separation) > 0.5
    assert line["sample_weight"] == float(criterion.weights.mean()) <= 1


def test_shuffled_weights_are_the_same_weights_on_other_samples():
    torch.manual_seed(0)
    model, (x, y) = net(), (torch.randn(40, 6), torch.randint(4, (40,)))
    own, other = (
        Objective(changed(agreement="prototype", shuffle_weights=on), 40, 4, CPU, model).weighing
        for on in (False, True)
    )
    index, moved = torch.arange(40), []
    for step in range(30):
        scores = model(x).detach()
        a, b = (one.weights(scores, y, index, step, 0) for one in (own, other))
        assert torch.equal(a.sort().values, b.sort().values)
        moved.append(not torch.equal(a, b))
    assert not any(moved[:2])  # all weights are 1 until the third visit
    assert all(moved[20:])


@pytest.mark.parametrize("loss", ["cross-entropy", "gce"])
def test_any_loss_is_weighed_by_the_scores_of_cross_entropy(loss):
    model, (x, y) = net(), (torch.randn(30, 6), torch.randint(4, (30,)))
    objective = Objective(changed(agreement="loss", loss=loss), 30, 4, CPU, model)
    index = torch.arange(30)
    for step in range(6):
        found = objective(model, x, y, index, step, 0)
    weights = objective.weighing.criterion.weights
    scores = model(x)
    p = scores.softmax(1).gather(1, y[:, None])[:, 0]
    losses = cross_entropy(scores, y, reduction="none") if loss != "gce" else (1 - p**0.7) / 0.7
    assert torch.allclose(found, (weights * losses).sum() / weights.sum(), rtol=1e-5)


# ---------------------------------------------------------------------------------- audit


def audited(**changes):
    """A training just before its restart."""
    training = Training(changed(**FOUND | changes), None)
    while training.step < restart_step(training.problem):
        training.macro_batch()
    return training


def test_an_audit_is_averaging_and_the_restart_has_new_weights_and_no_past():
    training, averaging = audited(), Training(changed(noise="symmetric"), None)
    assert training.step == round(3 * 216 / 48)
    while averaging.step < training.step:
        averaging.macro_batch()
    pairs = zip(training.model.parameters(), averaging.model.parameters(), strict=True)
    # the mean of losses is taken in another order
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    assert not training.objective.early.targets.any()
    start_again_if_due(training)
    torch.manual_seed(derive_seed(0, "weights after the audit"))
    fresh = training.problem.new_model()
    pairs = zip(training.model.parameters(), fresh.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not training.optimizer.state
    training.macro_batch()
    assert_same(dict(training.average.module.state_dict()), dict(training.model.state_dict()))


def test_suspects_are_the_issues_of_the_report_and_weigh_less():
    training = audited(suspect_weight=0.3)
    audit = training.objective.weighing
    report = audit.criterion.report()
    expected = torch.zeros(216, dtype=torch.bool)
    expected[report["index"]] = torch.tensor(report["is_label_issue"])
    assert 40 < expected.sum() < 140
    doubt = torch.zeros(216)
    doubt[report["index"]] = torch.tensor(report["doubt"])
    assert doubt.any() and not doubt[~expected].any()
    # more of them are wrong than by chance
    train_set = training.problem.train
    wrong = train_set.observed != train_set.clean
    assert wrong[expected].double().mean() > 1.3 * wrong.double().mean()
    training.macro_batch()
    torch.testing.assert_close(audit.each, 1 - 0.7 * doubt)
    assert audit.each.min().item() == pytest.approx(0.3)
    weights = audit.weights(None, None, torch.arange(216), 0, 0)
    assert torch.equal(weights, audit.each)


@pytest.mark.parametrize("suspects", ["prototype", "plain-prototype", "random"])
def test_without_separated_scores_the_run_goes_on_as_averaging(suspects):
    clean = {"noise": "none", "noise_rate": 0.0}
    training, averaging = audited(**clean, suspects=suspects), Training(changed(**clean), None)
    audit, own = training.objective.weighing, training.evaluation()
    assert "restarted" not in own
    while averaging.step < averaging.problem.steps:
        averaging.macro_batch()
    while training.step < training.problem.steps:
        training.macro_batch()
    pairs = zip(training.model.parameters(), averaging.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert torch.equal(audit.each, torch.ones(216))
    line = training.evaluation()
    assert not line["restarted"]
    assert 0 < line["separation"] < 0.7


def test_an_audit_trains_on_the_tasks_own_loss():
    def own(output, target):
        return 3 * (output.gather(1, target[:, None])[:, 0] - 1) ** 2

    model, (x, y) = net(), (torch.randn(30, 6), torch.randint(4, (30,)))
    objective = Objective(changed(audit_passes=3.0), 30, 4, CPU, model, own)
    found = objective(model, x, y, torch.arange(30), 0, 0)
    torch.testing.assert_close(found, own(model(x), y).mean())
    assert objective.weighing.watching


def test_a_checkpoint_of_another_shape_is_refused_in_words(tmp_path):
    config = changed(agreement="prototype")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", Stop(after=10))
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path)
    scores = state["objective"]["weighing"]["statistics.scores"]
    state["objective"]["weighing"]["statistics.scores"] = scores[:, :4]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="must have been written by this version of gaf"):
        train(config, tmp_path / "run", Silent(), resume=True)


def test_a_run_taken_back_before_its_restart_starts_again_once_more():
    training = audited()
    audit = training.objective.weighing
    state = copy.deepcopy(audit.state_dict())
    for _ in range(2):
        start_again_if_due(training)
        assert audit.ended and not audit.watching
        audit.load_state_dict(state)
        assert audit.watching and not audit.ended


def test_controls_of_the_restart_itself_always_start_again():
    for suspects, separated in (("none", False), ("network", False), ("prototype", True)):
        clean = {} if separated else {"noise": "none", "noise_rate": 0.0}
        training = audited(**clean, suspects=suspects)
        training.macro_batch()
        line = training.evaluation()
        assert line["restarted"]
        assert (line["separation"] is not None) == separated
        assert not separated or line["separation"] == training.objective.weighing.separation > 0.7


def test_random_suspects_are_as_many_and_none_are_none():
    by_prototype, random, none = (
        audited(suspects=name).objective.weighing.doubts()
        for name in ("prototype", "random", "none")
    )
    assert torch.equal(random.sort().values, by_prototype.sort().values)
    assert not torch.equal(random, by_prototype)
    assert not none.any()


def test_the_networks_suspects_are_those_it_mostly_disagreed_with():
    training = Training(changed(**AUDIT, suspects="network"), None)
    disagreed, visits = torch.zeros(216), torch.zeros(216)
    while training.step < restart_step(training.problem):
        for i in range(2):
            x, y = training.problem.micro_batch(training.step, i)
            index = training.problem.index(training.step, i)
            with torch.no_grad():
                wrong = training.model(x).argmax(1) != y
            disagreed.index_add_(0, index, wrong.float())
            visits.index_add_(0, index, torch.ones(24))
        training.macro_batch()
    report = training.objective.weighing.criterion.report()
    found = torch.zeros(216, dtype=torch.bool)
    found[report["index"]] = torch.tensor(report["is_label_issue"])
    sure = (disagreed == visits) | (disagreed == 0)
    assert sure.sum() > 40
    # a label that no answer agreed with is suspect, and one that all did is not
    assert torch.equal(found[sure], disagreed[sure] > 0)


def test_a_micro_batch_of_nothing_but_dropped_suspects_has_no_loss():
    training = audited(suspect_weight=0.0)
    training.macro_batch()
    audit = training.objective.weighing
    audit.each.zero_()
    x, y = training.problem.micro_batch(0, 0)
    index = training.problem.index(0, 0)
    assert training.objective(training.model, x, y, index, 20, 0).item() == 0


# ---------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        ({"agreement": "prototype", "loss": "elr"}, 15),
        ({"agreement": "vote", "shuffle_weights": True, "policy": "gaf", "tau": 1.0}, 15),
        (FOUND, 10),
        (FOUND, 20),
        ({**FOUND, "suspects": "plain-prototype"}, 12),
        ({**FOUND, **ADAMW, "suspects": "random", "loss": "gce"}, 13),
        ({**AUDIT, "noise": "none", "noise_rate": 0.0}, 20),
    ],
    ids=["weights", "shuffled", "in the audit", "after it", "plain", "between", "no restart"],
)
def test_an_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, changes, after):
    config = changed(**changes)
    whole = train(config, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", Stop(after=after))
    resumed = train(config, tmp_path / "cut", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    for key in ("test_accuracy", "separation", "restarted"):
        assert whole.evals[-1].get(key) == resumed.evals[-1].get(key)
    if config.audit_passes:
        assert whole.evals[-1]["restarted"] == (config.noise == "symmetric")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agreement": "prototype", "sam": 0.1}, "agreement must be 'none' with sam, mixup or"),
        ({"agreement": "loss", "audit_passes": 2.0}, "agreement must be 'none' with"),
        ({"audit_passes": 6.0}, r"audit_passes must lie in \[0, passes = 6\); got 6.0"),
        ({"audit_passes": 2.0, "policy": "gaf"}, "audit_passes must be 0 unless the policy"),
        ({"audit_passes": 2.0, "early_stopping": 2}, "audit_passes must be 0 unless the policy"),
        (
            {"audit_passes": 2.0, "optimizer": "lion"},
            "optimizer must be one of sgd, .* for an audit",
        ),
        ({"suspect_weight": 1.5}, r"suspect_weight must lie in \[0, 1\]; got 1.5"),
        ({"imbalance": 0.5}, "imbalance must be at least 1 and finite; got 0.5"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        changed(**changes)


@pytest.mark.parametrize("changes", [{"agreement": "prototype"}, {"audit_passes": 2.0}])
def test_several_ranks_judge_no_samples(changes):
    config = changed(**changes)
    assert obstacle(config) is None
    with pytest.raises(ConfigError, match="known only to the rank that drew it"):
        check_ranks(config, 2)


def test_arms_are_named_after_what_they_do():
    names = {
        "prototype weights + ELR": {"agreement": "prototype", "loss": "elr"},
        "vote weights, shuffled": {"agreement": "vote", "shuffle_weights": True},
        "audit 3 + ELR": AUDIT,
        "audit 3, random suspects + ELR": {**AUDIT, "suspects": "random"},
        "audit 3, network's suspects + ELR": {**AUDIT, "suspects": "network"},
        "audit 3, plain prototypes + ELR": {**AUDIT, "suspects": "plain-prototype"},
        "restart 3 + ELR": {**AUDIT, "suspects": "none"},
    }
    assert {changed(ema=0.0, **changes).arm: changes for changes in names.values()} == names


def test_an_evaluation_of_the_average_shows_the_weights_themselves_too():
    training = Training(changed(imbalance=20.0), None)
    for _ in range(6):
        training.macro_batch()
    line, problem = training.evaluation(), training.problem
    x, y = problem.inputs(problem.test.x), problem.test.clean
    for prefix, model in (("", training.average.module), ("own_", training.model)):
        with torch.no_grad():
            hits = (model(x).argmax(1) == y).double()
        assert line[f"{prefix}test_accuracy"] == pytest.approx(hits.mean().item())
        assert line[f"{prefix}rarest_accuracy"] == pytest.approx(hits[y == 9].mean().item())
    assert "own_heldout_accuracy" in line
