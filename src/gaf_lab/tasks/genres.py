"""Which of 15 genres a passage comes from: the Brown corpus, by a bag of words.

Francis and Kucera (1964): 500 American texts of 2,000 words. Every fifth text of a genre is for the
test; a text is cut into passages.
"""

from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gaf_lab.data.packages import BROWN, read_package
from gaf_lab.data.problem import Problem
from gaf_lab.settings.config import TrainConfig

WORDS, PASSAGE = 5000, 100  # words that are known, and of a passage
RARE = 0  # the number of all other words
Passages = list[tuple[list[str], int]]


def genres(config: TrainConfig, data: Path | None = None) -> Problem:
    """Passages of 100 words (N, 100) int64, by frequency in the training texts, and genres.

    data: folder of the package's archive; None downloads it.
    """
    train, test, count = read_passages(data)
    return Problem(
        model=lambda: BagOfWords(count),
        train=train,
        test=test,
        classes=count,
        name="brown",
    )


@lru_cache(maxsize=1)
def read_passages(
    folder: Path | None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Passages and genres to train on and to test, and how many genres there are."""
    texts = read_package(BROWN, folder, "package/c[a-r][0-9][0-9]")
    names = sorted({name[:2] for name in texts})
    parts: tuple[Passages, Passages] = ([], [])
    for name, content in texts.items():
        passages = [(words, names.index(name[:2])) for words in cut_words(content.decode())]
        parts[int(name[2:]) % 5 == 0].extend(passages)
    counts = Counter(word for words, _ in parts[0] for word in words)
    known = {word: i + 1 for i, (word, _) in enumerate(counts.most_common(WORDS - 1))}
    train, test = (as_tensors(part, known) for part in parts)
    return train, test, len(names)


def cut_words(text: str) -> list[list[str]]:
    """Passages of a tagged text ("The/at Fulton/np-tl"): lower-case words without their tags."""
    words = [token.rpartition("/")[0].lower() for token in text.split()]
    ends = range(PASSAGE, len(words) + 1, PASSAGE)
    return [words[end - PASSAGE : end] for end in ends]


def as_tensors(passages: Passages, known: dict[str, int]) -> tuple[Tensor, Tensor]:
    words = [[known.get(word, RARE) for word in passage] for passage, _ in passages]
    return torch.tensor(words), torch.tensor([genre for _, genre in passages])


class BagOfWords(nn.Module):
    """The mean of the words' vectors, a hidden layer, and a score for each class."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.embedding(x).mean(1))
        return scores
