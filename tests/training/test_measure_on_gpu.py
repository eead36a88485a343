"""The script for a GPU: its commands, its deadline and its bookkeeping, by stand-ins for the commands."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import measure_on_gpu
import reproduce
from fambav_training.cli import parse_arguments
from fambav_training.run.arguments import TrainingArguments
from measure_on_gpu import Stage
from support.child_process import DEADLINE_SECONDS, REPOSITORY

_COUNT = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); path.write_text(str(int(path.read_text()) + 1))"
_SLEEP = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved")))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def stand_ins(monkeypatch, tmp_path) -> dict[str, list[str]]:
    """Commands by stage: each counts in a file named after it how often it ran. Change them to do otherwise."""
    names = [stage.name for stage in measure_on_gpu.stages("data", Path("out"))]
    commands = {}
    for name in names:
        (tmp_path / name).write_text("0")
        commands[name] = [sys.executable, "-c", _COUNT, str(tmp_path / name)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure_on_gpu, "stages", lambda *_: [Stage(name, commands[name]) for name in names])
    return commands


def counts(folder: Path, *names: str) -> list[int]:
    return [int((folder / name).read_text()) for name in names]


def test_commands_are_ones_that_the_scripts_read(capsys):
    measure_on_gpu.main(["--list", "--dataset_name", "my data"])
    tests, benchmark, upper, none, table = map(shlex.split, capsys.readouterr().out.splitlines())
    assert (
        tests[1:3] == ["-m", "pytest"] and benchmark[1].endswith("benchmark.py") and table[1].endswith("reproduce.py")
    )
    assert reproduce.parse(table[2:]).scale == "native32"
    for words, strategy in ((upper, "upper"), (none, "none")):
        args, overrides = parse_arguments(TrainingArguments, "", words[2:])
        assert (args.dataset_name, args.mixed_precision) == ("my data", "bf16")
        assert (overrides["fusion_strategy"], overrides["image_size"]) == (strategy, 32)
    assert upper[:-4] == none[:-4]  # they differ in strategy and folder only


def test_finished_stages_are_left_alone_and_failed_ones_run_again(stand_ins, tmp_path, capsys):
    works, stand_ins["benchmark"] = stand_ins["benchmark"], [sys.executable, "-c", "raise SystemExit(3)"]
    words = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="benchmark failed, see the logs"):
        measure_on_gpu.main(words)
    assert json.loads((tmp_path / "out" / "stages.json").read_text())["benchmark"] == 3
    stand_ins["benchmark"] = works
    measure_on_gpu.main(words)
    assert counts(tmp_path, "tests", "benchmark", "upper", "none", "table1") == [1, 1, 1, 1, 1]
    assert "tests: finished before" in capsys.readouterr().out


def test_a_stage_is_asked_to_stop_when_the_time_is_over(stand_ins, tmp_path):
    stand_ins["upper"] = [sys.executable, "-c", _SLEEP]
    words = ["--output_dir", str(tmp_path / "out"), "--stages", "tests", "upper", "none", "--minutes", "0.05"]
    with pytest.raises(SystemExit, match="upper: stopped, the time is up"):
        measure_on_gpu.main(words)
    assert (tmp_path / "out" / "upper.log").read_text().splitlines()[-1] == "saved"
    assert json.loads((tmp_path / "out" / "stages.json").read_text()) == {"tests": 0, "upper": None}
    assert counts(tmp_path, "tests", "none") == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_ends_with_the_script(number, tmp_path):
    script = (
        # A process in the background inherits that SIGINT is ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; import torch, measure_on_gpu as m; torch.cuda.is_available = lambda: True;"
        f"m.stages = lambda *_: [m.Stage('upper', [sys.executable, '-c', {_SLEEP!r}])];"
        f"m.main(['--output_dir', {str(tmp_path / 'out')!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'training'}{os.pathsep}{REPOSITORY}"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("upper: running")
    log = tmp_path / "out" / "upper.log"
    while not log.exists() or "ready" not in log.read_text().splitlines():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(DEADLINE_SECONDS) != 0
    assert log.read_text().splitlines()[-1] == "saved"


def test_seconds_to_a_target_are_those_of_the_first_score_above_it(tmp_path):
    (tmp_path / "upper").mkdir()
    records = [{"step": 5, "train_loss": 1.0, "train_seconds": 50.0}]
    for epoch, top1 in enumerate((60.0, 71.0, 69.0, 75.0), 1):
        records.append({"step": epoch, "epoch": epoch, "train_seconds": 100.0 * epoch, "top1": top1, "ema_top1": 5.0})
    (tmp_path / "upper" / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert measure_on_gpu.accuracy_over_time(tmp_path)["upper"]["seconds_to_top1"] == {"70": 200.0, "76": None}
    # The last epoch is scored for the results only
    results = {"epochs": 5.0, "train_seconds": 500.0, "top1": 76.5, "ema_top1": 5.0}
    (tmp_path / "upper" / "all_results.json").write_text(json.dumps(results))
    curves = measure_on_gpu.accuracy_over_time(tmp_path)
    assert list(curves) == ["upper"] and len(curves["upper"]["points"]) == 5
    assert curves["upper"]["seconds_to_top1"] == {"70": 200.0, "76": 500.0}
    measure_on_gpu.plot(curves, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_wrong_calls(stand_ins, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--stages tables: expected some of tests benchmark upper none table1"):
        measure_on_gpu.main(["--stages", "tables"])
    with pytest.raises(SystemExit):
        measure_on_gpu.main(["--minutes", "0"])
    assert "--minutes 0.0: expected a number above 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        measure_on_gpu.main([])
