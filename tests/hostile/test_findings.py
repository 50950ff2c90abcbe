"""The list of findings in the documents is that of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loratool.core.finding import SEVERITIES
from loratool.core.registry import checks
from tests.hostile.cases import FILES
from tests.hostile.make_findings import ORDER, WITHOUT_CASE
from tests.hostile.places import PLACES

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
ROW = re.compile(r"^\| `([a-z0-9-]+)` \| (\w+) \| (.+?) \| `(.+)` \|$")


def test_codes_and_documents_are_equal() -> None:
    documented: dict[str, dict[str, tuple[str, str]]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            documented[line[3:]] = {}
        elif match := ROW.match(line):
            code, severity, title, _ = match.groups()
            documented[next(reversed(documented))][code] = (severity, title)
    expected = {
        check.title: {code.id: (code.severity, code.title) for code in check.codes.values()}
        for check in checks().values()
    }
    assert {title: rows for title, rows in documented.items() if rows} == expected


def test_codes_are_of_one_check_each() -> None:
    listed = [code for check in checks().values() for code in check.codes]
    assert len(set(listed)) == len(listed)
    assert {code.severity for check in checks().values() for code in check.codes.values()} == set(SEVERITIES)
    assert set(ORDER) == checks().keys()


def test_figures_are_true() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"makes {len(FILES) + len(PLACES)} files and folders" in text


@pytest.mark.parametrize("check", checks().values(), ids=lambda check: check.id)
def test_every_code_has_an_example(check: object) -> None:
    cases = {code for case in (*FILES, *PLACES) for code in case.found.split()}
    assert set(check.codes) <= cases | WITHOUT_CASE.keys()  # type: ignore[attr-defined]
