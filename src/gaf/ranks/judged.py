"""A policy's decision about what the ranks have measured together, as plain numbers too."""

from dataclasses import replace

import torch
from torch import Tensor

from gaf.record.outcome import Outcome
from gaf.rules.averaging import Mean
from gaf.rules.contract import Policy
from gaf.rules.decision import Decision, Evidence
from gaf.rules.judging import cosines_to_others, decide_from_sums, decide_with_evidence
from gaf.rules.row_sums import RowSums


def judge_seen(policy: Policy, seen: Tensor | RowSums) -> tuple[Decision, Outcome]:
    """From K, or from its diagonal and row sums."""
    if isinstance(seen, RowSums):
        decision, evidence = decide_from_sums(policy, seen)
        cosines = seen.cosines
    else:
        decision, evidence = decide_with_evidence(policy, seen)
        cosines = cosines_to_others(seen)
    return decision, replace(Outcome.fetch(decision, evidence), cosines=cosines.tolist())


def judge_unseen(policy: Policy, k: int) -> tuple[Decision, Outcome]:
    """About k rows that a plain all-reduce adds up: by Mean or RandomSkip, which look at none."""
    assert isinstance(policy, Mean)
    ones = torch.ones(k, dtype=torch.bool, device="cpu")
    unknown = torch.full((k,), torch.nan, dtype=torch.float64, device="cpu")
    decision = policy.conclude(ones, unknown)
    outcome = Outcome.fetch(decision, Evidence(unknown, unknown[0], unknown[0]))
    return decision, outcome.without_measures()
