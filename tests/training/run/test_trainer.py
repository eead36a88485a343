"""The trainer: two processes do what one does, losses that are not finite, the log, trackers, what is released."""

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, load
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import train
from fambav_training.cli import parse_arguments
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.evaluation.metrics import evaluate
from fambav_training.release.model_card import create_card
from fambav_training.run import loaders, setup, trainer
from support.child_process import REPOSITORY, run_python
from support.training_runs import (
    FLAGS,
    command_line,
    own_process_state,
    read_metrics,
    read_results,
    run_in_two_processes,
    train_here,
    without_time,
)

RUN = {
    **FLAGS,
    "max_train_samples": 96,
    "max_eval_samples": 41,
    "max_train_steps": 6,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "fusion_tokens": 1,
    "logging_steps": 1,
    "evaluation_epochs": 1,
}


# ---- two processes ----

BY_TWO = {**RUN, "per_device_train_batch_size": 16, "checkpointing_steps": 2}
EVERYTHING_RANDOM = {
    "mixup_alpha": 0.8,
    "random_erasing_prob": 0.25,
    "horizontal_flip_prob": 0.5,
    "drop_path_rate": 0.1,
}


def run_by_two(folder: Path, **changes: Any) -> None:
    process = run_in_two_processes(folder, **{**BY_TWO, **changes})
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("by_two") / "out"
    run_by_two(folder)
    return folder


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_batch(by_two, tmp_path):
    train_here(tmp_path / "out", **RUN)
    one, two = read_metrics(tmp_path / "out"), read_metrics(by_two)
    assert [record["step"] for record in one] == [record["step"] for record in two] == [1, 2, 3, 3, 4, 5, 6, 6]
    for record_of_one, record_of_two in zip(without_time(one), without_time(two)):
        assert record_of_two == pytest.approx(record_of_one, rel=1e-5)
    weights_of_one, weights_of_two = (load_file(path / "model.safetensors") for path in (tmp_path / "out", by_two))
    start = load_file(by_two / "checkpoints" / "step_000002" / "model.safetensors")
    for name, weight in weights_of_one.items():
        torch.testing.assert_close(weights_of_two[name], weight, rtol=1e-3, atol=1e-4)
    # Otherwise the comparison would say little.
    assert max((weight - start[name]).abs().max() for name, weight in weights_of_one.items()) > 1e-2
    results_of_one, results_of_two = read_results(tmp_path / "out"), read_results(by_two)
    assert results_of_two["num_processes"] == 2
    for name in ("top1", "top5", "ema_top1", "ema_top5", "steps", "epochs"):
        assert results_of_two[name] == results_of_one[name], name


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint(by_two, tmp_path):
    shutil.copytree(by_two, tmp_path / "out")
    weights, log = (by_two / "model.safetensors").read_bytes(), read_metrics(by_two)
    saved = tmp_path / "out" / "checkpoints" / "step_000004"
    assert {path.name for path in saved.glob("random_states_*")} == {"random_states_0.pkl", "random_states_1.pkl"}
    (tmp_path / "out" / "checkpoints" / "step_000006" / "optimizer.bin").unlink()
    run_by_two(tmp_path / "out", resume_from_checkpoint="latest")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert without_time(read_metrics(tmp_path / "out")) == without_time(log)
    seconds = [record["train_seconds"] for record in read_metrics(tmp_path / "out")]
    assert seconds == sorted(seconds) and seconds[:5] == [record["train_seconds"] for record in log[:5]]


@pytest.mark.slow
def test_checkpoint_of_two_processes_is_not_for_one(by_two):
    before = (by_two / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"made by 2 process\(es\), expected 1"):
        train_here(by_two, **BY_TWO, resume_from_checkpoint="latest")
    assert (by_two / "model.safetensors").read_bytes() == before


# ---- losses that are not finite ----


@pytest.fixture
def nan_at(monkeypatch):
    """Make the loss of some batches, counted from 1, NaN."""

    def install(*batches: int) -> None:
        real, count = trainer.mixed_cross_entropy, iter(range(1, 10**6))
        monkeypatch.setattr(
            trainer,
            "mixed_cross_entropy",
            lambda *arguments: real(*arguments) * (math.nan if next(count) in batches else 1),
        )

    return install


