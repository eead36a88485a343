"""The models: outputs of the contract, fusion at work, parity with the official code and a slow implementation."""

import copy
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_fambav import FambaVConfig, FambaVForImageClassification, FambaVModel, backends, unmerge
from modeling_fambav.layers import FambaVDropPath
from support.helpers import (
    gradients,
    images,
    make_model,
    random_tensor,
    tiny_config,
    tolerance,
)

CLASS_POSITIONS = ("head", "middle")
ORDERS = ("raster", "appended")


# ---- outputs of the contract ----


@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_model_outputs(position):
    model = make_model(cls_token_position=position)
    outputs = model(images())
    assert isinstance(outputs, BaseModelOutputWithPooling)
    assert outputs.last_hidden_state.shape == (3, 13, 32)  # 17 tokens less two in each of the last two layers
    assert outputs.pooler_output.shape == (3, 32)
    assert outputs.hidden_states is None and outputs.token_maps is None

    last_hidden_state, pooler_output = model(images(), return_dict=False)
    assert torch.equal(last_hidden_state, outputs.last_hidden_state)
    assert torch.equal(pooler_output, outputs.pooler_output)


def test_classifier_outputs():
    model = make_model(FambaVForImageClassification, num_labels=7)
    labels = torch.tensor([0, 6, 3])
    outputs = model(pixel_values=images(), labels=labels)
    assert isinstance(outputs, ImageClassifierOutput)
    assert outputs.logits.shape == (3, 7)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    torch.testing.assert_close(outputs.logits, model.classifier(model.fambav(images()).pooler_output))
    assert outputs.hidden_states is None and outputs.token_maps is None
    assert model(images()).loss is None

    loss, logits = model(images(), labels=labels, return_dict=False)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)


def test_classifier_without_labels_returns_the_class_token():
    model = make_model(FambaVForImageClassification, num_labels=0)
    assert torch.equal(model(images()).logits, model.fambav(images()).pooler_output)


@pytest.mark.parametrize("model_class", [FambaVModel, FambaVForImageClassification])
def test_hidden_states(model_class):
    model = make_model(model_class)
    hidden_states = model(images(), output_hidden_states=True).hidden_states
    assert [states.shape for states in hidden_states] == [(3, length, 32) for length in (17, 17, 15, 13)]
    base = model if model_class is FambaVModel else model.fambav
    assert torch.equal(hidden_states[0], base.embeddings(images())[0])
    assert torch.equal(base.norm(hidden_states[-1]), base(images()).last_hidden_state)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_token_maps(position, order):
    model = make_model(cls_token_position=position, fusion_order=order, num_hidden_layers=4, fusion_tokens=3)
    outputs = model(images(), output_token_maps=True)
    lengths = [17, 14, 11, 8]
    assert model.config.sequence_lengths == lengths
    assert isinstance(outputs.token_maps, tuple) and len(outputs.token_maps) == 4
    for token_map, length in zip(outputs.token_maps, lengths):
        assert token_map.dtype == torch.int64 and token_map.shape == (3, 17)
        assert all(set(image.tolist()) == set(range(length)) for image in token_map)
    assert torch.equal(outputs.token_maps[0], torch.arange(17).expand(3, -1))

    # Tokens once fused stay together.
    for token_map, later in zip(outputs.token_maps, outputs.token_maps[1:]):
        together = token_map.unsqueeze(1) == token_map.unsqueeze(2)
        assert (later.unsqueeze(1) == later.unsqueeze(2))[together].all()

    # The class token carries itself alone, and stands where the pooler output is read.
    last_map = outputs.token_maps[-1]
    class_place = last_map[:, 0 if position == "head" else 8]
    assert torch.equal(outputs.last_hidden_state[torch.arange(3), class_place], outputs.pooler_output)
    assert (last_map == class_place.unsqueeze(1)).sum(1).tolist() == [1, 1, 1]
    if order == "appended":
        assert class_place.tolist() == [0, 0, 0]

    dense = unmerge(outputs.last_hidden_state, last_map)
    assert dense.shape == (3, 17, 32)
    for b in range(3):
        assert torch.equal(dense[b], outputs.last_hidden_state[b, last_map[b]])

    classifier = FambaVForImageClassification(model.config)
    classifier.fambav = model
    for token_map, expected in zip(classifier(images(), output_token_maps=True).token_maps, outputs.token_maps):
        assert torch.equal(token_map, expected)


