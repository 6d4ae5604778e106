"""Export of a trained method: a peft folder, a plain Hugging Face model, or the trained weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from lit_spu.backbones import Backbone
from lit_spu.backbones.load import quiet_loading
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.errors import UserError, name_flag
from lit_spu.export import load as loading
from lit_spu.files import check_writable, replace_path, write_checksums
from lit_spu.methods.base import Method
from lit_spu.nn import peft_format
from lit_spu.ranges import CountOrZero, Text
from lit_spu.version import __version__

Format = Literal["peft", "merged", "safetensors"]


def export(ckpt_path: Text, output: Text, format: Format = "safetensors") -> None:
    """Write a trained method for other tools, with a model card.

    Args:
        ckpt_path: A run directory (its best checkpoint) or a checkpoint.
        output: The folder to write; it must be new or empty.
        format: `peft`: an adapter folder of the peft library, for LoRA and (IA)3. `merged`: a Hugging Face model of the
            backbone's class, with the trained weights merged into it. `safetensors`: the trained weights alone, for
            every method; `lit_spu.load` reads them.

    Raises:
        UserError: if there is no checkpoint, the folder is not empty, or the method does not support the format.
    """
    folder = new_folder(output)
    with name_flag("--ckpt_path"):
        file = run_dir.find_checkpoint(ckpt_path, "best")
        method = loading.load(file)
    writers: Mapping[Format, Callable[[Method, Path], None]] = {
        "peft": write_peft,
        "merged": write_merged,
        "safetensors": write_trained_weights,
    }
    write_folder(folder, method, file, format, partial(writers[format], method))
    _print_size(folder, method, format)


def replay(trajectory: Text, output: Text, step: CountOrZero | None = None) -> None:
    """Rebuild the weights that MeZO trained, from the few bytes per step that its run recorded.

    Args:
        trajectory: A run directory, or its trajectory.mezo.
        output: The folder to write, as export does in the format safetensors; it must be new or empty.
        step: Stop after this number of steps rather than after the last.

    Raises:
        UserError: if there is no trajectory or no such step, or if its initial weights are not available here.
    """
    folder = new_folder(output)
    method = loading.replay(trajectory, step)
    write_folder(folder, method, None, "safetensors", partial(write_trained_weights, method))
    _print_size(folder, method, "safetensors")


def _print_size(folder: Path, method: Method, format: Format) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {type(method).__name__} as {format}, {size:,.2f} MB")


def new_folder(output: str) -> Path:
    """Return the folder to write.

    Raises:
        UserError: if it is not empty, is a file, or cannot be written.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {folder} is not an empty folder. Give a new folder.")
    check_writable(folder, "--output")
    return folder


def write_folder(
    folder: Path, method: Method, file: Path | None, format: Format, write: Callable[[Path], None]
) -> None:
    """Write an export as a whole: its files, the model card and the checksums.

    Args:
        folder: The folder.
        method: The trained method.
        file: Its checkpoint, if there is one.
        format: The format, for the model card.
        write: Write the files into a folder.

    Raises:
        UserError: if the folder cannot be written, or the disk is full.
    """
    with replace_path(folder) as whole:
        whole.mkdir()
        write(whole)
        (whole / "README.md").write_text(model_card(method, file, folder, format), "utf-8")
        write_checksums(whole)


def write_peft(method: Method, folder: Path) -> None:
    """Write an adapter folder of the peft library."""
    if type(method).forward is not Method.forward or not method.adapters:
        raise UserError(
            f"--format peft: the peft library cannot represent {type(method).__name__}, only LoRA and (IA)3. Use"
            " --format safetensors."
        )
    exported = {id(p) for adapter in method.adapters for p in adapter.parameters()}
    exported |= {id(p) for p in method.backbone.model.parameters()}
    if any(p.requires_grad and id(p) not in exported for p in method.parameters()):
        raise UserError(
            "--format peft: the label words' rows of the head were trained apart from the vocabulary, which peft cannot"
            " store. Use --format safetensors."
        )
    peft_format.write_peft_folder(method.backbone, method.adapters, folder)


def write_merged(method: Method, folder: Path) -> None:
    """Merge the trained weights into the backbone, and write it as a Hugging Face model with its tokenizer."""
    method.merge()
    model = method.backbone.model
    with torch.device("meta"):
        plain_names = set(type(model)(model.config).state_dict())
    if method.backbone.label_weight is not None or set(model.state_dict()) - plain_names:
        raise UserError(
            f"--format merged: {type(method).__name__} trained weights that {type(model).__name__} does not have. Use"
            " --format safetensors."
        )
    write_model(method, method.backbone, folder)


