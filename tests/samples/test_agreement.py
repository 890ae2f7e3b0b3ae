"""gaf.SampleAgreement: its numbers by hand, the samples that it finds, and where it can stand."""

import copy
import gc
import math
import warnings
import weakref
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize, one_hot
from torch.optim import SGD

import gaf
from gaf.samples.class_statistics import ClassStatistics, separation
from gaf.samples.judge import soft_weights
from gaf.samples.scores import prototype_cosines
from helpers.comparing import same
from helpers.samples import C, Net, auroc, clusters, cosines, per_sample_rows, train


def criterion_for(net: Net, score: Any = "prototype", **options: Any) -> gaf.SampleAgreement:
    options = {"warmup": 0} | options
    return gaf.SampleAgreement(nn.CrossEntropyLoss(reduction="none"), net.head, score, **options)


# --- numbers


def strength(doubtful: Tensor) -> Tensor:
    return (doubtful.minimum(1 - doubtful) / 0.3).clamp(max=1)


@pytest.mark.parametrize("refine", [False, True])
def test_prototypes_and_statistics_are_decayed_means_of_the_steps_before(refine: bool) -> None:
    """Refined, a judged sample counts only where its label's prototype is the nearest."""
    model, (x, y, _) = Net(), clusters(60, wrong=0.3)
    criterion, left_out = criterion_for(model, refine=refine), 0
    labels = [y[:20].clamp(max=1), y[20:40], y[40:]]  # class 2 is not in the first batch
    sums, counts = torch.zeros(C, 8), torch.zeros(C)
    seen: list[tuple[Tensor, Tensor]] = []
    for x_, y_ in zip(x.split(20), labels, strict=True):
        unit = normalize(model.body(x_), dim=1).detach()
        similarity = cosines(unit, sums / counts[:, None])  # NaN for a class without
        criterion(model(x_), y_)
        scores = torch.full((20,), torch.nan)
        for i in range(20 if counts.any() else 0):
            others = [v for k, v in enumerate(similarity[i].tolist()) if k != y_[i] and v == v]
            scores[i] = similarity[i, y_[i]] - max(others)
        seen.append((scores, y_))
        members = one_hot(y_, C).float()
        if refine and counts.any():
            nearest = similarity.nan_to_num(nan=-9).argmax(1)
            out = (nearest != y_) & ~scores.isnan()
            members[out] = 0
            left_out += int(out.sum())
        there = members.any(0)
        sums = torch.where(there[:, None], 0.9 * sums + members.T @ unit, sums)
        counts = torch.where(there, 0.9 * counts + members.sum(0), counts)
    assert bool(left_out) == refine
    criterion.state_dict()  # adds the last step
    torch.testing.assert_close(criterion.statistics.prototypes(), sums / counts[:, None])
    (before, their), (scores, y_) = seen[1:]
    for c in range(C):
        first, second = before[(their == c) & ~before.isnan()], scores[y_ == c]
        w = torch.cat([torch.full_like(first, 0.9), torch.ones_like(second)])
        both = torch.cat([first, second])
        mean = (w * both).sum() / w.sum()
        torch.testing.assert_close(criterion.statistics.mean[c], mean)
        deviation = ((w * (both - mean) ** 2).sum() / w.sum()).sqrt()
        torch.testing.assert_close(
            criterion.statistics.deviation[c], deviation, rtol=1e-4, atol=1e-5
        )


def test_the_separation_is_that_of_decayed_sums() -> None:
    statistics = ClassStatistics(3, 2, 1, torch.device("cpu"))
    labels, guesses = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 1, 0])
    unit, ones = torch.ones(5, 2) / 2**0.5, torch.ones(5)
    steps = [[0.2, -0.1, -0.3, 0.4, -0.3], [0.4, -0.2, math.nan, 0.5, -0.04]]
    for scores in steps:
        step = unit, torch.tensor(scores), labels, guesses, ones
        statistics.absorb(statistics.sums_of(*step, part=0))
    mean_0 = (0.9 * (0.2 - 0.1 - 0.3) + 0.4 - 0.2) / (0.9 * 3 + 2)
    mean_1 = (0.9 * (0.4 - 0.3) + 0.5 - 0.04) / (0.9 * 2 + 2)
    own_0, other_0 = (0.9 * 0.2 + 0.4) / 1.9, (0.9 * (-0.1 - 0.3) - 0.2) / (0.9 * 2 + 1)
    own_1, other_1 = (0.9 * 0.4 + 0.5) / 1.9, (0.9 * -0.3 - 0.04) / 1.9
    between = 1.9 * (own_0 - mean_0) ** 2 + 2.8 * (other_0 - mean_0) ** 2
    between += 1.9 * (own_1 - mean_1) ** 2 + 1.9 * (other_1 - mean_1) ** 2
    squares = 0.9 * (0.04 + 0.01 + 0.09 + 0.16 + 0.09) + 0.16 + 0.04 + 0.25 + 0.0016
    whole = squares - 4.7 * mean_0**2 - 3.8 * mean_1**2
    assert float(statistics.separation) == pytest.approx(between / whole, abs=1e-5)


