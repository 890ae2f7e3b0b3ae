"""bn="accepted": statistics that other code writes, passes that mix, copies of the model."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import gaf
from gaf.device.batchnorm import BatchNormStatistics
from helpers.comparing import same
from helpers.norms import K, accepted_only, norm_batches, norm_net, statistics
from helpers.pairs import each_pair


def probe(model: nn.Module) -> None:
    gaf.probe(model, cross_entropy, norm_batches(7, 8), k=3)


def load(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    state["1.running_mean"] += 7
    model.load_state_dict(state)


def assign(model: nn.Module) -> None:
    state = {name: b + 7 for name, b in model.named_buffers()}
    model.load_state_dict(state, strict=False, assign=True)


def reset(model: Any) -> None:
    model[1].reset_running_stats()


def fill(model: Any) -> None:
    model[1].running_var.fill_(3)


def replace(model: Any) -> None:
    model[1].running_mean = torch.full((6,), 5.0)


def pass_in_training_mode_and_load(model: nn.Module) -> None:
    model(norm_batches(8)[0][0])
    load(model)


WRITERS = [load, assign, reset, fill, replace, probe, pass_in_training_mode_and_load]


@pytest.mark.parametrize(("when", "between", "first"), each_pair([0, 1], WRITERS, [None, probe]))
def test_what_is_written_between_macro_batches_is_where_the_next_one_starts(
    between: Callable, first: Callable | None, when: int
) -> None:
    """`first` runs forward passes in training mode before; a probe does."""
    model = norm_net()
    acc = accepted_only(model, 0.0)
    for macro in range(when):
        for x, y in norm_batches(macro):
            acc.backward(cross_entropy(model(x), y))
        acc.step()
    if first is not None:
        first(model)
    between(model)
    written = statistics(model)
    for x, y in norm_batches(5):
        acc.backward(cross_entropy(model(x), y))
    assert not acc.step().stepped
    assert same(written, statistics(model))


def test_a_layer_in_evaluation_mode_keeps_what_is_written_to_it() -> None:
    model = norm_net()
    acc = accepted_only(model, 2.0)
    model.eval()
    fill(model)
    written = statistics(model)
    for x, y in norm_batches():
        acc.backward(cross_entropy(model(x), y))
    acc.step()
    assert same(written, statistics(model))


def forward_first(model: nn.Module, acc: gaf.Accumulator) -> None:
    losses = [cross_entropy(model(x), y) for x, y in norm_batches()]
    for loss in losses:
        acc.backward(loss)


def two_losses(model: nn.Module, acc: gaf.Accumulator) -> None:
    (x, y), *_ = norm_batches()
    out = model(x)
    acc.backward(cross_entropy(out, y), retain_graph=True)
    acc.backward(out.square().mean())


@pytest.mark.parametrize(
    "form",
    [lambda m: m, lambda m: torch.compile(m, backend="aot_eager")],
    ids=["plain", "compiled"],
)
@pytest.mark.parametrize("loop", [forward_first, two_losses])
def test_passes_whose_micro_batch_is_not_known_are_refused(loop: Callable, form: Callable) -> None:
    torch.compiler.reset()
    model = norm_net()
    before = statistics(model)
    run = form(model)
    acc = accepted_only(model, 2.0, run)
    with pytest.raises(
        RuntimeError, match=r"bn='accepted' needs each micro-batch's forward pass.*or use bn='all'"
    ):
        loop(run, acc)
    acc.discard()
    assert same(before, statistics(model))


def one_ahead(model: nn.Module, acc: gaf.Accumulator) -> None:
    """As a loop that prefetches: the next forward pass before each backward pass."""
    (x, y), *rest = norm_batches()
    loss = cross_entropy(model(x), y)
    for x, y in rest:
        following = cross_entropy(model(x), y)
        acc.backward(loss)
        loss = following


def test_a_forward_pass_ahead_is_refused_at_the_first_backward_pass() -> None:
    model = norm_net()
    acc = accepted_only(model, 2.0)
    with pytest.raises(RuntimeError, match="the last forward pass in training mode came after"):
        one_ahead(model, acc)
    assert not acc.waiting


def test_the_same_loops_are_right_with_bn_all() -> None:
    """The other way that the refusal names: as in plain accumulation, every pass counts."""
    for loop in (forward_first, one_ahead, two_losses):
        model, plain = norm_net(), norm_net()
        acc = gaf.Accumulator(SGD(model.parameters(), 0.0), gaf.GAF(0.0), model=model)
        loop(model, acc)
        for x, _ in norm_batches()[: 1 if loop is two_losses else K]:
            plain(x)
        assert same(statistics(model), statistics(plain))


def test_a_micro_batch_without_batch_norm_is_no_cause_for_a_refusal() -> None:
    """A penalty on weights as a micro-batch of its own, and one in evaluation mode."""
    model = norm_net()
    acc = accepted_only(model, 2.0)
    (x, y), (u, v), *_ = norm_batches()
    saw = copy.deepcopy(model)
    acc.backward(cross_entropy(model(x), y))
    acc.backward(sum(p.square().sum() for p in model.parameters()))
    model.eval()
    acc.backward(cross_entropy(model(u), v))
    acc.step()
    saw(x)
    torch.testing.assert_close(statistics(model), statistics(saw))


@pytest.mark.parametrize("again", [True, False])
def test_a_pass_without_gradients_after_the_loss_is_no_cause_for_a_refusal(again: bool) -> None:
    """For a metric: its move is the micro-batch's, as two passes' are."""
    model = norm_net()
    acc, saw = accepted_only(model, 2.0), copy.deepcopy(model)
    for x, y in norm_batches():
        loss = cross_entropy(model(x), y)
        saw(x)
        if again:
            with torch.no_grad():
                model(x), saw(x)
        acc.backward(loss)
    acc.step()
    torch.testing.assert_close(statistics(model), statistics(saw), rtol=1e-5, atol=1e-6)


def test_a_copied_or_saved_model_is_a_plain_one() -> None:
    model = norm_net()
    acc = accepted_only(model, 0.0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), loaded, torch.optim.swa_utils.AveragedModel(model).module):
        plain = norm_net()
        for x, _ in norm_batches():
            other(x)
            plain(x)
        assert same(statistics(other), statistics(plain))
    before = statistics(model)
    for x, y in norm_batches():
        acc.backward(cross_entropy(model(x), y))
    acc.step()
    assert same(before, statistics(model))


def test_a_model_forgets_an_accumulator_that_is_gone() -> None:
    model = norm_net()
    norm = model[1]
    for _ in range(2):
        acc = accepted_only(model, 0.5)
        assert len(norm._forward_pre_hooks) == len(norm._forward_hooks) == 1
        gone = weakref.ref(acc)
        del acc
        gc.collect()
        assert gone() is None
        assert not norm._forward_pre_hooks
        assert not norm._forward_hooks
        assert not norm._load_state_dict_post_hooks


def test_two_that_watch_one_model_do_not_disturb_each_other() -> None:
    """As when a notebook's cell is run again."""
    model = norm_net()
    old = accepted_only(model, 2.0)
    for x, y in norm_batches():
        old.backward(cross_entropy(model(x), y))
    acc, before = accepted_only(model, 0.0), statistics(model)
    for x, y in norm_batches(1):
        acc.backward(cross_entropy(model(x), y))
    assert not acc.step().stepped
    assert same(before, statistics(model))


