"""A few of the kills of tools/kill_study.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second filesystem for temporary files")
def test_runs_that_are_killed_end_as_though_nobody_had_killed_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.kill_study", f"--out={tmp_path}/kills", "--kills=3"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: " in done.stdout
