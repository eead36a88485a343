"""Pictures of token fusion: exact colours and borders, the class token left out, files, and clear errors."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import visualize_fusion
from fambav_training.pictures.drawing import (
    LINE_COLOR,
    average_colors,
    borders,
    draw_tokens,
    patch_tokens,
    spread_over_pixels,
)
from fambav_training.pictures.figures import columns_for, heat_map_figure, tile_figure
from support.helpers import noise, save_classifier

# Two rows of three patches: a token in two places, one of two patches that touch, two of a patch each
TOKENS = np.array([[4, 7, 7], [2, 0, 4]])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("model"))


def run(monkeypatch, folder, *words) -> list[str]:
    """Run the command line; the names of the files that it wrote."""
    monkeypatch.setattr(sys, "argv", ["visualize_fusion.py", *map(str, words), "--output_dir", str(folder)])
    visualize_fusion.main()
    return sorted(file.name for file in folder.iterdir())


# ---- drawing ----


def test_regions_have_their_average_color():
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[:2, :2] = 10  # token 4, its first patch
    pixels[2:, 4:] = [[[20, 30, 255], [20, 30, 0]], [[20, 30, 255], [20, 30, 0]]]  # and its second
    pixels[0, 2] = (200, 100, 40)  # token 7: one pixel of eight
    pixels[2:, :2] = (1, 2, 3)  # token 2
    colors = {4: (15, 20, 69), 7: (25, 12, 5), 2: (1, 2, 3), 0: (0, 0, 0)}  # 68.75 and 12.5 are rounded
    regions = spread_over_pixels(TOKENS, 4, 6)
    expected = np.array([[colors[token] for token in row] for row in regions.tolist()])
    np.testing.assert_array_equal(average_colors(pixels, regions), expected)


def test_borders_are_where_the_token_changes():
    regions = spread_over_pixels(TOKENS, 8, 12)
    drawn = ["".join(".#"[pixel] for pixel in row) for row in borders(regions).astype(int)]
    assert drawn == [
        "...##.......",
        "...##.......",
        "...##.......",
        "############",
        "############",
        "...##..##...",
        "...##..##...",
        "...##..##...",
    ]


def test_a_drawing_is_magnified_colors_with_thin_lines():
    pixels = np.array(noise(width=6, height=4))
    drawing = draw_tokens(pixels, TOKENS, scale=5)
    is_line = borders(spread_over_pixels(TOKENS, 20, 30))
    colors = average_colors(pixels, spread_over_pixels(TOKENS, 4, 6)).repeat(5, axis=0).repeat(5, axis=1)
    assert (drawing[is_line] == LINE_COLOR).all()
    np.testing.assert_array_equal(drawing[~is_line], colors[~is_line])


def test_one_token_has_no_border():
    assert not borders(np.full((4, 6), 3)).any()


@pytest.mark.parametrize(
    "class_index, token_map", [(0, [9, 4, 7, 7, 2, 0, 4]), (3, [4, 7, 7, 9, 2, 0, 4])], ids=["head", "middle"]
)
def test_the_class_token_is_left_out(class_index, token_map):
    np.testing.assert_array_equal(patch_tokens(np.array(token_map), class_index, (2, 3)), TOKENS)


def test_patches_that_overlap_share_the_image():
    # 3 x 2 patches on 7 x 5 pixels
    regions = spread_over_pixels(np.arange(6).reshape(3, 2), 7, 5)
    assert regions[:, 0].tolist() == [0, 0, 0, 2, 2, 4, 4]
    assert regions[0].tolist() == [0, 0, 0, 1, 1]


# ---- figures ----


def test_tiles_are_in_the_figure_pixel_by_pixel():
    tiles = [np.array(noise(width=120, height=70, seed=seed)) for seed in range(3)]
    figure = tile_figure(tiles, ["one", "two", "three"], ["a $heading$ that is no formula"])
    for tile in tiles:
        places = np.argwhere((figure == tile[0, 0]).all(axis=-1))
        assert any(np.array_equal(figure[y : y + 70, x : x + 120], tile) for y, x in places)


def test_heat_maps_of_any_number_of_tokens():
    matrices = [np.eye(size, dtype=np.float32) for size in (300, 5)]
    height, width, channels = heat_map_figure(matrices, ["one", "two"], ["heading"]).shape
    assert channels == 3 and width > height


@pytest.mark.parametrize("num_tiles, columns", [(1, 1), (2, 2), (3, 3), (6, 3), (7, 4), (20, 5), (24, 6), (25, 5)])
def test_tiles_leave_few_places_empty(num_tiles, columns):
    assert columns_for(num_tiles) == columns


# ---- tracing ----


@pytest.mark.parametrize("position", ["head", "middle"])
@pytest.mark.parametrize("order", ["raster", "appended"])
@pytest.mark.parametrize(
    "geometry", [{}, {"image_size": (12, 20)}, {"image_size": (20, 12), "patch_stride": 2}], ids=str
)
def test_every_token_but_the_class_token_is_one_region(tmp_path, position, order, geometry):
    fields = {"cls_token_position": position, "fusion_order": order, "fusion_strategy": "all", "fusion_tokens": 3}
    folder = save_classifier(tmp_path, **geometry, **fields)
    model, processor = visualize_fusion.load_classifier(str(folder), {})
    trace = visualize_fusion.trace_fusion(model, processor, noise(width=33, height=21))

    height, width = model.config.image_height_width
    lengths = model.config.sequence_lengths
    assert trace.pixels.shape == (height, width, 3) and len(trace.tokens) == 3
    for tokens, length in zip(trace.tokens, lengths):
        assert tokens.shape == model.config.patch_grid
        colors = average_colors(trace.pixels, spread_over_pixels(tokens, height, width))
        assert len(np.unique(tokens)) == len(np.unique(colors.reshape(-1, 3), axis=0)) == length - 1
    assert [len(matrix) for matrix in trace.similarities] == [model.config.num_patches + 1, *lengths[:-1]]
    titles = visualize_fusion.fusion_tiles(trace, [2])[1]
    assert titles[1] == f"layer 3: {lengths[2]} of {model.config.num_patches + 1} tokens"


@pytest.mark.parametrize("position, class_index", [("head", 0), ("middle", 8)])
def test_patches_are_those_of_the_token_map(tmp_path, position, class_index):
    folder = save_classifier(tmp_path, cls_token_position=position)
    model, processor = visualize_fusion.load_classifier(str(folder), {})
    image = noise(width=16, height=16)
    trace = visualize_fusion.trace_fusion(model, processor, image)
    with torch.no_grad():
        outputs = model(**processor([image], return_tensors="pt"), output_token_maps=True)
    for tokens, token_map in zip(trace.tokens, outputs.token_maps):
        carriers = token_map[0].tolist()
        class_token = carriers.pop(class_index)
        assert tokens.ravel().tolist() == carriers and class_token not in carriers
    assert trace.label == model.config.id2label[outputs.logits.argmax().item()]
    assert trace.probability == pytest.approx(outputs.logits.softmax(-1).max().item(), rel=1e-5)


def test_similarities_are_cosines_of_normed_tokens(model_folder):
    model, processor = visualize_fusion.load_classifier(str(model_folder), {})
    image = noise(width=16, height=16)
    similarities = visualize_fusion.trace_fusion(model, processor, image).similarities
    with torch.no_grad():
        tokens, _ = model.fambav.embeddings(processor([image], return_tensors="pt")["pixel_values"])
        normed = model.fambav.layers[0].norm(tokens)[0]
    expected = torch.nn.functional.cosine_similarity(normed[:, None], normed[None], dim=-1)
    np.testing.assert_allclose(similarities[0], expected.numpy(), atol=1e-5)
    for matrix in similarities:
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-5)


# ---- the command ----


def test_one_image(model_folder, monkeypatch, tmp_path, capsys):
    noise(width=40, height=30).save(tmp_path / "photo.png")
    files = run(monkeypatch, tmp_path / "out", model_folder, tmp_path / "photo.png")
    assert files == ["photo_fusion.png", "photo_similarity.png"]
    for name in files:
        assert min(Image.open(tmp_path / "out" / name).size) > 200
    assert "photo_fusion.png" in capsys.readouterr().out


def test_images_of_any_mode_and_size(monkeypatch, tmp_path):
    folder = save_classifier(tmp_path / "model", image_size=(8, 24))
    shapes = {"L": (5, 50), "1": (9, 9), "P": (1, 1), "RGBA": (64, 16), "CMYK": (30, 20), "I;16": (8, 8)}
    names = [f"{index}.{'jpg' if mode == 'CMYK' else 'png'}" for index, mode in enumerate(shapes)]
    for name, (mode, (width, height)) in zip(names, shapes.items()):
        noise(mode, width, height).save(tmp_path / name)
    files = run(monkeypatch, tmp_path / "out", folder, *(tmp_path / name for name in names))
    assert len(files) == 2 * len(names)
    sizes = {Image.open(tmp_path / "out" / name).size for name in files if name.endswith("_fusion.png")}
    assert len(sizes) == 1


def test_a_rotated_photo_is_shown_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise(width=40, height=30).save(tmp_path / "photo.jpg", exif=exif)
    assert visualize_fusion.read_image(tmp_path / "photo.jpg").size == (30, 40)


def test_an_animation_has_a_frame_per_layer(model_folder, monkeypatch, tmp_path):
    noise().save(tmp_path / "a.png")
    words = [model_folder, tmp_path / "a.png", "--gif", "--layers", 3, 1, "--fusion_strategy", "all"]
    assert "a_fusion.gif" in run(monkeypatch, tmp_path / "out", *words)
    with Image.open(tmp_path / "out" / "a_fusion.gif") as animation:
        assert animation.n_frames == 2 and animation.width > 400


def test_without_fusion_there_is_a_tile_and_a_sentence(model_folder, monkeypatch, tmp_path, capsys):
    noise().save(tmp_path / "a.png")
    words = [model_folder, tmp_path / "a.png", "--fusion_strategy", "none", "--gif"]
    assert len(run(monkeypatch, tmp_path / "out", *words)) == 3
    assert "No layer fuses: all 3 scan 17 tokens." in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "a_fusion.gif") as animation:
        assert animation.n_frames == 1


def test_another_model_is_refused(monkeypatch, tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    noise().save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "out", tmp_path / "vit", tmp_path / "a.png")
    assert "'vit'" in end.value.code and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["missing.png"], "missing.png: no such image"),
        (["text.png"], "text.png: this image cannot be read"),
        (["cut.png"], "cut.png: this image cannot be read"),
        (["a.png", "a.jpg"], "a.jpg: its pictures would replace those of"),
        (["a.png", "--layers", "4"], "--layers 4: expected numbers from 1 to 3"),
        (["a.png", "--layers", "0"], "--layers 0: expected numbers from 1 to 3"),
        (["a.png", "--fusion_tokens", "0"], "fusion_tokens=0"),
    ],
    ids=str,
)
def test_errors_are_one_line(model_folder, monkeypatch, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    noise().save("a.png")
    noise().save("a.jpg")
    (tmp_path / "text.png").write_text("no image")
    noise(width=64, height=64).save("whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "out", model_folder, *words)
    assert end.value.code.startswith("error: ") and expected in end.value.code
    assert not (tmp_path / "out").exists()
