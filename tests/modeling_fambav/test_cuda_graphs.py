"""A model can be recorded as a CUDA graph: nothing in it waits for the device, on the path that GPUs take.

There is no GPU here. Tensors of the device `"meta"` stand in for its own, which they resemble in what counts: they
have no data that the host could read.
"""

import contextlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_map_only

from modeling_fambav import FambaVForImageClassification, set_selective_scan_backend
from support.helpers import tiny_config

pytest.importorskip("triton")

from support.device_work import DeviceWork
from support.values_read import reads_values, tensors_in

CASES = [
    {"fusion_strategy": "none"},
    {"drop_path_rate": 0.1, "hidden_dropout_prob": 0.1},
    {"fusion_strategy": "all", "cls_token_position": "middle", "fusion_reduction": "size_weighted"},
    {"fusion_order": "appended", "fusion_scale_time_step": True, "fusion_metric": "dot", "fusion_window": 4},
    {"stem_channels": [8]},
]
# In the order in which a layer that fuses launches them
FORWARD = ["_match", "_merge", "_conv_forward", "_scan_forward"]
BACKWARD = ["_conv_forward", "_scan_backward", "_conv_backward", "_merge_backward"]


@pytest.fixture(autouse=True)
def triton_backend():
    set_selective_scan_backend("triton")


def model_and_batch(**fields):
    """A classifier that trains, images and labels, on the device without data."""
    with torch.device("meta"):
        model = FambaVForImageClassification(
            tiny_config(num_labels=5, problem_type="single_label_classification", **fields)
        ).train()
        return model, torch.empty(2, 3, 16, 16), torch.empty(2, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_forward_and_backward_need_nothing_of_the_host(monkeypatch, fields, dtype):
    model, pixel_values, labels = model_and_batch(**fields)
    model.to(dtype)
    passes = []
    for _ in range(2):
        with DeviceWork(monkeypatch) as work:
            model(pixel_values, labels=labels).loss.backward()
        assert work.host == []
        passes.append(work.operators)
    launches = [name for name in passes[0] if name.startswith("_")]
    num_fused = sum(r > 0 for r in model.config.tokens_removed)
    assert [launches.count(name) for name in ("_match", "_merge", "_merge_backward")] == 3 * [num_fused]
    assert [launches.count(name) for name in ("_scan_forward", "_scan_backward")] == 2 * [3]
    if fields.get("fusion_strategy") == "all":
        assert launches == 3 * FORWARD + 3 * BACKWARD
    # Gradients are added to the first pass's own
    assert [name for name in passes[1] if name.startswith("_")] == launches


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_a_compiled_model_is_two_graphs_without_the_host(fields):
    """As `torch.compile(mode="reduce-overhead")` wants them: one for each pass, of operators on one device.

    The loss is left out, because torch traces no gradient of one without data.
    """
    model, pixel_values, _ = model_and_batch(**fields)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(pixel_values).logits.sum().backward()
    assert len(graphs) == 2
    for graph, scan in zip(graphs, ("bidirectional_scan_", "bidirectional_scan_backward_")):
        scans = [node for node in graph.graph.nodes if scan in str(node.target)]
        assert len(scans) == model.config.num_hidden_layers
        for node in graph.graph.nodes:
            assert {value.device.type for value in tensors_in(node.meta.get("val"))} <= {"meta"}, node.format_node()
            if isinstance(node.target, torch._ops.OpOverload):
                assert torch.Tag.cudagraph_unsafe not in node.target.tags, node.format_node()
                arguments = tree_map_only(fx.Node, lambda other: other.meta["val"], (*node.args, node.kwargs))
                assert not reads_values(node.target, arguments), node.format_node()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.ones(3),
        lambda x: x + torch.ones(()),
        lambda x: torch.ones(3).to("meta"),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_tensors_of_the_host_are_noticed(monkeypatch, function):
    with DeviceWork(monkeypatch) as work, contextlib.suppress(RuntimeError):
        function(torch.empty(3, device="meta"))
    assert work.host


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
    ],
)
def test_reading_is_noticed(monkeypatch, function):
    with DeviceWork(monkeypatch) as work, contextlib.suppress(RuntimeError, NotImplementedError):
        function(torch.empty(3, device="meta"))
    assert work.host
