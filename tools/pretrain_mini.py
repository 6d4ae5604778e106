"""Pretrain the embedded mini backbones, or go on pretraining a model of the same kind, on text.

    python -m tools.pretrain_mini --kind mini-bert --output FOLDER
    python -m tools.pretrain_mini --kind mini-t5 --steps 4000 --tokens 2048 --lr 0.02 --output FOLDER
    python -m tools.pretrain_mini --from FOLDER --text FILE_OR_FOLDER --output FOLDER --bf16
    python -m tools.pretrain_mini --like FOLDER --text FILE_OR_FOLDER --lr 0.02 --output FOLDER

An encoder learns by masked words (https://arxiv.org/abs/1810.04805, without next-sentence prediction), an
encoder-decoder by corrupted spans (https://arxiv.org/abs/1910.10683). What is random in a step hangs on the seed and
the step alone: a run that is interrupted and resumed ends where an uninterrupted one does.
"""

from __future__ import annotations

import argparse
import lzma
import os
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice, pairwise
from math import log
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_spu.data.synthetic import corpus
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
SENTINELS = 50
RESERVED = 5  # positions for special tokens, and those that RoBERTa leaves out
IGNORED = -100  # the label that the losses of transformers pass over
MASKED = 0.2  # share of the tokens to guess
SPAN = 1.5  # tokens in a corrupted span, on average

Inputs = dict[str, Tensor]
Objective = Callable[[Sequence[Tensor], Random], Inputs]


# --- Text to tokens --------------------------------------------------------------------------------------------------


def read_text(path: Path) -> Iterator[str]:
    """The non-empty lines of a `.txt` or `.txt.xz` file, or of all such files below a folder, by name.

    Raises:
        UserError: if there is no such file, or one is neither UTF-8 nor xz.
    """
    files = [path] if path.is_file() else sorted([*path.rglob("*.txt"), *path.rglob("*.txt.xz")])
    if not files:
        raise UserError(f"--text: {path} is neither a file nor a folder that holds .txt or .txt.xz files.")
    for file in files:
        with lzma.open(file, "rb") if file.suffix == ".xz" else file.open("rb") as lines:
            where = str(file)
            try:
                for number, line in enumerate(lines, start=1):
                    where = f"{file}, line {number}"
                    if text := line.decode().strip():
                        yield text
            except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
                raise UserError(f"--text: {where}: {error}. Plain or xz-compressed UTF-8 was expected.") from error


def names() -> list[str]:
    """What a model is asked and answers with, each of which is to be one token, capitalised or not."""
    words = {word for task in TASKS.values() for word in (task.name, *task.fields, *task.labels, *task.label_words)}
    return sorted(words | {word.capitalize() for word in words})


def common_words(tokenizer: Any, texts: Iterable[str], known: Sequence[str], size: int) -> dict[str, float]:
    """What is `known` and the texts' commonest words, `size` in all, each with its log-likelihood.

    The trainers of `tokenizers` break ties by chance, while what is counted here is the same in every run.
    """
    counts = Counter(
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    )
    words = sorted(counts.keys() - set(known), key=lambda word: (-counts[word], word))[: max(0, size - len(known))]
    return {word: log(max(counts[word], 1) / counts.total()) for word in [*dict.fromkeys(known), *words]}


def wordpiece(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer in the manner of BERT's: whole words, and what is rarer by the letter."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inside = [f"##{character}" for character in string.ascii_lowercase + string.digits]
    known = [*special, *string.printable.strip(), *inside, *(name.lower() for name in names() if name.isalnum())]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = {token: i for i, token in enumerate(common_words(tokenizer, texts, known, size))}
    tokenizer.model = models.WordPiece(ids, unk_token="[UNK]")
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    roles = {f"{token.strip('[]').lower()}_token": token for token in special}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **roles)


