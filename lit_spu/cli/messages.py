"""Short explanations of the parser's errors: jsonargparse's messages, matched by their texts and rewritten."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from lit_spu.cli.subcommands import COMMANDS
from lit_spu.errors import did_you_mean
from lit_spu.methods.base import Method
from lit_spu.ranges import Refusal
from lit_spu.registry import concrete_subclasses, settings

MAX_LISTED = 30
"""A longer list of classes is not printed, only the closest of them."""

_VALUE = re.compile(r"(?:Given value|Got value): (.*)", re.DOTALL)


def explain(
    message: str, args: Sequence[str] = (), flags: Collection[str] = (), hints: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """Return a short explanation of an error of jsonargparse.

    Args:
        message: The message of jsonargparse.
        args: The arguments that were parsed.
        flags: The flags that exist.
        hints: Types with ranges by setting.
    """
    if found := re.search(r"Importing '([\w.]+)' is not allowed", message):
        return (
            f"--ckpt_path: its settings name {found[1]}, which is neither of lit_spu nor of Lightning. Data"
            " run no code.\nIf you trust it, name it yourself, in a flag or by --config=<run directory>/config.yaml."
        )
    if found := re.search(r"File does not exist: (.*)", message):
        return f"--config: {found[1]} does not exist. Give a YAML file, such as configs/kladder.yaml."
    if found := re.match(r'Parser key "(.+?)":\s*(.*)', message, re.DOTALL):
        flag, value = flag_or_files(found[1], args), re.search(_VALUE, found[2])
        if value and found[1] in hints and "Literal" not in found[2]:
            return str(Refusal(flag, value[1].strip(), hints[found[1]]))
        return f"{flag}: {_explain_value(found[2])}"
    if found := re.match(r"Option '(.+?)' is not accepted", message):
        return _explain_setting(found[1], args, flags)
    if found := re.match(r"unrecognized arguments: (\w[^\s=]*)", message):
        return f"{found[1]!r} belongs to no flag. Write --flag=value; --help lists the flags."
    if found := re.match(
        r"(?:unrecognized arguments:|Subcommand '\w+' does not accept option) '?-*([^\s=']+)", message
    ):
        hint = _closest(f"--{found[1]}", {*flags, *_method_flags()} if "--model" in flags else flags)
        return f"{flag_or_files(found[1], args)} does not exist.{hint} --help lists the flags."
    if found := re.match(r"argument subcommand: invalid choice: '(.+?)' \(choose from (.+)\)", message):
        allowed = {*re.findall("[a-z]+", found[2]), *COMMANDS}
        return f"no subcommand {found[1]!r}. {did_you_mean(found[1], allowed)}"
    if found := re.match(r"--model\.help: .*: (\S+)$", message):
        return f"--model.help: {_explain_class(found[1], [Method])}"
    if re.match(r"the following arguments are required: (\w+\.)?model", message):
        methods = ", ".join(sorted(cls.__name__ for cls in concrete_subclasses(Method)))
        advice = "name a method, give a config file of one with --config, or a trained one with --ckpt_path"
        return f"--model is missing: {advice}.\nAllowed: {methods}."
    if found := re.match(r"the following arguments are required: (\w+)", message):
        return _explain_missing(found[1], args)
    if found := re.match("Unexpected config: (.*)", message, re.DOTALL):
        return _explain_no_settings(found[1], args)
    files = config_files(args) if re.search("config|in keys", message) else ""
    return f"{files}{': ' if files else ''}{' '.join(message.split())}"


def _explain_missing(name: str, args: Sequence[str]) -> str:
    """Explain that a required setting is missing: of the class that a flag names, if one has such a setting."""
    classes = {cls.__name__: cls for base in (Method, Callback, Logger) for cls in concrete_subclasses(base)}
    for flag, value in pairwise(_split_flags(args)):
        cls = classes.get(value.rpartition(".")[2])
        if cls and name in settings(cls):
            return f"{flag.removesuffix('+')}.{name} is missing: {cls.__name__} needs it."
    return f"{flag_or_files(name, args)} is missing. --help describes it."


def _explain_no_settings(content: str, args: Sequence[str]) -> str:
    """Explain that a config file holds no mapping of settings."""
    files = [value for flag, value in pairwise(_split_flags(args)) if flag in ("-c", "--config")]
    file = next((file for file in files if Path(file).is_file() and Path(file).read_text() == content), "")
    found = shorten(content, 40) or "nothing"
    return f"--config: {file} holds no settings, but {found}. Give a YAML file such as configs/kladder.yaml."


def _method_flags() -> set[str]:
    """Return the flags of all methods, which the parser only knows once a method is chosen."""
    return {f"--model.{name}" for cls in concrete_subclasses(Method) for name in settings(cls)}


def _explain_setting(name: str, args: Sequence[str], flags: Collection[str]) -> str:
    """Explain that a class or a subcommand has no setting of this name."""
    flag = flag_or_files(name, args)
    if "--configs" in flags:
        return f"{flag} is not a setting of this subcommand. Config files of methods belong to --configs."
    classes = [*concrete_subclasses(Method), *concrete_subclasses(Callback)]
    owners = {setting: cls for cls in classes for setting in settings(cls)}
    if name in owners:
        return f"{flag} is not a setting of this class, but of {owners[name].__name__}."
    return f"{flag} is not a setting of this class.{_closest(name, owners)} --model.help METHOD lists them."


def _explain_value(problem: str) -> str:
    """Explain why a value was refused: what was given and what is allowed."""
    setting = re.search(r"NestedArg\(key='(.+?)'", problem)
    if "int too large to convert to float" in problem:
        return f"{f'its .{setting[1]}' if setting else 'the number'} is too large: a number below 1e308 was expected."
    if setting:
        return (
            f"its .{setting[1]} is set before the class is named. Name the class, or give the --config that names it,"
            " first."
        )
    value = re.search(_VALUE, problem)
    expected = re.search(r"Subtypes: \[(.*)\]", problem) or re.search(r"Expected an? (.*?)\. Got value", problem)
    if value is None or expected is None:
        return " ".join(problem.split())
    if wrong := re.search(r"(?:dot import path string: |given class_path ')([\w.]+)", problem):
        bases = re.findall(r"'([\w.]+)\.(\w+)'", expected[1])
        return _explain_class(wrong[1], [getattr(import_module(module), name) for module, name in bases])
    choices = re.findall(r"[^\s',]+", " ".join(re.findall(r"Literal\[(.*?)\]", expected[1])))
    names = re.findall(r"<class '(?:\w+\.)*(\w+)'>", expected[1])
    types = ["null" if name == "NoneType" else name for name in names]
    given = value[1].strip()
    if choices:
        return f"{given!r} is not allowed. {did_you_mean(given, {*choices, *types})}"
    return f"expected {' or '.join(types) or expected[1]}, got {given!r}."


def _explain_class(given: str, bases: Sequence[type]) -> str:
    """Explain that no subclass of `bases` has the given name."""
    names = {cls.__name__ for base in bases for cls in concrete_subclasses(base)}
    name = given.rpartition(".")[2]
    hint = f" {did_you_mean(name, names)}" if len(names) < MAX_LISTED else _closest(name, names)
    return f"no {' or '.join(base.__name__ for base in bases)} {given!r}.{hint}"


def _closest(given: str, allowed: Collection[str]) -> str:
    """Return ` Did you mean x?` if an allowed name is close to the given one."""
    close = get_close_matches(given, allowed, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def flag_or_files(key: str, args: Sequence[str]) -> str:
    """Return the flag that set a key, else the key with the config files that may have set it.

    In errors about the settings of a class, the key lacks its first parts.
    """
    given = [word.removesuffix("+") for word in _split_flags(args) if word.startswith("--")]
    flags = [flag for flag in given if flag.replace(".init_args.", ".").endswith((f".{key}", f"--{key}"))]
    files = config_files(args)
    return flags[-1] if flags else (f"{key} (in {files})" if files else f"--{key}")


def config_files(args: Sequence[str]) -> str:
    """Return the config files among the arguments, joined by `or`."""
    return " or ".join(value for flag, value in pairwise(_split_flags(args)) if flag in ("-c", "--config"))


def _split_flags(args: Sequence[str]) -> list[str]:
    """Return the arguments with `--flag=value` as two words."""
    return [word for argument in args for word in argument.split("=", 1)]
