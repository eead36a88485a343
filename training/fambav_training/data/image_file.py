"""Image files that somebody chose: finding and reading them."""

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


def find_examples(model: str, given: list[Path] | None) -> list[Path]:
    """The images to choose from: those given, or those in the folder `examples` of the model's folder.

    Raises:
        ValueError: if one that was given is missing or no image.
    """
    suffixes = Image.registered_extensions()
    if given is not None:
        if wrong := [path for path in given if not path.is_file() or path.suffix.lower() not in suffixes]:
            raise ValueError(f"--examples {wrong[0]}: no such image")
        return given
    return [path for path in sorted(Path(model, "examples").glob("*")) if path.suffix.lower() in suffixes]
