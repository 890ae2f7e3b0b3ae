"""K of all samples in a batch, from one backward pass without per-sample gradients."""

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gaf.rules.blas import no_autocast
from gaf.rules.slices import float64_device
from gaf.samples.checks import (
    check_any_use,
    check_call,
    check_losses,
    check_model,
    check_order,
    check_uses,
    check_whole,
    choose_layers,
    is_ambiguous,
)
from gaf.samples.layers import Call, pieces_of_call, weight_and_bias
from gaf.samples.loss_graph import LossGraph, Node
from gaf.samples.pieces import Piece
from gaf.samples.ways import gram_of_pieces
from gaf.shapes import Float, Float64

LEAST = 1e-30  # of a squared norm in float32: below it has lost its digits


def ghost_gram(
    model: nn.Module, losses: Float[Tensor, " n"], *, layers: Collection[str] | None = None
) -> Float64[Tensor, "n n"]:
    """The inner products of all per-sample gradients, from one backward pass of the losses' sum.

        with gaf.recording(model):
            losses = cross_entropy(model(x), y, reduction="none")
        K = gaf.ghost_gram(model, losses)        # then, for example, (w * losses).sum().backward()

    Each layer's share follows from what it was given and from the gradient of its output, without
    the per-sample gradients of its parameters (Goodfellow, arXiv 1510.01799), or with those of a
    part of one layer at a time, where that is less work. Known are Linear, Conv1d to Conv3d,
    Embedding, LayerNorm, GroupNorm, RMSNorm and BatchNorm; layers that are called several times,
    and weights that several layers share. Frozen parameters are left out.

    Sample i must be entry i of each layer's input, and must act on losses[i] alone. Where a shape
    leaves that open, a backward pass of one loss checks it, at the first call. BatchNorm in
    training mode mixes samples: row i is then the gradient of the sum of all losses through sample
    i's activations, and not that of losses[i]. In evaluation mode it is exact.

    Args:
        model: that made the losses, inside `gaf.recording(model)`.
        losses: (n,), one for each sample. Their graph is kept.
        layers: names of the modules, with all that is in them, whose parameters count; None for
            all. Fewer are faster: the backward pass ends at the deepest of them.

    Returns:
        (n, n) float64. p.grad is not touched. The error is below 1e-5 of |g_i| |g_j|. A gradient
        that in float32 is shorter than 1e-15 counts as zero.

    Raises:
        TypeError, ValueError: for what are no losses of single samples, or names of no modules;
            for a layer whose input does not have the samples in its first dimension; for a model
            whose parameters are sharded (FSDP).
        RuntimeError: for a trainable parameter that is used by something else than a recorded call
            of a known layer; where the losses use none of the parameters; where what a layer was
            given has been written over.
    """
    subject = "ghost_gram"
    check_model(model, subject)
    check_losses(losses, subject)
    return GhostPass(model, losses, layers, subject).run()


class GhostPass:
    """One backward pass that adds up K as the layers' gradients arrive.

    Args:
        model: whose layers' calls were noted.
        losses: (n,).
        layers: names of modules; None for all.
        subject: for messages.
    """

    def __init__(
        self, model: nn.Module, losses: Tensor, layers: Collection[str] | None, subject: str
    ) -> None:
        check_whole(model, subject)
        self.losses, self.subject, self.n = losses, subject, len(losses)
        self.graph = LossGraph(losses)
        self.names = {module: name for name, module in model.named_modules()}
        noted = [p for call in self.graph.calls.values() for p in weight_and_bias(call.module)]
        self.uses: dict[Tensor, int] = {}  # of the parameters that count
        for name, module in choose_layers(model, layers, subject).items():
            for own, p in module.named_parameters(name, recurse=False):
                if p.requires_grad and (uses := self.graph.uses(p)):
                    check_uses(own, module, uses, sum(p is other for other in noted), subject)
                    self.uses[p] = uses
        check_any_use(self.uses, layers, subject)
        self.pieces: dict[Tensor, list[Piece]] = {}  # of parameters with uses still to come
        device = float64_device(losses.device)
        self.K = torch.zeros(self.n, self.n, dtype=torch.float64, device=device)

    def run(self) -> Float64[Tensor, "n n"]:
        calls = {
            node: call
            for node, call in self.graph.calls.items()
            if any(p in self.uses for p in weight_and_bias(call.module))
        }
        self._check_order({node: c for node, c in calls.items() if is_ambiguous(c, self.n)})
        ends = self.graph.deepest(calls)
        passed = [node for node in calls if node not in ends]
        hooks = [node.register_prehook(partial(self._arrive, calls[node])) for node in passed]
        edges = [GradientEdge(node, calls[node].place) for node in ends]
        try:
            ones = torch.ones_like(self.losses)
            for node, delta in zip(ends, self._gradients(edges, ones), strict=True):
                self._take(calls[node], delta)
        finally:
            for hook in hooks:
                hook.remove()
        for pieces in self.pieces.values():  # some of whose uses got no gradient
            self.K += gram_of_pieces(pieces).to(self.K.device)
        tiny = self.K.diagonal() < (0 if self.losses.dtype == torch.float64 else LEAST)
        return torch.where(tiny | tiny[:, None], 0.0, self.K)

    def _check_order(self, calls: dict[Node, Call]) -> None:
        """Where shapes do not tell, a backward pass of one loss does, once for each layer.

        Not where BatchNorm may mix the samples.
        """
        if not calls or any("BatchNorm" in node.name() for node in self.graph.nodes):
            return
        i = self.n // 2
        one = torch.zeros_like(self.losses)
        one[i] = 1
        edges = [GradientEdge(node, call.place) for node, call in calls.items()]
        for call, delta in zip(calls.values(), self._gradients(edges, one), strict=True):
            check_order(self.names.get(call.module, "?"), call, delta, i, self.subject)

    def _gradients(
        self, edges: Sequence[GradientEdge], by: Float[Tensor, " n"]
    ) -> Sequence[Tensor | None]:
        """Of the sum of the losses, each times its number in `by`."""
        if not edges:
            return []
        return torch.autograd.grad([self.losses], edges, [by], True, allow_unused=True)

    def _arrive(self, call: Call, deltas: Sequence[Tensor | None]) -> None:
        self._take(call, deltas[call.place])

    @torch.no_grad()
    def _take(self, call: Call, delta: Tensor | None) -> None:
        """Takes the gradient of a call's output."""
        if delta is None:
            return
        check_call(self.names.get(call.module, "?"), call, delta, self.n, self.subject)
        with no_autocast(delta.device.type):
            for p, make in pieces_of_call(call, delta):
                if p in self.uses:
                    self._add(p, make())

    def _add(self, p: Tensor, piece: Piece) -> None:
        """Adds a parameter's share to K, once the pieces of all its uses are there."""
        pieces = self.pieces.setdefault(p, [])
        pieces.append(piece)
        if len(pieces) == self.uses[p]:
            self.K += gram_of_pieces(self.pieces.pop(p)).to(self.K.device)
