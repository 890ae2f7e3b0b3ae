"""Micro-gradients of several processes: DDP and FSDP2, at the bytes of one all-reduce.

The files in the order of the data:

    attach       checks what it is given, finds the model's engine, and installs a Handle in it
                 attach_checks, model_checks, same_everywhere; engines; owners
    ddp          a hook takes DDP's buckets the way that the policy needs: buckets, ddp_ways
    fsdp         FSDP2's replicas: replicas, way_in; or a flat model's ranks, fsdp_unsharded, or its
                 parameter groups, fsdp_groups, or its own average, fsdp_average
    exchange     gradients in, the Gram matrix, the update out: messages, spare_memory
    sums         gradients in, the average out, and its products with each: sent_piece; pair, for
                 two ranks
    decider      what the ranks have measured (totals) -> decision (judged) -> update; stale:
                 whether an old update was in the way
    step_hooks   the optimizer's step: steps; skips, what it leaves alone; pending, what it confirms
    row_ledger   what came of the steps, for each row too
    handle       what a user holds
    all_reduce   the same for any tensors, without a model
"""
