"""The tool that pretrains the embedded models, and these models."""

from __future__ import annotations

import lzma
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_spu.data.synthetic import corpus, generate
from lit_spu.data.text import render
from lit_spu.tasks import TASKS
from tools import mini_objectives, mini_text, pretrain_mini

ASSETS = Path(__file__).parents[1] / "lit_spu" / "backbones" / "assets"
MINIS = sorted(pretrain_mini.ARCHITECTURES)
TEXTS = list(corpus(300, seed=5))
rows_of_tokens = st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=60), min_size=1, max_size=8)


class NumberTokenizer:
    """Fake tokenizer: words are numbers below 100, sentinels are the numbers from 1000 on."""

    eos_token_id, pad_token_id, cls_token_id, sep_token_id, mask_token_id = 1, 0, 2, 3, 4
    all_special_ids = (0, 1, 2, 3, 4)
    model_input_names = ("input_ids", "token_type_ids", "attention_mask")

    def __len__(self) -> int:
        return 100

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [10 + i if len(token) == 1 else 1000 + i for i, token in enumerate(tokens)]


def auto(name: str) -> tuple[Any, Any]:
    """Return the tokenizer and the model as plain transformers loads them."""
    from transformers import AutoConfig, AutoTokenizer

    kind = pretrain_mini.model_class(AutoConfig.from_pretrained(ASSETS / name))
    return AutoTokenizer.from_pretrained(ASSETS / name), kind.from_pretrained(ASSETS / name).eval()


# --- Objectives ------------------------------------------------------------------------------------------------------


@given(rows_of_tokens, st.integers())
def test_labels_of_corrupted_spans_complete_the_text(rows: list[list[int]], seed: int) -> None:
    inputs = mini_objectives.corrupted_spans(NumberTokenizer())([torch.tensor(row) for row in rows], Random(seed))
    for row, ids, labels in zip(rows, inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
        spans: dict[int, list[int]] = {}
        for token in labels[: labels.index(1)]:
            if token >= 1000:
                spans[token] = []
            else:
                spans[max(spans)].append(token)
        text = ids[: ids.index(1)]
        assert [word for token in text for word in spans.get(token, [token])] == row
        assert sorted(spans) == [token for token in text if token >= 1000]
        assert all(spans.values())
        assert sum(map(len, spans.values())) == max(1, round(0.2 * len(row)))


@given(rows_of_tokens, st.integers())
def test_only_masked_words_change_and_the_labels_hold_the_originals(rows: list[list[int]], seed: int) -> None:
    inputs = mini_objectives.masked_words(NumberTokenizer())([torch.tensor(row) for row in rows], Random(seed))
    ids, labels = inputs["input_ids"], inputs["labels"]
    before = torch.where(labels == -100, ids, labels)
    for row, text, types, real in zip(rows, before, inputs["token_type_ids"], inputs["attention_mask"], strict=True):
        whole = text[real.bool()].tolist()
        assert [token for token in whole if token >= 10] == row
        assert whole[0] == 2
        assert whole[-1] == 3
        first = whole.index(3) + 1
        assert types.tolist() == [0] * first + [1] * (len(whole) - first) + [0] * (len(types) - len(whole))
        assert first == len(whole) or row[first - 3] in (10, 11, 12)  # a second segment begins after a full stop
    assert not torch.isin(labels, torch.tensor(NumberTokenizer.all_special_ids)).any()


def test_shares_of_predicted_masked_and_replaced_words() -> None:
    rows = [torch.full((120,), 50)] * 400
    inputs = mini_objectives.masked_words(NumberTokenizer())(rows, Random(0))
    predicted = inputs["labels"] == 50
    now = inputs["input_ids"][predicted]
    words = 400 * 120
    assert predicted.sum().item() / words == pytest.approx(0.2, abs=0.01)
    assert (now == 4).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (now == 50).float().mean().item() == pytest.approx(0.1, abs=0.02)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 200), st.text())
def test_batches_hold_every_text_once_within_the_limit_of_tokens(lengths: list[int], tokens: int, seed: str) -> None:
    batches = mini_text.make_batches(lengths, tokens, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens for batch in batches)
    assert batches == mini_text.make_batches(lengths, tokens, seed)


# --- The command -----------------------------------------------------------------------------------------------------


def pretrain(output: Path, *flags: str) -> None:
    pretrain_mini.main(["--output", str(output), "--steps", "4", "--tokens", "200", "--save-every", "2", *flags])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", MINIS)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--kind", kind, "--texts", "200")
    pretrain(tmp_path / "whole", *flags)
    clip = torch.nn.utils.clip_grad_norm_
    calls: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return clip(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "parts", *flags)
    with pytest.raises(SystemExit, match=r"unfinished\.pt is an unfinished run\. Continue it with --resume"):
        pretrain(tmp_path / "parts", *flags)
    with pytest.raises(SystemExit, match=r"started with texts=200, not 100\. Give the same"):
        pretrain(tmp_path / "parts", "--kind", kind, "--texts", "100", "--resume")
    pretrain(tmp_path / "parts", *flags, "--resume")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts" / "unfinished.pt").exists()


