"""Sample data: synthetic examples for every task, drawn from small grammars, with the real task's fields and labels.

They stand in where no real data is at hand, and say nothing about English. Words alone do not give the answers away
(negation, contrast, agreement, synonyms), so that what separates methods on real tasks shows here too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any
from zlib import crc32

from lit_spu.data.text import render
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS, Task

SIZES = {"train": 2000, "validation": 500, "test": 500}
_PARTS = ("train", "train", "train", "train", "validation", "test")  # who owns a text, by its checksum
_TRUTH = 0.9  # how often the corpus answers a prompt rightly: enough for a signal, too little to teach the task

Row = tuple[str, ...]
Grammar = Callable[[Random, int], Row]

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

# What can be told of an event: each fact has two names for it, and some belong to a class with a name of its own.
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


def _fill(rng: Random, template: str) -> str:
    """`template` with every `{slot}` filled by one of the slot's words."""
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(_CHOICES[slot[1]]), template)


def _sentence(text: str, end: str = ".") -> str:
    return text[0].upper() + text[1:] + end


# --- One sentence ----------------------------------------------------------------------------------------------------


def _opinion(rng: Random, level: int) -> str:
    """A clause from -2 (very negative) to 2 (very positive); a mild one may deny its opposite."""
    if level == 0:
        return _fill(rng, rng.choice(("the {part} {is} {fair}", "the {part} {is} neither {good} nor {bad}")))
    for_, against = ("good", "bad") if level > 0 else ("bad", "good")
    degree = "{very} " if abs(level) == 2 else ""
    if not degree and rng.random() < 0.3:
        return _fill(rng, f"the {{part}} {{is}} {{not}} {{{against}}}")
    return _fill(rng, f"the {{part}} {{is}} {degree}{{{for_}}}")


def _review(rng: Random, level: int) -> Row:
    """An opinion, half of the time set against the opposite one: the main clause counts."""
    sign = -1 if level > 0 else 1 if level < 0 else rng.choice((-1, 1))
    main, other = _opinion(rng, level), _opinion(rng, sign * rng.choice((1, 2)))
    flaw = f"the {{{'good' if sign > 0 else 'bad'}}} {{part}}"
    contrasts = (
        f"{other}, but {main}",
        f"{{though}} {other}, {main}",
        f"{main}, {{though}} {other}",
        f"despite {flaw}, {main}",
        f"{main} despite {flaw}",
    )
    return (_sentence(_fill(rng, rng.choice(contrasts) if rng.random() < 0.5 else main)),)


def _passage(rng: Random, label: int) -> Row:
    """Opinions that agree, to be summed up by a label word of `_sst2`."""
    opinions: list[str] = []
    while len(opinions) < 3:
        opinion = _sentence(_opinion(rng, rng.choice((1, 2)) * (1 if label else -1)))
        if _part((opinion,)) == "train":
            opinions.append(opinion)
    return (" ".join(opinions),)


def _sst2(rng: Random, label: int) -> Row:
    return _review(rng, rng.choice((1, 2)) * (1 if label else -1))


def _sst5(rng: Random, label: int) -> Row:
    return _review(rng, label - 2)


def _cola(rng: Random, label: int) -> Row:
    """Subject and verb agree over what stands between them, and words keep their order."""
    plural, other = rng.random() < 0.5, rng.random() < 0.5
    verb = _fill(rng, "{does}")
    agrees = plural if label or rng.random() < 0.5 else not plural
    subject, between, thing = (_fill(rng, "{one}") + "s" * p for p in (plural, other, rng.random() < 0.5))
    words = _fill(rng, f"the {subject} {{near}} the {between}").split()
    if rng.random() < 0.3:
        words = words[:2]
    words += [verb + "s" * (not agrees), *_fill(rng, f"the {thing} {{near}} the {{place}}").split()]
    if not label and agrees == plural:
        i = rng.randrange(len(words) - 1)
        words[i : i + 2] = words[i + 1], words[i]
    return (_sentence(" ".join(words)),)


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


def _trec(rng: Random, label: int) -> Row:
    asked = rng.choice(("", "", "please tell me, ", "in your view, ", "{name} asks: "))
    return (_sentence(_fill(rng, asked + rng.choice(_QUESTIONS[label])), "?"),)


# --- Two sentences about events --------------------------------------------------------------------------------------


