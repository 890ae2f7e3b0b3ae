"""What a step's communication should cost: latency, bandwidth and bytes, from 2 to 4,096 ranks.

    ring all-reduce   2 (k-1) alpha + 2 n s (k-1)/k / beta
    GAF, in             (k-1) alpha +   n s (k-1)/k / beta       all-to-all
      scalars           (k-1) alpha + (k-1) (r r + 2) 8 / beta   all-gather, up to 32 ranks
         beyond       2 (k-1) alpha + 2 (r r + 2) 8 (k-1)/k / beta   all-to-all and all-gather
      Gram            r n/k s / memory + 2 r r n/k / flops       one product
         or           r (r+1)/2 2 n/k s / memory                 without flops, an upper bound
      out               (k-1) alpha +   n s (k-1)/k / beta       all-gather; not after a skip
    two ranks         the all-reduce, the scalars, and 2 n s / memory for two inner products

Without flops, the pairs of rows are multiplied one by one, both read from memory. Two ranks have no
way out.

n: coordinates of s bytes; k: ranks; r = k/m: rows; alpha: seconds a message; beta: bytes a second
that a rank sends. Every collective is charged k-1 messages one after the other, as around a ring.
An all-to-all's messages do not wait for each other, so its (k-1) alpha is an upper bound; for small
messages log2(k) alpha can suffice, at more bytes.
"""

from dataclasses import dataclass

from gaf.ranks.messages import FEW
from gaf_lab.bench.bytes_sent import all_gather, all_to_all, ring_all_reduce

SCALAR = 8  # bytes of a float64
BESIDE = 2  # scalars sent with K: the scaler's factor, and whether an old update was left over


@dataclass(frozen=True)
class Network:
    """What a network and its machines can do.

    alpha: seconds per message. beta: bytes per second that a rank sends. memory: bytes per second
    that it reads from memory. flops: operations per second of a matrix product; None if the pairs
    are multiplied one by one.
    """

    alpha: float
    beta: float
    memory: float
    flops: float | None = None


@dataclass(frozen=True)
class Cost:
    """Seconds of each part of a step's aggregation by GAF.

    All but `way_in` come after the backward pass.
    """

    way_in: float
    scalars: float
    gram: float
    way_out: float

    def total(self) -> float:
        return self.way_in + self.scalars + self.gram + self.way_out


def plain_seconds(k: int, size: float, network: Network) -> float:
    """A ring all-reduce of `size` bytes."""
    return 2 * (k - 1) * network.alpha + ring_all_reduce(size, k) / network.beta


def gaf_seconds(k: int, size: float, network: Network, micro_group: int = 1) -> Cost:
    """GAF over `size` bytes of gradient on each of k ranks, with k / micro_group rows."""
    rows = k // micro_group
    if rows == k == 2:
        scalars = network.alpha + scalar_bytes(k, rows) / network.beta
        return Cost(plain_seconds(k, size, network), scalars, 2 * size / network.memory, 0.0)
    half = (k - 1) * network.alpha + all_to_all(size, k) / network.beta
    latency = (1 if k <= FEW else 2) * (k - 1) * network.alpha
    scalars = latency + scalar_bytes(k, rows) / network.beta
    return Cost(half, scalars, gram_seconds(rows, size / k, network), half)


def gram_seconds(rows: int, slice_size: float, network: Network, coordinate: int = 4) -> float:
    """The Gram matrix of `rows` slices of `slice_size` bytes, `coordinate` bytes a coordinate."""
    if network.flops is None:
        return rows * (rows + 1) / 2 * 2 * slice_size / network.memory
    reading = rows * slice_size / network.memory
    return reading + 2 * rows * rows * slice_size / coordinate / network.flops


def scalar_bytes(k: int, rows: int) -> float:
    """Bytes of K that a rank sends: among few ranks all of it to each, else a block in and out."""
    size = SCALAR * (rows * rows + BESIDE)
    return all_gather(size, k) if k <= FEW else ring_all_reduce(size, k)


def gaf_bytes(k: int, size: float, micro_group: int = 1) -> float:
    """Bytes that a rank sends in a step that is taken."""
    return 2 * all_to_all(size, k) + scalar_bytes(k, k // micro_group)


def micro_group_for(k: int) -> int:
    """The smallest power of two that leaves at most 32 rows."""
    m = 1
    while k // m > FEW:
        m *= 2
    return m
