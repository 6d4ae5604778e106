"""Small valid files of every kind that the command line reads, and strategies that damage them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from lit_spu.backbones.load import ASSETS
from tests.fuzz.harness import run_line

ROOT = Path(__file__).parents[2]

LIMITS = ("--data.limit_train=16", "--data.limit_validation=8", "--data.limit_test=8")

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        2**63,
        1.5,
        math.nan,
        math.inf,
        1e308,
        "",
        " ",
        "nan",
        "text",
        "../..",
        "/",
        "[/red]",
        "\u202e",
    ),
    *([], {}, [[]], [None], {"a": 1}, ["a", "a"], {"class_path": "os.system"}, "é" * 300, {"": ""}),
)


@dataclass(frozen=True)
class Case:
    """A kind of files: the command line that reads them, and the files."""

    line: tuple[str, ...]
    files: tuple[str, ...]


CASES = {
    "config": Case(("fit", "--config=config.yaml"), ("config.yaml",)),
    "study": Case(("compare", "--config=study.yaml", "--dry_run"), ("study.yaml", "config.yaml")),
    "estimate": Case(("estimate", "--configs=config.yaml", "--length=8", "--batch_size=2"), ("config.yaml",)),
    "task": Case(
        ("fit", "--model=LastLayers", "--data.task=task/task.yaml", "--data.source=task"),
        ("task/task.yaml", "task/train.csv", "task/dev.csv"),
    ),
    **{
        f"data-{kind}": Case(("fit", "--model=LastLayers", f"--data.source={kind}"), (f"{kind}/SST-2/train.{kind}",))
        for kind in ("tsv", "csv", "jsonl", "parquet")
    },
    "resume": Case(
        ("fit", "--ckpt_path=run", "--trainer.max_epochs=2"),
        ("run/config.yaml", "run/checkpoints/last.ckpt", "run/launches.jsonl", "run/metrics.csv", "run/summary.json"),
    ),
    "test": Case(("validate", "--ckpt_path=run"), ("run/config.yaml", "run/checkpoints/best.ckpt")),
    "export": Case(
        ("validate", "--ckpt_path=export"),
        ("export/trained.safetensors", "export/README.md"),
    ),
    "adapter": Case(
        ("fit", "--model=LoRA", "--model.adapter=peft"), ("peft/adapter_config.json", "peft/adapter_model.safetensors")
    ),
    "backbone": Case(
        ("fit", "--model=LastLayers", "--model.backbone=backbone"),
        (
            "backbone/config.json",
            "backbone/model.safetensors",
            "backbone/tokenizer.json",
            "backbone/tokenizer_config.json",
        ),
    ),
    "replay": Case(("replay", "--trajectory=mezo", "--output=out"), ("mezo/trajectory.mezo",)),
}


def make_originals(folder: Path) -> None:
    """Make valid files of every kind, by the command line itself where it writes them."""
    folder.mkdir()
    (folder / "config.yaml").write_text((ROOT / "configs" / "lora.yaml").read_text())
    (folder / "study.yaml").write_text(
        "configs: [config.yaml]\nvariants: {lst: [--config=config.yaml, --model.rank=2]}\nreference: config\n"
        "tasks: [sst2]\nbackbones: [mini-bert]\nseeds: [1, 2]\nrates: [1.0, 2.0]\nflags: [--trainer.max_epochs=1]\n"
        "flags_for: {lst: [--model.lr=0.1]}\nscore: validation\n"
    )
    shutil.copytree(ROOT / "examples" / "own_task", folder / "task")
    shutil.copytree(ASSETS / "mini-bert", folder / "backbone")
    rows = [{"sentence": f"a {'fine' if i % 2 else 'dull'} film {i}", "label": i % 2} for i in range(12)]
    for kind in ("tsv", "csv", "jsonl", "parquet"):
        (folder / kind / "SST-2").mkdir(parents=True)
        for split in ("train", "dev"):
            write_rows(rows, folder / kind / "SST-2" / f"{split}.{kind}")
    for line in (
        ("fit", "--model=LoRA", "--model.backbone=mini-bert", "--run_dir=run", *LIMITS),
        ("fit", "--model=MeZO", "--model.directions=1", "--run_dir=mezo", *LIMITS),
        ("export", "--ckpt_path=run", "--output=export"),
        ("export", "--ckpt_path=run", "--output=peft", "--format=peft"),
    ):
        ended = run_line(line, folder, steps=True)
        assert not ended.code, ended
        assert not ended.crash, ended
    missing = [name for case in CASES.values() for name in case.files if not (folder / name).is_file()]
    assert not missing


def write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    """Write rows in the format of the file's extension."""
    if file.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(file)
        return
    separator = {".tsv": "\t", ".csv": ","}.get(file.suffix)
    if separator:
        text = "\n".join(separator.join(map(str, row)) for row in [rows[0], *(r.values() for r in rows)])
    else:
        text = "\n".join(map(json.dumps, rows))
    file.write_text(text + "\n")


