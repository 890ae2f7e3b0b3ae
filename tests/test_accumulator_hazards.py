"""What a user's model, policy or loop may do to gaf.Accumulator: shared memory, foreign policies, statistics set by hand."""

import copy
import gc
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import gaf
from gaf.device.backward import unshared
from gaf.rules.decision import Decision

# ----------------------------------------------------------------------------------------------------- shared memory


class Seen(nn.Module):
    """Two parameters whose gradients autograd hands out as views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.a.unsqueeze(0) + self.b) * x).sum()


@pytest.mark.parametrize("start", ["first", "best"])
def test_parameters_whose_gradients_share_memory_are_added_up_once(start: str) -> None:
    model, rows = (
        Seen(),
        torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [1.0, 1.0, 4.0], [3.0, 2.0, 1.0]]),
    )
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.9, start=start))
    for row in rows:
        acc.backward(model(row))
    acc.decide()
    expected, _ = gaf.aggregate(rows, gaf.GAF(0.9))
    assert model.a.grad is not None
    assert model.b.grad is not None
    torch.testing.assert_close(model.a.grad, expected)
    torch.testing.assert_close(model.b.grad[0], expected)


def test_a_gradient_that_the_user_keeps_is_not_written_over() -> None:
    p = nn.Parameter(torch.ones(3))
    rows = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
    before, kept = rows.clone(), []
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.9))
    for row in rows:
        product = p * 1.0
        product.register_hook(kept.append)
        acc.backward(torch.dot(product, row))
    acc.step()
    assert torch.equal(rows, before)
    torch.testing.assert_close(torch.stack(kept), before)


def test_memory_of_its_own_is_not_copied() -> None:
    """The count of references that a fresh tensor has is torch's, and may change with a release: then every gradient is copied."""
    fresh = torch.ones(4)
    assert unshared(fresh) is fresh
    assert unshared(fresh[:2]).data_ptr() != fresh.data_ptr()


def test_a_parameter_must_get_one_gradient_in_a_backward_pass() -> None:
    p = nn.Parameter(torch.ones(2))

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                (p * 2).sum().backward()
            return g

    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.9))
    with pytest.raises(RuntimeError, match="one gradient; '0 of group 0' got two"):
        acc.backward(Twice.apply(p * 3).sum())
    assert p.grad is None
    assert not acc.waiting


