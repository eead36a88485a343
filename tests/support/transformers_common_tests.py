"""Make transformers' own common model tests importable as `transformers_tests`.

The wheel does not carry them, so they are taken from the source release of the installed version and kept in
`.cache/`. They are not called `tests`, as in the release, because that is the name of our own folder.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers

PACKAGE = "transformers_tests"
CACHE = Path(__file__).parents[2] / ".cache"

# The release holds tests/*.py without the sub-folders. This is what these files import from there: two classes of
# further tests (of exporters, and of text generation), and values other than the default of fields all configs have.
MISSING_NAMES = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "architectures": ["FambaVModel"],
            "chunk_size_feed_forward": 5,
            "dtype": "float16",
            "id2label": {0: "a", 1: "b", 2: "c"},
            "label2id": {"a": 0, "b": 1, "c": 2},
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
}


class NotAvailableError(Exception):
    """The source release could not be fetched."""


def prepare_common_tests() -> None:
    """After this call `import transformers_tests.test_modeling_common` works.

    Raises:
        NotAvailableError: if the tests are not in the cache and cannot be fetched.
    """
    sys.path.append(str(_cached_tests(transformers.__version__)))
    for name, content in MISSING_NAMES.items():
        module = ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module


def _cached_tests(version: str) -> Path:
    """Folder that holds the package, filled on first use: as a whole or not at all."""
    folder = CACHE / f"transformers-{version}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            archive = _download(version, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(archive, unpacked / PACKAGE)
            try:
                os.replace(unpacked, folder)
            except OSError:
                if not folder.exists():  # otherwise another process was faster
                    raise
    return folder


def _download(version: str, folder: Path) -> Path:
    """The archive of the source release, saved in `folder`."""
    requirement = f"transformers=={version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "10", "--dest", folder, requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise NotAvailableError(f"pip download {requirement} took longer than {error.timeout} s") from error
    except subprocess.CalledProcessError as error:
        last_line = (error.stderr.strip() or "no message").splitlines()[-1]
        raise NotAvailableError(f"pip download {requirement} failed: {last_line}") from error
    return next(folder.glob("*.tar.gz"))


def _unpack(archive: Path, package: Path) -> None:
    """Write the archive's tests/*.py into the folder `package`."""
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts  # transformers-x.y.z/tests/name.py
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                (package / parts[2]).write_bytes(tar.extractfile(member).read())
