"""A run that judges its labels first, and then mostly starts again from new weights."""

from typing import Any

import torch

from gaf_lab.data.run_data import RunData
from gaf_lab.data.sampling import derive_seed
from gaf_lab.training.weighing import Audit


def restart_step(problem: RunData) -> int:
    """The step before which the run starts again: that after the audit's passes, at least 1."""
    config = problem.config
    return max(1, round(config.audit_passes * len(problem.train) / (config.k * config.b)))


def start_again_if_due(training: Any) -> None:
    """Ends the audit of a `Training`, if its step is the first one after the audit.

    Unless there is no restart, the weights are drawn anew, and optimizer and averaged weights are
    as in the beginning.
    """
    audit, problem = training.objective.weighing, training.problem
    if not isinstance(audit, Audit) or audit.ended or training.step != restart_step(problem):
        return
    audit.end()
    if audit.watching:
        return
    torch.manual_seed(derive_seed(training.config.seed, "weights after the audit"))
    training.model.load_state_dict(problem.new_model().state_dict())
    training.source.forget(training.optimizer)
    if training.average is not None:
        training.average.n_averaged.zero_()
