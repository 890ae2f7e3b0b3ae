"""Each technique is its published formula: closed forms, values by hand, limits.

A run that uses it resumes bit for bit.
"""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from gaf_lab.data.sampling import generator
from gaf_lab.records import checkpoint
from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training import techniques
from gaf_lab.training.engines import check_ranks
from gaf_lab.training.evaluate import evaluate
from gaf_lab.training.loop import Training
from gaf_lab.training.objective import Objective
from gaf_lab.training.run import train
from gaf_lab.training.techniques import (
    EarlyLearning,
    EarlyStopping,
    ema_model,
    generalised_cross_entropy,
    mix,
    sam_perturbation,
    update_on_device,
)
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state

CPU = torch.device("cpu")
SMALL = TrainConfig(
    dataset="digits",
    limit=240,
    model="convnet",
    k=3,
    b=12,
    passes=2.0,
    eval_every=0.5,
    lr=0.02,
    tau=0.9,
)
TIMING = ("seconds", "samples_per_second")


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


def scores_and_labels(b=7, classes=5):
    return torch.randn(b, classes, dtype=torch.float64, requires_grad=True), torch.randint(
        classes, (b,)
    )


def objective(config, samples=50, classes=5):
    return Objective(config, samples, classes, CPU)


# ---------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_generalised_cross_entropy_of_two_samples_by_hand(q):
    scores = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    expected = ((1 - 0.75**q) / q + (1 - 0.9**q) / q) / 2
    assert generalised_cross_entropy(scores, torch.tensor([1, 0]), q).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_generalised_cross_entropy_lies_between_cross_entropy_and_the_absolute_error():
    scores, y = scores_and_labels()
    log_p = scores.log_softmax(1).gather(1, y[:, None])
    # (1 - p^q) / q = -log p - q (log p)^2 / 2 + ...
    near = generalised_cross_entropy(scores, y, 1e-6)
    assert (near - cross_entropy(scores, y)).abs() <= 1e-6 * (log_p**2).mean()
    assert torch.allclose(
        generalised_cross_entropy(scores, y, 1.0), (1 - log_p.exp()).mean(), rtol=1e-12
    )


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_generalised_cross_entropy_weighs_cross_entropys_gradient_by_p_to_the_q(q):
    scores, y = scores_and_labels()
    (found,) = torch.autograd.grad(generalised_cross_entropy(scores, y, q), scores)
    p = scores.detach().softmax(1)
    weight = p.gather(1, y[:, None]) ** q
    assert torch.allclose(found, weight * (p - one_hot(y, 5)) / len(y), rtol=1e-10)


def test_generalised_cross_entropy_is_finite_where_the_model_is_sure():
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = generalised_cross_entropy(scores, torch.tensor([0, 0]), 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 / 0.7)  # right: 0; wrong: 1 / q
    assert torch.equal(scores.grad, torch.zeros(2, 2))


def early(beta=0.7, weight=3.0):
    loss = EarlyLearning(20, 5, beta, weight, CPU)
    loss.targets = loss.targets.double()
    return loss


def test_early_learnings_targets_are_running_averages_of_what_was_said_of_each_sample():
    loss = early(beta=0.6)
    first, second = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    y = torch.zeros(3, dtype=torch.int64)
    loss(first, y, torch.tensor([4, 9, 2]))
    loss(second, y, torch.tensor([9, 7, 4]))
    p, q = first.softmax(1), second.softmax(1)
    expected = torch.zeros(20, 5, dtype=torch.float64)
    expected[[2, 4, 9, 7]] = torch.stack(
        [0.4 * p[2], 0.24 * p[0] + 0.4 * q[2], 0.24 * p[1] + 0.4 * q[0], 0.4 * q[1]]
    )
    assert torch.allclose(loss.targets, expected, rtol=1e-12)


