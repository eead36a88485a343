"""The benchmark: what is measured is what the labels say, and the report says what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

import benchmark
from fambav_training.benchmark import measurement, workload
from fambav_training.benchmark.cases import SMALL_R, SUITES, Case, cpu_suite
from fambav_training.benchmark.measurement import measure, peak_bytes
from fambav_training.benchmark.report import break_even, core_operations_sentence, table
from fambav_training.benchmark.workload import CoreOperations, Workload, create_model
from modeling_fambav import FambaVConfig

CPU = torch.device("cpu")


def record(label="", strategy="none", tokens=100.0, forward=1.0, step=3.0, **fields) -> dict:
    """A measurement by hand."""
    return {
        "label": label or strategy,
        "family": "famba-v",
        "strategy": strategy,
        "mean_tokens": tokens,
        "fusion_tokens": None,
        "forward_seconds": forward,
        "forward_images_per_second": 8 / forward,
        "step_seconds": step,
        "step_images_per_second": 8 / step,
        **fields,
    }


@pytest.mark.parametrize("strategy, removed", [("none", 0), ("all", 168), ("interleaved", 168), ("lower", 171)])
def test_budgets_at_224_pixels_are_those_of_the_paper(strategy, removed):
    assert sum(Case("famba-v", strategy=strategy).config().tokens_removed) == removed


def test_budgets_at_other_sizes_remove_the_same_share():
    share = Case("famba-v", strategy="upper").mean_tokens() / 197
    for image_size in (384, 512, 768, 1024):
        case = Case("famba-v", strategy="upper", image_size=image_size)
        assert case.mean_tokens() / ((image_size // 16) ** 2 + 1) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("size, parameters", [("ti", (5.5e6, 7.2e6)), ("s", (21e6, 26e6))])
def test_models_are_of_the_same_size(size, parameters):
    for family in ("deit", "famba-v"):
        model = create_model(Case(family, size))
        assert parameters[0] < sum(parameter.numel() for parameter in model.parameters()) < parameters[1]


def test_suites_compare_what_the_release_is_compared_with():
    cpu, gpu = cpu_suite(), SUITES["gpu"]()
    for suite in (cpu, gpu):
        cases = [case for group in suite.values() for case in group]
        assert {case.strategy for case in cases} == {"none", "all", "interleaved", "lower", "upper"}
        assert {384, 512, 768, 1024} <= {case.image_size for case in cases}
        assert any(case.family == "deit" for case in cases)
        assert all(len({case.dtype for case in group}) == 1 for group in suite.values())
    assert {case.dtype for group in cpu.values() for case in group} == {"float32", "bfloat16"}
    assert {case.backend for group in gpu.values() for case in group} == {None, "triton", "mamba-ssm"}
    assert {case.compile_mode for group in gpu.values() for case in group} == {None, "default", "reduce-overhead"}
    assert {case.fusion_tokens for case in cpu[SMALL_R][1:]} == set(range(1, 10))


def test_a_small_case_is_measured():
    cases = [Case("deit", image_size=32, batch_size=2), Case("famba-v", strategy="upper", image_size=64, batch_size=2)]
    records = measure(cases, CPU, rounds=1, train=True, with_memory=False)
    assert [entry["label"] for entry in records] == ["DeiT-Ti", "Famba-V-Ti upper"]
    for entry in records:
        assert 0 < entry["forward_seconds"] < entry["step_seconds"]
        assert entry["step_images_per_second"] == pytest.approx(2 / entry["step_seconds"])


@pytest.fixture
def compiled_graphs(monkeypatch):
    """Models of two layers; the list grows by a graph whenever torch compiles one."""
    graphs, compile_model = [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_model(model, backend=count))
    small = {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 4}
    config = Case.config
    monkeypatch.setattr(Case, "config", lambda case: FambaVConfig(**{**config(case).to_dict(), **small}))
    return graphs


def test_a_compiled_model_is_compiled_once_for_each_kind_of_call(compiled_graphs):
    case = Case("famba-v", image_size=32, batch_size=2, compile_mode="default")
    measure([case], CPU, rounds=2, train=True, with_memory=False)
    assert len(compiled_graphs) == 2  # of the forward pass and of the training step


def test_tables_do_not_share_torchs_limit_of_graphs_and_reaching_it_is_an_error(compiled_graphs):
    case = Case("famba-v", image_size=32, batch_size=2, compile_mode="default")
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(2):
            measure([case], CPU, rounds=1, train=True, with_memory=False)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        measure([case], CPU, rounds=1, train=True, with_memory=False)
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


def test_memory_of_cuda_graphs_is_left_out(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    case = Case("famba-v", image_size=32, batch_size=1, compile_mode="reduce-overhead")
    (entry,) = measure([case], CPU, rounds=1, train=True, with_memory=True)
    assert entry["step_seconds"] > 0 and "step_peak_bytes" not in entry


def test_recorded_passes_are_replayed(monkeypatch):
    """Where there is no GPU, what records them is stood in for."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("inference")

    def record_passes(model, batch_size, image_size, dtype):
        assert (batch_size, image_size, dtype) == (2, (32, 32), torch.bfloat16)

        def logits(images):
            calls.append("passes")
            return model(images).logits

        return logits

    monkeypatch.setattr(workload, "record_inference", lambda model, images, dtype: (Graph(), None))
    monkeypatch.setattr(workload, "record_passes", record_passes)
    case = Case("famba-v", image_size=32, batch_size=2, dtype="bfloat16", is_recorded=True)
    (entry,) = measure([case], CPU, rounds=1, train=True, with_memory=True)
    assert entry["label"] == "Famba-V-Ti none recorded" and entry["step_peak_bytes"] > 0
    assert calls[0] == "inference" and calls[-1] == "passes"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["deit", "famba-v"])
