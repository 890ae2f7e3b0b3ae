"""Hugging Face Trainer: a mixin for it and its subclasses."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback

from gaf.integrations.accelerate import attach
from gaf.integrations.accelerate_rows import MicroBatches
from gaf.integrations.options import check_names, check_options
from gaf.integrations.trackers import metrics
from gaf.ranks.handle import Handle
from gaf.rules.contract import Policy, check_policy

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object  # so that it mixes into any subclass of Trainer

STATE = "gaf.pt"  # beside optimizer.pt


class GAFMixin(Base):
    """Filters what a Trainer or a subclass of it averages.

        class MyTrainer(GAFMixin, Seq2SeqTrainer): ...    # or GAFTrainer, for the plain Trainer
        trainer = MyTrainer(model=model, args=args, gaf_policy=gaf.GAF(tau=0.9))

    In one process the rows are the micro-batches of `gradient_accumulation_steps`. In several they
    are the ranks, and what a rank accumulates is its row. Rows are weighted as the Trainer weights
    its micro-batches (by their items, if the model takes `num_items_in_batch`), so that tau = 2 is
    the Trainer's own step. Clipping and `on_pre_optimizer_step` see the update. A skip leaves
    parameters, optimizer state and the learning-rate schedule alone, and counts in `global_step`.
    Checkpoints carry counts and the policy's state, in gaf.pt. The numbers of
    `gaf.integrations.trackers.metrics` are in every log of the training loss; the noise scale is in
    samples.

    Args:
        gaf_policy: `gaf.GAF(...)`, or any other that `gaf.Accumulator` or `gaf.attach` takes.
        gaf_options: of `gaf.Accumulator` in one process (bn, leave_out), of `gaf.attach` in several
            (micro_group).
        *args: the Trainer's.
        **kwargs: the Trainer's.

    Attributes:
        gaf: what decides, from the start of training on: `.last`, `.stats()`.

    Raises:
        TypeError: for a wrong policy, and for an option of the other kind of rows.
        TypeError, ValueError, RuntimeError: when training starts, where filtering cannot work (see
            `gaf.integrations.accelerate.attach`).
    """

    def __init__(
        self,
        *args: Any,
        gaf_policy: Policy,
        gaf_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = {} if gaf_options is None else gaf_options
        check_policy(gaf_policy, "GAFTrainer")
        check_names(options, "GAFTrainer")  # first: making a Trainer takes long
        super().__init__(*args, **kwargs)
        alone = self.accelerator.distributed_type == DistributedType.NO
        check_options(options, "GAFTrainer", ranks=not alone)
        self.gaf: MicroBatches | Handle | None = None
        self.gaf_policy, self.gaf_options = gaf_policy, options
        self._gaf_checkpoint: Path | None = None
        self.add_callback(AttachCallback(self))

    def attach(self) -> None:
        if self.gaf is not None:  # left over from an earlier training
            self.gaf.detach()
        assert self.optimizer is not None
        given = self.accelerator, self.model_wrapped, self.optimizer, self.gaf_policy
        self.gaf = attach(*given, **self.gaf_options)
        if isinstance(self.gaf, MicroBatches):
            self.gaf.divisor = lambda: self.current_gradient_accumulation_steps
        if self._gaf_checkpoint is not None and self._gaf_checkpoint.exists():
            state = torch.load(self._gaf_checkpoint, map_location="cpu", weights_only=True)
            self.gaf.load_state_dict(state)
        self._gaf_checkpoint = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.gaf is not None and "loss" in logs:
            samples = self.args.train_batch_size  # of a row
            if isinstance(self.gaf, Handle):
                samples *= self.args.gradient_accumulation_steps
            logs |= metrics(self.gaf, samples)
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.gaf is not None and self.args.should_save:
            torch.save(self.gaf.state_dict(), Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._gaf_checkpoint = None if checkpoint is None else Path(checkpoint) / STATE


class AttachCallback(TrainerCallback):
    """Attaches when training starts, once model, optimizer and scheduler are made and loaded."""

    def __init__(self, trainer: GAFMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.attach()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.trainer.gaf, MicroBatches):
            self.trainer.gaf.discard()  # left over from an interrupted epoch

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.gaf is not None:
            self.trainer.gaf.detach()


class GAFTrainer(GAFMixin, Trainer):
    """`transformers.Trainer` with a `gaf_policy`."""
