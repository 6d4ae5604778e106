"""The cells of a study and their flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_spu.errors import UserError
from lit_spu.study.grid import ZERO_SHOT, Cell, Study, build, method_configs

CONFIGS = Path(__file__).parents[2] / "configs"
FULL, LST = f"--config={CONFIGS}/full.yaml", f"--config={CONFIGS}/lst.yaml"


def study(**settings: object) -> Study:
    given: dict[str, object] = {"configs": [f"{CONFIGS}/full.yaml", f"{CONFIGS}/lst.yaml"]}
    return Study(**given | settings)  # type: ignore[arg-type]


def find(cells: list[Cell], row: str, **place: object) -> Cell:
    (found,) = (c for c in cells if c.row == row and all(getattr(c, name) == value for name, value in place.items()))
    return found


def test_every_row_runs_on_every_task_and_backbone_with_every_seed() -> None:
    cells = study(tasks=["sst2", "rte"], backbones=["mini-bert", "/models/x"], seeds=[1, 2], rates=[0.3, 1, 3]).cells()
    trained = [c for c in cells if c.row != ZERO_SHOT]
    places = {(c.row, c.task, c.backbone, c.seed, c.rate) for c in trained}
    assert len(places) == len(trained) == 2 * 2 * 2 * 2 * 3
    assert len(cells) - len(trained) == 2 * 2
    assert len({c.folder for c in cells}) == len(cells)
    assert [c.seed for c in trained] == sorted(
        c.seed for c in trained
    )  # every row has one result before any row has two


def test_particular_flags_come_after_general_flags() -> None:
    cells = study(
        variants={"lst, r=4": [LST, "--model.reduction=4"]},
        backbones=["/models/x"],
        flags=["--trainer.max_epochs=2"],
        flags_for={"lst": ["--model.lr=1"], "x": ["--data.batch_size=8"], "sst2": ["--data.limit_train=9"]},
        seeds=[7],
    ).cells()
    own = ("--data.task=sst2", "--model.backbone=/models/x", "--seed_everything=7")
    for_all, of_place = ("--trainer.max_epochs=2",), ("--data.limit_train=9", "--data.batch_size=8")
    assert find(cells, "full").args == ("fit", FULL, *for_all, *of_place, *own)
    assert find(cells, "lst").args == ("fit", LST, *for_all, "--model.lr=1", *of_place, *own)
    assert find(cells, "lst, r=4").args == ("fit", LST, "--model.reduction=4", *for_all, *of_place, *own)
    assert find(cells, ZERO_SHOT).args == ("validate", FULL, *for_all, *of_place, *own, "--model.head=prompt")


def test_flags_may_contain_seed_and_task_and_the_score_may_be_that_of_test() -> None:
    settings = {"flags": ["--data.cache={task}", "--data.split_seed={seed}"], "seeds": [13, 21]}
    cells, tested = study(**settings).cells(), study(**settings, score="test").cells()
    assert {"--data.split_seed=21", "--data.cache=sst2"} <= set(find(cells, "lst", seed=21).args)
    assert find(tested, "lst", seed=21).args == find(cells, "lst", seed=21).args
    assert find(tested, "lst", seed=21).command.endswith(" && lit-spu test")
    assert find(tested, ZERO_SHOT).args == ("test", *find(cells, ZERO_SHOT).args[1:])
    assert not {c.folder for c in cells} & {c.folder for c in tested}


def test_rates_are_factors_of_each_rows_learning_rate() -> None:
    cells = study(rates=[0.5, 1, 2], seeds=[1], flags_for={"lst": ["--model.lr=0.01", LST]}).cells()
    assert "--model.lr=5e-05" in find(cells, "full", rate=0.5).args
    assert "--model.lr=0.0002" in find(cells, "full", rate=2).args
    assert find(cells, "lst", rate=2).args[-1] == "--model.lr=0.02"
    assert not any(arg.startswith("--model.lr") for arg in find(cells, "full", rate=1).args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"configs": ["nowhere/*.yaml"]}, "matches no file"),
        ({"configs": [f"{CONFIGS}/glue.yaml"]}, "none of them sets a method"),
        ({"variants": {"x": ["--model.k=2"]}}, "must start with --config="),
        ({"variants": {"x": ["--config=nowhere.yaml"]}}, "nowhere.yaml"),
        ({"reference": "ful"}, "Did you mean full?"),
        ({"seeds": [1, 2, 1]}, "seeds: .* none twice"),
        ({"rates": [3.0, 1.0, 1.0]}, "rates: .* none twice"),
        ({"tasks": ["a/own.yaml", "b/own.yaml"]}, "--tasks: two have the name 'own'"),
        ({"backbones": ["a/model", "b/model"]}, "--backbones: two have the name 'model'"),
        *(({name: []}, f"{name}: .* at least 1") for name in ("seeds", "rates", "tasks", "backbones")),
        ({"flags": ["--seed_everything=1"]}, "--seed_everything is set for each run of a study. Use --seeds."),
        ({"flags_for": {"lst": ["--data.task=cola"]}}, "--data.task is set"),
        ({"variants": {"x": [LST, "--run_dir=x"]}}, "--run_dir is set"),
        ({"variants": {"full": [LST]}}, "there is a row 'full' already"),
        ({"variants": {"majority": [LST]}}, "there is a row 'majority' already"),
        ({"variants": {"zero-shot, calibrated": [LST]}}, "there is a row 'zero-shot, calibrated' already"),
        ({"flags_for": {"ls": []}}, "Did you mean lst?"),
    ],
)
def test_mistakes_are_explained(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        study(**settings).cells()


def test_a_pattern_finds_configs_of_methods_only() -> None:
    found = method_configs([f"{CONFIGS}/*.yaml"])
    assert "lst" in found
    assert "glue" not in found


def test_settings_change_methods_that_have_them() -> None:
    settings = {"reduction": 2, "backbone": "mini-bert"}
    assert build(CONFIGS / "lst.yaml", **settings).hparams["reduction"] == 2
    assert "reduction" not in build(CONFIGS / "head.yaml", **settings).hparams


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{class_path: nowhere.module.Class}", "No module named 'nowhere'"),
        ("{class_path: os.system}", "'system' is no method"),
        ("{class_path: lit_spu.nn.lora.LowRank}", "'LowRank' is no method"),
        ("{class_path: LoRa}", "Did you mean LoRA?"),
        ("{class_path: 5}", "'5' is no method"),
        ("{class_path: '.'}", "is no method|Empty module name"),
        ("{class_path: LoRA, init_args: {rnk: 2}}", "LoRA has no setting 'rnk'. Did you mean rank?"),
        ("{class_path: LoRA, init_args: [2]}", "must be settings by name"),
        ("{class_path: LoRA, init_args: {rank: .nan}}", "LoRA.rank: nan is not allowed"),
    ],
)
def test_a_config_without_a_method_is_explained(model: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {model}")
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        build(tmp_path / "config.yaml")
