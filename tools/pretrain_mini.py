"""Pretrain the embedded mini backbones, or continue the pretraining of a similar model, on text.

    python -m tools.pretrain_mini --kind mini-bert --output FOLDER
    python -m tools.pretrain_mini --kind mini-t5 --steps 4000 --tokens 2048 --lr 0.02 --output FOLDER
    python -m tools.pretrain_mini --from FOLDER --text FILE_OR_FOLDER --output FOLDER --bf16
    python -m tools.pretrain_mini --like FOLDER --text FILE_OR_FOLDER --lr 0.02 --output FOLDER

The objective of an encoder is masked words (https://arxiv.org/abs/1810.04805, without next-sentence prediction), that
of an encoder-decoder is corrupted spans (https://arxiv.org/abs/1910.10683). The random numbers of a step depend on the
seed and the step alone, so that a run that is interrupted and resumed ends as an uninterrupted one does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lit_spu.checkpoints.trained_weights import read_checkpoint, write_checkpoint
from lit_spu.data.synthetic import corpus
from lit_spu.errors import UserError
from lit_spu.files import check_writable, system_error, write_text
from tools.mini_objectives import Objective, corrupted_spans, masked_words
from tools.mini_text import TOKENIZERS, make_batches, read_text, tokenize

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "mini-bert": {
        "model_type": "bert",
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 160,
    },
    "mini-t5": {
        "model_type": "t5",
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 512,
        "num_layers": 4,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}
NUM_RESERVED = 5
"""Positions for special tokens, and those that RoBERTa does not use."""


# --- Models ----------------------------------------------------------------------------------------------------------


def new_model(kind: str, tokenizer: Any) -> Any:
    """Return a mini model with random weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        **ARCHITECTURES[kind],
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model_class(config).from_config(config)


def load(folder: str, weights: bool = True) -> tuple[Any, Any]:
    """Load the tokenizer and the model of a Hugging Face folder.

    Args:
        folder: The folder.
        weights: Load the weights; otherwise the model gets random ones.

    Raises:
        UserError: if it holds no masked language model or encoder-decoder, or no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        auto, tokenizer = model_class(config), AutoTokenizer.from_pretrained(folder)
        return tokenizer, auto.from_pretrained(folder, dtype=torch.float32) if weights else auto.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--{'from' if weights else 'like'}: {folder} holds no masked language model or encoder-decoder: "
            f"{str(error).splitlines()[0]}"
        ) from error


def model_class(config: Any) -> Any:
    """Return the auto class of an encoder-decoder or of a masked language model."""
    from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForMaskedLM


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """Write a Hugging Face folder with weights in half precision, which load in full precision by its config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.cpu().half().save_pretrained(output)
    config = output / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    tokenizer.save_pretrained(output)


# --- Training --------------------------------------------------------------------------------------------------------


def make_optimizer(model: Any, lr: float) -> torch.optim.Optimizer:
    """Return AdamW for an encoder, Adafactor for an encoder-decoder.

    The initial weights of a T5 have scales from 0.02 to 1. Adafactor's steps, in proportion to them, reach in 1,500
    steps a loss that AdamW's equal steps did not reach in 4,000.
    """
    if model.config.is_encoder_decoder:
        return torch.optim.Adafactor(model.parameters(), lr=lr)
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def pretrain(
    model: Any,
    objective: Objective,
    rows: Sequence[Tensor],
    state: dict[str, Any] | None,
    save_state: Callable[[dict[str, Any]], None],
    *,
    steps: int,
    tokens: int,
    lr: float,
    seed: int,
    bf16: bool,
    save_every: int,
) -> list[float]:
    """Train a model.

    Args:
        model: The model.
        objective: Makes the inputs of a batch.
        rows: The texts as token ids.
        state: The state of an interrupted run to continue, as given to `save_state`.
        save_state: Called with the state every `save_every` steps.
        steps: Optimizer steps in all.
        tokens: Tokens per batch, padding included.
        lr: Peak learning rate.
        seed: Random seed.
        bf16: Compute under autocast to bfloat16.
        save_every: Steps between two saved states.

    Returns:
        The loss of each step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()  # no dropout, as in the pretraining of T5 v1.1
    optimizer = make_optimizer(model, lr)
    losses: list[float] = []
    pending: list[Tensor] = []  # losses on the device, read together: reading one waits for the GPU
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    warmup = max(1, steps // 20)
    lengths = [len(row) for row in rows]
    epochs = (make_batches(lengths, tokens, f"{seed} {epoch}") for epoch in count())
    for step, batch in enumerate(islice(chain.from_iterable(epochs), steps)):
        if step < len(losses):
            continue
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        inputs = objective([rows[i] for i in batch], Random(f"{seed} {step}"))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(**{name: value.to(device) for name, value in inputs.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pending.append(loss.detach())
        if (step + 1) % save_every == 0:
            losses += torch.stack(pending).tolist()
            pending.clear()
            print(f"step {len(losses)} of {steps}: loss {fmean(losses[-save_every:]):.3f}", flush=True)
            save_state({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses})
    return losses + [loss.item() for loss in pending]


def restore_state(unfinished: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """Return the state of the run to continue, if there is one.

    Raises:
        UserError: if there is none to resume, one would be overwritten, or its settings differ.
    """
    if not resume:
        if unfinished.exists():
            raise UserError(f"--output: {unfinished} is an unfinished run. Continue it with --resume, or remove it.")
        return None
    if not unfinished.exists():
        raise UserError(f"--resume: there is no unfinished run in {unfinished.parent}. Start one without --resume.")
    state = read_checkpoint(unfinished, entries=("model", "optimizer", "losses", "settings"))
    for name, value in settings.items():
        if state["settings"][name] != value:
            raise UserError(
                f"--resume: the run was started with {name}={state['settings'][name]}, not {value}. Give the same."
            )
    return state


# --- The command -----------------------------------------------------------------------------------------------------

ORIGIN = ": it was trained on the synthetic text of `lit_spu/data/synthetic.py`, and has read no other English"
README = """# {name}

