"""The package does not depend on the scripts that are made of it."""

import ast

import pytest

from support.child_process import REPOSITORY

TRAINING = REPOSITORY / "training"
SCRIPTS = {path.stem for path in TRAINING.glob("*.py")}
MODULES = {path.relative_to(TRAINING).as_posix(): path for path in (TRAINING / "fambav_training").rglob("*.py")}


def imported(code: str) -> set[str]:
    """The top-level names of everything that the code imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("code", ["import json, train", "from train import run", "def f():\n    import train as t"])
def test_every_kind_of_import_is_found(code):
    assert "train" in imported(code) & SCRIPTS


def test_all_scripts_and_modules_are_looked_at():
    assert {"train", "publish", "visualize_fusion"} < SCRIPTS
    assert {"fambav_training/cli.py", "fambav_training/app/page.py"} < MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_a_script(module):
    assert not imported(MODULES[module].read_text()) & SCRIPTS
