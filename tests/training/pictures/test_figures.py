"""Figures as arrays: tiles pixel by pixel, maps of any size, and few empty places."""

import numpy as np
import pytest

from fambav_training.pictures.figures import columns_for, heat_map_figure, tile_figure
from support.helpers import noise


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
