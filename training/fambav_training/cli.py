"""Command-line arguments and YAML files: one set of names, that of the flags, for both.

The flags of a script are the fields of a dataclass plus the fields of `FambaVConfig`. A value given on the command
line wins over the file given by `--config`; a name that does not exist is an error that suggests the nearest one.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from modeling_fambav import FambaVConfig

Arguments = TypeVar("Arguments")


class ArgumentError(ValueError):
    """A flag or a key of a YAML file that is unknown or has a value of the wrong type."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line, `error: ...`, for what its user can put right: arguments, files, the Hub."""
    try:
        yield
    except (ValueError, StrictDataclassError, OSError) as error:
        sys.exit(f"error: {error}")


class _Parser(argparse.ArgumentParser):
    """Raises instead of leaving the process, so that callers can add the name of the file."""

    def error(self, message: str) -> typing.NoReturn:
        raise ArgumentError(message)


def model_fields() -> dict[str, Any]:
    """Fields that `FambaVConfig` adds to those of every configuration, with their types."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"auto_map"}
    return {field.name: field.type for field in dataclasses.fields(FambaVConfig) if field.name not in inherited}


def add_model_flags(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Add a flag for every field of `FambaVConfig` that begins with `prefix`.

    Those not given are absent from the parsed namespace.
    """
    group = parser.add_argument_group(
        "model", "fields of FambaVConfig; by default those of a checkpoint, if there is one"
    )
    descriptions = _field_descriptions()
    defaults = {field.name: field.default for field in dataclasses.fields(FambaVConfig)}
    for name, annotation in model_fields().items():
        if not name.startswith(prefix):
            continue
        words = f"{descriptions.get(name, '')} (default: {defaults[name]})".replace("%", "%%")
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=words, **_flag_options(annotation))


def _field_descriptions() -> dict[str, str]:
    """What the documentation of `FambaVConfig` says of each field, in one line."""
    section = inspect.cleandoc(FambaVConfig.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = {}
    for entry in re.split(r"\n(?=    \w)", f"\n{section}")[1:]:
        names, text = re.match(r"    ([\w, ]+) \(.*?\):\s+(.*)", entry, re.DOTALL).groups()
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()).replace("`", ""))
    return found


def config_overrides(namespace: argparse.Namespace) -> dict[str, Any]:
    """The fields of `FambaVConfig` that were given, as keyword arguments for it."""
    overrides = {name: getattr(namespace, name) for name in model_fields() if hasattr(namespace, name)}
    if isinstance(sides := overrides.get("image_size"), list):
        overrides["image_size"] = sides[0] if len(sides) == 1 else tuple(sides)
    return overrides


def parse_arguments(
    arguments_class: type[Arguments], description: str, argv: Sequence[str] | None = None
) -> tuple[Arguments, dict[str, Any]]:
    """Read the command line, and the YAML file that its `--config` names.

    Args:
        arguments_class: a dataclass whose fields are the script's own flags, each with `help` in its metadata.
        description: what the script does.
        argv: the command line without the program, `sys.argv[1:]` by default.

    Returns:
        an instance of `arguments_class`, and the `FambaVConfig` fields that were given.

    Raises:
        ArgumentError: if a name is unknown or a value has the wrong type.
    """
    parser = _Parser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="YAML file; its keys are the names of the flags")
    hints = typing.get_type_hints(arguments_class)
    for field in dataclasses.fields(arguments_class):
        parser.add_argument(
            f"--{field.name}",
            default=field.default,
            help=field.metadata["help"].replace("%", "%%"),
            **_flag_options(hints[field.name]),
        )
    add_model_flags(parser)

    namespace, unknown = parser.parse_known_args(argv)
    known = {action.dest for action in parser._actions} - {"help", "config"}
    for word in unknown:
        if word.startswith("--"):
            raise ArgumentError(_unknown(word, f"--{word[2:].split('=')[0]}", [f"--{name}" for name in known]))
        raise ArgumentError(f"{word!r}: expected a flag, got a value without one")
    if namespace.config is not None:
        # The file's values become the defaults, so that whatever is on the command line replaces them.
        parser.set_defaults(**_read_yaml(namespace.config, parser, known))
        namespace = parser.parse_args(argv)
    own = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(arguments_class)}
    return arguments_class(**own), config_overrides(namespace)


def _read_yaml(path: Path, parser: argparse.ArgumentParser, known: set[str]) -> dict[str, Any]:
    """Values of a YAML file, each read as the command line would read it."""
    try:
        # Every scalar as the text that it is: to YAML, `no` would be false, and the flags know their own types.
        content = yaml.load(path.read_text(), yaml.BaseLoader)
    except OSError as error:
        raise ArgumentError(f"--config {path}: cannot be read, {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--config {path}: not a YAML file, {error}") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ArgumentError(f"--config {path}: expected a mapping of flag names to values, got {content!r}")

    takes_list = {action.dest: action.nargs == "+" for action in parser._actions}
    values = {}
    for name, value in content.items():
        if name not in known:
            raise ArgumentError(f"{path}: {_unknown(repr(name), str(name), known)}")
        if value in ("", "~", "null"):
            continue
        words = value if isinstance(value, list) else [value]
        is_list_of_text = bool(words) and all(isinstance(word, str) for word in words)
        if not is_list_of_text or (isinstance(value, list) and not takes_list[name]):
            expected = "a list of values" if takes_list[name] else "one value"
            raise ArgumentError(f"{path}: --{name}: expected {expected}, got {value!r}")
        try:
            values[name] = getattr(parser.parse_args([f"--{name}", *words]), name)
        except ArgumentError as error:
            raise ArgumentError(f"{path}: {error}") from error
    return values


def _unknown(shown: str, name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    suggestion = f"did you mean {nearest[0]!r}?" if nearest else f"known names: {', '.join(sorted(known))}"
    return f"{shown}: no such name; {suggestion}"


def _flag_options(annotation: Any) -> dict[str, Any]:
    """`add_argument` options for a type. Ranges are the business of the class that receives the value."""
    members = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
    origins = [typing.get_origin(member) for member in members]
    if list in origins:
        return {"nargs": "+", "type": _convert(int), "metavar": "N"}
    if typing.Literal in origins:
        choices = typing.get_args(members[origins.index(typing.Literal)])
        return {"type": str, "metavar": "{" + ",".join(choices) + "}"}
    if bool in members:
        return {"nargs": "?", "const": True, "type": _convert(_boolean), "metavar": "BOOL"}
    if str in members and int in members:
        return {"type": _integer_or_word, "metavar": "N"}
    scalar = next(kind for kind in (float, int, Path, str) if kind in members)
    return {"type": scalar if scalar is str else _convert(scalar), "metavar": scalar.__name__.upper()}


def _convert(kind):
    """`kind`, under the name that argparse shows when a value is not one."""

    def converter(word: str):
        return kind(word)

    converter.__name__ = kind.__name__.strip("_")
    return converter


def _boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError(word)
    return word.lower() == "true"


def _integer_or_word(word: str) -> int | str:
    return int(word) if word.lstrip("-").isdigit() else word
