"""`ghost_gram` against per-sample gradients that torch.func.vmap(grad) makes one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import gaf
from gaf.samples import pieces
from helpers.samples import per_sample_rows

N = 5


def ghost(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    with gaf.recording(model):
        losses = cross_entropy(model(x).flatten(1), y, reduction="none")
    return gaf.ghost_gram(model, losses, **options)


class Twice(nn.Module):
    """One layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class TwiceConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))).mean((2, 3))


class Tied(nn.Module):
    """The embedding's weight is the last layer's too, and a norm is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.tanh(self.norm(self.embed(x))))).mean(1)


class Block(nn.Module):
    """Self-attention of one head, with its parts as layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8, padding_idx=2), nn.Embedding(6, 8)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(x.shape[1]).expand(len(x), -1))
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out((q @ k.mT).softmax(-1) @ v)
        return self.head(h.relu()).mean(1)


def words(*shape: int) -> Tensor:
    return torch.randint(7, shape)


def conv(dims: int, *args: Any, **options: Any) -> nn.Module:
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **options)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(N, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.randn(N, 6)),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)),
        lambda: torch.randn(N, 6),
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)),
        lambda: torch.randn(N, 3, 6),
    ),
    "sequence of two dimensions": (lambda: nn.Linear(6, 2), lambda: torch.randn(N, 3, 2, 6)),
    "long sequence": (lambda: nn.Linear(2, 2), lambda: torch.randn(N, 40, 2)),
    "conv1d": (lambda: conv(1, 3, 4, 3, stride=2, padding=1), lambda: torch.randn(N, 3, 9)),
    "conv2d": (
        lambda: nn.Sequential(conv(2, 3, 6, 3, bias=False), nn.ReLU(), conv(2, 6, 2, (2, 3))),
        lambda: torch.randn(N, 3, 6, 7),
    ),
    "conv2d, few positions": (lambda: conv(2, 8, 9, 3), lambda: torch.randn(N, 8, 3, 4)),
    "conv2d, groups, stride, dilation": (
        lambda: conv(2, 4, 6, 3, groups=2, stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
        lambda: torch.randn(N, 4, 7, 6),
    ),
    "depthwise": (lambda: conv(2, 4, 8, 3, groups=4), lambda: torch.randn(N, 4, 5, 5)),
    "conv2d, groups of few positions": (
        lambda: conv(2, 12, 12, 3, groups=2),
        lambda: torch.randn(N, 12, 3, 3),
    ),
    "conv2d, same, circular": (
        lambda: conv(2, 3, 2, (2, 3), padding="same", padding_mode="circular"),
        lambda: torch.randn(N, 3, 5, 4),
    ),
    "conv1d, reflect": (
        lambda: conv(1, 3, 2, 3, padding=2, padding_mode="reflect"),
        lambda: torch.randn(N, 3, 5),
    ),
    "conv3d": (
        lambda: conv(3, 2, 3, (2, 1, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
        lambda: torch.randn(N, 2, 3, 4, 3),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 3, padding_idx=1), nn.Flatten(), nn.Linear(12, 4)),
        lambda: words(N, 4),
    ),
    "embedding of many words": (
        lambda: nn.Sequential(nn.Embedding(90, 3), nn.Flatten(), nn.Linear(12, 4)),
        lambda: words(N, 4),
    ),
    "embedding of one word": (lambda: nn.Embedding(7, 4), lambda: words(N)),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm((3, 6)), nn.Flatten(), nn.Linear(18, 4)),
        lambda: torch.randn(N, 2, 3, 6)[:, :1],
    ),
    "layer norm on a sequence": (lambda: nn.LayerNorm(4), lambda: torch.randn(N, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), lambda: torch.randn(N, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), lambda: torch.randn(N, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(N, 4, 3)),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True)).eval(),
        lambda: torch.randn(N, 2, 4, 4),
    ),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(4).eval(), lambda: torch.randn(N, 4)),
    "a layer called three times": (Twice, lambda: torch.randn(N, 6)),
    "a convolution called twice": (TwiceConv, lambda: torch.randn(N, 4, 3, 3)),
    "tied weights": (Tied, lambda: words(N, 3)),
    "attention": (Block, lambda: words(N, 6)),
}


