"""Token fusion drawn on an image: exact colours and borders, and the class token left out."""

import numpy as np
import pytest

from fambav_training.pictures.drawing import (
    LINE_COLOR,
    average_colors,
    borders,
    draw_tokens,
    patch_tokens,
    spread_over_pixels,
)
from support.helpers import noise

# Two rows of three patches: a token in two places, one of two patches that touch, two of a patch each
TOKENS = np.array([[4, 7, 7], [2, 0, 4]])


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
