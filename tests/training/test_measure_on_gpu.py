"""What only a GPU can show: a rehearsal of all steps on the CPU, and its messages."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import measure_on_gpu
from fambav_training.gpu.plan import full_plan, rehearsal
from support.child_process import REPOSITORY

# Packages that a machine with a GPU may lack
_START = """
import os, signal, sys
sys.modules.update(dict.fromkeys(("datasets", "evaluate", "kornia", "matplotlib", "numba")))
import measure_on_gpu
"""
# A signal within the third comparison of a kernel
_INTERRUPTED = """
errors, calls = measure_on_gpu.kernel_accuracy._errors, []
def errors_until_a_signal(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return errors(*arguments)
measure_on_gpu.kernel_accuracy._errors = errors_until_a_signal
"""
_MAIN = "measure_on_gpu.main(sys.argv[1:])"


@pytest.fixture(scope="module")
def images_file(tmp_path_factory):
    labels = torch.arange(80) % 4
    pixels = torch.randint(256, (80, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    path = tmp_path_factory.mktemp("images") / "images.safetensors"
    tensors = {"train_images": pixels[:64], "train_labels": labels[:64]}
    tensors |= {"test_images": pixels[64:].clone(), "test_labels": labels[64:].clone()}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"origin": "noise"})
    return path


def rehearse(images_file, folder, *words):
    words = ["--rehearse", "--images", str(images_file), "--output_dir", str(folder), *words]
    measure_on_gpu.main(words)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_a_rehearsal_fills_every_file(images_file, tmp_path, capsys):
    reports = rehearse(images_file, tmp_path)
    assert list(reports) and set(reports) == set(measure_on_gpu.STEPS)
    for report in reports.values():
        assert report["is_complete"] and report["conditions"]["device"].startswith("cpu")
        assert report["conditions"]["versions"]["torch"] and report["conditions"]["num_threads"]
        assert all("git_commit" in cell for cell in report["cells"].values())
        assert not any("error" in cell for cell in report["cells"].values())
    (records,) = (cell["records"] for cell in reports["model_speed"]["cells"].values())
    assert [(record["family"], record["strategy"]) for record in records][1:] == [
        ("famba-v", "none"),
        ("famba-v", "upper"),
    ]
    assert all(record["forward_seconds"] > 0 and record["step_seconds"] > 0 for record in records)
    for cell in reports["kernel_speed"]["cells"].values():
        assert cell["numba"]["forward_ms"] > 0 and cell["torch"]["forward_backward_ms"] > 0
    conditions = reports["time_to_accuracy"]["conditions"]
    assert conditions["images"] == "noise" and len(conditions["images_sha256"]) == 64
    curve = reports["time_to_accuracy"]["cells"]
    assert set(curve) == {f"{strategy}, epoch {epoch}" for strategy in ("upper", "none") for epoch in (1, 2)}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    capsys.readouterr()
    rehearse(images_file, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing is measured twice


def test_only_training_depends_on_the_images(images_file, tmp_path):
    measure_on_gpu.main(["--rehearse", "--steps", "kernel_speed", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="^time is up"):
        rehearse(images_file, tmp_path, "--steps", "kernel_speed", "time_to_accuracy", "--minutes", "1e-9")
    conditions = json.loads((tmp_path / "kernel_speed.json").read_text())["conditions"]
    assert "images" not in conditions and "git_commit" not in conditions


def test_cores_of_the_cpu_are_no_condition_on_a_gpu():
    (on_gpu, commit), (on_cpu, same) = (measure_on_gpu.conditions_of(plan) for plan in (full_plan(), rehearsal()))
    assert set(on_cpu) - set(on_gpu) == {"num_threads"} and commit == same


def test_when_the_time_is_up_the_rest_waits(images_file, tmp_path):
    with pytest.raises(SystemExit, match="^time is up; run the same command again to continue"):
        rehearse(images_file, tmp_path, "--minutes", "1e-9")
    assert rehearse(images_file, tmp_path, "--steps", "kernel_speed")["kernel_speed"]["is_complete"]


def test_the_time_counts_from_the_start_of_the_script(images_file, tmp_path):
    words = ["--rehearse", "--steps", "kernel_speed", "--output_dir", str(tmp_path), "--minutes", "7"]
    with pytest.raises(SystemExit, match="^time is up"):
        measure_on_gpu.main(words, started=time.monotonic() - 421)
    measure_on_gpu.main(words, started=time.monotonic() - 300)


def test_compiled_models_are_the_last_and_the_longest_cells():
    assert measure_on_gpu.STEPS[-1] == "compiled_speed" and measure_on_gpu.STARTED < time.monotonic()
    plan = full_plan()
    assert not any(case.compile_mode for cases in plan.suite.values() for case in cases)
    assert [(cases[0].strategy, cases[1].compile_mode) for cases in plan.compiled.values()] == [
        ("none", "default"),
        ("upper", "default"),
        ("none", "reduce-overhead"),
        ("upper", "reduce-overhead"),
    ]
    assert all(cases[0].compile_mode is None and len(cases) == 2 for cases in plan.compiled.values())


def test_a_cell_that_fails_is_named_at_the_end(images_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_on_gpu.model_speed, "measure", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit, match="error: 1 cell failed"):
        rehearse(images_file, tmp_path, "--steps", "model_speed", "kernel_speed")
    printed = capsys.readouterr().out
    assert "rehearsal: ZeroDivisionError at test_measure_on_gpu.py" in printed
    assert "kernel_speed: 2 of 2 cells" in printed


def test_a_lost_gpu_ends_the_script(images_file, tmp_path, monkeypatch):
    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure_on_gpu, "device_check", lambda plan: synchronize)
    monkeypatch.setattr(measure_on_gpu.model_speed, "measure", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit, match="error: model_speed, rehearsal: .*\n.*run the same command again to go on"):
        rehearse(images_file, tmp_path, "--steps", "model_speed", "kernel_speed")
    with pytest.raises(SystemExit):
        rehearse(images_file, tmp_path, "--steps", "model_speed", "kernel_speed")
    assert json.loads((tmp_path / "kernel_speed.json").read_text())["is_complete"]


def test_a_failure_on_a_gpu_asks_whether_it_still_answers():
    assert measure_on_gpu.device_check(full_plan()) is torch.cuda.synchronize


@pytest.mark.slow
def test_it_runs_without_the_packages_of_training_and_a_signal_loses_nothing(images_file, tmp_path):
    words = ["--rehearse", "--images", str(images_file), "--output_dir", str(tmp_path)]
    words += ["--steps", "kernel_accuracy", "kernel_speed", "time_to_accuracy"]
    options = {"cwd": REPOSITORY / "training", "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options |= {"env": {"PYTHONPATH": str(REPOSITORY)}, "timeout": 600, "check": False}
    killed = subprocess.run([sys.executable, "-c", _START + _INTERRUPTED + _MAIN, *words], **options)
    assert killed.returncode == 128 + signal.SIGTERM, killed.stdout
    report = json.loads((tmp_path / "kernel_accuracy.json").read_text())
    done = {name: cell for name, cell in report["cells"].items() if "error" not in cell}
    assert len(done) == 3 and len(report["cells"]) == 4 and not report["is_complete"]  # numba's own cell is one
    again = subprocess.run([sys.executable, "-c", _START + _MAIN, *words], **options)
    assert again.returncode == 0, again.stdout
    after = json.loads((tmp_path / "kernel_accuracy.json").read_text())
    assert after["is_complete"] and {name: after["cells"][name] for name in done} == done
    assert "not installed" in after["cells"].pop("numba")["not_usable"]
    assert all(", torch," in name for name in after["cells"])
    assert json.loads((tmp_path / "time_to_accuracy.json").read_text())["is_complete"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--images: expected the file that --prepare has written"),
        (["--minutes", "0", "--steps", "kernel_speed"], "--minutes 0.0: expected a number above 0"),
        (["--steps", "tables"], "invalid choice: 'tables'"),
    ],
)
def test_wrong_flags_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        measure_on_gpu.main(words)
    assert message in capsys.readouterr().err


def test_wrong_files_and_machines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: torch finds no GPU; --rehearse"):
        measure_on_gpu.main(["--steps", "kernel_speed"])
    with pytest.raises(SystemExit, match="error: .*nothing: not a file of --prepare"):
        measure_on_gpu.main(["--rehearse", "--images", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="error: "):
        measure_on_gpu.main(["--prepare", str(tmp_path / "images"), "--dataset_name", str(tmp_path / "nowhere")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: .*file"):
        measure_on_gpu.main(["--rehearse", "--steps", "kernel_speed", "--output_dir", str(tmp_path / "file")])


def test_images_that_do_not_fill_a_batch_are_refused(images_file, tmp_path, monkeypatch):
    plan = dataclasses.replace(rehearsal(), batch_size=65)
    monkeypatch.setattr(measure_on_gpu, "rehearsal", lambda: plan)
    with pytest.raises(SystemExit, match="error: .*expected at least 65 training images, a batch"):
        rehearse(images_file, tmp_path, "--steps", "time_to_accuracy")


def test_the_split_that_is_scored_is_a_flag(tmp_path, monkeypatch):
    asked = []

    def prepare(*arguments) -> None:
        asked.extend(arguments)
        raise OSError("disk full")

    monkeypatch.setattr(measure_on_gpu.images_file, "prepare", prepare)
    with pytest.raises(SystemExit, match="^error: disk full"):
        measure_on_gpu.main(["--prepare", str(tmp_path / "images"), "--test_split", "validation"])
    assert asked[-1] == "validation"