def _event(rng: Random, without: int = 0) -> Event:
    """A group for each fact, less some of the optional ones."""
    left_out = rng.sample(_OPTIONAL, without)
    return {fact: rng.randrange(len(groups)) for fact, groups in _EVENTS.items() if fact not in left_out}


def _change(rng: Random, event: Event, times: int = 1) -> Event:
    """The event with so many other facts."""
    changed = rng.sample(sorted(event), times)
    return {
        f: (g + rng.randrange(1, len(_EVENTS[f]))) % len(_EVENTS[f]) if f in changed else g for f, g in event.items()
    }


def _say(rng: Random, event: Event, will: str = "will", general: bool = False) -> str:
    """The event in words, either name of each fact; `general` may name the class instead."""

    def name(fact: str) -> str:
        if fact not in event:
            return ""
        names = _EVENTS[fact][event[fact]]
        return rng.choice(names[2:] if general and names[2:] and rng.random() < 0.5 else names[:2])

    text = f"the {name('who')} {will} {name('does')} the {name('how')} {name('what')} {name('where')}"
    when = name("when")
    return " ".join((f"{when}, {text}" if when and rng.random() < 0.5 else f"{text} {when}").split())


def _paraphrase(rng: Random, label: int) -> Row:
    event = _event(rng, without=1)
    other = event if label else _change(rng, event, rng.choice((1, 2)))
    return _sentence(_say(rng, event)), _sentence(_say(rng, other))


def _similarity(rng: Random, score: int) -> Row:
    event = _event(rng)
    return _sentence(_say(rng, event)), _sentence(_say(rng, _change(rng, event, 5 - score)))


def _duplicate(rng: Random, label: int) -> Row:
    """Both ask the same of the same event, or not."""
    event = _event(rng, without=1)
    ways = (("why is it that", "for what reason is it that"), ("is it true that", "can it be that"))
    way = rng.randrange(len(ways))
    change = None if label else rng.choice(("way", "event", "event"))
    other = _change(rng, event) if change == "event" else event
    asked = [ways[way], ways[1 - way] if change == "way" else ways[way]]
    first, second = (f"{rng.choice(a)} {_say(rng, e)}" for a, e in zip(asked, (event, other), strict=True))
    return _sentence(first, "?"), _sentence(second, "?")


def _inference(rng: Random, label: int) -> Row:
    """0 follows (said again, in general, or in part), 1 stays open (another fact, or one more), 2 is denied."""
    event = _event(rng)
    part = {fact: group for fact, group in event.items() if fact not in rng.sample(_OPTIONAL, rng.randrange(3))}
    if label == 1:
        more = len(part) < len(event) and rng.random() < 0.5
        premise, hypothesis = (part, event) if more else (event, _change(rng, part))
        will = rng.choice(("will", "will", "will not"))
        return _sentence(_say(rng, premise, will)), _sentence(_say(rng, hypothesis, will))
    if rng.random() < 0.25:  # of what is denied, only itself follows
        will = "will" if label else "will not"
        return _sentence(_say(rng, event, "will not")), _sentence(_say(rng, event, will))
    will = "will not" if label else "will"
    return _sentence(_say(rng, event)), _sentence(_say(rng, part, will, general=True))


def _rte(rng: Random, label: int) -> Row:
    return _inference(rng, label and rng.choice((1, 2)))


_ASKED = {
    "who": "who will {does} the {what}",
    "what": "what will the {who} {does}",
    "where": "where will the {who} {does} the {what}",
    "when": "when will the {who} {does} the {what}",
}


def _answered(rng: Random, label: int) -> Row:
    """0 tells what is asked for; 1 is silent about it, or tells of another event."""
    event = _event(rng)
    asked = rng.choice(list(_ASKED))
    question = _ASKED[asked].format_map({fact: rng.choice(_EVENTS[fact][group][:2]) for fact, group in event.items()})
    silent = asked if label and asked in _OPTIONAL and rng.random() < 0.7 else rng.choice(("how", *_OPTIONAL))
    if silent == asked and not label:
        silent = "how"
    told = {fact: group for fact, group in event.items() if fact != silent}
    if label and silent != asked:
        told |= _change(rng, {fact: told[fact] for fact in ("who", "does", "what") if fact != asked})
    return _sentence(question, "?"), _sentence(_say(rng, told))


