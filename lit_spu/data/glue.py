"""Data module of all methods."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from lit_spu.data import sources, text
from lit_spu.data.batching import Batch, BucketSampler, Examples, Loader
from lit_spu.data.sources import Parts
from lit_spu.data.tables import decode
from lit_spu.data.text import Row
from lit_spu.errors import UserError, describe_changes
from lit_spu.ranges import Checked, Count, Range, Seed, ShareBelowOne, Text
from lit_spu.tasks import Encoding, Split, Task, load_task

Portion = Split | Literal["predict"]

_PORTIONS: dict[str, tuple[Portion, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class GLUE(Checked, LightningDataModule):
    """Data module of the GLUE tasks, SNLI, TREC, SST-5 and custom tasks, tokenised for the backbone that is trained.

    A batch is a dict of tensors. `input_ids` and `attention_mask` (and `token_type_ids` if the tokenizer has them) are
    int64 [batch, tokens], padded on the right. `labels` is int64 [batch], or float32 [batch] for a regression. An
    unknown label, which only a batch to predict can have, is -1, or NaN for a regression. `index`, int64 [batch], is
    the row's number in `examples(...)`. The texts of a batch have similar lengths. The order of the batches depends on
    the epoch and the random seed of `seed_everything` (0 if not set).

    Args:
        task: Name of a task, such as sst2, or a custom task's YAML file, such as examples/own_task/task.yaml.
        source: Source of the examples. Allowed: sample (synthetic), hub (a download from the Hugging Face hub), or a
            folder with the official files. Example: --data.source=glue reads glue/SST-2/train.tsv for sst2.
        batch_size: Number of examples of a batch on each device.
        max_length: Largest number of tokens of an example. Longer texts are cut at their end.
        shots: Number of training examples of each label, for few-shot training. The validation examples are the
            same number of other examples of the train split. The test examples are the original validation split.
        split_seed: Random seed of the few-shot, held-out and limited examples, and of the synthetic sample data.
        held_out: Share of the training examples, drawn at random with `split_seed`, that are the validation split; the
            others are the train split. The test examples are the original validation split. So the checkpoint is
            chosen on other examples than those that are reported. It excludes `shots`. Example: --data.held_out=0.1.
        template: Form of the input text. Allowed: auto (the form that the backbone expects), pair, named, cloze,
            prefix, or a text with {field} for each field of the task and {mask} for the mask token.
            Example: --data.template='{sentence} All in all, it was {mask}.'
        same_batches: Use the same batches in every epoch, in a new order. The last bits of a text's hidden states
            depend on the other texts of its batch. With the same batches, an activation cache returns exactly what
            the backbone would compute.
        num_workers: Number of processes that prepare batches. 0 is enough, because examples are tokenised in advance.
        limit_train: Number of training examples to use, drawn at random with `split_seed`, in their original order.
            With `held_out`, the held-out examples are among them.
        limit_validation: The same for each validation set.
        limit_test: The same for each test set.
        text: Text to predict instead of the test split. Allowed: one example (tabs separate its fields), or - to read
            one example from each line of the standard input. Example: --data.text='A fine film.'
        cache: Folder of the cache of tokenised examples. The default is lit_spu in the user's cache folder.

    Raises:
        UserError: if a value is not allowed. When the data are loaded: if the source is not available, if a row cannot
            be used, or if the model was made for another task.
    """

    def __init__(
        self,
        task: Text | dict = "sst2",  # type: ignore[type-arg]  # jsonargparse reads texts inside a dict[str, Any] as YAML
        source: Text = "sample",
        batch_size: Count = 32,
        max_length: Annotated[int, Range(8)] = 128,
        shots: Count | None = None,
        split_seed: Seed = 42,
        held_out: ShareBelowOne = 0.0,
        template: Text = "auto",
        same_batches: bool = False,
        num_workers: Annotated[int, Range(0, 256)] = 0,
        limit_train: Count | None = None,
        limit_validation: Count | None = None,
        limit_test: Count | None = None,
        text: Text | None = None,
        cache: Text | None = None,
    ) -> None:
        super().__init__()
        if shots and held_out:
            raise UserError(
                f"data.held_out={held_out:g} and data.shots={shots} both draw the validation split from the train"
                " split: leave one of them out."
            )
        self.save_hyperparameters()
        self.task = load_task(task)
        self.source = source
        self.batch_size = batch_size
        self.max_length = max_length
        self.shots = shots
        self.split_seed = split_seed
        self.held_out = held_out
        self.template = template
        self.same_batches = same_batches
        self.num_workers = num_workers
        self.limit_train = limit_train
        self.limit_validation = limit_validation
        self.limit_test = limit_test
        self.text = text
        self.cache = Path(cache) if cache else user_cache()
        self.encoding: Encoding | None = None
        """Tokenizer and format of the examples; set it only if the model has no `encoding`."""
        self.transform_batches: Callable[[Iterator[Batch]], Iterator[Batch]] | None = None
        """Function that the batches of all loaders pass until the run ends. A method sets it to add cached states."""
        self._train_loader: Loader | None = None
        self._resume_state: dict[str, Any] = {}
        self._rows: dict[Portion, Parts] = {}
        self._examples: dict[Portion, list[Examples]] = {}

    # -- Examples ---------------------------------------------------------------------------------------------------

    def part_names(self, portion: Portion) -> list[str]:
        """Return the names of a split's parts, one for each loader. The first is empty; MNLI's second `mismatched`."""
        return list(self._parts(portion))

    def examples(self, portion: Portion, part: str = "") -> list[Row]:
        """Return the rows of a split or of the texts to predict: each field's text, and `label`.

        The examples without a label are not among those of the test split. To predict, their label is None.
        """
        return self._parts(portion)[part]

    def texts(self) -> list[Iterator[Batch]]:
        """Return for each data set of the current stage an iterator of all its examples, in batches."""
        return [_in_batches(examples) for parts in self._examples.values() for examples in parts]

    def draw(self, count: int | None, batch_size: int = 1) -> Iterator[Batch]:
        """Yield training examples, drawn with `split_seed`, in batches of texts of similar lengths.

        Args:
            count: Largest number of examples; None yields all.
            batch_size: Number of examples of a batch.
        """
        (examples,) = self._examples["train"]
        indices = Random(self.split_seed).sample(range(len(examples)), min(count or len(examples), len(examples)))
        if batch_size > 1:
            indices.sort(key=lambda index: int(examples.tokens.lengths[index]))
        for start in range(0, len(indices), batch_size):
            yield examples[indices[start : start + batch_size]]

    def as_read_by(self, encoding: Encoding) -> Iterator[Batch]:
        """Yield all training examples in batches, tokenised for another model, such as a teacher."""
        other = copy(self)
        other.trainer, other.encoding = None, encoding  # no trainer: every process gets all examples
        other.transform_batches = None
        other._examples = {"train": other._tokenise("train")}
        yield from other._make_loaders("train")[0]

    def _parts(self, portion: Portion) -> Parts:
        if portion not in self._rows:
            self._rows[portion] = self._load_parts(portion)
        return self._rows[portion]

    def _load_parts(self, portion: Portion) -> Parts:
        if portion == "predict":
            return self._load_split("test") if self.text is None else {"": self._parse_text()}
        parts = self._load_split(portion)
        if portion == "train":
            _warn_of_one_label(self.task, parts[""])
        return sources.select_labelled(self.task, parts) if portion == "test" else parts

    def _load_split(self, split: Split) -> Parts:
        drawn = (self.shots, self.split_seed, self.held_out, self.limit_train)
        parts = sources.load_split(self.task, self.source, split, *drawn)
        limit = getattr(self, f"limit_{split}")
        return {part: sources.draw_rows(rows, limit, self.split_seed) for part, rows in parts.items()}

    def _parse_text(self) -> list[Row]:
        if self.text != "-":
            return sources.parse_lines(self.task, [self.text or ""], "data.text")
        if self.trainer is not None and self.trainer.world_size > 1:
            raise UserError("data.text=-: only one process can read the standard input: set --trainer.devices=1.")
        content: bytes | str = getattr(sys.stdin, "buffer", sys.stdin).read()
        given = content if isinstance(content, str) else decode(content, "standard input")
        return sources.parse_lines(self.task, io.StringIO(given, newline=None), "standard input")

    # -- Lightning hooks --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise the examples into the cache, in one process of each machine."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            for portion in self._portions(self.trainer.state.fn):
                self._tokenise(portion)

    def setup(self, stage: str) -> None:
        """Read the tokens from the cache."""
        for portion in self._portions(stage):
            self._examples[portion] = self._tokenise(portion)

    def _portions(self, stage: str) -> list[Portion]:
        """Return the portions that a stage reads. A fit without validation batches reads no validation split."""
        no_validation = stage == "fit" and self.trainer is not None and not self.trainer.limit_val_batches
        return [portion for portion in _PORTIONS[stage] if not (portion == "validation" and no_validation)]

    def teardown(self, stage: str) -> None:
        self.transform_batches = None

    def on_exception(self, exception: BaseException) -> None:
        self.transform_batches = None

    def train_dataloader(self) -> Loader:
        """Return the loader of shuffled training batches."""
        self._train_loader = self._make_loaders("train", shuffle=True)[0]
        trainer: Any = self.trainer
        if trainer is not None:
            self._train_loader.num_trained = lambda: trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if self._resume_state:
            self._train_loader.load_state_dict(self._resume_state)
            self._resume_state = {}
        return self._train_loader

    # Lightning also restores loaders, but not one that was made earlier so that a schedule could count its batches.
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data, and the fingerprint of the data."""
        if self._train_loader is None:
            return {}
        return {**self._train_loader.state_dict(), "data": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the next training run at the position in `state_dict`.

        Raises:
            UserError: in training, if these are not the data of that position.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            then, now = state_dict.get("data", {}), self.fingerprint() | {"seed": state_dict.get("seed")}
            if different := describe_changes(then, now):
                raise UserError(
                    f"--ckpt_path resumes a run on its own data, but these differ: {different}.\n"
                    "Give the same data, or leave out --ckpt_path to start a new run."
                )
        self._resume_state = state_dict

    def fingerprint(self) -> dict[str, Any]:
        """Return what the training batches and the validation scores depend on: settings, and digests of examples."""
        shares = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return {
            "batch_size": self.batch_size,
            "same_batches": self.same_batches,
            "seed": _shuffle_seed(),
            "devices": (shares or {}).get("num_replicas", 1),
        } | {
            f"examples of {portion}": " ".join(part.digest for part in self._examples[portion])
            for portion in _PORTIONS["fit"]
            if portion in self._examples
        }

    def val_dataloader(self) -> list[Loader]:
        """Return one loader for each validation set."""
        return self._make_loaders("validation")

    def test_dataloader(self) -> list[Loader]:
        """Return one loader for each test set."""
        return self._make_loaders("test")

    def predict_dataloader(self) -> list[Loader]:
        """Return one loader for each test set, or one loader for `text`."""
        return self._make_loaders("predict")

    # -- Tokens and loaders -----------------------------------------------------------------------------------------

    def _tokenise(self, portion: Portion) -> list[Examples]:
        """Return the portion's parts, tokenised or from the cache."""
        encoding = self._find_encoding()
        template = text.template_of(self.task, encoding, self.template)
        unknown = math.nan if self.task.regression else -1
        pad_id = encoding.tokenizer.pad_token_id or 0  # without a pad token, any id will do: the mask hides it
        model = self.trainer.lightning_module if self.trainer is not None else None
        length_multiple = getattr(model, "length_multiple", 1) if portion == "train" else 1
        return [
            Examples(
                text.encode_cached(rows, self.task, encoding, template, self.max_length, self.cache),
                [unknown if row["label"] is None else row["label"] for row in rows],
                pad_id,
                length_multiple,
            )
            for rows in self._parts(portion).values()
        ]

    def _find_encoding(self) -> Encoding:
        """Return this module's or the model's encoding, after checking that the task and `max_length` fit the model."""
        model = self.trainer.lightning_module if self.trainer is not None else None
        self._check_task(getattr(model, "task", self.task))
        encoding = self.encoding or getattr(model, "encoding", None)
        if encoding is None:
            raise UserError(
                "GLUE has no tokenizer: use it with a model that has an `encoding`, as in"
                " Trainer().fit(KLadder(), GLUE()), or set its own `encoding`."
            )
        if encoding.max_tokens is not None and self.max_length > encoding.max_tokens:
            raise UserError(
                f"data.max_length={self.max_length}, but this backbone reads at most {encoding.max_tokens} tokens:"
                f" set --data.max_length={encoding.max_tokens} or less."
            )
        return encoding

    def _check_task(self, task: Task) -> None:
        """Raise a UserError if the model was made for another task than the data."""
        if task != self.task:
            described = " with other settings" if task.name == self.task.name else ""
            raise UserError(
                f"The model was made for the task {task.name!r}, but the data are of the task {self.task.name!r}"
                f"{described}: use the same task for both."
            )

    def _make_loaders(self, portion: Portion, shuffle: bool = False) -> list[Loader]:
        shares, pin_memory = {"num_replicas": 1, "rank": 0}, False
        if self.trainer is not None:
            if getattr(self.trainer, "overfit_batches", 0):  # not declared in the type of `trainer`
                raise UserError("trainer.overfit_batches would break up the batches: set --data.limit_train instead.")
            shares = self.trainer.distributed_sampler_kwargs or shares
            pin_memory = self.trainer.strategy.root_device.type == "cuda"
        loaders = [
            Loader(
                examples,
                batch_size=None,  # the sampler returns whole batches
                sampler=BucketSampler(
                    examples.tokens.lengths,
                    self.batch_size,
                    shuffle=shuffle,
                    same_batches=self.same_batches,
                    seed=_shuffle_seed(),
                    **shares,
                ),
                num_workers=self.num_workers,
                persistent_workers=self.num_workers > 0,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # otherwise each iteration draws from the global generator
            )
            for examples in self._examples[portion]
        ]
        for loader in loaders:
            loader.transform = self._transform
        return loaders

    def _transform(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return self.transform_batches(batches) if self.transform_batches else batches


def _in_batches(examples: Examples) -> Iterator[Batch]:
    for start in range(0, len(examples), 256):
        yield examples[range(start, min(start + 256, len(examples)))]


def _warn_of_one_label(task: Task, rows: list[Row]) -> None:
    """Warn if there is nothing to learn, because all examples have the same label or score."""
    labels = {row["label"] for row in rows}
    if len(labels) == 1 and len(rows) > 1:
        label = labels.pop()
        name = label if task.regression else repr(task.labels[label])
        rank_zero_warn(f"All {len(rows)} training examples of {task.name} have the label {name}: nothing to learn.")


def _shuffle_seed() -> int:
    """Return the random seed of the order of batches, that of `seed_everything` if it was called."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def user_cache() -> Path:
    """Return the default folder of the cache of tokenised examples."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_spu"
