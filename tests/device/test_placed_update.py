"""The update between decide() and step(): edited, cleared, or as it was placed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import gaf
from gaf.device.placed import PlacedUpdate
from helpers.accumulating import AGREE, DISAGREE, ROWS_OF_3, SCALED, feed, scaler_for, vector


def test_deciding_twice_is_deciding_once_and_step_returns_the_same() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, AGREE)
    decision = acc.decide()
    grad = p.grad.clone()
    assert acc.decide() is decision
    assert torch.equal(p.grad, grad)
    assert acc.step() is decision
    assert acc.last is decision


@pytest.mark.parametrize("rows", [AGREE, DISAGREE], ids=["stepped", "skipped"])
def test_after_a_step_every_gradient_is_none(rows: list) -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, rows)
    acc.step()
    assert p.grad is None


def decide(layers: list[nn.Linear], acc: gaf.Accumulator) -> None:
    for _ in range(2):
        acc.backward(layers[1](layers[0](torch.randn(3, 4))).square().mean())
    assert acc.decide().stepped


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


CLEARINGS: dict[str, tuple[Callable, str]] = {
    "all": (lambda layers, opts: [o.zero_grad() for o in opts], "it was gone"),
    "one of two": (lambda layers, opts: opts[0].zero_grad(), "that of '0.weight' was gone"),
    "the other": (lambda layers, opts: opts[1].zero_grad(), "that of '1.weight' was gone"),
    "one parameter": (
        lambda layers, opts: setattr(layers[1].bias, "grad", None),
        "that of '1.bias' was gone",
    ),
    "zeros": (
        lambda layers, opts: [o.zero_grad(set_to_none=False) for o in opts],
        "all of its optimizer's with '0.weight' was zeros",
    ),
    "zeros in one of two": (
        lambda layers, opts: layers[1].zero_grad(set_to_none=False),
        "all of its optimizer's with '1.weight' was zeros",
    ),
}


@SCALED
@pytest.mark.parametrize("how", CLEARINGS)
def test_an_update_that_was_cleared_in_whole_or_in_part_is_noticed(how: str, scaled: bool) -> None:
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
    """A part whose units are all dead has gradients of zero: it steps on its weight decay."""
    a, dead = vector(3), vector(3)
    optimizers = [SGD([a], 0.1), SGD([dead], 0.1, weight_decay=0.5)]
    acc = gaf.Accumulator(optimizers, gaf.GAF(2.0))
    for row in ROWS_OF_3:
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
    placed = PlacedUpdate([SGD([nn.Parameter(torch.zeros(3, device="meta"))], 0.1)])
    placed.optimizers[0].param_groups[0]["params"][0].grad = torch.zeros(3, device="meta")
    placed.note()
    looks = [placed._may_look(placed.parts[0]) for _ in range(201)]
    assert [i for i, look in enumerate(looks) if look] == [0, 100, 200]
