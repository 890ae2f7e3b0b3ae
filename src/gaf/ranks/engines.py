"""The data-parallel engine of a model: whose gradients are compared, and what installs a handle.

An engine is imported only when a model uses it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from gaf.ranks.attach_checks import check_group, check_mesh
from gaf.ranks.model_checks import (
    check_ddp,
    check_fsdp_group,
    check_fsdp_mesh,
    check_not_unsharded,
    raise_not_parallel,
)
from gaf.rules.contract import Policy, scope_of


@dataclass(frozen=True)
class Engine:
    """What attach needs of DistributedDataParallel or FSDP2.

    Attributes:
        group: the ranks whose rows are compared.
        scopes: that an attached policy may change between.
        averages_only: whether the rows are reduced before a policy could choose among them.
        parameters: (model) -> those that take part in the decision.
        install: (model, handle, exchange, shards) has the handle decide, until it is detached.
    """

    group: "dist.ProcessGroup"
    scopes: tuple[str, ...]
    parameters: Callable[[Any], Any]
    install: Callable[[Any, Any, Any, Any], None]
    averages_only: bool = False


def engine_of(
    model: nn.Module, policy: Policy, group: "dist.ProcessGroup | None", unsharded: bool
) -> Engine:
    """The model's engine.

    Args:
        model: that attach was given.
        policy: that decides.
        group: the ranks to compare, if they were given.
        unsharded: whether a flat FSDP2 model's ranks keep an unsharded gradient.
    """
    if isinstance(model, DistributedDataParallel):
        check_not_unsharded(unsharded)
        return ddp_engine(model, group)
    from torch.distributed.fsdp import FSDPModule

    if not (isinstance(model, nn.Module) and isinstance(model, FSDPModule)):
        raise_not_parallel(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a root stays whole after an evaluation
    return fsdp_engine(model, policy, group, unsharded)


def ddp_engine(model: DistributedDataParallel, group: "dist.ProcessGroup | None") -> Engine:
    from gaf.ranks import ddp

    check_ddp(model, group, ddp.has_other_hook(model))
    return Engine(
        group=model.process_group,
        scopes=("all", "group"),
        parameters=ddp.averaged_parameters,
        install=ddp.install_in_ddp,
    )


def fsdp_engine(
    model: nn.Module, policy: Policy, group: "dist.ProcessGroup | None", unsharded: bool
) -> Engine:
    from gaf.ranks import fsdp, fsdp_unsharded

    averages_only = group is None and not unsharded and scope_of(policy) != "group"
    install = fsdp.install_average if averages_only else fsdp.install_in_fsdp
    if unsharded:
        install = fsdp_unsharded.install_unsharded
    return Engine(
        group=fsdp_group(model, policy, group, unsharded),
        scopes=(scope_of(policy),),
        parameters=fsdp.sharded_parameters,
        install=install,
        averages_only=averages_only,
    )


def fsdp_group(
    model: nn.Module, policy: Policy, group: "dist.ProcessGroup | None", unsharded: bool
) -> "dist.ProcessGroup":
    """An FSDP2 model's replicas, or if it is flat the ranks that it is sharded over."""
    mesh: Any = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
    check_fsdp_mesh(model, mesh)
    check_fsdp_group(policy, group, unsharded)
    return mesh.get_group() if group is None else group


def unwrap(model: Any) -> Any:
    """The data-parallel model inside torch.compile's wrapper, or inside Lightning Fabric's."""
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "_forward_module", None)
    return inner if isinstance(inner, DistributedDataParallel) else model


def process_group(group: Any, name: str, subject: str = "attach") -> Any:
    """The process group that is meant: None stays None, a mesh of one dimension gives its own."""
    if isinstance(group, DeviceMesh):
        check_mesh(group, name, subject)
        return group.get_group()
    check_group(group, name, subject)
    return group
