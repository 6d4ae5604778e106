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
    device = optimizer.param_groups[0]["params"][0].device
    unit = Unit("header", 0, [torch.nn.Parameter(torch.empty(shape, device=device)) for shape in ((64, 64), (64,))])
    noise = type(optimizer.noise)([unit]).sample(unit, key_of("header"))
    units = [(unit.name, unit.numel) for unit in optimizer.layout.units]
    settings = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    return settings | {
        "version": VERSION,
        "groups": len(optimizer.param_groups),
        "directions": optimizer.directions,
        "seed": optimizer.seed,
        "initial_fingerprint": optimizer.initial_fingerprint,
        "noise": fingerprint((f"{optimizer.noise} {optimizer.share} {optimizer.rounding} {units}", z) for z in noise),
        "device": device.type,
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
            f" model.weight_decay, on the device ({recorded['device']}; here {own['device']}) and on the version of"
            f" torch ({recorded['torch']}; here {own['torch']})."
        )