def unigram(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A cased tokenizer in the manner of T5's, in which even a class name of two words is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    known = [*special, "▁", *string.printable.strip(), *("▁" + name.replace(" ", "▁") for name in names())]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    vocabulary = common_words(tokenizer, texts, known, size)
    tokenizer.model = models.Unigram(list(vocabulary.items()), unk_id=special.index("<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_special_tokens([AddedToken(token, lstrip=True, special=True) for token in sentinels])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=sentinels,
        model_input_names=["input_ids", "attention_mask"],
    )


TOKENIZERS = {"mini-bert": wordpiece, "mini-t5": unigram}


def windows(tokenizer: Any, texts: Iterable[str], length: int) -> list[Tensor]:
    """The texts' tokens without special ones, long texts cut, at most `length` each."""
    cut: list[Tensor] = []
    texts = iter(texts)
    while some := list(islice(texts, 1000)):
        for ids in tokenizer(some, add_special_tokens=False).input_ids:
            cut += [torch.tensor(ids[i : i + length], dtype=torch.int32) for i in range(0, len(ids), length)]
    return cut


def batches(lengths: Sequence[int], tokens: int, seed: str) -> list[list[int]]:
    """Batches of positions of like length, at most `tokens` each with the padding, shuffled by the seed."""
    rng = Random(seed)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
    cut: list[list[int]] = [[]]
    for i in order:
        if cut[-1] and (len(cut[-1]) + 1) * lengths[i] > tokens:
            cut.append([])
        cut[-1].append(i)
    rng.shuffle(cut)
    return cut


# --- What there is to guess ------------------------------------------------------------------------------------------


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """The rows as one [rows, longest] matrix of whole numbers."""
    return pad_sequence([row.long() for row in rows], batch_first=True, padding_value=value)


def masked_words(tokenizer: Any) -> Objective:
    """Guess a share of the tokens, eight in ten of them masked, one in ten exchanged, one in ten as they are.

    Half of the texts with several sentences are read as two segments, as pairs of sentences will be.
    """
    cls, sep = torch.tensor([tokenizer.cls_token_id]), torch.tensor([tokenizer.sep_token_id])
    stops = torch.tensor(tokenizer.convert_tokens_to_ids([".", "?", "!"]))
    special = torch.tensor(tokenizer.all_special_ids)
    segments = "token_type_ids" in tokenizer.model_input_names

    def inputs(rows: Sequence[Tensor], rng: Random) -> Inputs:
        texts, types = [], []
        for row in rows:
            ends = (torch.isin(row[:-1], stops).nonzero().flatten() + 1).tolist() if rng.random() < 0.5 else []
            first, second = row.tensor_split([rng.choice(ends)]) if ends else (row, row[:0])
            texts.append(torch.cat([cls, first, sep, *([second, sep] if ends else [])]))
            types.append((torch.arange(len(texts[-1])) > len(first) + 1).long())
        ids = padded(texts, tokenizer.pad_token_id)
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        chance, fate = torch.rand(2, *ids.shape, generator=noise)
        guess = (chance < MASKED) & ~torch.isin(ids, special)
        labels = ids.where(guess, IGNORED)
        attention = padded([torch.ones(len(text)) for text in texts], 0)
        other = torch.randint(len(tokenizer), ids.shape, generator=noise)
        ids = ids.masked_fill(guess & (fate < 0.8), tokenizer.mask_token_id).where(~guess | (fate < 0.9), other)
        return {
            "input_ids": ids,
            "attention_mask": attention,
            "labels": labels,
            **({"token_type_ids": padded(types, 0)} if segments else {}),
        }

    return inputs


def corrupted_spans(tokenizer: Any) -> Objective:
    """Guess spans, each of which leaves a sentinel behind; the answer repeats the sentinels in front of the spans."""
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)])
    eos = [tokenizer.eos_token_id]

    def parts(rng: Random, total: int, count: int) -> list[int]:
        """`total` as the sum of `count` positive numbers."""
        cuts = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
        return [b - a for a, b in pairwise(cuts)]

    def corrupt(row: list[int], rng: Random) -> tuple[Tensor, Tensor]:
        hidden = max(1, round(len(row) * MASKED))
        spans = min(max(1, round(hidden / SPAN)), len(row) - hidden + 1, SENTINELS)
        gaps = parts(rng, len(row) - hidden + 2, spans + 1)  # of the two outer ones, one token is not there
        text: list[int] = []
        answer: list[int] = []
        at = -1
        for sentinel, gap, span in zip(sentinels, gaps, parts(rng, hidden, spans), strict=False):
            text += [*row[max(at, 0) : at + gap], sentinel]
            answer += [sentinel, *row[at + gap : at + gap + span]]
            at += gap + span
        return torch.tensor(text + row[at:] + eos), torch.tensor(answer + eos)

    def inputs(rows: Sequence[Tensor], rng: Random) -> Inputs:
        texts, answers = zip(*(corrupt(row.tolist(), rng) for row in rows), strict=True)
        ids = padded(texts, tokenizer.pad_token_id)
        attention = padded([torch.ones(len(text)) for text in texts], 0)
        return {"input_ids": ids, "attention_mask": attention, "labels": padded(answers, IGNORED)}

    return inputs


