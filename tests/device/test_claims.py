"""Who may step an optimizer or use a scaler while micro-gradients wait."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD

import gaf
from helpers.accumulating import (
    ROWS_OF_3,
    cpu_scaler,
    feed,
    line,
    loss_of,
    scaler_for,
    stacked,
    streamed,
    vector,
)
from helpers.pairs import each_pair


def test_a_step_by_hand_while_micro_gradients_wait_is_refused_and_moves_nothing() -> None:
    model, optimizer = line()
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    before = [p.clone() for p in model.parameters()]
    for decide in (False, True):
        acc.backward(loss_of(model))
        if decide:
            acc.decide()
        with pytest.raises(
            RuntimeError,
            match=r"SGD.step\(\) must not be called while micro-gradients wait; it was. Call acc",
        ):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    acc.step()
    optimizer.step()  # none wait
    del acc
    gc.collect()
    optimizer.step()


def test_an_optimizer_forgets_an_accumulator_that_is_gone() -> None:
    optimizer = line()[1]
    for _ in range(3):
        gaf.Accumulator(optimizer, gaf.Mean())
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("decided", "wrap", "scaled"), each_pair([False, True], [streamed, stacked], [False, True])
)
def test_a_new_accumulator_takes_over_from_an_interrupted_one_that_a_traceback_keeps(
    decided: bool, wrap: Callable, scaled: bool
) -> None:
    p = vector(3)
    optimizer, scaler = SGD([p], 1.0), scaler_for(scaled)

    def cell(interrupt: bool) -> gaf.Accumulator:
        acc = gaf.Accumulator(optimizer, wrap(gaf.GAF(2.0)), scaler=scaler)
        feed(acc, p, 5 * ROWS_OF_3 if interrupt else ROWS_OF_3)
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
    torch.testing.assert_close(p.detach(), 1 - ROWS_OF_3.mean(0))
    assert acc.stats()["micro_gradients"] == 2
    old = kept.__traceback__.tb_next.tb_frame.f_locals["acc"]  # type: ignore[union-attr]
    assert not old.waiting
    assert old.stats()["stepped"] == 0
    optimizer.step()  # none waits: the old one does not refuse it


def test_an_older_accumulator_may_go_on_once_the_newer_has_stepped() -> None:
    """Two policies in turn over one optimizer."""
    p = vector(3)
    optimizer = SGD([p], 1.0)
    one, other = (gaf.Accumulator(optimizer, policy) for policy in (gaf.GAF(2.0), gaf.Mean()))
    for acc in (one, other, one):
        feed(acc, p, ROWS_OF_3)
        acc.step()
    torch.testing.assert_close(p.detach(), 1 - 3 * ROWS_OF_3.mean(0))
    feed(one, p, ROWS_OF_3)
    feed(other, p, ROWS_OF_3)
    with pytest.raises(RuntimeError, match="must not be called while micro-gradients wait"):
        other.step()


def test_an_accumulator_that_cannot_be_made_takes_nothing_over() -> None:
    p = vector(3)
    optimizer = SGD([p], 1.0)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    feed(acc, p, ROWS_OF_3)
    with pytest.raises(ValueError, match="bn='accepted' needs the model"):
        gaf.Accumulator(optimizer, gaf.GAF(2.0), bn="accepted")
    assert acc.step().stepped


def test_a_scaler_serves_one_macro_batch_at_a_time() -> None:
    """Two Accumulators may share it one after the other, as a GAN's two players.

    At once, the step of one would change the other's scale.
    """
    p, q, amp = vector(), vector(), cpu_scaler()
    first, second = (gaf.Accumulator(SGD([v], 0.1), gaf.GAF(0.5), scaler=amp) for v in (p, q))
    for _ in range(2):
        feed(first, p, [[1.0, 0.0], [1.0, 0.0]])
        with pytest.raises(
            ValueError,
            match=r"scaler must serve one macro-batch at a time.*Call its step\(\) first",
        ):
            second.backward(q.sum())
        first.step()
        feed(second, q, [[0.0, 1.0], [0.0, 1.0]])
        second.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.8, 1.0]))
    torch.testing.assert_close(q.detach(), torch.tensor([1.0, 0.8]))
