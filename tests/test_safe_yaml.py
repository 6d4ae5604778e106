"""YAML with aliases, nesting and values that a parser cannot bear."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_spu.cli.parser import Parser
from lit_spu.errors import UserError
from lit_spu.safe_yaml import MAX_NODES, parse_json, parse_yaml, read_mapping
from lit_spu.tasks import load_task

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
REFUSED = {
    "bomb": (BOMB, r"more than 50 levels or 100,000 values .*line 5"),
    "many": ("- x\n" * MAX_NODES, "more than 50 levels"),
    "itself": ("a: &a {class_path: KLadder, init_args: *a}", r"\*a contains itself"),
    "itself again": ("a: &a [1]\nb: &a [*a]", r"\*a contains itself"),
    "flow": ("[" * 100_000, "more than 50 levels"),
    "lists": ("- " * 100_000, "more than 50 levels"),
    "mappings": ("{a: " * 100_000, "more than 50 levels"),
    "chain": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60)), "more than 50 levels"),
    "date": ("a: 2024-99-99", "month must be in"),
    "time": ("a: !!timestamp x", "cannot be read as YAML"),
    "digits": ("9" * 5000, "4300 digits"),
    "code": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_document_that_expands_or_nests_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=expected) as error:
        parse_yaml(text, "f.yaml")
    assert time.monotonic() - start < 2
    assert len(str(error.value).splitlines()) == 1
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(UserError, match=expected):
        load_task(str(tmp_path / "task.yaml"))


@pytest.mark.parametrize("name", ["bomb", "itself", "flow", "time"])
def test_config_files_and_flags_are_checked_too(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--count", type=int | None)
    (tmp_path / "config.yaml").write_text(f"count: {REFUSED[name][0]}" if name == "flow" else REFUSED[name][0])
    for argument in (f"--config={tmp_path / 'config.yaml'}", f"--count=[{REFUSED[name][0]}]"):
        start = time.monotonic()
        with pytest.raises(SystemExit):
            parser.parse_args([argument])
        assert time.monotonic() - start < 5
        assert capsys.readouterr().err.startswith("error: ")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("ab *&:-[]{}", max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
        max_leaves=20,
    ),
    st.booleans(),
)
def test_other_documents_are_read_as_pyyaml_reads_them(value: Any, twice: bool) -> None:
    text = yaml.safe_dump([value, value] if twice else value)  # a value that occurs twice becomes an alias
    assert parse_yaml(text, "f.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- a", r"f\.yaml: a mapping of names to values was expected, not \"\['a'\]\""),
        (b"", r"a mapping of names to values was expected, not 'None'"),
        (b"\xff\xfea", r"f\.yaml cannot be read "),
        (b"\x89PNG\r\n\x1a\n", r"f\.yaml cannot be read "),
        (b"a: \x00", r"f\.yaml cannot be read as YAML: unacceptable character"),
    ],
)
def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "f.yaml").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_mapping(tmp_path / "f.yaml")
    with pytest.raises(UserError, match=r"g\.yaml cannot be read .No such file"):
        read_mapping(tmp_path / "g.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "{", ""])
def test_json_that_cannot_be_parsed_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"levels|Expecting"):
        parse_json(text)
    assert parse_json('{"a": [1]}') == {"a": [1]}


def test_json_numbers_beyond_all_floats_are_infinite() -> None:
    assert parse_json(f"[{'9' * 5000}, -{'9' * 400}, {10**300}, 1e400]") == [math.inf, -math.inf, 10**300, math.inf]
