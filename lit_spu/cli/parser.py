"""Parser of the command line: errors take a line or two instead of a page of usage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lit_spu.cli.messages import explain
from lit_spu.cli.user_errors import find_user_error


class Parser(LightningArgumentParser):
    """Lightning's parser with short errors and without abbreviated flags, so that a typo never sets another flag."""

    command_line: ClassVar[Sequence[str]] = ()
    """The arguments that are parsed. On the class, because jsonargparse creates parsers for nested classes itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error in a line or two and exit with status 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        cause = find_user_error(ex)
        print(f"error: {explain(message, self.command_line, flags) if cause is None else cause}", file=sys.stderr)
        self.exit(2)