def test_stop_names_step_and_learning_rate_and_keeps_the_state_before(nan_at, tmp_path):
    train_here(tmp_path / "whole", **RUN, checkpointing_steps=1)
    nan_at(4)
    with pytest.raises(trainer.NonFiniteLossError) as error:
        train_here(tmp_path / "out", **RUN)
    log = read_metrics(tmp_path / "whole")
    folder = tmp_path / "out" / "nonfinite_step_000004"
    rate = log[2]["learning_rate"]  # the schedule after step 3 is that of step 4
    for words in ("the loss is nan at step 4,", f"learning rate {rate:.2g};", str(folder), "--nonfinite_loss skip"):
        assert words in str(error.value)
    before = tmp_path / "whole" / "checkpoints" / "step_000003"
    assert (folder / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    batch = load_file(folder / "batch.safetensors")
    assert (batch["pixels"].shape, batch["pixels"].dtype) == ((32, 3, 8, 8), torch.uint8)
    assert batch["labels"].shape == (32,)
    digits = load_labeled_images("digits")
    known = {(row["image"].convert("RGB").tobytes(), row["label"]) for row in digits.train}
    for pixels, label in zip(batch["pixels"], batch["labels"]):
        assert (pixels.permute(1, 2, 0).contiguous().numpy().tobytes(), label.item()) in known
    assert without_time(read_metrics(tmp_path / "out")) == without_time(log[:4])
    assert not (tmp_path / "out" / "all_results.json").exists()


def test_a_loss_that_is_read_late_stops_before_the_next_step(nan_at, tmp_path):
    """No line of the log asks for the loss of step 5 before the gradients of step 6 are there."""
    flags = {**RUN, "logging_steps": 50, "evaluation_epochs": None}
    train_here(tmp_path / "whole", **{**flags, "checkpointing_steps": 4})
    nan_at(5)
    with pytest.raises(trainer.NonFiniteLossError, match="at step 5,"):
        train_here(tmp_path / "out", **flags)
    folder, before = tmp_path / "out" / "nonfinite_step_000005", tmp_path / "whole" / "checkpoints" / "step_000004"
    # accelerate's own function reads safetensors in its newer releases only
    readers = {"model.safetensors": load_file, "custom_checkpoint_0.pkl": load, "custom_checkpoint_1.pkl": load}
    for name, read in readers.items():
        saved, expected = (read(path / name) for path in (folder, before))
        torch.testing.assert_close(saved, expected, rtol=0, atol=0)
    position = json.loads((folder / "trainer_state.json").read_text())["position"]
    assert (position["step"], position["epoch"], position["batch"], position["images"]) == (4, 1, 1, 4 * 32)


def test_skip_counts_and_goes_on(nan_at, tmp_path):
    nan_at(1, 4)
    results = train_here(tmp_path / "out", **RUN, nonfinite_loss="skip")
    assert (results["nonfinite_steps"], results["steps"]) == (2, 6)
    assert read_results(tmp_path / "out")["nonfinite_steps"] == 2
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "out" / "model.safetensors").values())
    losses = {
        record["step"]: record["train_loss"] for record in read_metrics(tmp_path / "out") if "train_loss" in record
    }
    assert losses.keys() == {2, 3, 5, 6} and all(map(math.isfinite, losses.values()))


def test_skipped_step_changes_no_weight(nan_at, tmp_path):
    train_here(tmp_path / "before", **{**RUN, "max_train_steps": 3, "lr_scheduler_type": "constant"})
    nan_at(4)
    flags = {**RUN, "max_train_steps": 4, "lr_scheduler_type": "constant", "nonfinite_loss": "skip"}
    train_here(tmp_path / "out", **flags)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "out")]
    assert weights[0] == weights[1]


def test_one_bad_batch_of_several_spoils_its_step_only(nan_at, tmp_path):
    nan_at(2)
    flags = {**RUN, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "nonfinite_loss": "skip"}
    assert train_here(tmp_path / "out", **flags)["nonfinite_steps"] == 1
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "out" / "model.safetensors").values())


# ---- the log ----


