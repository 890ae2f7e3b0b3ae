"""scope="layer": every layer is filtered as `gaf.aggregate` filters its coordinates alone."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gaf


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(self.norm(self.first(x)).tanh())


LAYERS = ("first", "norm", "last", "unused", "scale")


def layers(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    return {
        layer: [p for name, p in model.named_parameters() if name.split(".")[0] == layer]
        for layer in LAYERS
    }


def loss(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(4, 6, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (4,), generator=generator),
    )
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize(
    "rule",
    [{}, {"start": "best"}, {"average": "halving"}, {"min_accepted": 3}, {"max_norm_ratio": 1.5}],
)
def test_each_layer_is_filtered_as_if_it_were_alone(rule: dict[str, Any]):
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    policy = gaf.GAF(0.7, scope="layer", **rule)
    acc = gaf.Accumulator(optimizer, policy, model=model)
    outcomes = set()
    for step in range(8):
        before = [p.detach().clone() for p in model.parameters()]
        rows = [
            torch.autograd.grad(
                loss(model, 5 * step + i), list(model.parameters()), allow_unused=True
            )
            for i in range(5)
        ]
        for i in range(5):
            acc.backward(loss(model, 5 * step + i))
        decision = acc.decide()
        grads = dict(zip(model.parameters(), zip(*rows, strict=True), strict=True))
        for layer, params in layers(model).items():
            if layer == "unused":
                assert all(p.grad is None for p in params)
                continue
            flat = torch.stack(
                [torch.cat([grads[p][i].flatten() for p in params]) for i in range(5)]
            )
            update, own = gaf.aggregate(flat, dataclasses.replace(policy, scope="all"))
            assert torch.equal(own.accepted, acc.layers[layer].accepted)
            torch.testing.assert_close(
                own.distances, acc.layers[layer].distances, rtol=0, atol=1e-9, equal_nan=True
            )
            outcomes.add((bool(own.stepped), int(own.accepted.sum())))
            if own.stepped:
                parts = [p.grad.flatten() for p in params if p.grad is not None]
                torch.testing.assert_close(torch.cat(parts), update)
            else:
                assert all(p.grad is None for p in params)
        found = [acc.layers[layer] for layer in LAYERS]
        assert torch.equal(decision.accepted, torch.stack([d.accepted for d in found]).any(0))
        assert bool(decision.stepped) == any(bool(d.stepped) for d in found)
        still = [p.grad is None for p in model.parameters()]
        acc.step()
        assert all(
            torch.equal(p, b)
            for p, b, stays in zip(model.parameters(), before, still, strict=True)
            if stays
        )
    assert {stepped for stepped, _ in outcomes} == {True, False}
    assert list(acc.layers) == ["scale", *LAYERS[:-1]]  # as the model has its parameters


def test_at_tau_2_layers_average_as_the_whole_does():
    ends = []
    for scope in ("all", "layer"):
        torch.manual_seed(0)
        model = Net().double()
        acc = gaf.Accumulator(
            torch.optim.Adam(model.parameters()), gaf.GAF(2.0, scope=scope), model=model
        )
        for step in range(3):
            for i in range(4):
                acc.backward(loss(model, 4 * step + i))
            acc.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


def test_an_overflow_in_one_layer_stops_all_of_them():
    model = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    acc = gaf.Accumulator(
        torch.optim.SGD(model.parameters(), lr=0.1),
        gaf.GAF(2.0, scope="layer"),
        model=model,
        scaler=scaler,
    )
    before = [p.detach().clone() for p in model.parameters()]
    for bad in (False, True):
        out = model(torch.randn(4, 6)).square().mean()
        acc.backward(out + model.scale * float("inf") if bad else out)
    assert not acc.step().stepped
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 512


@pytest.mark.parametrize(
    "options",
    [{}, {"model": True, "bn": "accepted"}, {"model": True, "leave_out": lambda name, p: False}],
)
def test_what_does_not_go_with_layers_is_refused(options: dict[str, Any]):
    model = Net()
    options = options | ({"model": model} if "model" in options else {})
    with pytest.raises(
        ValueError, match=r"Accumulator: scope 'layer' needs the model, .*; got model="
    ):
        gaf.Accumulator(
            torch.optim.SGD(model.parameters(), lr=0.1), gaf.GAF(scope="layer"), **options
        )
