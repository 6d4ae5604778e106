"""Names of settings, classes and configs in older results, and their present names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "lit_spu.policies": "lit_spu.callbacks.policies",
    "model.activation_checkpointing": "model.gradient_checkpointing",
    "model.scores_weight": "model.logits_weight",
    "model.start": "model.init",
    "model.states_weight": "model.hidden_states_weight",
    "model.tap_cache": "model.activation_cache",
    "model.tap_dropout": "model.hidden_state_dropout",
}
"""Names in older results and their present names. `model.x` also stands for `model.init_args.x`.
A record is found by its command line, so every flag or class path that gets a new name needs an entry here.
"""

_KLADDER = "lit_spu.methods.kladder.KLadder"
_READS_OUT = "config.model.init_args.blocks"


def use_present_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with present names in its keys and texts."""
    record = {rename(name): rename(value) if isinstance(value, str) else value for name, value in record.items()}
    if record.get("config.model.class_path") != _KLADDER or _READS_OUT in record:
        return record
    # the k-ladder without a read-out is LST with windows
    k = "" if "--model.k=" in record["command"] else " --model.k=1"
    command = re.sub(r"(--config=(?:\S*/)?)kladder\.yaml", rf"\1lst.yaml{k}", record["command"])
    return record | {"command": command, "config.model.class_path": "lit_spu.methods.ladder.LadderSideTuning"}


def rename(text: str) -> str:
    """Replace every name in `RENAMED` that occurs in a command line, a setting's name or a setting's value."""
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        former = rf"(?<![\w/])({section}\.(?:init_args\.)?){re.escape(name)}(?!\w)"
        text = re.sub(former, rf"\g<1>{new.removeprefix(f'{section}.')}", text)
    return text
