"""What the pages say, and the files that hold what was measured."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from support.child_process import REPOSITORY

README, MODEL_CARDS = REPOSITORY / "README.md", REPOSITORY / "model_cards" / "README.md"
MEASURED = REPOSITORY / "model_cards"
_CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

Rows = list[list[str]]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))


def sentences(page: Path) -> str:
    """A page in one line, so that a sentence is found wherever it is broken."""
    return " ".join(page.read_text(encoding="utf-8").split())


def tables(page: Path) -> dict[str, Rows]:
    """The Markdown tables of a page outside code: header as it is written, and cells of the rows below it."""
    found: dict[str, Rows] = {}
    header = None
    for line, below in pairwise([*prose(page).splitlines(), ""]):
        if not line.startswith("|"):
            header = None
        elif re.fullmatch(r"[|\s:-]+", below) and header is None:
            assert line not in found, f"two tables with the header {line}"
            header, found[line] = line, []
        elif header is not None and not re.fullmatch(r"[|\s:-]+", line):
            found[header].append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def read_json(*path: str) -> dict[str, Any]:
    return json.loads(MEASURED.joinpath(*path).read_text(encoding="utf-8"))
