"""Micro-gradients one after another: gradient accumulation on one device."""
