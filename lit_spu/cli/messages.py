"""The command line's parser: a mistake is answered in a line or two instead of a page of usage."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from typing import Any, ClassVar, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from lit_spu.__main__ import COMMANDS
from lit_spu.errors import UserError, did_you_mean
from lit_spu.methods.base import Method
from lit_spu.registry import settings


class Parser(LightningArgumentParser):
    """Lightning's parser with short answers. Flags are not abbreviated: a mistyped one is never taken for another."""

    given: ClassVar[Sequence[str]] = ()
    """The command line. Of the class, because jsonargparse makes parsers of its own for what is inside of classes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what was wrong in a line or two and exit with status 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        cause = user_error(ex)
        print(f"error: {plain(message, self.given, flags) if cause is None else cause}", file=sys.stderr)
        self.exit(2)


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError that `error` is or was raised from, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


@rank_zero_only
def say(text: str) -> None:
    """Tell the user, once for all ranks."""
    print(text, file=sys.stderr)


@contextmanager
def answered() -> Iterator[None]:
    """End a mistake of the user's in a line or two and status 2, Ctrl-C in status 130; LIT_SPU_DEBUG=1 shows where."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        mistake = user_error(error) or error  # jsonargparse wraps what a constructor raises
        if os.environ.get("LIT_SPU_DEBUG") or not isinstance(mistake, UserError | MisconfigurationException):
            raise
        say(f"error: {mistake}")
        raise SystemExit(2) from None


def plain(message: str, given: Sequence[str] = (), flags: Collection[str] = ()) -> str:
    """What jsonargparse says of the arguments `given`, in a line or two; `flags` are those that exist."""
    if found := re.match(r'Parser key "(.+?)":\s*(.*)', message, re.DOTALL):
        return f"{_where(found[1], given)}: {_value(found[2])}"
    if found := re.match(r"Option '(.+?)' is not accepted", message):
        owners = {name: cls for base in (Method, Callback) for cls in subclasses(base) for name in settings(cls)}
        where = _where(found[1], given)
        if found[1] in owners:
            return f"{where} is no setting of this class, but of {owners[found[1]].__name__}."
        return f"{where} is no setting of this class.{_like(found[1], owners)} --model.help METHOD lists them."
    if found := re.match(r"unrecognized arguments: (\w[^\s=]*)", message):
        return f"{found[1]!r} belongs to no flag."
    if found := re.match(
        r"(?:unrecognized arguments:|Subcommand '\w+' does not accept option) '?-*([^\s=']+)", message
    ):
        return f"{_where(found[1], given)} does not exist.{_like(f'--{found[1]}', flags)} --help lists the flags."
    if found := re.match(r"argument subcommand: invalid choice: '(.+?)' \(choose from (.+)\)", message):
        allowed = {*re.findall("[a-z]+", found[2]), *COMMANDS}
        return f"no subcommand {found[1]!r}. {did_you_mean(found[1], allowed)}"
    if found := re.match(r"--model\.help: .*: (\S+)$", message):
        return f"--model.help: {_unknown(found[1], [Method])}"
    if re.match(r"the following arguments are required: (\w+\.)?model", message):
        methods = ", ".join(sorted(cls.__name__ for cls in subclasses(Method)))
        ways = "name a method, give its file with --config, or one that was trained with --ckpt_path"
        return f"--model is missing: {ways}.\nAllowed: {methods}."
    files = _files(given) if "config" in message else ""
    return f"{files}{': ' if files else ''}{' '.join(message.split())}"


def subclasses(cls: type) -> Iterator[type]:
    """The classes below `cls` that can be made, as far as they are imported."""
    sub: type
    for sub in cls.__subclasses__():
        if not inspect.isabstract(sub) and not sub.__name__.startswith("_"):
            yield sub
        yield from subclasses(sub)


def _where(key: str, given: Sequence[str]) -> str:
    """The flag that set `key`, whose first parts jsonargparse leaves out inside of a class, or the files that may."""
    words = [word for argument in given for word in argument.split("=", 1)]
    flag = next((word for word in words if word.startswith("--") and word.endswith((f".{key}", f"--{key}"))), None)
    files = _files(given)
    return flag or (f"{key} (in {files})" if files else f"--{key}")


def _files(given: Sequence[str]) -> str:
    """The config files among what is given."""
    words = [word for argument in given for word in argument.split("=", 1)]
    return " or ".join(after for word, after in pairwise(words) if word in ("-c", "--config"))


def _value(problem: str) -> str:
    """What a value should have been, and was."""
    if setting := re.search(r"NestedArg\(key='(.+?)'", problem):
        return f"its .{setting[1]} is set before there is one. Put it, or the --config that names it, first."
    value = re.search(r"(?:Given value|Got value): (.*)", problem, re.DOTALL)
    kinds = re.search(r"Subtypes: \[(.*)\]", problem) or re.search(r"Expected an? (.*?)\. Got value", problem)
    if value is None or kinds is None:
        return " ".join(problem.split())
    if wrong := re.search(r"(?:dot import path string: |given class_path ')([\w.]+)", problem):
        bases = re.findall(r"'([\w.]+)\.(\w+)'", kinds[1])
        return _unknown(wrong[1], [getattr(import_module(module), name) for module, name in bases])
    choices = re.findall(r"[^\s',]+", " ".join(re.findall(r"Literal\[(.*?)\]", kinds[1])))
    types = ["null" if name == "NoneType" else name for name in re.findall(r"<class '(?:\w+\.)*(\w+)'>", kinds[1])]
    given = value[1].strip()
    if choices:
        return f"{given!r} is not allowed. {did_you_mean(given, {*choices, *types})}"
    return f"expected {' or '.join(types) or kinds[1]}, got {given!r}."


def _unknown(given: str, bases: Sequence[type]) -> str:
    """That there is no class `given` among those below `bases`: all of them, if they are few."""
    names = {cls.__name__ for base in bases for cls in subclasses(base)}
    name = given.rpartition(".")[2]
    listed = f" {did_you_mean(name, names)}" if len(names) < 30 else _like(name, names)
    return f"no {' or '.join(base.__name__ for base in bases)} {given!r}.{listed}"


def _like(given: str, allowed: Collection[str]) -> str:
    close = get_close_matches(given, allowed, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""
