"""Measuring without a step: how well micro-gradients agree, and how many each tau would accept."""
