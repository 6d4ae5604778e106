import io
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_spu.data import text as text_module
from lit_spu.data.batching import Batch, BucketSampler
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS, Encoding, Task
from tests.data.conftest import WORDS, word_encoding

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning",  # lightning 2.6 asks torch 2.13 for it
)


class Recorder(LightningModule):
    """Model with one weight that records the rows of its batches."""

    def __init__(self, encoding: Encoding, task: Task = TASKS["sst2"]) -> None:
        super().__init__()
        self.encoding = encoding
        self.task = task
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch["index"].tolist())
        return (self.weight - batch["input_ids"].float().mean()).square().sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not self.trainer.sanity_checking:
            self.seen["val"].append([dataloader_idx, *batch["index"].tolist()])

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["test"].append([dataloader_idx, *batch["index"].tolist()])

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return batch["index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**(quiet | kwargs))


@pytest.fixture
def source(tmp_path: Path) -> str:
    """50 training, 21 validation and 9 test examples, each of its own length."""
    for name, count in (("train", 50), ("dev", 21), ("test", 9)):
        path = tmp_path / "glue" / "SST-2" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            " ".join(WORDS[i : 2 * i % 37 + i + 1]) + (f"\t{i % 2}" if name != "test" else "") for i in range(count)
        ]
        path.write_text("\n".join(["sentence\tlabel" if name != "test" else "sentence", *lines]))
    return str(tmp_path / "glue")


def data(source: str, tmp_path: Path, **kwargs: Any) -> GLUE:
    settings: dict[str, Any] = {"source": source, "batch_size": 8, "cache": str(tmp_path / "cache")}
    return GLUE(**(settings | kwargs))


def test_a_trainer_gets_all_batches(source: str, tmp_path: Path, encoding: Encoding) -> None:
    model, glue = Recorder(encoding), data(source, tmp_path)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, glue)
    first, second = model.seen["train"][:7], model.seen["train"][7:]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(50))
    assert first != second
    assert len(model.seen["val"]) == 2 * 3
    assert sorted(i for batch in model.seen["val"][:3] for i in batch[1:]) == list(range(21))
    predictions: Any = run.predict(model, glue)
    assert sorted(i for batch in predictions for i in batch.tolist()) == list(range(9))
    assert [row["label"] for row in glue.examples("predict")] == [None] * 9


def test_batches_hold_the_rows_of_their_index(source: str, tmp_path: Path, encoding: Encoding) -> None:
    glue = data(source, tmp_path)
    glue.encoding = encoding
    glue.setup("fit")
    rows = glue.examples("train")
    for batch in glue.train_dataloader():
        for ids, mask, label, i in zip(
            *(batch[k] for k in ("input_ids", "attention_mask", "labels", "index")), strict=True
        ):
            oracle: Any = encoding.tokenizer(rows[i]["sentence"])
            assert ids[mask.bool()].tolist() == oracle["input_ids"]
            assert label == rows[i]["label"]


def test_setup_does_not_change_the_warning_filters(source: str, tmp_path: Path, encoding: Encoding) -> None:
    glue = data(source, tmp_path)
    glue.encoding = encoding
    before = list(warnings.filters)
    glue.setup("fit")
    assert list(warnings.filters) == before


