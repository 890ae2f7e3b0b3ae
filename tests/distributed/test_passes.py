"""What belongs to which pass, and to which step: gradients that come early or on some ranks only, skips, joined ranks."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_loops import RATE, deep, difference, loss, momentum, net, values
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, SequentialLR, StepLR

import gaf
from helpers.problems import micro_gradients, same_everywhere

pytestmark = pytest.mark.distributed
World = Callable[[int], Any]
SMALL = 200 / 2**20  # MiB: a bucket for each layer
STATEFUL: dict[str, Callable[[], Any]] = {  # policies that every counted decision moves on
    "RandomSkip": lambda: gaf.RandomSkip(0.5, seed=1),
    "ScheduleTau": lambda: gaf.GAF(gaf.ScheduleTau([(0, 2.0), (10, 1.9)]), min_accepted=1),
}


def moved(model: nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]


class OtherOrder(nn.Module):
    """Its head is registered first and used last, so that gradients arrive before their bucket's turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 3, bias=False)
        self.body = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = torch.tanh(layer(x))
        return self.head(x)


class To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def mixed() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(6):
        dtype = torch.float64 if i % 2 else torch.float32
        layers += [To(dtype), nn.Linear(6, 6, bias=False, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers, To(torch.float32), nn.Linear(6, 3, bias=False))


def early(make: Callable[[], nn.Module], scope: str, ddp: dict[str, Any]) -> None:
    model = make()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=SMALL, **ddp)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0, scope=scope))
    for step in range(4):
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        before = values(model)
        optimizer.step()
        assert all(moved(model, before))
        same_everywhere(*model.parameters())
    assert handle.stats()["stepped"] == handle.stats()["steps"] > 0


@pytest.mark.parametrize("scope", ["all", "group"])
@pytest.mark.parametrize(
    ("make", "ddp"),
    [
        (OtherOrder, {"find_unused_parameters": True}),
        (OtherOrder, {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
        (mixed, {}),
    ],
)
def test_gradients_may_arrive_before_their_buckets_turn(
    world: World, make: Callable[[], nn.Module], scope: str, ddp: dict[str, Any]
) -> None:
    world(2).run(early, make, scope, ddp)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(6, 3)
        self.own = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.own[which](torch.tanh(self.shared(x)))


def branch_loss(model: nn.Module, which: int, step: int, rank: int | None = None) -> Tensor:
    return loss(lambda x: model(x, which), step, rank)  # type: ignore[arg-type]


def swapped(clear: str) -> None:
    """Rank r takes branch r in the first pass, and the other in the second."""
    rank = dist.get_rank()
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    branch_loss(wrapped, rank, 0).backward()
    optimizer.step()
    if clear == "none":
        model.shared.zero_grad()
    else:
        optimizer.zero_grad(set_to_none=clear == "to None")
    rows = micro_gradients(model, 1, 2, lambda m, step, r: branch_loss(m, 1 - r, step, r))
    branch_loss(wrapped, 1 - rank, 1).backward()
    if clear == "none":
        with pytest.raises(RuntimeError, match="must be cleared before a backward pass"):
            optimizer.step()
        return
    assert handle.last is not None
    _, right = gaf.aggregate(rows, gaf.GAF(2.0))
    torch.testing.assert_close(handle.last.distances, right.distances, rtol=0, atol=1e-6)
    optimizer.step()
    same_everywhere(*model.parameters())


@pytest.mark.parametrize("clear", ["none", "to None", "to zeros"])
def test_updates_of_parameters_that_other_ranks_have_used_are_noticed_too(
    world: World, clear: str
) -> None:
    world(2).run(swapped, clear)


def drawn_alike() -> None:
    """Passes that no step follows, over branches that differ by rank: the draws of RandomSkip stay together."""
    rank = dist.get_rank()
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(model.parameters(), RATE, momentum=0.9)
    handle = gaf.attach(wrapped, optimizer, gaf.RandomSkip(0.5, seed=1))
    for step in range(8):
        for asked in (False, True):
            optimizer.zero_grad()
            branch_loss(wrapped, (rank + step) % 2, 2 * step + asked).backward()
        before = values(model)
        optimizer.step()
        expected = any(gaf.RandomSkip(0.5, seed=1).planned(step, 2))
        assert any(moved(model, before)) == expected
        same_everywhere(*model.parameters())
    assert handle.state_dict()["policy"] == {"step": 8}


def test_a_policys_draws_stay_together_where_ranks_use_different_parameters(world: World) -> None:
    world(2).run(drawn_alike)


def cleared_with_zeros(name: str) -> None:
    model = deep()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6)
    optimizer = momentum(model)
    policies = {"RandomSkip": gaf.RandomSkip(0.5, seed=1), "GAF": gaf.GAF(2.0)}
    handle = gaf.attach(wrapped, optimizer, policies[name])
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9))
    went = []
    for step in range(6):
        if name == "GAF":
            handle.policy = gaf.GAF(0.0 if step in (2, 4) else 2.0)
        optimizer.zero_grad(set_to_none=False)
        loss(wrapped, step).backward()
        for p in model.parameters():  # a decay of the loop's own: a skip is more than zeros
            p.grad.add_(p, alpha=0.1)
        before = values(model)
        optimizer.step()
        scheduler.step()
        assert handle.last is not None
        assert set(moved(model, before)) == {bool(handle.last.stepped)}
        went.append(bool(handle.last.stepped))
    assert set(went) == {True, False}
    assert scheduler.last_epoch == handle.stats()["stepped"] == sum(went)


