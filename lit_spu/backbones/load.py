"""Load a backbone: an embedded mini model, a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_spu.backbones.backbone import Backbone, Head
from lit_spu.backbones.families import FAMILIES
from lit_spu.backbones.family import Family
from lit_spu.backbones.model_files import (
    check_config,
    check_model_folder,
    check_weight_files,
    explain_loading_errors,
)
from lit_spu.backbones.record_check import check_record
from lit_spu.backbones.tokenizer_check import check_tokenizer
from lit_spu.errors import UserError, did_you_mean
from lit_spu.files import check_checksums
from lit_spu.tasks import Encoding, Task

ASSETS = Path(__file__).parent / "assets"

LOADED_DTYPE = torch.float32
"""Data type of all loaded weights, whatever config.json says: the model's `backbone_precision` is set after loading."""

OWN_STATE = "reads_first_decoder_state"
"""Key in config.json of a classifier that was trained on another state than transformers' class reads."""

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
        head: A classification head, or the language-model head: at the prompt's blank, or for the labels' names.

    Raises:
        UserError: If there is no such model, its family is unknown or has no such head, it lacks the weights of this
            head, or its tokenizer does not know the label words.
    """
    source = find_model(name)
    family = FAMILIES.get(source.config.model_type)
    if family is None:
        raise UserError(
            f"model.backbone: {name!r} is of the family {source.config.model_type!r}, which lit_spu does not support."
            f" Supported: {', '.join(FAMILIES)}."
        )
    architecture = cast(type[Backbone], family.architecture)
    if head == "names" and not architecture.knows_label_names:
        known = ", ".join(name for name, other in FAMILIES.items() if other.architecture.knows_label_names)
        raise UserError(
            f"model.head=names: {name!r} is of the family {source.config.model_type!r}, and only {known} was pretrained"
            " to answer by the names of labels. Use classifier (a new head) or prompt (label words)."
        )
    positions = getattr(source.config, "max_position_embeddings", None)  # a T5 has relative positions, without limit
    with explain_loading_errors(name, source.path):
        tokenizer = source.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        format_, mask = architecture.prompt_format(head, tokenizer)
        encoding = Encoding(tokenizer, format_, mask, positions and positions - family.position_offset)
        check_tokenizer(name, source.config, encoding, task)
        model, new_head_reason = load_model(source, name, family, task, head)
        backbone = architecture(model, family, task, head, encoding, name)
        check_record(backbone)
    backbone.new_head_reason = new_head_reason
    return backbone


def find_model(name: str) -> Source:
    """Find a model and read its config and its tokenizer.

    Raises:
        UserError: If there is no such model, or its files are damaged or cannot be used.
    """
    from transformers import AutoConfig, AutoTokenizer

    embedded = {folder.name: str(folder) for folder in ASSETS.iterdir() if (folder / "config.json").is_file()}
    path = embedded.get(name, name)
    folder = Path(path)
    if not folder.is_dir() and "/" not in name and did_you_mean(name, embedded).startswith("Did"):
        raise UserError(f"model.backbone: there is no {name!r}. {did_you_mean(name, embedded)}")
    if folder.is_dir() and name:
        check_model_folder(folder)
    options = {"local_files_only": folder.is_dir() or not is_on_hub(path), "trust_remote_code": False}
    if not (folder / "config.json").is_file() and options["local_files_only"] and not _is_cached(path):
        raise UserError(
            f"model.backbone: {name!r} is no embedded model ({', '.join(sorted(embedded))}), no folder with a Hugging"
            " Face model (with a config.json), and no model that the hub returns here (is there a network?)."
        )
    with explain_loading_errors(name, path):
        config = AutoConfig.from_pretrained(path, **options)
        check_config(config.to_dict(), name)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        check_config({"auto_map": getattr(tokenizer, "init_kwargs", {}).get("auto_map")}, name)
    return Source(path, options["local_files_only"], config, tokenizer)


def _is_cached(name: str) -> bool:
    """Return whether the local cache of the hub holds a model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # no name that the hub allows
        return False


