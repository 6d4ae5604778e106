"""Texts of users are printed as they are, not as markup of Rich."""

from __future__ import annotations

import ast

import pytest
from rich.table import Table

from lit_spu.console import make_console
from tests.test_imports import ROOT, source_files


@pytest.mark.parametrize("text", ["a[/b]c", "[red]x[/red]", "[link=x", "runs/:smile:", "\\[b]"])
def test_lines_titles_and_cells_are_printed_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console = make_console()
    console.print(table)
    console.print(f"Directory: {text}")
    assert capsys.readouterr().out.count(text) == 4


def test_nothing_else_makes_a_console_or_a_column_with_markup() -> None:
    for path in source_files():
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if path != ROOT / "console.py":
                assert name != "Console", path
            if name == "TextColumn":
                assert "markup=False" in ast.unparse(call), path
