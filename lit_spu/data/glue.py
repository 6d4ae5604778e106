"""The data module that all methods share."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule

from lit_spu.data import sources, text
from lit_spu.data.batching import Batch, BucketSampler, Examples, Loader
from lit_spu.data.sources import Parts, Row
from lit_spu.errors import UserError
from lit_spu.tasks import Encoding, Split, load_task

Portion = Split | Literal["predict"]

_PORTIONS: dict[str, tuple[Portion, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class GLUE(LightningDataModule):
    """The tasks of GLUE, SNLI, TREC and SST-5, or one of your own, tokenised for whichever backbone is trained.

    A batch is a dict of tensors: `input_ids` and `attention_mask` (and `token_type_ids`, if the tokenizer gives them),
    long [batch, tokens], padded on the right; `labels`, long [batch], or float32 [batch] for a regression, -1 where
    unknown; `index`, long [batch], the row's number in `examples(...)`. Batches hold texts of like length. Their order
    follows from the seed that `seed_everything` set (else 0) and the epoch.

    Args:
        task: A task's name, or the YAML file of one's own.
        source: Where the examples come from: sample (synthetic), hub, or a folder of files in the official layout.
        batch_size: Examples of a batch on each device.
        max_length: Tokens of an example at most; the longest text loses its end.
        shots: Train on this many examples of each label, validate on as many others of the train split, and test on
            what is the validation split otherwise.
        split_seed: Draws the shots, the limited subsets and the sample data.
        template: How an example becomes text: auto (as the backbone expects), pair, named, cloze, prefix, or a text
            with {field} for each field and {mask} for the blank.
        same_batches: Put the training examples into batches once, and shuffle only these from epoch to epoch. The last
            bits of what a backbone computes for a text depend on the texts beside it: with the same batches, a cache
            gives back exactly what would have been computed.
        num_workers: Processes that prepare batches; 0 is enough, for the examples are tokenised beforehand.
        limit_train: Use only so many training examples, drawn at random with `split_seed`, in their own order.
        limit_validation: The same for each validation set.
        limit_test: The same for each test set.
        text: What to predict instead of the test split: a sentence (the fields separated by tabs), or - to read
            one a line from the standard input.
        cache: Folder that keeps the tokenised examples; by default that of the user's caches.

    Raises:
        UserError: if a value cannot be used; once the data are asked for, if these cannot, or if the model was made for
            another task.
    """

    def __init__(
        self,
        task: str | dict[str, Any] = "sst2",
        source: str = "sample",
        batch_size: int = 32,
        max_length: int = 128,
        shots: int | None = None,
        split_seed: int = 42,
        template: str = "auto",
        same_batches: bool = False,
        num_workers: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
        text: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        at_least_one = {
            "batch_size": batch_size,
            "max_length": max_length,
            "shots": shots,
            "limit_train": limit_train,
            "limit_validation": limit_validation,
            "limit_test": limit_test,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise UserError(f"data.{name}={value}: a whole number of at least 1 is needed.")
        self.task = load_task(task)
        self.source = source
        self.batch_size = batch_size
        self.max_length = max_length
        self.shots = shots
        self.split_seed = split_seed
        self.template = template
        self.same_batches = same_batches
        self.num_workers = num_workers
        self.limit_train = limit_train
        self.limit_validation = limit_validation
        self.limit_test = limit_test
        self.text = text
        self.cache = Path(cache) if cache else user_cache()
        self.encoding: Encoding | None = None
        """How to write the examples, where no model that is trained tells."""
        self._train: Loader | None = None
        self._place: dict[str, int] = {}
        self._rows: dict[Portion, Parts] = {}
        self._examples: dict[Portion, list[Examples]] = {}

    # -- what it holds ----------------------------------------------------------------------------------------------

    @property
    def validation_names(self) -> list[str]:
        """The names of the validation sets, one a loader: the first has none, MNLI's second is `mismatched`."""
        return list(self._parts("validation"))

    def examples(self, portion: Portion, part: str = "") -> list[Row]:
        """The rows of a split (or of what is to predict): the text of each field, and `label`, -1 where unknown."""
        return self._parts(portion)[part]

    def _parts(self, portion: Portion) -> Parts:
        if portion not in self._rows:
            self._rows[portion] = self._load(portion)
        return self._rows[portion]

    def _load(self, portion: Portion) -> Parts:
        if portion == "predict":
            return self._parts("test") if self.text is None else {"": self._given_text()}
        parts = sources.load(self.task, self.source, portion, self.shots, self.split_seed)
        limit = getattr(self, f"limit_{portion}")
        return {part: _drawn(rows, limit, self.split_seed) for part, rows in parts.items()}

    def _given_text(self) -> list[Row]:
        if self.text != "-":
            return sources.parse(self.task, [self.text or ""], "data.text")
        if self.trainer is not None and self.trainer.world_size > 1:
            raise UserError("data.text=-: only one process can read the standard input: set --trainer.devices=1.")
        return sources.parse(self.task, sys.stdin, "standard input")

    def texts(self) -> Iterator[Batch]:
        """All texts that are set up, once and in batches: for who prepares something for each of them."""
        for parts in self._examples.values():
            for examples in parts:
                for start in range(0, len(examples), 256):
                    yield examples[range(start, min(start + 256, len(examples)))]

    def draw(self, count: int) -> Iterator[Batch]:
        """So many training examples (or all), drawn at random with `split_seed`, each in a batch of its own."""
        (examples,) = self._examples["train"]
        for index in Random(self.split_seed).sample(range(len(examples)), min(count, len(examples))):
            yield examples[[index]]

    def as_read_by(self, encoding: Encoding) -> Iterator[Batch]:
        """All training examples as a model of another encoding reads them, in batches of texts of like length."""
        other = copy(self)
        other.trainer, other.encoding = None, encoding  # on all ranks the same
        other._examples = {"train": other._tokenise("train")}
        yield from other._loaders("train")[0]

    # -- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise into the cache, in one process of each machine."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            for portion in _PORTIONS[self.trainer.state.fn]:
                self._tokenise(portion)

    def setup(self, stage: str) -> None:
        """Read the cache."""
        # Rows are tokenised already, so a batch takes a tenth of a millisecond.
        warnings.filterwarnings("ignore", ".*does not have many workers.*", PossibleUserWarning)
        for portion in _PORTIONS[stage]:
            self._examples[portion] = self._tokenise(portion)

    def train_dataloader(self) -> Loader:
        """Shuffled batches of texts of like length."""
        self._train = self._loaders("train", shuffle=True)[0]
        trainer: Any = self.trainer
        if trainer is not None:
            self._train.taken = lambda: trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if self._place:
            self._train.load_state_dict(self._place)
            self._place = {}
        return self._train

    # Lightning restores a loader too, but not one that the schedule asked for before, to count its batches.
    def state_dict(self) -> dict[str, int]:
        """The place in the training data."""
        return self._train.state_dict() if self._train is not None else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next training run at that place."""
        self._place = state_dict

    def val_dataloader(self) -> list[Loader]:
        """One loader for each of `validation_names`."""
        return self._loaders("validation")

    def test_dataloader(self) -> list[Loader]:
        """One loader for each test set."""
        return self._loaders("test")

    def predict_dataloader(self) -> list[Loader]:
        """One loader for each test set, or one for the `text` that was given."""
        return self._loaders("predict")

    # -- how --------------------------------------------------------------------------------------------------------

    def _tokenise(self, portion: Portion) -> list[Examples]:
        """The portion's parts, tokenised now or before."""
        encoding = self._encoding()
        template = text.template_of(self.task, encoding, self.template)
        pad_id = encoding.tokenizer.pad_token_id or 0  # some have none, and the attention mask hides what it is
        return [
            Examples(
                text.encode_cached(rows, self.task, encoding, template, self.max_length, self.cache),
                [row["label"] for row in rows],
                pad_id,
            )
            for rows in self._parts(portion).values()
        ]

    def _encoding(self) -> Encoding:
        model = self.trainer.lightning_module if self.trainer is not None else None
        its_task = getattr(model, "task", self.task)
        if its_task != self.task:
            raise UserError(
                f"The model was made for the task {its_task.name!r}, the data are those of {self.task.name!r}"
                f"{', described otherwise' if its_task.name == self.task.name else ''}: give both the same."
            )
        encoding = self.encoding or getattr(model, "encoding", None)
        if encoding is None:
            raise UserError(
                "GLUE cannot tell how to write the examples: use it with a model that has an `encoding`, as in"
                " Trainer().fit(KLadder(), GLUE()), or set its own `encoding`."
            )
        if encoding.max_tokens is not None and self.max_length > encoding.max_tokens:
            raise UserError(
                f"data.max_length={self.max_length}: this backbone reads at most {encoding.max_tokens} tokens:"
                f" set --data.max_length={encoding.max_tokens} or less."
            )
        return encoding

    def _loaders(self, portion: Portion, shuffle: bool = False) -> list[Loader]:
        shares, pin_memory = {"num_replicas": 1, "rank": 0}, False
        if self.trainer is not None:
            if getattr(self.trainer, "overfit_batches", 0):  # its type does not tell of it
                raise UserError("trainer.overfit_batches would break up the batches: set --data.limit_train instead.")
            shares = self.trainer.distributed_sampler_kwargs or shares
            pin_memory = self.trainer.strategy.root_device.type == "cuda"
        return [
            Loader(
                examples,
                batch_size=None,  # the sampler gives whole batches
                sampler=BucketSampler(
                    examples.tokens.lengths,
                    self.batch_size,
                    shuffle=shuffle,
                    same_batches=self.same_batches,
                    seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),  # where Lightning keeps it
                    **shares,
                ),
                num_workers=self.num_workers,
                persistent_workers=self.num_workers > 0,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # else each pass would draw from the global one, and change the run
            )
            for examples in self._examples[portion]
        ]


def _drawn(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """The first `limit` of the shuffled rows, in their own order: a larger limit holds what a smaller one does."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(Random(seed).sample(range(len(rows)), len(rows))[:limit])]


def user_cache() -> Path:
    """Where tokenised examples are kept if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_spu"
