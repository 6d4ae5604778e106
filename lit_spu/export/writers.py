"""A trained method for other tools: a peft folder, a plain Hugging Face model, or the trained weights alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

import lit_spu
from lit_spu import __version__, load
from lit_spu.backbones import Backbone
from lit_spu.backbones.load import quiet_loading
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.nn import peft_format

Form = Literal["peft", "merged", "safetensors"]


def export(ckpt_path: str, output: str, format: Form = "safetensors") -> None:
    """Write a trained method for other tools, with a model card.

    Args:
        ckpt_path: A run directory (its best checkpoint) or a checkpoint.
        output: The folder to write; it must not hold anything yet.
        format: `peft`: an adapter folder of the peft library (LoRA, SiVA and (IA)3). `merged`: a Hugging Face model of
            the backbone's own kind, with what was trained in its weights. `safetensors`: what was trained and nothing
            else, for every method, which `lit_spu.load` reads.

    Raises:
        UserError: if there is no checkpoint, the folder is not empty, or the method has no such form.
    """
    folder = new_folder(output)
    file = run_dir.checkpoint(ckpt_path, "best")
    method = load(file)
    write: Mapping[Form, Callable[[Method, Path], str]] = {"peft": peft, "merged": merged, "safetensors": weights}
    assert set(write) == set(get_args(Form))
    use = write[format](method, folder)
    (folder / "README.md").write_text(card(method, file, use, format))
    _say(folder, method, format)


def replay(trajectory: str, output: str, step: int | None = None) -> None:
    """Make again what MeZO trained, from the few bytes that its run kept of each step.

    Args:
        trajectory: A run directory, or its trajectory.mezo.
        output: The folder to write, as export does in the format safetensors; it must not hold anything yet.
        step: Stop behind so many steps rather than behind the last.

    Raises:
        UserError: if there is no trajectory or no such step, or if what it starts from cannot be had here.
    """
    folder = new_folder(output)
    method = lit_spu.replay(trajectory, step)
    use = weights(method, folder)
    (folder / "README.md").write_text(card(method, None, use, "safetensors"))
    _say(folder, method, "safetensors")


def _say(folder: Path, method: Method, form: Form) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {type(method).__name__} as {form}, {size:,.2f} MB")


def new_folder(output: str) -> Path:
    """The folder to write.

    Raises:
        UserError: if it holds something.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {folder} holds something already. Give a new folder.")
    return folder


def peft(method: Method, folder: Path) -> str:
    """An adapter folder of the peft library; gives how to load it."""
    if type(method).forward is not Method.forward or not method.adapters:
        raise UserError(
            f"--format peft: {type(method).__name__} has no form there, only LoRA and (IA)3 have. Use safetensors."
        )
    inside = {id(p) for adapter in method.adapters for p in adapter.parameters()} | {
        id(p) for p in method.backbone.model.parameters()
    }
    if any(p.requires_grad and id(p) not in inside for p in method.parameters()):
        raise UserError("--format peft: the rows of the label words were trained by themselves. Use safetensors.")
    peft_format.write_peft_folder(method.backbone, method.adapters, folder)
    return f"""from peft import PeftModel
from transformers import {_auto(method)}

model = {_auto(method)}.from_pretrained({method.backbone.name!r}{_labels(method)})
model = PeftModel.from_pretrained(model, {str(folder)!r})"""


def merged(method: Method, folder: Path) -> str:
    """A Hugging Face model with its tokenizer; gives how to load it."""
    method.merge()
    model = method.backbone.model
    with torch.device("meta"):
        plain = set(type(model)(model.config).state_dict())
    if method.backbone.label_weight is not None or set(model.state_dict()) - plain:
        raise UserError(
            f"--format merged: {type(method).__name__} trained weights that {type(model).__name__} does not have. Use"
            " safetensors."
        )
    return model_folder(method, method.backbone, folder)


def model_folder(method: Method, backbone: Backbone, folder: Path) -> str:
    """A model of a method with its tokenizer; gives how to load it."""
    model = backbone.model
    if backbone.has_classifier and not method.task.regression:
        model.config.id2label = dict(enumerate(method.task.labels))
        model.config.label2id = {label: number for number, label in enumerate(method.task.labels)}
    with quiet_loading():
        model.save_pretrained(folder)
    method.encoding.tokenizer.save_pretrained(folder)
    return f"""from transformers import {_auto(method)}, AutoTokenizer

model = {_auto(method)}.from_pretrained({str(folder)!r})
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"""


def weights(method: Method, folder: Path) -> str:
    """What was trained and nothing else; gives how to load it."""
    trained_weights.write(method.checkpoint_dict(), folder / trained_weights.WEIGHTS)
    return f"""import lit_spu

method = lit_spu.load({str(folder)!r})
scores = method(batch)  # [batch, labels], of a batch of lit_spu.GLUE or of `method.encoding.tokenizer`"""


def _auto(method: Method) -> str:
    backbone = method.backbone
    return f"AutoModelFor{'SequenceClassification' if backbone.has_classifier else backbone.language_model}"


def _labels(method: Method) -> str:
    return f", num_labels={method.task.num_logits}" if method.backbone.has_classifier else ""


def card(method: Method, file: Path | None, use: str, format: Form) -> str:
    """The model card: what it is, how it was made, what it scored, how it is loaded, and how it is asked.

    The score is that of the run directory which the checkpoint `file` is in, if it is in one.
    """
    summary = file.absolute().parents[1] / "summary.json" if file else None
    found: dict[str, Any] = json.loads(summary.read_text()) if summary and summary.exists() else {}
    task, metric = method.task, method.task.monitor.removeprefix("val/")
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    scored = f"- best {metric} on validation: {found['best_score']:.4f}\n" if found.get("best_score") else ""
    settings = {name: value for name, value in method.hparams.items() if name != "task" and not name.startswith("_")}
    listed = "\n".join(f"- {name}: {value}" for name, value in sorted(settings.items()))
    library = {"peft": "peft", "merged": "transformers", "safetensors": "lit_spu"}[format]
    labels = ", ".join(task.labels)
    if method.backbone.has_classifier:
        asked = f"A text is read as it is, and the scores are of {labels or 'a number'}, in this order."
    else:
        asked = (
            f"A text is put into the task's template (the {method.encoding.format} format). The answer is"
            f" the likeliest of the label words {', '.join(task.label_words)}, which stand for"
            f" {labels or 'the ends of the scale'}."
        )
    return f"""---
base_model: {method.backbone.name}
library_name: {library}
tags: [lit_spu, {type(method).__name__}]
---

# {method.backbone.name}, {type(method).__name__}, {task.name}

{(type(method).__doc__ or "").splitlines()[0]} Made by lit_spu {__version__} ({format}).

- task: {task.name}
- trained parameters: {count:,}
{scored}
```python
{use}
```

{asked}

## Settings

{listed}
"""