@pytest.mark.parametrize("kind", MINIS)
def test_pretraining_continues_from_a_given_model_on_given_text(kind: str, tmp_path: Path) -> None:
    with lzma.open(tmp_path / "more.txt.xz", "wt") as file:
        file.write("\n\n".join(TEXTS))
    pretrain(tmp_path / "out", "--from", str(ASSETS / kind), "--text", str(tmp_path))
    assert list(mini_text.read_text(tmp_path)) == TEXTS
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (ASSETS / kind / "tokenizer.json").read_text()
    assert weights(tmp_path / "out") != weights(ASSETS / kind)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"--from {kind} --text {tmp_path.name} " in readme
    assert str(tmp_path) not in readme


@pytest.mark.parametrize("kind", MINIS)
def test_a_new_model_of_a_given_config_uses_its_tokenizer(kind: str, tmp_path: Path) -> None:
    (tmp_path / "like").mkdir()
    for file in (ASSETS / kind).glob("*.json"):
        (tmp_path / "like" / file.name).write_text(file.read_text())
    pretrain(tmp_path / "like-it", "--like", str(tmp_path / "like"), "--texts", "200")
    tokenizer, model = pretrain_mini.load(str(tmp_path / "like-it"))
    assert len(tokenizer) == model.config.vocab_size == pretrain_mini.load(str(ASSETS / kind))[1].config.vocab_size
    readme = (tmp_path / "like-it" / "README.md").read_text()
    assert "--like like " in readme
    pretrain(tmp_path / "on", "--from", str(ASSETS / kind), "--texts", "200")
    losses = [
        float(re.findall(r"mean loss ([\d.]+)", text)[0])
        for text in (readme, (tmp_path / "on" / "README.md").read_text())
    ]
    assert losses[0] > losses[1] + 1  # its weights were random


@pytest.mark.slow
def test_errors_are_explained_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.txt.xz").write_bytes(b"no archive")
    bert = ("--kind", "mini-bert")
    for flags, message in (
        ((*bert, "--text", str(tmp_path / "none")), "--text: .*none is neither a file nor a folder"),
        ((*bert, "--text", str(tmp_path / "bad.txt")), r"--text: .*bad\.txt, line 2: .*0xff"),
        ((*bert, "--text", str(tmp_path / "empty.txt")), r"--text: .*empty\.txt holds no text"),
        (
            (*bert, "--text", str(tmp_path / "broken.txt.xz")),
            r"--text: .*broken\.txt\.xz: .*Give plain or xz-compressed UTF-8",
        ),
        (
            (*bert, "--texts", "9", "--length", "500"),
            "--length: 500 is too long for this model: give 155 or less",
        ),
        ((*bert, "--resume"), "--resume: there is no unfinished run"),
        (("--from", str(tmp_path)), "--from: .* holds no masked language model or encoder-decoder"),
        (("--like", str(tmp_path)), "--like: .* holds no masked language model or encoder-decoder"),
    ):
        with pytest.raises(SystemExit, match=f"pretrain_mini: {message}"):
            pretrain(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


# --- The embedded models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MINIS)
def test_embedded_models_load_in_full_precision_and_are_small(name: str) -> None:
    tokenizer, model = auto(name)
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size
    assert (ASSETS / name / "model.safetensors").stat().st_size < 5e6
    assert not re.search(r"/(tmp|work|home|root)/", (ASSETS / name / "README.md").read_text())


@pytest.mark.parametrize("name", MINIS)
def test_labels_are_one_token_and_sample_text_is_tokenized_by_words(name: str) -> None:
    tokenizer, _ = auto(name)
    skip = len(tokenizer("It was", add_special_tokens=False).input_ids)

    def spelled(word: str) -> list[int]:
        ids: list[int] = tokenizer(f"It was {word}", add_special_tokens=False).input_ids[skip:]
        return ids

    for task in TASKS.values():
        answers = [task.label_words, task.labels] if name == "mini-t5" else [task.label_words]
        for words in answers:
            for form in (words, [word.capitalize() for word in words]):
                ids = [spelled(word) for word in form]
                assert all(len(i) == 1 and i[0] != tokenizer.unk_token_id for i in ids), form
                assert len({i[0] for i in ids}) == len(words)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= 2 + len(re.findall(r"\w+|[^\w\s]", text))
        written = tokenizer.decode(ids, skip_special_tokens=True)
        assert written.replace(" ", "") == (text if name == "mini-t5" else text.lower()).replace(" ", "")


@pytest.mark.parametrize("name", MINIS)
def test_zero_shot_accuracy_of_an_embedded_model_is_between_chance_and_solved(name: str) -> None:
    tokenizer, model = auto(name)
    task = TASKS["sst2"]
    rows = generate(task, "validation")
    mask = tokenizer.mask_token or "<extra_id_0>"
    inputs = tokenizer([render(task.cloze, row, mask) for row in rows], padding=True, return_tensors="pt")
    skip = len(tokenizer("It was", add_special_tokens=False).input_ids)
    words = [tokenizer(f"It was {word}", add_special_tokens=False).input_ids[skip] for word in task.label_words]
    with torch.no_grad():
        if tokenizer.mask_token:
            logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
        else:
            prefix = torch.tensor([[0, tokenizer.convert_tokens_to_ids(mask)]]).expand(len(rows), -1)
            logits = model(**inputs, decoder_input_ids=prefix).logits[:, -1]
    right = logits[:, words].argmax(1) == torch.tensor([row["label"] for row in rows])
    assert 0.58 < right.float().mean().item() < 0.9  # 500 examples: chance is 0.50 with a deviation of 0.02