# --- Training --------------------------------------------------------------------------------------------------------


def new_model(kind: str, tokenizer: Any) -> Any:
    """A mini model with random weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        **ARCHITECTURES[kind],
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model_class(config).from_config(config)


def load(folder: str, weights: bool = True) -> tuple[Any, Any]:
    """The tokenizer of a Hugging Face folder, and its model, or one of its config with random weights.

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
    """The auto class of an encoder-decoder, or else of a masked language model."""
    from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForMaskedLM


def optimizer_of(model: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW for an encoder, Adafactor for an encoder-decoder.

    A T5's weights start at scales from 0.02 to 1: steps in proportion to them learn in 1,500 steps what AdamW's equal
    ones had not in 4,000.
    """
    if model.config.is_encoder_decoder:
        return torch.optim.Adafactor(model.parameters(), lr=lr)
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def pretrain(
    model: Any,
    objective: Objective,
    rows: Sequence[Tensor],
    state: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    *,
    steps: int,
    tokens: int,
    lr: float,
    seed: int,
    bf16: bool,
    save_every: int,
) -> list[float]:
    """Train from `state` on, handing the state to `save` every `save_every` steps; gives each step's loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()  # no dropout, as T5 v1.1 was pretrained
    optimizer = optimizer_of(model, lr)
    losses: list[float] = []
    fresh: list[Tensor] = []  # read all at once: a GPU is not waited for at every step
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    warmup = max(1, steps // 20)
    lengths = [len(row) for row in rows]
    epochs = (batches(lengths, tokens, f"{seed} {epoch}") for epoch in count())
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
        fresh.append(loss.detach())
        if (step + 1) % save_every == 0:
            losses += torch.stack(fresh).tolist()
            fresh.clear()
            print(f"step {len(losses)} of {steps}: loss {fmean(losses[-save_every:]):.3f}", flush=True)
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses})
    return losses + [loss.item() for loss in fresh]


