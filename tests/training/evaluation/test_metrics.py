"""Top-k accuracy: the numbers of numpy, in pieces or at once, without a network; and scoring a model."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.data.pixels import normalize
from fambav_training.evaluation.metrics import TopKAccuracy, evaluate
from modeling_fambav import FambaVForImageClassification
from support.child_process import REPOSITORY, run_python
from support.helpers import tiny_config

PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


def ranked_and_labels(num_images: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes from the most to the least likely, five or all of them, and the right ones."""
    random = np.random.default_rng(seed)
    ranked = np.argsort(-random.random((num_images, num_classes)), axis=1)[:, :5]
    return ranked, random.integers(0, num_classes, num_images)


def score(ranked: np.ndarray, labels: np.ndarray, **arguments) -> dict[str, float]:
    return TopKAccuracy(keep_in_memory=True).compute(predictions=ranked, references=labels, **arguments)


@pytest.mark.parametrize("num_images, num_classes", [(1, 10), (7, 10), (1000, 10), (333, 100)])
def test_scores_are_those_of_numpy(num_images, num_classes):
    ranked, labels = ranked_and_labels(num_images, num_classes)
    scores = score(ranked, labels)
    assert scores.keys() == {"top1", "top5"}
    assert scores["top1"] == pytest.approx(100 * np.mean(ranked[:, 0] == labels))
    assert scores["top5"] == pytest.approx(100 * np.mean([label in row for row, label in zip(ranked, labels)]))


def test_other_k_can_be_asked_for():
    ranked, labels = ranked_and_labels(200, 10)
    scores = score(ranked, labels, k=(2, 3))
    assert scores == {
        f"top{k}": pytest.approx(100 * np.mean([label in row[:k] for row, label in zip(ranked, labels)]))
        for k in (2, 3)
    }


@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_with_fewer_classes_than_k_all_of_them_count(num_classes):
    ranked, labels = ranked_and_labels(50, num_classes)
    scores = score(ranked, labels)
    assert scores["top5"] == 100
    assert scores["top1"] == pytest.approx(100 * np.mean(ranked[:, 0] == labels))


def test_pieces_give_what_all_at_once_gives():
    ranked, labels = ranked_and_labels(101, 10)
    metric = TopKAccuracy(keep_in_memory=True)
    for begin, end in [(0, 1), (1, 40), (40, 101)]:
        metric.add_batch(
            predictions=torch.from_numpy(ranked[begin:end]), references=torch.from_numpy(labels[begin:end])
        )
    assert metric.compute() == score(ranked, labels)
    metric.add(prediction=ranked[0], reference=ranked[0, 0])  # it starts anew
    assert metric.compute() == {"top1": 100.0, "top5": 100.0}


COMPUTE_OFFLINE = """
import socket, sys
sys.path[:0] = ["training", "."]
socket.socket.connect = lambda *_: sys.exit("asked for a connection")
from fambav_training.evaluation.metrics import TopKAccuracy
print(TopKAccuracy().compute(predictions=[[1, 0], [1, 0]], references=[1, 0]))
"""


@pytest.mark.slow
def test_metric_needs_no_network_and_no_cache(tmp_path):
    process = run_python("-c", COMPUTE_OFFLINE, cwd=REPOSITORY, HF_HOME=str(tmp_path / "new"), HF_HUB_OFFLINE="0")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "{'top1': 50.0, 'top5': 100.0}"


# ---- scoring a model ----


@pytest.fixture(scope="module")
def scored():
    """A model that is not sure of anything, 23 images with labels, and its answers."""
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(num_labels=8, drop_path_rate=0.5)).eval()
    model.classifier.weight.data.normal_()
    random = np.random.default_rng(0)
    images = [
        (torch.from_numpy(random.integers(0, 256, (3, 16, 16), dtype=np.uint8)), int(random.integers(8)))
        for _ in range(23)
    ]
    with torch.no_grad():
        logits = model(normalize(torch.stack([pixels for pixels, _ in images]), PROCESSOR)).logits
    return model, images, logits


def evaluate_in_batches(model, images, batch_size: int) -> dict[str, float]:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(images, batch_size))
    return evaluate(model, loader, PROCESSOR, accelerator)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_every_image_counts_once_whatever_the_batches(scored, batch_size):
    model, images, logits = scored
    labels = torch.tensor([label for _, label in images])
    ranked = logits.argsort(dim=-1, descending=True)
    scores = evaluate_in_batches(model, images, batch_size)
    assert scores["top1"] == pytest.approx(100 * (ranked[:, 0] == labels).double().mean().item())
    assert scores["top5"] == pytest.approx(100 * (ranked[:, :5] == labels[:, None]).any(-1).double().mean().item())
    assert 0 < scores["top5"] < 100


@pytest.mark.parametrize("is_training", [True, False])
def test_model_is_scored_in_evaluation_mode_and_put_back(scored, is_training):
    model, images, _ = scored
    modes = []
    hook = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    try:
        model.train(is_training)
        scores = evaluate_in_batches(model, images, 8)
        assert modes == [False] * 3
        assert model.training is is_training and model.classifier.training is is_training
        assert scores == evaluate_in_batches(model.eval(), images, 8)
    finally:
        hook.remove()
        model.eval()


def test_scoring_keeps_no_gradients(scored):
    model, images, _ = scored
    evaluate_in_batches(model, images, 8)
    assert all(parameter.grad is None for parameter in model.parameters())
