"""`torch.export`: with the kernels as operators, for any batch size, in a process that has not compiled them yet."""

import pytest
import torch

from modeling_fambav import FambaVBackbone, FambaVForImageClassification
from support.child_process import run_python
from support.helpers import random_tensor, tiny_config


@pytest.mark.parametrize("strategy", [pytest.param("none", marks=pytest.mark.slow), "upper"])
@pytest.mark.parametrize("position", [pytest.param("head", marks=pytest.mark.slow), "middle"])
def test_exported_for_any_batch_size(position, strategy, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(cls_token_position=position, fusion_strategy=strategy)
    model = FambaVForImageClassification(config).eval()
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (random_tensor(3, 3, 16, 16, seed=0),), dynamic_shapes=batch)
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch_size in (1, 3, 5):
        pixel_values = random_tensor(batch_size, 3, 16, 16, seed=batch_size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_exported_backbone_for_any_batch_size():
    torch.manual_seed(0)
    model = FambaVBackbone(tiny_config(out_indices=[1, 3])).eval()
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (random_tensor(3, 3, 16, 16, seed=0),), dynamic_shapes=batch).module()
    pixel_values = random_tensor(5, 3, 16, 16, seed=1)
    with torch.no_grad():
        expected = model(pixel_values).feature_maps
        torch.testing.assert_close(exported(pixel_values).feature_maps, expected, rtol=1e-5, atol=1e-5)


EXPORT_FIRST = """
import torch
from modeling_fambav import FambaVConfig, FambaVForImageClassification

config = FambaVConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, fusion_tokens=2)
model = FambaVForImageClassification(config).eval()
exported = torch.export.export(model, (torch.zeros(2, 3, 16, 16),))
graphs = [module.graph for module in exported.graph_module.modules() if hasattr(module, "graph")]
targets = [str(node.target) for graph in graphs for node in graph.nodes]
operators = {target.split(".")[1].rpartition("_")[0] for target in targets if target.startswith("fambav.")}
print(sorted(operators))
loaded = exported.module()(torch.zeros(2, 3, 16, 16)).logits
torch.testing.assert_close(loaded, model(torch.zeros(2, 3, 16, 16)).logits)
"""


@pytest.mark.slow
def test_export_is_the_first_thing_a_process_does():
    process = run_python("-c", EXPORT_FIRST)
    assert process.returncode == 0, process.stderr
    assert "Famba-V computes with plain torch operations" not in process.stderr
    assert process.stdout.strip() == "['bidirectional_scan', 'fuse', 'rms_norm']"
