"""Hooks on a sharded model's parameters, which FSDP2 calls when it has reduced a gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gaf.ranks.handle import Handle


class ArrivalHooks:
    """Calls `arrive` with each parameter whose gradient has been reduced, until detached."""

    def __init__(
        self, handle: Handle, params: list[nn.Parameter], arrive: Callable[[Tensor], None]
    ) -> None:
        self.handle, self.params, self.arrive = handle, params, arrive
        self.numbers: dict[nn.Parameter, int] = {}  # torch's, of this object's hooks
        self.place()

    def place(self) -> None:
        """Watches all trainable parameters, also those thawed after attach.

        The hook is the last one of its parameter: others may change the gradient.
        """
        for p in self.params:
            if p.requires_grad and p not in self.numbers:
                hook = p.register_post_accumulate_grad_hook(self.arrive)
                self.numbers[p] = hook.id
                self.handle.on_detach(hook.remove)
            hooks: Any = p._post_accumulate_grad_hooks
            if p in self.numbers and next(reversed(hooks)) != self.numbers[p]:
                hooks.move_to_end(self.numbers[p])
