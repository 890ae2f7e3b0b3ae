"""bn="accepted": running statistics move with the accepted micro-batches alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import gaf
from gaf.device.batchnorm import BatchNormStatistics
from helpers.accumulating import FailsInBackward
from helpers.comparing import same
from helpers.digits import Batch, conv_net, flat_grad, micro_batches, micro_gradients, mixed_tau
from helpers.norms import accepted_only, norm_batches, norm_net, statistics
from helpers.pairs import each_pair


def norm_state(model: nn.Module) -> list[Tensor]:
    return [
        b.clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for b in m.buffers()
    ]


def with_momentum(model: nn.Module, momentum: float | None) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    return model


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_bn_accepted_has_the_statistics_of_a_model_that_saw_the_accepted_micro_batches_alone(
    digits: Batch, momentum: float | None
) -> None:
    """The other model has the same parameters. Some macro-batches step and one skips."""
    model = with_momentum(conv_net(), momentum)
    saw = copy.deepcopy(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(), model=model, bn="accepted")
    counts = []
    for macro in range(4):
        batches = micro_batches(digits, 5, macro)
        tau = 0.0 if macro == 2 else mixed_tau(micro_gradients(model, batches))
        acc.policy = gaf.GAF(tau)
        for x, y in batches:
            acc.backward(cross_entropy(model(x), y))
        decision = acc.decide()
        counts.append(int(decision.accepted.sum()))
        with torch.no_grad():
            for p, q in zip(saw.parameters(), model.parameters(), strict=True):
                p.copy_(q)
            for (x, _), taken in zip(batches, decision.accepted, strict=True):
                if taken:
                    saw(x)
        acc.step()
        # Statistics of size 1, taken back and put on again: at most five moves a macro-batch, some
        # float32 roundings each
        torch.testing.assert_close(norm_state(model), norm_state(saw), rtol=1e-5, atol=1e-6)
    assert counts[2] == 0
    assert all(counts[i] >= 2 for i in (0, 1, 3))
    assert min(counts[i] for i in (0, 1, 3)) < 5


def test_bn_accepted_leaves_the_statistics_bitwise_alone_on_a_skip(digits: Batch) -> None:
    model = conv_net()
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.0), model=model, bn="accepted")
    before = norm_state(model)
    for x, y in micro_batches(digits, 3):
        acc.backward(cross_entropy(model(x), y))
        assert same(before, norm_state(model))  # also while the macro-batch is being collected
    assert not acc.step().stepped
    assert same(before, norm_state(model))


def test_bn_all_moves_with_every_micro_batch_as_plain_training_does(digits: Batch) -> None:
    model = conv_net()
    plain = copy.deepcopy(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.0), model=model)
    for x, y in micro_batches(digits, 3):
        acc.backward(cross_entropy(model(x), y))
        plain(x)
    assert not acc.step().stepped
    assert same(norm_state(model), norm_state(plain))


def test_bn_accepted_does_not_change_the_gradients(digits: Batch) -> None:
    """In training mode BatchNorm looks at the batch alone."""
    found = []
    model = conv_net()
    for bn in ("all", "accepted"):
        twin = copy.deepcopy(model)
        acc = gaf.Accumulator(SGD(twin.parameters(), 0.1), gaf.GAF(2.0), model=twin, bn=bn)
        for x, y in micro_batches(digits, 3):
            acc.backward(cross_entropy(twin(x), y))
        acc.decide()
        found.append(flat_grad(twin))
    assert torch.equal(*found)


def test_a_loaded_checkpoint_is_where_bn_accepted_goes_on_from(digits: Batch) -> None:
    model, other = conv_net(), conv_net()
    for x, _ in micro_batches(digits, 3):
        other(x)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.0), model=model, bn="accepted")
    model.load_state_dict(other.state_dict())
    for x, y in micro_batches(digits, 2):
        acc.backward(cross_entropy(model(x), y))
    acc.step()
    assert same(norm_state(model), norm_state(other))


def test_two_passes_a_micro_batch_are_two_moves(digits: Batch) -> None:
    """As in a discriminator, which sees the real and the fake pictures in turn."""
    for momentum in (0.1, None):
        model = with_momentum(conv_net(), momentum)
        saw = copy.deepcopy(model)
        acc = gaf.Accumulator(
            SGD(model.parameters(), 0.0), gaf.GAF(2.0), model=model, bn="accepted"
        )
        pairs = [micro_batches(digits, 2, macro) for macro in range(3)]
        for (a, y), (b, z) in pairs:
            acc.backward(cross_entropy(model(a), y) + cross_entropy(model(b), z))
            saw(a)
            saw(b)
        acc.step()
        # float32, as above
        torch.testing.assert_close(norm_state(model), norm_state(saw), rtol=1e-5, atol=1e-6)


def test_a_cumulative_batch_norm_that_was_not_used_keeps_its_statistics() -> None:
    norm = nn.BatchNorm1d(2, momentum=None)
    statistics = BatchNormStatistics(norm)
    statistics.note()
    statistics.settle([True])
    assert norm.running_var.tolist() == [1, 1]


def test_bn_accepted_forgets_a_micro_batch_whose_backward_failed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    saw = copy.deepcopy(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.0), gaf.GAF(2.0), model=model, bn="accepted")
    with pytest.raises(ZeroDivisionError):
        acc.backward(FailsInBackward.apply(model(torch.randn(4, 2) + 100)).sum())
    for _ in range(2):
        x = torch.randn(4, 2)
        acc.backward(model(x).pow(3).sum())
        saw(x)
    acc.step()
    assert model[0].num_batches_tracked == 2
    # float32, as above
    torch.testing.assert_close(model[0].running_mean, saw[0].running_mean, rtol=1e-5, atol=1e-6)


def whole(model: nn.Sequential, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[return-value]


def in_place(model: nn.Sequential, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def in_part(model: nn.Sequential, backend: str) -> nn.Module:
    """The first BatchNorm is compiled, the second one is not."""
    part = torch.compile(nn.Sequential(*model[:3]), backend=backend)
    return nn.Sequential(part, *model[3:])


@pytest.mark.parametrize(
    ("backend", "wrap", "ran_before"),
    each_pair(["eager", "aot_eager"], [whole, in_place, in_part], [True, False]),
)
def test_a_compiled_model_has_the_statistics_of_one_that_is_not(
    wrap: Callable, backend: str, ran_before: bool
) -> None:
    """Over macro-batches that step and that skip, with a checkpoint loaded in between.

    The model is compiled and run before the Accumulator is made, or after.
    """
    torch.compiler.reset()
    ends = []
    for form in (lambda m, b: m, wrap):
        model = norm_net()
        run = form(model, backend)
        if ran_before:
            run(norm_batches(9)[0][0])
        acc = accepted_only(model, 0.0, run)
        for macro, tau in enumerate((0.0, 0.9, 2.0, 0.0)):
            if macro == 3:
                state = copy.deepcopy(model.state_dict())
                state["1.running_mean"] += 7
                model.load_state_dict(state)
            acc.policy = gaf.GAF(tau)
            before = statistics(model)
            for x, y in norm_batches(macro):
                acc.backward(cross_entropy(run(x), y))
                assert same(before, statistics(model))  # while the macro-batch is collected
            assert acc.step().stepped == (tau > 0)
            assert same(before, statistics(model)) == (tau == 0)
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
            accepted_only(model, 0.5)
    without = nn.Sequential(
        nn.Linear(5, 5), nn.InstanceNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False)
    )
    accepted_only(without, 0.5)


class Checkpointed(nn.Module):
    """Runs its first layers again in the backward pass: two passes a micro-batch."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.first, self.last = model[:3], model[3:]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False))


