"""gaf.SampleAgreement across ranks: the same buffers everywhere, those of one process."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import gaf
from helpers.problems import same_everywhere
from helpers.ranks import World
from helpers.samples import C, Net, clusters, cosines

B = 12  # samples of a rank
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def criterion_for(net: nn.Module, **options: Any) -> gaf.SampleAgreement:
    options = {"warmup": 0} | options
    return gaf.SampleAgreement(nn.CrossEntropyLoss(reduction="none"), net.head, **options)


def fresh() -> Net:
    torch.manual_seed(0)
    return Net()


def step(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, index: Any = None) -> None:
    model.zero_grad()
    criterion(model(x), y, index=index).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


def the_ranks_agree_with_one_process(wrapped: str) -> None:
    """Each has its own samples; half of the last one's labels are wrong: its weights are lower."""
    rank, W = dist.get_rank(), dist.get_world_size()
    x, y, _ = clusters(20 * B * W)
    y = torch.where(torch.arange(len(y)) % (2 * W) == W - 1, (y + 1) % C, y)
    model = fresh()
    criterion = criterion_for(model)
    if wrapped == "ddp":
        outer: nn.Module = DistributedDataParallel(model)
    else:
        outer = fully_shard(model)
    twin, own = fresh(), dist.new_group([rank], use_local_synchronization=True)
    alone = criterion_for(twin, group=own)
    for i in torch.arange(len(x)).split(B * W):
        step(outer, criterion, x[i][rank::W], y[i][rank::W])
        step(twin, alone, x[i], y[i])
    state, want = criterion.state_dict(), alone.state_dict()
    same_everywhere(*state.values())
    for name in ("statistics.features", "statistics.scores"):
        torch.testing.assert_close(state[name], want[name])
    assert alone.weights is not None and criterion.total is not None
    torch.testing.assert_close(criterion.total, alone.weights.sum() / W)
    assert alone.weights.view(-1, W).sum(0)[-1] < 0.9 * criterion.total
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole, q, rtol=1e-5, atol=1e-6)


def without_weights_each_rank_takes_its_own_mean() -> None:
    rank, W = dist.get_rank(), dist.get_world_size()
    x, y, _ = clusters(B)
    y = torch.where(torch.arange(B) < rank, -100, y)  # ignored: other numbers on other ranks
    model, losses = fresh(), nn.CrossEntropyLoss()
    for options in ({"weigh": False}, {}):
        criterion = criterion_for(model, **options)
        total = torch.tensor(float(B - rank if options else B - (W - 1) / 2))
        want = losses(model(x), y) * (B - rank) / total
        torch.testing.assert_close(criterion(model(x), y), want)
        torch.testing.assert_close(criterion.total, total)
        torch.testing.assert_close(criterion.eval()(model(x), y), losses(model(x), y))


