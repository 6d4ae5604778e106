"""`lit-spu doctor`: checks of the installation, with what to do about each problem."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from lit_spu.console import make_console
from lit_spu.measure import cores

KNOWN_BAD = {
    ("lightning", release): "a malicious upload (GHSA-w37p-236h-pfx3): remove it, and change your passwords"
    for release in ("2.6.2", "2.6.3")
}
"""Versions that can be installed and must not be used, with the reason."""

DEVELOPMENT = "test"
"""The optional dependencies that are reported only if they are too old."""

State = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    subject: str
    state: State
    text: str


def examine() -> Iterator[Finding]:
    """Yield the findings of all checks, in the order of the report."""
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.platform()}")
    yield from check_packages()
    yield from check_devices()
    yield from check_storage()
    yield from check_hub()


def check_packages() -> Iterator[Finding]:
    """Check the required packages, and the optional ones that are installed, against the declared versions."""
    declared = [(Requirement(text), _extra(text)) for text in requires("lit-spu") or []]
    tested = {requirement.name: _pinned(requirement) for requirement, extra in declared if extra == "tested"}
    for requirement, extra in declared:
        if extra != "tested":
            yield from _check_package(requirement, extra, tested.get(requirement.name))


def _extra(declaration: str) -> str | None:
    """Return the extra that a declared dependency belongs to, if it is optional."""
    found = re.search(r"extra == ['\"](\w+)['\"]", declaration)
    return found[1] if found else None


def _pinned(requirement: Requirement) -> str:
    """Return the version that `==` requires."""
    (specifier,) = requirement.specifier
    return specifier.version


def _check_package(requirement: Requirement, extra: str | None, tested: str | None) -> Iterator[Finding]:
    """Check one package; `tested` is the version that the tests ran with, if it is declared."""
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    try:
        found = version(name)
    except PackageNotFoundError:
        if extra is None:
            yield Finding(name, "bad", f"missing: pip install '{wanted}'")
        elif extra != DEVELOPMENT:
            yield Finding(name, "note", f"missing, needed for {extra} only: pip install 'lit-spu[{extra}]'")
        return
    if reason := KNOWN_BAD.get((name, found)):
        yield Finding(name, "bad", f"{found}: {reason}")
    elif not requirement.specifier.contains(found, prereleases=True):
        yield Finding(name, "bad", f"{found} is not {requirement.specifier}: pip install '{wanted}'")
    elif extra != DEVELOPMENT:
        yield Finding(name, "ok", f"{found} (tested: {tested})" if tested else found)


def check_devices() -> Iterator[Finding]:
    """Check cores, memory and CUDA devices."""
    import torch

    memory = psutil.virtual_memory()
    yield Finding("cpu", "ok", f"{cores()} cores for this process, {torch.get_num_threads()} threads")
    free = memory.available / 2**30
    state: State = "ok" if free > 2 else "note"
    yield Finding("memory", state, f"{free:.1f} GiB free of {memory.total / 2**30:.1f}")
    for number in range(torch.cuda.device_count()):
        free_bytes, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(f"cuda:{number}", "ok", f"{name}, {free_bytes / 2**30:.1f} GiB free of {total / 2**30:.1f}")
    if not torch.cuda.is_available():
        yield _explain_missing_cuda(torch.version.cuda)


def _explain_missing_cuda(cuda_version: str | None) -> Finding:
    """Explain why torch, which is built for this version of CUDA or for none, finds no device."""
    if cuda_version:
        return Finding("cuda", "note", f"torch is built for CUDA {cuda_version}, but finds no device")
    if shutil.which("nvidia-smi"):
        advice = "pip install torch from its CUDA index"
        return Finding("cuda", "bad", f"there is a driver, but this torch is built for CPUs: {advice}")
    return Finding("cuda", "ok", "none: everything runs on the CPU")


def check_storage() -> Iterator[Finding]:
    """Check that the caches and the run directory can be written, with their sizes and the free space."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from lit_spu.data.glue import user_cache

    for name, folder in (("tokens", user_cache()), ("hub cache", Path(HF_HUB_CACHE)), ("runs", Path("runs"))):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        if not os.access(existing, os.W_OK):
            advice = " Give --data.cache." if name == "tokens" else ""
            yield Finding(name, "bad", f"{folder} is not writable.{advice}")
        else:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
            state: State = "ok" if free > 1 else "note"
            yield Finding(name, state, f"{folder}: {size / 2**20:,.0f} MiB, {free:.1f} GiB free")


def check_hub() -> Iterator[Finding]:
    """Check that the Hugging Face hub can be reached."""
    from huggingface_hub import HfApi, constants

    advice = "the embedded models, the sample data and local folders work without it"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "note", f"HF_HUB_OFFLINE is set, so only cached models and data load; {advice}")
        return
    try:
        HfApi().model_info("gpt2", timeout=5)
    except Exception as error:  # the transport raises many kinds
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        yield Finding("hub", "note", f"{constants.ENDPOINT} cannot be reached ({reason}); {advice}")
    else:
        yield Finding("hub", "ok", constants.ENDPOINT)


def doctor() -> None:
    """Check versions, devices, caches and the hub, and report what to do about each problem."""
    findings = _print_findings(examine())
    if problems := sum(finding.state == "bad" for finding in findings):
        print(f"{problems} problem{'' if problems == 1 else 's'} found.")
        sys.exit(1)


def _print_findings(findings: Iterator[Finding]) -> Sequence[Finding]:
    """Print each finding as soon as its check is done, and return all."""
    from rich.text import Text

    console = make_console()
    colours: dict[State, str] = {"ok": "green", "note": "yellow", "bad": "red"}
    printed = []
    for finding in findings:
        mark = Text(f"{finding.state:<4}", colours[finding.state])
        console.print(mark, f" {finding.subject:<22} {finding.text}", soft_wrap=True)
        printed.append(finding)
    return printed
