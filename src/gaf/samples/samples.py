"""A policy over single samples: K from one backward pass, the update from a second one."""

from collections.abc import Collection, Sequence
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gaf.device.accumulate import Accumulator
from gaf.device.buffers import Buffers
from gaf.device.packs import Apart
from gaf.device.stacked import StackedRows
from gaf.rules.contract import Policy, merge_of, scope_of
from gaf.rules.decision import Decision, Evidence, as_skip
from gaf.rules.judging import decide_with_evidence
from gaf.rules.second_moments import check_no_optimizer_metric
from gaf.samples.checks import check_losses, check_model, check_sample_policy, choose_layers
from gaf.samples.ghost import GhostPass
from gaf.samples.recording import record_calls
from gaf.shapes import Float, Float64


class Samples(Accumulator):
    """Filters the single samples of each batch: one decision about them, a step or none.

        samples = gaf.Samples(model, optimizer, gaf.GAF(tau=0.97))
        for x, y in batches:
            samples.backward(cross_entropy(model(x), y, reduction="none"))
            decision = samples.step()

    The rows are the n samples of a batch. K comes from one backward pass without per-sample
    gradients (`gaf.ghost_gram`, with the same layers and limits), the update w^T G from a second
    one through the same graph, of the losses times the decision's weights. What `decide`, `step`,
    `gate`, `stats` and the state do is as in `gaf.Accumulator`, with samples as micro-gradients.

    A sample whose gradient is not finite is absent. It cannot be left out of the pass through all
    samples, so that no step is taken then, unless the policy gives it a weight (`gaf.Mean`).

    Args:
        model: that is trained, on one device.
        optimizer: as for the Accumulator.
        policy: one that decides about the whole gradient from K.
        scaler: as for the Accumulator: give `backward` the plain losses.
        layers: names of the modules whose parameters the decision looks at; None for all. All
            parameters are updated, with the same weights.

    Raises:
        TypeError, ValueError: where an argument cannot be used.
    """

    subject = "Samples"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        policy: Policy,
        *,
        scaler: GradScaler | None = None,
        layers: Collection[str] | None = None,
    ) -> None:
        check_model(model, self.subject)
        self._check_policy(policy)
        choose_layers(model, layers, self.subject)
        super().__init__(optimizer, policy, model=model, scaler=scaler)
        self.model, self._chosen = model, layers
        for hook in record_calls(model):
            finalize(self, hook.remove)

    def _check_policy(self, policy: Policy) -> None:
        check_sample_policy(policy, scope_of(policy), merge_of(policy) is not None)
        no_rows = "single samples' gradients are never there"
        check_no_optimizer_metric(policy, self.subject, no_rows)

    @property
    def enough(self) -> bool:
        """Whether a step is due: after each `backward`."""
        return self.waiting

    def backward(self, losses: Float[Tensor, " n"]) -> None:  # type: ignore[override]
        """Computes K of the batch's samples.

        Args:
            losses: (n,), one for each sample; not scaled. The model made them since this object
                was made.

        Raises:
            RuntimeError: where the last batch waits for its `step()`; where a parameter already
                holds a gradient; as `gaf.ghost_gram` has it.
            TypeError, ValueError: as `gaf.ghost_gram` has it.
        """
        check_losses(losses, self.subject)
        self._check_policy(self.policy)  # a new one may have been assigned
        if self.waiting:
            raise RuntimeError(
                "Samples: each backward() must be followed by step(), because the samples of one "
                "batch are decided on together; another batch waits. Call step() or discard()."
            )
        self._scaling.claim(self)
        self._params.refresh()
        self._params.check_clean()
        scaled = self._scaling.scale(losses)
        K = GhostPass(self.model, scaled, self._chosen, self.subject).run()
        self._rows = SampleRows(self.policy, K, scaled, self._params.current)


class SampleRows(StackedRows):
    """The samples of a batch until the decision: K, and the losses with their graph.

    Args:
        policy: what decides.
        gram: K.
        losses: (n,).
        params: that the update is for.
    """

    def __init__(
        self,
        policy: Policy,
        gram: Float64[Tensor, "n n"],
        losses: Float[Tensor, " n"],
        params: Sequence[nn.Parameter],
    ) -> None:
        super().__init__(policy, Apart([True] * len(params)))
        self.gram, self.losses, self.params = gram, losses, params

    def __len__(self) -> int:
        return len(self.losses)

    def decide(self) -> tuple[Decision, Evidence]:
        """The policy's decision; a skip where an absent row would spoil the others."""
        decision, evidence = decide_with_evidence(self.policy, self.gram)
        spoiled = (~self.gram.diagonal().isfinite() & (decision.weights == 0)).any()
        return choose(spoiled, as_skip(decision), decision), evidence

    def update(self, weights: list[float]) -> Buffers:
        """w^T G by one backward pass, which frees the graph."""
        trained = [p for p in self.params if p.requires_grad]
        w = torch.tensor(weights, dtype=self.losses.dtype, device=self.losses.device)
        grads = torch.autograd.grad([self.losses], trained, [w], allow_unused=True)
        found = dict(zip(trained, grads, strict=True))
        return [found.get(p) for p in self.params]


def choose(condition: Tensor, yes: Decision, no: Decision) -> Decision:
    """One of two decisions, without waiting for the device."""
    parts = {name: torch.where(condition, a, getattr(no, name)) for name, a in vars(yes).items()}
    return Decision(**parts)