def the_same_samples_give_the_same_weights_as_one_process(score: str) -> None:
    rank = dist.get_rank()
    x, y, _ = clusters(4 * B, wrong=0.4)
    model, twin = fresh(), fresh()
    own = dist.new_group([rank], use_local_synchronization=True)
    votes: Any = [{"model": net} if score == "vote" else {} for net in (model, twin)]
    criterion = criterion_for(model, score=score, **votes[0])
    alone = criterion_for(twin, score=score, group=own, **votes[1])
    outer = DistributedDataParallel(model)
    for i in (i for _ in range(6) for i in torch.arange(len(x)).split(B)):
        step(outer, criterion, x[i], y[i])
        step(twin, alone, x[i], y[i])
    assert criterion.weights.min() < 0.9
    torch.testing.assert_close(criterion.weights, alone.weights, rtol=1e-5, atol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def a_rank_can_be_judged_by_the_others() -> None:
    """The last rank's labels are all wrong: they vouch for each other, unless it is left out."""
    rank, W = dist.get_rank(), dist.get_world_size()
    x, y, _ = clusters(40 * W)
    x, y = x[rank::W], y[rank::W]
    y = (y + 1) % C if rank == W - 1 else y
    model = fresh()
    criterion = criterion_for(model, leave_own_rank_out=True, weigh=False, refine=False)
    for _ in range(2):
        criterion(model(x), y, index=torch.arange(40))
    same_everywhere(*[v for k, v in criterion.state_dict().items() if "history" not in k])
    unit = normalize(model.body(x).detach(), dim=1)
    members = torch.nn.functional.one_hot(y, C).float()
    sums = torch.stack([members.T @ unit, members.sum(0)[:, None].expand(C, 8)])
    others = sums.clone()
    dist.all_reduce(others)
    others -= sums
    # the second step was scored by the first: its prototypes are ratios of these sums
    torch.testing.assert_close(criterion.statistics.prototypes(rank), others[0] / others[1])
    similarity = cosines(unit, others[0] / others[1])
    own = similarity.gather(1, y[:, None])[:, 0]
    want = own - similarity.scatter(1, y[:, None], -9).amax(1)
    torch.testing.assert_close(torch.tensor(criterion.report()["prototype"]), want)


def benchmark(name: str) -> Any:
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


def one_process_does_the_work_of_the_ranks(apart: bool) -> None:
    """As benchmarks/label_ranks.py has it."""
    rank, W = dist.get_rank(), dist.get_world_size()
    x, y, _ = clusters(4 * B * W, wrong=0.4)
    model = fresh()
    criterion = criterion_for(model, leave_own_rank_out=apart)
    own = dist.new_group([rank], use_local_synchronization=True)
    judges = benchmark("label_ranks").Judges(model.head, len(x), apart, W, warmup=0, group=own)
    for i in (i for _ in range(5) for i in torch.arange(len(x)).split(B * W)):
        for r in range(W):
            index = i[r::W]
            outputs = model(x[index])
            if r == rank:
                criterion(outputs, y[index], index=index)
            weights = judges.weights(r, outputs, y[index], index)
            if r == rank:
                torch.testing.assert_close(criterion.weights, weights, rtol=1e-5, atol=1e-5)
        judges.end_step()
    assert criterion.weights.min() < 0.9
    report, want = criterion.report(gather=True), torch.zeros(len(x))
    for judge in judges.each:
        want[judge.report()["index"]] = torch.tensor(judge.report()["prototype"])
    torch.testing.assert_close(torch.tensor(report["prototype"]), want, rtol=1e-5, atol=1e-5)


def the_report_covers_all_ranks_if_it_gathers() -> None:
    rank, W = dist.get_rank(), dist.get_world_size()
    x, y, _ = clusters(200, wrong=0.3)
    mine = torch.arange(200)[rank::W]
    model = fresh()
    criterion = criterion_for(model, weigh=False)
    for _ in range(3):
        step(DistributedDataParallel(model), criterion, x[mine], y[mine], mine)
    with pytest.warns(UserWarning, match=f"of {W} ranks.*gather=True"):
        own = criterion.report()
    assert own["index"] == mine.tolist()
    report = criterion.report(gather=True)
    assert report["index"] == list(range(200)) and report["given_label"] == y.tolist()
    assert [report["label_quality"][i] for i in mine] == own["label_quality"]
    assert [report["predicted_label"][i] for i in mine] == own["predicted_label"]
    same_everywhere(torch.tensor(report["label_quality"]))
    separation = torch.tensor(criterion.separation(gather=True))
    assert 0 < separation < 1
    same_everywhere(separation)


def layers_that_are_sharded_cannot_vote() -> None:
    """Their parameters in the losses' graph are not always the model's."""
    x, y, _ = clusters(B)
    for inner in (False, True):
        model = fresh()
        if inner:
            fully_shard(model.body)
        else:
            fully_shard(model)
        votes = criterion_for(model, score="vote", model=model)
        with pytest.raises(TypeError, match="SampleAgreement: .* must be whole on each rank.*FSDP"):
            votes(model(x), y)


def all_of_it() -> None:
    without_weights_each_rank_takes_its_own_mean()
    layers_that_are_sharded_cannot_vote()
    the_ranks_agree_with_one_process("ddp")
    the_ranks_agree_with_one_process("fsdp")
    the_same_samples_give_the_same_weights_as_one_process("prototype")
    the_same_samples_give_the_same_weights_as_one_process("vote")
    a_rank_can_be_judged_by_the_others()
    one_process_does_the_work_of_the_ranks(apart=False)
    one_process_does_the_work_of_the_ranks(apart=True)
    the_report_covers_all_ranks_if_it_gathers()


@pytest.mark.distributed
@pytest.mark.parametrize("W", [2, 4])
def test_on_several_ranks(world: World, W: int) -> None:
    world(W).run(all_of_it)
