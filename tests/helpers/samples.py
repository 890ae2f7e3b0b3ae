"""Per-sample gradients, one by one: what tests of gaf.samples compare with."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy


def per_sample_rows(model: nn.Module, x: Tensor, y: Tensor, prefix: str = "") -> Tensor:
    """(n, coordinates): each sample's gradient, computed alone, of the parameters named."""
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    params = {k: p for k, p in trained.items() if k.startswith(prefix)}
    rest = {k: p for k, p in model.named_parameters() if k not in params}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(model, params | rest, (x[None],), tie_weights=True)
        return cross_entropy(out.flatten(1), y[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")(params, x, y)
    return torch.cat([g.flatten(1) for g in rows.values()], 1)
