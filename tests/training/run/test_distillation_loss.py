"""The loss of distillation, by hand and by its gradients, of images alone and mixed."""

import math
import statistics

import pytest
import torch

from fambav_training.data.augmentation import Targets
from fambav_training.run.distillation import DISTILLATION_LOSSES, distillation_loss, standardize
from support.helpers import random_tensor


def slow_loss(student: list[float], teacher: list[float], temperature: float) -> float:
    """T^2 * sum of p log(p / q) with Python numbers, of one image."""

    def probabilities(logits: list[float]) -> list[float]:
        powers = [math.exp(logit / temperature) for logit in logits]
        return [power / sum(powers) for power in powers]

    p, q = probabilities(teacher), probabilities(student)
    return temperature**2 * sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, q))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_loss_is_that_of_the_paper(temperature):
    student, teacher = random_tensor(5, 7, seed=0), random_tensor(5, 7, seed=1)
    expected = sum(slow_loss(*pair, temperature) for pair in zip(student.tolist(), teacher.tolist())) / 5
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def slow_standardized(logits: list[float]) -> list[float]:
    """Logits minus their mean over their standard deviation, with Python numbers."""
    mean = statistics.fmean(logits)
    return [(logit - mean) / statistics.pstdev(logits) for logit in logits]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_standardized_loss_is_that_of_the_paper(temperature):
    student, teacher = random_tensor(5, 7, seed=0), random_tensor(5, 7, seed=1)
    pairs = zip(map(slow_standardized, student.tolist()), map(slow_standardized, teacher.tolist()))
    expected = sum(slow_loss(*pair, temperature) for pair in pairs) / 5
    assert distillation_loss(student, teacher, temperature, "standardized").item() == pytest.approx(expected, rel=1e-4)
    # Neither scale nor offset of the teacher counts
    scaled = distillation_loss(student, 5 * teacher - 3, temperature, "standardized").item()
    assert scaled == pytest.approx(expected, rel=1e-4)


def test_logits_that_are_all_the_same_have_a_standardized_loss_with_a_gradient():
    student = torch.zeros(2, 5, requires_grad=True)
    distillation_loss(student, random_tensor(2, 5, seed=0), 2.0, "standardized").backward()
    assert student.grad.isfinite().all()


def test_gradient_is_the_difference_of_the_probabilities():
    student, teacher = random_tensor(4, 6, seed=2).requires_grad_(), random_tensor(4, 6, seed=3)
    distillation_loss(student, teacher, 3.0).backward()
    expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 4
    torch.testing.assert_close(student.grad, expected.detach())


def random_mix(batch_size: int) -> Targets:
    partners = torch.arange(batch_size).roll(1)
    return Targets(torch.arange(batch_size), partners, random_tensor(batch_size, seed=4).sigmoid())


@pytest.mark.parametrize("kind", DISTILLATION_LOSSES)
def test_gradient_of_mixed_images_is_that_of_the_mixed_probabilities(kind):
    student, teacher = random_tensor(4, 6, seed=2).requires_grad_(), random_tensor(4, 6, seed=3)
    targets = random_mix(4)
    distillation_loss(student, teacher, 3.0, kind, targets).backward()
    same_student = student.detach().clone().requires_grad_()
    logits = (same_student, teacher) if kind == "kl" else map(standardize, (same_student, teacher))
    log_probabilities, probabilities = (
        score(values / 3, -1) for score, values in zip((torch.log_softmax, torch.softmax), logits)
    )
    weights = targets.weights.unsqueeze(-1)
    mixed = weights * probabilities + (1 - weights) * probabilities[targets.partners]
    (9.0 * -(mixed * log_probabilities).sum(-1).mean()).backward()
    torch.testing.assert_close(student.grad, same_student.grad)


@pytest.mark.parametrize("kind", DISTILLATION_LOSSES)
def test_loss_of_mixed_images_is_the_mean_of_that_of_either(kind):
    student, teacher, targets = random_tensor(3, 5, seed=0), random_tensor(3, 5, seed=1), random_mix(3)
    own, partners = (
        [distillation_loss(student[i : i + 1], rows[i : i + 1], 2.0, kind).item() for i in range(3)]
        for rows in (teacher, teacher[targets.partners])
    )
    expected = statistics.fmean(w * a + (1 - w) * b for w, a, b in zip(targets.weights.tolist(), own, partners))
    assert distillation_loss(student, teacher, 2.0, kind, targets).item() == pytest.approx(expected, rel=1e-5)