def test_log_has_means_over_the_logged_steps(tmp_path):
    train_here(tmp_path / "each", **RUN)
    train_here(tmp_path / "second", **{**RUN, "logging_steps": 2})
    each = [record["train_loss"] for record in read_metrics(tmp_path / "each") if "train_loss" in record]
    assert len(each) == 6
    lines = [(record["step"], record.get("train_loss")) for record in read_metrics(tmp_path / "second")]
    # The end of an epoch after three steps has the loss of the third.
    means = [(each[0] + each[1]) / 2, each[2], each[3], (each[4] + each[5]) / 2]
    assert [step for step, _ in lines] == [2, 3, 4, 6, 6]
    assert [loss for _, loss in lines if loss is not None] == pytest.approx(means)


def test_learning_rate_rises_and_falls(tmp_path):
    train_here(tmp_path / "out", **{**RUN, "warmup_ratio": 0.5, "max_train_steps": 6})
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "out") if "epoch" not in record]
    # After each step, the rate of the next one: three steps of warm-up, then a cosine to zero
    cosine = [0.005 * (1 + math.cos(math.pi * share)) for share in (0, 1 / 3, 2 / 3, 1)]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, *cosine], abs=1e-9)


def test_scores_are_logged_after_the_epochs_that_are_asked_for(tmp_path):
    results = train_here(tmp_path / "out", **{**RUN, "max_train_steps": 9, "evaluation_epochs": 2})
    scored = [record for record in read_metrics(tmp_path / "out") if "top1" in record]
    assert [record["epoch"] for record in scored] == [2]
    assert scored[0].keys() >= {"top1", "top5", "ema_top1", "ema_top5", "step", "train_seconds"}
    assert 0 <= results["ema_top1"] <= 100
    train_here(tmp_path / "unscored", **{**RUN, "max_train_steps": 9, "evaluation_epochs": None})
    assert not any("top1" in record for record in read_metrics(tmp_path / "unscored"))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "unscored")]
    assert weights[0] == weights[1]  # scoring on the way does not change the training


# ---- trackers ----

