"""A resumed run repeats its data, seed and precision, or is refused and changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lit_spu.__main__ import main
from lit_spu.data.batching import Examples
from lit_spu.data.text import Tokens
from tests.runs import refusal

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:This run is resumed with"),
    pytest.mark.filterwarnings("ignore:Before training, accuracy"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

WORDS = ("great", "dull", "bright", "terrible", "good", "bad")


@pytest.fixture(scope="module")
def trained(tiny: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task, its files in `files`, and `run`, which has trained on them for one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "files").mkdir()
    (folder / "own.yaml").write_text("fields: [text]\nlabels: [bad, good]\n")
    for split, count in (("train", 24), ("dev", 12)):
        rows = [f"the film was {WORDS[i % 6]} . a story,{('good', 'bad')[i % 2]}" for i in range(count)]
        (folder / "files" / f"{split}.csv").write_text("\n".join(["text,label", *rows, ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = ["--data.task=own.yaml", "--data.source=files", "--data.cache=cache", "--data.batch_size=8"]
        short = ["--trainer.max_epochs=1", "--trainer.callbacks=null", "--seed_everything=7"]
        for name, model in (("run", "HeadOnly"), ("mezo", "MeZOBitFit")):
            main(["fit", f"--model={model}", f"--model.backbone={tiny('bert')}", *given, *short, f"--run_dir={name}"])
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which is the working directory."""
    copy = shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(copy)
    return copy


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["run", "run/checkpoints/last.ckpt"])
@pytest.mark.parametrize(
    "flag",
    [
        "data.batch_size=16",
        "data.max_length=64",
        "data.shots=2",
        "data.split_seed=1",
        "data.held_out=0.25",
        "data.template='{text} It was {mask} .'",
        "data.same_batches=true",
        "data.limit_train=20",
        "data.limit_validation=8",
        "seed_everything=8",
        "trainer.precision=bf16-mixed",
        "trainer.precision=64",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=0.5",
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=1",
    ],
)
def test_settings_that_change_the_numbers_are_refused(
    flag: str, place: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(work)
    message = refusal(["fit", f"--ckpt_path={place}", "--trainer.max_epochs=2", f"--{flag}"], capsys)
    assert f"--{flag.partition('=')[0]}=" in message
    assert "(checkpoint: " in message
    assert content(work) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("train", ",good", ",bad"), ("train", "great", "dull"), ("dev", ",good", ",bad")],
)
def test_other_examples_in_a_file_of_the_same_length_are_refused(
    name: str, old: str, new: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = work / "files" / f"{name}.csv"
    file.write_text(file.read_text().replace(old, new, 1))
    before = content(work / "run")
    message = refusal(["fit", "--ckpt_path=run", "--trainer.max_epochs=2"], capsys)
    assert f"examples of {'train' if name == 'train' else 'validation'} " in message
    assert content(work / "run") == before


@pytest.mark.slow
def test_the_best_checkpoint_is_chosen_on_held_out_examples_and_tested_on_the_validation_split(work: Path) -> None:
    def metrics(name: str, *args: str) -> Any:
        main([*args, f"--run_dir={name}"])
        return json.loads((work / name / "summary.json").read_text())

    saved = yaml.safe_load((work / "run" / "config.yaml").read_text())
    given = [f"--data.{name}={saved['data'][name]}" for name in ("task", "source", "cache", "batch_size")]
    model = ["--model=HeadOnly", f"--model.backbone={saved['model']['init_args']['backbone']}", "--model.lr=0.01"]
    trained = metrics("new", "fit", *model, *given, "--data.held_out=0.5", "--trainer.max_epochs=2")
    assert trained["steps"] == 2 * 2  # 12 of 24 examples
    validated = metrics("validated", "validate", "--ckpt_path=new")["metrics"]["val/accuracy"]
    tested = metrics("tested", "test", "--ckpt_path=new")["metrics"]["test/accuracy"]
    original = metrics("original", "validate", "--ckpt_path=new", "--data.held_out=0")["metrics"]["val/accuracy"]
    assert validated == trained["best_score"]
    assert tested == original != validated


@pytest.mark.parametrize("place", ["run", "run/checkpoints/last.ckpt"])
def test_settings_that_change_no_number_are_allowed(place: str, work: Path) -> None:
    given = ["--trainer.max_epochs=2", "--trainer.precision=32-true", "--data.limit_test=3"]
    shutil.copytree("run", "straight")
    main(["fit", "--ckpt_path=straight", "--trainer.max_epochs=2"])
    (work / "files").rename("moved")
    main(["fit", f"--ckpt_path={place}", "--data.source=moved", "--data.cache=other", "--run_dir=new", *given])
    weights = [torch.load(Path(run, "checkpoints", "last.ckpt"), weights_only=True) for run in ("straight", "new")]
    assert weights[0]["global_step"] == weights[1]["global_step"] == 6
    assert weights[1]["run"] == weights[0]["run"]
    for name, weight in weights[0]["state_dict"].items():
        assert torch.equal(weights[1]["state_dict"][name], weight)


@pytest.mark.parametrize(("flag", "name"), [("batch_size=4", "batch_size"), ("limit_train=16", "examples of train")])
def test_a_trajectory_continues_on_its_own_data(
    flag: str, name: str, work: Path, capsys: pytest.CaptureFixture[str], tiny: Callable[[str], str]
) -> None:
    model = ["--model=MeZOBitFit", f"--model.backbone={tiny('bert')}", "--model.trajectory=mezo"]
    data = ["--data.task=own.yaml", "--data.source=files", "--data.cache=cache", "--data.batch_size=8"]
    rest = ["--seed_everything=7", "--trainer.max_epochs=2", "--trainer.callbacks=null"]
    message = refusal(["fit", *model, *data, f"--data.{flag}", *rest, "--run_dir=other"], capsys)
    assert f"{name} " in message
    assert "trajectory.mezo" in message
    assert not list(work.glob("other/**/*.ckpt"))
    main(["fit", *model, *data, *rest, "--run_dir=same"])


def test_the_digest_covers_tokens_their_bounds_types_and_labels() -> None:
    def digest(**changes: Any) -> str:
        examples = {"labels": [0, 1], "ids": [1, 2, 3, 4], "starts": [0, 2, 4], "types": [0, 0, 1, 1]} | changes
        return make(examples).digest

    def make(values: dict[str, Any]) -> Examples:
        types = None if values["types"] is None else np.array(values["types"], np.uint8)
        tokens = Tokens(np.array(values["ids"], np.int32), np.array(values["starts"]), types)
        return Examples(tokens, values["labels"], 0)

    others = [digest(labels=[1, 0]), digest(ids=[1, 2, 4, 3]), digest(starts=[0, 1, 4]), digest(types=None)]
    assert digest() == digest()
    assert len({digest(), *others, digest(types=[0, 0, 1, 0]), digest(labels=[0.0, 1.0])}) == 7


@pytest.mark.parametrize("place", ["files", "own.yaml", "nowhere"])
def test_initial_weights_that_are_none_are_blamed_on_their_own_flag(
    place: str, work: Path, capsys: pytest.CaptureFixture[str], tiny: Callable[[str], str]
) -> None:
    model = ["--model=MeZOBitFit", f"--model.backbone={tiny('bert')}", f"--model.weights={place}"]
    data = ["--data.task=own.yaml", "--data.source=files", "--data.cache=cache", "--trainer.callbacks=null"]
    message = refusal(["fit", *model, *data, "--run_dir=other"], capsys)
    assert message.startswith(f"error: --model.weights: {place} ")
    assert "--ckpt_path" not in message
    assert not (work / "other").exists()


@pytest.mark.slow
def test_names_of_a_task_that_yaml_reads_as_other_values_stay_names(
    trained: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint's settings return to the parser, where a text in a list of a task must not be read once more."""
    Path("own.yaml").write_text("fields: [text]\nlabels: ['no', 'null']\nlabel_words: ['007', '1.0']\n")
    for file in Path("files").iterdir():
        file.write_text(file.read_text().replace(",good", ",no").replace(",bad", ",null"))
    given = ["--data.task=own.yaml", "--data.source=files", "--data.cache=cache", "--data.batch_size=8"]
    main(["fit", "--model=HeadOnly", *given, "--trainer.max_epochs=1", "--trainer.callbacks=null", "--run_dir=named"])
    main(["validate", "--ckpt_path=named"])
    main(["fit", "--ckpt_path=named", "--trainer.max_epochs=2"])
    capsys.readouterr()
    main(["predict", "--ckpt_path=named", "--data.text=good"])
    assert capsys.readouterr().out.split("\t")[0] in ("no", "null")
