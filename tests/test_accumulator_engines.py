"""gaf.Accumulator under what shards, wraps, compiles or takes gradients: it works, or says at once what to do instead."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel

import gaf
from gaf.checks import check_optimizers
from gaf.device.parameters import bare_names
from gaf.device.sums import SumOnDevice

ROWS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0], [-3.0, 1.0, 0.5, -1.0]])


def stacked(policy: Callable) -> Callable:
    """The same policy, but a plain callable: the rows are kept, and it is given their Gram matrix."""
    return lambda gram: policy(gram)


ENGINES = pytest.mark.parametrize("wrap", [lambda p: p, stacked], ids=["streamed", "stacked"])
POLICIES = [gaf.GAF(1.5), gaf.GAF(1.5, average="halving"), gaf.GAF(1.5, start="best"), gaf.Mean(), gaf.RandomSkip(1.0)]  # fmt: skip


def vector(n: int = 4, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(n, dtype=dtype))


def feed(acc: gaf.Accumulator, p: nn.Parameter, rows: Tensor = ROWS) -> None:
    for row in rows:
        acc.backward((p * row).sum())


# --------------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


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


@ENGINES
@pytest.mark.parametrize("place", [0, 1])
def test_a_hook_that_takes_gradients_is_told_of_and_the_row_does_not_count(
    wrap: Callable, place: int
) -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), wrap(gaf.GAF(2.0)))
    for i in range(3):
        if i == place:
            hook = q.register_post_accumulate_grad_hook(lambda t: setattr(t, "grad", None))
            with pytest.raises(RuntimeError, match="that of '1 of group 0' was taken by a hook"):
                acc.backward(7 * (p * ROWS[0]).sum() + q.sum())
            hook.remove()
        acc.backward((p * ROWS[i]).sum() + q.sum())
    assert len(acc.decide().accepted) == 3
    assert p.grad is not None
    torch.testing.assert_close(p.grad, ROWS.mean(0))


@ENGINES
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_micro_batch_that_reaches_no_parameter_is_an_error_at_once_and_the_row_does_not_count(
    policy: Any, wrap: Callable, place: int
) -> None:
    p, other = vector(), vector()
    acc = gaf.Accumulator(SGD([p], 0.1), wrap(policy))
    for i in range(3):
        if i == place:
            with pytest.raises(
                RuntimeError,
                match=r"must depend on the optimizer's parameters; none of the 1, such as '0 of group 0', got a gradient. Make the",
            ):
                acc.backward((other * ROWS[0]).sum())
            assert acc.waiting == (place > 0)
        acc.backward((p * ROWS[i]).sum())
    update, decision = gaf.aggregate(ROWS, policy)
    assert acc.decide().weights.tolist() == decision.weights.tolist()
    assert p.grad is not None
    torch.testing.assert_close(p.grad, update)
    acc.step()
    assert acc.stats()["micro_gradients"] == 3


def test_an_optimizer_of_parameters_that_were_replaced_is_told_of_under_every_scope() -> None:
    """As by load_state_dict(assign=True), or a copy of the model."""
    for scope in ("all", "layer"):
        model = nn.Linear(4, 2)
        acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(scope=scope), model=model)
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
        with pytest.raises(RuntimeError, match="none of the 2, such as '0 of group 0', got a grad"):
            acc.backward(model(ROWS).sum())
        with pytest.raises(RuntimeError, match=r"needs at least one backward"):
            acc.step()


# ------------------------------------------------------------------------------------- optimizers that wrap another


class Wrapper(Optimizer):
    """As Accelerate's and Opacus's: an Optimizer that never calls Optimizer.__init__."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.original = optimizer

    param_groups = property(lambda self: self.original.param_groups)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.original.step(closure)


