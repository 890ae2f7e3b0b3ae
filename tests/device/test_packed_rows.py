"""Rows as few vectors: packed, decided on and unpacked, they are the rows as they came."""

from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import gaf
from gaf.device import packs
from gaf.device.packs import packs_for
from gaf.device.rows import rows_for, rows_without_waiting
from gaf.rules.gram import gram_of, products_of
from helpers.accumulating import ENGINES

SHAPES = [(3, 4), (), (5,), (0,), (2, 3, 4, 5), (40, 30), (7,)]


def parameters() -> list[nn.Parameter]:
    """Of several layouts and dtypes; the sixth is long."""
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    params[4].data = params[4].data.contiguous(memory_format=torch.channels_last)
    params[0].data = params[0].data.t().contiguous().t()
    params[6].data = params[6].data.double()
    return params


def gradients(params: list[nn.Parameter], seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=rng).to(p.dtype) for p in params]


@pytest.fixture(autouse=True)
def long_from_1000_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packs, "packed_below", lambda device: 1000)
    packs.make_packs.cache_clear()
    yield
    packs.make_packs.cache_clear()


def test_short_parameters_of_one_kind_share_a_vector() -> None:
    params = parameters()
    voters = [True, True, False, True, True, True, True]
    made = packs_for(params, voters)
    assert made.members == [[0, 1, 3, 4], [2], [5], [6]]
    assert made.votes == [True, False, True, True]


def test_a_vector_is_no_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "DEVICE_CHUNK", 10)
    packs.make_packs.cache_clear()
    params = [torch.zeros(n) for n in (4, 4, 4, 9, 1)]
    assert packs_for(params, [True] * 5).members == [[0, 1], [2], [3, 4]]


def test_unpacked_vectors_are_the_gradients_in_the_parameters_layouts() -> None:
    params = parameters()
    made, row = packs_for(params, [True] * 7), gradients(params, 0)
    found = made.unpack(made.pack(list(row)))
    for p, ours, given in zip(params, found, row, strict=True):
        assert ours is not None and torch.equal(ours, given) and ours.dtype == p.dtype
    assert [t.stride() for t in found[:5] if t is not None] == [p.stride() for p in params[:5]]


def test_packing_uses_the_row_up_and_a_missing_gradient_is_zeros() -> None:
    params = parameters()
    made, row = packs_for(params, [True] * 7), gradients(params, 0)
    given = [*row[:2], None, *row[3:5], None, None]
    vectors = made.pack(given)
    assert given == [None] * 7 and vectors[1:] == [None, None]
    found = made.unpack(vectors)
    assert found[2] is not None and found[2].tolist() == [0.0] * 5 and found[5] is None


@pytest.mark.parametrize(
    "policy",
    [gaf.GAF(1.1), gaf.GAF(1.1, average="halving"), gaf.GAF(1.1, start="best"), gaf.Mean()],
    ids=repr,
)
def test_packed_rows_give_the_decision_and_update_of_rows_apart(policy: gaf.GAF) -> None:
    """One parameter never has a gradient, one only in some rows, and one row is not finite."""
    params = parameters()
    holders = [make(policy, [True] * 7, params) for make in (rows_for, rows_without_waiting)]
    for seed in range(6):
        for holder in holders:
            row: list[Tensor | None] = list(gradients(params, seed))
            row[2], row[5] = None, row[5] if seed % 2 else None
            if seed == 4 and not isinstance(policy, gaf.Mean):
                row[0] = torch.full_like(row[0], torch.nan)  # type: ignore[arg-type]
            holder.add(row)
    (decision, _), (other, _) = (holder.decide() for holder in holders)
    assert other.accepted.tolist() == decision.accepted.tolist() and bool(decision.stepped)
    # the rows apart are multiplied in float32
    torch.testing.assert_close(
        other.distances, decision.distances, rtol=0, atol=1e-6, equal_nan=True
    )
    weights = decision.weights.tolist()
    expected, found = (holder.update(weights) for holder in holders)
    assert expected[2] is None and found[2] is None
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def losses_of(params: list[nn.Parameter], row: list[Tensor]) -> Tensor:
    """Of which the row is the gradient."""
    return torch.stack([(p * g).sum() for p, g in zip(params, row, strict=True)]).sum()


