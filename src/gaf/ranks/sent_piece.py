"""A piece of the gradient on its way into a sum: what keeps its values, how it is divided."""

from collections.abc import Iterable, Sequence

from torch import Tensor

Pieces = tuple[Sequence[Tensor], Sequence[Tensor]]  # tensors, and where their coordinates are sent


class SentPiece:
    """A flat piece of the gradient that is sent."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat

    def find_kept(self) -> Pieces:
        """Tensors outside of `flat` that keep its values during the pass; none here."""
        return (), ()

    @property
    def is_row(self) -> bool:
        """Whether all of it belongs to this rank's row."""
        return True

    def parts(self) -> Iterable[tuple[Tensor, bool]]:
        """All of it in parts, each with whether the engine divides it: else it multiplies."""
        return [(self.flat, False)]

    def roots(self, start: int, stop: int) -> Tensor | None:
        """sqrt(M) of a diagonal metric at these coordinates; None for the plain one."""
        return None

    def divide(self, ranks: int) -> None:
        """To the bit as the engine does."""
        for part, divides in self.parts():
            divide(part, ranks, divides)


def divide(part: Tensor, ranks: int, divides: bool) -> None:
    if divides:
        part.div_(ranks)
    else:
        part.mul_(1 / ranks)
