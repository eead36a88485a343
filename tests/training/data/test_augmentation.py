"""Augmentation: random for every image, off at zero, with the shares and the distributions that it promises."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fambav_training.data.augmentation import Augmentation, Targets, mixed_cross_entropy
from support.helpers import random_tensor

OFF = {
    "random_crop_padding": 0,
    "horizontal_flip_prob": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "random_erasing_prob": 0.0,
}
ONE_OF_THEM = {
    "crop": {"random_crop_padding": 3},
    "flip": {"horizontal_flip_prob": 0.5},
    "erasing": {"random_erasing_prob": 0.5},
    "mixup": {"mixup_alpha": 0.8},
    "cutmix": {"cutmix_alpha": 1.0},
    "mixup or cutmix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}
ALL = {name: value for flags in ONE_OF_THEM.values() for name, value in flags.items()}
each = pytest.mark.parametrize("flags", [*ONE_OF_THEM.values(), ALL], ids=[*ONE_OF_THEM, "all"])


def augment(images: Tensor, labels: Tensor | None = None, seed: int = 0, **flags) -> tuple[Tensor, Targets]:
    torch.manual_seed(seed)
    labels = torch.arange(len(images)) if labels is None else labels
    return Augmentation(tuple(images.shape[-2:]), **{**OFF, **flags})(images, labels)


def same_images(batch_size: int, height: int = 16, width: int = 16) -> Tensor:
    """A batch of one image, no two pixels of which are alike, and none is zero."""
    return (1 + torch.arange(3 * height * width)).view(3, height, width).float().expand(batch_size, -1, -1, -1)


# ---- whatever is on ----


@each
@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (6, 3, 12, 20), (1, 3, 16, 16), (6, 1, 16, 16)], ids=str)
def test_shapes_and_dtypes_stay(flags, shape):
    given = random_tensor(*shape, seed=0).float()
    images, targets = augment(given.clone(), **flags)
    assert (images.shape, images.dtype) == (given.shape, torch.float32)
    assert images.isfinite().all()
    for indices in (targets.labels, targets.partners):
        assert (indices.shape, indices.dtype) == ((shape[0],), torch.int64)
        assert set(indices.tolist()) <= set(range(shape[0]))
    assert targets.labels.tolist() == list(range(shape[0]))
    assert (targets.weights.shape, targets.weights.dtype) == ((shape[0],), torch.float32)
    assert ((0 <= targets.weights) & (targets.weights <= 1)).all()


@each
def test_given_images_are_not_changed(flags):
    given = random_tensor(6, 3, 16, 16, seed=0).float()
    before = given.clone()
    augment(given, **flags)
    assert torch.equal(given, before)


@each
def test_same_seed_gives_the_same_batch_and_another_seed_another(flags):
    given = random_tensor(16, 3, 16, 16, seed=0).float()
    torch.rand(7)  # whatever was drawn before
    np.random.seed(0)
    images, targets = augment(given, seed=5, **flags)
    np.random.seed(1)
    again, targets_again = augment(given, seed=5, **flags)
    assert torch.equal(images, again)
    assert all(torch.equal(one, other) for one, other in zip(targets, targets_again))
    assert not torch.equal(images, augment(given, seed=6, **flags)[0])


@pytest.mark.parametrize("name", ["crop", "flip", "erasing"])
def test_every_image_is_drawn_for(name):
    images, _ = augment(same_images(32), **ONE_OF_THEM[name])
    kinds = torch.unique(images.flatten(1), dim=0)
    assert len(kinds) == 2 if name == "flip" else len(kinds) > 8


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_every_image_is_mixed_by_a_share_of_its_own(name):
    _, targets = augment(random_tensor(32, 3, 16, 16, seed=0).float(), **ONE_OF_THEM[name])
    assert len(targets.weights.unique()) > 8  # there are 16 sizes of a cut


def test_all_off_is_the_identity():
    given, labels = random_tensor(6, 3, 16, 16, seed=0).float(), torch.tensor([3, 1, 4, 1, 5, 9])
    images, targets = augment(given, labels)
    assert torch.equal(images, given)
    assert torch.equal(targets.labels, labels) and targets.partners.tolist() == list(range(6))
    assert (targets.weights == 1).all()


@each
def test_what_is_off_does_nothing(flags):
    """Every pixel, unmixed by its weight, is one of the image or the zero that was erased or padded."""
    images, targets = augment(same_images(16), **flags)
    if "mixup_alpha" not in flags:  # of equal images, a mix without geometry is the image
        found = set(images.unique().tolist())
        zeros = {0.0} if {"random_crop_padding", "random_erasing_prob"} & flags.keys() else set()
        assert found == set(same_images(1).unique().tolist()) | zeros
    if not {"mixup_alpha", "cutmix_alpha"} & flags.keys():
        assert (targets.weights == 1).all()
    if not {"random_crop_padding", "horizontal_flip_prob", "random_erasing_prob"} & flags.keys():
        torch.testing.assert_close(images, same_images(16), rtol=1e-6, atol=0)


# ---- geometry ----


def test_flip_is_a_mirror_image_of_about_its_share():
    given = same_images(400)
    images, _ = augment(given, horizontal_flip_prob=0.3)
    kept = (images == given).flatten(1).all(dim=1)
    flipped = (images == given.flip(-1)).flatten(1).all(dim=1)
    assert (kept ^ flipped).all()
    assert 0.2 < flipped.double().mean() < 0.4
    assert torch.equal(augment(given, horizontal_flip_prob=1.0)[0], given.flip(-1))


@pytest.mark.parametrize("height, width", [(16, 16), (12, 20)])
def test_crop_is_a_shift_by_at_most_the_padding(height, width):
    padding, given = 2, same_images(200, height, width)
    images, _ = augment(given, random_crop_padding=padding)
    padded = torch.nn.functional.pad(given[0], [padding] * 4)
    shifts = {
        (down, right): padded[:, down : down + height, right : right + width]
        for down in range(2 * padding + 1)
        for right in range(2 * padding + 1)
    }
    found = set()
    for image in images:
        [shift] = [shift for shift, expected in shifts.items() if torch.equal(image, expected)]
        found.add(shift)
    assert found == shifts.keys()  # 200 draws of 25 leave one out once in 150; the seed is fixed


def test_crop_without_a_padding_takes_an_eighth_of_the_shorter_side():
    given = same_images(1, 16, 40)
    same = [torch.equal(*(augment(given, random_crop_padding=p, seed=i)[0] for p in (None, 2))) for i in range(8)]
    assert all(same)
    small = same_images(4, 7, 7)  # an eighth is less than a pixel
    assert torch.equal(augment(small, random_crop_padding=None)[0], small)


def test_erasing_blanks_a_rectangle_of_the_right_share():
    given = same_images(600, 32, 32)
    images, _ = augment(given, random_erasing_prob=0.4)
    erased = (images == 0).all(dim=1)
    assert torch.equal(images, torch.where(erased.unsqueeze(1), 0.0, given))
    areas = erased.flatten(1).double().mean(dim=1)
    touched = areas > 0
    assert 0.32 < touched.double().mean() < 0.48
    assert 0.01 < areas[touched].min() and areas[touched].max() < 0.35
    assert areas[touched].mean() == pytest.approx(0.175, abs=0.025)  # the middle of 0.02 to 0.33
    for mask in erased[touched][:50]:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert rows * columns == mask.sum()
        # 0.3 to 3.3, and a pixel of rounding on either side
        assert 0.3 * (columns - 1) <= rows + 1 and rows - 1 <= 3.4 * (columns + 1)


# ---- mixing ----


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_mixup_shares_are_of_the_beta_distribution(alpha):
    _, targets = augment(torch.zeros(20_000, 1, 2, 2), mixup_alpha=alpha)
    weights = targets.weights.double()
    expected = torch.distributions.Beta(torch.tensor(alpha).double(), torch.tensor(alpha).double())
    assert weights.mean() == pytest.approx(0.5, abs=0.01)
    assert weights.var() == pytest.approx(expected.variance.item(), rel=0.03)
    fourth = ((weights - 0.5) ** 4).mean().item()
    samples = torch.from_numpy(np.random.default_rng(0).beta(alpha, alpha, 10**6))
    assert fourth == pytest.approx(((samples - 0.5) ** 4).mean().item(), rel=0.04)


def test_mixup_is_the_weighted_sum_of_two_images_and_names_the_other():
    given = random_tensor(32, 3, 12, 20, seed=0).float()
    images, targets = augment(given, mixup_alpha=0.8)
    assert targets.labels.tolist() == list(range(32)) and sorted(targets.partners.tolist()) == list(range(32))
    weights = targets.weights.view(-1, 1, 1, 1)
    expected = weights * given + (1 - weights) * given[targets.partners]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert (targets.partners != torch.arange(32)).any()


@pytest.mark.parametrize("flags", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}], ids=str)
def test_images_of_one_class_are_told_apart(flags):
    """Where labels do not say which image was mixed in."""
    given, labels = random_tensor(32, 3, 16, 16, seed=0).float(), torch.tensor([2, 5] * 16)
    images, targets = augment(given, labels, **flags)
    assert torch.equal(targets.labels, labels)
    expected, alone = augment(given, torch.arange(32), **flags)
    assert torch.equal(images, expected) and torch.equal(targets.partners, alone.partners)


@pytest.mark.parametrize("height, width", [(16, 16), (12, 20)])
def test_cutmix_pastes_a_rectangle_and_weighs_by_the_pixels_kept(height, width):
    given = random_tensor(64, 3, height, width, seed=0).float()
    images, targets = augment(given, cutmix_alpha=1.0)
    assert targets.labels.tolist() == list(range(64))
    pasted = (images != given).any(dim=1)
    expected = torch.where(pasted.unsqueeze(1), given[targets.partners], given)
    assert torch.equal(images, expected)
    mixed = targets.partners != torch.arange(64)
    assert mixed.sum() > 50
    for mask, weight in zip(pasted[mixed], targets.weights[mixed]):
        assert mask.any(dim=1).sum() * mask.any(dim=0).sum() == mask.sum()  # a rectangle
        assert weight.item() == pytest.approx(1 - mask.double().mean().item(), abs=1e-6)


def test_cutmix_shares_spread_as_their_beta_distribution():
    _, targets = augment(torch.rand(4000, 1, 16, 16), cutmix_alpha=1.0)
    weights = targets.weights.double()
    assert weights.min() < 0.15 and weights.max() > 0.95
    assert 0.5 < weights.mean() < 0.62  # of uniform shares, with sides rounded down to pixels


def test_mixup_and_cutmix_take_turns_by_batch():
    given, mixed, pasted = random_tensor(16, 3, 8, 8, seed=0).float(), 0, 0
    for seed in range(60):
        images, targets = augment(given, seed=seed, mixup_alpha=1.0, cutmix_alpha=1.0)
        is_pasted = ((images == given) | (images == given[targets.partners])).all()
        pasted, mixed = pasted + is_pasted.item(), mixed + (not is_pasted)
    assert 18 < pasted < 42 and mixed == 60 - pasted


# ---- the loss ----


def soft_targets(targets: Targets, num_classes: int) -> Tensor:
    one_hot = torch.nn.functional.one_hot
    weights = targets.weights.unsqueeze(-1)
    others = targets.labels[targets.partners]
    return weights * one_hot(targets.labels, num_classes) + (1 - weights) * one_hot(others, num_classes)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_loss_is_the_cross_entropy_against_mixed_probabilities(label_smoothing):
    labels, partners = (torch.from_numpy(np.random.default_rng(i).integers(0, n, 20)) for i, n in enumerate((7, 20)))
    targets = Targets(labels, partners, random_tensor(20, seed=0).sigmoid())
    logits, same_logits = (4 * random_tensor(20, 7, seed=1, dtype=torch.float64) for _ in range(2))
    loss = mixed_cross_entropy(logits.requires_grad_(), targets, label_smoothing)
    expected = torch.nn.functional.cross_entropy(
        same_logits.requires_grad_(), soft_targets(targets, 7).double(), label_smoothing=label_smoothing
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, same_logits.grad, rtol=1e-5, atol=1e-9)


def test_loss_of_unmixed_labels_is_the_usual_one():
    logits, labels = random_tensor(8, 5, seed=0), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    loss = mixed_cross_entropy(logits, Targets(labels, torch.arange(8).flip(0), torch.ones(8)), 0.0)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