def test_asking_for_more_outputs_changes_nothing():
    model = make_model(cls_token_position="middle")
    plain = model(images()).last_hidden_state
    assert torch.equal(model(images(), output_token_maps=True, output_hidden_states=True).last_hidden_state, plain)


# ---- images of all kinds ----


@pytest.mark.parametrize("position", CLASS_POSITIONS)
@pytest.mark.parametrize(
    "fields, lengths",
    [
        ({"image_size": (16, 32)}, [33, 31, 29]),
        ({"image_size": (32, 16), "patch_stride": 2}, [106, 104, 102]),
        ({"num_channels": 1}, [17, 15, 13]),
        ({"image_size": 20}, [26, 24, 22]),  # 5 x 5 patches
        ({"image_size": (4, 12)}, [4, 3, 2]),  # three patches
        ({"image_size": (4, 8)}, [3, 2, 2]),  # two patches
        ({"image_size": 4, "fusion_strategy": "none"}, [2, 2, 2]),  # one patch
        ({"fusion_tokens": 10**9, "fusion_strategy": "all"}, [9, 5, 3]),
        ({"hidden_size": 20, "conv_kernel": 1, "state_size": 1, "expand": 1}, [17, 15, 13]),
        ({"num_hidden_layers": 1}, [15]),
    ],
    ids=str,
)
def test_geometries(fields, lengths, position):
    model = make_model(FambaVForImageClassification, cls_token_position=position, **fields)
    assert model.config.sequence_lengths == lengths
    for batch_size in (1, 2):
        outputs = model(images(batch_size, model.config), output_hidden_states=True)
        assert [states.shape[1] for states in outputs.hidden_states[1:]] == lengths
        assert outputs.logits.shape == (batch_size, 2) and outputs.logits.isfinite().all()
    outputs.logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.fambav.embeddings.patch_embeddings.projection.weight.grad.any()


