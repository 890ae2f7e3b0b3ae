"""What `gaf.probe` found: K of the micro-gradients, and what follows from it."""

from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from gaf.arguments import real_number, whole_number
from gaf.measure.acceptance import Acceptance, measure_acceptance
from gaf.measure.advice import (
    CHANCE,
    SHARE,
    Recommendation,
    check_chance,
    format_number,
    lines_of_advice,
    reason_of_noise_floor,
    reason_of_share,
)
from gaf.rules.agreement import Noise, cosines_of, noise_of
from gaf.rules.prediction import noise_floor, predicted_acceptance, tau_for
from gaf.shapes import Float64

MORE = "Give more micro-batches, or lower k."


@dataclass(frozen=True, eq=False)
class Probe:
    """What `gaf.probe` found. `print` shows it as a table.

    Attributes:
        b: samples per micro-batch.
        k: micro-batches per step that acceptance is about.
        gram: (r, r) float64, K of the r rows that were present.
        layers: the same of each module's own parameters, by its name. They add up to `gram`,
            because K adds up over coordinates.
        absent: rows left out: zero, NaN or infinite.
    """

    b: int
    k: int
    gram: Float64[Tensor, "r r"]
    layers: dict[str, Tensor]
    absent: int

    def __len__(self) -> int:
        """r, the rows."""
        return len(self.gram)

    def distances(self, layer: str | None = None) -> Float64[Tensor, " p"]:
        """Cosine distances in [0, 2] of all pairs of rows, of the whole gradient or of one layer.

        Raises:
            ValueError: if there is no such layer.
        """
        gram = self.gram if layer is None else self._layer(layer)
        i, j = torch.triu_indices(len(gram), len(gram), 1, device=gram.device)
        distances = (1 - cosines_of(gram)[i, j]).clamp(0, 2)
        return distances[~distances.isnan()]

    @property
    def noise(self) -> Noise:
        """B and d_eff from the first half of the rows, which every prediction is made of."""
        return noise_of(self.gram[: len(self) // 2, : len(self) // 2], self.b)

    def noise_in(self, layer: str) -> Noise:
        """B and d_eff of one layer, from all rows.

        Raises:
            ValueError: if there is no such layer.
        """
        return noise_of(self._layer(layer), self.b)

    def _layer(self, name: str) -> Float64[Tensor, "r r"]:
        if name not in self.layers:
            near = get_close_matches(str(name), self.layers, 3, 0.0)
            raise ValueError(
                f"Probe: layer must be the name of one of the {len(self.layers)} modules in "
                f"probe.layers; got {name!r}. Near it are {', '.join(map(repr, near))}."
            )
        return self.layers[name]

    def predicted(self, tau: float, m: int = 1) -> float:
        """Expected share of compared rows that GAF(tau) accepts, from B and d_eff alone.

        m: for micro-batches of b * m samples.
        """
        m, tau = merging_of(m, "predicted"), distance_of(tau, "predicted")
        return predicted_acceptance(tau, self.k, self.noise.rho / m, self.noise.dimension)

    def measured(self, tau: float) -> Acceptance:
        """What GAF(tau) does with macro-batches of k rows.

        They are drawn from the second half of the rows, which no prediction has seen.
        """
        half, tau = len(self) // 2, distance_of(tau, "measured")
        return measure_acceptance(self.gram[half:, half:], self.k, tau)

    def merged(self, m: int) -> "Probe":
        """The probe at micro-batches of b * m samples, without a new gradient.

        The mean of m rows is such a row:

            K -> A K A^T        A (r // m, r): 1 / m for the m rows that are merged, else 0

        Raises:
            ValueError: if m is below 1, or fewer rows would be left than k and the two halves need.
        """
        m = merging_of(m, "merged")
        left = len(self) // m
        check_enough(left, self.k, f"merged({m}): {len(self)} rows merged {m} at a time must leave")
        one = torch.eye(left, dtype=torch.float64, device=self.gram.device)
        A = one.repeat_interleave(m, 1) / m
        layers = {name: A @ K[: left * m, : left * m] @ A.T for name, K in self.layers.items()}
        gram = A @ self.gram[: left * m, : left * m] @ A.T
        return Probe(self.b * m, self.k, gram, layers, self.absent)

    def recommend(self, share: float = SHARE, chance: float = CHANCE, m: int = 1) -> Recommendation:
        """The highest tau that still filters: rows pass by more than chance, and at most a share.

            tau = min(tau of the noise floor, tau of that share)

        Above the noise floor pure noise passes in more than `chance` of the comparisons: agreement
        means nothing there. Above the other one, more than `share` of the compared rows are
        expected to be accepted: large micro-batches nearly always agree more than chance, and a
        filter that takes them all does nothing.

        Args:
            share: of the compared rows accepted, at most, in (0, 1). Lower filters more and takes
                fewer steps.
            chance: of pure noise passing one comparison, at most, in (0, 1). Lower filters more.
            m: for micro-batches of b * m samples: predicted from B and d_eff at b, measured on
                merged rows.

        Raises:
            ValueError: if share or chance is not in (0, 1), m is below 1, or too few rows are left
                after merging.
        """
        check_chance("share", share, SHARE)
        check_chance("chance", chance, CHANCE)
        m = merging_of(m, "recommend")
        noise, b = self.noise, self.b * m
        floor = noise_floor(chance, noise.dimension)
        tau = min(floor, tau_for(share, self.k, noise.rho / m, noise.dimension))
        predicted = self.predicted(tau, m)
        if tau == floor:
            reason = reason_of_noise_floor(noise, b, tau, chance, predicted)
        else:
            passing = self.predicted(floor, m)
            reason = reason_of_share(noise, b, floor, chance, passing, tau, predicted)
        merged = self if m == 1 else self.merged(m)
        return Recommendation(tau, predicted, merged.measured(tau), reason)

    def __str__(self) -> str:
        advice = self.recommend()
        lines = [*lines_of_probe(self), *lines_of_advice(advice)]
        return "\n".join(f"{name:32} {value}" for name, value in lines) + f"\n{advice.reason}"


def lines_of_probe(probe: Probe) -> list[tuple[str, str]]:
    """Name and value of each line that shows what was measured."""
    noise, distances = probe.noise, probe.distances()
    low, middle, high = distances.quantile(distances.new_tensor([0.1, 0.5, 0.9])).tolist()
    absent = f", {probe.absent} absent (zero, NaN or infinite)" if probe.absent else ""
    interval = f"{format_number(noise.low)} to {format_number(noise.high)}"
    scale = f"{format_number(noise.scale)} samples (95%: {interval})"
    return [
        ("micro-gradients", f"{len(probe)} of b = {probe.b} samples{absent}"),
        ("cosine distance of two", f"{middle:.3f} (10% to 90%: {low:.3f} to {high:.3f})"),
        ("gradient noise scale B", scale),
        ("effective dimension d_eff", format_number(noise.dimension)),
    ]


def merging_of(m: int, call: str) -> int:
    return whole_number(f"{call}: m", m, 1, "It counts the rows that are merged into one.")


def distance_of(tau: float, call: str) -> float:
    return real_number(f"{call}: tau", tau, 0, 2, "It is a cosine distance.")


def check_enough(seen: int, k: int, subject: str, fix: str = MORE) -> None:
    """ValueError if the rows are too few for two halves."""
    least = max(2 * k, 8)
    if seen < least:
        raise ValueError(
            f"{subject} at least {least}, k = {k} for each of two halves and 4 at the least; "
            f"got {seen}. {fix}"
        )