def test_the_loss_is_the_weighted_mean_by_the_formula() -> None:
    model, (x, y, _) = Net(), clusters(180, wrong=0.4)
    criterion = criterion_for(model)
    for _ in range(3):
        for x_, y_ in zip(x[:150].split(30), y[:150].split(30), strict=True):
            criterion(model(x_), y_)
    criterion.state_dict()
    twin = copy.deepcopy(criterion.statistics)
    x_, y_ = x[150:], y[150:]
    outputs = model(x_)
    losses = cross_entropy(outputs, y_, reduction="none")
    loss = criterion(outputs, y_)
    similarity = cosines(model.body(x_), twin.prototypes())
    own = similarity.gather(1, y_[:, None])[:, 0]
    s = own - similarity.masked_fill(one_hot(y_, C).bool(), -9).amax(1)
    apart = ((twin.separation - 0.7) / 0.05).clamp(0, 1)
    assert apart > 0
    a = (strength(twin.doubt) * apart)[y_]
    w = 1 - a * (1 - torch.sigmoid(4 * (s - twin.mean[y_]) / twin.deviation[y_]))
    assert w.min() < 0.9 < w.max()
    torch.testing.assert_close(criterion.weights, w.detach())
    torch.testing.assert_close(loss, (w.detach() * losses).sum() / w.detach().sum())
    (grad,) = torch.autograd.grad(loss, [model.head.weight], retain_graph=True)
    direct = torch.autograd.grad((w.detach() * losses).sum() / w.detach().sum(), model.head.weight)
    torch.testing.assert_close(grad, direct[0])


def test_scaled_cosines_by_hand() -> None:
    """Three classes: one has a short prototype, as if its samples differed, and one has none."""
    prototypes = torch.tensor([[0.8, 0.6, 0], [0.3, 0, 0.4], [math.nan] * 3])
    square = [(0.64 + 0.09) / 2, 0.18, 0.08]
    r = [math.sqrt(each + sum(square) / 30) for each in square]
    h = [0.6, 0.0, 0.8]
    want = [
        sum(a * b / c**2 for a, b, c in zip(h, row, r, strict=True))
        / math.sqrt(sum((a / c) ** 2 for a, c in zip(h, r, strict=True)))
        / math.sqrt(sum((b / c) ** 2 for b, c in zip(row, r, strict=True)))
        for row in prototypes[:2].tolist()
    ]
    found = prototype_cosines(torch.tensor([h]), prototypes)[0]
    torch.testing.assert_close(found[:2], torch.tensor(want))
    assert found[2].isnan()
    assert torch.equal(prototype_cosines(torch.zeros(2, 3), torch.zeros(4, 3)), torch.zeros(2, 4))


def test_neither_alike_samples_nor_a_feature_of_all_classes_decide() -> None:
    """By inner products both samples would be nearer to class 0; they point to class 1."""
    alike = torch.tensor([[1.0, 0, 0], [0, 0.3, 0]])  # class 1 has a prototype of length 0.3
    h = torch.tensor([[0.6, 0.8, 0]])
    assert (h @ alike.T).argmax() == 0
    assert prototype_cosines(h, alike).argmax() == 1
    shared = torch.tensor([[1, 0.3, 0], [1, 0, 0.1]])  # the first feature is large in all
    h = torch.tensor([[1, 0.2, 0.15]])
    assert (h @ shared.T).argmax() == (normalize(h) @ normalize(shared).T).argmax() == 0
    assert prototype_cosines(h, shared).argmax() == 1


