"""Generator of the synthetic sample data: examples of every task from small grammars, with its fields and labels.

With synthetic examples every command runs without a download. Results on them are not results on English. Single
words do not reveal the label: it depends on negation, contrast, agreement and synonyms. So the sample data can separate
methods, as real tasks do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from random import Random
from zlib import crc32

from lit_spu.data.text import Row, render
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS, Task

SIZES = {"train": 2000, "validation": 500, "test": 500}
_SPLITS = ("train", "train", "train", "train", "validation", "test")  # the split of a text, by its checksum
_CORRECT_RATE = 0.9  # share of the corpus's prompts with the right answer: a signal, but not enough to learn the task

Texts = tuple[str, ...]
"""Texts of an example, in the order of the task's fields."""

Grammar = Callable[[Random, int], Texts]
"""Function that writes the texts of an example with a given label."""

_WORDS = {
    "good": "great good brilliant moving funny charming clever superb gripping fresh warm lovely stunning witty",
    "bad": "terrible bad dull boring clumsy awful tedious stale weak cold ugly silly lifeless bland",
    "fair": "okay average ordinary passable unremarkable fair",
    "part": "film movie plot acting music ending script cast story dialogue camera humour pace opening hero villain",
    "is": "is was seems looks feels",
    "not": "not|never|hardly|far from|anything but",
    "very": "very really utterly absolutely truly",
    "though": "although though while",
    "one": "boy girl dog singer farmer queen poet baker king cousin",
    "near": "near behind beside above with below",
    "place": "river castle market bridge station tower harbour school temple museum",
    "does": "like see follow know help call trust meet want need",
    "creature": "animal bird fish insect plant tree",
    "thing": "telephone engine compass piano rocket camera clock telescope radio bicycle lamp ship",
    "made": "invented designed built sold discovered painted owned wrecked",
    "quality": "largest oldest fastest smallest rarest strongest heaviest tallest",
    "country": "France Egypt Japan Brazil India Canada Norway Kenya Chile Greece",
    "letters": "NASA UNESCO CPU GPS BBC FBI DNA RAM USB ATM NATO LED",
    "name": "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Mary Nick Olga Paul Rosa Sam Tina Victor",
    "box": "box bag suitcase drawer basket chest",
    "item": "ball book statue vase trophy pillow",
}
_CHOICES = {slot: re.split(r"\|" if "|" in words else " ", words) for slot, words in _WORDS.items()}

# Facts of an event. Each fact has a list of groups, a group has two synonyms, and some groups also have a class name:
# `synonym/synonym:class`.
_FACTS = {
    "who": "man/guy:person woman/lady:person boy/lad:child girl/lass:child doctor/physician:worker"
    " lawyer/attorney:worker",
    "does": "buy/purchase repair/fix sell/trade clean/wash find/discover hide/conceal",
    "how": "big/large small/little old/ancient new/modern cheap/inexpensive costly/expensive",
    "what": "car/automobile:vehicle bike/bicycle:vehicle sofa/couch:furniture stool/seat:furniture"
    " violin/fiddle:instrument flute/recorder:instrument",
    "where": "in_town/in_the_city at_the_shop/at_the_store near_the_woods/near_the_forest by_the_sea/by_the_ocean"
    " in_the_yard/in_the_garden on_the_road/on_the_street",
    "when": "at_dawn/at_sunrise at_dusk/at_sunset at_noon/at_midday at_night/after_dark in_autumn/in_the_fall"
    " daily/every_day",
}
_EVENTS = {
    fact: [re.split("[/:]", names.replace("_", " ")) for names in groups.split()] for fact, groups in _FACTS.items()
}
_OPTIONAL = ("how", "where", "when")
Event = dict[str, int]
"""An event: the group of each of its facts, as a position in `_EVENTS`."""


def _fill_slots(rng: Random, template: str) -> str:
    """Replace every `{slot}` of `template` by a random word of that slot."""
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(_CHOICES[slot[1]]), template)


def _to_sentence(text: str, end: str = ".") -> str:
    """Return `text` with a capital first letter and a final punctuation mark."""
    return text[0].upper() + text[1:] + end


# --- One sentence ----------------------------------------------------------------------------------------------------


def _write_opinion(rng: Random, level: int) -> str:
    """Write a clause of a level from -2 (very negative) to 2 (very positive). A mild one may negate its opposite."""
    if level == 0:
        return _fill_slots(rng, rng.choice(("the {part} {is} {fair}", "the {part} {is} neither {good} nor {bad}")))
    meant, opposite = ("good", "bad") if level > 0 else ("bad", "good")
    degree = "{very} " if abs(level) == 2 else ""
    if not degree and rng.random() < 0.3:
        return _fill_slots(rng, f"the {{part}} {{is}} {{not}} {{{opposite}}}")
    return _fill_slots(rng, f"the {{part}} {{is}} {degree}{{{meant}}}")


