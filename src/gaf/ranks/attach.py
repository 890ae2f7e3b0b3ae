"""gaf.attach: one line turns a data-parallel job's averaging into agreement filtering."""

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from gaf.checks import check_optimizers
from gaf.ranks.attach_checks import (
    check_divides,
    check_micro_group,
    check_scaler,
    check_shards,
    check_usable,
)
from gaf.ranks.engines import engine_of, process_group, unwrap
from gaf.ranks.exchange import Exchange
from gaf.ranks.handle import Handle
from gaf.ranks.model_checks import check_attached_model
from gaf.ranks.names import gather_workers
from gaf.ranks.owners import claim, record_owner
from gaf.ranks.same_everywhere import check_same_everywhere
from gaf.rules.contract import Policy, check_policy


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    policy: Policy,
    *,
    scaler: GradScaler | None = None,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    micro_group: int = 1,
    shards: "dist.ProcessGroup | DeviceMesh | None" = None,
    unsharded: bool = False,
) -> Handle:
    """Filters a data-parallel model's gradients by agreement, exactly as published.

        model = DistributedDataParallel(model)
        handle = gaf.attach(model, optimizer, gaf.GAF(tau=0.97))

    The training loop stays as it is. Each rank's gradient is one row. After a skip
    `optimizer.step()` leaves parameters and its state bitwise as they were; `p.grad` is zero before
    that step and None after it. Gradients that a rank accumulates under `model.no_sync()` are its
    row. BatchNorm statistics are not taken back.

    Costs per rank and step: 2 n (W-1)/W coordinates sent, what a ring all-reduce sends, and k k
    scalars; one gradient-sized buffer. Between two ranks DDP needs no buffer under a `gaf.GAF` with
    min_accepted=2 on gradients of float32 or wider, unless gradient_as_bucket_view is set. The way
    in runs during the backward pass, the way out after it; a skip saves the way out. Under
    `gaf.Mean` and `gaf.Guard` DDP's own average is made during the backward pass; a step that is
    measured adds 2 k scalars and one pass over the gradient, a rank that Guard leaves out a second
    all-reduce. They need no buffer, unless gradient_as_bucket_view is set.

    Args:
        model: a DistributedDataParallel model; or an FSDP2 model: sharded with `fully_shard` on the
            shard dimension of a mesh, with `group` the replicate dimension's (one decision, exact),
            or flat, with `unsharded=True` (exact too), with `GAF(scope="group")` (another
            algorithm: one decision for each parameter group), or with `Mean(measure_every=n)`,
            which then shows norms and noise scale but no cosines.
        optimizer: any dense torch.optim optimizer over the model's parameters, or several;
            ZeroRedundancyOptimizer too.
        policy: `gaf.GAF(...)`, or any callable from a Gram matrix to a Decision or to weights, the
            same on all ranks. `gaf.Mean()` is plain averaging bit for bit,
            `gaf.Mean(measure_every=10)` the same with a look at the workers, `gaf.Guard()` the same
            unless something is broken, `gaf.RandomSkip` the same with skips.
        scaler: the loop's GradScaler. After an overflow on any rank no optimizer steps, and the
            scale falls, as in plain training.
        group: the ranks whose rows are compared, a process group or a mesh of one dimension. DDP:
            its own group, the default. HSDP: the replicate group.
        micro_group: m consecutive ranks, m dividing W, whose plain average is one row: the
            micro-batch is then m ranks' batches, and k = W / m. A member that is not finite makes
            its row absent.
        shards: the ranks over which this model's coordinates are spread, as under tensor
            parallelism: each holds other parameters of the same replica. K is added up over them,
            so all of them decide alike. Without it each shard decides for itself, and one may step
            while another skips. All of them must run their backward passes side by side. A
            parameter that every shard holds, such as a replicated norm's, counts once for each.
            HSDP's own shards need no mention.
        unsharded: for a flat FSDP2 model: each rank keeps as much as one unsharded gradient until
            the end of the backward pass, for one decision about all of it. A rank sends what plain
            FSDP2 sends, and k k scalars.

    Returns:
        A Handle: `.last`, `.stats()`, `.workers()`, `.alarms`, `.gate(scheduler)`,
            `.state_dict()`, `.detach()`.

    Raises:
        TypeError, ValueError, RuntimeError: if something cannot work; the message states what to do
            instead.
    """
    model = unwrap(model)
    optimizers = check_optimizers(optimizer, "attach")
    check_policy(policy, "attach")
    check_scaler(scaler)
    engine = engine_of(model, policy, process_group(group, "group"), bool(unsharded))
    spread = process_group(shards, "shards")
    check_micro_group(micro_group)
    m = int(micro_group)
    # Ranks that differ raise here together; a check below could raise on one of them alone.
    check_same_everywhere(model, policy, m, engine.group, spread)
    check_divides(m, engine.group)
    exchange = Exchange(engine.group, m)
    check_shards(spread, engine.group, policy)
    check_attached_model(model, optimizers, exchange)
    check = partial(check_usable, engine, exchange, optimizers)
    check(policy)
    params = engine.parameters(model)
    claim(model, params)
    handle = Handle(optimizers, policy, scaler, exchange.k, params, check)
    try:
        engine.install(model, handle, exchange, [] if spread is None else [spread])
        handle.ledger.alarms.workers = gather_workers(handle.summed_groups, m)
    except BaseException:
        handle.detach()
        raise
    record_owner(model, params, handle)
    return handle