def test_a_spare_buffer_of_another_layout_is_not_used() -> None:
    """The parameter turns channels-last between two macro-batches."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    twin, x = copy.deepcopy(model), torch.randn(8, 2, 3, 8, 8)
    for each in (model, twin):
        acc = gaf.Accumulator(SGD(each.parameters(), 0.1), gaf.GAF(2.0))
        for macro in range(3):
            if each is model and macro == 1:
                each.to(memory_format=torch.channels_last)
            for batch in x[2 * macro : 2 * macro + 2]:
                acc.backward(each(batch).square().mean())
            acc.decide()
            if macro > 0 and each is model:
                assert each.weight.grad is not None
                assert each.weight.grad.stride() == each.weight.stride()
            acc.step()
    torch.testing.assert_close(model.weight, twin.weight)


# ---------------------------------------------------------------------------------------------------- foreign policies


@dataclass(frozen=True)
class LastOnly(gaf.GAF):
    """Overrides the call: must see the whole Gram matrix."""

    def __call__(self, gram: Tensor) -> Decision:
        accepted = torch.zeros(len(gram), dtype=torch.bool)
        accepted[-1] = True
        return Decision(
            accepted.double(),
            accepted,
            torch.tensor(True),
            torch.zeros(len(gram), dtype=torch.float64),
        )


@dataclass(frozen=True)
class Uneven(gaf.GAF):
    """Overrides only the conclusion, with weights that the running sum cannot give."""

    def conclude(self, accepted: Tensor, distances: Tensor) -> Decision:
        weights = torch.arange(len(accepted), dtype=torch.float64)
        return Decision(weights, accepted, torch.tensor(True), distances)


ROWS = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])


def fed(policy: gaf.GAF) -> tuple[gaf.Accumulator, nn.Parameter]:
    p = nn.Parameter(torch.zeros(2))
    acc = gaf.Accumulator(SGD([p], 1.0), policy)
    for row in ROWS:
        acc.backward(torch.dot(p, row))
    return acc, p


def test_a_policy_that_overrides_the_call_gets_the_gram_matrix() -> None:
    acc, p = fed(LastOnly())
    acc.step()
    torch.testing.assert_close(p.data, -ROWS[-1])


def test_a_policy_that_streams_cannot_weigh_rows_apart() -> None:
    acc, _ = fed(Uneven())
    with pytest.raises(ValueError, match="must weigh them alike; got weights"):
        acc.step()


def test_a_decision_has_one_weight_per_row() -> None:
    acc, _ = fed(lambda gram: gaf.GAF()(gram[:2, :2]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one weight for each of the 3 rows; got shape \(2,\)"):
        acc.step()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("policy", [0.97, gaf.GAF, None])
def test_a_policy_must_be_callable(policy: object) -> None:
    with pytest.raises(TypeError, match="policy must be a callable from a Gram matrix"):
        gaf.Accumulator(SGD([nn.Parameter(torch.ones(2))], 0.1), policy)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("optimizer", [3, None, [nn.Linear(2, 2)]])
def test_an_optimizer_must_be_one(optimizer: object) -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        gaf.Accumulator(optimizer, gaf.GAF())  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("tau", ["0.97", None, [0.5], 1j])
def test_tau_must_be_a_number(tau: object) -> None:
    with pytest.raises(ValueError, match=r"tau is a cosine distance and must lie in \[0, 2\]"):
        gaf.GAF(tau)  # type: ignore[arg-type]


def test_parameters_must_be_on_one_device() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    with pytest.raises(ValueError, match="on one device; they are on cpu, meta"):
        gaf.Accumulator(SGD(params, 0.1), gaf.GAF())


# -------------------------------------------------------------------------------------------------- leaving a macro-batch


def test_discard_drops_what_waits_and_nothing_else() -> None:
    p = nn.Parameter(torch.zeros(2))
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF())
    acc.backward(torch.dot(p, torch.tensor([5.0, 5.0])))
    with pytest.raises(RuntimeError, match="between macro-batches"):
        acc.load_state_dict({})
    acc.discard()
    assert not acc.waiting
    assert acc.stats()["micro_gradients"] == 0
    acc.load_state_dict(acc.state_dict())
    for row in ROWS:
        acc.backward(torch.dot(p, row))
    acc.step()
    torch.testing.assert_close(p.data, -ROWS.mean(0))


def test_discard_after_decide_is_refused() -> None:
    acc, _ = fed(gaf.GAF())
    acc.decide()
    with pytest.raises(RuntimeError, match="discard\\(\\) came after decide\\(\\)"):
        acc.discard()


def norm_net() -> tuple[nn.Sequential, nn.BatchNorm1d]:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(norm, nn.Linear(4, 2)), norm


def test_statistics_reset_between_macro_batches_stay_reset() -> None:
    torch.manual_seed(0)
    model, norm = norm_net()
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0), model=model, bn="accepted")
    x, y = torch.randn(4, 8, 4), torch.randint(2, (4, 8))
    for i in (0, 1):
        acc.backward(cross_entropy(model(x[i]), y[i]))
    acc.step()
    norm.reset_running_stats()
    for i in (2, 3):
        acc.backward(cross_entropy(model(x[i]), y[i]))
    acc.step()
    fresh, alone = norm_net()
    for i in (2, 3):
        fresh(x[i])
    torch.testing.assert_close(norm.running_mean, alone.running_mean)
    assert norm.num_batches_tracked == alone.num_batches_tracked == 2


def test_discard_takes_batch_norm_back_to_the_macro_batches_start() -> None:
    torch.manual_seed(0)
    model, norm = norm_net()
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0), model=model, bn="accepted")
    before = copy.deepcopy(norm.state_dict())
    acc.backward(cross_entropy(model(torch.randn(8, 4)), torch.randint(2, (8,))))
    acc.discard()
    assert all(
        torch.equal(before[key], value)
        for key, value in norm.state_dict().items()
        if "running" in key or "num" in key
    )


# -------------------------------------------------------------------------------------------------------- giants, scope


def test_a_row_far_longer_than_the_median_is_absent() -> None:
    rows = torch.tensor([[1.0, 0.1], [1.0, 0.0], [900.0, 90.0], [0.9, 0.1]])
    update, decision = gaf.aggregate(rows, gaf.GAF(0.5, max_norm_ratio=100))
    assert decision.accepted.tolist() == [True, True, False, True]
    assert decision.distances[2].isnan()
    torch.testing.assert_close(update, rows[[0, 1, 3]].mean(0))
    p = nn.Parameter(torch.zeros(2))
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF(0.5, max_norm_ratio=100))
    for row in rows:
        acc.backward(torch.dot(p, row))
    acc.step()
    torch.testing.assert_close(p.data, -update)
    assert acc.stats()["absent"] == 1
    everything, _ = gaf.aggregate(rows, gaf.GAF(0.5))
    assert everything[0] > 200


def test_broken_rows_do_not_move_the_median() -> None:
    rows = torch.tensor(
        [[torch.nan, 0.0], [torch.inf, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [50.0, 0.0]]
    )
    decision = gaf.GAF(0.5, max_norm_ratio=10)(gaf.gram(rows))
    assert decision.accepted.tolist() == [False, False, False, True, True, False]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("nan"), "10"])
def test_max_norm_ratio_must_be_at_least_one(ratio: object) -> None:
    with pytest.raises(
        ValueError, match="max_norm_ratio must be None or a number of at least 1; got"
    ):
        gaf.GAF(max_norm_ratio=ratio)  # type: ignore[arg-type]


def test_scope_group_is_for_data_parallel_engines() -> None:
    with pytest.raises(
        ValueError, match=r"scope must be 'all' or 'layer'; got 'group'.*Use gaf\.attach"
    ):
        gaf.Accumulator(SGD([nn.Parameter(torch.ones(2))], 0.1), gaf.GAF(scope="group"))


# ------------------------------------------------------------------------------------------------- steps beside the Accumulator


def line() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.randn(4, 3)).square().mean()


def test_an_optimizer_stepped_by_hand_while_micro_gradients_wait_is_refused_and_nothing_has_moved() -> (
    None
):
    model, optimizer = line()
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    before = [p.clone() for p in model.parameters()]
    for decide in (False, True):
        acc.backward(loss_of(model))
        if decide:
            acc.decide()
        with pytest.raises(
            RuntimeError,
            match=r"SGD.step\(\) must not be called while micro-gradients wait; it was. Call acc.step\(\)",
        ):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    acc.step()
    optimizer.step()  # none wait
    del acc
    gc.collect()
    optimizer.step()


def test_an_update_that_was_cleared_before_its_step_is_told_of() -> None:
    model, optimizer = line()
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    for _ in range(2):
        acc.backward(loss_of(model))
    acc.decide()
    optimizer.zero_grad()
    with pytest.raises(
        RuntimeError,
        match="the update that decide.. put into p.grad must still be there; it was gone, and no step",
    ):
        acc.step()
    assert not acc.waiting  # the next macro-batch may begin


def test_an_optimizer_forgets_an_accumulator_that_is_gone() -> None:
    optimizer = line()[1]
    for _ in range(3):
        gaf.Accumulator(optimizer, gaf.Mean())
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_name_that_leaves_out_nothing_for_want_of_the_model_is_refused() -> None:
    model, optimizer = line()
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0), leave_out=lambda name, p: "bias" in name)
    with pytest.raises(
        ValueError,
        match="must be true for at least one parameter; it is for none.*'0 of group 0'. Pass model=",
    ):
        acc.backward(loss_of(model))
    acc = gaf.Accumulator(
        optimizer, gaf.GAF(2.0), leave_out=lambda name, p: "bias" in name, model=model
    )
    acc.backward(loss_of(model))


@pytest.mark.parametrize("options", [{}, {"bn": "accepted"}])
def test_a_model_that_is_not_the_optimizers_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match="model must hold the optimizer's parameters; this Linear holds none of them",
    ):
        gaf.Accumulator(line()[1], gaf.GAF(), model=nn.Linear(3, 1), **options)


def test_frozen_parameters_alone_are_refused() -> None:
    model, optimizer = line()
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match="at least one parameter that requires a gradient; all are frozen"
    ):
        gaf.Accumulator(optimizer, gaf.GAF()).backward(torch.ones((), requires_grad=True) * 2)


# ------------------------------------------------------------------------------------------------- runs that go nowhere


def warned(policy: Any, k: int, steps: int = 101, factor: float = 1.0) -> str:
    """What is warned of in a run, as one text."""
    model, optimizer = line()
    acc = gaf.Accumulator(optimizer, policy)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            for _ in range(k):
                acc.backward(factor * loss_of(model))
            acc.step()
    return "\n".join(str(w.message) for w in found)


@pytest.mark.parametrize("tau", [0.9, "auto", gaf.NoiseFloorTau()])
def test_one_micro_gradient_is_warned_of_whatever_the_threshold(tau: Any) -> None:
    assert "One micro-gradient has nothing to agree with" in warned(gaf.GAF(tau), 1, steps=1)


def test_more_accepted_rows_asked_for_than_there_are_is_named_as_the_cause() -> None:
    text = warned(gaf.GAF(1.9, min_accepted=5), 4)
    assert "min_accepted = 5 of 4 is more than ever agreed. Lower min_accepted" in text
    assert "raise tau" not in text


def test_rows_that_are_all_absent_are_warned_of() -> None:
    assert "Every micro-gradient was zero, NaN or infinite in 100 steps" in warned(
        gaf.GAF(), 2, factor=float("nan")
    )
    assert "Every micro-gradient" not in warned(gaf.Mean(), 2, factor=float("nan"))


def test_rows_that_count_as_absent_for_their_norm_are_no_evidence() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(20))
    acc = gaf.Accumulator(torch.optim.SGD([p], lr=0.0), gaf.GAF(2.0, max_norm_ratio=5))
    for _ in range(100):
        for i in range(4):
            acc.backward((p * (1 + torch.randn(20)) * (100 if i == 3 else 1)).sum())
        acc.step()
    found = acc.stats()
    assert found["absent"] == 100
    assert 0.8 < found["noise_scale"] < 1.25  # 1, up to sampling
    assert found["norm_dispersion"] < 0.5


def test_a_policy_that_returns_plain_numbers_is_told_what_is_wanted() -> None:
    model, optimizer = line()
    acc = gaf.Accumulator(optimizer, lambda K: Decision([1.0], [True], True, [0.0]))  # type: ignore[arg-type]
    acc.backward(loss_of(model))
    with pytest.raises((TypeError, ValueError), match="Decision"):
        acc.step()