class Delegating(Wrapper):
    """Whatever it lacks, it has from the one inside: its hooks too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


@pytest.mark.parametrize("subject", ["Accumulator", "attach"])
def test_an_optimizer_without_hooks_of_its_own_is_refused_with_the_one_to_pass(
    subject: str,
) -> None:
    with pytest.raises(
        TypeError,
        match=rf"^{subject}: .* step hooks .*; Wrapper wraps another one and has none. Pass its .original \(SGD\)",
    ):
        check_optimizers(Wrapper(SGD([vector()], 0.1)), subject)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_post_local_sgd_is_refused_with_the_one_to_pass() -> None:
    from torch.distributed.algorithms.model_averaging.averagers import ModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    class Averager(ModelAverager):
        def __init__(self) -> None: ...

        def average_parameters(self, params: Any) -> None: ...

    optimizer = PostLocalSGDOptimizer(SGD([vector()], 0.1), Averager())
    with pytest.raises(TypeError, match=r"PostLocalSGDOptimizer wraps .* Pass its .optim \(SGD\)"):
        gaf.Accumulator(optimizer, gaf.GAF())


def test_accelerates_optimizer_is_refused_with_the_way_to_go() -> None:
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(SGD([vector()], 0.1))
    with pytest.raises(TypeError, match=r"gave to gaf\.integrations\.accelerate\.attach, or an"):
        gaf.Accumulator(prepared, gaf.GAF())


def test_an_optimizer_that_has_the_hooks_of_the_one_inside_works() -> None:
    p = vector()
    optimizer = Delegating(SGD([p], 1.0))
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    feed(acc, p)
    with pytest.raises(RuntimeError, match="must not be called while micro-gradients wait"):
        optimizer.step()
    acc.step()
    torch.testing.assert_close(p.detach(), 1 - ROWS.mean(0))


@pytest.mark.filterwarnings("ignore")
def test_what_fabric_sets_up_works_under_the_models_names() -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    plain = copy.deepcopy(model)
    setup, optimizer = fabric.setup(model, SGD(model.parameters(), 0.1))
    rows = torch.randn(3, 8, 4)
    for net, stepper in ((setup, optimizer), (plain, SGD(plain.parameters(), 0.1))):
        acc = gaf.Accumulator(
            stepper, gaf.GAF(2.0), model=net, bn="accepted", leave_out=lambda name, p: name.startswith("0.")
        )  # fmt: skip
        for x in rows:
            acc.backward(net(x).square().mean())
        with pytest.raises(RuntimeError, match="must not be called while micro-gradients wait"):
            stepper.step()
        assert acc.step().stepped
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------- names are the bare model's


class Net(nn.Module):
    """`module` is a name of its own here, and no wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.module, self.scale = (
            nn.Embedding(50, 8),
            nn.Linear(8, 4),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.module(self.embed(x).mean(1))


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def in_part(model: Net) -> nn.Module:
    model.embed = compiled(model.embed)
    model.module = nn.DataParallel(compiled(model.module))
    return model


WRAPS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel, compiled": lambda m: compiled(nn.DataParallel(m)),
    "compiled, DataParallel": lambda m: nn.DataParallel(compiled(m)),
    "in part": in_part,
    "in part and whole": lambda m: compiled(in_part(m)),
}


def run(form: Callable, policy: gaf.GAF, **options: Any) -> tuple[gaf.Accumulator, nn.Module]:
    torch.manual_seed(0)
    model = Net()
    wrapped = form(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), policy, model=wrapped, **options)
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        x, y = (
            torch.randint(0, 50, (6, 3), generator=generator),
            torch.randint(0, 4, (6,), generator=generator),
        )
        acc.backward(cross_entropy(wrapped(x), y))
    acc.step()
    return acc, wrapped


@pytest.mark.parametrize("form", WRAPS.values(), ids=WRAPS)
def test_names_are_those_of_the_bare_model(form: Callable) -> None:
    torch.compiler.reset()
    names = ["scale", "embed.weight", "module.weight", "module.bias"]
    assert [name for name, _ in bare_names(form(Net()))] == names
    leave_out = {"leave_out": lambda name, p: name.startswith("embed")}
    plain, _ = run(lambda m: m, gaf.GAF(2.0), **leave_out)
    acc, wrapped = run(form, gaf.GAF(2.0), **leave_out)
    assert plain.last is not None
    assert acc.last is not None
    assert torch.equal(plain.last.distances, acc.last.distances)
    layered, _ = run(form, gaf.GAF(0.9, scope="layer"))
    assert list(layered.layers) == ["scale", "embed", "module"]
    next(p for name, p in bare_names(wrapped) if name == "module.bias").grad = torch.zeros(4)
    with pytest.raises(RuntimeError, match="parameter 'module.bias' must have no gradient"):
        acc.backward(wrapped(torch.ones(2, 2, dtype=torch.int64)).sum())


def test_names_within_an_averaged_model_are_the_models() -> None:
    averaged = AveragedModel(Net())
    assert [name for name, _ in bare_names(averaged)] == [n for n, _ in Net().named_parameters()]


@pytest.mark.parametrize("form", [lambda m: m, compiled], ids=["plain", "compiled"])
def test_a_leave_out_that_matches_nothing_is_refused(form: Callable) -> None:
    with pytest.raises(
        ValueError,
        match=r"true for at least one parameter; it is for none, and is given names such as 'scale'. Leave it out, or match",
    ):
        run(form, gaf.GAF(2.0), leave_out=lambda name, p: name.startswith("embedding"))