A model to try methods out with{origin}.
Written by `tools/pretrain_mini.py`: {weights:,} weights, {vocabulary:,} tokens in the vocabulary; {objective} on
{texts:,} texts ({read:,} tokens) for {steps:,} steps; mean loss {first:.3f} over the first tenth of the steps,
{loss:.3f} over the last.

    python -m tools.pretrain_mini {command} --output FOLDER
"""


def run(
    output: Path,
    kind: str | None,
    source: str | None,
    like: str | None,
    text: Path | None,
    texts: int,
    vocabulary: int,
    length: int,
    resume: bool,
    **training: Any,
) -> None:
    """Pretrain a model and write it as a Hugging Face folder; `training` are the settings of `pretrain`.

    Raises:
        UserError: if there is no model or text, or an unfinished run would be overwritten.
    """
    unfinished = output / "unfinished.pt"
    settings = {
        "kind": kind,
        **{name: path and Path(path).name for name, path in (("from", source), ("like", like), ("text", text))},
        "texts": texts,
        "vocabulary": vocabulary,
        "length": length,
        **training,
    }
    check_writable(output, "--output")
    state = restore_state(unfinished, settings, resume)
    torch.manual_seed(training["seed"])
    lines = list(islice(read_text(text) if text else corpus(texts, training["seed"]), texts))
    if not lines:
        raise UserError(f"--text: {text} holds no text.")
    if kind:
        tokenizer: Any = TOKENIZERS[kind](lines, vocabulary)
        model = new_model(kind, tokenizer)
    else:
        tokenizer, model = load(str(source or like), weights=like is None)
    set_max_length(tokenizer, model, length, is_new=kind is not None)
    rows = tokenize(tokenizer, lines, length)
    objective = (corrupted_spans if model.config.is_encoder_decoder else masked_words)(tokenizer)
    output.mkdir(parents=True, exist_ok=True)

    def save_state(state: dict[str, Any]) -> None:
        write_checkpoint({**state, "settings": settings}, unfinished)

    losses = pretrain(model, objective, rows, state, save_state, **training)
    save(model, tokenizer, output)
    readme = describe(output.name, model, len(tokenizer), rows, len(lines), losses, settings)
    write_text(output / "README.md", readme)
    unfinished.unlink(missing_ok=True)
    print(readme)


def set_max_length(tokenizer: Any, model: Any, length: int, is_new: bool) -> None:
    """Check that the model can read texts of this length, and tell a new tokenizer the longest.

    Raises:
        UserError: if the texts are too long.
    """
    max_positions = getattr(model.config, "max_position_embeddings", None)
    if not max_positions:
        return
    if length > max_positions - NUM_RESERVED:
        raise UserError(f"--length: {length} is too long for this model: give {max_positions - NUM_RESERVED} or less.")
    if is_new:
        tokenizer.model_max_length = max_positions


def describe(
    name: str,
    model: Any,
    vocabulary: int,
    rows: Sequence[Tensor],
    num_texts: int,
    losses: Sequence[float],
    settings: Mapping[str, Any],
) -> str:
    """Return the README of a model: its size, its training and the command line."""
    tenth = max(1, len(losses) // 10)
    flags = {name.replace("_", "-"): value for name, value in settings.items() if value not in (None, False)}
    return README.format(
        name=name,
        origin="" if settings["text"] else ORIGIN,
        weights=model.num_parameters(),
        vocabulary=vocabulary,
        objective="span corruption" if model.config.is_encoder_decoder else "masked words",
        texts=num_texts,
        read=sum(map(len, rows)),
        steps=len(losses),
        loss=fmean(losses[-tenth:]),
        first=fmean(losses[:tenth]),
        command=" ".join(f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in flags.items()),
    )


def positive(given: str) -> int:
    """Parse a whole number above 0."""
    if (number := int(given)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "pretrain_mini", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--kind", choices=ARCHITECTURES, help="a new mini model, with a new tokenizer")
    model.add_argument("--from", dest="source", metavar="FOLDER", help="a Hugging Face model to train further")
    model.add_argument("--like", metavar="FOLDER", help="a new model of this folder's config, with its tokenizer")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER", help="for the model, and for an unfinished run")
    add(
        "--text", type=Path, help="a .txt or .txt.xz file with a text per line, or a folder of them (the sample corpus)"
    )
    add("--texts", type=positive, default=120_000, help="number of texts to read or to generate (%(default)s)")
    add("--vocabulary", type=positive, default=1500, help="tokens of a new tokenizer at most (%(default)s)")
    add("--length", type=positive, default=128, help="tokens at which a text is cut into several (%(default)s)")
    add("--steps", type=positive, default=2000, help="optimizer steps (%(default)s)")
    add("--tokens", type=positive, default=4096, help="tokens per batch, padding included (%(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate; give 0.02 for an encoder-decoder (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--bf16", action="store_true", help="compute under autocast to bfloat16")
    add("--save-every", type=positive, default=100, metavar="STEPS", help="steps between saved states (%(default)s)")
    add("--resume", action="store_true", help="continue the unfinished run in --output")
    try:
        run(**vars(parser.parse_args(argv)))
    except Exception as error:
        problem = error if isinstance(error, UserError) else system_error(error)
        if problem is None:
            raise
        sys.exit(f"pretrain_mini: {problem}")


if __name__ == "__main__":
    main()