def load_model(source: Source, name: str, family: Family, task: Task, head: Head) -> tuple[Any, str | None]:
    """Load a Hugging Face model with its head.

    Returns:
        The model, and the reason why its head is new, or None if the head is pretrained.

    Raises:
        UserError: If weights are missing or have other shapes, other than those of a new classification head.
    """
    import transformers

    classifies = head == "classifier"
    kind = "SequenceClassification" if classifies else family.architecture.language_model
    auto = getattr(transformers, f"AutoModelFor{kind}")
    reason = find_head_difference(source.config, task, family) if classifies else None
    options: dict[str, Any] = {"local_files_only": source.is_local, "trust_remote_code": False}
    if classifies:
        options |= {"num_labels": task.num_logits, "ignore_mismatched_sizes": True}
    if _only_shapes.get():
        options.pop("ignore_mismatched_sizes", None)
        config = transformers.AutoConfig.from_pretrained(source.path, **options)
        return _configure(auto.from_config(config, dtype=LOADED_DTYPE).eval(), source, family, classifies), reason
    if Path(source.path).is_dir():
        check_checksums(Path(source.path))
        check_weight_files(Path(source.path))
    with quiet_loading():
        model, info = auto.from_pretrained(source.path, dtype=LOADED_DTYPE, output_loading_info=True, **options)
    _configure(model, source, family, classifies)
    _check_weights(info, model, name, family, head)
    if not classifies:
        return model, None
    if reason is None and not info["missing_keys"] and not info["mismatched_keys"]:
        return model, None
    reason = reason or ("is new." if info["missing_keys"] else "does not fit its config.json.")
    path, linear = _find_label_layer(model, family)
    was_loaded = f"{path}.weight" not in info["missing_keys"]
    if was_loaded:
        with torch.no_grad():
            linear.weight.normal_(std=getattr(model.config, "initializer_range", linear.in_features**-0.5))
            if linear.bias is not None:
                linear.bias.zero_()
    if was_loaded or any(key.startswith(f"{path.partition('.')[0]}.") for key in info["unexpected_keys"]):
        rank_zero_info(f"model.backbone: the classification head of {name!r} {reason} A new one is trained.")
    return model, reason


def _configure(model: Any, source: Source, family: Family, classifies: bool) -> Any:
    """Set a loaded model's config, and return the model."""
    model.config.use_cache = False
    if classifies and family.architecture.is_causal:
        # where transformers' class finds a text's last token; set when loaded, so that this embedding has a gradient
        model.config.pad_token_id = source.tokenizer.pad_token_id
    if classifies and family.architecture.has_own_answer_state:
        setattr(model.config, OWN_STATE, True)
    return model


def find_head_difference(config: Any, task: Task, family: Family) -> str | None:
    """Return how a model's classification head differs from the task's, or None if their labels are the same."""
    made_as = config.architectures or ()
    if made_as and not any("SequenceClassification" in name for name in made_as):
        return f"is new: the model is a {made_as[0]}."
    if family.architecture.has_own_answer_state and not getattr(config, OWN_STATE, False):
        return "was trained to read another state: the decoder's at the text's end, not its first."
    names = [str(name) for _, name in sorted(config.id2label.items())]
    are_default_names = names == [f"LABEL_{number}" for number in range(len(names))]
    are_same = [name.casefold() for name in names] == [label.casefold() for label in task.labels]
    if len(names) == task.num_logits and (are_default_names or are_same or task.regression):
        return None
    shown = ", ".join(names[:5]) + ("…" if len(names) > 5 else "")
    return (
        f"has {len(names)} labels ({shown}). The labels of {task.name} are {', '.join(task.labels) or 'a number'}, in"
        " this order. If they mean the same, set id2label in its config.json."
    )


def _check_weights(info: Any, model: Any, name: str, family: Family, head: Head) -> None:
    """Check the report of transformers: which weights are missing, have other shapes, or are too many."""
    classifies = head == "classifier"
    new = [path for path in family.classifier if "." in path or hasattr(model, path)] if classifies else []
    missing = [key for key in info["missing_keys"] if not any(key.startswith(f"{path}.") for path in new)]
    if missing:
        advice = " Use model.head=classifier, or a model with its language-model head." if not classifies else ""
        raise UserError(
            f"model.backbone: {name!r} lacks {len(missing)} of the weights that model.head={head} needs"
            f" ({', '.join(sorted(missing)[:3])}…): they would be random.{advice}"
        )
    for key, found, needed in sorted(info["mismatched_keys"]):
        if not any(key.startswith(f"{path}.") for path in new):
            raise UserError(
                f"model.backbone: {name!r}: {key} has the shape {list(found)}, and config.json needs {list(needed)}."
            )
    stacks = "|".join(map(re.escape, family.stacks))
    if more := sorted(key for key in info["unexpected_keys"] if re.search(rf"(^|\.)({stacks})\.\d+\..*weight$", key)):
        raise UserError(
            f"model.backbone: {name!r} has weights of blocks that its config.json does not have ({more[0]}…): the"
            " files are of different models."
        )


def _find_label_layer(model: Any, family: Family) -> tuple[str, Any]:
    """Return the path and the module of the layer over the labels, the last linear layer of a classification head."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f"{name}.".startswith(f"{path}.") for path in family.classifier)
    ]
    return found[-1]


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