def case(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    make_model, make_input = CASES[name]
    model, x = make_model().to(dtype), make_input()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    return model, x.to(dtype) if x.is_floating_point() else x, torch.randint(2, (N,))


@pytest.mark.parametrize("name", CASES)
def test_exact_in_float64(name: str) -> None:
    model, x, y = case(name)
    want = gaf.gram(per_sample_rows(model, x, y))
    torch.testing.assert_close(ghost(model, x, y), want, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_near_in_float32(name: str) -> None:
    model, x, y = case(name, torch.float32)
    want = gaf.gram(per_sample_rows(model.double(), x.double() if x.is_floating_point() else x, y))
    norms = want.diagonal().sqrt()
    error = (ghost(model.float(), x, y) - want) / norms / norms[:, None]
    assert error.abs().max() < 1e-5


@pytest.mark.parametrize("most", [20, 150, 2**22])
@pytest.mark.parametrize("way", ["ghost", "rows"])
@pytest.mark.parametrize("name", CASES)
def test_both_ways_and_blocks_of_any_size_give_the_same(
    name: str, way: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = property(lambda piece: (0.0, 1.0) if way == "ghost" else (1.0, 0.0))
    for kind in (pieces.Outer, pieces.Tokens):
        monkeypatch.setattr(kind, "costs", costs)
    monkeypatch.setattr(pieces, "MOST", most)
    model, x, y = case(name)
    want = gaf.gram(per_sample_rows(model, x, y))
    torch.testing.assert_close(ghost(model, x, y), want, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_are_left_out_and_layers_takes_some() -> None:
    model, x, y = case("attention")
    for name in ("head", "out"):
        want = gaf.gram(per_sample_rows(model, x, y, name))
        torch.testing.assert_close(ghost(model, x, y, layers=[name]), want, rtol=1e-10, atol=1e-12)
    both = ghost(model, x, y, layers=["head"]) + ghost(model, x, y, layers=["out"])
    torch.testing.assert_close(ghost(model, x, y, layers=["out", "head"]), both)
    model.embed.requires_grad_(False)
    model.qkv.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    want = gaf.gram(per_sample_rows(model, x, y))
    torch.testing.assert_close(ghost(model, x, y), want, rtol=1e-10, atol=1e-12)


def test_names_of_containers_take_all_that_is_in_them() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 3)
    )
    model, x, y = model.double(), torch.randn(N, 4).double(), torch.randint(3, (N,))
    want = gaf.gram(per_sample_rows(model, x, y, "0."))
    torch.testing.assert_close(ghost(model, x, y, layers=["0"]), want)
    whole = gaf.gram(per_sample_rows(model, x, y))
    torch.testing.assert_close(ghost(model, x, y, layers=[""]), whole)


def test_the_graph_is_kept_and_gradients_that_lie_there_stay() -> None:
    model, x, y = case("mlp")
    with gaf.recording(model):
        losses = cross_entropy(model(x), y, reduction="none")
    K = gaf.ghost_gram(model, losses)
    w = torch.rand(N).double()
    (w * losses).sum().backward(retain_graph=True)
    rows = per_sample_rows(model, x, y)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, w @ rows)
    torch.testing.assert_close(gaf.ghost_gram(model, losses), K)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), w @ rows)


