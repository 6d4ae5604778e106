"""`lit-spu doctor`: whether this installation can work, and what to do where it cannot."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from lit_spu.measure import cores

KNOWN_BAD = {
    ("lightning", version): "a malicious upload (GHSA-w37p-236h-pfx3): remove it, and change your passwords"
    for version in ("2.6.2", "2.6.3")
}
"""Versions that install and must not be used."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    state: Literal["ok", "note", "bad"]
    says: str


def examine() -> Iterator[Finding]:
    """Everything that is looked at, in order."""
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.platform()}")
    yield from packages()
    yield from devices()
    yield from storage()
    yield from network()


def packages() -> Iterator[Finding]:
    """The packages that this one needs, and the optional ones that are there, against what is declared."""
    for text in requires("lit-spu") or []:
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if extra is None:
                yield Finding(
                    requirement.name, "bad", f"missing: pip install '{requirement.name}{requirement.specifier}'"
                )
            elif extra[1] != "test":
                yield Finding(
                    requirement.name, "note", f"missing, for {extra[1]} alone: pip install 'lit-spu[{extra[1]}]'"
                )
            continue
        if why := KNOWN_BAD.get((requirement.name, found)):
            yield Finding(requirement.name, "bad", f"{found}: {why}")
        elif not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Finding(requirement.name, "bad", f"{found} is not {requirement.specifier}: pip install '{wanted}'")
        elif extra is None or extra[1] != "test":
            yield Finding(requirement.name, "ok", found)


def devices() -> Iterator[Finding]:
    """What there is to compute on."""
    import torch

    memory = psutil.virtual_memory()
    yield Finding("cpu", "ok", f"{cores()} cores for this process, {torch.get_num_threads()} threads")
    free = memory.available / 2**30
    state: Literal["ok", "note"] = "ok" if free > 2 else "note"
    yield Finding("memory", state, f"{free:.1f} GiB free of {memory.total / 2**30:.1f}")
    for number in range(torch.cuda.device_count()):
        free_bytes, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(f"cuda:{number}", "ok", f"{name}, {free_bytes / 2**30:.1f} GiB free of {total / 2**30:.1f}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        if shutil.which("nvidia-smi") and built is None:
            yield Finding(
                "cuda",
                "bad",
                "there is a driver, but this torch is built for CPUs: pip install torch from its CUDA index",
            )
        elif built:
            yield Finding("cuda", "note", f"torch is built for CUDA {built}, but there is no device that it can use")
        else:
            yield Finding("cuda", "ok", "none: everything runs on the CPU")


def storage() -> Iterator[Finding]:
    """Where things are kept, and how much room there is."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from lit_spu.data.glue import user_cache

    for name, folder in (("tokens", user_cache()), ("hub cache", Path(HF_HUB_CACHE)), ("runs", Path("runs"))):
        exists = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(exists).free / 2**30
        if not os.access(exists, os.W_OK):
            advice = " Give --data.cache." if name == "tokens" else ""
            yield Finding(name, "bad", f"{folder} cannot be written.{advice}")
        else:
            held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
            state: Literal["ok", "note"] = "ok" if free > 1 else "note"
            yield Finding(name, state, f"{folder}: {held / 2**20:,.0f} MiB, {free:.1f} GiB free")


def network() -> Iterator[Finding]:
    """Whether the hub gives models and data."""
    from huggingface_hub import HfApi, constants

    local = "the embedded models, sample data and folders work all the same"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "note", f"HF_HUB_OFFLINE is set, so only what is cached loads; {local}")
        return
    try:
        HfApi().model_info("gpt2", timeout=5)
    except Exception as error:  # whatever its transport raises
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        yield Finding("hub", "note", f"{constants.ENDPOINT} gives nothing here ({reason}); {local}")
    else:
        yield Finding("hub", "ok", constants.ENDPOINT)


def doctor() -> None:
    """Look at versions, devices, caches and the hub, and tell what to do where something is amiss."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    bad = 0
    for found in examine():
        mark = f"[{colours[found.state]}]{found.state:<4}[/]"
        console.print(f"{mark}  {escape(found.subject):<22} {escape(found.says)}", highlight=False, soft_wrap=True)
        bad += found.state == "bad"
    if bad:
        console.print(f"To mend: {bad}.", highlight=False)
        sys.exit(1)