@pytest.mark.parametrize("name", ["RandomSkip", "GAF"])
def test_a_skip_holds_where_gradients_are_cleared_with_zeros(world: World, name: str) -> None:
    world(2).run(cleared_with_zeros, name)


def alternating() -> None:
    """Heads in turn, each with a step of its own, cleared with zeros."""
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        branch_loss(wrapped, step % 2, step).backward()
        optimizer.step()
    assert handle.stats()["steps"] == handle.stats()["stepped"] == 4


def test_heads_in_turn_count_a_step_each(world: World) -> None:
    world(2).run(alternating)


def turns(clears: bool, none: bool, freezes: bool) -> list[int]:
    """A GAN's loop with every way of clearing; the critic's first layer may be frozen on the way (FreezeD)."""
    torch.manual_seed(0)
    generator = DistributedDataParallel(net(4, 4))
    critic = DistributedDataParallel(net(4, 3, 1), find_unused_parameters=True)
    of_g, of_c = (SGD(m.parameters(), RATE) for m in (generator, critic))
    handle = gaf.attach(critic, of_c, gaf.GAF(2.0))
    scheduler = handle.gate(StepLR(of_c, 1, 0.9))
    rng = torch.Generator().manual_seed(dist.get_rank())
    judge = nn.functional.binary_cross_entropy_with_logits
    real, fake = torch.ones(5, 1), torch.zeros(5, 1)
    for step in range(6):
        if freezes and step == 3:
            critic.module[0].requires_grad_(False)
        z, x = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
        of_c.zero_grad(set_to_none=none)
        both = torch.cat([x, generator(z).detach()])
        judge(critic(both), torch.cat([real, fake])).backward()
        of_c.step()
        scheduler.step()
        if clears:
            of_c.zero_grad(set_to_none=none)
        of_g.zero_grad(set_to_none=none)
        judge(critic(generator(z)), real).backward()
        of_g.step()
    stats = handle.stats()
    return [stats["steps"], stats["stepped"], scheduler.last_epoch]


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize(("none", "freezes"), [(True, False), (False, False), (True, True)])
def test_a_gan_is_counted_right_however_it_clears(
    world: World, clears: bool, none: bool, freezes: bool
) -> None:
    assert world(2).run(turns, clears, none, freezes) == [[6, 6, 6]] * 2


def skipped_first(detaches: bool) -> None:
    """RandomSkip and GAF: the first of two passes that share a step is a skip, the second is not."""
    for policies in ([gaf.RandomSkip(0.0), gaf.Mean()], [gaf.GAF(0.0), gaf.GAF(2.0)]):
        model = Branches()
        model.shared.requires_grad_(False)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = SGD(model.own.parameters(), RATE, momentum=0.9, weight_decay=0.1)
        handle = gaf.attach(wrapped, optimizer, policies[1])
        for which in (0, 1):  # there is momentum now
            branch_loss(wrapped, which, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = [values(head) for head in model.own]
        for which, policy in enumerate(policies):
            handle.policy = policy
            branch_loss(wrapped, which, 1).backward()
        if detaches:
            handle.detach()
        optimizer.step()
        assert difference(values(model.own[0]), before[0]) == 0
        assert difference(values(model.own[1]), before[1]) > 0


@pytest.mark.parametrize("detaches", [False, True])
def test_an_earlier_pass_of_the_same_step_stays_skipped(world: World, detaches: bool) -> None:
    world(2).run(skipped_first, detaches)


# ---------------------------------------------------------------------------------------------------------------- the step


class Derived(SGD):
    """A step that calls its base class's: torch runs the hooks for both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Named(Optimizer):
    """Closures under another name, and arguments beside them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": RATE})
        self.scale = 0.0

    @torch.no_grad()
    def step(self, loss_fn: Any = None, scale: float = 1.0) -> Any:  # type: ignore[override]
        self.scale = scale
        if loss_fn is not None:
            with torch.enable_grad():
                loss_fn()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad if p.grad is not None else 0.0, alpha=-RATE)


