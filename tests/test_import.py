"""`import modeling_fambav` is cheap: it imports no compiler, and little beside what transformers needs anyway."""

import json
import statistics

import pytest

from support.child_process import run_python

IMPORT = """
import json, sys, time
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils.output_capturing import capture_outputs
compilers = {"numba", "llvmlite", "triton", "mamba_ssm"} - sys.modules.keys()  # torch imports triton itself
started = time.process_time()
import modeling_fambav
seconds = time.process_time() - started
print(json.dumps([seconds, sorted(compilers & sys.modules.keys())]))
"""


@pytest.mark.slow
def test_import_costs_little_and_no_compiler():
    runs = []
    for _ in range(3):
        process = run_python("-c", IMPORT)
        assert process.returncode == 0, process.stderr
        runs.append(json.loads(process.stdout))
    assert all(compilers == [] for _, compilers in runs)
    assert statistics.median(seconds for seconds, _ in runs) <= 0.2  # of processor time