def _write_review(rng: Random, level: int) -> Texts:
    """Write an opinion, in half of the cases in contrast to the opposite one. The main clause decides the label."""
    sign = -1 if level > 0 else 1 if level < 0 else rng.choice((-1, 1))
    main, other = _write_opinion(rng, level), _write_opinion(rng, sign * rng.choice((1, 2)))
    flaw = f"the {{{'good' if sign > 0 else 'bad'}}} {{part}}"
    contrasts = (
        f"{other}, but {main}",
        f"{{though}} {other}, {main}",
        f"{main}, {{though}} {other}",
        f"despite {flaw}, {main}",
        f"{main} despite {flaw}",
    )
    return (_to_sentence(_fill_slots(rng, rng.choice(contrasts) if rng.random() < 0.5 else main)),)


def _write_passage(rng: Random, label: int) -> Texts:
    """Write three opinions that agree, which a label word of sst2 can sum up."""
    opinions: list[str] = []
    while len(opinions) < 3:
        opinion = _to_sentence(_write_opinion(rng, rng.choice((1, 2)) * (1 if label else -1)))
        if _split_of((opinion,)) == "train":
            opinions.append(opinion)
    return (" ".join(opinions),)


def _write_sst2(rng: Random, label: int) -> Texts:
    return _write_review(rng, rng.choice((1, 2)) * (1 if label else -1))


def _write_sst5(rng: Random, label: int) -> Texts:
    return _write_review(rng, label - 2)


def _write_cola(rng: Random, label: int) -> Texts:
    """Write a sentence that is acceptable, or that has a wrong verb form or two swapped words.

    Other nouns between the subject and its verb do not count.
    """
    plural, between_plural = rng.random() < 0.5, rng.random() < 0.5
    verb = _fill_slots(rng, "{does}")
    agrees = plural if label or rng.random() < 0.5 else not plural
    plurals = (plural, between_plural, rng.random() < 0.5)
    subject, between, thing = (_fill_slots(rng, "{one}") + "s" * p for p in plurals)
    words = _fill_slots(rng, f"the {subject} {{near}} the {between}").split()
    if rng.random() < 0.3:
        words = words[:2]
    words += [verb + "s" * (not agrees), *_fill_slots(rng, f"the {thing} {{near}} the {{place}}").split()]
    if not label and agrees == plural:
        i = rng.randrange(len(words) - 1)
        words[i : i + 2] = words[i + 1], words[i]
    return (_to_sentence(" ".join(words)),)


_QUESTIONS = (
    ("what is the meaning of {thing}", "why do {one}s {does} {thing}s", "how does a {thing} work in {country}"),
    (
        "what {creature} is the {quality} in {country}",
        "which {creature} do {one}s {does}",
        "what {thing} do {one}s {does}",
    ),
    ("what does {letters} stand for in {country}", "what is {letters} short for", "what is the full form of {letters}"),
    ("who {made} the {quality} {thing} in {country}", "which {one} {made} the {thing}", "what {one} do {one}s {does}"),
    (
        "where is the {quality} {place} in {country}",
        "which country {made} the {thing}",
        "what {place} is near the {place}",
    ),
    ("how many {thing}s are in the {place}", "what year was the {thing} {made}", "how old is the {quality} {place}"),
)


def _write_trec(rng: Random, label: int) -> Texts:
    opening = rng.choice(("", "", "please tell me, ", "in your view, ", "{name} asks: "))
    return (_to_sentence(_fill_slots(rng, opening + rng.choice(_QUESTIONS[label])), "?"),)


# --- Two sentences about events --------------------------------------------------------------------------------------


def _draw_event(rng: Random, num_skipped: int = 0) -> Event:
    """Draw a group for each fact, except for `num_skipped` of the optional facts."""
    skipped = rng.sample(_OPTIONAL, num_skipped)
    return {fact: rng.randrange(len(groups)) for fact, groups in _EVENTS.items() if fact not in skipped}


def _change_event(rng: Random, event: Event, num_changes: int = 1) -> Event:
    """Return a copy of the event in which `num_changes` of its facts have another group."""
    changed = rng.sample(sorted(event), num_changes)
    return {
        f: (g + rng.randrange(1, len(_EVENTS[f]))) % len(_EVENTS[f]) if f in changed else g for f, g in event.items()
    }


