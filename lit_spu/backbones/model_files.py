"""Check of a model's files, and transformers' loading errors in one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_spu.errors import UserError
from lit_spu.safe_yaml import parse_json

ADAPTER = "adapter_config.json"
_LFS_POINTER = b"version https://git-lfs"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SENTENCEPIECE = ("spm.model", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


def check_model_folder(folder: Path) -> None:
    """Check that a folder holds a model which transformers can load without code of its own.

    Raises:
        UserError: If a file is damaged or a pointer, the weights are quantised, the folder holds an adapter, or its
            model needs code of its own.
    """
    where = f"model.backbone: {folder}"
    if (folder / ADAPTER).is_file():
        base = _read_json(folder / ADAPTER).get("base_model_name_or_path")
        if (folder / "config.json").is_file():
            raise UserError(
                f"{where} holds a model and also an adapter of peft ({ADAPTER}). Move the adapter's files to another"
                " folder; --model.adapter reads it there."
            )
        raise UserError(
            f"{where} is an adapter of peft. Give it as --model.adapter of LoRA or IA3, and the model that it was"
            f" trained on{f' ({base})' if base else ''} as --model.backbone."
        )
    for file in sorted(folder.iterdir()):
        if file.is_file() and _starts_as_pointer(file):
            raise UserError(
                f"{where}: {file.name} is a pointer of git-lfs, not the file itself: run `git lfs pull` there."
            )
    check_config(_read_json(folder / "config.json"), str(folder))
    if _read_json(folder / "tokenizer_config.json").get("auto_map"):
        raise _own_code_error(where)
    _read_json(folder / "tokenizer.json")


def check_config(config: dict[str, Any], name: str) -> None:
    """Check that a model needs no code of its own, and that its weights are not quantised.

    Raises:
        UserError: If it does, or they are.
    """
    if config.get("auto_map"):
        raise _own_code_error(f"model.backbone: {name}")
    if quantization := config.get("quantization_config"):
        kind = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise UserError(
            f"model.backbone: {name}: its weights are quantised ({kind}), which cannot be trained with here. Use the"
            " model before quantisation; --model.backbone_precision=int8 quantises it when it is loaded."
        )


def _own_code_error(where: str) -> UserError:
    return UserError(
        f"{where} has an auto_map in its config.json or tokenizer_config.json: it needs code of its own, which lit_spu"
        " never runs. Use a model of transformers' own classes."
    )


def _starts_as_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_LFS_POINTER)) == _LFS_POINTER


def _read_json(file: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; an empty one if there is no file."""
    if not file.is_file():
        return {}
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.backbone: {file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"model.backbone: {file} holds no mapping of settings.")
    return values


def check_weight_files(folder: Path) -> None:
    """Check that a folder holds all files of the weights, whole.

    Raises:
        UserError: If a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    where = f"model.backbone: {folder}"
    present = [name for name in _WEIGHTS if (folder / name).is_file() or (folder / f"{name}.index.json").is_file()]
    if not present:
        others = [
            file.name
            for suffix in ("*.safetensors", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.bin", "*.pth")
            for file in sorted(folder.glob(suffix))
        ]
        found = f"; it holds {', '.join(others[:3])}" if others else ""
        raise UserError(f"{where} has no weights: no {' and no '.join(_WEIGHTS)}, and no index of their parts{found}.")
    index = folder / f"{present[0]}.index.json"
    files = [present[0]]
    if not (folder / present[0]).is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
            raise UserError(f"{where}: {index.name} has no weight_map of names to files.")
        files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{where} lacks {', '.join(missing[:3])}, which {index.name} names: download it again.")
    for file in files:
        if file.endswith(".safetensors"):
            try:
                with safe_open(folder / file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise UserError(f"{where}: {file} is damaged or cut short ({error}): download it again.") from error


@contextmanager
def explain_loading_errors(name: str, path: str) -> Iterator[None]:
    """Context manager that turns any error of transformers into a UserError of one line.

    Args:
        name: The model as the user named it.
        path: Its folder, or its name on the hub.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers and its backends raise many kinds
        raise UserError(f"model.backbone: {name!r} cannot be loaded: {_cause(error, Path(path))}") from error


def _cause(error: Exception, folder: Path) -> str:
    text = " ".join(str(error).split())
    has_pieces = any((folder / file).is_file() for file in _SENTENCEPIECE)
    if has_pieces or (not folder.is_dir() and re.search("sentencepiece|tiktoken", text, re.IGNORECASE)):
        packages = [name for name, module in _SENTENCEPIECE_PACKAGES.items() if find_spec(module) is None]
        if packages:
            return (
                f"its tokenizer is a file of sentencepiece, and {' and '.join(packages)} is not installed:"
                " pip install 'lit-spu[sentencepiece]', or add a tokenizer.json."
            )
    if "weights only load failed" in text.casefold():
        return "its weights are a pickle of other objects than tensors, which could run code. Use safetensors."
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 240 else f"{text[:239]}…")


_SENTENCEPIECE_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
