"""Processes that the scripts start: what they print and get. Those that are stopped are tested with the tables."""

import sys

from fambav_training.processes import run_to_end


def test_it_prints_where_the_caller_does_and_keeps_the_callers_variables(capfd, monkeypatch):
    monkeypatch.setenv("GIVEN", "kept")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    code = "import os, sys; print(*map(os.environ.get, ('GIVEN', 'MISSING', 'OMP_WAIT_POLICY'))); sys.exit(3)"
    assert run_to_end([sys.executable, "-c", code], GIVEN="replaced", MISSING="added") == 3
    assert capfd.readouterr().out == "kept added PASSIVE\n"