def test_early_learnings_gradient_is_the_papers():
    """Lemma 2 of arXiv 2007.00151: p - y + lambda g.

    g_c = p_c / (1 - <p, t>) sum_j (t_j - t_c) p_j.
    """
    loss = early(weight=2.5)
    loss.targets = torch.rand(20, 5, dtype=torch.float64).softmax(1)
    scores, y = scores_and_labels()
    index = torch.arange(7) + 3
    (found,) = torch.autograd.grad(loss(scores, y, index), scores)
    p, t = scores.detach().softmax(1), loss.targets[index]
    pull = torch.stack(
        [p[:, c] / (1 - (p * t).sum(1)) * ((t - t[:, c, None]) * p).sum(1) for c in range(5)], 1
    )
    assert torch.allclose(found, (p - one_hot(y, 5) + 2.5 * pull) / len(y), rtol=1e-10)
    # a step against it moves each sample to the class that its target has
    assert (pull.argmin(1) == t.argmax(1)).all()


def test_early_learning_of_weight_0_is_cross_entropy():
    scores, y = scores_and_labels()
    assert torch.equal(early(weight=0.0)(scores, y, torch.arange(7)), cross_entropy(scores, y))


def test_early_learning_is_finite_where_the_model_and_the_target_are_sure():
    loss = EarlyLearning(1, 2, 0.0, 1.0, CPU)
    scores = torch.tensor([[1e4, -1e4]], requires_grad=True)
    found = loss(scores, torch.tensor([0]), torch.tensor([0]))
    found.backward()
    # p and t are held 1e-4 off 0 and 1
    assert found.item() == pytest.approx(math.log(2e-4), rel=1e-3)
    assert bool(scores.grad.isfinite().all())


def test_label_smoothing_spreads_its_share_evenly_over_all_classes():
    scores, y = scores_and_labels()
    found = objective(changed(label_smoothing=0.2)).of(scores, y, y)
    labels = 0.8 * one_hot(y, 5).double() + 0.2 / 5
    assert torch.allclose(found, -(labels * scores.log_softmax(1)).sum(1).mean(), rtol=1e-12)


@pytest.mark.parametrize(
    "changes", [{}, {"loss": "gce"}, {"loss": "elr"}, {"label_smoothing": 0.1}, {"mixup": 0.5}]
)
def test_scores_in_bfloat16_lose_nothing_more_in_the_loss(changes):
    scores = 8 * torch.randn(6, 5).bfloat16()
    y, index, x = torch.randint(5, (6,)), torch.arange(6), torch.randn(6, 1)
    config = changed(**changes)
    half, single = (
        objective(config)(lambda x, s=s: s, x, y, index, 0, 0) for s in (scores, scores.float())
    )
    assert half.dtype == torch.float32
    assert torch.equal(half, single)


# ---------------------------------------------------------------------------------- mixup


def test_mixup_mixes_pictures_and_labels_with_the_same_share_and_partner():
    x, y = torch.randn(6, 2, 3, 3), torch.arange(6)
    found, other, m = mix(x, y, 0.4, 0, 5, 1)
    # the partners are the same samples in another order
    assert sorted(other.tolist()) == y.tolist()
    assert torch.allclose(found, m * x + (1 - m) * x[other])
    again, different = mix(x, y, 0.4, 0, 5, 1), mix(x, y, 0.4, 0, 5, 2)
    assert torch.equal(found, again[0])
    assert m != different[2]


def test_mixups_loss_is_cross_entropy_with_the_mixed_labels():
    x, y = torch.randn(6, 4), torch.randint(5, (6,))
    net = nn.Linear(4, 5)
    found = objective(changed(mixup=0.8))(net, x, y, torch.arange(6), 3, 2)
    blend, other, m = mix(x, y, 0.8, SMALL.seed, 3, 2)
    assert torch.allclose(
        found, cross_entropy(net(blend), m * one_hot(y, 5) + (1 - m) * one_hot(other, 5))
    )


