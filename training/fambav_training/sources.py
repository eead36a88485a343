"""What a folder or Hub id was taken for, when it cannot be loaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import HFValidationError


def kind_of(name: str) -> str:
    """In words: a name that is no folder can only be meant for the Hub, or be mistyped."""
    return "local folder" if Path(name).exists() else "Hub id (or a local folder that does not exist)"


@contextlib.contextmanager
def loading(name: str, flag: str = "") -> Iterator[None]:
    """Around `from_pretrained`, whose own errors name neither the model nor the flag.

    Raises:
        OSError: with both, if there is no such model.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        raise OSError(f"{flag} {name}: this {kind_of(name)} cannot be loaded: {error}".lstrip()) from error
