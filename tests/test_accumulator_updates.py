"""gaf.Accumulator between decide() and the end of the macro-batch: edits, clearings, exceptions, interruptions; and wrong arguments."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

import gaf
from gaf.device.backward import unshared
from gaf.device.placed import Placed

ROWS = torch.tensor([[1.0, 2.0, -3.0], [1.0, 2.0, -2.0]])


def stacked(policy: Callable) -> Callable:
    """The same policy, but a plain callable: the rows are kept, and it is given their Gram matrix."""
    return lambda gram: policy(gram)


ENGINES = pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
SCALED = pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])


def vector(n: int = 3, value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((n,), value))


def feed(acc: gaf.Accumulator, p: Tensor, rows: Tensor = ROWS) -> None:
    for row in rows:
        acc.backward((p * row).sum())


def scaler_for(scaled: bool) -> GradScaler | None:
    return GradScaler("cpu", init_scale=8.0, growth_interval=2) if scaled else None


# ------------------------------------------------------------------------------------------------- an update that is lost


def two(scaled: bool) -> tuple[list[nn.Linear], list[Optimizer], gaf.Accumulator]:
    """Two layers with an optimizer each, decided to step."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.Linear(3, 2)]
    optimizers: list[Optimizer] = [
        SGD(layers[0].parameters(), 0.1, weight_decay=0.1),
        Adam(layers[1].parameters(), 0.1),
    ]
    acc = gaf.Accumulator(
        optimizers, gaf.GAF(2.0), model=nn.Sequential(*layers), scaler=scaler_for(scaled)
    )
    decide(layers, acc)
    return layers, optimizers, acc


def decide(layers: list[nn.Linear], acc: gaf.Accumulator) -> None:
    for _ in range(2):
        acc.backward(layers[1](layers[0](torch.randn(3, 4))).square().mean())
    assert acc.decide().stepped


CLEARINGS: dict[str, tuple[Callable, str]] = {
    "all": (lambda layers, opts: [o.zero_grad() for o in opts], "it was gone"),
    "one of two": (lambda layers, opts: opts[0].zero_grad(), "that of '0.weight' was gone"),
    "the other": (lambda layers, opts: opts[1].zero_grad(), "that of '1.weight' was gone"),
    "one parameter": (lambda layers, opts: setattr(layers[1].bias, "grad", None), "that of '1.bias' was gone"),
    "zeros": (
        lambda layers, opts: [o.zero_grad(set_to_none=False) for o in opts],
        "all of its optimizer's with '0.weight' was zeros",
    ),
    "zeros in one of two": (
        lambda layers, opts: layers[1].zero_grad(set_to_none=False),
        "all of its optimizer's with '1.weight' was zeros",
    ),
}  # fmt: skip


@SCALED
@pytest.mark.parametrize("how", CLEARINGS)
def test_an_update_that_was_cleared_in_whole_or_in_part_is_told_of(how: str, scaled: bool) -> None:
    layers, optimizers, acc = two(scaled)
    params = [p for layer in layers for p in layer.parameters()]
    before = [p.detach().clone() for p in params]
    clear, what = CLEARINGS[how]
    clear(layers, optimizers)
    with pytest.raises(
        RuntimeError, match=rf"must still be there; {what}, and no step was taken. Leave out zero"
    ):
        acc.step()
    assert all(map(torch.equal, before, params))
    assert not optimizers[1].state
    assert not acc.waiting
    stats = acc.stats()
    assert (stats["steps"], stats["stepped"], stats["accepted"], stats["rejected"]) == (1, 0, 0, 2)
    decide(layers, acc)  # the next macro-batch is an ordinary one
    assert acc.step().stepped
    assert not any(map(torch.equal, before, params))


def clip_to(norm: float) -> Callable:
    return lambda params: nn.utils.clip_grad_norm_(params, norm)


def copies(params: list[nn.Parameter]) -> None:
    for p in params:
        assert p.grad is not None
        p.grad = 0.5 * p.grad