ORIGIN = ": it has read the synthetic text of `lit_spu/data/sample.py`, and knows no more of English"
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
    **how: Any,
) -> None:
    """Pretrain and write a Hugging Face folder; `how` goes to `pretrain`.

    Raises:
        UserError: if there is nothing to start from, or something unfinished in the way.
    """
    unfinished = output / "unfinished.pt"
    start = {
        "kind": kind,
        **{name: path and Path(path).name for name, path in (("from", source), ("like", like), ("text", text))},
    }
    settings = {**start, "texts": texts, "vocabulary": vocabulary, "length": length, **how}
    state = restore(unfinished, settings, resume)
    torch.manual_seed(how["seed"])
    lines = list(islice(read_text(text) if text else corpus(texts, how["seed"]), texts))
    if not lines:
        raise UserError(f"--text: {text} holds no text.")
    if kind:
        tokenizer = TOKENIZERS[kind](lines, vocabulary)
        model = new_model(kind, tokenizer)
    else:
        tokenizer, model = load(str(source or like), weights=like is None)
    room = getattr(model.config, "max_position_embeddings", None)
    if room and length > room - RESERVED:
        raise UserError(f"--length: {length} is too long for this model, which has room for {room - RESERVED}.")
    if room and kind:
        tokenizer.model_max_length = room
    rows = windows(tokenizer, lines, length)
    objective = (corrupted_spans if model.config.is_encoder_decoder else masked_words)(tokenizer)
    output.mkdir(parents=True, exist_ok=True)

    def save(state: dict[str, Any]) -> None:
        part = unfinished.with_suffix(".part")
        torch.save({**state, "settings": settings}, part)
        os.replace(part, unfinished)

    losses = pretrain(model, objective, rows, state, save, **how)
    write(model, tokenizer, output)
    tenth = max(1, len(losses) // 10)
    flags = {name.replace("_", "-"): value for name, value in settings.items() if value not in (None, False)}
    readme = README.format(
        name=output.name,
        origin="" if text else ORIGIN,
        weights=model.num_parameters(),
        vocabulary=len(tokenizer),
        objective="span corruption" if model.config.is_encoder_decoder else "masked words",
        texts=len(lines),
        read=sum(map(len, rows)),
        steps=len(losses),
        loss=fmean(losses[-tenth:]),
        first=fmean(losses[:tenth]),
        command=" ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items()),
    )
    (output / "README.md").write_text(readme)
    unfinished.unlink(missing_ok=True)
    print(readme)


def restore(unfinished: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The state of the run to go on with, if any."""
    if not resume:
        if unfinished.exists():
            raise UserError(f"--output: {unfinished} is an unfinished run. Go on with --resume, or remove the file.")
        return None
    if not unfinished.exists():
        raise UserError(f"--resume: there is no unfinished run in {unfinished.parent}. Start one without --resume.")
    state: dict[str, Any] = torch.load(unfinished, map_location="cpu", weights_only=True)
    for name, value in settings.items():
        if state["settings"][name] != value:
            raise UserError(
                f"--resume: the run was started with {name}={state['settings'][name]}, not {value}. Give the same."
            )
    return state


def write(model: Any, tokenizer: Any, output: Path) -> None:
    """A Hugging Face folder whose weights take half the space and load in full precision, as its config says."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.cpu().half().save_pretrained(output)
    config = output / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    tokenizer.save_pretrained(output)


def positive(given: str) -> int:
    """A whole number above 0."""
    if (number := int(given)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        "pretrain_mini", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--kind", choices=ARCHITECTURES, help="start this mini model, with a tokenizer of its own")
    start.add_argument("--from", dest="source", metavar="FOLDER", help="go on with this Hugging Face model")
    start.add_argument("--like", metavar="FOLDER", help="start a model of this config, with the tokenizer beside it")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER", help="for the model, and for an unfinished run")
    add("--text", type=Path, help="a .txt or .txt.xz file, a text a line, or a folder of them (the sample corpus)")
    add("--texts", type=positive, default=120_000, help="texts to read, or to generate (%(default)s)")
    add("--vocabulary", type=positive, default=1500, help="tokens of a new tokenizer at most (%(default)s)")
    add("--length", type=positive, default=128, help="tokens at which a text is cut into several (%(default)s)")
    add("--steps", type=positive, default=2000, help="optimizer steps (%(default)s)")
    add("--tokens", type=positive, default=4096, help="tokens a batch, padding included (%(default)s)")
    add("--lr", type=float, default=1e-3, help="peak of the learning rate; an encoder-decoder wants 0.02 (%(default)s)")
    add("--seed", type=int, default=0)
    add("--bf16", action="store_true", help="compute in bfloat16 where that is safe")
    add("--save-every", type=positive, default=100, metavar="STEPS", help="keep the state of the run (%(default)s)")
    add("--resume", action="store_true", help="go on with the unfinished run in --output")
    try:
        run(**vars(parser.parse_args(argv)))
    except UserError as error:
        sys.exit(f"pretrain_mini: {error}")


if __name__ == "__main__":
    main()
