"""Random configurations: one that is accepted runs forward and backward, one that is refused says which field."""

import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from modeling_fambav import FambaVConfig, FambaVForImageClassification
from support.helpers import images

# Of every field: small values that fit, and values at the edge of what is allowed or beyond it
WRONG = st.sampled_from([-1, 0, True, 2.5, float("nan"), float("inf"), "x", None, [], [1], (3, 4, 5)])
SMALL = st.integers(1, 4)
RATE = st.sampled_from([0, 0.0, 0.1, 0.999, 1, 1.0])
TIME = st.sampled_from([1e-12, 1e-4, 0.001, 0.1, 1.0, 5])
LAYER = st.none() | st.integers(0, 4)
FIELDS = {
    "image_size": st.sampled_from([8, 12, 16, (8, 12), [16, 8], 9]),
    "patch_size": st.sampled_from([2, 4, 8, 3]),
    "patch_stride": st.none() | st.sampled_from([2, 4]),
    "num_channels": st.integers(1, 3),
    "stem_channels": st.none() | st.lists(st.integers(0, 6), max_size=3),
    "hidden_size": st.sampled_from([1, 2, 8, 17, 32]),
    "num_hidden_layers": SMALL,
    "state_size": st.sampled_from([1, 2, 3, 4, 5]),
    "expand": SMALL,
    "conv_kernel": st.integers(1, 5),
    "time_step_rank": st.just("auto") | st.integers(1, 20),
    "time_step_min": TIME,
    "time_step_max": TIME,
    "time_step_floor": TIME,
    "cls_token_position": st.sampled_from(["head", "middle", "tail"]),
    "layer_norm_epsilon": st.sampled_from([1e-8, 1e-5, 1]),  # without one, tokens of zeros have no norm
    "residual_in_fp32": st.booleans(),
    "drop_path_rate": RATE,
    "hidden_dropout_prob": RATE,
    "initializer_range": st.sampled_from([0.0, 1e-12, 0.02, 1]),
    "fusion_strategy": st.sampled_from(["upper", "none", "all", "interleaved", "lower", "custom", "Upper"]),
    "fusion_tokens": st.integers(0, 40),
    "fusion_start_layer": LAYER,
    "fusion_end_layer": LAYER,
    "fusion_schedule": st.none() | st.lists(st.integers(-1, 9), max_size=4),
    "fusion_metric": st.sampled_from(["cosine", "dot", "euclidean", "manhattan"]),
    "fusion_window": st.none() | st.integers(0, 9),
    "fusion_reduction": st.sampled_from(["mean", "size_weighted"]),
    "fusion_order": st.sampled_from(["raster", "appended"]),
    "fusion_scale_time_step": st.booleans(),
    "num_labels": st.integers(1, 3),
}
ALWAYS = {"image_size": FIELDS["image_size"], "patch_size": FIELDS["patch_size"], "hidden_size": FIELDS["hidden_size"]}


@st.composite
def configurations(draw) -> dict:
    """Fields of a small model, up to four others, and sometimes a wrong value for one of them."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True))
    fields = {"num_hidden_layers": draw(SMALL), **{name: draw(values) for name, values in ALWAYS.items()}}
    fields |= {name: draw(FIELDS[name]) for name in names}
    if names and draw(st.integers(0, 3)) == 0:
        fields[names[0]] = draw(WRONG)
    return fields


def check(fields: dict) -> None:
    note(f"FambaVConfig(**{fields})")
    try:
        config = FambaVConfig(**fields)
    except (ValueError, StrictDataclassError) as error:
        assert any(name in str(error) for name in FIELDS), error
        return
    if config.num_labels == 0:  # a model without a classifier
        return
    assert len(config.sequence_lengths) == config.num_hidden_layers and min(config.sequence_lengths) >= 2
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, for weights without elements or of one element
        model = FambaVForImageClassification(config).train()
    outputs = model(images(2, config), labels=torch.zeros(2, dtype=torch.int64), output_token_maps=True)
    outputs.loss.backward()
    assert outputs.logits.shape == (2, config.num_labels) and outputs.logits.isfinite().all()
    lengths = [int(token_map.max()) + 1 for token_map in outputs.token_maps]
    assert lengths == config.sequence_lengths
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_random_configurations(fields):
    check(fields)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_ten_thousand_random_configurations(fields):
    check(fields)