def test_the_order_depends_on_the_global_seed(
    source: str, tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(seed: str) -> list[list[int]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        glue = data(source, tmp_path)
        glue.encoding = encoding
        glue.setup("fit")
        return [batch["index"].tolist() for batch in glue.train_dataloader()]

    assert order("1") == order("1") != order("2")


def test_rows_are_tokenised_once_for_all_runs(
    source: str, tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, max_epochs=1).fit(Recorder(encoding), data(source, tmp_path))
    monkeypatch.setattr(text_module, "encode", None)
    trainer(tmp_path, max_epochs=1).fit(Recorder(encoding), data(source, tmp_path))


def test_the_default_cache_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert GLUE().cache == tmp_path / "lit_spu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert GLUE().cache == Path.home() / ".cache" / "lit_spu"


# --- Parts, limits, shots --------------------------------------------------------------------------------------------


def test_mnli_has_two_validation_sets(tmp_path: Path) -> None:
    folder = tmp_path / "MNLI"
    folder.mkdir()
    for name, count in (("train", 4), ("dev_matched", 3), ("dev_mismatched", 5)):
        lines = [f"w{i}\tw{count}\tneutral" for i in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tgold_label", *lines]))
    model, glue = Recorder(word_encoding(), TASKS["mnli"]), data(str(tmp_path), tmp_path, task="mnli")
    trainer(tmp_path).validate(model, glue)
    assert glue.part_names("validation") == ["", "mismatched"]
    assert Counter(batch[0] for batch in model.seen["val"] for _ in batch[1:]) == {0: 3, 1: 5}
    assert {row["hypothesis"] for row in glue.examples("validation", "mismatched")} == {"w5"}
    held_out = data(str(tmp_path), tmp_path, task="mnli", held_out=0.5)
    assert held_out.part_names("validation") == [""]
    assert held_out.examples("test", "mismatched") == glue.examples("validation", "mismatched")


def test_a_larger_limit_contains_a_smaller_one_in_order(source: str, tmp_path: Path) -> None:
    whole = [row["sentence"] for row in data(source, tmp_path).examples("train")]
    chosen = {
        n: [whole.index(row["sentence"]) for row in data(source, tmp_path, limit_train=n).examples("train")]
        for n in (5, 20)
    }
    assert {n: len(rows) for n, rows in chosen.items()} == {5: 5, 20: 20}
    assert set(chosen[5]) < set(chosen[20])
    assert chosen[20] == sorted(chosen[20]) != list(range(20))
    assert len(data(source, tmp_path, limit_train=999).examples("train")) == 50
    glue = data(source, tmp_path, limit_validation=4, limit_test=3)
    assert (len(glue.examples("train")), len(glue.examples("validation")), len(glue.examples("predict"))) == (50, 4, 3)
    other = data(source, tmp_path, limit_train=5, split_seed=1).examples("train")
    assert [whole.index(row["sentence"]) for row in other] != chosen[5]


def test_few_shot_training_tests_on_the_validation_split(source: str, tmp_path: Path) -> None:
    glue = data(source, tmp_path, shots=3)
    assert Counter(row["label"] for row in glue.examples("train")) == {0: 3, 1: 3}
    assert Counter(row["label"] for row in glue.examples("validation")) == {0: 3, 1: 3}
    assert glue.examples("test") == data(source, tmp_path).examples("validation")


@pytest.mark.parametrize("limit", [None, 20])
@pytest.mark.parametrize("sample", [False, True])
def test_the_checkpoint_is_chosen_on_held_out_training_examples(
    limit: int | None, sample: bool, source: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"limit_train": limit}
    source = "sample" if sample else source
    pool = data(source, tmp_path, **given).examples("train")
    glue = data(source, tmp_path, held_out=0.1, **given)
    train, validation = glue.examples("train"), glue.examples("validation")
    assert len(validation) == round(0.1 * len(pool))
    assert sorted(map(str, train + validation)) == sorted(map(str, pool))
    for rows in (train, validation):
        assert [row for row in pool if row in rows] == rows  # in their order, with their labels
    assert glue.examples("test") == glue.examples("predict") == data(source, tmp_path).examples("validation")
    assert data(source, tmp_path, held_out=0.1, **given).examples("validation") == validation
    assert sample or data(source, tmp_path, held_out=0.1, split_seed=1, **given).examples("validation") != validation
    few = data(source, tmp_path, held_out=0.1, limit_validation=1, limit_test=3, **given)
    assert few.examples("train") == train
    assert [len(few.examples(split)) for split in ("validation", "test")] == [1, 3]
    assert few.examples("validation")[0] in validation


# --- Templates -------------------------------------------------------------------------------------------------------


def test_the_template_is_the_backbones_or_the_users(source: str, tmp_path: Path) -> None:
    words = [*WORDS, "It", "was", ".", "Well", ",", "sst2", "sentence", ":"]

    def first(template: str, encoding: Encoding) -> str:
        glue = data(source, tmp_path, template=template)
        glue.encoding = encoding
        glue.setup("validate")
        batch = next(iter(glue.val_dataloader()[0]))
        return str(encoding.tokenizer.decode(batch["input_ids"][-1][batch["attention_mask"][-1].bool()]))

    start, end = "[CLS] w", " [SEP]"
    assert first("auto", word_encoding("cloze", words)).endswith(" It was [MASK] ." + end)
    assert first("auto", word_encoding("prefix", words)).endswith(" It was" + end)
    assert first("auto", word_encoding("named", words)).startswith("[CLS] sst2 sentence : w")
    assert first("auto", word_encoding("pair", words)).startswith(start)
    assert first("cloze", word_encoding("pair", words)).endswith(" It was [MASK] ." + end)
    assert first("Well , {sentence} {mask}", word_encoding("cloze", words)).startswith("[CLS] Well , w")
    with pytest.raises(UserError, match=r"data\.template: \{text\} is not a field"):
        first("{text}", word_encoding("pair", words))


# --- Predicting given texts ------------------------------------------------------------------------------------------


def test_a_sentence_is_predicted(source: str, tmp_path: Path, encoding: Encoding) -> None:
    glue = data(source, tmp_path, text="w1 w2 w3")
    predictions: Any = trainer(tmp_path).predict(Recorder(encoding), glue)
    assert [batch.tolist() for batch in predictions] == [[0]]
    assert glue.examples("predict") == [{"sentence": "w1 w2 w3", "label": None}]


def test_standard_input_is_predicted(
    source: str, tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"w{i}\n" for i in range(11))))
    glue = data(source, tmp_path, text="-")
    predictions: Any = trainer(tmp_path).predict(Recorder(encoding), glue)
    assert sorted(i for batch in predictions for i in batch.tolist()) == list(range(11))
    assert glue.examples("predict")[10]["sentence"] == "w10"


@pytest.mark.parametrize("content", [b"w1\nw2 \xff\n", b"w1\n\xff\xfe"])
def test_standard_input_that_is_not_unicode_is_refused(
    source: str, tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "ascii", "surrogateescape"))
    with pytest.raises(UserError, match=r"standard input, line 2: the byte 0xff is not valid UTF-8"):
        trainer(tmp_path).predict(Recorder(encoding), data(source, tmp_path, text="-"))
    with pytest.raises(UserError, match=r"data\.text, line 1 has '.udcff', half of a character"):
        trainer(tmp_path).predict(Recorder(encoding), data(source, tmp_path, text="w1 \udcff"))