@pytest.mark.parametrize(
    ("doubtful", "lightest"), [(0, 1), (0.15, 0.5), (0.3, 0), (0.7, 0), (0.9, 2 / 3), (1, 1)]
)
def test_weights_fade_where_nearly_all_labels_look_right_or_nearly_all_wrong(
    doubtful: float, lightest: float
) -> None:
    assert lightest_weight(doubtful, 0.75) == pytest.approx(lightest, abs=1e-5)


@pytest.mark.parametrize(
    ("separation", "lightest"), [(0.5, 1), (0.7, 1), (0.7125, 0.75), (0.75, 0), (1, 0)]
)
def test_weights_fade_where_scores_have_one_mode(separation: float, lightest: float) -> None:
    assert lightest_weight(0.4, separation) == pytest.approx(lightest, abs=1e-5)


def lightest_weight(doubtful: float, separation: float) -> float:
    """That of a score far below its class's mean, which is 0 here, with deviation 1."""
    statistics = ClassStatistics(2, 1, 1, torch.device("cpu"))
    within = 100 * doubtful * (1 - doubtful)
    others = math.sqrt(100 * separation * within)
    statistics.scores[0] = torch.tensor([100.0, 0.0, 100.0, 100 * doubtful, others])
    if not within:  # a second class decides
        statistics.scores[1] = torch.tensor([1e4, 0.0, 1e4, 5e3, 5e3])
    return float(soft_weights(torch.tensor([-50.0]), torch.tensor([0]), statistics, True))


def test_the_separation_is_the_share_of_variance_between_doubtful_and_other_samples() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(60, dtype=torch.float64), torch.arange(60) % 3
    labels[labels == 2] = 3  # class 2 has no samples
    doubtful = torch.rand(60) < 0.4
    doubtful[labels == 3] = False  # within it nothing lies between groups
    between = within = 0.0
    for c in (0, 1, 3):
        own, bad = scores[labels == c], doubtful[labels == c]
        within += float((own - own.mean()).square().sum())
        for group in (own[bad], own[~bad]):
            if len(group):
                between += len(group) * float((group.mean() - own.mean()).square())
    found = separation(sums_by_class(scores, labels, doubtful))
    assert float(found) == pytest.approx(between / within, abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "share"),
    [
        (torch.linspace(-1, 1, 10_000), 3 / 4),
        (torch.special.ndtri((torch.arange(10_000) + 0.5) / 10_000), 2 / math.pi),
        (torch.tensor([-0.3, 0.5]), 1),
        (torch.tensor([0.2, 0.4]), 0),
        (torch.tensor([]), 0),
    ],
    ids=["uniform", "normal", "two points", "none doubtful", "none"],
)
def test_the_separation_of_known_distributions(scores: Tensor, share: float) -> None:
    labels = torch.zeros(len(scores), dtype=torch.int64)
    found = separation(sums_by_class(scores.double(), labels, scores < 0))
    assert float(found) == pytest.approx(share, abs=1e-3)


def test_a_class_whose_doubts_have_decayed_adds_nothing_between() -> None:
    """Of them rounding is left, divided by nearly nothing."""
    sums = torch.tensor([[1000.0, 500, 300, 1e-12, 500.0003], [0, 0, 0, 0, 0], [2, 0, 0, 1, 1]])
    assert separation(sums[:2]) == 0
    assert 0 <= separation(sums) <= 1


def test_without_prototypes_belief_is_full() -> None:
    assert ClassStatistics(3, 0, 1, torch.device("cpu")).separation == 1


def sums_by_class(scores: Tensor, labels: Tensor, doubtful: Tensor) -> Tensor:
    others = scores * ~doubtful
    columns = [torch.ones_like(scores), scores, scores.square(), doubtful.double(), others]
    return torch.zeros(4, 5, dtype=scores.dtype).index_add_(0, labels, torch.stack(columns, 1))


@pytest.mark.parametrize("layers", ["head", "all"])
def test_votes_are_cosines_of_gradients(layers: str) -> None:
    model, (x, y, _) = Net(), clusters(12)
    options = {"model": model} if layers == "all" else {}
    criterion = criterion_for(model, "vote", **options)
    y[:4] = torch.tensor([0, 0, 0, 1])
    y[4:] = 2
    loss = criterion(model(x), y, index=range(12))
    unit = normalize(per_sample_rows(model, x, y, "head" if layers == "head" else ""), dim=1)
    K = unit @ unit.T
    report = criterion.report()
    assert report["index"] == [0, 1, 2, *range(4, 12)]  # the only one of its class has no vote
    want = [(K[i, :3].sum() - K[i, i]) / 2 for i in range(3)]
    want += [(K[i, 4:].sum() - K[i, i]) / 7 for i in range(4, 12)]
    torch.testing.assert_close(torch.tensor(report["vote"]), torch.stack(want))
    loss.backward()  # the graph is kept
    direct = torch.autograd.grad(cross_entropy(model(x), y), [*model.parameters()])
    torch.testing.assert_close([p.grad for p in model.parameters()], [*direct])


