"""bn="accepted": whose statistics are whose, in compiled models, after checkpoints, and where forward and backward passes mix."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import gaf
from gaf.device.batchnorm import BatchNormStatistics

K, B = 4, 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 3)
    )  # fmt: skip


def batches(macro: int = 0, k: int = K) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(macro)
    return [
        (
            torch.randn(B, 5, generator=generator) + i,
            torch.randint(3, (B,), generator=generator),
        )
        for i in range(k)
    ]


def statistics(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def made(model: nn.Module, tau: float, named: nn.Module | None = None) -> gaf.Accumulator:
    return gaf.Accumulator(
        SGD(model.parameters(), 0.1), gaf.GAF(tau), model=named or model, bn="accepted"
    )


def alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# ------------------------------------------------------------------------------------------------------ compiled models


def whole(model: nn.Sequential, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[return-value]


def in_place(model: nn.Sequential, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def in_part(model: nn.Sequential, backend: str) -> nn.Module:
    """The first BatchNorm is compiled, the second one is not."""
    part = torch.compile(nn.Sequential(*model[:3]), backend=backend)
    return nn.Sequential(part, *model[3:])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("wrap", [whole, in_place, in_part])
@pytest.mark.parametrize("ran_before", [True, False], ids=["ran", "fresh"])
def test_a_compiled_model_has_the_statistics_of_one_that_is_not(
    wrap: Callable, backend: str, ran_before: bool
) -> None:
    """Over macro-batches that step, that skip, and a checkpoint loaded between them; compiled and run before the Accumulator or after."""
    torch.compiler.reset()
    ends = []
    for form in (lambda m, b: m, wrap):
        model = net()
        run = form(model, backend)
        if ran_before:
            run(batches(9)[0][0])
        acc = made(model, 0.0, run)
        for macro, tau in enumerate((0.0, 0.9, 2.0, 0.0)):
            if macro == 3:
                state = copy.deepcopy(model.state_dict())
                state["1.running_mean"] += 7
                model.load_state_dict(state)
            acc.policy = gaf.GAF(tau)
            before = statistics(model)
            for x, y in batches(macro):
                acc.backward(cross_entropy(run(x), y))
                assert alike(before, statistics(model))  # while the macro-batch is collected
            assert acc.step().stepped == (tau > 0)
            assert alike(before, statistics(model)) == (tau == 0)
        ends.append([*statistics(model), *(p.detach() for p in model.parameters())])
    torch.testing.assert_close(*ends)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_statistics_that_are_no_batch_norms_are_refused() -> None:
    for kind, norm in (
        ("InstanceNorm1d", nn.InstanceNorm1d(5, track_running_stats=True)),
        ("RecursiveScriptModule", torch.jit.script(nn.BatchNorm1d(5))),
    ):
        model = nn.Sequential(nn.Linear(5, 5), norm)
        with pytest.raises(
            TypeError, match=f"'1' keeps its own and is a {kind}. Use bn='all', or track"
        ):
            made(model, 0.5)
    without = nn.Sequential(
        nn.Linear(5, 5), nn.InstanceNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False)
    )
    made(without, 0.5)


class Checkpointed(nn.Module):
    """Runs its first layers again in the backward pass: two passes a micro-batch, as without GAF."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.first, self.last = model[:3], model[3:]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False))


@pytest.mark.parametrize("form", [nn.DataParallel, torch.fx.symbolic_trace, Checkpointed])
def test_other_forms_of_a_model_keep_the_statistics_of_accepted_micro_batches(
    form: Callable,
) -> None:
    model, saw = net(), net()
    run, plain = form(model), form(saw)
    for tau in (2.0, 0.0):
        acc = gaf.Accumulator(SGD(run.parameters(), 0.0), gaf.GAF(tau), model=run, bn="accepted")
        for x, y in batches():
            acc.backward(cross_entropy(run(x), y))
            if tau:
                cross_entropy(plain(x), y).backward()
        acc.step()
        torch.testing.assert_close(list(run.buffers()), list(plain.buffers()), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- what is written in between


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


def probe(model: nn.Module) -> None:
    gaf.probe(model, cross_entropy, batches(7, 8), k=3)


def pass_in_training_mode_and_load(model: nn.Module) -> None:
    model(batches(8)[0][0])
    load(model)


WRITERS = [load, assign, reset, fill, replace, probe, pass_in_training_mode_and_load]


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("between", WRITERS)
@pytest.mark.parametrize("first", [None, probe])
def test_what_is_written_between_macro_batches_is_where_the_next_one_starts(
    between: Callable, first: Callable | None, when: int
) -> None:
    """`first` runs forward passes in training mode before; a probe does."""
    model = net()
    acc = made(model, 0.0)
    for macro in range(when):
        for x, y in batches(macro):
            acc.backward(cross_entropy(model(x), y))
        acc.step()
    if first is not None:
        first(model)
    between(model)
    written = statistics(model)
    for x, y in batches(5):
        acc.backward(cross_entropy(model(x), y))
    assert not acc.step().stepped
    assert alike(written, statistics(model))


def test_a_layer_in_evaluation_mode_keeps_what_is_written_to_it() -> None:
    model = net()
    acc = made(model, 2.0)
    model.eval()
    fill(model)
    written = statistics(model)
    for x, y in batches():
        acc.backward(cross_entropy(model(x), y))
    acc.step()
    assert alike(written, statistics(model))


def test_lazy_layers_take_part_once_they_are_there() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.LazyBatchNorm1d(), nn.Linear(6, 3))
    model.to("cpu")
    acc = gaf.Accumulator(
        SGD([*model[0].parameters(), *model[2].parameters()], 0.1), gaf.GAF(0.0), model=model, bn="accepted"
    )  # fmt: skip
    for x, y in batches():
        acc.backward(cross_entropy(model(x), y))
    assert not acc.step().stepped
    assert model[1].running_mean.tolist() == [0] * 6
    assert model[1].num_batches_tracked == 0


