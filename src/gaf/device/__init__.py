"""Micro-gradients one after another: gradient accumulation on one device.

The files, in the order of the data:

    accumulate     `Accumulator`: collect by `backward`, `decide`, `step`
    parameters     which parameters are filtered, their names, and which of them decide
    backward       from a loss to one micro-gradient
    rows, stacked  the micro-gradients of a macro-batch, and the update
    layers         of each layer by itself
    sums, buffers  the running sum of accepted micro-gradients
    placed         the update in p.grad, until it is stepped on
    scaler         a GradScaler's part
    batchnorm      running statistics that only accepted micro-batches move (running_statistics)
    growing        when a macro-batch is large enough, if it is to end by itself (`gaf.Agreement`)
    recorded       what came of the steps, as the Accumulator shows it
    claims         whose micro-gradients may wait
    checks, graph  what is refused, and what a loss's graph holds
"""
