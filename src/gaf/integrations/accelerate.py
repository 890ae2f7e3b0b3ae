"""Accelerate: one call after `prepare`; the loop stays as it is."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

import gaf
from gaf.integrations.accelerate_checks import check_kinds, check_setup
from gaf.integrations.accelerate_rows import SUBJECT, FilteredOptimizer, MicroBatches
from gaf.integrations.options import check_options
from gaf.ranks.handle import Handle
from gaf.rules.contract import Policy, check_policy


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    policy: Policy,
    **options: Any,
) -> MicroBatches | Handle:
    """Filters what a loop of Accelerate's averages.

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        policy = gaf.GAF(tau=0.9)
        handle = gaf.integrations.accelerate.attach(accelerator, model, optimizer, policy)

    In one process the rows are the micro-batches of `gradient_accumulation_steps`. In several they
    are the ranks, and what a rank accumulates is its row. After the last micro-batch's
    `accelerator.backward`, p.grad holds the update, to clip and to inspect. A skip leaves
    parameters and optimizer state alone and counts as `optimizer_step_was_skipped`, so that
    prepared schedulers pause. `accelerator.save_state` carries counts and the policy's state; save
    between macro-batches.

    In one process the update is the mean over the accepted micro-batches, also if an epoch's last
    macro-batch is short; Accelerate itself divides by `gradient_accumulation_steps` then too.
    `accelerator.backward` takes retain_graph there, and no other option. An `optimizer.zero_grad()`
    that Accelerate carries out drops the micro-gradients that wait, as it would without a filter:
    call it after `optimizer.step()`.

    Args:
        accelerator: whose loop it is.
        model: what `accelerator.prepare` gave.
        optimizer: the same; several share one decision.
        policy: `gaf.GAF(...)`, or any other that `gaf.Accumulator` or `gaf.attach` takes.
        options: of `gaf.Accumulator` in one process (bn, leave_out), of `gaf.attach` in several
            (micro_group).

    Returns:
        What decides: `.last`, `.stats()`, `.detach()`.

    Raises:
        TypeError, ValueError, RuntimeError: where filtering cannot work (DeepSpeed, FSDP,
            Megatron-LM, XLA, sync_each_batch), and for a wrong argument or an option of the other
            kind of rows, with what to do instead.
    """
    prepared = check_kinds(accelerator, model, optimizer)
    check_policy(policy, SUBJECT)
    alone = accelerator.distributed_type == DistributedType.NO
    check_options(options, SUBJECT, ranks=not alone)
    check_setup(accelerator, model, prepared)
    inner = [one.optimizer for one in prepared]
    decider: MicroBatches | Handle
    if alone:
        bare = accelerator.unwrap_model(model)
        decider = MicroBatches(accelerator, inner, policy, model=bare, **options)
    else:
        decider = gaf.attach(model, inner, policy, scaler=accelerator.scaler, **options)
    for one in prepared:
        one.__class__, one.decider = FilteredOptimizer, decider
        decider.on_detach(partial(setattr, one, "__class__", AcceleratedOptimizer))
    accelerator.register_for_checkpointing(decider)
    decider.on_detach(partial(forget, accelerator, decider))
    return decider


def forget(accelerator: Accelerator, decider: Any) -> None:
    """Leaves the decider out of later checkpoints."""
    accelerator._custom_objects = [one for one in accelerator._custom_objects if one is not decider]