# ------------------------------------------------------------------------------------- forward passes, then backward passes


def forward_first(model: nn.Module, acc: gaf.Accumulator) -> None:
    losses = [cross_entropy(model(x), y) for x, y in batches()]
    for loss in losses:
        acc.backward(loss)


def one_ahead(model: nn.Module, acc: gaf.Accumulator) -> None:
    """As a loop that prefetches: the next forward pass before each backward pass."""
    (x, y), *rest = batches()
    loss = cross_entropy(model(x), y)
    for x, y in rest:
        following = cross_entropy(model(x), y)
        acc.backward(loss)
        loss = following


def two_losses(model: nn.Module, acc: gaf.Accumulator) -> None:
    (x, y), *_ = batches()
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
    model = net()
    before = statistics(model)
    run = form(model)
    acc = made(model, 2.0, run)
    with pytest.raises(
        RuntimeError, match=r"bn='accepted' needs each micro-batch's forward pass.*or use bn='all'"
    ):
        loop(run, acc)
    acc.discard()
    assert alike(before, statistics(model))


def test_a_forward_pass_ahead_is_refused_at_the_first_backward_pass() -> None:
    model = net()
    acc = made(model, 2.0)
    with pytest.raises(RuntimeError, match="the last forward pass in training mode came after"):
        one_ahead(model, acc)
    assert not acc.waiting


def test_the_same_loops_are_right_with_bn_all() -> None:
    """The other way that the refusal names: as in plain accumulation, every pass counts."""
    for loop in (forward_first, one_ahead, two_losses):
        model, plain = net(), net()
        acc = gaf.Accumulator(SGD(model.parameters(), 0.0), gaf.GAF(0.0), model=model)
        loop(model, acc)
        for x, _ in batches()[: 1 if loop is two_losses else K]:
            plain(x)
        assert alike(statistics(model), statistics(plain))


def test_a_micro_batch_without_batch_norm_is_no_cause_for_a_refusal() -> None:
    """A penalty on weights as a micro-batch of its own, and one in evaluation mode."""
    model = net()
    acc = made(model, 2.0)
    (x, y), (u, v), *_ = batches()
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
    model = net()
    acc, saw = made(model, 2.0), copy.deepcopy(model)
    for x, y in batches():
        loss = cross_entropy(model(x), y)
        saw(x)
        if again:
            with torch.no_grad():
                model(x), saw(x)
        acc.backward(loss)
    acc.step()
    torch.testing.assert_close(statistics(model), statistics(saw), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- copies and what is left


def test_a_copied_or_saved_model_is_a_plain_one() -> None:
    model = net()
    acc = made(model, 0.0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), loaded, torch.optim.swa_utils.AveragedModel(model).module):
        plain = net()
        for x, _ in batches():
            other(x)
            plain(x)
        assert alike(statistics(other), statistics(plain))
    before = statistics(model)
    for x, y in batches():
        acc.backward(cross_entropy(model(x), y))
    acc.step()
    assert alike(before, statistics(model))


def test_a_model_forgets_an_accumulator_that_is_gone() -> None:
    model = net()
    norm = model[1]
    for _ in range(2):
        acc = made(model, 0.5)
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
    model = net()
    old = made(model, 2.0)
    for x, y in batches():
        old.backward(cross_entropy(model(x), y))
    acc, before = made(model, 0.0), statistics(model)
    for x, y in batches(1):
        acc.backward(cross_entropy(model(x), y))
    assert not acc.step().stepped
    assert alike(before, statistics(model))


def test_statistics_hold_no_graph() -> None:
    model = net()
    watching = BatchNormStatistics(model)
    out = model(batches()[0][0])
    node = weakref.ref(out)
    del out
    assert node() is None
    watching.note()
