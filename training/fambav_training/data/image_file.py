"""Reading an image file that somebody chose."""

from pathlib import Path

from PIL import Image, ImageOps


def read_image(path: Path) -> Image.Image:
    """Read an image, upright.

    Raises:
        ValueError: if the file is missing or not an image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: this image cannot be read: {error}") from error
