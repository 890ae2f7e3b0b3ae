"""Rows that are samples: which single samples of a batch agree, from one backward pass.

The files in the order of the data:

    recording      notes in a loss's graph what each layer was given (`recording`)
    loss_graph     finds these notes again, and how often the losses use each parameter
    layers         from a layer's input and the gradient of its output to its parameters' gradients
    pieces, ways   those gradients, kept as factors; their K, the cheaper of two ways
    ghost          `ghost_gram`: K of all samples
    samples        `Samples`: a policy over single samples, as `gaf.Accumulator` over micro-batches
    checks         what these refuse

A loss function that needs none of the above:

    agreement         `SampleAgreement`: weighs samples, keeps what it saw of them, reports
    caught            what the head was given for the batch
    judge, scores     how far each label of a batch is trusted, and the weights
    class_statistics  means by class over the last steps; summing, over the ranks
    history, report   what was seen of each sample, and the table of its label's quality
    float_buffers     buffers that keep their type
    agreement_checks  what it refuses
"""