@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_images_of_another_size(position):
    model = make_model(cls_token_position=position)
    outputs = model(random_tensor(2, 3, 24, 20, seed=0), interpolate_pos_encoding=True, output_token_maps=True)
    assert outputs.token_maps[0].shape == (2, 31)
    assert outputs.last_hidden_state.shape == (2, 27, 32)
    class_place = outputs.token_maps[-1][:, 0 if position == "head" else 15]
    assert torch.equal(outputs.last_hidden_state[torch.arange(2), class_place], outputs.pooler_output)

    same_size = model(images(), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(same_size, model(images()).last_hidden_state)


@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_position_embeddings_are_interpolated_by_row_and_column(position):
    embeddings = make_model(image_size=(16, 24), cls_token_position=position).embeddings
    for parameter in embeddings.parameters():
        parameter.data.zero_()
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    patches = torch.stack((rows, columns), dim=-1).flatten(0, 1)
    middle = 0 if position == "head" else 12
    positions = embeddings.position_embeddings.data[0]
    positions[middle] = 7
    positions[torch.arange(25) != middle, :2] = patches

    tokens, class_index = embeddings(torch.zeros(1, 3, 32, 48), interpolate_pos_encoding=True)
    assert class_index == (0 if position == "head" else 48)
    assert (tokens[0, class_index] == 7).all()
    grid = tokens[0, torch.arange(97) != class_index].unflatten(0, (8, 12))
    # Patch i of twice as many is at i/2 - 1/4 of the original grid; away from the border a ramp nearly stays a ramp.
    torch.testing.assert_close(grid[3:5, 0, 0], torch.tensor([1.25, 1.75]), rtol=0, atol=0.06)
    torch.testing.assert_close(grid[0, 4:8, 1], torch.tensor([1.75, 2.25, 2.75, 3.25]), rtol=0, atol=0.06)
    torch.testing.assert_close(grid[:, 0, 0], grid[:, 11, 0])
    torch.testing.assert_close(grid[0, :, 1], grid[7, :, 1])


@pytest.mark.parametrize("model_class", [FambaVModel, FambaVForImageClassification])
@pytest.mark.parametrize(
    "shape, arguments, message",
    [
        ((1, 3, 20, 16), {}, r"20 x 16 pixels: expected image_size=16, or interpolate_pos_encoding=True"),
        ((1, 3, 16, 3), {"interpolate_pos_encoding": True}, r"16 x 3 pixels: expected at least patch_size=4"),
        ((1, 4, 16, 16), {}, r"\(1, 4, 16, 16\): expected \(batch, num_channels=3, height, width\)"),
        ((3, 16, 16), {}, r"\(3, 16, 16\): expected \(batch, num_channels=3, height, width\)"),
    ],
)
def test_wrong_images(model_class, shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(model_class)(torch.zeros(shape), **arguments)


def test_height_and_width_are_not_interchangeable():
    with pytest.raises(ValueError, match=r"32 x 16 pixels: expected image_size=\(16, 32\)"):
        make_model(image_size=(16, 32))(torch.zeros(1, 3, 32, 16))


@pytest.mark.parametrize("model_class", [FambaVModel, FambaVForImageClassification])
def test_missing_pixel_values(model_class):
    with pytest.raises(ValueError, match="pixel_values is missing"):
        make_model(model_class)()


# ---- precision ----


@pytest.mark.parametrize("mode", ["weights", "autocast"])
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_bfloat16(mode, position):
    model = make_model(FambaVForImageClassification, cls_token_position=position, fusion_strategy="none")
    expected = model(images())
    if mode == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        outputs = model(images(), output_hidden_states=True, labels=torch.tensor([0, 1, 1]))
        assert outputs.logits.dtype == torch.bfloat16
        assert {states.dtype for states in outputs.hidden_states} == {torch.float32}  # the residual stream
        torch.testing.assert_close(outputs.logits.float(), expected.logits, **tolerance("scan", torch.bfloat16))

        # A rounded similarity may choose another partner, so with fusion there is nothing to compare.
        model.config.fusion_strategy = "all"
        outputs = model(images(), output_hidden_states=True, labels=torch.tensor([0, 1, 1]))
    assert outputs.hidden_states[-1].shape[1] == 11 and outputs.logits.isfinite().all()
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_residual_in_the_dtype_of_the_weights():
    model = make_model(residual_in_fp32=False).bfloat16()
    outputs = model(images(), output_hidden_states=True)
    assert {states.dtype for states in outputs.hidden_states} == {torch.bfloat16}
    assert outputs.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decays_skips_and_time_steps_stay_float32(dtype, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_chosen", backend)
    exact = make_model(FambaVForImageClassification, fusion_strategy="none")
    exact.save_pretrained(tmp_path / "float32")
    for source, target in (("float32", "half"), ("half", "again")):  # what was saved in half precision as well
        model = FambaVForImageClassification.from_pretrained(tmp_path / source, dtype=dtype)
        model.save_pretrained(tmp_path / target)
        expected = exact.state_dict()
        for name, parameter in model.named_parameters():
            is_kept = re.search(r"_scan\.(A_log|D|dt_proj\.bias)$", name) is not None
            assert parameter.dtype == (torch.float32 if is_kept else dtype), name
            assert torch.equal(parameter, expected[name].to(parameter.dtype)), name
    logits = model(images().to(dtype)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact(images()).logits, **tolerance("scan", torch.bfloat16))
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}  # as the docstring says


# ---- training ----


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_gradient_checkpointing_gives_the_same_gradients(position, use_reentrant):
    model = make_model(
        FambaVForImageClassification,
        cls_token_position=position,
        fusion_reduction="size_weighted",
        fusion_scale_time_step=True,
        drop_path_rate=0.3,
    ).train()
    expected = gradients(model, images())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients(model, images())
    assert expected.keys() == checkpointed.keys()
    assert expected["fambav.embeddings.cls_token"].any()
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda message: f"{name}: {message}")


def test_drop_path():
    drop_path = FambaVDropPath(0.25)
    tokens = random_tensor(4000, 2, 3, seed=0) + 1
    assert torch.equal(drop_path.eval()(tokens), tokens)
    torch.manual_seed(0)
    dropped = drop_path.train()(tokens)
    kept = (dropped != 0).flatten(1).any(1)
    torch.testing.assert_close(dropped[kept], tokens[kept] / 0.75)  # whole samples, the others are zero
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped.mean(0), tokens.mean(0), rtol=0, atol=0.05)