def test_recorded_passes_take_time_on_a_gpu(family):
    case = Case(family, image_size=32, batch_size=2, dtype="bfloat16", is_recorded=True)
    (entry,) = measure([case], torch.device("cuda"), rounds=1, train=True, with_memory=False)
    assert 0 < entry["forward_seconds"] < entry["step_seconds"]


@pytest.mark.slow
def test_memory_of_a_step_is_measured_in_a_process_of_its_own():
    few, many = (
        peak_bytes(Workload(Case("famba-v", image_size=64, batch_size=batch_size), CPU)) for batch_size in (2, 32)
    )
    # 24 layers x 17 tokens x about 4.9 x 384 numbers are kept of every image, 3 MiB
    assert 50 * 2**20 < many - few < 250 * 2**20


def test_table_has_ratios_to_the_first_row_and_savings_beside_their_limit():
    first = record("DeiT-Ti", forward=0.5, step=1.5, family="deit")
    unfused, fused = record(tokens=100.0), record(strategy="upper", tokens=60.0, forward=0.7, step=1.8)
    lines = table([first, unfused, fused]).splitlines()
    assert "| 1.40 " in lines[-1] and "| 1.20 " in lines[-1]  # of the forward pass and of the step
    assert "30%, 40%; 40%" in lines[-1] and "%" not in lines[-2]


def test_break_even_is_the_smallest_r_that_is_faster():
    rows = [record()] + [
        record(strategy="upper", forward=forward, step=step, fusion_tokens=r)
        for r, forward, step in ((1, 1.1, 3.1), (2, 0.9, 3.0), (3, 0.8, 3.2))
    ]
    sentence = break_even(rows)
    assert "forward pass from r = 2" in sentence and "training step for none of these" in sentence


def test_core_operations_are_products_and_scans():
    sentence = core_operations_sentence({"forward": 0.3, "matrix products": 0.15, "scans": 0.1})
    assert "1.20 times" in sentence


def test_core_operations_are_the_products_of_one_forward_pass():
    case = Case("famba-v", image_size=32, batch_size=2)
    core = CoreOperations(case, CPU)
    model = create_model(case)
    mixer = model.fambav.layers[0].mixer
    weights = [mixer.in_proj.weight, *(d.x_proj.weight for d in (mixer.forward_scan, mixer.backward_scan))]
    weights += [mixer.out_proj.weight, *(d.dt_proj.weight for d in (mixer.forward_scan, mixer.backward_scan))]
    assert sum(right.numel() for _, right in core.projections) == sum(weight.numel() for weight in weights)
    assert core.num_layers == 24
    core.products(), core.scans()


def test_a_window_is_part_of_case_and_label():
    case = Case("famba-v", strategy="upper", image_size=512, fusion_window=5)
    assert case.config().fusion_window == 5 and case.label == "Famba-V-Ti upper window=5"
    assert case.config().tokens_removed == Case("famba-v", strategy="upper", image_size=512).config().tokens_removed


def test_main_writes_a_report(tmp_path, monkeypatch, capsys):
    cases = [
        Case("deit", image_size=32, batch_size=1),
        Case("famba-v", image_size=32, batch_size=1),
        Case("famba-v", strategy="upper", image_size=64, batch_size=1),
    ]
    monkeypatch.setitem(SUITES, "quick", lambda: {"a title": cases})
    monkeypatch.setattr(measurement, "peak_bytes", lambda workload: 2**20)
    monkeypatch.setattr(
        benchmark, "measure_core_operations", lambda *_: {"forward": 3.0, "matrix products": 1, "scans": 1}
    )
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", "--suite", "quick", "--rounds", "1", "--output_dir", str(tmp_path)]
    )
    benchmark.main()
    printed = capsys.readouterr().out
    report = json.loads(Path(tmp_path / "benchmark.json").read_text())
    assert [entry["family"] for entry in report["results"]["a title"]] == ["deit", "famba-v", "famba-v"]
    assert report["environment"]["versions"]["torch"] == torch.__version__
    text = (tmp_path / "benchmark.md").read_text()
    assert "1.50 times" in text
    for section in text.split("\n\n")[1:]:
        assert section.strip() in printed
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
