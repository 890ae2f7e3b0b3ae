"""The samples of a micro-batch: a function of the seed and of the micro-batch's number alone.

Micro-batches are numbered over the whole run: number = step * k + i for the i-th of step `step`.
A resumed run, or a rank that draws only its own numbers, therefore gets exactly the samples of an
uninterrupted run on one device.
"""

import hashlib
import json
from typing import Protocol

import torch
from torch import Tensor


def derive_seed(seed: int, *parts: int | str) -> int:
    """A number in [0, 2^63) from the seed and all parts in order.

    It is the same on every machine and in every run.
    """
    digest = hashlib.blake2b(json.dumps([seed, *parts]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator for one purpose: draws for one purpose never change those for another."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


SHARDS = 8


class Sampler(Protocol):
    """Draws micro-batches of b samples."""

    b: int

    def draw(self, number: int) -> Tensor:
        """Indices (b,) int64 into the training set of micro-batch `number` >= 0 of the run."""
        ...


class Stream:
    """Permutations of `items`, one after the other; the p-th is seeded by (seed, name, p)."""

    def __init__(self, items: Tensor, seed: int, name: str) -> None:
        self.items, self.seed, self.name = items, seed, name
        self._current: tuple[int, Tensor] | None = None

    def take(self, start: int, count: int) -> Tensor:
        """Positions start to start + count of the row."""
        parts = []
        while count > 0:
            p, offset = divmod(start, len(self.items))
            parts.append(self._permutation(p)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def _permutation(self, p: int) -> Tensor:
        if self._current is None or self._current[0] != p:
            order = torch.randperm(len(self.items), generator=generator(self.seed, self.name, p))
            self._current = p, self.items[order]
        return self._current[1]


class Iid:
    """Micro-batch m is positions m b to (m + 1) b of the permutations, laid end to end.

    Each pass visits every sample once. A micro-batch across the end of a pass can hold a sample
    twice.

    Args:
        n: samples in the training set, at least 1.
        b: samples per micro-batch, at least 1.
    """

    def __init__(self, n: int, b: int, seed: int) -> None:
        if n < 1 or b < 1:
            raise ValueError(
                f"iid: needs at least one sample, and one per micro-batch; got n={n}, b={b}. "
                "Give positive numbers."
            )
        self.b = b
        self._stream = Stream(torch.arange(n), seed, "iid")

    def draw(self, number: int) -> Tensor:
        _check_number(number)
        return self._stream.take(number * self.b, self.b)


class Stratified:
    """b / classes samples of each class, ordered by class; each class has its own `Stream`.

    Args:
        labels: (N,) int64 in [0, classes): the observed ones, or the clean ones if the experiment
            may use them.
        b: samples per micro-batch: a multiple of `classes`, with at most as many per class as the
            rarest class has.
    """

    def __init__(self, labels: Tensor, classes: int, b: int, seed: int) -> None:
        if b < 1 or b % classes:
            raise ValueError(
                f"stratified: b must be a multiple of the {classes} classes; got {b}. "
                f"Use b={max(round(b / classes), 1) * classes}, or the iid sampler."
            )
        self.b, self._each = b, b // classes
        counts = torch.bincount(labels, minlength=classes).tolist()
        for label, count in enumerate(counts):
            if count < self._each:
                smaller = f"b={min(counts) * classes} or fewer, or " if min(counts) else ""
                raise ValueError(
                    f"stratified: every class must have b / classes = {self._each} samples; "
                    f"class {label} has {count}. Use {smaller}the iid sampler."
                )
        self._streams = [
            Stream((labels == c).nonzero().flatten(), seed, f"class {c}") for c in range(classes)
        ]
        self._last: tuple[int, Tensor] | None = None

    def draw(self, number: int) -> Tensor:
        """The samples of a micro-batch, kept for the next call.

        A run needs them three times: for pictures, labels and loss. A hundred classes take a while.
        """
        _check_number(number)
        if self._last is None or self._last[0] != number:
            parts = [stream.take(number * self._each, self._each) for stream in self._streams]
            self._last = number, torch.cat(parts)
        return self._last[1].clone()


class Sharded:
    """An eighth of each step from each of eight parts of the training set; its micro-batches follow
    the order of the parts.

    Wrong labels are gathered in the first parts: at an eighth of them, one part is all wrong.

    Args:
        wrong: (N,) bool, N at least 8.
        k, b: micro-batches per step, and samples in each; k b is a multiple of 8.
    """

    def __init__(self, wrong: Tensor, k: int, b: int, seed: int) -> None:
        if k * b % SHARDS or len(wrong) < SHARDS:
            raise ValueError(
                f"sharded: k b must be a multiple of {SHARDS}, and there must be as many samples; "
                f"got {k} x {b} and {len(wrong)}. Use k = 8, or the iid sampler."
            )
        self.k, self.b, self._each = k, b, k * b // SHARDS
        parts = wrong.cpu().int().argsort(descending=True, stable=True).tensor_split(SHARDS)
        self._streams = [Stream(part, seed, f"shard {i}") for i, part in enumerate(parts)]

    def draw(self, number: int) -> Tensor:
        _check_number(number)
        step, i = divmod(number, self.k)
        parts = [stream.take(step * self._each, self._each) for stream in self._streams]
        return torch.cat(parts)[i * self.b : (i + 1) * self.b]


def _check_number(number: int) -> None:
    if number < 0:
        raise ValueError(
            f"draw: the micro-batch's number must be at least 0; got {number}. "
            "Count from the start of the run."
        )
