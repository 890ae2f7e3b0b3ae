"""Weights after every step against those of plain DistributedDataParallel, bit for bit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.attached import attach_model, equal, values
from helpers.problems import Odd, Wide, batch, plain_loss

SMALL_BUCKETS = 0.002  # MiB: several of them
MODES = (
    *("gradient_as_bucket_view", "static_graph"),
    *("find_unused_parameters", "broadcast_buffers"),
)
Step = Callable[[nn.Module, int], None]  # backward passes of one step


def one_pass(model: nn.Module, step: int) -> None:
    plain_loss(model, step, dist.get_rank()).backward()


def accumulated(model: Any, step: int) -> None:
    with model.no_sync():
        plain_loss(model, 2 * step, dist.get_rank()).backward()
    plain_loss(model, 2 * step + 1, dist.get_rank()).backward()


def without_a_side(model: nn.Module, step: int) -> None:
    x, y = batch(step, dist.get_rank())
    nn.functional.cross_entropy(model(x, side=(dist.get_rank() + step) % 2 == 0), y).backward()


def compare_with_plain_ddp(
    policy: Any,
    steps: int = 50,
    make: Callable[[], nn.Module] = Odd,
    run: Step = one_pass,
    **ddp: Any,
) -> gaf.Handle:
    """Weights after every step."""
    model, optimizer, handle = attach_model(policy, make, **ddp)
    torch.manual_seed(3)
    plain = DistributedDataParallel(make(), **ddp)
    other = SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        for m, o in ((model, optimizer), (plain, other)):
            o.zero_grad(set_to_none=step % 2 == 0)
            run(m, step)
            o.step()
        assert equal(model, values(plain)), f"step {step}"
    return handle


def compare_in_many_modes(policy: Any) -> None:
    """Those that change what a bucket holds; the slow tests have all with all."""
    compare_with_plain_ddp(policy, bucket_cap_mb=SMALL_BUCKETS)
    compare_with_plain_ddp(policy, 6, Wide, gradient_as_bucket_view=True)
    compare_with_plain_ddp(policy, 6, static_graph=True)
    compare_with_plain_ddp(policy, 6, run=accumulated)
    compare_with_plain_ddp(policy, 6, run=without_a_side, find_unused_parameters=True)
    compare_with_plain_ddp(policy, 6, partial(Wide, torch.bfloat16), bucket_cap_mb=SMALL_BUCKETS)


def compare_in_all_modes(policy: Any, mode: str) -> None:
    """A mode of DDP with several models, loops and sizes of buckets."""
    for buckets in (25, SMALL_BUCKETS):
        options: dict[str, Any] = {"bucket_cap_mb": buckets, mode: True}
        for make in (Odd, Wide):
            compare_with_plain_ddp(policy, 50, make, **options)
            if mode != "static_graph":  # its graph must be the same in every pass
                compare_with_plain_ddp(policy, 12, make, accumulated, **options)
        if mode != "static_graph":
            options["find_unused_parameters"] = True
            compare_with_plain_ddp(policy, 12, run=without_a_side, **options)