def test_one_backward_pass() -> None:
    model, x, y = case("attention")
    passes: list[str] = []

    def watch(name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(lambda _: passes.append(name))

    for name, module in model.named_children():
        module.register_forward_hook(partial(watch, name))
    ghost(model, x, y)
    assert sorted(passes) == sorted(name for name, _ in model.named_children())


def test_batch_norm_in_training_mode_gives_the_rows_of_the_sum() -> None:
    """They add up to the gradient of the sum, although single ones are an approximation."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(N, 4).double(), torch.randint(3, (N,))
    total = torch.autograd.grad(cross_entropy(model(x), y, reduction="sum"), model.parameters())
    K = ghost(model, x, y)
    torch.testing.assert_close(K.sum(), sum(g.square().sum() for g in total))
    last = gaf.gram(per_sample_rows(model[3], model[:3](x).detach(), y))
    torch.testing.assert_close(ghost(model, x, y, layers=["3"]), last)


def test_a_sample_that_is_not_finite_is_absent_and_spoils_no_other() -> None:
    model, x, y = case("conv2d", torch.float32)
    clean = ghost(model, x, y)
    x[2, 0, 0, 0] = torch.nan
    K = ghost(model, x, y)
    others = torch.tensor([0, 1, 3, 4])
    assert not K[2].isfinite().any()
    torch.testing.assert_close(K[others][:, others], clean[others][:, others])


def test_a_sample_with_no_gradient_has_zeros() -> None:
    model, x, y = case("mlp", torch.float32)
    with gaf.recording(model):
        losses = cross_entropy(model(x), y, reduction="none") * torch.tensor([1, 0, 1, 1e-17, 1])
    K = gaf.ghost_gram(model, losses)
    assert (K[[1, 3]] == 0).all() and (K[:, [1, 3]] == 0).all() and K[0, 0] > 0


def test_autocast_and_lowered_precision_cost_digits_of_the_backward_pass_alone() -> None:
    model, x, y = case("mlp", torch.float32)
    want = ghost(model, x, y)
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(ghost(model, x, y), want, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        K = ghost(model, x, y)
    assert K.dtype == torch.float64
    torch.testing.assert_close(K, want, rtol=0.05, atol=0.05 * want.diagonal().max().item())


def test_checkpoints_that_are_not_reentrant_change_nothing() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=False)
            return self[2](h)

    model, x, y = case("mlp")
    want = ghost(model, x, y)
    torch.testing.assert_close(ghost(Checkpointed(*model), x.requires_grad_(), y), want)


class Own(nn.Module):
    """A parameter of its own; with `tied`, one that a layer has too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = self.layer.weight if tied else nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.scale


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place, self.layer = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.place(torch.arange(3))).mean(1)


@pytest.mark.parametrize("tied", [False, True])
def test_uses_that_are_not_recorded_are_refused(tied: bool) -> None:
    x, y = torch.randn(N, 4), torch.randint(4, (N,))
    used = "'scale' of a Own is used 2 times" if tied else "'scale' of a Own is used 1 times"
    with pytest.raises(RuntimeError, match=f"{used}.*of which .*leave it out .layers="):
        ghost(Own(tied), x, y)
    if not tied:
        model = Own(tied)
        want = gaf.gram(per_sample_rows(model, x, y, "layer"))
        torch.testing.assert_close(ghost(model, x, y, layers=["layer"]), want)


@pytest.mark.parametrize("kind", [lambda: nn.MultiheadAttention(4, 2), lambda: nn.LSTM(4, 4)])
def test_layers_of_other_kinds_are_refused(kind: Callable[[], nn.Module]) -> None:
    layer = kind()
    x = torch.randn(3, N, 4)
    with gaf.recording(layer):
        out = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)[0]
    with pytest.raises(RuntimeError, match=f"of a {type(layer).__name__} is used"):
        gaf.ghost_gram(layer, out.square().sum((0, 2)))


def test_what_is_not_recorded_is_refused() -> None:
    model, x, y = case("mlp")
    losses = cross_entropy(model(x), y, reduction="none")
    with pytest.raises(RuntimeError, match="'0.weight' of a Linear is used 1 times.*of which 0"):
        gaf.ghost_gram(model, losses)


def test_samples_that_share_an_entry_are_refused() -> None:
    with pytest.raises(ValueError, match="the 5 samples; that of 'place' is 3.*expand"):
        ghost(Places(), torch.randn(N, 3, 4), torch.randint(4, (N,)))


def test_an_input_that_was_written_over_is_refused() -> None:
    model, x, y = nn.Linear(4, 4), torch.randn(N, 4), torch.randint(4, (N,))
    with gaf.recording(model):
        losses = cross_entropy(model(x), y, reduction="none")
    x.zero_()
    with pytest.raises(RuntimeError, match="was written over"):
        gaf.ghost_gram(model, losses)


