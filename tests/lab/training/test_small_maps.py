"""A convolution of small maps is the same by one matrix product, outputs and gradients."""

import pytest
import torch
from torch import Tensor, nn

import gaf
from gaf_lab.training.models import make_model
from gaf_lab.training.small_maps import Conv3x3, kernel_places


def both(size: tuple[int, int], stride: int) -> list[list[Tensor]]:
    """(output, gradient of the weight, of the input) of torch's convolution and of Conv3x3."""
    torch.manual_seed(0)
    layer = Conv3x3(3, 4, stride).double()
    plain = nn.Conv2d(3, 4, 3, stride, padding=1, bias=False).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, *size, dtype=torch.float64)
    found = []
    for module in (plain, layer):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        assert leaf.grad is not None and module.weight.grad is not None
        found.append([y.detach(), module.weight.grad, leaf.grad])
    return found


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (2, 5)])
def test_equals_torchs_convolution(size: tuple[int, int], stride: int) -> None:
    plain, ours = both(size, stride)
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    assert ours[1].abs().sum() > 0


def test_a_first_pass_in_inference_mode_leaves_training_possible() -> None:
    kernel_places.cache_clear()
    layer, x = Conv3x3(3, 4, 1), torch.randn(5, 3, 2, 2)
    with torch.inference_mode(), torch.device("meta"):
        assert layer(x).device.type == "cpu"
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


def test_the_networks_use_it_and_ghost_gram_knows_it() -> None:
    torch.manual_seed(0)
    model = make_model("resnet18", (3, 32, 32), 10, "imagenet").double().eval()
    assert sum(isinstance(m, Conv3x3) for m in model.modules()) == 16
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with gaf.recording(model):
        losses = nn.functional.cross_entropy(model(x), torch.arange(3), reduction="none")
    gram = gaf.ghost_gram(model, losses)
    plain = nn.functional.cross_entropy(model(x), torch.arange(3), reduction="none")
    rows = [torch.autograd.grad(one, [*model.parameters()], retain_graph=True) for one in plain]
    stacked = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(gram, stacked @ stacked.T)
