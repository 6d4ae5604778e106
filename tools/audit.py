"""Audit of the dependencies: known vulnerabilities of the exact versions in constraints.txt, by pip-audit.

A package that the index does not answer for was not audited, and is counted aloud: it is not free of vulnerabilities.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def run_audit() -> tuple[str, int]:
    """Audit the constraints; return what was found as text, and the exit status."""
    flags = ("--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json")
    command = (sys.executable, "-m", "pip_audit", f"--requirement={CONSTRAINTS}", *flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return describe_audit(json.loads(done.stdout))
    except (ValueError, KeyError):  # pip-audit is not installed, or reached no index
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"Audit skipped, nothing is known about the dependencies: {reason}", 0


def describe_audit(report: Mapping[str, Any]) -> tuple[str, int]:
    """Return a line for each vulnerability and a summary, and exit status 1 if there is a vulnerability."""
    audited = [package for package in report["dependencies"] if "version" in package]
    total = len(report["dependencies"])
    if not audited:
        return f"Audit skipped: the index knows none of the {total} packages.", 0
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in audited
        for found in package["vulns"]
    ]
    unknown = f", {total - len(audited)} NOT audited: the index does not know them" if len(audited) < total else ""
    summary = f"{len(audited)} of {total} packages audited{unknown}. {len(lines)} known vulnerabilities."
    return "\n".join([*lines, summary]), int(bool(lines))


if __name__ == "__main__":
    text, status = run_audit()
    print(text)
    raise SystemExit(status)