def test_gradients_scaled_by_frequency_are_refused() -> None:
    model = nn.Embedding(5, 4, scale_grad_by_freq=True)
    with pytest.raises(ValueError, match="scale_grad_by_freq=True"):
        ghost(model, words(N) % 5, torch.randint(4, (N,)))


@pytest.mark.usefixtures("unchecked")
def test_what_are_no_losses_of_samples_is_refused() -> None:
    model = nn.Linear(4, 4)
    out = model(torch.randn(N, 4))
    for losses, error, text in (
        (1.0, TypeError, "got float"),
        (out.sum(), ValueError, r"got shape \(\)"),
        (out, ValueError, r"got shape \(5, 4\)"),
        (out[:, 0].detach(), RuntimeError, "do not require grad"),
    ):
        with pytest.raises(error, match=f"losses must .*{text}"):
            gaf.ghost_gram(model, losses)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got str"):
        gaf.ghost_gram("model", out[:, 0])
    with pytest.raises(ValueError, match="'fc' is none. There are:"):
        gaf.ghost_gram(nn.Sequential(model), out[:, 0], layers=["fc"])
    with pytest.raises(ValueError, match="must be names of modules; got 'fc'"):
        gaf.ghost_gram(model, out[:, 0], layers="fc")


class Positions(nn.Module):
    """Tokens (n, T) and an embedding of positions that all samples share, or one for each."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.head, self.shared = nn.Linear(4, 3), shared

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        h = self.tokens(x) + self.positions(places if self.shared else places.expand(len(x), -1))
        out: Tensor = self.head(torch.tanh(h))
        return out.mean(1)


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    with gaf.recording(model):
        return cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none")


@pytest.mark.parametrize("n", [5, 6])
def test_positions_that_samples_share_are_refused_however_many_there_are(n: int) -> None:
    """Five samples of five tokens have inputs of the same shapes as if all were in order."""
    torch.manual_seed(0)
    x = torch.randint(9, (n, 5))
    model = Positions(shared=True)
    losses = losses_of(model, x)
    with pytest.raises(ValueError, match=r"'positions'.*positions.expand\(n, -1\)"):
        gaf.ghost_gram(model, losses)
    model = Positions(shared=False).double()
    K = gaf.ghost_gram(model, losses_of(model, x))
    rows = per_sample_rows(model, x, torch.arange(n) % 3)
    torch.testing.assert_close(K, rows @ rows.T)


class TimeFirst(nn.Module):
    """A Linear on (T, n, features) or on (n, T, features); its last step or first is the answer."""

    def __init__(self, place: int, swapped: bool) -> None:
        super().__init__()
        self.body, self.place, self.swapped = nn.Linear(4, 3), place, swapped

    def forward(self, x: Tensor) -> Tensor:
        if self.swapped:
            out: Tensor = self.body(x.transpose(0, 1))[self.place]
        else:
            out = self.body(x)[:, self.place]
        return out


@pytest.mark.parametrize("place", [0, -1])
def test_time_before_samples_is_refused_where_both_are_as_many(place: int) -> None:
    x = torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(0))
    swapped, right = (TimeFirst(place, swapped) for swapped in (True, False))
    with pytest.raises(ValueError, match=r"losses\[3\] depends on other entries of 'body'"):
        gaf.ghost_gram(swapped, losses_of(swapped, x))
    rows = per_sample_rows(right, x, torch.arange(6) % 3)
    for _ in range(2):  # the second call is not checked again
        torch.testing.assert_close(
            gaf.ghost_gram(right, losses_of(right, x)),
            (rows @ rows.T).double(),
            rtol=1e-4,
            atol=1e-6,
        )


def test_an_embedding_of_the_samples_themselves_is_no_table_of_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.tensor([3, 1, 3, 0, 6])
    K = gaf.ghost_gram(model, losses_of(model, x))
    rows = per_sample_rows(model, x, torch.arange(5) % 3)
    torch.testing.assert_close(K, rows @ rows.T)