def _describe_event(rng: Random, event: Event, will: str = "will", general: bool = False) -> str:
    """Describe the event in words, with either synonym of each fact; `general` allows the class name as well."""

    def name(fact: str) -> str:
        if fact not in event:
            return ""
        names = _EVENTS[fact][event[fact]]
        return rng.choice(names[2:] if general and names[2:] and rng.random() < 0.5 else names[:2])

    text = f"the {name('who')} {will} {name('does')} the {name('how')} {name('what')} {name('where')}"
    when = name("when")
    return " ".join((f"{when}, {text}" if when and rng.random() < 0.5 else f"{text} {when}").split())


def _write_paraphrase(rng: Random, label: int) -> Texts:
    event = _draw_event(rng, num_skipped=1)
    other = event if label else _change_event(rng, event, rng.choice((1, 2)))
    return _to_sentence(_describe_event(rng, event)), _to_sentence(_describe_event(rng, other))


def _write_similarity(rng: Random, score: int) -> Texts:
    event = _draw_event(rng)
    first = _describe_event(rng, event)
    second = _describe_event(rng, _change_event(rng, event, 5 - score))
    return _to_sentence(first), _to_sentence(second)


def _write_duplicate(rng: Random, label: int) -> Texts:
    """Write two questions that are the same, or that differ in the kind of question or in the event."""
    event = _draw_event(rng, num_skipped=1)
    kinds = (("why is it that", "for what reason is it that"), ("is it true that", "can it be that"))
    kind = rng.randrange(len(kinds))
    change = None if label else rng.choice(("kind", "event", "event"))
    other = _change_event(rng, event) if change == "event" else event
    phrases = [kinds[kind], kinds[1 - kind] if change == "kind" else kinds[kind]]
    first, second = (f"{rng.choice(a)} {_describe_event(rng, e)}" for a, e in zip(phrases, (event, other), strict=True))
    return _to_sentence(first, "?"), _to_sentence(second, "?")


def _write_inference(rng: Random, label: int) -> Texts:
    """Write a premise and a hypothesis.

    Label 0, entailment: the hypothesis repeats the premise in other words, in more general words, or in part. Label 1,
    neutral: it has a different fact, or an additional one. Label 2, contradiction: it negates the premise.
    """
    event = _draw_event(rng)
    part = {fact: group for fact, group in event.items() if fact not in rng.sample(_OPTIONAL, rng.randrange(3))}
    if label == 1:
        more = len(part) < len(event) and rng.random() < 0.5
        premise, hypothesis = (part, event) if more else (event, _change_event(rng, part))
        will = rng.choice(("will", "will", "will not"))
        return _to_sentence(_describe_event(rng, premise, will)), _to_sentence(_describe_event(rng, hypothesis, will))
    if rng.random() < 0.25:  # a negated event entails only itself, not a part of it
        will = "will" if label else "will not"
        return _to_sentence(_describe_event(rng, event, "will not")), _to_sentence(_describe_event(rng, event, will))
    will = "will not" if label else "will"
    return _to_sentence(_describe_event(rng, event)), _to_sentence(_describe_event(rng, part, will, general=True))


def _write_rte(rng: Random, label: int) -> Texts:
    return _write_inference(rng, label and rng.choice((1, 2)))


_QUESTIONS_ABOUT = {
    "who": "who will {does} the {what}",
    "what": "what will the {who} {does}",
    "where": "where will the {who} {does} the {what}",
    "when": "when will the {who} {does} the {what}",
}


def _write_answer(rng: Random, label: int) -> Texts:
    """Write a question and a sentence.

    Label 0: the sentence answers the question. Label 1: it lacks the answer, or it describes another event.
    """
    event = _draw_event(rng)
    asked = rng.choice(list(_QUESTIONS_ABOUT))
    names = {fact: rng.choice(_EVENTS[fact][group][:2]) for fact, group in event.items()}
    question = _QUESTIONS_ABOUT[asked].format_map(names)
    omitted = asked if label and asked in _OPTIONAL and rng.random() < 0.7 else rng.choice(("how", *_OPTIONAL))
    if omitted == asked and not label:
        omitted = "how"
    stated = {fact: group for fact, group in event.items() if fact != omitted}
    if label and omitted != asked:
        stated |= _change_event(rng, {fact: stated[fact] for fact in ("who", "does", "what") if fact != asked})
    return _to_sentence(question, "?"), _to_sentence(_describe_event(rng, stated))


_REASONS = (
    ("The {a} does not fit into the {b} because it is too {x}.", "The {y} is too {x}.", "big", "small"),
    ("{p} thanked {q} because of {x} the present.", "{y} was {x} the present.", "getting", "giving"),
    ("{p} lent money to {q} because one of them was {x}.", "{y} was {x}.", "rich", "poor"),
    ("{p} won the race against {q} since one was {x}.", "{y} was {x}.", "fast", "slow"),
    ("{p} asked {q} for help as one of them was {x}.", "{y} was {x}.", "weak", "strong"),
    ("{p} hid from {q} because one was {x}.", "{y} was {x}.", "afraid", "angry"),
    ("{p} taught {q} to read since one was {x}.", "{y} was {x}.", "learned", "ignorant"),
)