# --- Unneeded and useless splits -------------------------------------------------------------------------------------


def test_a_run_without_validation_needs_no_validation_split(source: str, tmp_path: Path, encoding: Encoding) -> None:
    (Path(source) / "SST-2" / "dev.tsv").unlink()
    model = Recorder(encoding)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, data(source, tmp_path))
    assert len(model.seen["train"]) == 7
    with pytest.raises(UserError, match="The validation split of sst2"):
        trainer(tmp_path, max_epochs=1).fit(model, data(source, tmp_path))


def test_training_on_one_label_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text("sentence\tlabel\nw1\t1\nw2\t1\nw3\t0\n")
    with pytest.warns(UserWarning, match="All 2 training examples of sst2 have the label 'positive': nothing to learn"):
        data(str(tmp_path), tmp_path, limit_train=2, split_seed=4).examples("train")
    assert len(data(str(tmp_path), tmp_path).examples("train")) == 3


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch_size", "max_length", "shots", "limit_train", "limit_validation", "limit_test"])
def test_numbers_below_their_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"GLUE\.{name}: 0 is not allowed\. Give a whole number"):
        data("sample", Path(), **{name: 0})


@pytest.mark.parametrize("share", [1, 1.0, -0.1, float("nan"), True, None])
def test_a_held_out_share_outside_its_range_is_refused(share: Any) -> None:
    with pytest.raises(UserError, match=r"GLUE\.held_out: .* is not allowed\. Give a number from 0 to below 1"):
        data("sample", Path(), held_out=share)


def test_held_out_examples_and_shots_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"data\.held_out=0\.1 and data\.shots=4 both .*leave one of them out"):
        data("sample", Path(), held_out=0.1, shots=4)