def test_all_layers_vote_in_the_weights_too() -> None:
    """Over steps, with an ignored sample and one without a gradient; against rows one by one."""
    model, (x, y, _) = Net(), clusters(40, wrong=0.3)
    criterion = criterion_for(model, "vote", model=model)
    statistics = copy.deepcopy(criterion.statistics)
    for number in range(3):
        y[number] = -100
        loss = criterion(model(x), y)
        known, c = y >= 0, y.clamp(min=0)
        unit = normalize(per_sample_rows(model, x, c), dim=1)
        same_label = (y == y[:, None]) & known & ~torch.eye(40, dtype=torch.bool)
        s = torch.where(same_label, unit @ unit.T, 0).sum(1) / same_label.sum(1)
        a = strength(statistics.doubt[c])
        w = 1 - a * (1 - torch.sigmoid(4 * (s - statistics.mean[c]) / statistics.deviation[c]))
        w = torch.where(w.isfinite(), w, 1) * known
        torch.testing.assert_close(criterion.weights, w)
        losses = cross_entropy(model(x), y, reduction="none")
        torch.testing.assert_close(loss, (w * losses).sum() / w.sum())
        criterion.state_dict()
        statistics = copy.deepcopy(criterion.statistics)
    assert w[known].min() < 0.9


WARMUPS: dict[str, Any] = {
    "weigh=False": {"weigh": False},
    "warm-up": {"warmup": 2},
    "visits": {"warmup": None},
}


@pytest.mark.parametrize("where", ["evaluation", "no gradients", *WARMUPS])
def test_the_plain_mean_where_nothing_is_weighed(where: str) -> None:
    model, (x, y, _) = Net(), clusters(40, wrong=0.4)
    criterion = criterion_for(model, **WARMUPS.get(where, {}))
    index = range(40) if where == "visits" else None
    criterion.train(where != "evaluation")
    with torch.set_grad_enabled(where != "no gradients"):
        for _ in range(2):
            want = cross_entropy(model(x), y)
            torch.testing.assert_close(criterion(model(x), y, index=index), want)
    assert (criterion.steps == 0) == (where in ("evaluation", "no gradients"))
    criterion.train()
    for _ in range(20 if where in ("visits", "warm-up") else 0):
        criterion(model(x), y, index=index)
    loss, plain = criterion(model(x), y, index=index), cross_entropy(model(x), y)
    assert torch.isclose(loss, plain) == (where in ("evaluation", "no gradients", "weigh=False"))


def test_ignored_samples_count_nowhere() -> None:
    model, (x, y, _) = Net(), clusters(40, wrong=0.3)
    twin = copy.deepcopy(model)
    one, other = criterion_for(model), criterion_for(twin)
    more = torch.cat([y, torch.full((5,), -100)])
    for _ in range(3):
        loss = one(model(torch.cat([x, x[:5] + 9])), more, index=range(45))
        torch.testing.assert_close(loss, other(twin(x), y, index=range(40)))
    torch.testing.assert_close(
        one.state_dict()["statistics.scores"], other.state_dict()["statistics.scores"]
    )
    assert one.report()["index"] == other.report()["index"] == list(range(40))


def test_probabilities_are_like_their_classes() -> None:
    model, (x, y, _) = Net(), clusters(40, wrong=0.3)
    one, other = criterion_for(model), criterion_for(model)
    for _ in range(3):
        loss = one(model(x), y)
        torch.testing.assert_close(other(model(x), one_hot(y, C).float()), loss)
    assert same(one.state_dict(), other.state_dict())


# --- what it finds


