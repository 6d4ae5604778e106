"""The adapter_config.json of the peft library, read by its own rules (https://github.com/huggingface/peft).

Every key is either understood here, or without effect on a trained adapter, or refused by name unless it is off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_spu.errors import UserError
from lit_spu.safe_yaml import parse_json

CONFIG = "adapter_config.json"

_UNDERSTOOD: Mapping[str, type | tuple[type, ...]] = {
    "peft_type": str,
    "task_type": str,
    "base_model_name_or_path": str,
    "r": int,
    "lora_alpha": (int, float),
    "use_rslora": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "layers_to_transform": (int, list),
    "layers_pattern": (str, list),
    "feedforward_modules": (str, list),
    "modules_to_save": list,
}
"""Keys that this module reads, with the types of their values. All but `r` and `lora_alpha` may be null."""


def _is_rank(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and item > 0


def _is_finite(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)


_ITEMS: Mapping[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "rank_pattern": _is_rank,
    "lora_alpha": _is_finite,
    "alpha_pattern": _is_finite,
    "layers_to_transform": lambda item: isinstance(item, int) and not isinstance(item, bool),
    "use_rslora": lambda item: isinstance(item, bool),
}
"""Checks of a value, or of each item of a list or mapping. Others are texts."""

_WITHOUT_EFFECT = {
    "auto_mapping",
    "corda_config",  # of an initialisation
    "eva_config",
    "lora_ga_config",
    "fan_in_fan_out",  # the library corrects it by the class of the layer
    "inference_mode",
    "init_ia3_weights",  # the folder's vectors replace them
    "lora_dropout",  # model.dropout is this package's
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
"""Keys of which no value changes what a trained adapter computes, as long as the others are off."""

_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base weights as they are. Others subtract the initial adapter."""

_ALWAYS_SAVED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class PeftConfig:
    """The settings of an adapter folder.

    Args:
        folder: The folder.

    Raises:
        UserError: If the file cannot be read, a value has a wrong type, or a key that changes the adapter's function
            is not understood.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / CONFIG
        try:
            values = parse_json(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"model.adapter: {folder} is no adapter folder of the peft library: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"model.adapter: {self.file} holds no mapping of settings.")
        self._values: dict[str, Any] = values
        self._check_keys()
        self.kind: str | None = values.get("peft_type")
        self.base_model: str | None = values.get("base_model_name_or_path")
        self.root = ""
        """Path, with a dot at its end, of the base model, if the adapter was made on one without a head."""

    def _check_keys(self) -> None:
        for key, value in self._values.items():
            if key in _UNDERSTOOD:
                self._check_value(key, value)
            elif key == "init_lora_weights":
                if value not in _HARMLESS_INITS:
                    raise UserError(
                        f"model.adapter: {self.file}: init_lora_weights={value!r} also changed the base weights."
                        " Convert the adapter by peft's save_pretrained(path_initial_model_for_weight_conversion=…)."
                    )
            elif value and key not in _WITHOUT_EFFECT and (key, value) != ("bias", "none"):
                shown = str(value)
                raise UserError(
                    f"model.adapter: {self.file}: {key}={shown if len(shown) < 60 else shown[:57] + '…'} changes what"
                    " the adapter computes, and is not supported here. Merge the adapter with peft (merge_and_unload),"
                    " and give the result as model.backbone."
                )

    def _check_value(self, key: str, value: Any) -> None:
        if value is None and key not in ("r", "lora_alpha"):
            return
        items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        is_allowed = _ITEMS.get(key, lambda item: isinstance(item, str))
        if not isinstance(value, _UNDERSTOOD[key]) or not all(map(is_allowed, items)):
            raise UserError(f"model.adapter: {self.file}: {key} cannot be {value!r}.")

    def targets(self, path: str) -> bool:
        """Return whether the library puts an adapter on the module at this path of the whole model."""
        if not path.startswith(self.root):
            return False
        path = path.removeprefix(self.root)
        if self._matches("exclude_modules", path):
            return False
        if any(self._search(rf"(^|.*\.){name}($|\..*)", path) for name in self.saved_modules):
            return False
        if not self._matches("target_modules", path):
            return False
        return isinstance(self._values["target_modules"], str) or self._has_layer(path)

    def _matches(self, key: str, path: str) -> bool:
        """Return whether a path matches a pattern (a string) or ends in one of the names of a list."""
        given = self._values.get(key)
        if isinstance(given, str):
            return bool(given) and self._search(given, path, re.fullmatch) is not None
        return any(path == name or path.endswith(f".{name}") for name in given or ())

    def _has_layer(self, path: str) -> bool:
        layers = self._values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self._values.get("layers_pattern") or ()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for expression in expressions if (match := self._search(expression, path))), None)
        allowed = layers if isinstance(layers, list) else [layers]
        return found is not None and int(found[1]) in allowed

    def _search(self, expression: str, path: str, match: Any = re.match) -> re.Match[str] | None:
        try:
            found: re.Match[str] | None = match(expression, path)
            return found
        except re.error as error:
            raise UserError(f"model.adapter: {self.file}: {expression!r} is no regular expression: {error}.") from error

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """Ends of the paths of the modules that the library saves whole."""
        always = _ALWAYS_SAVED.get(self._values.get("task_type") or "", ())
        return (*(self._values.get("modules_to_save") or ()), *always)

    def saves(self, name: str) -> bool:
        """Return whether the library reads the parameter of this name in the whole model from the folder."""
        parts = name.removeprefix(self.root).split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(path.endswith(saved) for path in paths for saved in self.saved_modules)

    def rank(self, path: str) -> int:
        """Return the rank of the pair at a path."""
        return int(self._by_pattern("rank_pattern", path, self._values.get("r", 8)))

    def scale(self, path: str) -> float:
        """Return the scale s of the pair at a path, in s·BA."""
        alpha, rank = self._by_pattern("alpha_pattern", path, self._values.get("lora_alpha", 8)), self.rank(path)
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)

    def _by_pattern(self, key: str, path: str, default: float) -> float:
        """Return the value of the first pattern that matches the end of a path."""
        path = path.removeprefix(self.root)
        patterns: Mapping[str, float] = self._values.get(key) or {}
        found = (value for pattern, value in patterns.items() if self._search(rf"(.*\.)?({pattern})$", path))
        return next(found, default)

    def scales_inputs(self, path: str) -> bool:
        """Return whether the (IA)³ vector at a path scales the inputs of the linear layer, not its outputs."""
        path = path.removeprefix(self.root)
        given = self._values.get("feedforward_modules") or ()
        if isinstance(given, str):
            return self._search(given, path, re.fullmatch) is not None
        return any(path.endswith(name) for name in given)
