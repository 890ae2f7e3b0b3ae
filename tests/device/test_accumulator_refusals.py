"""Arguments, models and calls that gaf.Accumulator refuses, with what to do instead."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.accumulating import AGREE, feed, line, vector


def test_backward_after_decide_is_refused() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, AGREE)
    acc.decide()
    with pytest.raises(
        RuntimeError, match=r"backward\(\) came after decide\(\); call step\(\) first"
    ):
        acc.backward(p.sum())
    assert acc.step().stepped
    feed(acc, p, AGREE)
    assert acc.step().stepped


def test_a_step_without_a_micro_gradient_is_refused() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    for call in (acc.step, acc.decide):
        with pytest.raises(RuntimeError, match=r"needs at least one backward\(\) before it"):
            call()
    feed(acc, p, AGREE)
    acc.step()
    with pytest.raises(RuntimeError, match="none since the last step"):
        acc.step()


def test_optimizers_that_cannot_be_filtered_are_refused() -> None:
    with pytest.raises(TypeError, match="must not need a closure; LBFGS"):
        gaf.Accumulator(torch.optim.LBFGS([vector()]), gaf.GAF(0.5))
    with pytest.raises(TypeError, match="must take dense gradients; got SparseAdam"):
        gaf.Accumulator([SGD([vector()], 0.1), torch.optim.SparseAdam([vector()])], gaf.GAF(0.5))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_optimizer_is_refused() -> None:
    for thing in ([vector()], ["SGD"], [SGD([vector()], 0.1), None]):
        with pytest.raises(
            TypeError, match=r"optimizer must be a torch.optim.Optimizer or a list of them; got"
        ):
            gaf.Accumulator(thing, gaf.GAF(0.5))


def test_a_parameter_may_not_be_in_two_optimizers_and_one_must_be_in_some() -> None:
    p = vector()
    with pytest.raises(
        ValueError, match=r"hold parameters, each of them once; got 2 entries with 1 parameters"
    ):
        gaf.Accumulator([SGD([p], 0.1), SGD([p], 0.1)], gaf.GAF(0.5))
    with pytest.raises(ValueError, match="got 0 entries"):
        gaf.Accumulator([], gaf.GAF(0.5))


def test_complex_parameters_are_refused_at_once_and_when_added_later() -> None:
    with pytest.raises(
        TypeError, match=r"parameters must be real; '0 of group 0' is torch.complex64"
    ):
        gaf.Accumulator(SGD([vector(2, torch.complex64)], 0.1), gaf.GAF(0.5))
    p = vector()
    optimizer = SGD([p], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    optimizer.add_param_group({"params": [vector(2, torch.complex64)]})
    with pytest.raises(TypeError, match=r"'0 of group 1' is torch.complex64"):
        acc.backward(p.sum())


def test_bn_must_be_a_known_word_and_accepted_needs_the_model() -> None:
    with pytest.raises(ValueError, match=r"bn='accepted' needs the model.*Pass model="):
        gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5), bn="accepted")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_bn_is_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match="bn must be 'all' or 'accepted'; got 'none'"):
        gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5), bn="none")  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_process_group")
def test_a_distributed_model_is_refused_and_pointed_to_attach() -> None:
    model = DistributedDataParallel(nn.Linear(2, 1))
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match=r"model is a DistributedDataParallel.*gaf\.attach"):
        gaf.Accumulator(optimizer, gaf.GAF(0.5), model=model)
    for inner in (None, model.module):
        with pytest.raises(
            TypeError, match=r"parameters belong to a DistributedDataParallel model.*gaf\.attach"
        ):
            gaf.Accumulator(optimizer, gaf.GAF(0.5), model=inner)
    other = nn.Linear(2, 1)  # beside one that is distributed, another model is none of its business
    acc = gaf.Accumulator(SGD(other.parameters(), 0.1), gaf.GAF(2.0))
    for _ in range(2):
        acc.backward(other(torch.ones(1, 2)).sum())
    assert acc.step().stepped


@pytest.mark.usefixtures("one_process_group")
def test_a_model_distributed_after_the_accumulator_was_made_is_noticed_at_the_first_backward() -> (
    None
):
    model = nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(0.5))
    ddp = DistributedDataParallel(model)
    with pytest.raises(TypeError, match="belong to a DistributedDataParallel model"):
        acc.backward(ddp(torch.ones(1, 2)).sum())


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_parameter_is_refused_and_pointed_to_attach() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    p = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    with pytest.raises(TypeError, match=r"'0 of group 0' is a DTensor.*gaf\.attach"):
        gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("given", ["whole", "part", "none"])
def test_fsdp1_is_refused(original: bool, given: str) -> None:
    """The whole model or a part of it, with model= and without."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = FullyShardedDataParallel(
        nn.Linear(4, 4), use_orig_params=original, device_id=torch.device("cpu")
    )
    model = nn.Sequential(inner, nn.Linear(4, 1)) if given == "part" else inner
    with pytest.raises(TypeError, match=r"FullyShardedDataParallel.*gaf\.attach\(model,.*FSDP2"):
        gaf.Accumulator(
            SGD(model.parameters(), 0.1), gaf.GAF(), model=None if given == "none" else model
        )


