"""A decision per bucket: DistributedDataParallel's buckets, and GAF on the rows of each.

A bucket that skips stays as it is.
"""

import copy
import dataclasses
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import gaf
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training import buckets as groups
from gaf_lab.training import models
from gaf_lab.training.buckets import PerBucket, buckets
from gaf_lab.training.loop import Training
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import assert_same
from helpers.warm import WARM

SMALL = TrainConfig(
    dataset="digits", limit=240, model="mlp", k=3, b=12, passes=1.0, tau=0.9, scope="group"
)
NETS = [
    ("mlp", "cifar", 28),
    ("convnet", "cifar", 32),
    ("resnet18", "cifar", 32),
    ("preact-resnet34", "imagenet", 32),
]


# ---------------------------------------------------------------------------------- the buckets


def seen_by_ddp(pipe, rank, folder):
    """Sets of parameter names in each bucket, in DDP's final order."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    found = [buckets_of(name, stem, size) for name, stem, size in NETS]
    torch.save(found, Path(folder) / "found")
    dist.destroy_process_group()


def buckets_of(name, stem, size):
    net = models.make_model(name, (3, size, size), 10, stem)
    names, seen = {p: n for n, p in net.named_parameters()}, []

    def look(state, bucket):
        seen.append([names[p] for p in bucket.parameters()])
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped = DistributedDataParallel(net)
    wrapped.register_comm_hook(None, look)
    for _ in range(2):  # the first pass finds the order, the second has it
        seen.clear()
        wrapped(torch.randn(2, 3, size, size)).sum().backward()
    return seen


@pytest.fixture(scope="module")
def from_ddp():
    with tempfile.TemporaryDirectory() as folder:
        assert WARM.start(seen_by_ddp, 0, folder).wait() == 0
        return torch.load(Path(folder) / "found", weights_only=True)


@pytest.mark.distributed
@pytest.mark.parametrize("i", range(len(NETS)), ids=[name for name, *_ in NETS])
def test_buckets_are_those_of_distributed_data_parallel(from_ddp, i):
    name, stem, size = NETS[i]
    net = models.make_model(name, (3, size, size), 10, stem)
    names = {p: n for n, p in net.named_parameters()}
    params = list(net.parameters())
    found = [{names[params[j]] for j in bucket} for bucket in buckets(params)]
    # within a bucket the order says nothing to a decision on all of it
    assert found == [set(bucket) for bucket in from_ddp[i]]
    assert len(found) > 1 or name == "convnet"


# ---------------------------------------------------------------------------------- decisions


@pytest.fixture
def each_layer(monkeypatch):
    """Buckets of one parameter each."""
    monkeypatch.setattr(groups, "FIRST", 1)
    monkeypatch.setattr(groups, "OTHERS", 1)


def net_and_data(seed=0, k=4):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return net, [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(k)]


def per_bucket(net, policy, **options):
    return PerBucket(
        torch.optim.SGD(net.parameters(), **({"lr": 0.1, "momentum": 0.9} | options)), policy, net
    )


def give(accumulator, net, data):
    for x, y in data:
        accumulator.backward(cross_entropy(net(x), y))
    accumulator.step()


def rows_of(net, data):
    """Parameter -> its micro-gradients (k, numel), by autograd alone."""
    params = list(net.parameters())
    grads = [torch.autograd.grad(cross_entropy(net(x), y), params) for x, y in data]
    return {p: torch.stack([g[j].flatten() for g in grads]) for j, p in enumerate(params)}


POLICIES = [
    gaf.GAF(0.9),
    gaf.GAF(0.8, start="best"),
    gaf.GAF(1.0, average="halving"),
    gaf.GAF(0.7, min_accepted=3),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_each_bucket_takes_the_decision_and_the_update_of_gaf_on_its_own_rows(each_layer, policy):
    apart = set()
    for seed in range(4):
        net, data = net_and_data(seed)
        rows, before = rows_of(net, data), [p.detach().clone() for p in net.parameters()]
        per = per_bucket(net, dataclasses.replace(policy, scope="group"), lr=1.0, momentum=0.0)
        give(per, net, data)
        decisions = {p: gaf.aggregate(row, policy) for p, row in rows.items()}
        for start, (p, (update, _)) in zip(before, decisions.items(), strict=True):
            # float32, gradients below 1
            assert torch.allclose(start - p.detach(), update.view_as(p), atol=1e-6)
        stepped = [bool(decision.stepped) for _, decision in decisions.values()]
        accepted = torch.stack([decision.accepted for _, decision in decisions.values()])
        assert per.outcome.stepped == any(stepped)
        assert per.outcome.accepted == accepted.any(0).tolist()
        distances = torch.stack([decision.distances for _, decision in decisions.values()])
        assert per.outcome.distances == pytest.approx(distances.mean(0).tolist(), abs=1e-5)
        assert per.outcome.norms2 == pytest.approx(
            sum((row**2).sum(1) for row in rows.values()).tolist(), rel=1e-5
        )
        apart |= set(map(tuple, accepted.tolist()))
    assert len(apart) > 2  # the buckets did not just agree


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_one_bucket_is_the_whole_gradient(policy):
    net, data = net_and_data()
    twin = copy.deepcopy(net)
    per = per_bucket(net, dataclasses.replace(policy, scope="group"))
    whole = gaf.Accumulator(torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), policy)
    for _ in range(5):
        give(per, net, data)
        give(whole, twin, data)
        assert len(per.layers) == 1
        assert per.outcome.accepted == whole.outcome.accepted
        # the same numbers added in another order of parameters: the last bits can differ
        assert all(
            torch.allclose(p, q, rtol=1e-5, atol=1e-7)
            for p, q in zip(net.parameters(), twin.parameters(), strict=True)
        )


def test_a_bucket_that_skips_keeps_its_parameters_and_its_optimizers_state(each_layer):
    net, data = net_and_data()
    with torch.no_grad():
        net[2].weight.zero_()  # then no gradient reaches the first layer: its rows are absent
    data = [(x, torch.tensor([i % 3] * 8)) for i, (x, _) in enumerate(data)]
    per = per_bucket(net, gaf.GAF(1.5, scope="group"))
    before = copy.deepcopy(net.state_dict())
    give(per, net, data)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(net.state_dict()[name], before[name])
    for name in ("2.weight", "2.bias"):
        assert not torch.equal(net.state_dict()[name], before[name])
    # from the last layer on
    assert [bool(decision.stepped) for decision in per.layers.values()] == [
        True,
        True,
        False,
        False,
    ]
    assert set(per.optimizers[0].state) == {net[2].weight, net[2].bias}
    assert per.outcome.stepped


# the first step is a skip
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_where_every_bucket_skips_the_step_is_a_skip_and_a_gated_schedule_waits():
    net, data = net_and_data()
    per = per_bucket(net, gaf.GAF(0.0, scope="group"))
    schedule = per.gate(torch.optim.lr_scheduler.StepLR(per.optimizers[0], 1, gamma=0.5))
    before = copy.deepcopy(net.state_dict())
    for policy, rate in ((0.0, 0.1), (2.0, 0.05), (0.0, 0.05), (2.0, 0.025)):
        per.policy = gaf.GAF(policy, scope="layer")
        give(per, net, data)
        schedule.step()
        assert per.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)
        assert per.outcome.stepped == (policy == 2.0)
        assert policy == 2.0 or per.outcome.accepted == [False] * 4
    assert (per.stats()["steps"], per.stats()["stepped"]) == (4, 2)
    assert not torch.equal(before["0.weight"], net.state_dict()["0.weight"])


def test_the_state_goes_over_to_another_one_and_a_gate_is_not_fooled_by_it(each_layer):
    policy = gaf.GAF(0.9, scope="group")
    net, data = net_and_data()
    first = per_bucket(net, policy)
    for _ in range(3):
        give(first, net, data)
    twin = copy.deepcopy(net)
    second = per_bucket(twin, policy)
    schedule = second.gate(torch.optim.lr_scheduler.StepLR(second.optimizers[0], 1, gamma=0.5))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.optimizers[0].load_state_dict(copy.deepcopy(first.optimizers[0].state_dict()))
    assert second.stats() == pytest.approx(first.stats(), nan_ok=True)
    assert_same(first.state_dict(), second.state_dict())
    first.policy = second.policy = gaf.GAF(0.0, scope="layer")
    give(second, twin, data)
    schedule.step()
    assert second.optimizers[0].param_groups[0]["lr"] == 0.1  # that step was a skip
    give(first, net, data)
    first.policy = second.policy = dataclasses.replace(policy, scope="layer")
    for one, its in ((first, net), (second, twin)):
        give(one, its, data)
    assert_same(dict(net.state_dict()), dict(twin.state_dict()))


# ---------------------------------------------------------------------------------- runs


def test_a_run_decides_per_bucket_and_records_what_any_bucket_accepted(tmp_path):
    training = Training(SMALL, None)
    assert isinstance(training.accumulator, PerBucket)
    training.macro_batch()
    assert list(training.accumulator.layers) == ["bucket 0", "bucket 1"]
    run = train(SMALL, tmp_path, Silent())
    assert run.arm == "GAF, per bucket"
    assert run.evals[-1]["steps_taken"] == sum(n > 0 for n in run.rows)
    assert len(run.rows) == run.evals[-1]["step"]


def test_accepted_batch_norm_statistics_are_refused():
    with pytest.raises(
        ConfigError,
        match="scope 'group' and 'layer' go with bn 'all' and a fixed threshold alone: .*; "
        "got 'group'",
    ):
        dataclasses.replace(SMALL, bn="accepted")
