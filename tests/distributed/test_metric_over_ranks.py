"""`GAF(metric="optimizer")` and "whitened" across ranks: DDP, HSDP, a flat model; no more bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, RMSprop

import gaf
from gaf_lab.bench.bytes_sent import counting
from helpers.attached import unchecked
from helpers.problems import Odd, Wide, same_everywhere
from helpers.ranks import World

pytestmark = pytest.mark.distributed


TAUS = (2.0, 0.93)  # of even and odd steps


class Layouts(nn.Module):
    """Its micro-gradient is what it is given; parameters in several orders, one of them long."""

    def __init__(self) -> None:
        super().__init__()
        shapes: dict[str, Tensor] = {
            "long": torch.zeros(64, 30, 3, 5).to(memory_format=torch.channels_last),
            "short": torch.zeros(4, 3, 2, 5).to(memory_format=torch.channels_last),
            "transposed": torch.zeros(9, 6).t(),
            "plain": torch.zeros(7),
            "gaps": torch.zeros(6, 8)[:, ::2],
        }
        self.weights = nn.ParameterDict({name: nn.Parameter(t) for name, t in shapes.items()})

    def forward(self, row: Tensor) -> Tensor:
        parts = row.split([p.numel() for p in self.parameters()])
        pairs = zip(self.parameters(), parts, strict=True)
        return sum((p * part.view(p.shape)).sum() for p, part in pairs)  # type: ignore[return-value]


def row_at(n: int, step: int, rank: int) -> Tensor:
    """Coordinates of very different sizes, in float32."""
    random = torch.Generator().manual_seed(100 * step + rank)
    scale = torch.logspace(-1.5, 1.5, n)[
        torch.randperm(n, generator=torch.Generator().manual_seed(0))
    ]
    return 0.3 + scale * torch.randn(n, generator=random)


def moments(optimizer: Any, params: list[Any]) -> Tensor | None:
    """M by Adam's or RMSprop's state, in float64, in the order of the parameters."""
    if not optimizer.state:
        return None
    parts = []
    for p in params:
        state = optimizer.state[p]
        v = state["square_avg"] if "square_avg" in state else state["exp_avg_sq"]
        v = v.full_tensor() if hasattr(v, "full_tensor") else v
        correction = 1.0 if "square_avg" in state else 1 - 0.999 ** float(state["step"])
        parts.append(1 / ((v.double() / correction).sqrt() + 1e-8).reshape(-1))
    return torch.cat(parts)


def judge(rows: Tensor, M: Tensor | None, policy: Any) -> gaf.Decision:
    rows = rows.double()
    found: gaf.Decision = policy((rows if M is None else rows * M) @ rows.T)
    return found


def check(
    model: Any,
    optimizer: Any,
    attach: Callable[[Any], gaf.Handle],
    backward: Callable[[int], Tensor],
) -> list[list[bool]]:
    """Trains; `backward` runs a pass and returns all rows. Returns which rows were accepted."""
    handle, params = attach(gaf.GAF(2.0, metric="optimizer")), list(model.parameters())
    accepted, differs = [], 0.0
    for step in range(7):
        optimizer.zero_grad()
        M, tau = moments(optimizer, params), 0.0 if step == 4 else TAUS[step % 2]
        handle.policy = gaf.GAF(tau, metric="optimizer")
        rows = backward(step)
        expected = judge(rows, M, gaf.GAF(tau))
        assert handle.last is not None
        # float32 products, of slices that are added in other pieces
        torch.testing.assert_close(handle.last.distances, expected.distances, rtol=0, atol=2e-5)
        assert torch.equal(handle.last.accepted, expected.accepted)
        same_everywhere(handle.last.distances, handle.last.weights)
        plain = judge(rows, None, gaf.GAF(tau)).distances
        differs = max(differs, float((plain - expected.distances).abs().nan_to_num().max()))
        if expected.stepped:
            update = torch.cat([whole(p.grad).double().reshape(-1) for p in params])
            torch.testing.assert_close(
                update, expected.weights @ rows.double(), rtol=1e-4, atol=1e-6
            )
        before = [local(p).clone() for p in params], [local(s).clone() for s in states(optimizer)]
        optimizer.step()
        moved = any(not torch.equal(local(p), q) for p, q in zip(params, before[0], strict=True))
        if not expected.stepped:
            after = [local(s) for s in states(optimizer)]
            assert not moved and all(map(torch.equal, after, before[1]))
        accepted.append(handle.last.accepted.tolist())
    assert differs > 1e-3
    handle.detach()
    return accepted


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[no-any-return]


def local(t: Any) -> Tensor:
    return t.detach().to_local() if hasattr(t, "to_local") else t.detach()  # type: ignore[no-any-return]


def states(optimizer: Any) -> list[Any]:
    return [value for p in optimizer.state.values() for value in p.values()]


def ddp(kind: Any, micro_group: int) -> list[list[bool]]:
    W, rank = dist.get_world_size(), dist.get_rank()
    model = DistributedDataParallel(Layouts(), bucket_cap_mb=0.05)
    n = sum(p.numel() for p in model.parameters())
    optimizer = kind(model.parameters(), 0.01)

    def backward(step: int) -> Tensor:
        model(row_at(n, step, rank)).backward()
        rows = torch.stack([row_at(n, step, r) for r in range(W)])
        return rows.view(W // micro_group, micro_group, n).mean(1)

    attach = lambda policy: gaf.attach(model, optimizer, policy, micro_group=micro_group)  # noqa: E731
    return check(model, optimizer, attach, backward)


def sharded(replicas: int, flat: bool, make: Any) -> list[list[bool]]:
    """A model over replicas x shards, or a flat one; its rows are those of its own losses."""
    W, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (replicas, W // replicas), mesh_dim_names=("replicate", "shard"))
    over = init_device_mesh("cpu", (W,)) if flat else mesh["shard"]
    torch.manual_seed(5)
    model = make()
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(module, mesh=over)
    fully_shard(model, mesh=over)
    optimizer = Adam(model.parameters(), 0.01)

    def loss(of: Any, step: int, r: int) -> Tensor:
        random = torch.Generator().manual_seed(100 * step + r)
        x = torch.logspace(-1, 1, 13) * (0.6 + torch.randn(6, 13, generator=random))
        return of(x).square().mean()  # type: ignore[no-any-return]

    def backward(step: int) -> Tensor:
        twin = make()
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.copy_(whole(p))
        rows = []
        for r in range(W):
            grads = torch.autograd.grad(loss(twin, step, r), list(twin.parameters()))
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
        loss(model, step, rank).backward()
        stacked = torch.stack(rows)
        return stacked if flat else stacked.view(replicas, W // replicas, -1).mean(1)

    group = None if flat else mesh["replicate"].get_group()
    attach = lambda policy: gaf.attach(model, optimizer, policy, group=group, unsharded=flat)  # noqa: E731
    return check(model, optimizer, attach, backward)


def whitened_and_refusals() -> None:
    W, rank = dist.get_world_size(), dist.get_rank()
    model = DistributedDataParallel(Layouts())
    n = sum(p.numel() for p in model.parameters())
    optimizer = Adam(model.parameters(), 0.01)
    handle = gaf.attach(model, optimizer, gaf.GAF(1.2, metric="whitened"))
    sent = []
    for metric in ("whitened", "euclidean", "optimizer"):
        handle.policy = gaf.GAF(1.2, metric=metric, min_accepted=1)  # type: ignore[arg-type]
        optimizer.zero_grad()
        with counting(W, dist.group.WORLD) as bytes_sent:
            model(row_at(n, 0, rank)).backward()
        rows = torch.stack([row_at(n, 0, r) for r in range(W)]).double()
        assert handle.last is not None
        if metric == "whitened":
            expected = gaf.GAF(1.2, metric="whitened")(gaf.gram(rows))
            torch.testing.assert_close(handle.last.distances, expected.distances, rtol=0, atol=1e-4)
        sent.append(dict(bytes_sent))
        optimizer.step()
    assert sent[0] == sent[1] == sent[2]
    tensors = [row_at(50, 0, rank)]
    decision = gaf.all_reduce(tensors, gaf.GAF(2.0, metric="whitened"))
    rows = torch.stack([row_at(50, 0, r) for r in range(W)]).double()
    expected = gaf.GAF(2.0, metric="whitened")(gaf.gram(rows))
    torch.testing.assert_close(decision.distances, expected.distances, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="all_reduce: metric='optimizer' works under"):
        gaf.all_reduce(tensors, gaf.GAF(2.0, metric="optimizer"))
    with pytest.raises(ValueError, match="attach: metric='optimizer' works .* each bucket"):
        handle.policy = gaf.GAF(2.0, metric="optimizer", scope="group")
    handle.detach()
    with pytest.raises(TypeError, match="attach: metric='optimizer' needs .* is SGD"):
        unchecked(model, SGD(model.parameters(), 0.1), gaf.GAF(2.0, metric="optimizer"))


def everything() -> list[list[list[bool]]]:
    W = dist.get_world_size()
    found = [ddp(Adam, 1), ddp(RMSprop, 1)]
    whitened_and_refusals()
    found += [sharded(W, True, Wide), sharded(2, False, Odd)]
    return found if W == 2 else [*found, sharded(2, False, Wide), ddp(Adam, 2)]


@pytest.mark.parametrize("W", [2, 4])
def test_every_engine_decides_by_g_m_g(world: World, W: int) -> None:
    ranks = world(W).run(everything)
    assert all(found == ranks[0] for found in ranks)
    accepted = {tuple(one) for found in ranks[0] for one in found}
    assert len(accepted) >= W
