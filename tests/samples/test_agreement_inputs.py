"""gaf.SampleAgreement in loops as people write them: what is judged, counted, kept and refused."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gaf
from helpers.samples import C, Net, clusters

CE = nn.CrossEntropyLoss(reduction="none")
Outputs = Callable[[Tensor], Tensor]


def steps_of(
    between: Callable[[Net, Tensor], Any] | None = None, outputs: Outputs = lambda out: out
) -> gaf.SampleAgreement:
    """Four steps of 20; `between` is called with (model, x) before each loss."""
    torch.manual_seed(0)
    model, (x, y, _) = Net(), clusters(40, wrong=0.2)
    criterion = gaf.SampleAgreement(CE, model.head)
    for i in torch.arange(40).repeat(2).split(20):
        out = outputs(model(x[i]))
        if between is not None:
            between(model, x.flip(0)[i])
        criterion(out, y[i], index=i).backward()
    return criterion


@torch.no_grad()
def watched(model: Net, x: Tensor) -> None:
    for _ in range(3):
        model(x)


@pytest.mark.parametrize("between", [lambda model, x: model(x), watched])
@pytest.mark.parametrize(
    "outputs", [lambda out: out, lambda out: out.log_softmax(1), lambda out: out.bfloat16()]
)
def test_another_pass_of_the_model_before_the_loss_changes_nothing(
    between: Callable[[Net, Tensor], Any], outputs: Outputs
) -> None:
    alone, other = steps_of(None, outputs), steps_of(between, outputs)
    assert torch.equal(alone.history.table, other.history.table)
    sums = [each.state_dict()["statistics.features"] for each in (alone, other)]
    assert torch.equal(*sums)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 0.0])
def test_a_sample_without_features_is_not_judged_and_spoils_nothing(bad: float) -> None:
    """Its features are all zero (dead units) or not finite (an overflow)."""
    torch.manual_seed(0)
    head = nn.Linear(4, C)
    features = torch.randn(30, 4)
    y = torch.arange(30) % C
    criterion = gaf.SampleAgreement(CE, head)
    for step in range(3):
        h = features.clone()
        if step == 1:
            h[5] = bad
        criterion(head(h), y, index=range(30))
    table = criterion.history.table
    assert table[5, 0] == 1 and table[[0, 29], 0].tolist() == [2, 2]  # visits; the first batch none
    assert criterion.state_dict()["statistics.features"].isfinite().all()
    counts = criterion.statistics.features[0, :, -1]
    # two samples of its class stay out of refined means or not, but it itself counted twice only
    assert counts[int(y[5])] <= 0.81 * 10 + 0.9 * 9 + 10 + 1e-4


def test_the_mean_is_the_criterions_own_with_class_weights_and_ignored_targets() -> None:
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 2.0, 30.0])
    model, (x, y, _) = Net(), clusters(20)
    y[3] = -100
    criterion = gaf.SampleAgreement(
        nn.CrossEntropyLoss(weight, reduction="none"), model.head, weigh=False
    )
    out = model(x)
    torch.testing.assert_close(criterion(out, y, index=range(20)), cross_entropy(out, y, weight))
    x, y, _ = clusters(60, wrong=0.3)
    y[3] = -100
    weighed = gaf.SampleAgreement(
        nn.CrossEntropyLoss(weight, reduction="none"), model.head, warmup=0
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(20):
        loss = weighed(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = model(x)
    loss = weighed(out, y, index=range(60))
    assert weighed.weights is not None and weighed.weights.unique().numel() > 2
    w = weighed.weights * torch.where(y < 0, 0, weight[y.clamp(min=0)])
    plain = cross_entropy(out, y, reduction="none")
    torch.testing.assert_close(loss, (w * plain).sum() / w.sum())
    # what is judged has no class weights
    seen = weighed.history.table
    counted = y >= 0
    torch.testing.assert_close(seen[counted, 2] / seen[counted, 0], plain[counted].detach())


def test_losses_of_tokens_count_like_torchs_mean_and_padding_does_not_raise_the_quality() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(4, C, 7, requires_grad=True)
    targets = torch.randint(C, (4, 7))
    targets[0, 2:], targets[2, 1:] = -100, -100
    criterion = gaf.SampleAgreement(CE, score="loss")
    loss = criterion(outputs, targets, index=range(4))
    torch.testing.assert_close(loss, cross_entropy(outputs, targets))
    losses = cross_entropy(outputs, targets, reduction="none").detach()
    means = torch.stack([row[t >= 0].mean() for row, t in zip(losses, targets, strict=True)])
    report = criterion.report()
    torch.testing.assert_close(torch.tensor(report["loss"]), means)
    order = means.argsort(descending=True)
    assert torch.tensor(report["label_quality"])[order].tolist() == [0.25, 0.5, 0.75, 1.0]


def test_large_losses_without_classes_are_told_apart() -> None:
    criterion = gaf.SampleAgreement(nn.MSELoss(reduction="none"), score="loss", warmup=0)
    targets = torch.tensor([3.0, 5.0, 50.0, 500.0])[:, None].repeat(5, 1)
    for _ in range(2):
        criterion(torch.zeros(20, 1, requires_grad=True), targets, index=range(20))
    quality = criterion.report()["label_quality"]
    assert quality[:4] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert criterion.weights is not None and criterion.weights[3] < criterion.weights[2]


def test_a_head_of_one_output_has_no_classes() -> None:
    torch.manual_seed(0)
    head = nn.Linear(2, 1)
    criterion = gaf.SampleAgreement(nn.MSELoss(reduction="none"), head, score="loss")
    targets = torch.zeros(20, 1)
    targets[7] = 100.0
    criterion(head(torch.randn(20, 2)), targets, index=range(20))
    report = criterion.report()
    assert [i for i, far in enumerate(report["is_label_issue"]) if far] == [7]
    for score in ("prototype", "vote"):
        with pytest.raises(ValueError, match="an output for each class; got out_features=1"):
            gaf.SampleAgreement(CE, head, score)


def test_a_state_that_is_loaded_is_all_there_is() -> None:
    """The sum of the last step, which the next one would have added, is dropped."""
    model, (x, y, _) = Net(), clusters(30, wrong=0.2)
    criterion = gaf.SampleAgreement(CE, model.head)
    for _ in range(3):
        criterion(model(x), y, index=range(30))
    saved = copy.deepcopy(criterion.state_dict())
    criterion(model(x), y.roll(1), index=range(30))
    criterion.load_state_dict(saved)
    now = criterion.state_dict()
    assert all(torch.equal(now[name], value) for name, value in saved.items())


def test_a_table_that_grew_fits_where_the_number_of_samples_is_known() -> None:
    model, (x, y, _) = Net(), clusters(30)
    grown = gaf.SampleAgreement(CE, model.head)
    for i in range(0, 30, 10):
        for _ in range(2):
            grown(model(x[i : i + 10]), y[i : i + 10], index=range(i, i + 10))
    assert len(grown.history.table) > 30
    known = gaf.SampleAgreement(CE, model.head, num_samples=30)
    known.load_state_dict(grown.state_dict())
    assert known.report() == grown.report()
    with pytest.raises(RuntimeError, match="size mismatch for history.table"):
        gaf.SampleAgreement(CE, model.head, num_samples=20).load_state_dict(grown.state_dict())


def test_a_cast_of_the_whole_module_keeps_counts_and_labels() -> None:
    """301 is no number of bfloat16."""
    torch.manual_seed(0)
    head = nn.Linear(4, 305)
    system = nn.ModuleDict({"head": head, "criterion": gaf.SampleAgreement(CE, head)})
    system.to(torch.bfloat16)
    y = torch.arange(300, 305).repeat(4)
    h = nn.functional.one_hot(y - 300, 5)[:, :4].bfloat16() + 0.1
    for _ in range(3):
        system["criterion"](head(h), y, index=range(20))
    report = system["criterion"].report()
    assert report["given_label"] == report["predicted_label"] == y.tolist()
    assert head.weight.dtype == torch.bfloat16
    assert system["criterion"].history.table.dtype == torch.float32


def test_a_head_that_is_called_by_keyword_is_caught() -> None:
    head, y = nn.Linear(4, C), torch.arange(9) % C
    criterion = gaf.SampleAgreement(CE, head)
    for _ in range(2):
        criterion(head(input=torch.eye(4)[y]), y, index=range(9))
    assert len(criterion.report()["index"]) == 9


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([[0.0, 1.0, 1.0]] * 10),
        torch.zeros(10, C),
        torch.tensor([[1.5, -0.5, 0.0]] * 10),
        torch.tensor([[0, 1, 1]] * 10),
    ],
)
def test_targets_that_are_no_probabilities_are_refused(targets: Tensor) -> None:
    model, (x, _, _) = Net(), clusters(10)
    criterion = gaf.SampleAgreement(nn.BCEWithLogitsLoss(reduction="none"), model.head)
    with pytest.raises(ValueError, match="must be probabilities of classes, that sum to 1.*loss"):
        criterion(model(x), targets.float(), index=range(10))


def test_probabilities_of_low_precision_pass() -> None:
    model, (x, _, _) = Net(), clusters(10)
    criterion = gaf.SampleAgreement(CE, model.head)
    criterion(model(x), torch.rand(10, C).softmax(1).bfloat16().float(), index=range(10))
    assert int(criterion.steps) == 1


def test_labels_and_indices_out_of_range_are_named() -> None:
    model, (x, y, _) = Net(), clusters(10)
    few = gaf.SampleAgreement(CE, model.head, num_classes=2)
    with pytest.raises(ValueError, match=r"classes in \[0, 2\).*got 2"):
        few(model(x), torch.full((10,), 2))
    own = gaf.SampleAgreement(lambda out, y: out.square().mean(1), model.head)
    with pytest.raises(ValueError, match=r"classes in \[0, 3\).*got -1"):
        own(model(x), torch.full((10,), -1))
    criterion = gaf.SampleAgreement(CE, model.head)
    for index in ([*"0123456789"], [None] * 10, [10**11] * 10):
        with pytest.raises(ValueError, match="SampleAgreement: index must be"):
            criterion(model(x), y, index=index)
    criterion(model(x), y, index=range(10))
    with pytest.raises(RuntimeError, match="The very first batch is not judged"):
        criterion.report()


def test_a_head_that_does_not_know_its_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="got a LazyLinear that has not run"):
        gaf.SampleAgreement(CE, nn.LazyLinear(3))
