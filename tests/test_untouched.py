"""What gaf.probe puts back, however it ends: all that a forward pass, a loss or a loader changes.

Bit for bit, in its own memory.
"""

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

import gaf
from gaf.measure.untouched import keep_untouched
from gaf.rules.gram import gram_of

# the type checks draw from Python's generator themselves
pytestmark = pytest.mark.usefixtures("unchecked")


def content(t: Tensor) -> tuple[Any, ...]:
    """Identity, place, form and values, such that NaN equals itself and 0 differs from -0."""
    values = bytes(t.detach().contiguous().flatten().view(torch.uint8).tolist())
    return id(t), t.data_ptr(), t.shape, t.stride(), t.requires_grad, values


def seen(value: Any) -> Any:
    if isinstance(value, Tensor):
        grad = None if not value.is_leaf or value.grad is None else content(value.grad)
        return content(value), grad, len(value._backward_hooks or ())
    if isinstance(value, dict):
        return id(value), [(key, seen(one)) for key, one in value.items()]
    if isinstance(value, list | tuple | set):
        return id(value), [seen(one) for one in value]
    return id(value) if isinstance(value, nn.Module) else repr(value)


def everything(*modules: nn.Module) -> list[Any]:
    """All that the modules hold, and the random states."""
    parts = [seen(vars(module)) for whole in modules for module in whole.modules()]
    return [
        *parts,
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
    ]


class Body(nn.Module):
    """A linear layer of 4 features, and a forward pass that changes what `change` does."""

    def __init__(self, change: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.extra = nn.Parameter(torch.ones(2))
        self.change = change
        self.register_buffer("none", None)
        self.register_buffer("spread", torch.zeros(1).expand(4))
        self.register_buffer("ready", torch.tensor(False))
        self.plain = torch.zeros(4)
        self.count, self.cache, self.table = 0, [torch.zeros(2)], {"seen": [0]}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.change(self, x)
        return self.linear(x)


def first_batch(m: Any, x: Tensor) -> None:
    if not m.ready:
        m.linear.bias.data.copy_(x.new_ones(3))
        m.ready.fill_(True)


def flag(m: Any, x: Tensor) -> None:
    """The same with a flag of Python's, as libraries have it: weights and flag go back together."""
    if not m.count:
        m.linear.weight.copy_(x[:3])
    m.count += 1


def refine(m: Any, x: Tensor) -> None:
    m.spread = m.spread + x.mean(0)
    m.plain.add_(x.mean(0))
    m.cache.append(x.mean(0))
    m.cache[0].add_(1)
    m.table["seen"].append(len(x))
    m.table["new"] = x


def spread_in_place(m: Any, x: Tensor) -> None:
    m.spread[:1].add_(1)  # all four are one number


def tie(m: Any, x: Tensor) -> None:
    m.linear.weight.data = x[:3].clone()


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "first batch": first_batch,
    "Python's flag": flag,
    "None becomes a tensor": lambda m, x: setattr(m, "none", x.mean(0)),
    "an expanded buffer in place": spread_in_place,
    "buffers, attributes and containers": refine,
    "a buffer is deleted": lambda m, x: m._buffers.pop("spread", None),
    "a new buffer": lambda m, x: m.register_buffer("late", x, persistent=False),
    "a new module": lambda m, x: setattr(m, "later", nn.Linear(2, 2)),
    "the data of a parameter": tie,
    "the form of a parameter": lambda m, x: setattr(m.extra, "data", torch.zeros(5).double()),
    "requires_grad": lambda m, x: m.linear.bias.requires_grad_(False),
    "mode": lambda m, x: m.eval(),
    "hooks": lambda m, x: (m.register_forward_hook(print), m.linear.bias.register_hook(abs)),
    "a NaN buffer": lambda m, x: m.plain.fill_(float("nan")),
    "Python's random numbers": lambda m, x: random.random(),
    "numpy's random numbers": lambda m, x: numpy.random.rand(),
    "torch's random numbers": lambda m, x: torch.rand(2),
    "gradients": lambda m, x: setattr(m.linear.bias, "grad", torch.ones(3)),
}