@pytest.mark.usefixtures("one_process_group")
def test_a_distributed_model_is_refused_through_what_wraps_it() -> None:
    ddp = DistributedDataParallel(nn.Linear(2, 1))
    optimizer = SGD(ddp.parameters(), 0.1)
    for model in (torch.compile(ddp, backend="eager"), nn.Sequential(ddp)):
        with pytest.raises(TypeError, match=r"model is a DistributedDataParallel, or holds one"):
            gaf.Accumulator(optimizer, gaf.GAF(), model=model)


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_applied_in_the_backward_pass_is_refused() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = nn.Linear(2, 1)
    _apply_optimizer_in_backward(SGD, [model.bias], {"lr": 0.1})
    with pytest.raises(TypeError, match="'bias' was applied in it .apply_optimizer_in_backward"):
        gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(), model=model)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (
            {"model": [1]},
            TypeError,
            r"model must be a torch.nn.Module or None; got list \[1\]. Pass the model",
        ),
        ({"model": nn.Linear}, TypeError, r"model must be a torch.nn.Module or None; got type"),
        (
            {"scaler": True},
            TypeError,
            r"scaler must be a torch.amp.GradScaler or None; got bool True. Use torch",
        ),
        ({"scaler": 65536.0}, TypeError, r"got float 65536.0"),
        (
            {"leave_out": ["embed"]},
            TypeError,
            r"leave_out must be a function of .*; got list \['embed'\]. Use such",
        ),
        ({"leave_out": "embed"}, TypeError, r"got str 'embed'"),
        ({"leave_out": nn.Linear}, TypeError, r"got type"),
        ({"bn": True}, ValueError, r"bn must be 'all' or 'accepted'; got True"),
        ({"bn": "none"}, ValueError, r"got 'none'"),
        (
            {"policy": 0.9},
            TypeError,
            r"policy must be a callable from a Gram matrix to a Decision; got 0.9. Use",
        ),
        (
            {"optimizer": "SGD"},
            TypeError,
            r"must be a torch.optim.Optimizer or a list of them; got str",
        ),
        ({"policy": gaf.GAF}, TypeError, r"to a Decision; got <class"),
        ({"policy": None}, TypeError, r"to a Decision; got None. Use"),
        ({"optimizer": None}, TypeError, r"got NoneType"),
        ({"optimizer": nn.Linear(2, 1)}, TypeError, r"got Linear"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value_and_the_fix(
    argument: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"optimizer": SGD([vector(3)], 0.1), "policy": gaf.GAF()} | argument
    with pytest.raises(error, match=f"^Accumulator: .*{message}"):
        gaf.Accumulator(**given)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("tau", ["0.97", None, [0.5], 1j])
def test_tau_must_be_a_number(tau: object) -> None:
    with pytest.raises(ValueError, match=r"tau is a cosine distance and must lie in \[0, 2\]"):
        gaf.GAF(tau)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"bn": "accepted"}])
def test_a_model_that_is_not_the_optimizers_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match="model must hold the optimizer's parameters; this Linear holds none of them",
    ):
        gaf.Accumulator(line()[1], gaf.GAF(), model=nn.Linear(3, 1), **options)