def _write_pronoun(rng: Random, label: int) -> Texts:
    """Write a sentence with a pronoun, and a claim about whom or what it means (label 1: the claim is right).

    The reason in the sentence decides: its first word fits the first noun, its second word the second.
    """
    text, claim, *reasons = rng.choice(_REASONS)
    p, q = rng.sample(_CHOICES["name"], 2)
    a, b = rng.choice(_CHOICES["item"]), rng.choice(_CHOICES["box"])
    meant = rng.randrange(2)
    named = (a, b) if "{a}" in text else (p, q)
    words = {"p": p, "q": q, "a": a, "b": b, "x": reasons[meant], "y": named[meant if label else 1 - meant]}
    return text.format_map(words), claim.format_map(words)


_GRAMMARS: Mapping[str, Grammar] = {
    "sst2": _write_sst2,
    "sst5": _write_sst5,
    "cola": _write_cola,
    "trec": _write_trec,
    "mrpc": _write_paraphrase,
    "stsb": _write_similarity,
    "qqp": _write_duplicate,
    "mnli": _write_inference,
    "snli": _write_inference,
    "rte": _write_rte,
    "qnli": _write_answer,
    "wnli": _write_pronoun,
}


# --- Public functions ------------------------------------------------------------------------------------------------


def generate(task: Task, split: str, seed: int = 0) -> list[Row]:
    """Generate the synthetic examples of a split: the task's fields, and `label` as a label's position or a score.

    The checksum of a text decides its split, so two splits never share a text, whatever their seeds.

    Raises:
        UserError: if the task is not one of `TASKS`.
    """
    own = TASKS.get(task.name)
    if own is None or (own.fields, own.labels, own.score_range) != (task.fields, task.labels, task.score_range):
        raise UserError(
            f"data.source=sample: there is no synthetic sample data for the task {task.name!r} with these fields and"
            f" labels, only for {', '.join(_GRAMMARS)}. Set --data.source to the folder of the task's files."
        )
    rng = Random(f"{seed} {task.name} {split}")
    examples: dict[Texts, int] = {}
    while len(examples) < SIZES[split]:
        label, texts = _draw_example(rng, task)
        if _split_of(texts) == split:
            examples.setdefault(texts, label)
    number = float if task.regression else int
    return [{**dict(zip(task.fields, texts, strict=True)), "label": number(label)} for texts, label in examples.items()]


def corpus(size: int, seed: int = 0) -> Iterator[str]:
    """Generate `size` synthetic texts without labels for pretraining; none of them is in a validation or test split.

    A third are passages of several opinions with a label word that sums them up, as in the sst2 prompt. Half of the
    others are cloze prompts of all tasks in which a label word replaces the mask token. It is the right word with
    probability `_CORRECT_RATE`.
    """
    rng = Random(f"{seed} corpus")
    while size:
        summed_up = rng.random() < 1 / 3
        task = TASKS["sst2" if summed_up else rng.choice(list(_GRAMMARS))]
        label, texts = _draw_example(rng, task)
        if summed_up:
            texts = _write_passage(rng, label)
        if _split_of(texts) == "train":
            size -= 1
            yield _write_prompt(rng, task, label, texts) if summed_up or rng.random() < 0.5 else " ".join(texts)


def _draw_example(rng: Random, task: Task) -> tuple[int, Texts]:
    label = _draw_label(rng, task)
    return label, _GRAMMARS[task.name](rng, label)


def _draw_label(rng: Random, task: Task) -> int:
    low, high = task.score_range or (0, len(task.labels) - 1)
    return rng.randint(int(low), int(high))


def _split_of(texts: Texts) -> str:
    return _SPLITS[crc32("\n".join(texts).encode()) % len(_SPLITS)]


def _write_prompt(rng: Random, task: Task, label: int, texts: Texts) -> str:
    """Return the task's cloze prompt with a label word instead of the mask token.

    For a score, it is the word of the nearer end of the range.
    """
    answer = label if rng.random() < _CORRECT_RATE else _draw_label(rng, task)
    high = int(task.score_range[1]) if task.score_range else len(task.labels) - 1
    word = task.label_words[answer * len(task.label_words) // (high + 1)]
    text = render(task.cloze, dict(zip(task.fields, texts, strict=True)), f" {word}")
    return " ".join(text.split())