def test_drop_path_rises_linearly_and_acts_in_training_only():
    model = make_model(num_hidden_layers=5, drop_path_rate=0.4)
    rates = [layer.drop_path.drop_prob for layer in model.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    without = make_model(num_hidden_layers=5)
    assert torch.equal(model(images()).last_hidden_state, without(images()).last_hidden_state)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(images()).last_hidden_state, without(images()).last_hidden_state)


def test_dropout_acts_in_training_only():
    model = make_model(hidden_dropout_prob=0.5)
    expected = make_model()(images()).last_hidden_state
    assert torch.equal(model(images()).last_hidden_state, expected)
    assert not torch.allclose(model.train()(images()).last_hidden_state, expected)


def test_trainer_trains_and_saves(tmp_path):
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(num_labels=3, cls_token_position="middle"))
    before = copy.deepcopy(model.state_dict())
    examples = [{"pixel_values": images(1, seed=i)[0], "labels": i % 3} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples)
    assert trainer.train().global_step == 2
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(examples).predictions.shape == (4, 3)

    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(loaded) is FambaVForImageClassification
    assert torch.equal(loaded(images()).logits, model.eval()(images()).logits)


# ---- torch.compile ----


def compiled_gradients(backend: str, **fields) -> None:
    model = make_model(FambaVForImageClassification, fusion_strategy="all", num_hidden_layers=2, **fields)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images()).logits, model(images()).logits, rtol=1e-4, atol=1e-5)
    expected = gradients(model, images())
    for name, gradient in gradients(compiled, images()).items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("order", [pytest.param("raster", marks=pytest.mark.slow), "appended"])
@pytest.mark.parametrize("position", [pytest.param("head", marks=pytest.mark.slow), "middle"])
def test_the_whole_model_is_one_graph(position, order):
    compiled_gradients(
        "aot_eager",
        cls_token_position=position,
        fusion_order=order,
        fusion_reduction="size_weighted",
        fusion_scale_time_step=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_model_equals_eager_model():
    # 20 channels are not a whole number of the kernels' vectors, so outputs may have other strides than expected.
    compiled_gradients("inductor", cls_token_position="middle", hidden_size=20, expand=1)


# ---- Auto classes, saved folders ----


def test_auto_classes():
    assert type(AutoConfig.for_model("fambav", fusion_tokens=4)) is FambaVConfig
    config = tiny_config(num_labels=5)
    assert type(AutoModel.from_config(config)) is FambaVModel
    classifier = AutoModelForImageClassification.from_config(config)
    assert type(classifier) is FambaVForImageClassification and classifier.classifier.out_features == 5


def test_saved_folder(tmp_path):
    model = make_model(FambaVForImageClassification, num_labels=5, fusion_strategy="custom", fusion_schedule=[0, 3, 1])
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), ViTImageProcessorPil)
    assert AutoConfig.from_pretrained(tmp_path).tokens_removed == [0, 3, 1]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is FambaVModel
    assert torch.equal(base(images()).pooler_output, model.fambav(images()).pooler_output)


def test_fusion_fields_can_be_given_while_loading(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, fusion_strategy="all", fusion_tokens=3)
    assert loaded(images()).last_hidden_state.shape[1] == 17 - 3 * 3
