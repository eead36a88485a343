"""Steps whose passes are recorded as CUDA graphs, and when they cannot be."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend

import train
from fambav_training.machine.cuda_graphs import record_inference, record_passes
from fambav_training.run.arguments import TrainingArguments
from fambav_training.run.setup import check_cuda_graphs
from modeling_fambav import FambaVForImageClassification
from support.helpers import random_tensor, tiny_config
from support.training_runs import train_here

STEM = {"image_size": 16, "patch_size": 4, "stem_channels": [8], "num_labels": 5}


def accelerator_of(device: str = "cuda", num_processes: int = 1, backend=DynamoBackend.NO) -> SimpleNamespace:
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
    return SimpleNamespace(device=torch.device(device), num_processes=num_processes, state=state)


def test_a_run_that_can_be_recorded_is_not_refused():
    check_cuda_graphs(TrainingArguments(cuda_graphs=True), accelerator_of())
    check_cuda_graphs(TrainingArguments(gradient_accumulation_steps=2), accelerator_of("cpu", 2))


@pytest.mark.parametrize(
    "changes, accelerator, message",
    [
        ({}, accelerator_of("cpu"), "expected a CUDA device, this run is on 'cpu'"),
        ({}, accelerator_of(num_processes=2), "expected one process, there are 2"),
        (
            {},
            accelerator_of(backend=DynamoBackend.INDUCTOR),
            "expected no torch.compile, `accelerate config` has INDUCTOR",
        ),
        ({"gradient_accumulation_steps": 4}, accelerator_of(), "expected --gradient_accumulation_steps 1, not 4"),
        (
            {"streaming": True, "max_train_steps": 1, "dataset_name": "x", "validation_split": "test"},
            accelerator_of(),
            "expected no --streaming",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(changes, accelerator, message):
    with pytest.raises(ValueError, match=f"--cuda_graphs: {message}"):
        check_cuda_graphs(TrainingArguments(cuda_graphs=True, **changes), accelerator)


def test_recording_changes_neither_the_model_nor_random_numbers(monkeypatch):
    """What torch records with is stood in for: it computes a few times, and gives the model back."""

    def compute_and_return(module, samples):
        assert module.training
        for _ in range(3):
            module(*samples).sum().backward()
        module.zero_grad()
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", compute_and_return)
    model = FambaVForImageClassification(tiny_config(**STEM, hidden_dropout_prob=0.5)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    logits = record_passes(model, 4, (16, 16))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images = random_tensor(4, 3, 16, 16, seed=0)
    torch.manual_seed(1)
    recorded = logits(images)
    torch.manual_seed(1)
    assert recorded.requires_grad and torch.equal(recorded, model.train()(images).logits)


def test_a_run_trains_on_what_was_recorded(tmp_path, monkeypatch):
    """Evaluation between the epochs, and a second run that resumes; what records is stood in for."""
    recorded = []

    def record_nothing(module, samples):
        recorded.append(tuple(samples[0].shape))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record_nothing)
    monkeypatch.setattr(train, "check_cuda_graphs", lambda args, accelerator: None)
    flags = {"optimizer": "muon", "evaluation_epochs": 1, "checkpointing_steps": "epoch", "max_train_steps": 16}
    plain, first = (train_here(tmp_path / name, **flags, cuda_graphs=name == "graphs") for name in ("plain", "graphs"))
    assert recorded == [(64, 3, 8, 8)]
    assert first["train_loss"] == plain["train_loss"] and first["top1"] == plain["top1"]
    shutil.rmtree(tmp_path / "graphs" / "checkpoints" / "step_000016", ignore_errors=True)
    again = train_here(tmp_path / "graphs", **flags, cuda_graphs=True, resume_from_checkpoint="latest")
    assert len(recorded) == 2 and again["top1"] == plain["top1"]


@pytest.mark.gpu
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_recorded_steps_train_as_others_do(tmp_path, mixed_precision):
    flags = {"cpu": False, "mixed_precision": mixed_precision, "stem_channels": [8], "drop_path_rate": 0.1}
    flags["optimizer"] = "muon"
    results = [train_here(tmp_path / name, **flags, cuda_graphs=name == "graphs") for name in ("eager", "graphs")]
    assert math.isclose(results[0]["train_loss"], results[1]["train_loss"], rel_tol=1e-3)
    assert results[1]["top1"] == pytest.approx(results[0]["top1"], abs=5)


@pytest.mark.gpu
def test_a_replay_classifies_what_lies_in_the_memory_of_the_images():
    model = FambaVForImageClassification(tiny_config(**STEM)).to("cuda").eval()
    images, others = (random_tensor(4, 3, 16, 16, seed=seed).to("cuda") for seed in (0, 1))
    expected = model(others).logits
    graph, logits = record_inference(model, images, torch.float32)
    images.copy_(others)
    graph.replay()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