@dataclass(frozen=True)
class Damage:
    """A damaged file of a case: its new content, None if it is missing, or a text for a folder in its place."""

    case: str
    file: str
    content: bytes | str | None


@st.composite
def damages(draw: st.DrawFn, originals: Path) -> Damage:
    """Draw a damaged file of any kind."""
    name = draw(st.sampled_from(sorted(CASES)))
    file = draw(st.sampled_from(CASES[name].files))
    content = (originals / file).read_bytes()
    structured = Path(file).suffix in (".yaml", ".json", ".jsonl", ".csv", ".tsv")
    if structured and draw(st.integers(0, 3)):
        return Damage(name, file, draw(_structural(file, content)))
    if draw(st.integers(0, 12)) == 0:
        return Damage(name, file, draw(st.sampled_from([None, "folder"])))
    for _ in range(draw(st.integers(1, 3))):
        content = draw(_bytewise(content))
    return Damage(name, file, content)


@st.composite
def _bytewise(draw: st.DrawFn, content: bytes) -> bytes:
    start = draw(st.integers(0, len(content)))
    length = draw(st.sampled_from([1, 1, 2, 8, 100]))
    new = draw(st.sampled_from([b"", b"\x00", b"\xff\xfe", b"\n", b'"', b"\xef\xbb\xbf", b"{", b"9" * 30, b"\xe9"]))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return content[:start]
    if kind == 1 and content:
        flipped = bytearray(content)
        flipped[min(start, len(content) - 1)] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if kind == 2:
        return content[:start] + content[start : start + length] + content[start:]
    if kind == 3:
        return content[:start] + bytes(length) + content[start + length :]
    return content[:start] + new + content[start + (length if kind == 4 else 0) :]


@st.composite
def _structural(draw: st.DrawFn, file: str, content: bytes) -> bytes:
    """Draw a change of the contents: a value replaced, removed or given twice, at any depth."""
    text = content.decode()
    if Path(file).suffix in (".csv", ".tsv", ".jsonl"):
        lines = text.splitlines()
        index = draw(st.integers(0, len(lines) - 1))
        cells = lines[index].split("\t" if file.endswith("tsv") else ",")
        cell = draw(st.integers(0, len(cells) - 1))
        odd = json.dumps(draw(st.sampled_from(ODD)))
        cells[cell : cell + 1] = draw(st.sampled_from([[odd], [], [odd, odd], [cells[cell], odd], [""]]))
        changed = ("\t" if file.endswith("tsv") else ",").join(cells)
        lines[index : index + 1] = draw(st.sampled_from([[changed], [], [changed, changed], [changed, ""]]))
        return ("\n".join(lines) + "\n").encode()
    is_json = file.endswith("json")
    settings = json.loads(text) if is_json else yaml.safe_load(text)
    places = list(_places(settings))
    parent, key = draw(st.sampled_from(places))
    odd = draw(st.sampled_from(ODD))
    change = draw(st.integers(0, 4))
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[draw(st.sampled_from(["", " ", "odd", f"{key}x", str(key)[:-1]]))] = parent.pop(key)
    elif change == 2:
        parent[key] = [parent[key]]
    else:
        parent[key] = odd
    return (json.dumps(settings) if is_json else yaml.safe_dump(settings, allow_unicode=True)).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
        yield value, key
        yield from _places(value[key])


def write_damage(damage: Damage, folder: Path) -> None:
    """Write a damaged file into a copy of the valid files."""
    file = folder / damage.file
    file.unlink()
    if isinstance(damage.content, bytes):
        file.write_bytes(damage.content)
    elif damage.content:
        file.mkdir()