def nested() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), Derived(model.parameters(), RATE)
    SGD([nn.Parameter(torch.zeros(1))], RATE)  # the base class is hooked as well
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9))
    for step, tau in enumerate((2.0, 0.0, 2.0, 0.0)):
        handle.policy = gaf.GAF(tau)
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
        scheduler.step()
    assert (handle.stats()["steps"], handle.stats()["stepped"], scheduler.last_epoch) == (4, 2, 2)


def named_closures() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), Named(model.parameters())
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step, tau in enumerate((2.0, 0.0)):
        handle.policy = gaf.GAF(tau)

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            loss(wrapped, step).backward()

        before = values(model)
        optimizer.step(loss_fn=closure) if step else optimizer.step(closure, 7.0)
        assert set(moved(model, before)) == {tau == 2.0}
        assert optimizer.scale == (1.0 if step else 7.0)


def strangers() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(0.0))
    another = momentum(model)
    elsewhere = SGD([nn.Parameter(torch.zeros(1))], RATE)
    loss(wrapped, 0).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match="every optimizer that steps on the model's parameters"):
        another.step()
    assert not any(moved(model, before))
    elsewhere.step()
    handle.detach()
    another.step()


@pytest.mark.parametrize("task", [nested, named_closures, strangers])
def test_steps_that_optimizers_take_in_ways_of_their_own(
    world: World, task: Callable[[], None]
) -> None:
    world(2).run(task)


def joined_and_dropped(name: str) -> None:
    """A pass that no step follows, while the other rank has no more data: both forget it."""
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, STATEFUL[name]())
    rank = dist.get_rank()
    with wrapped.join():
        for step in range(2 + 2 * rank):
            for asked in (False, True) if step == 2 else (True,):
                optimizer.zero_grad()
                loss(wrapped, 2 * step + asked).backward()
            optimizer.step()
    assert handle.stats()["steps"] == 4
    states: list[Any] = [None, None]
    dist.all_gather_object(states, handle.state_dict()["policy"])
    assert states[0] == states[1]
    if name == "RandomSkip":
        assert states[0] == {"step": 4}
    same_everywhere(*model.parameters())


@pytest.mark.parametrize("name", ["RandomSkip", "ScheduleTau"])
def test_a_rank_that_has_joined_counts_what_the_others_step_on(world: World, name: str) -> None:
    world(2).run(joined_and_dropped, name)


# ----------------------------------------------------------------------------------------------------- state, gates, attach


def saved_after_an_overflow() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    scaler = GradScaler("cpu", init_scale=2.0)
    tau = gaf.ScheduleTau([(0, 2.0), (10, 1.0)])
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(tau), scaler=scaler)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss(wrapped, step) * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    state = handle.state_dict()
    assert state["telemetry"]["totals"]["steps"] == 3
    assert state["policy"]["tau"]["state"] == [3.0]
    for wrong in ({}, None, state | {"rejected": 3}, state | {"policy": {"step": 1}}):
        with pytest.raises(ValueError, match=r"the state must"):
            inspect.unwrap(gaf.Handle.load_state_dict)(handle, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the state of the counts must hold"):
        handle.load_state_dict(state | {"telemetry": {}, "policy": gaf.GAF(tau).state_dict()})
    assert handle.state_dict()["policy"] == state["policy"]  # nothing was taken


def gated_oddly() -> None:
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    parts = [LinearLR(optimizer, 0.1, 1.0, 3), ExponentialLR(optimizer, 0.9)]
    for one in parts:
        handle.gate(one)
    scheduler = SequentialLR(optimizer, parts, [3])
    rates = []
    for step in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.01, 0.04, 0.07, 0.1, 0.09])
    foreign = StepLR(SGD([nn.Parameter(torch.zeros(1))], RATE), 1)
    with pytest.raises(ValueError, match="must drive one of the optimizers"):
        handle.gate(foreign)
    handle.detach()
    with pytest.raises(RuntimeError, match="the handle must be attached.*it was detached"):
        handle.gate(StepLR(optimizer, 1))


