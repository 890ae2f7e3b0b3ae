"""Memory: what is held, what is shared, what is written over, and what waits for the host."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gaf
from gaf.device.buffers import unshare
from helpers.accumulating import AGREE, ROWS_OF_3, feed, stacked, streamed, vector
from helpers.pairs import each_pair


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """gc.get_objects() then gives the test's own."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def gradient_sized_blocks(params: list[nn.Parameter]) -> int:
    """How many blocks of a parameter's size are alive beside the parameters themselves."""
    n = params[0].numel()
    alive = {
        t.untyped_storage().data_ptr()
        for t in gc.get_objects()
        if issubclass(type(t), Tensor) and t.numel() == n
    }
    grads = {p.grad.untyped_storage().data_ptr() for p in params if p.grad is not None}
    return len((alive | grads) - {p.untyped_storage().data_ptr() for p in params})


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("k", [2, 5, 9])
@pytest.mark.parametrize("agree", [True, False])
def test_between_passes_streaming_holds_one_gradient_whatever_k_and_stacking_holds_k(
    k: int, agree: bool
) -> None:
    """The running sum, after each backward, after decide and after step."""
    params = [nn.Parameter(torch.zeros(76_543)), nn.Parameter(torch.zeros(76_543))]

    def most(rule: Any) -> float:
        acc, held = gaf.Accumulator(SGD(params, 0.1), rule), []
        for _ in range(2):
            for i in range(k):
                sign = 1.0 if agree or i % 2 == 0 else -1.0
                acc.backward(sum((sign * p).sum() * (i + 1) for p in params))
                held.append(gradient_sized_blocks(params))
            acc.decide()
            held.append(gradient_sized_blocks(params))
            acc.step()
            held.append(gradient_sized_blocks(params))
        return max(held) / len(params)

    assert most(gaf.GAF(0.5)) == 1
    assert most(gaf.GAF(0.5, average="halving")) == 1
    assert most(gaf.Mean()) == 1
    assert most(stacked(gaf.GAF(0.5))) == k


@pytest.mark.usefixtures("only_new_objects")
def test_a_rows_memory_is_free_before_the_next_backward_pass() -> None:
    """On a CPU k - 1 rows stay from step to step, and each pass begins with one block less."""
    p = nn.Parameter(torch.zeros(76_543))
    acc, held = gaf.Accumulator(SGD([p], 0.1), stacked(gaf.GAF(0.5))), []
    for _ in range(2):
        for _ in range(4):
            loss = (p * 2.0).sum()
            loss.register_hook(lambda grad: held.append(gradient_sized_blocks([p])))
            acc.backward(loss)
        acc.step()
        held.append(gradient_sized_blocks([p]))
    assert held == [0, 1, 2, 3, 3, 2, 2, 2, 3, 3]


def test_an_accumulator_keeps_no_graph_alive() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    for row in AGREE:
        loss = (p * torch.tensor(row)).sum()
        node = weakref.ref(loss)
        acc.backward(loss)
        del loss
        assert node() is None


@pytest.mark.parametrize(
    "policy", [gaf.GAF(0.5), gaf.GAF(0.5, average="halving"), gaf.Mean(), stacked(gaf.GAF(0.5))]
)
def test_no_micro_gradient_waits_for_the_host_off_the_cpu(policy: Any) -> None:
    """The meta device has no values: reading one raises. Only the decision is read on the host."""
    p = [
        nn.Parameter(torch.empty(3, 4, device="meta")),
        nn.Parameter(torch.empty(5, device="meta")),
    ]
    acc = gaf.Accumulator(SGD(p, 0.1), policy, leave_out=lambda name, t: t.ndim == 1)
    for _ in range(4):
        acc.backward(p[0].sum() + p[1].sum())
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta"):
        acc.decide()


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


def test_the_first_gradient_is_not_copied() -> None:
    """Its memory becomes the sum's, and the kept row's."""
    p, places = vector(3), []
    p.register_post_accumulate_grad_hook(lambda q: places.append(q.grad.data_ptr()))
    model = nn.ParameterDict({"p": p})
    for policy in (gaf.GAF(2.0), gaf.GAF(2.0, scope="layer"), gaf.GAF(2.0, start="best")):
        acc = gaf.Accumulator(SGD([p], 0.1), policy, model=model)
        feed(acc, p, ROWS_OF_3)
        holders = [*getattr(acc._rows, "holders", [acc._rows])]
        kept = [h.rows[0] if hasattr(h, "rows") else h.sum.total for h in holders]
        assert [t.data_ptr() for row in kept for t in row] == [places[0]]
        acc.discard()
        places.clear()


def test_memory_of_its_own_is_not_copied() -> None:
    """A release of torch may change how many references a fresh tensor has.

    Then every gradient would be copied.
    """
    fresh = torch.ones(4)
    assert unshare(fresh) is fresh
    assert unshare(fresh[:2]).data_ptr() != fresh.data_ptr()


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


@pytest.mark.parametrize(
    ("keep", "average", "wrap"),
    each_pair(
        [keep_tensor, keep_view, keep_detached, keep_array, keep_arriving],
        ["mean", "halving"],
        [streamed, stacked],
    ),
)
def test_what_a_hook_keeps_is_not_written_over(
    keep: Callable, average: str, wrap: Callable
) -> None:
    """Two macro-batches, so that buffers come round again."""
    p, kept = vector(3), []  # type: ignore[var-annotated]
    keep(p, kept)
    rows = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [1.0, 2.0, 2.0], [1.0, 2.0, 1.0]])
    acc = gaf.Accumulator(SGD([p], 0.1), wrap(gaf.GAF(0.9, average=average)))
    for _ in range(2):
        feed(acc, p, rows)
        acc.step()
    assert torch.equal(torch.stack(kept), torch.cat([rows, rows]))


def test_an_update_that_is_kept_is_not_written_over() -> None:
    p, kept = vector(3), []
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(2.0))
    for factor in (1.0, 2.0, 3.0):
        feed(acc, p, factor * ROWS_OF_3)
        acc.decide()
        kept.append(p.grad)
        acc.step()
    assert torch.equal(
        torch.stack(kept), torch.stack([f * ROWS_OF_3.mean(0) for f in (1.0, 2.0, 3.0)])
    )  # type: ignore[arg-type]


def test_what_decide_notes_keeps_no_gradient() -> None:
    p = vector(3)
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(2.0))
    feed(acc, p, ROWS_OF_3)
    acc.decide()
    grad = p.grad
    assert grad is not None
    acc.step()
    gc.collect()
    assert unshare(grad) is grad  # this name alone holds it