def test_statistics_hold_no_graph() -> None:
    model = norm_net()
    watching = BatchNormStatistics(model)
    out = model(norm_batches()[0][0])
    node = weakref.ref(out)
    del out
    assert node() is None
    watching.note()


def small_net() -> tuple[nn.Sequential, nn.BatchNorm1d]:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(norm, nn.Linear(4, 2)), norm


def test_statistics_reset_between_macro_batches_stay_reset() -> None:
    torch.manual_seed(0)
    model, norm = small_net()
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0), model=model, bn="accepted")
    x, y = torch.randn(4, 8, 4), torch.randint(2, (4, 8))
    for i in (0, 1):
        acc.backward(cross_entropy(model(x[i]), y[i]))
    acc.step()
    norm.reset_running_stats()
    for i in (2, 3):
        acc.backward(cross_entropy(model(x[i]), y[i]))
    acc.step()
    fresh, alone = small_net()
    for i in (2, 3):
        fresh(x[i])
    torch.testing.assert_close(norm.running_mean, alone.running_mean)
    assert norm.num_batches_tracked == alone.num_batches_tracked == 2


def test_discard_takes_batch_norm_back_to_the_macro_batches_start() -> None:
    torch.manual_seed(0)
    model, norm = small_net()
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0), model=model, bn="accepted")
    before = copy.deepcopy(norm.state_dict())
    acc.backward(cross_entropy(model(torch.randn(8, 4)), torch.randint(2, (8,))))
    acc.discard()
    assert all(
        torch.equal(before[key], value)
        for key, value in norm.state_dict().items()
        if "running" in key or "num" in key
    )