# Its file is compressed, and where it is, is read when trackio is imported
_READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage as storage
runs = storage.get_runs("fambav")
print(json.dumps({run: (storage.get_logs("fambav", run), storage.get_run_config("fambav", run)) for run in runs}))
"""


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_here(tmp_path / "out", **RUN, with_tracking=True, report_to="tensorboard")
    [events, *_] = sorted((tmp_path / "out").rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    expected = {
        record["step"]: record["train_loss"] for record in read_metrics(tmp_path / "out") if "train_loss" in record
    }
    found = {event.step: event.value for event in accumulator.Scalars("train_loss")}
    assert found == pytest.approx(expected)
    assert [event.step for event in accumulator.Scalars("top1")] == [3]
    AutoModelForImageClassification.from_pretrained(tmp_path / "out")


def test_no_events_without_tracking(tmp_path):
    train_here(tmp_path / "out", **{**RUN, "max_train_steps": 1}, report_to="tensorboard")
    assert not list((tmp_path / "out").rglob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason='trackio is not installed: pip install -e ".[tracking]"')
def test_trackio_writes_its_database_without_a_network(tmp_path):
    nowhere = "http://127.0.0.1:1"
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere}
    flags = {**RUN, "output_dir": tmp_path / "out", "with_tracking": True, "report_to": "trackio"}
    for resume in (None, "latest"):
        words = command_line(**flags, checkpointing_steps=3, resume_from_checkpoint=resume)
        process = run_python(REPOSITORY / "training" / "train.py", *words, HF_HUB_OFFLINE="1", **environment)
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "trackio" / "fambav.db").is_file()
    process = run_python("-c", _READ_TRACKIO, **environment)
    runs = json.loads(process.stdout)
    assert list(runs) == ["out"]  # the resumed run is no second one
    records, config = runs["out"]
    found = {record["step"]: record["train_loss"] for record in records if "train_loss" in record}
    logged = [record for record in read_metrics(tmp_path / "out") if "train_loss" in record]
    assert found == pytest.approx({record["step"]: record["train_loss"] for record in logged})
    assert [record["step"] for record in records if "top1" in record] == [3]
    assert config["hidden_size"] == "16"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"report_to": "no_such_tracker"}, r"--report_to no_such_tracker: expected 'all' or one of .*'tensorboard'"),
        ({"report_to": "tensorbord"}, r"--report_to tensorbord: expected 'all' or one of .*'trackio'"),
        ({"report_to": "trackio"}, r"--report_to trackio: not installed, try `pip install trackio`; installed are \["),
        (
            {"trackio_space_id": "ann/curves"},
            "--trackio_space_id ann/curves: not installed, try `pip install trackio`",
        ),
    ],
    ids=str,
)
def test_a_tracker_that_is_not_there_is_refused_before_training(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(trainer.Trainer, "train", lambda *_: pytest.fail("training started"))
    monkeypatch.setattr(setup, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=expected):
        train_here(tmp_path / "out", **RUN, with_tracking=True, **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"trackio_space_id": "curves", "with_tracking": True}, "--trackio_space_id curves: expected OWNER/NAME"),
        ({"trackio_space_id": "ann/curves"}, "--trackio_space_id ann/curves: expected --with_tracking"),
        (
            {"trackio_space_id": "ann/curves", "with_tracking": True, "report_to": "tensorboard"},
            "--trackio_space_id ann/curves: expected --with_tracking --report_to trackio",
        ),
    ],
    ids=str,
)
def test_a_dashboard_that_nobody_would_fill_is_refused(flags, expected):
    with pytest.raises(ValueError, match=expected):
        train.TrainingArguments(**flags)


def test_a_dashboard_needs_a_login(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setattr(setup, "get_token", lambda: None)
    with pytest.raises(ValueError, match="--trackio_space_id ann/curves: no token; run `hf auth login`"):
        train_here(tmp_path / "out", **RUN, with_tracking=True, report_to="trackio", trackio_space_id="ann/curves")


def test_the_card_links_a_dashboard_if_there_is_one(tmp_path):
    results = train_here(tmp_path / "out", **{**RUN, "max_train_steps": 1})
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert "dashboard" not in (tmp_path / "out" / "README.md").read_text()
    results["arguments"]["trackio_space_id"] = "ann/curves"
    assert "[dashboard](https://huggingface.co/spaces/ann/curves)" in str(create_card(config, results))


# ---- what is released ----


def score_release(folder: Path, **flags: Any) -> dict[str, float]:
    args, overrides = parse_arguments(train.TrainingArguments, "", command_line(**flags, output_dir=folder))
    images = load_labeled_images("digits")
    _, processor = setup.create_model(args, overrides, images.label_names)
    with own_process_state():
        accelerator = Accelerator(cpu=True)
        _, loader = loaders.create_loaders(args, images, processor, accelerator)
        return evaluate(AutoModelForImageClassification.from_pretrained(folder), loader, processor, accelerator)


def test_average_can_be_released_instead_of_the_last_weights(tmp_path):
    flags = {**RUN, "max_train_steps": 12, "max_eval_samples": 300, "ema_decay": 0.8, "evaluation_epochs": None}
    for name in ("last", "average"):
        results = train_here(tmp_path / name, **flags, release_weights=name)
        assert results["release_weights"] == name
    results = read_results(tmp_path / "last")
    for name in ("top1", "top5", "ema_top1", "ema_top5"):
        assert read_results(tmp_path / "average")[name] == results[name]
    assert results["top1"] != results["ema_top1"]  # otherwise the comparison would say little
    for name, prefix in (("last", ""), ("average", "ema_")):
        scores = score_release(tmp_path / name, **flags)
        assert scores == {key: results[f"{prefix}{key}"] for key in ("top1", "top5")}, name


# ---- precision ----


def test_bf16_stays_finite_and_learns(tmp_path):
    flags = {**RUN, "max_train_steps": 200, "mixed_precision": "bf16", "evaluation_epochs": None}
    results = train_here(tmp_path / "out", **flags)
    losses = [record["train_loss"] for record in read_metrics(tmp_path / "out") if "train_loss" in record]
    assert len(losses) == 200 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 1
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())
    assert (results["mixed_precision"], results["nonfinite_steps"]) == ("bf16", 0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_weights_released_in_bfloat16_score_what_is_reported(tmp_path):
    flags = {**RUN, "evaluation_epochs": None, "release_dtype": "bfloat16"}
    results = train_here(tmp_path / "rounded", **flags)
    weights = load_file(tmp_path / "rounded" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    # Loaded as it was scored: in float32
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "rounded")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert score_release(tmp_path / "rounded", **flags) == {name: results[name] for name in ("top1", "top5")}
    # The run is the same as one whose release is not rounded
    train_here(tmp_path / "exact", **{**flags, "release_dtype": "float32"})
    for name, exact in load_file(tmp_path / "exact" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], exact.bfloat16(), rtol=0, atol=0)
