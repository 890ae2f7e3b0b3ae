"""The optimizer of a run, by name: torch's, or one of the package pytorch-optimizer.

Muon takes the weights that are matrices, and AdamW the rest.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.all_rows import AdamWOfAllRows, RMSpropOfAllRows

PACKAGED: dict[
    str, tuple[str, dict[str, Any]]
] = {  # by the config's name: the package's class, and what is set besides rate and decay
    "lamb": ("Lamb", {}),
    "lion": ("Lion", {"weight_decouple": True}),
    "soap": ("SOAP", {}),
    # its inverse roots cost more than the rest of a step of a small network
    "shampoo": ("Shampoo", {"preconditioning_compute_steps": 20}),
    "schedule-free": ("ScheduleFreeAdamW", {}),
}


def make_optimizer(
    config: TrainConfig, rate: float, params: list[nn.Parameter], fused: bool | None = None
) -> Optimizer:
    """The config's optimizer at a learning rate. fused: for SGD, Adam and AdamW."""
    shared: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    if config.optimizer in PACKAGED:
        return make_packaged(config.optimizer, params, shared)
    if config.optimizer == "adamw-all":
        return AdamWOfAllRows(params, **shared)
    moving: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.optimizer == "muon":
        return MuonAndAdamW(params, **shared, **moving)
    if config.optimizer == "rmsprop-all":
        return RMSpropOfAllRows(params, momentum=config.momentum, **shared)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(params, momentum=config.momentum, **shared)
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, fused=fused, **shared, **moving)
    kind = torch.optim.Adam if config.optimizer == "adam" else AdamW
    return kind(params, fused=fused, **shared)


def make_packaged(name: str, params: list[nn.Parameter], shared: dict[str, Any]) -> Optimizer:
    """An optimizer of the package pytorch-optimizer.

    Raises:
        ConfigError: if the package is not installed.
    """
    kind, own = PACKAGED[name]
    try:
        import pytorch_optimizer
    except ImportError:
        raise ConfigError(
            f"optimizer {name!r} needs the package pytorch-optimizer; it is not installed. "
            "Install it with pip install '.[optimizers]'."
        ) from None
    made: Optimizer = getattr(pytorch_optimizer, kind)(params, **shared, **own)
    return made


class MuonAndAdamW(Optimizer):
    """torch's Muon for parameters with two dimensions, AdamW for all others.

    Muon's step is scaled to the length of AdamW's (`match_rms_adamw`, arXiv 2502.16982), so that
    one learning rate fits both. State and parameter groups are kept as in any optimizer: Muon's
    group first.

    Args:
        params: of the model.
        lr, weight_decay: of both.
        momentum, nesterov: of Muon.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
    ) -> None:
        both: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        own: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
        matrices = [p for p in params if p.ndim == 2]
        others = [p for p in params if p.ndim != 2]
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, adjust_lr_fn="match_rms_adamw", **both, **own))
        if others:
            self.parts.append(AdamW(others, **both))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of load_state_dict: new groups and a new state
        self._share()

    def _share(self) -> None:
        """Gives each part its group and the state of this object."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("MuonAndAdamW: closure must be None; got one. Leave it out.")
        for part in self.parts:
            part.step()


@contextlib.contextmanager
def evaluated_weights(optimizer: Optimizer) -> Iterator[None]:
    """Within, the parameters are those to evaluate; afterwards they are what they were, to the bit.

    They differ only for a schedule-free optimizer, whose result is an average.
    """
    switch = getattr(optimizer, "eval", None)
    if switch is None:
        yield
        return
    weights: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        kept = [p.clone() for p in weights]
    switch()
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["train_mode"] = True
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