def test_mixup_with_all_of_the_picture_is_no_mixup(monkeypatch):
    monkeypatch.setattr(techniques.random.Random, "betavariate", lambda self, a, b: 1.0)
    x, y, net = torch.randn(6, 4), torch.randint(5, (6,)), nn.Linear(4, 5)
    found, plain = (
        objective(changed(mixup=alpha))(net, x, y, torch.arange(6), 0, 0) for alpha in (1.0, 0.0)
    )
    assert torch.equal(found, plain)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixups_share_is_beta_distributed(alpha):
    x, y, n = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 2000
    m = torch.tensor([mix(x, y, alpha, 0, step)[2] for step in range(n)], dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(m.mean() - 0.5) < 5 * math.sqrt(variance / n)
    # a sample variance's standard deviation is at most that of a two-point distribution's
    # square, (1/4) / sqrt(n)
    assert abs(m.var() - variance) < 5 * 0.25 / math.sqrt(n)


def test_mixup_keeps_the_memory_layout():
    x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
    assert mix(x, torch.arange(4), 1.0, 0)[0].is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------- SAM


def small_net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


def gradients(net, weights, x, y):
    """Of the loss at `weights`, by a second path that touches nothing of the net."""
    leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    loss = cross_entropy(functional_call(net, leaves | buffers, (x,)), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def climbed(net, x, y, radius):
    """SAM's weights by hand."""
    weights = {name: p.detach() for name, p in net.named_parameters()}
    g = gradients(net, weights, x, y)
    norm = math.sqrt(sum(float((v**2).sum()) for v in g.values()))
    return {name: w + radius * g[name] / norm for name, w in weights.items()}


def test_sam_climbs_by_its_radius_along_the_gradient_and_takes_the_gradient_there():
    net, x, y = small_net(), torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    there = climbed(net, x, y, 0.3)
    expected = gradients(net, there, x, y)
    with sam_perturbation(net, cross_entropy(net(x), y), 0.3):
        moved = torch.cat(
            [(p.detach() - before[name]).flatten() for name, p in net.named_parameters()]
        )
        cross_entropy(net(x), y).backward()
    assert moved.norm().item() == pytest.approx(0.3, rel=1e-10)
    for name, p in net.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-8, atol=1e-12)
        assert torch.equal(p, before[name])  # bit for bit


@pytest.mark.parametrize("momentum", [0.1, None])
def test_sam_moves_batch_norms_statistics_and_count_once(momentum):
    net, x, y = small_net(), torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    net[1].momentum = momentum
    once = copy.deepcopy(net)
    for _ in range(2):
        once(x)
        with sam_perturbation(net, cross_entropy(net(x), y), 0.3):
            net(x)
    assert_same(dict(once.named_buffers()), dict(net.named_buffers()))
    assert net[1].num_batches_tracked == 2


def test_sam_puts_the_weights_back_where_the_second_pass_fails():
    net, x, y = small_net(), torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    before = copy.deepcopy(net.state_dict())
    loss = cross_entropy(net.eval()(x), y)
    with pytest.raises(KeyError), sam_perturbation(net.train(), loss, 0.3):
        raise KeyError
    assert_same(dict(before), dict(net.state_dict()))
    assert net[1].track_running_stats


def update_of(autocast, sam):
    """The change of the weights by a step of averaging at rate 1, and the same in float64."""
    training = Training(
        changed(model="mlp", policy="mean", sam=sam, momentum=0.0, lr=1.0, autocast=autocast), None
    )
    net = copy.deepcopy(training.model).double()
    batches = [(x.double(), y) for x, y in (training.problem.micro_batch(0, i) for i in range(3))]
    rows = [gradients(net, climbed(net, x, y, sam), x, y) for x, y in batches]
    training.macro_batch()
    pairs = zip(net.parameters(), training.model.parameters(), strict=True)
    found = torch.cat([(before - after.double()).flatten() for before, after in pairs])
    return found.detach(), torch.cat(
        [sum(row[name] for row in rows).flatten() / 3 for name in rows[0]]
    )


def test_a_step_with_sam_averages_the_micro_batches_gradients_each_at_its_own_climb():
    found, expected = update_of("none", 0.5)
    assert (found - expected).norm() < 1e-5 * expected.norm()  # float32 against float64
    half = update_of("bfloat16", 0.5)[0]
    plain = update_of("none", 0.0)[0]
    # weights that were cast to bfloat16 for the first pass are cast anew for the second
    assert (half - expected).norm() < 0.05 * expected.norm() < 0.2 * (plain - expected).norm()


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_sam_lets_an_accepted_micro_batch_move_batch_norms_statistics_as_one_pass(autocast):
    """With one micro-batch, bn="accepted" and "all" are the same thing."""
    states = []
    for bn in ("all", "accepted"):
        training = Training(changed(policy="mean", sam=0.1, k=1, bn=bn, autocast=autocast), None)
        training.macro_batch()
        states.append(dict(training.model.state_dict()))
    # the replayed move is float32 arithmetic of its own
    assert all(
        torch.allclose(a.double(), b.double(), atol=1e-6)
        for a, b in zip(states[0].values(), states[1].values(), strict=True)
    )
    assert states[0]["1.num_batches_tracked"] == 1


# ---------------------------------------------------------------------------------- EMA of weights


def test_the_average_follows_the_recursion_over_steps_taken_and_is_what_is_evaluated():
    training = Training(changed(ema=0.8), None)
    expected, taken = None, []
    for _ in range(10):
        before = copy.deepcopy(training.average.state_dict())
        stepped = training.macro_batch().stepped
        taken.append(stepped)
        now = {
            name: t.double()
            for name, t in training.model.state_dict().items()
            if t.is_floating_point()
        }
        if stepped:
            expected = (
                now
                if expected is None
                else {name: 0.8 * expected[name] + 0.2 * t for name, t in now.items()}
            )
        else:
            assert_same(dict(before), dict(training.average.state_dict()))
    assert 2 < sum(taken) < 10  # both kinds occur
    found = training.average.module.state_dict()
    assert all(torch.allclose(found[name].double(), t, atol=1e-6) for name, t in expected.items())
    assert {"1.running_mean", "1.running_var"} <= set(expected)
    own, average = (
        evaluate(model, training.problem) for model in (training.model, training.average.module)
    )
    line = training.evaluation()
    assert {key: line[key] for key in average} == average != own


# ---------------------------------------------------------------------------------- early stopping


def test_early_stopping_counts_looks_without_a_better_one_and_keeps_the_best():
    stopping, model, over = EarlyStopping(2), nn.Linear(1, 1), []
    for i, accuracy in enumerate((0.3, 0.5, 0.5, 0.6, 0.6, 0.1)):
        nn.init.constant_(model.weight, i)
        stopping.look(accuracy, model)
        over.append(stopping.over)
    assert over == [False] * 5 + [True]
    stopping.put_back(model)
    assert model.weight.item() == 3  # the first of those at 0.6


@pytest.fixture
def accuracies(monkeypatch):
    """Held-out accuracies that evaluations return, one for each new state of the weights.

    The same state gets the same accuracy.
    """
    wanted, seen = [], {}

    def evaluate(model, problem):
        state = tuple(float(p.detach().double().sum()) for p in model.parameters())
        value = seen.setdefault(state, wanted[len(seen)] if len(seen) < len(wanted) else 0.0)
        return {
            "heldout_accuracy": value,
            "heldout_loss": 1.0,
            "test_accuracy": value,
            "test_loss": 1.0,
        }

    monkeypatch.setattr("gaf_lab.training.evaluate.evaluate", evaluate)
    return wanted


PATIENT = changed(early_stopping=2, passes=4.0, policy="mean", k=2)


def test_a_run_ends_at_the_right_evaluation_with_its_best_weights(accuracies, tmp_path):
    accuracies += [0.2, 0.5, 0.4, 0.5, 0.9]
    run = train(PATIENT, tmp_path / "run", Silent())
    assert run.end["status"] == "finished"
    # of the best, at the end
    assert [line["test_accuracy"] for line in run.evals] == [0.2, 0.5, 0.4, 0.5]
    best = train(
        dataclasses.replace(PATIENT, early_stopping=0),
        tmp_path / "best",
        Silent(),
        steps=run.evals[1]["step"],
    )
    assert best.evals[-1]["step"] == run.evals[1]["step"]
    assert_same(final_state(tmp_path / "best")["model"], final_state(tmp_path / "run")["model"])


def test_a_run_that_is_never_stopped_early_ends_at_its_best_weights_too(accuracies, tmp_path):
    accuracies += [0.2, 0.3, 0.5, 0.4]
    run = train(dataclasses.replace(PATIENT, passes=2.0), tmp_path / "run", Silent())
    assert [line["test_accuracy"] for line in run.evals] == [0.2, 0.3, 0.5, 0.5]
    train(
        dataclasses.replace(PATIENT, passes=2.0, early_stopping=0),
        tmp_path / "best",
        Silent(),
        steps=run.evals[2]["step"],
    )
    assert_same(final_state(tmp_path / "best")["model"], final_state(tmp_path / "run")["model"])


@pytest.mark.parametrize("beyond", [0, 1], ids=["at an evaluation", "between two"])
def test_a_run_that_stops_early_can_be_interrupted_and_resumed(accuracies, tmp_path, beyond):
    accuracies += [0.2, 0.5, 0.4, 0.5]
    whole = train(PATIENT, tmp_path / "whole", Silent())
    cut = whole.evals[2]["step"] + beyond
    accuracies.append(0.99)  # for what a run that ends between evaluations shows: it must not count
    train(PATIENT, tmp_path / "cut", Silent(), steps=cut)
    resumed = train(PATIENT, tmp_path / "cut", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert (resumed.end["status"], resumed.evals[-1]["step"]) == (
        "finished",
        whole.evals[-1]["step"],
    )


def test_a_run_stopped_early_and_killed_before_its_end_line_takes_no_further_step(
    accuracies, tmp_path
):
    accuracies += [0.5, 0.4, 0.4]
    whole = train(PATIENT, tmp_path, Silent())
    path = tmp_path / records.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    resumed = train(PATIENT, tmp_path, Silent(), resume=True)
    assert (resumed.evals, resumed.end["status"]) == (whole.evals, "finished")


# ---------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "elr", "policy": "random-skip", "ema": 0.9},
        {"sam": 0.05, "bn": "accepted", "autocast": "bfloat16", "channels_last": True},
        {
            "mixup": 0.4,
            "label_smoothing": 0.1,
            "optimizer": "adamw",
            "lr": 0.002,
            "policy": "mean",
            "ema": 0.5,
            "early_stopping": 2,
        },
        {
            "loss": "gce",
            "scope": "group",
            "schedule": "cosine",
            "schedule_waits": True,
            "optimizer": "adamw",
            "lr": 0.002,
        },
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_an_interrupted_run_that_is_resumed_ends_bit_for_bit_as_an_undisturbed_one(
    tmp_path, changes
):
    config = changed(**changes)
    whole = train(config, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", Stop(after=whole.evals[-1]["step"] // 2 + 2))
    resumed = train(config, tmp_path / "cut", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    for a, b in zip(whole.evals, resumed.evals, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMING} == {
            k: v for k, v in b.items() if k not in TIMING
        }


def test_a_checkpoint_from_before_the_techniques_is_resumed(tmp_path):
    train(SMALL, tmp_path / "whole", Silent())
    train(SMALL, tmp_path / "old", Silent(), steps=8)
    state = torch.load(tmp_path / "old" / checkpoint.CHECKPOINT_FILE, weights_only=True)
    checkpoint.save(
        tmp_path / "old",
        {
            name: value
            for name, value in state.items()
            if name not in ("objective", "average", "stopping")
        },
    )
    train(SMALL, tmp_path / "old", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "old"))


def test_a_difference_to_a_run_from_before_the_techniques_names_what_differs_alone(tmp_path):
    train(SMALL, tmp_path, Silent(), steps=8)
    path = tmp_path / records.FILE
    older = path.read_text()
    for gone in (', "sam": 0.0', ', "ema": 0.0', ', "label": ""'):
        assert gone in older
        older = older.replace(gone, "")
    path.write_text(older)
    with pytest.raises(
        checkpoint.CheckpointError,
        match="must be of the same config; ema: 0.0 there, 0.9 here. Resume",
    ):
        train(changed(ema=0.9), tmp_path, Silent(), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": "elr", "sam": 0.1},
            "loss elr goes neither with sam nor with mixup; got 'elr'. Set both to 0",
        ),
        ({"loss": "elr", "mixup": 0.1}, "loss elr goes neither with sam nor with mixup"),
        (
            {"loss": "gce", "label_smoothing": 0.1},
            r"label_smoothing must lie in \[0, 1\), and goes with cross-entropy alone; "
            "got 0.1. Set",
        ),
        (
            {"loss": "elr", "label_smoothing": 0.1},
            "label_smoothing must lie .* goes with cross-entropy alone",
        ),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"gce_q": 0.0}, r"gce_q must lie in \(0, 1\]; got 0.0"),
        ({"elr_beta": 1.0}, r"elr_beta must lie in \[0, 1\)"),
        ({"elr_lambda": -1.0}, "elr_lambda must be at least 0"),
        ({"mixup": float("inf")}, "mixup must be at least 0"),
        ({"sam": -0.1}, "sam must be at least 0"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
        (
            {"early_stopping": 1, "heldout": 0.0},
            "early_stopping must be at least 0, and needs heldout above 0; got 1",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        changed(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": "elr"},
            "loss must not be 'elr' on several ranks, .*; got 'elr' on 3 ranks. Run one process",
        ),
        ({"compile": True}, "compile must be off on several ranks; got it on 3. Set --no-compile"),
        (
            {"scope": "group"},
            "scope must be 'all' on several ranks, .*; got 'group' on 3 ranks. Run one process",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_ranks(changed(**changes), 3)
    check_ranks(changed(**changes), 1)


def test_the_permutation_of_mixup_moves_no_other_draw():
    before = torch.get_rng_state()
    mix(torch.zeros(5, 1), torch.arange(5), 1.0, 0, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert (
        generator(0, "mixup order", 1).initial_seed() != generator(0, "augment", 1).initial_seed()
    )


@pytest.mark.parametrize("metric", ["optimizer", "whitened"])
def test_a_run_in_another_metric_trains_and_resumes(tmp_path, metric):
    config = TrainConfig(
        dataset="digits",
        optimizer="adam",
        lr=0.002,
        metric=metric,
        threshold="auto",
        passes=2.0,
        eval_every=1.0,
    )
    assert config.arm == f"GAF, tau auto, {metric} metric, Adam"
    plain = dataclasses.replace(config, metric="euclidean")
    whole = train(config, tmp_path / "whole", Silent())
    train(config, tmp_path / "cut", Silent(), steps=12)
    train(config, tmp_path / "cut", Silent(), resume=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    other = train(plain, tmp_path / "plain", Silent())
    assert whole.evals[-1]["distance_mean"] != other.evals[-1]["distance_mean"]


def test_the_optimizers_metric_needs_its_second_moments():
    with pytest.raises(ConfigError, match="metric needs the second moments of adam, adamw or rms"):
        TrainConfig(metric="optimizer")


def test_an_average_updated_on_the_device_is_the_same_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    plain, ours = ema_model(model, 0.9), ema_model(model, 0.9)
    for stepped in (False, True, True, False, True):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        for _ in range(20):
            model(torch.randn(5, 3))  # moves BatchNorm's statistics and its count
        if stepped:
            plain.update_parameters(model)
        update_on_device(ours, model, 0.9, torch.tensor(stepped))
        for (name, a), b in zip(
            plain.state_dict().items(), ours.state_dict().values(), strict=True
        ):
            assert a.dtype == b.dtype
            assert torch.allclose(a, b, atol=1e-6), name
    assert int(ours.n_averaged) == 3
    before = copy.deepcopy(ours.state_dict())
    model[1].running_mean[0] = torch.inf  # as after an overflow in a micro-batch that was rejected
    update_on_device(ours, model, 0.9, torch.tensor(False))
    assert_same(dict(before), dict(ours.state_dict()))
