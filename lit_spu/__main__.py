"""The console script `lit-spu`. It prints `--help` and `--version` itself and imports the rest on demand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lit_spu.cli.subcommands import COMMANDS, quick_help


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        args: The arguments; by default those of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(quick_help(), end="")
    elif given == ["--version"]:
        from lit_spu.version import __version__

        print(f"lit-spu {__version__}")
    elif given[0] in COMMANDS:
        from lit_spu.cli import commands

        commands.run(given)
    else:
        from lit_spu.cli import fit

        fit.run(given)


if __name__ == "__main__":
    main()
