"""The networks have the sizes that the literature gives them."""

import sys

import pytest
import torch

from gaf_lab.settings.checks import ConfigError
from gaf_lab.training.models import make_model


def parameters(name, shape=(3, 32, 32), classes=100, stem="imagenet"):
    return sum(p.numel() for p in make_model(name, shape, classes, stem).parameters())


def test_resnets_have_torchvisions_number_of_parameters():
    # torchvision's resnet18 and resnet34 with 1,000 classes have 11,689,512 and 21,797,672
    assert parameters("resnet18", classes=1000) == 11_689_512
    assert parameters("resnet34", classes=1000) == 21_797_672


def test_the_mlp_is_784_512_512_10():
    assert parameters("mlp", (1, 28, 28), 10) == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10


def test_the_small_mlp_is_784_128_128_10():
    expected = 784 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert parameters("mlp-small", (1, 28, 28), 10) == expected


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("name", ["resnet18", "preact-resnet34", "convnet", "mlp"])
def test_every_network_maps_pictures_to_scores(name, stem):
    model = make_model(name, (3, 32, 32), 7, stem).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_cifar_stem_keeps_the_picture_whole_and_the_imagenet_stem_leaves_a_sixteenth():
    x = torch.zeros(1, 3, 32, 32)
    for stem, side in (("cifar", 32), ("imagenet", 8)):
        model = make_model("resnet18", (3, 32, 32), 10, stem)
        first_block = next(i for i, m in enumerate(model) if type(m).__name__ == "BasicBlock")
        assert model[:first_block](x).shape == (1, 64, side, side)


def test_vit_l16_has_304_million_parameters():
    pytest.importorskip("transformers")
    # arXiv 2010.11929, table 1
    d, mlp, layers, patches, classes = 1024, 4096, 24, (224 // 16) ** 2, 1000
    attention, two_layers, norm = 4 * (d * d + d), d * mlp + mlp + mlp * d + d, 2 * d
    embedding = 16 * 16 * 3 * d + d + d + (patches + 1) * d  # patches, class token, positions
    expected = (
        embedding + layers * (attention + two_layers + 2 * norm) + norm + d * classes + classes
    )
    with torch.device("meta"):
        assert parameters("vit-l16", (3, 224, 224), classes) == expected == 304_326_632


def test_the_tiny_vit_maps_pictures_to_scores_and_every_weight_gets_a_gradient():
    pytest.importorskip("transformers")
    model = make_model("vit-tiny", (3, 32, 32), 7, "cifar")
    scores = model(torch.randn(2, 3, 32, 32))
    assert scores.shape == (2, 7)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.numel() > 64)


def test_a_vit_knows_the_order_of_its_patches_by_their_positions_alone():
    pytest.importorskip("transformers")
    model = make_model("vit-tiny", (3, 32, 32), 7, "cifar").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    swapped = x.clone()
    swapped[:, :, :8, :8], swapped[:, :, 24:, 8:16] = x[:, :, 24:, 8:16], x[:, :, :8, :8]
    assert not torch.allclose(model(x), model(swapped))
    with torch.no_grad():
        model.net.vit.embeddings.position_embeddings.zero_()
    torch.testing.assert_close(model(x), model(swapped))


@pytest.mark.parametrize(
    ("name", "side", "patch", "fix"),
    [("vit-l16", 232, 16, 224), ("vit-tiny", 28, 8, 32), ("vit-l16", 17, 16, 16)],
)
def test_a_vit_refuses_pictures_that_do_not_divide_into_patches(name, side, patch, fix):
    message = (
        f"size must be a multiple of the patches' {patch} pixels for {name}.* "
        f"got pictures of {side} x {side}. .*--size {fix}.$"
    )
    with pytest.raises(ConfigError, match=message):
        make_model(name, (3, side, side), 10, "cifar")


def test_a_vit_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    with pytest.raises(
        ConfigError,
        match=r"model 'vit-tiny' needs transformers, which is not installed. Install gaf\[vit\].",
    ):
        make_model("vit-tiny", (3, 32, 32), 10, "cifar")
