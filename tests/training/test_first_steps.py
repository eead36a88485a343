"""The notebook runs from top to bottom and shows what its text says."""

import json
import re

import pytest
from PIL import Image

from support.child_process import REPOSITORY, run_python

NOTEBOOK = REPOSITORY / "training" / "first_steps.ipynb"


def code_cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_all_cells_run(tmp_path):
    """As plain Python, one after another: no cell uses anything that only Jupyter has."""
    code = "\n\n".join(code_cells())
    assert code.count('root / "outputs/first_steps"') == 1
    code = code.replace('root / "outputs/first_steps"', f"Path({str(tmp_path)!r})")
    process = run_python("-c", code, cwd=NOTEBOOK.parent, HF_HOME=str(tmp_path / "hf_home"))
    assert process.returncode == 0, process.stderr

    checkpoint = REPOSITORY / re.search(r'root / "(model_cards/[\w-]+)"', code).group(1)
    first_answer = json.loads((checkpoint / "examples" / "answers.json").read_text())["hamster.png"][0]
    label, score = re.match(r"([\w ]+): ([\d.]+)%", process.stdout).groups()
    assert (label, float(score)) == (first_answer["label"], pytest.approx(100 * first_answer["score"], abs=0.2))
    assert re.search(r"^none  9: \[65(, 65)+\] tokens", process.stdout, re.MULTILINE)
    assert re.search(r"^upper 3: \[65, 62, 59,", process.stdout, re.MULTILINE)
    assert Image.open(tmp_path / "hamster_fusion.png").width > 256
    results = json.loads((tmp_path / "digits" / "all_results.json").read_text())
    assert results["steps"] == 40
    assert results["top1"] > 50  # of ten classes: it has learned
    assert f"top-1 {results['top1']:.1f} % of 360 digits" in process.stdout


def test_it_is_kept_without_output():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