@pytest.mark.parametrize("score", ["prototype", "vote", "loss"])
def test_wrong_labels_are_found_and_counted(score: str) -> None:
    model, (x, y, wrong) = Net(), clusters(600, wrong=0.3)
    criterion = criterion_for(model, score, weigh=False)
    train(model, criterion, x, y, passes=4)
    report = criterion.report()
    assert report["index"] == list(range(600)) and report["given_label"] == y.tolist()
    assert auroc(torch.tensor(report["label_quality"]), wrong) > 0.95
    assert abs(criterion.count_issues() - wrong.sum()) < 40
    assert all(0 <= q <= 1 for q in report["label_quality"])
    frame = pandas.DataFrame(report)
    assert len(frame) == 600 and frame["is_label_issue"].dtype == bool
    assert {score, "loss", "disagreement", "visits", "predicted_label"} < set(frame.columns)
    if score != "prototype":
        share = frame.groupby("given_label")["is_label_issue"].transform("mean")
        expected = strength(torch.tensor(share.to_numpy())) * torch.tensor(report["is_label_issue"])
        torch.testing.assert_close(torch.tensor(report["doubt"]).double(), expected)
    else:  # clusters that lie apart: nearly every wrong label is believed to be
        assert torch.tensor(report["doubt"])[wrong].mean() > 0.8
        assert torch.tensor(report["doubt"])[~wrong].mean() < 0.05
    # the clusters lie apart: what a suspect is taken for is what it is
    _, truth, _ = clusters(600)
    assert (torch.tensor(report["predicted_label"]) == truth).double().mean() > 0.93


