"""The tower and the projector give the original's numbers, for any number of pictures."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from load_weights import load_model
from vision import CLIP_MEAN, CLIP_STD, VisionConfig, VisionTower

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "tiny-llava-phi").requires_grad_()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "forward.safetensors")


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """The raw pixels behind the golden's normalised ones."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return ((pixels * std + mean) * 255).round().to(torch.uint8)


@torch.no_grad()
def test_features_and_projector_equal_the_original(model, golden):
    features = model.vision(to_uint8(golden["vision.pixel_values"]))
    torch.testing.assert_close(features, golden["vision.features"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.projector(features), golden["projector.out"], atol=1e-5, rtol=1e-5)


def test_no_pictures_is_a_batch_like_any_other(model):
    """A text-only micro-batch still runs the tower, so every gradient exists; they are all zero."""
    model.zero_grad()
    features = model.vision(torch.zeros(0, 3, 28, 28, dtype=torch.uint8))
    assert features.shape == (0, 4, 32)
    model.projector(features).sum().backward()
    for name, p in [*model.vision.named_parameters(), *model.projector.named_parameters()]:
        assert p.grad is not None and not p.grad.any(), name
    model.zero_grad()


def test_pictures_do_not_see_each_other(model, golden):
    images = to_uint8(golden["vision.pixel_values"])
    with torch.no_grad():
        apart = torch.cat([model.vision(image[None]) for image in images])
        torch.testing.assert_close(model.vision(images), apart, atol=1e-6, rtol=1e-5)


def test_the_tower_normalises_itself_and_says_so(model, golden):
    with pytest.raises(AssertionError, match="uint8"):
        model.vision(golden["vision.pixel_values"])


@pytest.mark.parametrize("feature_layer, n_used", [(-2, 23), (-1, 24), (20, 20)])
def test_layers_behind_the_one_that_is_read_are_not_built(feature_layer, n_used):
    with torch.device("meta"):
        tower = VisionTower(VisionConfig(feature_layer=feature_layer))
    assert len(tower.h) == n_used


def test_recompute_changes_memory_not_gradients(model, golden):
    images, grads = to_uint8(golden["vision.pixel_values"]), []
    for recompute in (False, True):
        model.zero_grad()
        model.train()
        model.vision.recompute = recompute
        model.vision(images).square().sum().backward()
        grads.append(model.vision.cls.grad.clone())
    model.vision.recompute = False
    model.eval().zero_grad()
    torch.testing.assert_close(*grads)
