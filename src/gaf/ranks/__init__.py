"""Micro-gradients of several processes: DDP and FSDP2, at the bytes of one all-reduce."""
