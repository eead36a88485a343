"""The files of ONNX Runtime that a page needs: out of the npm package onnxruntime-web."""

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
_OTHERWISE = f"give --onnxruntime_web FOLDER, the folder of the package {PACKAGE} or of its files"
_SECONDS = 300


@contextmanager
def runtime_files(folder: Path | None) -> Iterator[Path]:
    """A folder with `FILES`: that of the package or of its `dist`, or, if None, one that npm fills for this context.

    Raises:
        ValueError: if a file is missing, or npm is, or it has no success.
    """
    if folder is not None:
        yield _checked(folder / "dist" if (folder / "dist").is_dir() else folder)
        return
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"{PACKAGE}: npm, which provides it, is not installed; install Node.js, or {_OTHERWISE}")
    with tempfile.TemporaryDirectory() as temporary:
        yield _checked(_download(npm, Path(temporary)))


def _checked(folder: Path) -> Path:
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: {', '.join(missing)} missing; {_OTHERWISE}, version {VERSION}")
    return folder


def _download(npm: str, folder: Path) -> Path:
    """Have npm put the package into a folder, and return the folder of its files."""
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", f"--pack-destination={folder}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.SubprocessError as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise ValueError(f"{' '.join(command[1:3])}: npm failed ({reason}); {_OTHERWISE}") from error
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as package:
        for name in FILES:
            member = package.extractfile(f"package/dist/{name}")
            with (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)
    return folder
