"""What a teacher says of fixed views of every training image: computed once, stored, and trained on in many runs.

    OUT/data/train-00000-of-00025.parquet   a row per image, see `Manifest.features`; `load_dataset(OUT)` reads it
    OUT/teacher_views.json                  how it was made: teacher, data, views

An image is found again by a digest of its pixels, so that splits, subsets and the order of the images may change. A
teacher that sees the same crops in every epoch is what its authors call consistent (Beyer et al., "Knowledge
distillation: A good teacher is patient and consistent", 2022, arXiv:2106.05237).
"""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, List, Value
from torch import Tensor

from fambav_training.data.crops import Crops, take_crops
from fambav_training.data.pixels import CachedImages
from fambav_training.files import atomic_file
from fambav_training.machine.transfer import to_device

MANIFEST = "teacher_views.json"
_FORMAT = 1


class TeacherViewsError(ValueError):
    """Stored views that are missing, unfinished, damaged, or not of these images or classes."""


@dataclass(frozen=True)
class Manifest:
    """How the views of a folder were made; two folders with the same one hold the same.

    Attributes:
        teacher, teacher_sha256: name and digest of the weights.
        teacher_pretrained_on: data that it had seen before, if it says so.
        dataset, split: where the images come from.
        image_height, image_width: size of the student's images in pixels.
        fill: colour of the padding, that of a normalised zero.
        padding, horizontal_flip_prob, views, seed: of the views.
        mixed_precision: "bf16" if the teacher's products were in bfloat16, else "no".
        label_names: class of each logit.
        images, images_per_file: how many there are, and how many to a file.
    """

    teacher: str
    teacher_sha256: str
    dataset: str
    split: str
    image_height: int
    image_width: int
    fill: list[int]
    padding: int
    horizontal_flip_prob: float
    views: int
    seed: int
    label_names: list[str]
    images: int
    images_per_file: int
    teacher_pretrained_on: str | None = None
    mixed_precision: str = "no"
    format: int = _FORMAT

    @property
    def num_files(self) -> int:
        """Files that a finished folder has."""
        return -(-self.images // self.images_per_file)

    def file(self, folder: Path, index: int) -> Path:
        """Where the rows of the images from `index * images_per_file` on belong."""
        return folder / "data" / f"train-{index:05d}-of-{self.num_files:05d}.parquet"

    def features(self) -> Features:
        """Columns of the files."""
        return Features(
            {
                "pixels_digest": Value("int64"),
                "top": List(Value("uint8"), length=self.views),
                "left": List(Value("uint8"), length=self.views),
                "flip": List(Value("bool"), length=self.views),
                "logits": List(List(Value("float16"), length=len(self.label_names)), length=self.views),
            }
        )


def digest_pixels(pixels: Tensor) -> np.ndarray:
    """A digest `(B,)` int64 of each of the uint8 images `(B, C, H, W)`."""
    images = pixels.contiguous().numpy()
    digests = b"".join(hashlib.blake2b(image, digest_size=8).digest() for image in images)
    return np.frombuffer(digests, dtype="<i8").astype(np.int64)


def begin(folder: Path, manifest: Manifest) -> list[int]:
    """Make or continue a folder of views. Returns the indices of the files that are still to be written.

    Raises:
        TeacherViewsError: if the folder holds something else.
    """
    path = folder / MANIFEST
    if path.exists():
        existing = read_manifest(folder)
        for field in dataclasses.fields(Manifest):
            found, expected = getattr(existing, field.name), getattr(manifest, field.name)
            if found != expected:
                raise TeacherViewsError(
                    f"{folder}: holds views with {field.name} {_short(found)}, not {_short(expected)}; expected the "
                    "same, or another folder"
                )
    elif folder.exists() and any(folder.iterdir()):
        raise TeacherViewsError(f"{folder}: expected a folder that is new, empty or of stored views")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as new:
            new.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
    return [index for index in range(manifest.num_files) if not manifest.file(folder, index).exists()]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_file(
    folder: Path, manifest: Manifest, index: int, digests: np.ndarray, crops: Crops, logits: Tensor
) -> None:
    """Write one file, whole or not at all.

    Args:
        folder, manifest, index: which one.
        digests: `(B,)`, of the images.
        crops: `(B, K)`, the views of them.
        logits: `(B, K, classes)`, what the teacher says.
    """
    columns = [digests, crops.top.numpy(), crops.left.numpy(), crops.flip.numpy(), logits.half().numpy()]
    schema = manifest.features().arrow_schema
    arrays = [_to_arrow(values).cast(field.type) for values, field in zip(columns, schema)]
    path = manifest.file(folder, index)
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as new:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), new)


def _to_arrow(values: np.ndarray) -> pa.Array:
    """An array of n dimensions as lists of fixed length in each other."""
    array = pa.array(values.ravel())
    for length in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array


