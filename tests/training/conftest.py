"""Keep the tests off the network and out of the user's caches, a browser, and a folder of images of many kinds."""

import signal
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from PIL import Image

from fambav_training.paper.runs import Run
from support.browser import open_browser
from support.helpers import noise
from support.table_runs import stand_in


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def default_signals():
    """Ctrl-C is an exception, also where the tests were started in the background, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def browser():
    with open_browser() as chromium:
        yield chromium


@pytest.fixture
def failing(monkeypatch) -> Iterator[set[str]]:
    """Runs of tables are stand-ins that take no time. Those of the cells in this set, empty at first, fail."""
    cells = set()
    monkeypatch.setattr(Run, "command", property(lambda run: stand_in(run, run.cell in cells)))
    handler = signal.getsignal(signal.SIGTERM)
    yield cells
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Folders train/{cat,dog} and test/{cat,dog} with files of many kinds, and more cats than dogs."""
    for split, counts in {"train": {"cat": 8, "dog": 6}, "test": {"cat": 2, "dog": 1}}.items():
        for label, count in counts.items():
            folder = tmp_path / "pets" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise(seed=i).save(folder / f"{i}.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turn by 90 degrees
    cats = tmp_path / "pets" / "train" / "cat"
    noise("L").save(cats / "grey.png")
    noise("RGBA").save(cats / "transparent.png")
    noise("P").save(cats / "palette.png", transparency=0)
    noise("I;16").save(cats / "16 bits.png")
    noise("CMYK").save(cats / "print.jpg")
    noise(width=31, height=5).save(cats / "odd.bmp")
    noise(width=24, height=16).save(cats / "rotated.jpg", exif=rotated)
    return tmp_path / "pets"
