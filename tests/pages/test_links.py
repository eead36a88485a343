"""Links lead somewhere, scripts in commands exist, and the first page is short."""

import re
from pathlib import Path

import pytest

from support.child_process import REPOSITORY
from support.pages import README, prose

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(REPOSITORY / folder / "README.md" for folder in ("modeling_fambav", "training", "model_cards")),
]
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def page_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings_that_exist(page):
    links = _LINK.findall(prose(page))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} in {page_name(page)}"
        if anchor:
            assert anchor in anchors(target), f"{link} in {page_name(page)}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_scripts_in_commands_exist(page):
    scripts = re.findall(r"(?<![\w/])training/[a-z_\d/]+\.(?:py|yaml|ipynb)\b", page.read_text(encoding="utf-8"))
    for script in scripts:
        assert (REPOSITORY / script).exists(), f"{script} in {page_name(page)}"


def test_the_first_page_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_a_space_needs_what_the_scripts_need():
    """The requirements.txt of the page on a Space has the bounds of pyproject.toml."""
    page = (REPOSITORY / "training" / "README.md").read_text(encoding="utf-8")
    wanted = re.search(r"`requirements.txt`.*?```\n(.*?)```", page, re.DOTALL)
    assert wanted is not None
    bounds = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert [line for line in wanted[1].split() if f'"{line}"' not in bounds] == []