def test_a_model_for_another_task_is_refused(source: str, tmp_path: Path, encoding: Encoding) -> None:
    with pytest.raises(UserError, match="made for the task 'rte', but the data are of the task 'sst2'"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(encoding, TASKS["rte"]), data(source, tmp_path))


def test_a_missing_encoding_is_an_error(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use it with a model that has an `encoding`"):
        data(source, tmp_path).setup("fit")


def test_overfit_batches_is_refused(source: str, tmp_path: Path, encoding: Encoding) -> None:
    with pytest.raises(UserError, match=r"set --data\.limit_train instead"):
        trainer(tmp_path, overfit_batches=2, max_epochs=1).fit(Recorder(encoding), data(source, tmp_path))


# --- Resuming, and several devices -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves nothing
@pytest.mark.parametrize(("num_workers", "limit"), [(0, 1.0), (0, 5), (2, 1.0)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    source: str, tmp_path: Path, encoding: Encoding, num_workers: int, limit: float
) -> None:
    settings: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": limit, "val_check_interval": 0.5}

    def run(ckpt_path: str | None = None, **kwargs: Any) -> Recorder:
        model = Recorder(encoding)
        trainer(tmp_path, **(settings | kwargs)).fit(
            model, data(source, tmp_path, num_workers=num_workers), ckpt_path=ckpt_path
        )
        return model

    folder = tmp_path / "checkpoints"
    each_step = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    each_epoch = ModelCheckpoint(folder, "end-{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = run(callbacks=[each_step, each_epoch], enable_checkpointing=True)
    steps = len(whole.seen["train"])
    saved = {int(path.stem.rpartition("=")[2]): path for path in sorted(folder.iterdir())}
    ends = [path for path in folder.iterdir() if path.stem.startswith("end")]
    assert set(saved) == set(range(1, steps + 1))
    assert len(ends) == 3
    tried = [*saved.items(), *((int(path.stem.rpartition("=")[2]), path) for path in ends)]
    for step, path in tried if num_workers == 0 else tried[2:9:3] + tried[-3:]:  # workers are slow to start
        resumed = run(str(path))
        assert resumed.seen["train"] == whole.seen["train"][step:], path.name
        assert torch.equal(resumed.weight, whole.weight)


def test_lightning_does_not_replace_the_sampler(
    source: str, tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    glue = data(source, tmp_path)
    run = trainer(tmp_path, max_epochs=1)
    glue.trainer = run
    monkeypatch.setattr(type(run), "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 1})
    glue.encoding = encoding
    glue.setup("fit")
    loader = glue.train_dataloader()
    assert isinstance(loader.sampler, BucketSampler)
    assert (loader.sampler.num_replicas, loader.sampler.rank) == (2, 1)
    monkeypatch.setattr(type(run._accelerator_connector), "is_distributed", True)
    assert not run._data_connector._requires_distributed_sampler(loader)


@pytest.mark.xdist_group("two processes")  # two such tests at once may pick the same port
@pytest.mark.slow
def test_two_processes_train_on_the_batches_of_one(source: str, tmp_path: Path, encoding: Encoding) -> None:
    one = Recorder(encoding)
    trainer(tmp_path, max_epochs=2).fit(one, data(source, tmp_path, batch_size=8))
    script = tmp_path / "two.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from tests.data.conftest import word_encoding\n"
        "from tests.data.test_glue import Recorder, data, trainer\n"
        "source, folder = sys.argv[1], Path(sys.argv[2])\n"
        "model = Recorder(word_encoding())\n"
        "run = trainer(folder, max_epochs=2, devices=2, strategy='ddp')\n"
        "run.fit(model, data(source, folder, batch_size=4))\n"
        "(folder / f'rank{run.global_rank}.json').write_text(json.dumps(model.seen))\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), source, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert len(ranks[0]["train"]) == len(one.seen["train"])
    for whole, *shares in zip(one.seen["train"], *(rank["train"] for rank in ranks), strict=True):
        assert sorted(whole) == sorted(shares[0] + shares[1])
    counted = Counter(i for rank in ranks for batch in rank["val"] for i in batch[1:])
    assert counted == dict.fromkeys(range(21), 2)  # once in each of two epochs
    assert len(ranks[0]["val"]) == len(ranks[1]["val"])
