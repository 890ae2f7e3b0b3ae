"""Measures micro-gradients without training: how far they agree, what GAF would accept at which tau, and which tau to take.

model, micro-batches -> rows, a slice of the coordinates at a time -> K per layer -> K -> B, d_eff -> tau
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gaf.arguments import is_number, real_number, whole_number
from gaf.measure.micro_gradients import (
    Losses,
    check_callable,
    check_model,
    iterator_of,
    layer_grams,
    loss_on,
    same_size,
)
from gaf.measure.untouched import untouched
from gaf.rules.agreement import (
    Noise,
    cosines_of,
    noise_floor,
    noise_of,
    predicted_acceptance,
    tau_for,
)
from gaf.rules.gram import present
from gaf.rules.sequential import norm2_after, visit
from gaf.shapes import Float64

ROWS = 128
DRAWS = 2000  # macro-batches made of the measured rows
HALF, CHANCE = 0.5, 0.05
SAMPLES = (
    "It counts the samples in a micro-batch; leave it out where their first tensor has as many."
)
MORE = "Give more micro-batches, or lower k."
USED_UP = "An iterator gives its micro-batches once: make a new one, or give a DataLoader."


@dataclass(frozen=True)
class Acceptance:
    """Shares in [0, 1]: `rows` of the k - 1 compared micro-gradients that were accepted, `steps` that were taken."""

    rows: float
    steps: float


@dataclass(frozen=True)
class Recommendation:
    """A tau and why: what was predicted for it from one half of the rows, and measured on the other, as `Acceptance.rows`."""

    tau: float
    predicted: float
    measured: Acceptance
    reason: str


@dataclass(frozen=True, eq=False)
class Probe:
    """What `gaf.probe` found. `print` shows it as a table.

    Attributes:
        b: samples per micro-batch.
        k: micro-batches per step that acceptance is about.
        gram: (r, r) float64, K of the r rows that were present.
        layers: the same of each module's own parameters, by its name; they add up to `gram`, for K adds up over coordinates.
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
            ValueError: where there is no such layer.
        """
        gram = self.gram if layer is None else self._layer(layer)
        i, j = torch.triu_indices(len(gram), len(gram), 1, device=gram.device)
        distances = (1 - cosines_of(gram)[i, j]).clamp(0, 2)
        return distances[~distances.isnan()]

    @property
    def noise(self) -> Noise:
        """B and d_eff from the first half of the rows: what every prediction is made of."""
        return noise_of(self.gram[: len(self) // 2, : len(self) // 2], self.b)

    def noise_in(self, layer: str) -> Noise:
        """B and d_eff of one layer, from all rows.

        Raises:
            ValueError: where there is no such layer.
        """
        return noise_of(self._layer(layer), self.b)

    def _layer(self, name: str) -> Float64[Tensor, "r r"]:
        if name not in self.layers:
            near = get_close_matches(str(name), self.layers, 3, 0.0)
            raise ValueError(f"Probe: layer must be the name of one of the {len(self.layers)} modules in probe.layers; got {name!r}. "
                             f"Near it are {', '.join(map(repr, near))}.")  # fmt: skip
        return self.layers[name]

    def predicted(self, tau: float, m: int = 1) -> float:
        """Expected share of compared rows that GAF(tau) accepts, from B and d_eff alone; for micro-batches of b * m samples."""
        m, tau = checked_merging(m, "predicted"), checked_tau(tau, "predicted")
        return predicted_acceptance(tau, self.k, self.noise.rho / m, self.noise.dimension)

    def measured(self, tau: float) -> Acceptance:
        """What GAF(tau) does with macro-batches of k rows, drawn from the second half of the rows, which no prediction has seen."""
        half, tau = len(self) // 2, checked_tau(tau, "measured")
        return acceptance(self.gram[half:, half:], self.k, tau)

    def merged(self, m: int) -> "Probe":
        """The probe at micro-batches of b * m samples, without a new gradient: the mean of m rows is such a row.

            K -> A K A^T        A (r // m, r): 1 / m for the m rows that are merged, else 0

        Raises:
            ValueError: where m is below 1, or fewer rows would be left than k and the two halves need.
        """
        m = checked_merging(m, "merged")
        left = len(self) // m
        check_enough(left, self.k, f"merged({m}): {len(self)} rows merged {m} at a time must leave")
        one = torch.eye(left, dtype=torch.float64, device=self.gram.device)
        average = one.repeat_interleave(m, 1) / m
        smaller = {
            name: average @ gram[: left * m, : left * m] @ average.T
            for name, gram in self.layers.items()
        }
        gram = average @ self.gram[: left * m, : left * m] @ average.T
        return Probe(self.b * m, self.k, gram, smaller, self.absent)

    def recommend(self, share: float = HALF, chance: float = CHANCE, m: int = 1) -> Recommendation:
        """The highest tau that still filters: rows pass by more than chance, and not more than a share of them.

            tau = min(tau of the noise floor, tau of that share)

        Above the noise floor pure noise passes in more than `chance` of the comparisons: agreement means nothing there. Above
        the other one, more than `share` of the compared rows are expected to be accepted: large micro-batches nearly
        always agree more than chance, and a filter that takes them all does nothing.

        Args:
            share: of the compared rows accepted, at most, in (0, 1). Lower filters more and takes fewer steps.
            chance: of pure noise passing one comparison, at most, in (0, 1). Lower filters more.
            m: for micro-batches of b * m samples: predicted from B and d_eff at b, measured on merged rows.

        Raises:
            ValueError: where share or chance is not in (0, 1), m is below 1, or too few rows are left of those merged.
        """
        for name, value in (("share", share), ("chance", chance)):
            if not is_number(value) or not 0 < value < 1:
                raise ValueError(
                    f"recommend: {name} must lie in (0, 1); got {value!r}. The default is {HALF if name == 'share' else CHANCE}."
                )
        m = checked_merging(m, "recommend")
        noise = self.noise
        floor, wanted = (
            noise_floor(chance, noise.dimension),
            tau_for(share, self.k, noise.rho / m, noise.dimension),
        )
        tau = min(floor, wanted)
        predicted = self.predicted(tau, m)
        scale = (
            "no common direction can be made out"
            if math.isinf(noise.scale)
            else f"B = {number(noise.scale)} samples"
        )
        by_floor = (
            f"Above tau = {tau:.3f} agreement means little: pure noise, whose cosines scatter by {noise.dimension**-0.5:.3f} here "
            f"(d_eff = {number(noise.dimension)}), would pass in more than {100 * chance:g}% of the comparisons. At that tau "
            f"{100 * predicted:.0f}% of the compared micro-gradients should be accepted ({scale}, b = {self.b * m})."
        )
        by_share = (
            f"Micro-gradients agree by more than noise would ({scale}, b = {self.b * m}): at tau = {floor:.3f}, which pure noise passes in "
            f"{100 * chance:g}% of the comparisons, {100 * self.predicted(floor, m):.0f}% of those compared would be accepted. "
            f"At tau = {tau:.3f} it should be {100 * predicted:.0f}%."
        )
        measured = (self if m == 1 else self.merged(m)).measured(tau)
        return Recommendation(tau, predicted, measured, by_floor if floor <= wanted else by_share)

    def __str__(self) -> str:
        advice = self.recommend()
        return (
            "\n".join(f"{name:32} {value}" for name, value in (*facts(self), *facts_of(advice)))
            + f"\n{advice.reason}"
        )


def facts(probe: Probe) -> list[tuple[str, str]]:
    """What was measured, in words."""
    noise, distances = probe.noise, probe.distances()
    low, middle, high = distances.quantile(distances.new_tensor([0.1, 0.5, 0.9])).tolist()
    gone = f", {probe.absent} absent (zero, NaN or infinite)" if probe.absent else ""
    return [
        ("micro-gradients", f"{len(probe)} of b = {probe.b} samples{gone}"),
        ("cosine distance of two", f"{middle:.3f} (10% to 90%: {low:.3f} to {high:.3f})"),
        (
            "gradient noise scale B",
            f"{number(noise.scale)} samples (95%: {number(noise.low)} to {number(noise.high)})",
        ),
        ("effective dimension d_eff", number(noise.dimension)),
    ]


def facts_of(advice: Recommendation) -> list[tuple[str, str]]:
    shares = f"{100 * advice.predicted:.1f}% predicted, {100 * advice.measured.rows:.1f}% measured on other micro-gradients"
    steps = f"{100 * advice.measured.steps:.1f}% measured"
    return [
        ("recommended tau", f"{advice.tau:.3f}"),
        ("accepted, of those compared", shares),
        ("steps taken there", steps),
    ]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def acceptance(gram: Float64[Tensor, "r r"], k: int, tau: float, draws: int = DRAWS) -> Acceptance:
    """What GAF(tau) does with so many macro-batches of k of the r rows, always the same ones."""
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.rand(draws, len(gram), generator=generator, dtype=torch.float32, device="cpu")
    chosen = numbers.argsort(1)[:, :k].to(gram.device)
    own = gram.diagonal()[chosen]
    pairs = gram[chosen[:, :, None], chosen[:, None, :]]
    inner, norm2 = pairs[:, 0], own[:, 0]
    count = torch.ones(draws, dtype=torch.int64, device=gram.device)
    for i in range(1, k):
        joins, _ = visit(count, inner[:, i], norm2, own[:, i], tau)
        norm2 = torch.where(
            joins, norm2_after(norm2, inner[:, i], own[:, i], torch.ones_like(norm2)), norm2
        )
        inner = torch.where(joins[:, None], inner + pairs[:, i], inner)
        count = count + joins
    return Acceptance(
        float((count - 1).double().mean() / (k - 1)), float((count >= 2).double().mean())
    )


def probe(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    micro_batches: Iterable[Any],
    *,
    k: int = 8,
    b: int | None = None,
    rows: int = ROWS,
    slices: int = 1,
) -> Probe:
    """Measures the micro-gradients of a model as it is, and changes nothing.

    Whatever forward passes and `loss_fn` change of the model is put back bit for bit, also where an exception ends it: weights,
    gradients (p.grad), requires_grad, buffers, modes (train or eval), hooks, and all other attributes of its modules with what lists
    and dictionaries hold; and so for `loss_fn` where it is a module. So is random state: torch's on the CPU and on CUDA devices,
    Python's `random`, and numpy's global one. The model is measured in the mode that it is in: call model.train() first, as training
    does. The micro-batches are drawn from the iterable, which may move its own state on.

    What is measured are the gradients that training has: where `probe` is called under autocast, forward passes and losses are under
    it, backward passes are not, and K is exact.

    Half of the rows give B and d_eff, and so the predictions; the other half is what acceptance is measured on.

    The rows are held in main memory, in the gradients' dtype: rows * n numbers, n / slices at a time; beside them a copy of the model
    where it is. Time: `slices` forward and
    backward passes for each row, and r^2 n operations for K.

    Args:
        model: on one device. For a data-parallel model give the module inside, and to it micro-batches of one rank.
        loss_fn: gives the mean loss of a micro-batch, (). Called as loss_fn(model(x), y) on pairs (x, y), and as
            loss_fn(model(**micro_batch), micro_batch) on mappings.
        micro_batches: as training draws them, on the model's device; all of b samples. 2 k at least are needed; 64 and more make
            the estimates good.
        k: micro-batches per step, at least 2, that acceptance is predicted and measured for.
        b: samples per micro-batch; None takes the length of its first tensor.
        rows: at most so many micro-batches are taken. Higher is more exact; time and memory grow with it.
        slices: parts that the coordinates are taken in, one after the other, since K adds up over them. Higher divides the memory
            and multiplies the time by it.

    Raises:
        TypeError: where the model is none, a data-parallel one or not yet initialised, micro_batches gives no pairs or mappings, or the
            loss is no scalar tensor that depends on the parameters.
        ValueError: where micro-batches are too few or differ in size, k, rows or slices is out of its range, or nothing can be learned.

    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(640, 20), torch.randint(0, 2, (640,))
    >>> found = probe(nn.Linear(20, 2), nn.functional.cross_entropy, zip(x.split(10), y.split(10)), k=4)
    >>> len(found), found.b, list(found.layers)
    (64, 10, ['weight', 'bias'])
    """
    check_model(model)
    check_callable(loss_fn)
    k = whole_number("probe: k", k, 2, "8 is usual.")
    rows = whole_number("probe: rows", rows, 2 * k, f"{ROWS} is the default.")
    slices = whole_number("probe: slices", slices, 1, "1 is fastest.")
    with untouched(model, loss_fn):
        taken = list(islice(iterator_of(micro_batches), rows))
    size = same_size(taken) if b is None else whole_number("probe: b", b, 1, SAMPLES)
    losses = [partial(loss_on, model, loss_fn, one) for one in taken]
    return of_losses(model, losses, size, k, slices, [loss_fn])


def of_losses(
    model: nn.Module, losses: Losses, b: int, k: int, slices: int = 1, others: Sequence[Any] = ()
) -> Probe:
    """The same from functions that compute a micro-batch's loss; each is called once for each of the slices.

    What else the losses change than the model is put back too, for modules among the `others`.
    """
    check_enough(len(losses), k, "probe: micro_batches must give", MORE if losses else USED_UP)
    layers = layer_grams(model, losses, slices, others)
    gram = torch.stack(list(layers.values())).sum(0)
    sound = present(gram.diagonal())
    absent = int((~sound).sum())
    check_enough(
        len(gram) - absent,
        k,
        f"probe: {absent} of {len(gram)} micro-gradients are absent (zero, NaN or infinite); there must be",
    )
    return Probe(
        b,
        k,
        gram[sound][:, sound],
        {name: found[sound][:, sound] for name, found in layers.items()},
        absent,
    )


def checked_merging(m: int, call: str) -> int:
    return whole_number(f"{call}: m", m, 1, "It counts the rows that are merged into one.")


def checked_tau(tau: float, call: str) -> float:
    return real_number(f"{call}: tau", tau, 0, 2, "It is a cosine distance.")


def check_enough(seen: int, k: int, subject: str, fix: str = MORE) -> None:
    least = max(2 * k, 8)
    if seen < least:
        raise ValueError(
            f"{subject} at least {least}, k = {k} for each of two halves and 4 at the least; got {seen}. {fix}"
        )