def zero_copies(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.zeros_like(p)


def mask(params: list[nn.Parameter]) -> None:
    """One layer's update is set to zero, as to hold it still."""
    assert params[0].grad is not None
    params[0].grad.zero_()


def by_value(params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_value_(params, 1e-3)


EDITS = [clip_to(0.1), clip_to(0.0), copies, zero_copies, mask, by_value]


@SCALED
@pytest.mark.parametrize("edit", EDITS)
def test_an_update_may_be_edited_and_the_optimizer_steps_with_what_is_there(
    edit: Callable, scaled: bool
) -> None:
    layers, _, acc = two(scaled)
    params = [p for layer in layers for p in layer.parameters()]
    edit(params)
    grads = [p.grad.clone() for p in params]  # type: ignore[union-attr]
    want = [
        p.detach() - 0.1 * (g + 0.1 * p.detach()) for p, g in zip(params[:2], grads, strict=False)
    ]
    assert acc.step().stepped
    torch.testing.assert_close([p.detach() for p in params[:2]], want)


@pytest.mark.parametrize("edit", [clip_to(1.0), clip_to(0.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_update_of_zeros_alone_is_no_lost_one(edit: Callable, sign: float) -> None:
    """A part whose units are all dead has gradients, and they are zero: clipped or not, it steps on its weight decay."""
    a, dead = vector(), vector()
    optimizers = [SGD([a], 0.1), SGD([dead], 0.1, weight_decay=0.5)]
    acc = gaf.Accumulator(optimizers, gaf.GAF(2.0))
    for row in ROWS:
        acc.backward((a * row).sum() + sign * (0 * dead).sum())
    acc.decide()
    edit([a, dead])
    assert acc.step().stepped
    torch.testing.assert_close(dead.detach(), torch.full((3,), 0.95))


def test_an_update_in_the_layout_or_size_that_it_has_is_looked_at() -> None:
    """Empty, scalar, channels-last and large parameters in one optimizer."""
    params = [
        nn.Parameter(torch.zeros(0)),
        nn.Parameter(torch.zeros(())),
        nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.zeros(70, 70).T),
    ]
    rows = [torch.randn_like(p) for p in params]
    optimizer = SGD(params, 1.0)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    for clear in (True, False):
        for _ in range(2):
            acc.backward(sum((p * r).sum() for p, r in zip(params, rows, strict=True)))
        acc.decide()
        if clear:
            optimizer.zero_grad(set_to_none=False)
            with pytest.raises(RuntimeError, match="was zeros"):
                acc.step()
    acc.step()
    for p, r in zip(params, rows, strict=True):
        torch.testing.assert_close(p.detach(), -r)


def test_zeros_are_looked_for_at_one_edited_update_in_a_hundred_on_an_accelerator() -> None:
    """A look waits for the device; the meta device stands in for one."""
    placed = Placed([SGD([nn.Parameter(torch.zeros(3, device="meta"))], 0.1)])
    placed.optimizers[0].param_groups[0]["params"][0].grad = torch.zeros(3, device="meta")
    placed.note()
    looks = [placed._may_look(placed.parts[0]) for _ in range(201)]
    assert [i for i, look in enumerate(looks) if look] == [0, 100, 200]


def test_what_decide_notes_keeps_no_gradient() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(2.0))
    feed(acc, p)
    acc.decide()
    grad = p.grad
    assert grad is not None
    acc.step()
    gc.collect()
    assert unshared(grad) is grad  # this name alone holds it


# ---------------------------------------------------------------------------------------------- gradients that are kept


def keep_tensor(p: nn.Parameter, kept: list[Tensor]) -> Any:
    return p.register_post_accumulate_grad_hook(lambda q: kept.append(q.grad))


def keep_view(p: nn.Parameter, kept: list[Tensor]) -> Any:
    return p.register_post_accumulate_grad_hook(lambda q: kept.append(q.grad.view(-1)))


def keep_detached(p: nn.Parameter, kept: list[Tensor]) -> Any:
    return p.register_post_accumulate_grad_hook(lambda q: kept.append(q.grad.detach()))


def keep_array(p: nn.Parameter, kept: list[Tensor]) -> Any:
    return p.register_post_accumulate_grad_hook(
        lambda q: kept.append(torch.from_numpy(q.grad.numpy()))
    )


def keep_arriving(p: nn.Parameter, kept: list[Tensor]) -> Any:
    return p.register_hook(kept.append)


@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("keep", [keep_tensor, keep_view, keep_detached, keep_array, keep_arriving])
@ENGINES
def test_what_a_hook_keeps_is_not_written_over(
    keep: Callable, average: str, wrap: Callable
) -> None:
    """Two macro-batches, so that buffers come round again."""
    p, kept = vector(), []  # type: ignore[var-annotated]
    keep(p, kept)
    rows = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [1.0, 2.0, 2.0], [1.0, 2.0, 1.0]])
    acc = gaf.Accumulator(SGD([p], 0.1), wrap(gaf.GAF(0.9, average=average)))
    for _ in range(2):
        feed(acc, p, rows)
        acc.step()
    assert torch.equal(torch.stack(kept), torch.cat([rows, rows]))


def test_an_update_that_is_kept_is_not_written_over() -> None:
    p, kept = vector(), []
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(2.0))
    for factor in (1.0, 2.0, 3.0):
        feed(acc, p, factor * ROWS)
        acc.decide()
        kept.append(p.grad)
        acc.step()
    assert torch.equal(torch.stack(kept), torch.stack([f * ROWS.mean(0) for f in (1.0, 2.0, 3.0)]))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- an exception in optimizer.step()


