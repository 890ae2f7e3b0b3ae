"""The networks have the sizes that the literature gives them."""

import pytest
import torch

from gaf_lab.models import build


def parameters(name, shape=(3, 32, 32), classes=100, stem="imagenet"):
    return sum(p.numel() for p in build(name, shape, classes, stem).parameters())


def test_resnets_have_torchvisions_number_of_parameters():
    # torchvision's resnet18 and resnet34 with 1,000 classes have 11,689,512 and 21,797,672
    assert parameters("resnet18", classes=1000) == 11_689_512
    assert parameters("resnet34", classes=1000) == 21_797_672


def test_the_mlp_is_784_512_512_10():
    assert parameters("mlp", (1, 28, 28), 10) == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("name", ["resnet18", "preact-resnet34", "convnet", "mlp"])
def test_every_network_maps_pictures_to_scores(name, stem):
    model = build(name, (3, 32, 32), 7, stem).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_cifar_stem_keeps_the_picture_whole_and_the_imagenet_stem_leaves_a_sixteenth():
    x = torch.zeros(1, 3, 32, 32)
    for stem, side in (("cifar", 32), ("imagenet", 8)):
        model = build("resnet18", (3, 32, 32), 10, stem)
        first_block = next(i for i, m in enumerate(model) if type(m).__name__ == "BasicBlock")
        assert model[:first_block](x).shape == (1, 64, side, side)
