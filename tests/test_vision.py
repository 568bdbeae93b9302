"""The tower and the projector give the original's numbers, for any number of pictures."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from load_weights import load_model
from vision import CLIP_L_336, CLIP_MEAN, CLIP_STD, SIGLIP_SO400M_384, VisionConfig, VisionTower, normalize

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


class OpsOnHostTensors(TorchDispatchMode):
    """Notes every operation that is given a tensor in host memory, a copy to another device among them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves((args, kwargs))):
            self.found.append(str(op))
        return op(*args, **kwargs or {})


def test_normalizing_copies_nothing_from_the_host():
    """On a GPU, a copy from memory that is not pinned waits until all queued work is done, once per micro-batch."""
    images = torch.empty(2, 3, 28, 28, dtype=torch.uint8, device="meta")
    with OpsOnHostTensors() as ops:
        assert normalize(images).device.type == "meta"
    assert ops.found == []


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


# ---- SigLIP, the tower of Mipha: the same modules told apart by VisionConfig

MIPHA = Path(__file__).parent / "golden-mipha"
HALF = (0.5, 0.5, 0.5)


def siglip_state(tensors: dict[str, torch.Tensor], n_used: int) -> dict[str, torch.Tensor]:
    """The published names of a SigLIP tower -> ours, written out by hand: independent of load_weights.py."""
    stem = "model.vision_tower.vision_model."
    state = {
        "patch.weight": tensors[stem + "embeddings.patch_embedding.weight"],
        "patch.bias": tensors[stem + "embeddings.patch_embedding.bias"],
        "pos": tensors[stem + "embeddings.position_embedding.weight"],
    }
    renamed = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.proj": "self_attn.out_proj",
               "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}
    for layer in range(n_used):
        theirs = f"{stem}encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [tensors[f"{theirs}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            state[f"h.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
            for our_name, their_name in renamed.items():
                state[f"h.{layer}.{our_name}.{kind}"] = tensors[f"{theirs}{their_name}.{kind}"]
    return state


@torch.no_grad()
def test_siglip_features_equal_the_original():
    """33-pixel pictures and 14-pixel patches: the last 5 pixels fill no patch and must not be seen."""
    golden = load_file(MIPHA / "forward.safetensors")
    config = VisionConfig(image_size=33, n_layer=3, n_head=2, n_embd=36, n_inner=116, eps=1e-6, class_token=False,
                          pre_norm=False, patch_bias=True, gelu="tanh", mean=HALF, std=HALF)
    tower = VisionTower(config)
    tower.load_state_dict(siglip_state(load_file(MIPHA / "tiny-mipha/model.safetensors"), config.n_used))
    pixels = ((golden["vision.pixel_values"] * 0.5 + 0.5) * 255).round().to(torch.uint8)
    torch.testing.assert_close(tower(pixels), golden["vision.features"], atol=1e-5, rtol=1e-5)
    changed = pixels.clone()
    changed[:, :, 28:, :] = 0
    changed[:, :, :, 28:] = 0
    assert torch.equal(tower(changed), tower(pixels))


def test_siglip_normalisation_is_bit_equal_to_its_processor():
    for name, expected in load_file(MIPHA / "pixel_values.safetensors").items():
        pixels = ((expected * 0.5 + 0.5) * 255).round().to(torch.uint8)
        assert torch.equal(normalize(pixels[None], HALF, HALF)[0], expected), name


def test_published_sizes():
    """Parameters of the layers that are used, counted from the published shapes (spec of both towers)."""
    def count(config: VisionConfig) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in VisionTower(config).parameters())
    assert count(CLIP_L_336) == 290_909_184 and CLIP_L_336.n_patches == 576
    assert SIGLIP_SO400M_384.n_patches == 729 and SIGLIP_SO400M_384.n_used == 26
    block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert count(SIGLIP_SO400M_384) == 26 * block + 1152 * 3 * 14 * 14 + 1152 + 729 * 1152