class Fails(SGD):
    """Raises while `broken`, after it has moved its parameters or before."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        if self.broken:
            raise MemoryError("in step")
        return super().step(closure)


@SCALED
@ENGINES
def test_an_exception_in_the_optimizers_step_ends_the_macro_batch_and_counts_no_step(
    wrap: Callable, scaled: bool
) -> None:
    p, twin = vector(), vector()
    optimizer, plain = Fails([p], 0.1, momentum=0.9), SGD([twin], 0.1, momentum=0.9)
    scaler = scaler_for(scaled)
    acc = gaf.Accumulator(optimizer, wrap(gaf.GAF(2.0)), scaler=scaler)
    scheduler = acc.gate(StepLR(optimizer, 1, 0.5))
    for broken in (False, True, False):
        optimizer.broken = broken
        feed(acc, p)
        if broken:
            with pytest.raises(MemoryError):
                acc.step()
            acc.discard()  # nothing waits
            assert p.grad is None
            assert acc.last is not None
            assert acc.outcome is not None
            assert not acc.last.stepped
            assert not acc.outcome.stepped
            scheduler.step()
        else:
            assert acc.step().stepped
            twin.grad = ROWS.mean(0)
            plain.step()
            scheduler.step()
            plain.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    stats = acc.stats()
    assert (stats["steps"], stats["stepped"], stats["micro_gradients"]) == (3, 2, 6)
    assert (stats["accepted"], stats["rejected"], stats["acceptance"]) == (4, 2, 2 / 3)
    assert scheduler.last_epoch == 2
    torch.testing.assert_close(p, twin)
    if (
        scaler is not None
    ):  # three updates without an overflow, as it would see them in plain training
        assert scaler.get_scale() == 16.0


def test_layers_show_no_step_after_an_exception_in_it() -> None:
    model = nn.Linear(3, 1)
    optimizer = Fails(model.parameters(), 0.1)
    optimizer.broken = True
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0, scope="layer"), model=model)
    for _ in range(2):
        acc.backward(model(ROWS).square().sum())
    with pytest.raises(MemoryError):
        acc.step()
    assert not any(decision.stepped for decision in acc.layers.values())


@ENGINES
def test_a_step_that_a_hook_of_the_users_refuses_leaves_the_accumulator_usable(
    wrap: Callable,
) -> None:
    p = vector()
    optimizer = SGD([p], 1.0)

    def refuse(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(refuse)
    acc = gaf.Accumulator(optimizer, wrap(gaf.GAF(2.0)))
    feed(acc, p)
    with pytest.raises(KeyboardInterrupt):
        acc.step()
    hook.remove()
    assert torch.equal(p, torch.ones(3))
    state = acc.state_dict()  # between macro-batches
    feed(acc, p)
    acc.step()
    torch.testing.assert_close(p.detach(), 1 - ROWS.mean(0))
    acc.load_state_dict(state)
    assert acc.stats()["stepped"] == 0


# ------------------------------------------------------------------------------------------------ interrupted, and made anew


@SCALED
@ENGINES
@pytest.mark.parametrize("decided", [False, True])
def test_a_new_accumulator_takes_over_from_an_interrupted_one_that_a_traceback_keeps(
    decided: bool, wrap: Callable, scaled: bool
) -> None:
    p = vector()
    optimizer, scaler = SGD([p], 1.0), scaler_for(scaled)

    def cell(interrupt: bool) -> gaf.Accumulator:
        acc = gaf.Accumulator(optimizer, wrap(gaf.GAF(2.0)), scaler=scaler)
        feed(acc, p, 5 * ROWS if interrupt else ROWS)
        if interrupt:
            if decided:
                acc.decide()
            raise KeyboardInterrupt
        acc.step()
        return acc

    try:
        cell(interrupt=True)
    except KeyboardInterrupt as error:
        kept = error
    acc = cell(interrupt=False)
    torch.testing.assert_close(p.detach(), 1 - ROWS.mean(0))
    assert acc.stats()["micro_gradients"] == 2
    old = kept.__traceback__.tb_next.tb_frame.f_locals["acc"]  # type: ignore[union-attr]
    assert not old.waiting
    assert old.stats()["stepped"] == 0
    optimizer.step()  # none waits: the old one does not refuse it


def test_an_older_accumulator_may_go_on_once_the_newer_has_stepped() -> None:
    """Two policies in turn over one optimizer."""
    p = vector()
    optimizer = SGD([p], 1.0)
    one, other = (gaf.Accumulator(optimizer, policy) for policy in (gaf.GAF(2.0), gaf.Mean()))
    for acc in (one, other, one):
        feed(acc, p)
        acc.step()
    torch.testing.assert_close(p.detach(), 1 - 3 * ROWS.mean(0))
    feed(one, p)
    feed(other, p)
    with pytest.raises(RuntimeError, match="must not be called while micro-gradients wait"):
        other.step()


def test_an_accumulator_that_cannot_be_made_takes_nothing_over() -> None:
    p = vector()
    optimizer = SGD([p], 1.0)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    feed(acc, p)
    with pytest.raises(ValueError, match="bn='accepted' needs the model"):
        gaf.Accumulator(optimizer, gaf.GAF(2.0), bn="accepted")
    assert acc.step().stepped


# ------------------------------------------------------------------------------------------------------ scales, overflows


@ENGINES
@pytest.mark.parametrize(
    "policy",
    [gaf.GAF(2.0), gaf.GAF(2.0, min_accepted=1), gaf.Mean(), gaf.RandomSkip(1.0)],
    ids=repr,
)
def test_a_scale_that_has_fallen_to_zero_steps_nothing_and_says_so(
    policy: Any, wrap: Callable
) -> None:
    """As in plain training nothing moves any more, for nothing can be unscaled. Then the scale is set right."""
    p = vector()
    scaler = GradScaler("cpu", init_scale=2.0**-148)
    acc = gaf.Accumulator(SGD([p], 0.1, weight_decay=0.5), wrap(policy), scaler=scaler)
    for last in (float("nan"), float("nan"), 1.0, 1.0):
        feed(acc, p, torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, last]]))
        assert not acc.step().stepped
    assert scaler.get_scale() == 0
    assert torch.equal(p, torch.ones(3))
    stats = acc.stats()
    assert (stats["steps"], stats["stepped"], stats["accepted"]) == (4, 0, 0)
    scaler.update(new_scale=8.0)
    feed(acc, p)
    assert acc.step().stepped
    assert not torch.equal(p, torch.ones(3))
    if not isinstance(policy, gaf.Mean):
        assert acc.stats()["norm_dispersion"] > 0


def test_no_layer_says_that_it_stepped_after_an_overflow() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    scaler = GradScaler("cpu", init_scale=8.0)
    acc = gaf.Accumulator(
        SGD(model.parameters(), 0.1), gaf.GAF(2.0, scope="layer"), model=model, scaler=scaler
    )
    for bad in (False, True, False):
        for i in range(2):
            loss = model(ROWS).square().sum()
            acc.backward(loss + model[0].weight.sum() * float("inf") if bad and i else loss)
        decision = acc.step()
        assert bool(decision.stepped) != bad
        for layer in acc.layers.values():
            assert bool(layer.stepped) != bad
            assert bool(layer.accepted.any()) != bad
            assert bool(layer.weights.any()) != bad
    assert scaler.get_scale() == 4


# --------------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"model": [1]}, TypeError, r"model must be a torch.nn.Module or None; got list \[1\]. Pass the model"),
        ({"model": nn.Linear}, TypeError, r"model must be a torch.nn.Module or None; got type"),
        ({"scaler": True}, TypeError, r"scaler must be a torch.amp.GradScaler or None; got bool True. Use torch"),
        ({"scaler": 65536.0}, TypeError, r"got float 65536.0"),
        ({"leave_out": ["embed"]}, TypeError, r"leave_out must be a function of .*; got list \['embed'\]. Use such"),
        ({"leave_out": "embed"}, TypeError, r"got str 'embed'"),
        ({"leave_out": nn.Linear}, TypeError, r"got type"),
        ({"bn": True}, ValueError, r"bn must be 'all' or 'accepted'; got True"),
        ({"bn": "none"}, ValueError, r"got 'none'"),
        ({"policy": 0.9}, TypeError, r"policy must be a callable from a Gram matrix to a Decision; got 0.9. Use"),
        ({"optimizer": "SGD"}, TypeError, r"must be a torch.optim.Optimizer or a list of them; got str"),
        ({"optimizer": nn.Linear(2, 1)}, TypeError, r"got Linear"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_with_its_value_and_the_fix(
    argument: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"optimizer": SGD([vector()], 0.1), "policy": gaf.GAF()} | argument
    with pytest.raises(error, match=f"^Accumulator: .*{message}"):
        gaf.Accumulator(**given)


@pytest.mark.usefixtures("unchecked")
@SCALED
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: 1.0, TypeError, r"a tensor of one number; got float 1.0. Pass what the loss function returns, not its"),
        (lambda p: [p.sum()], TypeError, r"got list"),
        (lambda p: None, TypeError, r"got NoneType None"),
        (lambda p: {"loss": p.sum()}, TypeError, r"got dict"),
        (lambda p: p * 1, ValueError, r"must be one real number, .*; got shape \(3,\) of torch.float32. Use reduction='mean'"),
        (lambda p: p[:0] * 1, ValueError, r"got shape \(0,\)"),
        (lambda p: (p * 1j).sum(), ValueError, r"got shape \(\) of torch.complex64"),
        (lambda p: torch.tensor(3), ValueError, r"got shape \(\) of torch.int64"),
        (lambda p: p.sum().detach(), RuntimeError, r"does not require grad. Compute it outside of torch.no_grad"),
    ],
)  # fmt: skip
def test_what_is_no_loss_is_named_with_its_value_and_the_fix(
    make: Callable, error: type[Exception], message: str, scaled: bool
) -> None:
    """And costs nothing: what waits goes on."""
    p = vector()
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF(2.0), scaler=scaler_for(scaled))
    feed(acc, p, ROWS[:1])
    with pytest.raises(error, match=f"^Accumulator: .*{message}"):
        acc.backward(make(p))
    feed(acc, p, ROWS[1:])
    acc.step()
    torch.testing.assert_close(p.detach(), 1 - ROWS.mean(0))


def test_a_loss_of_one_number_in_a_vector_is_one() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF(2.0))
    for row in ROWS:
        acc.backward((p * row).sum(0, keepdim=True))
    acc.step()
    torch.testing.assert_close(p.detach(), 1 - ROWS.mean(0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("state", "shown"),
    [({}, r"\[\]"), ({"model": {}, "gaf": {}}, r"\['gaf', 'model'\]"), (None, "NoneType None"), ([1], r"list \[1\]")],
)  # fmt: skip
def test_a_state_of_something_else_is_named(state: Any, shown: str) -> None:
    acc = gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF())
    with pytest.raises(ValueError, match=f"with 'telemetry' and 'policy'; got {shown}. Save acc"):
        acc.load_state_dict(state)


def test_a_state_that_the_policy_refuses_leaves_the_counts_as_they_were() -> None:
    p = vector()
    learned = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(gaf.QuantileTau()))
    feed(learned, p)
    learned.step()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(gaf.MovingAverageTau()))
    with pytest.raises(ValueError, match="the state must be of the same kind"):
        acc.load_state_dict(learned.state_dict())
    assert acc.stats()["steps"] == 0
