"""Random and damaged checkpoint files: each is converted, or refused by one line; nothing is written then."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from convert_vim_checkpoint import ConversionError, convert
from support.helpers import read_fixture

FORMATS = [".safetensors", ".pth"]
TENSORS, _ = read_fixture("fambav_micro_none")
STATE = {name.removeprefix("state."): tensor for name, tensor in TENSORS.items() if name.startswith("state.")}
NAMES = sorted(STATE)
OTHER_NAMES = st.sampled_from(
    ["", "layers.1000000000.x", "layers.-1.x", "layers.0", "model", "head.weight.", "läyers"]
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 64]), max_size=5)
OTHER_VALUES = st.sampled_from([None, 3, "text", [1, 2], {"a": torch.zeros(1)}])
DTYPES = st.sampled_from([torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64])


@st.composite
def states(draw) -> dict:
    """The official state dict with some entries taken away, renamed, reshaped, or replaced."""
    state = dict(STATE)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(NAMES))
        kind = draw(st.sampled_from(["drop", "rename", "add", "reshape", "cast", "replace"]))
        if kind in ("drop", "rename") and name in state:
            value = state.pop(name)
            if kind == "rename":
                state[draw(OTHER_NAMES)] = value
        elif kind == "add":
            state[draw(OTHER_NAMES)] = torch.zeros(draw(SHAPES))
        elif kind == "reshape":
            state[name] = torch.zeros(draw(SHAPES))
        elif kind == "cast":
            state[name] = STATE[name].to(draw(DTYPES))
        elif kind == "replace":
            state[name] = draw(OTHER_VALUES)
    return state


def write(state: dict, path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items() if torch.is_tensor(value)}, path)
    else:
        torch.save(state, path)


def check(state: dict, suffix: str, damage) -> None:
    """Convert a file of this state, after `damage(bytes)`, into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, output = Path(folder) / f"checkpoint{suffix}", Path(folder) / "out"
        write(state, checkpoint)
        checkpoint.write_bytes(damage(checkpoint.read_bytes()))
        try:
            convert(checkpoint, output)
        except ConversionError as error:
            assert str(error) and not output.exists()
        else:
            assert (output / "model.safetensors").exists()
            assert all(torch.is_tensor(value) and value.is_floating_point() for value in state.values())


@st.composite
def damages(draw):
    """What a broken disk or download does to a file, in few of the cases nothing."""
    place = draw(st.floats(0, 1, exclude_max=True))
    kind = draw(st.sampled_from(["change", "cut", "zeros", "none"]))
    byte = draw(st.integers(0, 255))

    def damage(content: bytes) -> bytes:
        at = int(place * len(content))
        if kind == "change":
            return content[:at] + bytes([byte]) + content[at + 1 :]
        if kind == "zeros":
            return content[:at] + bytes(len(content) - at)
        return content[:at] if kind == "cut" else content

    return damage


@settings(max_examples=100, deadline=None, derandomize=True)
@given(states(), st.sampled_from(FORMATS))
def test_random_states(state, suffix):
    check(state, suffix, damage=lambda content: content)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(FORMATS), damages())
def test_damaged_files(suffix, damage):
    check(STATE, suffix, damage)


@pytest.mark.parametrize("operation", [0x81, 0x52, 0x75, 0x65, 0x86, 0x62], ids=hex)
def test_pickle_that_takes_from_an_empty_stack(operation):
    def damage(content: bytes) -> bytes:
        start = content.index(b"\x80\x02") + 2  # the first operation after the one that states the protocol
        return content[:start] + bytes([operation]) + content[start + 1 :]

    check(STATE, ".pth", damage)


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None, derandomize=True)
@given(states(), st.sampled_from(FORMATS), damages())
def test_two_thousand_random_files(state, suffix, damage):
    check(state, suffix, damage)