def shared_by_two_models() -> None:
    """The optimizer moves the second model while the first skips: its scheduler goes on."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4), nn.Linear(4, 3)
    optimizer = SGD([*first.parameters(), *second.parameters()], RATE)
    a, b = DistributedDataParallel(first), DistributedDataParallel(second)
    handle = gaf.attach(a, optimizer, gaf.GAF(0.0))
    gaf.attach(b, optimizer, gaf.GAF(2.0))
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9))
    for step in range(3):
        optimizer.zero_grad()
        loss(nn.Sequential(a, b), step).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.last_epoch == 3


def evaluated_before() -> None:
    """FSDP2 leaves the root whole after a forward pass without gradients."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    optimizer = SGD(model.parameters(), RATE)
    with torch.no_grad():
        model(torch.ones(2, 6))
    handle = gaf.attach(model, optimizer, gaf.GAF(2.0), group=mesh["replicate"])
    loss(model, 0).backward()
    optimizer.step()
    assert handle.stats()["stepped"] == 1


def refused_without_a_trace() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(net(6, 8, 3), mesh=mesh["shard"])
    optimizer = SGD(model.parameters(), RATE)
    with torch.no_grad():
        next(model.parameters()).to_local().add_(dist.get_rank())  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="must start from the same weights"):
        gaf.attach(model, optimizer, gaf.GAF(), group=mesh["replicate"])
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    "task",
    [
        saved_after_an_overflow,
        gated_oddly,
        shared_by_two_models,
        evaluated_before,
        refused_without_a_trace,
    ],
)
def test_state_gates_and_attach(world: World, task: Callable[[], None]) -> None:
    world(2).run(task)


# ---------------------------------------------------------------------------------------- what ranks cannot see by themselves


class ActorCritic(nn.Module):
    """Its value head has one output: of two shards, one holds it and the other nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.policy, self.value = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, x: Tensor, which: str) -> Tensor:
        features = torch.tanh(self.body(x))
        return self.value(features.detach()) if which == "value" else self.policy(features)


def of_one_shard(name: str) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(ActorCritic(), mesh=mesh["shard"])
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(model, optimizer, STATEFUL[name](), group=mesh["replicate"])
    rng = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(6):
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=rng)
        model(x, "value").pow(2).mean().backward()
        model(x, "policy").pow(2).mean().backward()
        torch.autograd.grad(model(x, "value").sum(), list(model.value.parameters()))  # for a log
        optimizer.step()
    return handle.stats()["steps"], handle.stats()["stepped"], handle.state_dict()["policy"]


@pytest.mark.parametrize("name", ["RandomSkip", "ScheduleTau"])
def test_shards_that_hold_nothing_count_and_draw_as_the_others(world: World, name: str) -> None:
    first, *others = world(4).run(of_one_shard, name)
    assert first[0] == 12
    assert all(other == first for other in others)


def joined_last(name: str) -> None:
    """The longer rank's last pass is followed by no step; the next epoch is decided alike."""
    model = net(6, 8, 3)
    wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, STATEFUL[name]())
    for _ in range(2):
        with wrapped.join():
            for step in range(2 + 2 * dist.get_rank()):
                optimizer.zero_grad()
                loss(wrapped, step).backward()
                optimizer.step()
                optimizer.zero_grad()
                loss(wrapped, step + 50).backward()
    optimizer.zero_grad()
    loss(wrapped, 9).backward()
    optimizer.step()
    same_everywhere(*model.parameters(), torch.tensor([float(handle.stats()["steps"])]))
    assert handle.stats()["steps"] == 9


@pytest.mark.parametrize("name", ["RandomSkip", "ScheduleTau"])
def test_a_rank_that_had_joined_forgets_a_last_pass_without_a_step(world: World, name: str) -> None:
    world(2).run(joined_last, name)


