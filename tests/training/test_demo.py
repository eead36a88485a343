"""`make demo`: what it compares, where it continues, and that a digit is classified with the model that it trained."""

import json
import signal
import sys

import pytest

import demo
from support.helpers import save_classifier

LENGTHS = {"none": [17, 17, 17], "upper": [17, 15, 13]}


def results(strategy: str) -> dict:
    return {
        "top1": 97.5 if strategy == "none" else 96.25,
        "train_seconds": 40.0 if strategy == "none" else 30.0,
        "images_per_second": 400.0,
        "start_memory_bytes": 500 * 2**20,
        "peak_memory_bytes": 700 * 2**20,
        "sequence_lengths": LENGTHS[strategy],
        "device": "cpu: a test",
    }


@pytest.fixture(autouse=True)
def demo_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def train(command, **_) -> int:
    """Stands for the training script: a random model with the results above, and a checkpoint of its end."""
    options = dict(word.removeprefix("--").split("=") for word in command if "=" in word)
    folder = save_classifier(demo.OUTPUT / options["fusion_strategy"], num_labels=10)
    (folder / "all_results.json").write_text(json.dumps(results(options["fusion_strategy"])))
    (folder / "checkpoints").mkdir(exist_ok=True)
    return 0


def test_two_runs_are_compared_and_a_digit_is_classified(monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(demo, "run_to_end", lambda command, **_: commands.append(command) or train(command))
    demo.main()
    printed = capsys.readouterr().out
    assert [[word for word in command if "fusion_strategy" in word] for command in commands] == [
        ["--fusion_strategy=none"],
        ["--fusion_strategy=upper"],
    ]
    assert not list(demo.OUTPUT.glob("*/checkpoints"))  # the next demo starts anew
    none, upper = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if line.startswith(("| none", "| upper"))
    )
    assert none == ["none", "97.50", "40.0", "400", "700", "200", "17 17 17"]
    assert upper == ["upper", "96.25", "30.0", "400", "700", "200", "17 15 13"]
    assert "Fusion left 88% of the tokens to scan; training took 75% of the time." in printed
    assert "Measured on cpu: a test" in printed
    assert "pipeline('outputs/demo/upper') says:" in printed and printed.count("LABEL_") == 3
    assert (demo.OUTPUT / "demo.txt").read_text() in printed
    assert {path.name for path in demo.OUTPUT.iterdir()} == {"none", "upper", "demo.png", "demo.txt", "digit.png"}


def test_a_demo_that_is_stopped_continues_where_it_was(monkeypatch):
    commands = []

    def train_until_stopped(command, **_):
        if "--fusion_strategy=upper" in command and len(commands) == 1:
            raise KeyboardInterrupt
        commands.append(command)
        return train(command)

    monkeypatch.setattr(demo, "run_to_end", train_until_stopped)
    with pytest.raises(SystemExit, match="stopped; run the same command again to continue"):
        demo.main()
    assert (demo.OUTPUT / "none" / "checkpoints").exists() and not (demo.OUTPUT / "demo.txt").exists()
    demo.main()
    assert len(commands) == 3 and not list(demo.OUTPUT.glob("*/checkpoints"))
    for command in commands:  # the end of a training is saved, and continued from
        assert {"--resume_from_checkpoint=latest", "--checkpointing_steps=epoch"} <= set(command)


def test_a_run_that_fails_ends_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_to_end", lambda *_, **__: 143)
    with pytest.raises(SystemExit, match="error: training with fusion_strategy=none ended with exit code 143"):
        demo.main()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("words", [["--help"], ["--anything"]])
def test_flags_train_nothing(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    monkeypatch.setattr(demo, "run_to_end", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(SystemExit):
        demo.main()