def write_model(method: Method, backbone: Backbone, folder: Path) -> None:
    """Write a backbone of a method as a Hugging Face model with its tokenizer."""
    model = backbone.model
    if backbone.has_classifier and not method.task.regression:
        model.config.id2label = dict(enumerate(method.task.labels))
        model.config.label2id = {label: number for number, label in enumerate(method.task.labels)}
    with quiet_loading():
        model.save_pretrained(folder)
    method.encoding.tokenizer.save_pretrained(folder)


def write_trained_weights(method: Method, folder: Path) -> None:
    """Write the trained weights alone."""
    trained_weights.write_weights(method.checkpoint_dict(), folder / trained_weights.WEIGHTS)


def _usage(method: Method, folder: Path, format: Format) -> str:
    """Return the code that loads an export."""
    if format == "peft":
        return f"""from peft import PeftModel
from transformers import {_auto_class(method)}

model = {_auto_class(method)}.from_pretrained({method.backbone.name!r}{_num_labels_argument(method)})
model = PeftModel.from_pretrained(model, {str(folder)!r})"""
    if format == "merged":
        return f"""from transformers import {_auto_class(method)}, AutoTokenizer

model = {_auto_class(method)}.from_pretrained({str(folder)!r})
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"""
    return f"""import lit_spu

method = lit_spu.load({str(folder)!r})
logits = method(batch)  # [batch, labels]; the batch is one of lit_spu.GLUE or of `method.encoding.tokenizer`"""


def _auto_class(method: Method) -> str:
    backbone = method.backbone
    return f"AutoModelFor{'SequenceClassification' if backbone.has_classifier else backbone.language_model}"


def _num_labels_argument(method: Method) -> str:
    return f", num_labels={method.task.num_logits}" if method.backbone.has_classifier else ""


def model_card(method: Method, file: Path | None, folder: Path, format: Format) -> str:
    """Return the model card: base model, method, task, score, code to load it, inputs, outputs and settings.

    Args:
        method: The trained method.
        file: Its checkpoint. The score is that of the run directory that holds it, if there is one.
        folder: The folder of the export.
        format: Its format.
    """
    task = method.task
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    settings = {name: value for name, value in method.hparams.items() if name != "task" and not name.startswith("_")}
    listed = "\n".join(f"- {name}: {value}" for name, value in sorted(settings.items()))
    library = {"peft": "peft", "merged": "transformers", "safetensors": "lit_spu"}[format]
    return f"""---
base_model: {method.backbone.name}
library_name: {library}
tags: [lit_spu, {type(method).__name__}]
---

# {method.backbone.name}, {type(method).__name__}, {task.name}

{(type(method).__doc__ or "").splitlines()[0]} Written by lit_spu {__version__} ({format}).

- task: {task.name}
- trained parameters: {count:,}
{_best_score(method, file)}
```python
{_usage(method, folder, format)}
```

{_inputs_and_outputs(method)}

## Settings

{listed}
"""


def _best_score(method: Method, file: Path | None) -> str:
    """Return a line with the best score of the checkpoint's run; empty if there is none."""
    results = run_dir.read_summary(file.absolute().parents[1]) if file else {}
    if not results.get("best_score"):
        return ""
    metric = method.task.monitor.removeprefix("val/")
    return f"- best {metric} on validation: {results['best_score']:.4f}\n"


def _inputs_and_outputs(method: Method) -> str:
    """Return a sentence or two on the texts that the model reads and the logits that it returns."""
    task, backbone = method.task, method.backbone
    labels, form = ", ".join(task.labels), method.encoding.format
    text = "the plain text" if form == "pair" else f"a text in the task's template (the {form} format)"
    if backbone.has_classifier:
        output = f"one logit for each of {labels}, in this order" if labels else "a number"
        return f"The input is {text}. The output is {output}.{_own_answer_state(backbone)}"
    tokenizer = method.encoding.tokenizer
    words = [str(tokenizer.decode(token)).strip() for token in backbone.label_token_ids.tolist()]
    return (
        f"The input is {text}. The answer is the most likely of the tokens {', '.join(words)}, which stand for"
        f" {labels or 'the ends of the scale'}."
    )


def _own_answer_state(backbone: Backbone) -> str:
    """Return how to compute the logits without this package, if transformers' own class reads another state."""
    if not backbone.has_own_answer_state:
        return ""
    head, base = backbone.head_paths[-1], backbone.model.base_model_prefix
    return (
        f" The head reads the decoder's first state, and {type(backbone.model).__name__} itself another one: the logits"
        f" are `model.{head}(model.{base}(**inputs, decoder_input_ids=start).last_hidden_state[:, 0])`, where `start`"
        " is the decoder's start token for each text."
    )
