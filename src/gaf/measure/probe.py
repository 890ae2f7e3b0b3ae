"""Measures micro-gradients without training: how far they agree, and which tau to take.

model, micro-batches -> rows, some coordinates at a time -> K per layer -> K -> B, d_eff -> tau
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gaf.arguments import whole_number
from gaf.measure.micro_batches import iterator_of, loss_on, same_size
from gaf.measure.micro_gradients import Losses, layer_grams
from gaf.measure.model_checks import check_loss_fn, check_probed_model
from gaf.measure.result import MORE, Probe, check_enough
from gaf.measure.untouched import keep_untouched
from gaf.rules.gram import is_present

ROWS = 128
SAMPLES = "It counts the samples in a micro-batch; leave it out if their first tensor has as many."
USED_UP = "An iterator gives its micro-batches once: make a new one, or give a DataLoader."


def probe(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    micro_batches: Iterable[Any],
    *,
    k: int = 8,
    b: int | None = None,
    rows: int = ROWS,
    slices: int = 1,
) -> Probe:
    """Measures the micro-gradients of a model as it is, and changes nothing.

    Whatever forward passes and `loss_fn` change of the model is put back bit for bit, also after an
    exception: weights, gradients (p.grad), requires_grad, buffers, modes (train or eval), hooks,
    and all other attributes of its modules with what lists and dictionaries hold. The same goes for
    `loss_fn` if it is a module, and for random state: torch's on the CPU and on CUDA devices,
    Python's `random`, and numpy's global one. The model is measured in the mode that it is in: call
    model.train() first, as training does. The micro-batches are drawn from the iterable, which may
    move its own state on.

    The gradients are those that training has: if `probe` is called under autocast, forward passes
    and losses are under it, backward passes are not, and K is exact.

    Half of the rows give B and d_eff, and so the predictions; acceptance is measured on the other
    half.

    The rows are held in main memory, in the gradients' dtype: rows * n numbers, n / slices at a
    time; beside them a copy of the model on its device. Time: `slices` forward and backward passes
    for each row, and r^2 n operations for K.

    Args:
        model: on one device. Of a data-parallel model give the module inside, and micro-batches of
            one rank.
        loss_fn: gives the mean loss of a micro-batch, (). Called as loss_fn(model(x), y) on pairs
            (x, y), and as loss_fn(model(**micro_batch), micro_batch) on mappings.
        micro_batches: as training draws them, on the model's device; all of b samples. At least
            2 k are needed; 64 and more make the estimates good.
        k: micro-batches per step, at least 2, that acceptance is predicted and measured for.
        b: samples per micro-batch; None takes the length of its first tensor.
        rows: at most so many micro-batches are taken. Higher is more exact; time and memory grow
            with it.
        slices: parts that the coordinates are taken in, one after the other, since K adds up over
            them. Higher divides the memory and multiplies the time by it.

    Raises:
        TypeError: if the model is none, a data-parallel one or not yet initialised, micro_batches
            gives no pairs or mappings, or the loss is no scalar tensor that depends on the
            parameters.
        ValueError: if micro-batches are too few or differ in size, k, rows or slices is out of its
            range, or nothing can be learned.

    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(640, 20), torch.randint(0, 2, (640,))
    >>> micro_batches = zip(x.split(10), y.split(10))
    >>> found = probe(nn.Linear(20, 2), nn.functional.cross_entropy, micro_batches, k=4)
    >>> len(found), found.b, list(found.layers)
    (64, 10, ['weight', 'bias'])
    """
    check_probed_model(model)
    check_loss_fn(loss_fn)
    k = whole_number("probe: k", k, 2, "8 is usual.")
    rows = whole_number("probe: rows", rows, 2 * k, f"{ROWS} is the default.")
    slices = whole_number("probe: slices", slices, 1, "1 is fastest.")
    with keep_untouched(model, loss_fn):
        taken = list(islice(iterator_of(micro_batches), rows))
    size = same_size(taken) if b is None else whole_number("probe: b", b, 1, SAMPLES)
    losses = [partial(loss_on, model, loss_fn, one) for one in taken]
    return probe_losses(model, losses, size, k, slices, [loss_fn])


def probe_losses(
    model: nn.Module, losses: Losses, b: int, k: int, slices: int = 1, others: Sequence[Any] = ()
) -> Probe:
    """The same from functions that compute a micro-batch's loss, each called once per slice.

    others: what the losses change beside the model; modules among them are put back too.
    """
    check_enough(len(losses), k, "probe: micro_batches must give", MORE if losses else USED_UP)
    layers = layer_grams(model, losses, slices, others)
    gram = torch.stack(list(layers.values())).sum(0)
    sound = is_present(gram.diagonal())
    absent = int((~sound).sum())
    counted = f"probe: {absent} of {len(gram)} micro-gradients are absent (zero, NaN or infinite)"
    check_enough(len(gram) - absent, k, f"{counted}; there must be")
    of_present = {name: found[sound][:, sound] for name, found in layers.items()}
    return Probe(b, k, gram[sound][:, sound], of_present, absent)
