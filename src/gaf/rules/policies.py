"""GAF, the policy: from the k x k Gram matrix of the micro-gradients to a Decision, on its device.

It is `Sequential`: it visits the rows one by one and looks only at the running sum of the rows
taken so far, so it can decide while the rows stream by.
"""

import copy
import math
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gaf.arguments import ABOVE_0, one_of, real_number, whole_number
from gaf.rules.concluding import decide_in_order, decide_on_host
from gaf.rules.contract import describe_state
from gaf.rules.decision import Decision
from gaf.rules.gaf_arguments import as_norm_ratio, as_tau, check_scope_and_tau
from gaf.rules.gram import check_gram, without_giants
from gaf.rules.ring import choose_start, ring_orders, walk_from_best
from gaf.rules.sequential import Seen, Sequential, walk
from gaf.rules.thresholds import Threshold
from gaf.rules.visits import are_few
from gaf.rules.whitening import whiten
from gaf.shapes import Bool, Float64


@dataclass(frozen=True)
class GAF(Sequential):
    """Gradient agreement filtering (arXiv 2412.18052, algorithm 1).

        s <- g_1, c <- 1
        for i = 2..k:   if 1 - <s, g_i> / (|s| |g_i|) <= tau:   s <- s + g_i,  c <- c + 1
        c < min_accepted: skip        else: step with s / c

    Args:
        tau: the largest cosine DISTANCE to the running sum that is accepted, in [0, 2]. Lower
            filters more; 2 accepts every present row; the paper used 0.97 under label noise and 1.0
            without. It does not transfer between tasks: the mean distance between micro-gradients
            falls as the micro-batch grows. So it may also be a threshold object that adapts
            (`gaf.SignalTau`, `gaf.NoiseFloorTau`, `gaf.QuantileTau`, `gaf.MovingAverageTau`,
            `gaf.ScheduleTau`), or "auto" for the one that the measurements in docs/choosing-tau.md
            recommend.
        start: which row the sum starts from. "first": the first present one (the paper). "best":
            every present row is tried, visiting the others around the ring; the start that accepts
            most rows is kept, then the one whose accepted rows have the highest mean pairwise
            cosine, then the lowest. "worst": among the starts that reach min_accepted the one that
            accepts fewest, then the lowest mean cosine, then the lowest. Trying all costs O(k^3)
            scalars.
        average: "mean" of the accepted rows (the paper), or "halving", s <- (s + g_i) / 2 at each
            acceptance (the authors' released code), which weighs later rows more and changes later
            decisions. The same for k = 2.
        min_accepted: accepted rows, the start included, without which the step is skipped; at least
            1. Higher skips more. With 1 the start alone is enough.
        max_norm_ratio: a row whose norm is more than this many times the lower median of the
            present rows' norms (of two rows, the smaller) counts as absent; at least 1. None (the
            paper): no limit. The rule looks at directions only: one huge row that agrees would
            otherwise be nearly all of the average.
        scope: "all": one decision for the whole gradient (the paper). "group": under `gaf.attach`,
            one for each of DDP's buckets or FSDP2's parameter groups. This is another algorithm:
            its decisions depend on how the engine groups parameters, and some groups can step where
            others do not. "layer": under `gaf.Accumulator(model=...)`, one for each module that has
            parameters. This too is another algorithm: a layer may accept a micro-batch that another
            layer rejects. Both take a number for tau.
        metric: the inner product by which rows agree; the update is made of the rows themselves.
            "euclidean": the paper's. "optimizer": <g, M g'>, M = 1 / (sqrt(v) + eps), by Adam's v
            (`gaf.rules.second_moments`), where `gaf.Accumulator` or `gaf.attach` gives K.
            "whitened": by the inverse of the rows' own scatter (`gaf.rules.whitening`); keeps all k
            rows. A tau does not carry over from one to another: let it adapt.
        ridge: for "whitened", what is added to the scatter, in units of its mean; above 0. Higher
            is nearer to "euclidean".

    An Accumulator and a Handle keep their own copy of what an adaptive tau learns, so one policy
    may serve several.

    A single row (k = 1) has nothing to agree with: it steps as plain training does, unless it is
    absent.

    Raises:
        ValueError: if an argument is out of its range.

    >>> policy = GAF(tau=0.5)
    >>> K = torch.tensor([[1.0, 0.9, -1.0], [0.9, 1.0, -0.9], [-1.0, -0.9, 1.0]]).double()
    >>> policy(K).weights
    tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """

    tau: float | Threshold | Literal["auto"] = 0.97
    _: KW_ONLY
    start: Literal["first", "best", "worst"] = "first"
    average: Literal["mean", "halving"] = "mean"
    min_accepted: int = 2
    max_norm_ratio: float | None = None
    scope: Literal["all", "group", "layer"] = "all"
    metric: Literal["euclidean", "optimizer", "whitened"] = "euclidean"
    ridge: float = 1.0

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        tau = as_tau(self.tau)
        put("tau", tau)
        one_of("GAF: start", self.start, ("first", "best", "worst"))
        one_of("GAF: average", self.average, ("mean", "halving"))
        one_of("GAF: scope", self.scope, ("all", "group", "layer"))
        one_of("GAF: metric", self.metric, ("euclidean", "optimizer", "whitened"))
        put("ridge", real_number("GAF: ridge", self.ridge, ABOVE_0, math.inf, "1 is the default."))
        least = whole_number("GAF: min_accepted", self.min_accepted, 1, "The paper uses 2.")
        put("min_accepted", least)
        if self.max_norm_ratio is not None:
            put("max_norm_ratio", as_norm_ratio(self.max_norm_ratio))
        check_scope_and_tau(self.scope, tau)

    @property
    def streams(self) -> bool:  # type: ignore[override]
        keeps_rows = isinstance(self.tau, Threshold) and self.tau.needs_gram
        one_by_one = self.start == "first" and self.metric != "whitened"
        return one_by_one and self.max_norm_ratio is None and not keeps_rows

    def tau_on(self, device: torch.device) -> Float64[Tensor, ""]:
        """The largest distance that the step at hand accepts, () on the device."""
        tau = self.tau_at(device)
        if isinstance(tau, Tensor):
            return tau
        return torch.full((), tau, dtype=torch.float64, device=device)

    def tau_at(self, device: torch.device) -> float | Tensor:
        if isinstance(self.tau, Threshold):
            return self.tau.tau_on(device)
        return cast(float, self.tau)

    def private_copy(self) -> "GAF":
        """A copy whose tau learns by itself."""
        twin = copy.copy(self)
        object.__setattr__(twin, "tau", copy.deepcopy(self.tau))
        return twin

    def learn(self, seen: Seen) -> None:
        if isinstance(self.tau, Threshold):
            self.tau.learn(seen)

    def state_dict(self) -> dict[str, Any]:
        """What an adaptive tau has learned; nothing for a number."""
        return {"tau": self.tau.state_dict()} if isinstance(self.tau, Threshold) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave. The state of a run whose tau was a number is empty.

        Raises:
            ValueError: for the state of another policy.
        """
        if not isinstance(state, dict) or state.keys() - {"tau"}:
            raise ValueError(
                "GAF: the state must be of a policy of the same kind; "
                f"it holds {describe_state(state)}. "
                "Build the policy as it was when it was saved."
            )
        if isinstance(self.tau, Threshold) and state:
            self.tau.load_state_dict(state["tau"])

    def conclude(self, accepted: Bool[Tensor, " k"], distances: Float64[Tensor, " k"]) -> Decision:
        k, device = len(accepted), accepted.device
        how = self.average, self._least(k)
        if are_few(self, k, device):
            return decide_on_host(accepted.tolist(), distances, range(k), *how)
        return decide_in_order(accepted, distances, torch.arange(k, device=device), *how)

    def __call__(self, gram: Float64[Tensor, "k k"]) -> Decision:
        check_gram(gram)
        if self.max_norm_ratio is not None:
            gram = without_giants(gram, self.max_norm_ratio)
        if self.metric == "whitened":
            gram = whiten(gram, self.ridge)
        if self.start == "first":
            return super().__call__(gram)
        return self._try_all_starts(gram)

    def _try_all_starts(self, gram: Float64[Tensor, "k k"]) -> Decision:
        k, fewest = len(gram), self.start == "worst"
        least = self._least(k) if fewest else 1
        if are_few(self, k * gram.numel(), gram.device):
            return self._try_all_on_host(gram, least)
        orders = ring_orders(k, gram.device)
        visited = walk(self, gram, orders)
        start = choose_start(gram, visited[0], least, fewest)
        # an index of its own dimension: a scalar one would be fetched
        order, accepted, distances, signals = (x[start[None]][0] for x in (orders, *visited))
        self.learn(Seen(accepted, distances, gram.diagonal(), signals, gram))
        return decide_in_order(accepted, distances, order, self.average, self._least(k))

    def _try_all_on_host(self, gram: Float64[Tensor, "k k"], least: int) -> Decision:
        fewest, k = self.start == "worst", len(gram)
        order, accepted, (distances, signals) = walk_from_best(self, gram, least, fewest)
        flags = torch.tensor(accepted, device="cpu")
        self.learn(Seen(flags, distances, gram.diagonal(), signals, gram))
        return decide_on_host(accepted, distances, order, self.average, self._least(k))

    def _least(self, k: int) -> int:
        return 1 if k == 1 else self.min_accepted
