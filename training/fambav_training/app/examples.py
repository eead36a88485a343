"""Examples of the page: images, each with a fusion to try, and what the model makes of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError

from fambav_training.app.trial import FusionTrial
from fambav_training.data.image_file import read_image
from fambav_training.fusion.targets import token_share

SETTINGS_FILE = "examples.json"
_FIELDS = {"image": str, "label": str, "fusion_strategy": str, "fusion_tokens": int}


class Example(NamedTuple):
    """An image file, the fusion to try on it, and one line that says what it shows."""

    path: Path
    strategy: str
    tokens: int
    shows: str


def make_examples(trial: FusionTrial, images: Sequence[Path]) -> list[Example]:
    """An example for every image, or as many as `examples.json` beside it has for it, in its order.

    That file is a list of `{"image": file name, "label": its class, "fusion_strategy": ..., "fusion_tokens": ...}`.
    Other images get the model's own fusion. What an example shows is what this model answers now.

    Raises:
        ValueError: if an image cannot be read, or the file has another form or a fusion that this model does not take.
    """
    found = []
    for folder in dict.fromkeys(path.parent for path in images):
        here = {path.name: path for path in images if path.parent == folder}
        settings = [entry for entry in _read_settings(folder) if entry["image"] in here]
        found += [_make(trial, here[entry["image"]], **_fusion_of(entry), label=entry["label"]) for entry in settings]
        others = here.keys() - {entry["image"] for entry in settings}
        config = trial.config
        tokens = max(1, min(config.fusion_tokens, trial.most_tokens))
        found += [_make(trial, here[name], config.fusion_strategy, tokens) for name in here if name in others]
    return found


def _read_settings(folder: Path) -> list[dict[str, Any]]:
    path = folder / SETTINGS_FILE
    if not path.exists():
        return []
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, {error}") from error
    for entry in settings if isinstance(settings, list) else [settings]:
        if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != _FIELDS:
            raise ValueError(f"{path}: {json.dumps(entry)}: expected the fields {list(_FIELDS)}, the last an integer")
    return settings if isinstance(settings, list) else [settings]


def _fusion_of(entry: dict[str, Any]) -> dict[str, Any]:
    return {"strategy": entry["fusion_strategy"], "tokens": entry["fusion_tokens"]}


def _make(trial: FusionTrial, path: Path, strategy: str, tokens: int, label: str | None = None) -> Example:
    try:
        answer = trial.answer(read_image(path), strategy, tokens)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"example {path.name}: {error.__cause__ or error}") from error
    said = f"{answer.trace.label}, {answer.trace.probability:.0%}"
    if label is not None:
        said = f"right: {said}" if answer.trace.label == label else f"wrong, it is a {label}: {said}"
    return Example(path, strategy, tokens, f"{said}; {token_share(answer.config):.0%} of the tokens scanned")
