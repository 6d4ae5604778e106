"""The header of a trajectory, and the check that an optimizer can replay it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lit_spu.checkpoints.fingerprint import fingerprint
from lit_spu.errors import UserError, describe_changes
from lit_spu.optim.keyed_random import key_of
from lit_spu.optim.mezo import MeZOOptimizer
from lit_spu.optim.noise import VERSION
from lit_spu.optim.trajectory import Trajectory
from lit_spu.optim.units import Unit


def trajectory_header(checkpoint: Mapping[str, Any], optimizer: MeZOOptimizer) -> dict[str, Any]:
    """Return the header of a trajectory: all that is needed, besides its rows, to replay an optimizer's steps.

    Args:
        checkpoint: The method's part of a checkpoint (`Method.checkpoint_dict`).
        optimizer: The optimizer before its first step.
    """
    weight = optimizer.param_groups[0]["params"][0]
    device, name = weight.device, _describe_device(weight.device)
    unit = Unit("header", 0, [torch.nn.Parameter(torch.empty(shape, device=device)) for shape in ((64, 64), (64,))])
    noise = type(optimizer.noise)([unit]).sample(unit, key_of("header"))
    units = [(unit.name, unit.numel) for unit in optimizer.layout.units]
    described = f"{optimizer.noise} {optimizer.share} {optimizer.rounding} {name} {units}"
    settings = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    return settings | {
        "version": VERSION,
        "groups": len(optimizer.param_groups),
        "directions": optimizer.directions,
        "seed": optimizer.seed,
        "initial_fingerprint": optimizer.initial_fingerprint,
        "noise": fingerprint((described, z) for z in noise),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": device.type,
        "device_name": name,
        "torch": str(torch.__version__),
    }


def check_replayable(trajectory: Trajectory, checkpoint: Mapping[str, Any], optimizer: MeZOOptimizer) -> None:
    """Check that a replay of a trajectory would compute the weights of its run.

    Args:
        trajectory: The run's trajectory.
        checkpoint: The present method's part of a checkpoint (`Method.checkpoint_dict`).
        optimizer: The present optimizer, before its first step.

    Raises:
        UserError: If the backbone, the initial weights, the noise or, in training, the data differ from the run's.
    """
    own, recorded, file = trajectory_header(checkpoint, optimizer), trajectory.header, trajectory.file
    if own["backbone"]["fingerprint"] != recorded["backbone"]["fingerprint"]:
        raise UserError(
            f"{file} starts from the backbone {recorded['backbone']['name']!r} (fingerprint"
            f" {recorded['backbone']['fingerprint']}), not from {own['backbone']['name']!r}"
            f" ({own['backbone']['fingerprint']})."
        )
    if own["dtype"] != recorded["dtype"]:
        raise UserError(
            f"{file} was recorded with weights in {recorded['dtype']}, and here they are in {own['dtype']}: use the"
            " run's own --trainer.precision."
        )
    if any(own[name] != recorded[name] for name in ("method", "groups", "directions", "initial_fingerprint")):
        raise UserError(
            f"{file} starts from other weights than these ({recorded['method']}, fingerprint"
            f" {recorded['initial_fingerprint']}; here {own['method']}, {own['initial_fingerprint']}):"
            f" use the run's own settings, and seed {recorded['seed']}."
        )
    if changes := describe_changes(recorded["data"], own.get("data", recorded["data"])):
        raise UserError(
            f"{file} continues a run on its own data, but these differ: {changes}. Give the same data, or leave out"
            " --model.trajectory to start a new run."
        )
    if own["noise"] != recorded["noise"]:
        raise UserError(
            f"{file}: the noise differs here. It depends on model.noise, model.share, model.rounding and"
            f" model.weight_decay, on the device ({recorded['device_name']}; here {own['device_name']}) and on the"
            f" version of torch ({recorded['torch']}; here {own['torch']})."
        )


def _describe_device(device: torch.device) -> str:
    """Return what the noise of a device depends on: its model, or the instructions that torch uses on a CPU."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    get_name = getattr(torch.get_device_module(device), "get_device_name", lambda _: device.type)
    return str(get_name(device))
