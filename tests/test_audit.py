"""The audit of the dependencies never takes a package that was not audited for a safe one."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from tools.audit import describe_audit, run_audit

SAFE = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "not found"}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


@pytest.mark.parametrize(
    ("packages", "parts", "status"),
    [
        ([SAFE], ["1 of 1 packages audited. 0 known"], 0),
        ([SAFE, UNKNOWN], ["1 of 2 packages audited, 1 NOT audited"], 0),
        ([SAFE, BAD], ["c 2: PYSEC-1, fixed in 3", "1 known"], 1),
        ([UNKNOWN, UNKNOWN], ["Audit skipped", "none of the 2"], 0),
    ],
)
def test_what_was_audited_is_said(packages: list[dict[str, Any]], parts: list[str], status: int) -> None:
    text, code = describe_audit({"dependencies": packages})
    assert code == status
    for part in parts:
        assert part in text


@pytest.mark.parametrize("stderr", ["ERROR: no connection", "No module named pip_audit", ""])
def test_an_audit_that_cannot_run_is_skipped_aloud(stderr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    text, code = run_audit()
    assert code == 0
    assert "Audit skipped" in text
    assert stderr in text
