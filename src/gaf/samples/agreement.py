"""A loss function that weighs each sample by how far its label is trusted, and reports it."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf.samples.agreement_checks import check_arguments, check_index, check_losses_of
from gaf.samples.caught import Caught
from gaf.samples.class_statistics import ClassStatistics
from gaf.samples.history import History
from gaf.samples.judge import Batch, gram_of_losses, is_warm, judge, over_positions, soft_weights
from gaf.samples.recording import record_calls, uncompiled
from gaf.samples.report import make_report, separation_of
from gaf.samples.summing import Summing, finish_sum, ranks_of
from gaf.shapes import Float


class SampleAgreement(nn.Module):
    """A loss function around another: weighs samples whose label looks wrong less, and lists them.

        criterion = gaf.SampleAgreement(nn.CrossEntropyLoss(reduction="none"), head=model.fc)
        loss = criterion(model(x), y, index=i)        # i: which samples of the data set these are
        table = pandas.DataFrame(criterion.report())

    Each sample gets a score, from the batch and from what was seen of its class before:

    - "prototype": how much nearer its features (the head's input) are to the mean features of its
      label than to those of any other class: by cosines, of features scaled to equal size.
    - "vote": the mean cosine of its gradient with those of the other samples in the batch that have
      its label: in the head, or with `model` in all layers.
    - "loss": minus its loss, for classes at least -6; for any loss function, and the control.

    Its weight is 1 - a (1 - sigmoid(4 (s - m) / d)), with m and d the running mean and deviation of
    the scores with its label. a is min(q, 1 - q) / 0.3, at most 1, for the running share q of
    samples with its label that seem to be of another class: all weights are near 1 where nearly all
    labels look right, and where nearly all look wrong, since the features do not tell the class
    then. For "prototype" a also falls to 0 as the share of the scores' variance, within labels,
    that lies between these samples and the others falls from 0.75 to 0.7: with one mode it is less,
    and low scores are then those of hard samples. The loss is sum w_i loss_i / sum w_i, with the
    criterion's class weights in both sums and its ignored targets in neither. Ranks divide by the
    mean of their sums, so that DDP averages to one weighted mean. A run that weights steer judges
    less well: to find wrong labels, use weigh=False and report before it memorises them.

    The mean features and the scores' statistics are buffers, the same on all ranks: sums over them
    by one small all-reduce, which each step starts and the next one waits for. What was seen of
    single samples stays on its rank.

    Args:
        criterion: with reduction="none": called with (outputs, targets), gives a loss for each
            sample, or several, which count like samples.
        head: the model's last Linear layer. Its input is caught by a hook: register it before a
            compiled model runs. None only for the score "loss".
        score: "prototype", "vote" or "loss".
        model: for the score "vote": all of its layers vote, which takes a second backward pass
            (`gaf.ghost_gram`, with the same layers and limits). It is called eagerly, and its
            parameters are plain or DDP's. None: the head alone votes.
        num_classes: C; None for the head's outputs. With neither the targets are no classes.
        num_samples: of the data set, if known: `index` is then not waited for on an accelerator.
        weigh: whether to weigh; otherwise the loss is the plain mean.
        refine: whether, after the warm-up, a sample counts for the mean features of its label only
            where these are the nearest: a minority of wrong labels then drops out of them.
        warmup: steps in which all weights are 1. None: until a third visit (after two that were
            judged), or 500 steps without `index`.
        leave_own_rank_out: judge a rank's samples by the mean features of the other ranks', so that
            a shard of wrong labels cannot vouch for itself.
        group: of the ranks; None for the default group, if any.

    Attributes:
        weights, total: of the last batch, (n,), and the divisor of its loss.

    Raises:
        TypeError, ValueError: where an argument cannot be used.
    """

    steps: Tensor
    weights: Tensor | None = None
    total: Tensor | None = None

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        head: nn.Module | None = None,
        score: Literal["prototype", "vote", "loss"] = "prototype",
        *,
        model: nn.Module | None = None,
        num_classes: int | None = None,
        num_samples: int | None = None,
        weigh: bool = True,
        refine: bool = True,
        warmup: int | None = None,
        leave_own_rank_out: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_arguments(criterion, head, score, model, num_classes, num_samples, warmup)
        self.criterion, self.score, self.refine = criterion, score, refine
        self.weigh, self.warmup = weigh, warmup
        outputs = getattr(head, "out_features", 1)
        self.classes = num_classes or (outputs if outputs > 1 else None)
        device = torch.device("cpu") if head is None else next(head.parameters()).device
        width = getattr(head, "in_features", 0) if score == "prototype" else 0
        self._summing = Summing(group, leave_own_rank_out)
        parts = ranks_of(group) if leave_own_rank_out else 1
        self.statistics = ClassStatistics(self.classes or 1, width, parts, device)
        self.history = History(num_samples, device)
        self._seen = self.history, score, self.classes, self._summing
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_state_dict_pre_hook(finish_sum)
        self.register_load_state_dict_pre_hook(finish_sum)
        self._caught = Caught()
        if head is not None:
            finalize(self, head.register_forward_hook(self._caught, with_kwargs=True).remove)
        self._gram = None if model is None else partial(gram_of_losses, model)
        for hook in [] if model is None else record_calls(model):
            finalize(self, hook.remove)

    def forward(self, outputs: Tensor, targets: Tensor, index: Any = None) -> Float[Tensor, ""]:
        """The loss of a batch, a scalar to call backward on: the weighted mean.

        In evaluation mode and without gradients it is the plain mean.

        Args:
            outputs: of the model, (n, ...).
            targets: classes (n,), probabilities of classes (n, C), or what the criterion takes.
            index: (n,), which samples of the data set these are, counted from 0.
        """
        return uncompiled(self._weighed_mean)(outputs, targets, index)

    def _weighed_mean(self, outputs: Tensor, targets: Tensor, index: Any) -> Float[Tensor, ""]:
        losses = check_losses_of(self.criterion(outputs, targets), outputs)
        batch = Batch(outputs.detach(), targets, losses.detach(), self.classes, self.criterion)
        losses, weights, total = over_positions(losses), batch.counted, batch.mass.sum()
        if self.training and torch.is_grad_enabled():
            batch.gram = None if self._gram is None else self._gram(losses)
            with torch.no_grad():
                weights = weights * self._judge(batch, index)
                total = self._summing.mean((weights * batch.mass).sum()) if self.weigh else total
            self.weights, self.total = weights, total
        return (weights * losses).sum() / total

    def _judge(self, batch: Batch, index: Any) -> Float[Tensor, " n"]:
        """Scores a batch and keeps the scores. Returns the weights."""
        if self.steps.device != batch.losses.device:
            self.to(batch.losses.device)
        finish_sum(self)
        left_out = self._summing.left_out
        scores, guesses, unit = judge(batch, self.score, self._caught, self.statistics, left_out)
        weights = soft_weights(scores, batch.labels, self.statistics, self.classes is not None)
        visits = None
        if index is not None:
            index = check_index(index, len(scores), self.history.limit).to(scores.device)
            visits = self.history.visits(index)
            self.history.add(index, scores, batch.losses, batch.labels, guesses)
        self.steps += 1
        ready = is_warm(visits, self.steps, self.warmup)
        own = ~ready | (guesses == batch.labels) | scores.isnan() | (not self.refine)
        seen = unit, scores, batch.labels, guesses, batch.counted * own
        sums = self.statistics.sums_of(*seen, part=left_out or 0)
        self._summing.start(sums, self.statistics)
        return torch.where(ready & self.weigh, weights, 1.0)

    def report(self, *, gather: bool = False) -> dict[str, list[Any]]:
        """What was seen of each sample, as equally long columns in the order of the index.

        `index`; `given_label`, the last one; `predicted_label`, the class that the sample was
        nearest to on a majority of the visits (for the score "prototype"; otherwise the network's
        answer); `label_quality` in [0, 1], low for a suspect label: (1 + the mean score) / 2, or
        exp(-mean loss); `is_label_issue`, whether predicted and given label differ; means over the
        visits of the score, under its name, of `loss`, and of whether the visit's answer was not
        the label (`disagreement`); `visits`, those that were judged; `doubt` in [0, 1], how far to
        believe an issue: by its depth in the predicted class, and that of the label's issues, and
        less if nearly all with the label are. Without classes there are no labels, disagreement or
        doubt; an issue is a mean loss that is far out by Tukey's rule, and the quality the share of
        samples whose mean loss is no smaller. Samples never judged are left out.

        Args:
            gather: add up what all ranks have seen: to be called on all of them.

        Raises:
            RuntimeError: where no sample was judged by a call with `index`.
        Warns:
            if most are issues; if it covers one of several ranks.
        """
        return make_report(*self._seen, gather)

    def count_issues(self, *, gather: bool = False) -> int:
        """How many labels look wrong: an estimate, the issues of `report`."""
        return sum(make_report(*self._seen, gather)["is_label_issue"])

    def separation(self, *, gather: bool = False) -> float:
        """The share of the mean scores' variance, within labels, between issues and others, [0, 1].

        Of prototypes, below 0.7 train on all labels: few are wrong, or features tell too little.
        """
        return separation_of(make_report(*self._seen, gather), self.score)