def test_a_leave_out_that_has_matched_may_end_doing_so() -> None:
    """A warm-up: for some steps a part has no vote."""
    p, q = vector(), vector()
    warm = [True]
    acc = gaf.Accumulator(
        SGD([p, q], 0.1), gaf.GAF(2.0), leave_out=lambda name, t: t is q and warm[0]
    )
    for _ in range(2):
        feed(acc, p)
        acc.step()
        warm[0] = False


# ---------------------------------------------------------------------------------------------- dtypes and devices


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_gradients_of_a_dtype_of_their_own_keep_it(policy: Any, dtype: torch.dtype | None) -> None:
    p = vector(dtype=torch.bfloat16)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = dtype
    acc = gaf.Accumulator(SGD([p], 0.1, foreach=False), policy)
    for row in ROWS:
        acc.backward((p * row).sum())
    acc.decide()
    assert p.grad is not None
    assert p.grad.dtype == torch.float32
    torch.testing.assert_close(p.grad, gaf.aggregate(ROWS, policy)[0])
    acc.step()


@pytest.mark.parametrize("bad", [False, True])
def test_a_skip_under_a_scaler_gives_it_a_gradient_of_the_right_dtype(bad: bool) -> None:
    p = vector(dtype=torch.bfloat16)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = torch.float32
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    acc = gaf.Accumulator(SGD([p], 0.1, foreach=False), gaf.GAF(0.0), scaler=scaler)
    feed(acc, p, torch.cat([ROWS, ROWS[:1] * float("inf")]) if bad else ROWS)
    assert not acc.step().stepped
    assert scaler.get_scale() == (4.0 if bad else 8.0)


@pytest.mark.parametrize("engine", ["SumOnCpu", "SumOnDevice"])
@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_distances_of_many_rows_are_those_of_the_gram_matrix(
    dtype: torch.dtype,
    equal: bool,
    average: str,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    k, n = 512, 1024
    g = torch.randn(n)
    rows = torch.stack([(g if equal else g + torch.randn(n)).to(dtype) for _ in range(k)])
    if engine == "SumOnDevice":
        monkeypatch.setattr(
            "gaf.device.rows.SumOnCpu",
            lambda voters, spare: SumOnDevice(voters, average == "halving", torch.device("cpu")),
        )
    policy = gaf.GAF(2.0, average=average)
    p = vector(n, dtype)
    acc = gaf.Accumulator(SGD([p], 0.0), policy)
    feed(acc, p, rows)
    update, decision = gaf.aggregate(rows, policy)
    distances = acc.decide().distances
    # sums of 512 float32 terms: some 2^-24 sqrt(512), and equal rows at distance 0, where the cosine's own digits show
    torch.testing.assert_close(distances, decision.distances, rtol=0, atol=2e-5)
    assert p.grad is not None
    # one rounding to half precision
    torch.testing.assert_close(p.grad, update)


def trained(policy: Any, **options: Any) -> list[Any]:
    """Three macro-batches on the CPU: decisions, statistics, parameters. Tensors of its own are made on the CPU by name."""
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(0)
    x = torch.randn(12, 8, 5, generator=generator, device=cpu)
    y = torch.randint(3, (12, 8), generator=generator, device=cpu)
    with cpu:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    scaled = options.pop("scaled", False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    acc = gaf.Accumulator(
        SGD(model.parameters(), 0.1, momentum=0.9), policy, model=model, scaler=scaler, **options
    )
    for macro in range(3):
        for i in range(4):
            factor = float("nan") if scaled and macro == 1 and i == 2 else 1.0
            acc.backward(factor * cross_entropy(model(x[4 * macro + i]), y[4 * macro + i]))
        acc.decide()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        acc.step()
    assert acc.last is not None
    return [
        acc.last.distances.tolist(),
        acc.stats(),
        *(t.tolist() for t in model.state_dict().values()),
    ]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (gaf.GAF(0.9), {}),
        (gaf.GAF(0.9, average="halving"), {}),
        (gaf.Mean(), {}),
        (gaf.GAF(0.9, start="best"), {}),
        (gaf.GAF(0.9, scope="layer"), {}),
        (gaf.GAF(0.9), {"scaled": True}),
        (gaf.GAF(0.0), {"scaled": True}),
        (gaf.GAF(0.9), {"bn": "accepted"}),
        (gaf.GAF(0.9), {"leave_out": lambda name, p: name.endswith("bias")}),
    ],
    ids=["mean", "halving", "plain", "best", "layer", "scaler", "skip", "bn", "leave_out"],
)
def test_a_default_device_changes_nothing(policy: Any, options: dict[str, Any]) -> None:
    """Under "meta" whatever is made without a device has no value."""
    expected = trained(policy, **options)
    torch.set_default_device("meta")
    try:
        found = trained(policy, **options)
    finally:
        torch.set_default_device(None)
    assert str(found) == str(expected)  # NaN is NaN