def read_manifest(folder: Path) -> Manifest:
    """How the views of a folder were made.

    Raises:
        TeacherViewsError: if that is not said, or not in a way that is understood.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise TeacherViewsError(f"{folder}: expected {MANIFEST} in it, as store_teacher_views.py leaves it")
    try:
        content = json.loads(path.read_text())
        if content.get("format") != _FORMAT:
            raise TeacherViewsError(f"{path}: format {content.get('format')}, expected {_FORMAT}")
        return Manifest(**content)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise TeacherViewsError(f"{path}: damaged, {error}") from error


class TeacherViews:
    """Stored views in memory: 2 bytes per image, view and class."""

    is_unfused = False  # a teacher of ours may be; what is stored does not say so

    def __init__(self, folder: Path, label_names: list[str]):
        """Read all files; `label_names` are the student's classes, by index.

        Raises:
            TeacherViewsError: if files are missing or damaged, or the teacher does not know a class.
        """
        self.manifest = manifest = read_manifest(folder)
        self.name, self.pretrained_on, self.views = manifest.teacher, manifest.teacher_pretrained_on, manifest.views
        self._folder = folder
        columns = [_read_file(folder, manifest, index) for index in range(manifest.num_files)]
        digests, tops, lefts, flips, logits = (np.concatenate(parts) for parts in zip(*columns))
        order = np.argsort(digests, kind="stable")
        self._digests, self._crops = digests[order], Crops(*(torch.from_numpy(x[order]) for x in (tops, lefts, flips)))
        self._logits = torch.from_numpy(logits[order])
        known = {name: index for index, name in enumerate(manifest.label_names)}
        if unknown := [name for name in label_names if name not in known]:
            raise TeacherViewsError(f"{folder}: has no logit of class {unknown[0]!r} of the data")
        self._classes = torch.tensor([known[name] for name in label_names])
        self._fill = torch.tensor(manifest.fill, dtype=torch.uint8)

    def rows(self, pixels: Tensor) -> np.ndarray:
        """Row `(B,)` of each of the uint8 images `(B, C, H, W)`, for `draw`.

        No tensor: they are looked up on the host, and whatever moves a batch to a device moves its tensors.

        Raises:
            TeacherViewsError: if one of them was not stored.
        """
        manifest = self.manifest
        if tuple(pixels.shape[-2:]) != (manifest.image_height, manifest.image_width):
            raise TeacherViewsError(
                f"{self._folder}: made of images of {manifest.image_height} x {manifest.image_width} pixels, these "
                f"have {pixels.shape[-2]} x {pixels.shape[-1]}"
            )
        digests = digest_pixels(pixels)
        rows = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        unknown = np.flatnonzero(self._digests[rows] != digests)
        if len(unknown):
            raise TeacherViewsError(
                f"{self._folder}: holds no views of {len(unknown)} of {len(digests)} images; expected all training "
                f"images; it holds {manifest.images} of split {manifest.split!r} of {manifest.dataset}"
            )
        return rows

    def draw(self, pixels: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """A random one of the views of each image, by torch's generator of the CPU.

        Args:
            pixels: `(B, C, H, W)` uint8.
            rows: `(B,)`, as `rows` gives them.

        Returns:
            the views, `(B, C, H, W)` uint8, and the teacher's logits `(B, classes)` of them in float32, both where
            `pixels` are.
        """
        chosen = torch.from_numpy(rows), torch.randint(self.manifest.views, rows.shape)
        crops = Crops(*(values[chosen] for values in self._crops))
        views = take_crops(pixels, crops, self.manifest.padding, self._fill)
        return views, to_device(self._logits[chosen][:, self._classes].float(), pixels.device)

    @functools.cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256(self._digests.tobytes())
        for values in (*self._crops, self._logits):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of what is stored: a folder of the same name may hold other views when a run is resumed."""
        return self._sha256


class ImagesWithRows(torch.utils.data.Dataset):
    """Training images with the rows of their stored views: an item is `(pixels, label, row)`."""

    def __init__(self, images: torch.utils.data.Dataset, views: TeacherViews):
        """Images that are kept in memory are looked for at once.

        Raises:
            TeacherViewsError: if one of them was not stored.
        """
        self._images, self._views = images, views
        self._rows = views.rows(images.pixels) if isinstance(images, CachedImages) else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, np.ndarray]:
        """A whole batch at once."""
        pixels, labels = self._images.__getitems__(indices)
        return pixels, labels, self._views.rows(pixels) if self._rows is None else self._rows[indices]


def _read_file(folder: Path, manifest: Manifest, index: int) -> tuple[np.ndarray, ...]:
    path = manifest.file(folder, index)
    if not path.is_file():
        raise TeacherViewsError(f"{folder}: {path.name} is missing; run the command that made it again, it resumes")
    shapes = {
        "pixels_digest": (),
        "top": (manifest.views,),
        "left": (manifest.views,),
        "flip": (manifest.views,),
        "logits": (manifest.views, len(manifest.label_names)),
    }
    num_images = min(manifest.images_per_file, manifest.images - index * manifest.images_per_file)
    try:
        table = pq.read_table(path, columns=list(shapes))
        return tuple(_to_numpy(table[name], (num_images, *shape)) for name, shape in shapes.items())
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors and KeyErrors
        raise TeacherViewsError(f"{path}: damaged, {error}; delete it, and run the command that made it") from error


def _to_numpy(column, shape: tuple[int, ...]) -> np.ndarray:
    values = column.combine_chunks()
    while hasattr(values, "flatten") and values.type.num_fields == 1:
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape)