@ENGINES
def test_packed_rows_are_decided_on_as_one_vector(wrap: Any) -> None:
    """Against gaf.aggregate on the stacked rows; a parameter that is left out has no say."""
    params, policy = parameters()[:6], gaf.GAF(0.9)
    common = gradients(params, 9)
    rows = [[c + g for c, g in zip(common, gradients(params, i), strict=True)] for i in range(5)]
    rows[2] = [-g for g in rows[2]]
    named = nn.ParameterDict({f"p{j}": p for j, p in enumerate(params)})
    acc = gaf.Accumulator(
        SGD(params, 1.0), wrap(policy), model=named, leave_out=lambda name, _: name == "p4"
    )
    for row in rows:
        acc.backward(losses_of(params, row))
    decision = acc.decide()
    flat = [torch.cat([row[j].reshape(-1) for j in (0, 1, 2, 3, 5)]) for row in rows]
    _, want = gaf.aggregate(torch.stack(flat).double(), policy)
    assert decision.accepted.tolist() == want.accepted.tolist() == [True, True, False, True, True]
    torch.testing.assert_close(decision.distances, want.distances, rtol=0, atol=1e-7)
    for j, p in enumerate(params):
        assert p.grad is not None
        mean = torch.tensordot(want.weights, torch.stack([row[j].double() for row in rows]), 1)
        torch.testing.assert_close(p.grad, mean.float())


def test_updates_that_share_a_vector_can_be_changed_one_by_one() -> None:
    params = parameters()[:6]
    before = [p.detach().clone() for p in params]
    acc = gaf.Accumulator(SGD(params, 1.0), gaf.GAF(2.0))
    rows = [gradients(params, seed) for seed in range(2)]
    for row in rows:
        acc.backward(losses_of(params, row))
    acc.decide()
    assert params[0].grad is not None
    params[0].grad.zero_()
    nn.utils.clip_grad_norm_(params[2:3], 1e-3)
    acc.step()
    assert torch.equal(params[0], before[0])
    assert (params[2] - before[2]).norm().item() == pytest.approx(1e-3, rel=1e-3)
    for j in (4, 5):
        torch.testing.assert_close(params[j].detach(), before[j] - (rows[0][j] + rows[1][j]) / 2)


@pytest.mark.parametrize("given", [torch.zeros(0, device="meta"), None], ids=["empty", "missing"])
def test_products_of_nothing_are_on_the_rows_device(given: Tensor | None) -> None:
    """Else layers could not be joined, or would wait for a transfer."""

    def policy(K: Tensor) -> NoReturn:
        raise LookupError(K.device.type)

    rows = rows_without_waiting(policy, [True], [torch.zeros(0, device="meta")])
    rows.add([given])
    with pytest.raises(LookupError, match="meta"):
        rows.decide()


class Transfers(TorchDispatchMode):
    """Copies from one device to another: on an accelerator each waits, or lets another wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            devices = {t.device.type for t in (*args, result) if isinstance(t, Tensor)}
            self.seen += [f"{func}: {devices}"] if len(devices) > 1 else []
        return result


class Unused(nn.Module):
    """Layers that get no gradient, an empty one, or one that does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.bias = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(1, 4)
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self) -> Tensor:
        used = self.used.weight.sum() + self.used.bias.sum()
        return used + self.bias.weight.sum() + self.bias.bias.sum() + self.empty.sum()


@pytest.mark.parametrize("scope", ["all", "layer"])
@pytest.mark.parametrize("start", ["first", "best"])
@pytest.mark.parametrize("average", ["mean", "halving"])
def test_rows_are_held_and_multiplied_where_they_are(scope: Any, start: Any, average: Any) -> None:
    """The meta device stands in for an accelerator."""
    model = Unused().to("meta")
    options: dict[str, Any] = {"model": model}
    if scope == "all":
        options["leave_out"] = lambda name, p: name.startswith("bias")
    policy = gaf.GAF(2.0, start=start, average=average, scope=scope)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), policy, **options)
    with Transfers() as transfers:
        for _ in range(3):
            acc.backward(model())
        with pytest.raises(NotImplementedError, match="meta"):  # what a decision needs on the host
            acc.decide()
    assert transfers.seen == []


def test_the_inner_products_of_empty_parameters_are_on_their_device() -> None:
    empty = [torch.zeros(0, device="meta")]
    assert [found.device.type for found in products_of(empty, empty)] == ["meta", "meta"]
    assert gram_of([empty, empty]).device.type == "meta"
