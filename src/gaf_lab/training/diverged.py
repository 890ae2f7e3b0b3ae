"""A loss that is no longer a number."""

from torch import Tensor

from gaf_lab.training.ranks import Group

CHECK_LOSS_EVERY = 50  # steps on an accelerator: each check waits for it


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def check_losses(losses: Tensor, step: int, k: int, group: Group) -> None:
    """Diverged if all losses (k,) of a step are NaN or infinite."""

    def give_up() -> None:
        raise Diverged(
            f"step {step}: the loss must be a number; all {k} micro-batches gave NaN or infinity."
        )

    checked = losses.device.type == "cpu" or step % CHECK_LOSS_EVERY == 0
    if checked and not group.total(bool(losses.isfinite().any())):
        group.on_rank_0(give_up)
