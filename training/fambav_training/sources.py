"""What a folder or Hub id was taken for, when it cannot be loaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError


def kind_of(name: str) -> str:
    """In words: a name that is no folder can only be meant for the Hub, or be mistyped."""
    return "local folder" if Path(name).exists() else "Hub id (or a local folder that does not exist)"


@contextlib.contextmanager
def loading(name: str, flag: str = "") -> Iterator[None]:
    """Around `from_pretrained`, whose own errors need not name the model, and do not name the flag.

    Raises:
        OSError: of one line that names both, if there is no such model, or a file of it is missing or damaged.
    """
    try:
        yield
    except (OSError, HFValidationError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{flag} {name}: this {kind_of(name)} cannot be loaded: {reason}".lstrip()) from error
