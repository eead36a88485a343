"""The convolutional stem: its grid of tokens, other image sizes, initialisation, saving, and refused fields."""

import pytest
import torch
from torch import nn

from modeling_fambav import FambaVConfig, FambaVForImageClassification
from support.helpers import random_tensor, tiny_config

STEM = {"stem_channels": [8, 12]}


def test_convolutions_make_the_grid_of_the_patches():
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(**STEM)).eval()
    stem = model.fambav.embeddings.patch_embeddings
    convolutions = [layer for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels, layer.stride[0]) for layer in convolutions] == [
        (3, 8, 1),
        (8, 12, 2),
        (12, 32, 2),
    ]
    images = random_tensor(2, 3, 16, 16, seed=0)
    assert stem(images).shape == (2, 16, 32)
    # A change within a patch reaches its own token and, at most, those of the patches around it.
    changed = images.clone()
    changed[:, :, 5, 5] += 1  # in row 1, column 1 of the grid
    is_changed = (stem(images) != stem(changed)).any(-1)[0].view(4, 4)
    assert is_changed[1, 1] and not is_changed[3].any() and not is_changed[:, 3].any()


def test_number_of_convolutions_that_halve_the_image_follows_the_patch_size():
    model = FambaVForImageClassification(tiny_config(patch_size=8, image_size=32, stem_channels=[8, 8]))
    layers = model.fambav.embeddings.patch_embeddings.layers
    assert [layer.stride[0] for layer in layers if isinstance(layer, nn.Conv2d)] == [2, 2, 2]


def test_other_image_sizes():
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(**STEM)).eval()
    logits = model(random_tensor(1, 3, 22, 27, seed=0), interpolate_pos_encoding=True).logits
    assert logits.isfinite().all()
    # What no whole patch covers counts as little as without the stem.
    images = random_tensor(1, 3, 22, 27, seed=0)
    images[..., 20:, :], images[..., 24:] = 9, 9
    torch.testing.assert_close(model(images, interpolate_pos_encoding=True).logits, logits)


def test_training_moves_every_parameter_and_the_statistics():
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(**STEM))
    model(random_tensor(4, 3, 16, 16, seed=0), labels=torch.arange(4) % 2).loss.backward()
    stem = model.fambav.embeddings.patch_embeddings
    for name, parameter in stem.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    norm = next(layer for layer in stem.layers if isinstance(layer, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 1 and norm.running_mean.abs().sum() > 0


def test_saved_stem_is_loaded_with_its_statistics(tmp_path):
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(**STEM))
    for _ in range(3):
        model(random_tensor(4, 3, 16, 16, seed=0))
    model.eval().save_pretrained(tmp_path)
    loaded = FambaVForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.stem_channels == [8, 12]
    images = random_tensor(2, 3, 16, 16, seed=1)
    torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=0, atol=0)


def test_half_precision():
    model = FambaVForImageClassification(tiny_config(**STEM)).eval()
    images = random_tensor(2, 3, 16, 16, seed=1)
    expected = model(images).logits
    logits = model.to(torch.bfloat16)(images).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stem_channels": [8, 0]}, r"stem_channels=\[8, 0\]: expected integers >= 1"),
        ({"stem_channels": [8], "patch_size": 3, "image_size": 15}, "patch_size=3 and patch_stride=3: expected"),
        ({"stem_channels": [8], "patch_stride": 2}, "patch_size=4 and patch_stride=2: expected"),
        ({"stem_channels": []}, "expected at least 1 integers, because 2 convolutions halve"),
        ({"stem_channels": [8, 16], "patch_size": 16}, "expected at least 3 integers, because 4 convolutions halve"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        FambaVConfig(**{"image_size": 16, "patch_size": 4, "fusion_strategy": "none", **fields})


def test_wrong_channels_are_named():
    model = FambaVForImageClassification(tiny_config(**STEM))
    with pytest.raises(ValueError, match=r"num_channels=3"):
        model(torch.zeros(1, 1, 16, 16))
