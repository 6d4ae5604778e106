"""A few of the kills of tools/kill_study.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import kill_study

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second filesystem for temporary files")
def test_runs_that_are_killed_end_as_though_nobody_had_killed_them(tmp_path: Path) -> None:
    counts = kill_study.main([f"--out={tmp_path}/kills", "--kills=3", f"--configs={CONFIGS}/kladder.yaml"])
    assert counts["kills"] >= 3
    assert not {"unreadable", "refused or failed", "other weights"} & counts.keys()