@pytest.mark.parametrize("form", [nn.DataParallel, torch.fx.symbolic_trace, Checkpointed])
def test_other_forms_of_a_model_keep_the_statistics_of_accepted_micro_batches(
    form: Callable,
) -> None:
    model, saw = norm_net(), norm_net()
    run, plain = form(model), form(saw)
    for tau in (2.0, 0.0):
        acc = gaf.Accumulator(SGD(run.parameters(), 0.0), gaf.GAF(tau), model=run, bn="accepted")
        for x, y in norm_batches():
            acc.backward(cross_entropy(run(x), y))
            if tau:
                cross_entropy(plain(x), y).backward()
        acc.step()
        torch.testing.assert_close(list(run.buffers()), list(plain.buffers()), rtol=1e-5, atol=1e-6)


def test_lazy_layers_take_part_once_they_are_there() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.LazyBatchNorm1d(), nn.Linear(6, 3))
    model.to("cpu")
    acc = gaf.Accumulator(
        SGD([*model[0].parameters(), *model[2].parameters()], 0.1),
        gaf.GAF(0.0),
        model=model,
        bn="accepted",
    )
    for x, y in norm_batches():
        acc.backward(cross_entropy(model(x), y))
    assert not acc.step().stepped
    assert model[1].running_mean.tolist() == [0] * 6
    assert model[1].num_batches_tracked == 0