def drawn_in_turns() -> None:
    """A GAN that clears with zeros, under a policy that skips: each of the critic's steps draws once."""
    torch.manual_seed(0)
    generator, critic = DistributedDataParallel(net(4, 4)), DistributedDataParallel(net(4, 6, 1))
    of_g, of_c = SGD(generator.parameters(), RATE), SGD(critic.parameters(), RATE)
    handle = gaf.attach(critic, of_c, gaf.RandomSkip(0.5, seed=1))
    rng = torch.Generator().manual_seed(dist.get_rank())
    judge = nn.functional.binary_cross_entropy_with_logits
    real, fake = torch.ones(5, 1), torch.zeros(5, 1)
    for _ in range(12):
        z, x = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
        of_c.zero_grad(set_to_none=False)
        both = torch.cat([x, generator(z).detach()])
        judge(critic(both), torch.cat([real, fake])).backward()
        of_c.step()
        of_g.zero_grad(set_to_none=False)
        judge(critic(generator(z)), real).backward()
        of_g.step()
    assert handle.stats()["steps"] == 12
    assert handle.state_dict()["policy"] == {"step": 12}


def test_a_gan_that_clears_with_zeros_draws_once_a_step(world: World) -> None:
    world(2).run(drawn_in_turns)


def decayed_by_hand() -> None:
    """Branches that differ by rank, cleared with zeros, a decay of the loop's own: a skip moves nothing on any rank."""
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(model.parameters(), RATE)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    for step, tau in enumerate((2.0, 2.0, 0.0, 2.0)):
        handle.policy = gaf.GAF(tau)
        optimizer.zero_grad(set_to_none=False)
        branch_loss(wrapped, dist.get_rank(), step).backward()
        for p in model.parameters():
            p.grad.add_(p.detach(), alpha=0.1)
        before = values(model)
        optimizer.step()
        assert set(moved(model, before)) == {tau == 2.0}
        same_everywhere(*model.parameters())


def test_a_skip_moves_nothing_where_ranks_use_different_parameters(world: World) -> None:
    world(2).run(decayed_by_hand)


# ----------------------------------------------------------------------------------------------------------------- closures


class StarArguments(SGD):
    def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().step(*args, **kwargs)


class Around(Optimizer):
    """As SAM: runs the closure itself, and lets another optimizer step."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, {})
        self.base = SGD(params, RATE, momentum=0.9)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        self.base.step()
        return loss


def closures(kind: Callable[..., Optimizer], word: str) -> None:
    SGD([nn.Parameter(torch.zeros(1))], RATE)  # the base class is hooked as well
    model = net(6, 8, 3)
    options = {} if kind is Around else {"lr": RATE, "momentum": 0.9}
    wrapped, optimizer = DistributedDataParallel(model), kind(model.parameters(), **options)
    handle = gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
    scheduler = handle.gate(StepLR(optimizer, 1, 0.9)) if kind is not Around else None
    for step, tau in enumerate((2.0, 2.0, None, 0.0, 2.0, 0.0)):
        if tau is not None:
            handle.policy = gaf.GAF(tau)

        def closure(step: int = step, tau: float | None = tau) -> Tensor:
            optimizer.zero_grad()
            if tau is None:
                raise ArithmeticError("a broken batch")
            value = loss(wrapped, step)
            value.backward()
            return value

        before = values(model)
        if tau is None:
            with pytest.raises(ArithmeticError):
                optimizer.step(closure)
            continue
        optimizer.step(**{word: closure}) if word else optimizer.step(closure)
        assert set(moved(model, before)) == {tau == 2.0}
        if scheduler is not None:
            scheduler.step()
    assert (handle.stats()["steps"], handle.stats()["stepped"]) == (5, 3)
    assert scheduler is None or scheduler.last_epoch == 3


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (SGD, ""),
        (SGD, "closure"),
        (Derived, ""),
        (StarArguments, ""),
        (StarArguments, "closure"),
        (Around, ""),
    ],
)
def test_closures_are_filtered_whatever_the_optimizer_does_with_them(
    world: World, kind: type, word: str
) -> None:
    world(2).run(closures, kind, word)


def deleted() -> None:
    """A function that wraps, attaches and returns leaves nothing that stops a later optimizer, and no hook for each call."""
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    model = net(6, 8, 3)
    found = []
    for step in range(3):
        wrapped, optimizer = DistributedDataParallel(model), SGD(model.parameters(), RATE)
        gaf.attach(wrapped, optimizer, gaf.GAF(2.0))
        loss(wrapped, step).backward()
        optimizer.step()
        model.zero_grad()
        del wrapped, optimizer
        before = values(model)
        loss(model, step).backward()
        SGD(model.parameters(), RATE).step()  # plain training goes on
        assert all(moved(model, before))
        model.zero_grad()
        found.append(len(_global_optimizer_pre_hooks))
    assert found[0] == found[2]


def test_a_wrapper_that_is_gone_stops_no_later_optimizer(world: World) -> None:
    world(2).run(deleted)