def test_weighing_resists_memorising_and_leaves_clean_labels_alone() -> None:
    found = {}
    for share in (0.0, 0.4):
        model, (x, y, wrong) = Net(), clusters(600, wrong=share)
        criterion = criterion_for(model)
        train(model, criterion, x, y, passes=6)
        criterion(model(x), y)
        assert criterion.weights is not None
        found[share] = criterion.weights
    assert found[0.0].min() > 0.8 and found[0.0].mean() > 0.98
    assert found[0.4][wrong].mean() < 0.5 * found[0.4][~wrong].mean()


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_report_that_doubts_over_half_of_the_labels_says_what_that_means(wrong: int) -> None:
    """Of three samples, each at a class's mean features."""
    head = nn.Linear(3, 3)
    criterion = gaf.SampleAgreement(nn.CrossEntropyLoss(reduction="none"), head, num_classes=3)
    criterion(head(torch.eye(3)), torch.arange(3))
    y = torch.arange(3)
    y[:wrong] = 2
    criterion(head(torch.eye(3)), y, index=range(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert criterion.count_issues() == wrong
    said = [str(one.message).split(".")[0] for one in caught]
    assert said == (["gaf: 2 of 3 labels look wrong"] if wrong == 2 else [])


def test_losses_that_are_of_no_classes() -> None:
    torch.manual_seed(1)
    x = torch.randn(200, 4)
    y = x.sum(1, keepdim=True)
    y[::20] += 12
    model = nn.Linear(4, 1)
    criterion = gaf.SampleAgreement(nn.MSELoss(reduction="none"), score="loss", warmup=5)
    for _ in range(60):
        loss = criterion(model(x), y, index=torch.arange(200))
        model.zero_grad()
        loss.backward()
        SGD(model.parameters(), 0.1).step()
    report = criterion.report()
    assert "given_label" not in report
    bad = {i for i, issue in enumerate(report["is_label_issue"]) if issue}
    assert bad >= set(range(0, 200, 20)) and len(bad) < 25
    assert mse_loss(model(x[1:20]), y[1:20]) < 0.2  # the wrong ones pull less
    pandas.DataFrame(report)


# --- where it can stand


def test_a_saved_state_goes_on_as_if_nothing_had_happened() -> None:
    (x, y, _) = clusters(120, wrong=0.3)
    model = Net()
    criterion = criterion_for(model)
    train(model, criterion, x, y, passes=1)
    twin = copy.deepcopy(model)
    again = criterion_for(twin)
    again.load_state_dict(copy.deepcopy(criterion.state_dict()))
    for one, other in ((model, criterion), (twin, again)):
        torch.manual_seed(3)
        train(one, other, x, y, passes=2)
    assert same(criterion.state_dict(), again.state_dict())
    assert same(model.state_dict(), twin.state_dict())
    assert not [*criterion.parameters()]  # the head's are the model's


def test_compiled_models_and_autocast() -> None:
    (x, y, _) = clusters(40, wrong=0.3)
    model = Net()
    plain, other = criterion_for(model), criterion_for(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        loss = other(compiled(x), y)
        torch.testing.assert_close(loss, plain(model(x), y))
        loss.backward()
    half = criterion_for(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            loss = half(model(x), y, index=range(40))
    assert loss.dtype == torch.float32 and half.statistics.features.dtype == torch.float32
    torch.testing.assert_close(half.statistics.mean, plain.statistics.mean, rtol=0.1, atol=0.05)


def test_a_compiled_model_that_calls_no_hooks_is_refused_for_votes() -> None:
    (x, y, _), model = clusters(40), Net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    votes = criterion_for(model, "vote", model=model)
    with pytest.raises(RuntimeError, match="SampleAgreement: each use of a trainable parameter"):
        votes(compiled(x), y)


def test_the_table_grows_or_has_the_size_that_was_given() -> None:
    model, (x, y, _) = Net(), clusters(30)
    for options in ({}, {"num_samples": 100}):
        criterion = criterion_for(model, **options)
        for _ in range(2):
            criterion(model(x[:10]), y[:10], index=range(10))
        criterion(model(x[10:]), y[10:], index=torch.arange(70, 90))
        report = criterion.report()
        assert report["index"] == [*range(10), *range(70, 90)]
        assert report["visits"] == [1] * 30  # nothing was known at the first step
        again = criterion_for(model, **options)
        again.load_state_dict(criterion.state_dict())
        assert again.report() == report


def test_under_another_default_device() -> None:
    model, (x, y, _) = Net(), clusters(40, wrong=0.3)
    plain, other = criterion_for(model), criterion_for(model)
    for _ in range(3):
        want = plain(model(x), y, index=range(40))
        with torch.device("meta"):
            assert torch.equal(other(model(x), y, index=range(40)), want)
    with torch.device("meta"):
        assert other.report() == plain.report()


def test_its_hook_goes_with_it() -> None:
    model = Net()
    criterion = criterion_for(model)
    there = weakref.ref(criterion)
    assert model.head._forward_hooks
    del criterion
    gc.collect()
    assert there() is None and not model.head._forward_hooks


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_used_is_refused() -> None:
    model, (x, y, _) = Net(), clusters(10)
    ce = nn.CrossEntropyLoss(reduction="none")
    for args, error, text in (
        ((nn.CrossEntropyLoss(), model.head), ValueError, "Make it with reduction='none'"),
        ((3, model.head), TypeError, "criterion must be a loss function"),
        ((ce, model.head, "gram"), ValueError, "must be one of 'prototype', 'vote', 'loss'"),
        ((ce,), ValueError, "'prototype' needs the head"),
        ((ce, None, "vote"), ValueError, "'vote' needs the head"),
        ((ce, model), TypeError, "head must be .* a torch.nn.Linear; got Net"),
    ):
        with pytest.raises(error, match=text):
            gaf.SampleAgreement(*args)
    for kind, given in (("prototype", model), ("vote", 3)):
        with pytest.raises(ValueError, match=f"model is a .* for the score 'vote'.*{kind}"):
            criterion_for(model, kind, model=given)
    frozen = criterion_for(model, "vote", model=Net())
    with pytest.raises(RuntimeError, match="SampleAgreement: the losses must depend on"):
        frozen(model(x), y)
    with pytest.raises(ValueError, match="warmup must be a whole number of at least 0; got -1"):
        criterion_for(model, warmup=-1)
    criterion = criterion_for(model, num_samples=10)
    with pytest.raises(RuntimeError, match="report.. needs samples that were judged.*index=i"):
        criterion.report()
    out = model(x)
    criterion(out, y)
    with pytest.raises(RuntimeError, match="the head must run before each loss"):
        criterion(out, y)
    for targets in (y.float(), y[:, None], torch.rand(10, C + 1)):
        with pytest.raises((ValueError, RuntimeError)):
            criterion(model(x), targets)
    for index, text in (
        (range(9), "must be 10 whole numbers"),
        (torch.arange(10) + 1, r"in \[0, num_samples = 10\); got 1 to 10"),
        (torch.arange(10) - 1, "got -1 to 8"),
        (torch.rand(10), "of torch.float32"),
    ):
        with pytest.raises(ValueError, match=text):
            criterion(model(x), y, index=index)
    scalar = gaf.SampleAgreement(cross_entropy, model.head)
    with pytest.raises(ValueError, match=r"a loss for each of the 10 samples; got shape \(\)"):
        scalar(model(x), y)
