"""From the k x k Gram matrix to a decision: which micro-gradients count, and with what weights."""