def data(
    n: int = 10, classes: int = 3, make: Callable[..., Tensor] = lambda: torch.randn(5, 4)
) -> list[Any]:
    return [(make(), torch.randint(0, classes, (5,))) for _ in range(n)]


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_pass_changes_is_put_back(name: str, fails: bool) -> None:
    model, calls = Body(CHANGES[name]), []

    def loss_fn(scores: Tensor, y: Tensor) -> Tensor:
        calls.append(model.linear.weight.detach().clone())
        if fails and len(calls) == 4:
            raise KeyboardInterrupt
        return cross_entropy(scores, y)

    model.linear.bias.grad, model.extra.grad = torch.full((3,), 7.0), torch.full((2,), -0.0)
    batches = data()
    before = everything(model)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            gaf.probe(model, loss_fn, batches, k=4)
    else:
        gaf.probe(model, loss_fn, batches, k=4, slices=2)
    assert everything(model) == before
    assert len(calls) == (4 if fails else 20)


def test_memory_that_was_given_back_is_there_again_with_its_values() -> None:
    model = Body(lambda m, x: m.extra.data.untyped_storage().resize_(0))
    gaf.probe(model, cross_entropy, data(), k=4)
    assert model.extra.tolist() == [1, 1]


class Shifting(Body):
    """Its output depends on the number of calls, on all generators, and on moving statistics."""

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        factor = self.count + random.random() + numpy.random.rand() + torch.rand(())
        self.plain += x.detach().mean(0)
        return self.linear(x * factor + self.plain)


def test_every_slice_measures_the_model_as_it_was_found() -> None:
    """K adds up over coordinates only if each pass begins with the same state and generators."""
    model, batches = Shifting(flag), data()
    whole = gaf.probe(model, cross_entropy, batches, k=4, slices=1)
    parts = gaf.probe(model, cross_entropy, batches, k=4, slices=2)
    assert torch.equal(whole.gram, parts.gram)


def models() -> dict[str, tuple[nn.Module, list[Any]]]:
    torch.manual_seed(3)
    words = data(make=lambda: torch.randint(0, 20, (5, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older forms of both norms
        old = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 3))
        )
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    tied[1].weight = tied[0].weight
    return {
        "max_norm": (
            nn.Sequential(nn.Embedding(20, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)),
            words,
        ),
        "spectral norm": (parametrizations.spectral_norm(nn.Linear(4, 3)), data()),
        "weight norm": (parametrizations.weight_norm(nn.Linear(4, 3)), data()),
        "older norms": (old, data()),
        "batch norm": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)), data()),
        "tied": (tied, data()),
        "scripted": (
            torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())),
            data(),
        ),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    ["max_norm", "spectral norm", "weight norm", "older norms", "batch norm", "tied", "scripted"],
)
def test_layers_that_change_in_their_forward_pass_are_put_back(name: str) -> None:
    model, batches = models()[name]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = everything(model) if name != "scripted" else None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gaf.probe(model, cross_entropy, batches, k=4, slices=2)
    assert before is None or everything(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    for p, q in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True):
        assert p.data_ptr() == q.data_ptr()


def test_a_loss_module_is_put_back_and_a_backward_of_its_own_adds_to_no_gradient() -> None:
    class Centre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(3))

        def forward(self, scores: Tensor, y: Tensor) -> Tensor:
            self.centre.mul_(0.9).add_(scores.detach().mean(0), alpha=0.1)
            loss = (scores - self.centre).square().mean() + cross_entropy(scores, y)
            loss.backward(retain_graph=True)
            return loss

    model, loss = nn.Linear(4, 3), Centre()
    model.bias.grad = torch.full((3,), 7.0)
    for loss_fn in (loss, loss.forward):
        batches = data()
        before = everything(model, loss)
        gaf.probe(model, loss_fn, batches, k=4, slices=2)
        assert everything(model, loss) == before


def test_a_loader_that_draws_from_every_generator_leaves_them_where_they_were() -> None:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(10):
            shift = random.random() + numpy.random.rand()
            yield torch.randn(5, 4) + shift, torch.randint(0, 3, (5,))

    model = nn.Linear(4, 3)
    before = everything(model)
    one = gaf.probe(model, cross_entropy, loader(), k=4)
    assert everything(model) == before
    assert torch.equal(one.gram, gaf.probe(model, cross_entropy, loader(), k=4).gram)