_REASONS = (
    ("The {a} does not fit into the {b} because it is too {x}.", "The {y} is too {x}.", "big", "small"),
    ("{p} thanked {q} because of {x} the present.", "{y} was {x} the present.", "getting", "giving"),
    ("{p} lent money to {q} because one of them was {x}.", "{y} was {x}.", "rich", "poor"),
    ("{p} won the race against {q} since one was {x}.", "{y} was {x}.", "fast", "slow"),
    ("{p} asked {q} for help as one of them was {x}.", "{y} was {x}.", "weak", "strong"),
    ("{p} hid from {q} because one was {x}.", "{y} was {x}.", "afraid", "angry"),
    ("{p} taught {q} to read since one was {x}.", "{y} was {x}.", "learned", "ignorant"),
)


def _pronoun(rng: Random, label: int) -> Row:
    """Whom the reason fits: its first word the first one named, its second word the second."""
    text, claim, *reasons = rng.choice(_REASONS)
    p, q = rng.sample(_CHOICES["name"], 2)
    a, b = rng.choice(_CHOICES["item"]), rng.choice(_CHOICES["box"])
    meant = rng.randrange(2)
    named = (a, b) if "{a}" in text else (p, q)
    words = {"p": p, "q": q, "a": a, "b": b, "x": reasons[meant], "y": named[meant if label else 1 - meant]}
    return text.format_map(words), claim.format_map(words)


_GRAMMARS: Mapping[str, Grammar] = {
    "sst2": _sst2,
    "sst5": _sst5,
    "cola": _cola,
    "trec": _trec,
    "mrpc": _paraphrase,
    "stsb": _similarity,
    "qqp": _duplicate,
    "mnli": _inference,
    "snli": _inference,
    "rte": _rte,
    "qnli": _answered,
    "wnli": _pronoun,
}


# --- What others ask for ---------------------------------------------------------------------------------------------


def generate(task: Task, split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of `task`: its fields, and `label` as a label's position or a score.

    A text's checksum decides the split that it belongs to, so no two splits share one, whatever their seeds.

    Raises:
        UserError: if the task is not one of `TASKS`.
    """
    if task.name not in _GRAMMARS:
        raise UserError(
            f"data.source: there is no sample data for the task {task.name!r}, only for {', '.join(_GRAMMARS)}."
            " Give the folder that holds the task's files."
        )
    rng = Random(f"{seed} {task.name} {split}")
    examples: dict[Row, int] = {}
    while len(examples) < SIZES[split]:
        label, row = _draw(rng, task)
        if _part(row) == split:
            examples.setdefault(row, label)
    number = float if task.regression else int
    return [{**dict(zip(task.fields, row, strict=True)), "label": number(label)} for row, label in examples.items()]


def corpus(size: int, seed: int = 0) -> Iterator[str]:
    """`size` unlabelled texts of the same grammars for pretraining, never one of a validation or test split.

    A third are passages that sum up opinions in a word, as the sst2 prompt does. Half of the others are cloze prompts
    of all tasks, with a label word in the blank, `_TRUTH` of the time the right one.
    """
    rng = Random(f"{seed} corpus")
    while size:
        summed_up = rng.random() < 1 / 3
        task = TASKS["sst2" if summed_up else rng.choice(list(_GRAMMARS))]
        label, row = _draw(rng, task)
        if summed_up:
            row = _passage(rng, label)
        if _part(row) == "train":
            size -= 1
            yield _answer(rng, task, label, row) if summed_up or rng.random() < 0.5 else " ".join(row)


def _draw(rng: Random, task: Task) -> tuple[int, Row]:
    label = _label(rng, task)
    return label, _GRAMMARS[task.name](rng, label)


def _label(rng: Random, task: Task) -> int:
    low, high = task.score_range or (0, len(task.labels) - 1)
    return rng.randint(int(low), int(high))


def _part(row: Row) -> str:
    return _PARTS[crc32("\n".join(row).encode()) % len(_PARTS)]


def _answer(rng: Random, task: Task, label: int, row: Row) -> str:
    """The task's cloze prompt with a label word in the blank; of a score, the nearer pole."""
    said = label if rng.random() < _TRUTH else _label(rng, task)
    high = int(task.score_range[1]) if task.score_range else len(task.labels) - 1
    word = task.label_words[said * len(task.label_words) // (high + 1)]
    text = render(task.cloze, dict(zip(task.fields, row, strict=True)), f" {word}")
    return " ".join(text.split())
