"""Load a backbone: an embedded mini model, a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from lit_spu.backbones.backbone import Backbone, Head
from lit_spu.backbones.families import FAMILIES
from lit_spu.backbones.family import Family
from lit_spu.errors import UserError, did_you_mean
from lit_spu.tasks import Encoding, Task

ASSETS = Path(__file__).parent / "assets"

LOADED_DTYPE = torch.float32
"""Data type of all loaded weights, whatever config.json says: the model's `backbone_precision` is set after loading."""

_only_shapes = ContextVar("only_shapes", default=False)


@contextmanager
def only_shapes() -> Iterator[None]:
    """Context manager in which backbones are created from their configs, without reading weights."""
    token = _only_shapes.set(True)
    try:
        yield
    finally:
        _only_shapes.reset(token)


class Source(NamedTuple):
    """A model that was found: its config and tokenizer, but not its weights."""

    path: str  # a folder, or the name on the hub
    is_local: bool
    config: Any
    tokenizer: Any


def load_backbone(name: str, task: Task, head: Head = "classifier") -> Backbone:
    """Load a backbone in fp32 and in training mode, with no weight frozen.

    Args:
        name: An embedded mini model, a folder with a Hugging Face model, or a name on the hub.
        task: The task that it answers.
        head: A classification head, or the language-model head at the prompt's blank.

    Raises:
        UserError: If there is no such model, its family is unknown, it lacks the weights of this head, or its tokenizer
            does not know the label words.
    """
    source = find_model(name)
    family = FAMILIES.get(source.config.model_type)
    if family is None:
        raise UserError(
            f"model.backbone: {name!r} is of the family {source.config.model_type!r}, which has no Family record. Add"
            f" one to lit_spu/backbones/families.py, as for {', '.join(FAMILIES)}."
        )
    tokenizer = source.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    architecture = cast(type[Backbone], family.architecture)
    format_, mask = architecture.prompt_format(head, tokenizer)
    positions = getattr(source.config, "max_position_embeddings", None)  # a T5 has relative positions, without limit
    max_tokens = positions and positions - family.position_offset
    model, head_is_pretrained = load_model(source, name, family, task, head)
    backbone = architecture(model, family, task, head, Encoding(tokenizer, format_, mask, max_tokens), name)
    backbone.head_is_pretrained = head_is_pretrained
    return backbone


def find_model(name: str) -> Source:
    """Find a model and read its config and its tokenizer.

    Raises:
        UserError: If there is no such model.
    """
    from transformers import AutoConfig, AutoTokenizer

    embedded = {folder.name: str(folder) for folder in ASSETS.iterdir() if (folder / "config.json").is_file()}
    path = embedded.get(name, name)
    if not Path(path).is_dir() and "/" not in name and did_you_mean(name, embedded).startswith("Did"):
        raise UserError(f"model.backbone: there is no {name!r}. {did_you_mean(name, embedded)}")
    try:
        is_local = Path(path).is_dir() or not is_on_hub(path)
        config = AutoConfig.from_pretrained(path, local_files_only=is_local)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=is_local)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.backbone: {name!r} is no embedded model ({', '.join(sorted(embedded))}), no folder with a Hugging"
            f" Face model, and no model that the hub returns here: {str(error).splitlines()[0]}"
        ) from error
    return Source(path, is_local, config, tokenizer)


def load_model(source: Source, name: str, family: Family, task: Task, head: Head) -> tuple[Any, bool]:
    """Load a Hugging Face model with its head, and return it with whether the head was among the weights.

    Raises:
        UserError: If weights are missing, other than those of a new classification head.
    """
    import transformers

    classifies = head == "classifier" and bool(family.classifier)
    kind = "SequenceClassification" if classifies else family.architecture.language_model
    auto = getattr(transformers, f"AutoModelFor{kind}")
    options: dict[str, Any] = {"num_labels": task.num_logits} if classifies else {}
    if _only_shapes.get():
        config = transformers.AutoConfig.from_pretrained(source.path, local_files_only=source.is_local, **options)
        config.use_cache = False
        return auto.from_config(config, dtype=LOADED_DTYPE).eval(), not classifies
    with quiet_loading():
        model, info = auto.from_pretrained(
            source.path, dtype=LOADED_DTYPE, output_loading_info=True, local_files_only=source.is_local, **options
        )
    model.config.use_cache = False
    new = [path for path in family.classifier if "." in path or hasattr(model, path)] if classifies else []
    missing = [key for key in info["missing_keys"] if not any(key.startswith(f"{path}.") for path in new)]
    if missing:
        advice = "Use model.head=classifier, or a model with its language-model head." if not classifies else ""
        raise UserError(
            f"model.backbone: {name!r} lacks {len(missing)} of the weights that model.head={head} needs"
            f" ({', '.join(sorted(missing)[:3])}…): they would be random. {advice}"
        )
    return model, not info["missing_keys"]


def is_on_hub(name: str) -> bool:
    """Return whether the hub has a model. One request; transformers would retry for half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=5)
    except Exception:  # any network error too; the local cache may still hold the model
        return False
    return True


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' report of missing and unused weights. `load_model` checks them itself."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
