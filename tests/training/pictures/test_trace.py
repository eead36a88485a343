"""Traces of real models: patches of a token are those of its map, and similarities are cosines."""

import numpy as np
import pytest
import torch

from fambav_training.evaluation.scoring import load_classifier
from fambav_training.pictures.drawing import average_colors, spread_over_pixels
from fambav_training.pictures.fusion_pictures import fusion_tiles
from fambav_training.pictures.trace import trace_fusion
from support.helpers import noise, save_classifier


@pytest.mark.parametrize("position", ["head", "middle"])
@pytest.mark.parametrize("order", ["raster", "appended"])
@pytest.mark.parametrize(
    "geometry", [{}, {"image_size": (12, 20)}, {"image_size": (20, 12), "patch_stride": 2}], ids=str
)
def test_every_token_but_the_class_token_is_one_region(tmp_path, position, order, geometry):
    fields = {"cls_token_position": position, "fusion_order": order, "fusion_strategy": "all", "fusion_tokens": 3}
    folder = save_classifier(tmp_path, **geometry, **fields)
    model, processor = load_classifier(str(folder), {})
    trace = trace_fusion(model, processor, noise(width=33, height=21))

    height, width = model.config.image_height_width
    lengths = model.config.sequence_lengths
    assert trace.pixels.shape == (height, width, 3) and len(trace.tokens) == 3
    for tokens, length in zip(trace.tokens, lengths):
        assert tokens.shape == model.config.patch_grid
        colors = average_colors(trace.pixels, spread_over_pixels(tokens, height, width))
        assert len(np.unique(tokens)) == len(np.unique(colors.reshape(-1, 3), axis=0)) == length - 1
    assert [len(matrix) for matrix in trace.similarities] == [model.config.num_patches + 1, *lengths[:-1]]
    titles = fusion_tiles(trace, [2])[1]
    assert titles[1] == f"layer 3: {lengths[2]} of {model.config.num_patches + 1} tokens"


@pytest.mark.parametrize("position, class_index", [("head", 0), ("middle", 8)])
def test_patches_are_those_of_the_token_map(tmp_path, position, class_index):
    folder = save_classifier(tmp_path, cls_token_position=position)
    model, processor = load_classifier(str(folder), {})
    image = noise(width=16, height=16)
    trace = trace_fusion(model, processor, image)
    with torch.no_grad():
        outputs = model(**processor([image], return_tensors="pt"), output_token_maps=True)
    for tokens, token_map in zip(trace.tokens, outputs.token_maps):
        carriers = token_map[0].tolist()
        class_token = carriers.pop(class_index)
        assert tokens.ravel().tolist() == carriers and class_token not in carriers
    assert trace.label == model.config.id2label[outputs.logits.argmax().item()]
    assert trace.probability == pytest.approx(outputs.logits.softmax(-1).max().item(), rel=1e-5)


def test_similarities_are_cosines_of_normed_tokens(tmp_path):
    model, processor = load_classifier(str(save_classifier(tmp_path)), {})
    image = noise(width=16, height=16)
    similarities = trace_fusion(model, processor, image).similarities
    with torch.no_grad():
        tokens, _ = model.fambav.embeddings(processor([image], return_tensors="pt")["pixel_values"])
        normed = model.fambav.layers[0].norm(tokens)[0]
    expected = torch.nn.functional.cosine_similarity(normed[:, None], normed[None], dim=-1)
    np.testing.assert_allclose(similarities[0], expected.numpy(), atol=1e-5)
    for matrix in similarities:
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-5)
