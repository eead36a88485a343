"""Token fusion drawn on an image, as arrays: patches that have become one token get one colour and an outline.

Glossary
    H, W             height and width of the image in pixels
    rows, columns    patches of the image
    T_0              tokens before the first layer, class token included
"""

import numpy as np

LINE_COLOR = (255, 127, 14)


def patch_tokens(token_map: np.ndarray, class_index: int, grid: tuple[int, int]) -> np.ndarray:
    """The token of every patch, where the patch lies.

    Args:
        token_map: int `(T_0,)`, the token that carries each initial token.
        class_index: place of the class token among the initial tokens.
        grid: rows and columns of patches; T_0 - 1 of them.

    Returns:
        int `(rows, columns)`, without the class token.
    """
    return np.delete(token_map, class_index).reshape(grid)


def spread_over_pixels(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """The token of every pixel: `(rows, columns)` to `(H, W)`. Patches that overlap share the image evenly."""
    rows, columns = tokens.shape
    row, column = np.arange(height) * rows // height, np.arange(width) * columns // width
    return tokens[row[:, np.newaxis], column]


def average_colors(pixels: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Fill every region with its average colour.

    Args:
        pixels: uint8 `(H, W, 3)`.
        regions: int `(H, W)`, the region of every pixel; a region need not be connected.

    Returns:
        uint8 `(H, W, 3)`.
    """
    _, index = np.unique(regions, return_inverse=True)
    index = index.ravel()
    sums = np.stack([np.bincount(index, weights=channel.ravel()) for channel in np.moveaxis(pixels, -1, 0)], axis=-1)
    colors = sums / np.bincount(index)[:, np.newaxis]
    return colors.round().astype(np.uint8)[index].reshape(pixels.shape)


def borders(regions: np.ndarray) -> np.ndarray:
    """Pixels that touch another region on a side: int `(H, W)` to bool `(H, W)`. A border is two pixels wide."""
    is_border = np.zeros(regions.shape, dtype=bool)
    differs = regions[1:] != regions[:-1]
    is_border[1:] |= differs
    is_border[:-1] |= differs
    differs = regions[:, 1:] != regions[:, :-1]
    is_border[:, 1:] |= differs
    is_border[:, :-1] |= differs
    return is_border


def magnify(values: np.ndarray, scale: int) -> np.ndarray:
    """Make a square of `scale` x `scale` pixels of every pixel: `(H, W, ...)` to `(H * scale, W * scale, ...)`."""
    return values.repeat(scale, axis=0).repeat(scale, axis=1)


def draw_tokens(
    pixels: np.ndarray, tokens: np.ndarray, scale: int = 1, line_color: tuple[int, int, int] = LINE_COLOR
) -> np.ndarray:
    """Fill all patches of a token with their average colour, and outline them.

    Args:
        pixels: uint8 `(H, W, 3)`, the image.
        tokens: int `(rows, columns)`, the token of every patch.
        scale: pixels of the drawing per pixel of the image, each way. Lines are two pixels wide at any scale.
        line_color: RGB.

    Returns:
        uint8 `(H * scale, W * scale, 3)`.
    """
    regions = spread_over_pixels(tokens, *pixels.shape[:2])
    drawing = magnify(average_colors(pixels, regions), scale)
    drawing[borders(magnify(regions, scale))] = line_color
    return drawing
