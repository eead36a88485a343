"""Random and damaged image files: each becomes pixels, or is counted as one that cannot be read."""

import io
import struct
import warnings
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.data.pixels import CorruptImageError, _Reader
from support.helpers import noise

PROCESSOR = ViTImageProcessorPil(size={"height": 12, "width": 16}, do_convert_rgb=True)
# Formats of files, with the modes that they keep
FORMATS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "GIF": ["L", "P", "RGB"],
    "BMP": ["1", "L", "P", "RGB"],
    "TIFF": ["1", "L", "RGB", "RGBA", "CMYK", "F", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "PPM": ["L", "RGB"],
    "TGA": ["L", "RGB", "RGBA"],
    "ICO": ["RGBA"],
}


@st.composite
def files(draw) -> bytes:
    """An image as a file, in most cases with some bytes changed, cut off, or put in between."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[name]))
    file = io.BytesIO()
    noise(mode, draw(st.integers(1, 40)), draw(st.integers(1, 40)), seed=draw(st.integers(0, 3))).save(file, name)
    content = bytearray(file.getvalue())
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, min(len(content), 200)) | st.integers(0, len(content)))
        kind = draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change" and place < len(content):
            content[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, len(content) + 1))]
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


def read(content: bytes) -> torch.Tensor | None:
    """Pixels of a file, or None if the reader counts it as corrupt."""
    row = {"image": {"bytes": content, "path": None}, "label": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged files
        item = _Reader("image", "label", PROCESSOR, max_corrupt=1).read(row, 0)
    return None if item is None else item[0]


def check(content: bytes) -> None:
    pixels = read(content)
    assert pixels is None or (pixels.dtype, pixels.shape) == (torch.uint8, (3, 12, 16))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(files())
def test_random_files(content):
    check(content)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True)
@given(files())
def test_ten_thousand_random_files(content):
    check(content)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=64))
def test_random_bytes_are_no_image(content):
    assert read(content) is None


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that say they are an image of this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(2**31 - 1, 2**31 - 1), (60_000, 60_000), (1, 2**31 - 1), (0, 5)])
def test_sizes_that_no_memory_holds_are_refused(width, height):
    row = {"image": {"bytes": png_of_size(width, height), "path": "huge.png"}, "label": 0}
    with pytest.raises(CorruptImageError, match=r"^image 7 \(huge.png\) cannot be read: "):
        _Reader("image", "label", PROCESSOR, max_corrupt=0).read(row, 7)
