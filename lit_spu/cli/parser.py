"""Parser of the command line: errors take a line or two instead of a page of usage."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_type_hints

import yaml
from jsonargparse import Namespace, _loaders_dumpers, set_dumper, set_loader, set_parsing_settings
from jsonargparse._actions import _ActionConfigLoad
from lightning.pytorch.cli import LightningArgumentParser

from lit_spu import ranges
from lit_spu.cli.messages import config_files, explain, flag_or_files
from lit_spu.cli.user_errors import find_user_error
from lit_spu.errors import UserError
from lit_spu.safe_yaml import load_checked

# jsonargparse reads config files and the values of flags as YAML. Values of types like `int | None` are read by the
# module's function, whatever the loader is.
_loaders_dumpers.yaml_load = partial(load_checked, _loaders_dumpers.yaml_load)
set_loader("yaml", _loaders_dumpers.yaml_load, (yaml.YAMLError,))


class _Dumper(yaml.SafeDumper):
    """Dumper of settings that quotes names like 1e-3, which the parser, unlike YAML, would read back as numbers."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)
set_dumper("yaml", lambda data: yaml.dump(data, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


def limit_imports(args: Sequence[str]) -> None:
    """Let the parser import only from this package and Lightning, and what the user's own arguments and files name.

    A checkpoint and the settings beside it are data: they may come from someone else and must not run code.
    """
    words = [word for argument in args for word in (argument, argument.partition("=")[2])]
    files = [Path(word) for word in words if word.endswith((".yaml", ".yml", ".json"))]
    texts = [*words, *(file.read_text(errors="replace") for file in files if file.is_file())]
    named = {name for text in texts for name in re.findall(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+", text)}
    # a package may define a class in another of its modules than the one that the user names
    named |= {name.partition(".")[0] for name in named if name.rpartition(".")[2][0].isupper()}
    allowed = {name for name in named if name.partition(".")[0] not in {"jsonargparse", *sys.stdlib_module_names}}
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["lit_spu", "lightning", *sorted(allowed)])


def put_configs_first(args: Sequence[str]) -> list[str]:
    """Return the arguments with the config files before the flags: the parser lets the later of both win.

    The class of `--model` is given twice: before the files, which may have settings of a class without its name, and
    after them, so that it wins.
    """
    words = iter(args)
    parts = [[word, *islice(words, 1)] if word in (*_CONFIG, *_CLASS) else [word] for word in words]
    configs = [part for part in parts if _is_flag(part[0], *_CONFIG)]
    names = [part for part in parts if _is_flag(part[0], *_CLASS)] if configs else []
    flags = [part for part in parts if not _is_flag(part[0], *_CONFIG)]
    return [word for part in (*names, *configs, *flags) for word in part]


_CONFIG = ("--config", "-c")
_CLASS = ("--model", "--model.class_path")


def _is_flag(word: str, *flags: str) -> bool:
    """Return whether an argument is one of these flags, alone, with `=value`, or for a short one with its value."""
    return word.partition("=")[0] in flags or any(word.startswith(flag) for flag in flags if flag[1] != "-")


class Parser(LightningArgumentParser):
    """Lightning's parser with short errors and without abbreviated flags, so that a typo never sets another flag."""

    command_line: ClassVar[Sequence[str]] = ()
    """The arguments that are parsed. On the class, because jsonargparse creates parsers for nested classes itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.hints: dict[str, Any] = {}
        """Types with ranges by setting. Those that jsonargparse finds have none."""
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_class_arguments(self, class_type: type, *args: Any, **kwargs: Any) -> list[str]:
        """Add the settings of a class, and remember their ranges."""
        added: list[str] = super().add_class_arguments(class_type, *args, **kwargs)
        return self._remember(ranges.declared(class_type), added)

    def add_function_arguments(self, function: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a function, and remember their ranges."""
        added: list[str] = super().add_function_arguments(function, *args, **kwargs)
        return self._remember(get_type_hints(function, include_extras=True), added)

    def _remember(self, hints: Mapping[str, Any], added: list[str]) -> list[str]:
        self.hints |= {key: hints[name] for key in added if (name := key.rpartition(".")[2]) in hints}
        return added

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse arguments, and check the values against the ranges that the settings declare."""
        try:
            config: Namespace = super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            files = config_files(self.command_line) or "a config file"
            self.error("", UserError(f"{files} is not text in UTF-8: {error.reason} at byte {error.start}."))
        if self.exit_on_error:  # otherwise this is jsonargparse's parser of one class, which knows no full names
            for refusal in self.refusals(config):
                key = flag_or_files(refusal.key, self.command_line)
                self.error("", UserError(str(replace(refusal, key=key))))
        return config

    def refusals(self, config: Namespace) -> Iterator[ranges.Refusal]:
        """Yield the settings of a parsed configuration whose values are not allowed."""
        for action in reversed(self._actions):  # the data before the model, which is given the data's task
            if isinstance(action, argparse._SubParsersAction):
                subparser: Any = action.choices[config[action.dest]]
                yield from subparser.refusals(config[config[action.dest]])
            elif hasattr(action, "_typehint") and action.dest in config:
                hint = self.hints.get(action.dest, action._typehint)
                yield from ranges.refusals(hint, config[action.dest], action.dest)

    def _check_value_key(self, action: argparse.Action, value: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        """Check a value of a config file. A group of settings is a mapping: jsonargparse would take anything."""
        checked = super()._check_value_key(action, value, key, *args, **kwargs)
        if isinstance(action, _ActionConfigLoad) and not isinstance(checked, Namespace | Mapping):
            refusal = ranges.Refusal(flag_or_files(key, self.command_line), value, dict[str, Any])
            raise TypeError(key) from UserError(str(refusal))
        return checked

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error in a line or two and exit with status 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        cause = find_user_error(ex)
        print(
            f"error: {explain(message, self.command_line, flags, self.hints) if cause is None else cause}",
            file=sys.stderr,
        )
        self.exit(2)