def test_a_graph_that_waits_for_its_backward_pass_is_still_good() -> None:
    """Values are put back without a trace that autograd would take for a change."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = data(1)[0]
    loss = cross_entropy(model(x), y)
    gaf.probe(model, cross_entropy, data(), k=4)
    loss.backward()
    twin = cross_entropy(model(x), y)
    got = torch.autograd.grad(twin, list(model.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), got, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_values_and_random_state_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()).cuda()
    batches = [(x.cuda(), y.cuda()) for x, y in data()]
    states = torch.cuda.get_rng_state_all()
    before = [t.clone() for t in model.state_dict().values()]
    gaf.probe(model, cross_entropy, batches, k=4)
    assert all(map(torch.equal, states, torch.cuda.get_rng_state_all()))
    assert all(map(torch.equal, before, model.state_dict().values()))


# --- what is measured, and where


def exact(model: nn.Module, batches: list[Any]) -> Tensor:
    """K of the gradients that a training step has.

    Forward pass and loss are under autocast, the backward pass is outside of it.
    """
    rows = []
    for x, y in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x), y)
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    return gram_of([[g.double() for g in row] for row in rows])


class HeadInFloat32(nn.Module):
    """Its last layer leaves autocast: so must that layer's backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        with torch.autocast("cpu", enabled=False):
            return self.head(hidden.float())


@pytest.mark.parametrize(
    "make", [HeadInFloat32, lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))]
)
def test_under_autocast_k_is_that_of_the_gradients_that_training_has(make: Any) -> None:
    model, batches = make(), data(16)
    want = exact(model, batches)
    with torch.autocast("cpu", torch.bfloat16):
        found = gaf.probe(model, cross_entropy, batches, k=4)
    # float32 products against float64 ones; with K itself under autocast 3e-3
    scale = want.diagonal().sqrt()
    assert float(((found.gram - want).abs() / scale / scale[:, None]).max()) < 1e-6


def test_autocast_keeps_no_copy_of_weights_that_were_other_meanwhile() -> None:
    model = Body(CHANGES["Python's flag"])
    x, _ = data(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        gaf.probe(model, cross_entropy, data(), k=4)
        assert torch.is_autocast_cache_enabled()
        found = model.linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, model.linear(x))


def test_it_measures_under_no_grad_and_in_inference_mode() -> None:
    model, batches = nn.Linear(4, 3), data()
    want = gaf.probe(model, cross_entropy, batches, k=4).gram
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(gaf.probe(model, cross_entropy, batches, k=4).gram, want)


LAYOUTS: dict[str, Callable[[], nn.Parameter]] = {
    "contiguous": lambda: nn.Parameter(torch.randn(3, 2, 4, 5)),
    "channels_last": lambda: nn.Parameter(
        torch.randn(3, 2, 4, 5).to(memory_format=torch.channels_last)
    ),
    "channels_last_3d": lambda: nn.Parameter(
        torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d)
    ),
    "transposed": lambda: nn.Parameter(torch.randn(6, 5).t()),
    "expanded, then cloned": lambda: nn.Parameter(torch.randn(1, 5).expand(4, 5).clone()),
    "0-dim": lambda: nn.Parameter(torch.tensor(0.3)),
    "empty": lambda: nn.Parameter(torch.empty(0, 3)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_k_does_not_depend_on_how_parameters_lie_in_memory(name: str, dtype: torch.dtype) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(LAYOUTS[name]().to(dtype))
            self.line = nn.Parameter(torch.randn(5, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            return (
                (self.p * x).square().sum() + (self.p * x).sum() + (self.line * (1 + x.sum())).sum()
            )

    model = One()
    x = [
        torch.randn_like(model.p) if model.p.ndim else torch.randn(1, dtype=dtype) for _ in range(8)
    ]
    found = gaf.probe(model, lambda loss, _: loss, [(one, one) for one in x], k=4, b=1)
    rows = []
    for one in x:
        grads = torch.autograd.grad(model(one), [model.p, model.line])
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    want = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(found.gram, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_the_layers_of_a_compiled_model_have_the_names_of_the_bare_one() -> None:
    model, batches = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), data()
    whole = torch.compile(model, backend="eager")
    within = nn.Sequential(torch.compile(model[0], backend="eager"), model[1])
    want = gaf.probe(model, cross_entropy, batches, k=4)
    for one in (whole, within):
        found = gaf.probe(one, cross_entropy, batches, k=4)
        assert list(found.layers) == list(want.layers) == ["0", "1"]
        torch.testing.assert_close(found.gram, want.gram)


def test_other_objects_than_modules_need_nothing() -> None:
    with keep_untouched(print, None, [1]):
        assert torch.is_grad_enabled()
