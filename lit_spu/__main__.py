"""The console script `lit-spu`: answers `--help` and `--version` at once, and leaves the rest to `lit_spu.cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

SUBCOMMANDS = {
    "fit": "Train a method on a task, validating after every epoch.",
    "validate": "Score a trained method on the validation split.",
    "test": "Score a trained method on the test split, where it has labels.",
    "predict": "Answer the test split, or sentences given by --data.text.",
}
"""The subcommands that are a run, and what they do; the full parser takes both from here."""

COMMANDS = {
    "estimate": "Tell the peak memory of every method before training.",
    "compare": "Run methods x tasks x backbones x seeds, and report what they cost and score.",
    "export": "Write a trained method for other tools: peft, Hugging Face, safetensors.",
    "replay": "Make again what MeZO trained, at any step, from the trajectory that its run wrote.",
    "separate": "Write a distilled student as a model of its own, and compare it with its teacher.",
    "doctor": "Look at versions, devices, caches and the hub, and tell what to do.",
}
"""The other subcommands."""

HELP = """usage: lit-spu [-h] [--version] SUBCOMMAND ...

Fine-tune pretrained transformers for little memory and time.

subcommands:
{subcommands}

  lit-spu fit --config configs/kladder.yaml    train with k-ladder side-tuning on the embedded sample data
  lit-spu fit --help                           every flag of a subcommand, and the names of the methods
  lit-spu fit --model.help KLadder             the settings of one method
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line `args`, by default that of the process."""
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        listed = SUBCOMMANDS | COMMANDS
        width = max(map(len, listed))
        lines = (f"  {name:<{width}}  {text}" for name, text in listed.items())
        print(HELP.format(subcommands="\n".join(lines)), end="")
    elif given == ["--version"]:
        from lit_spu import __version__

        print(f"lit-spu {__version__}")
    elif given[0] in COMMANDS:
        from lit_spu.cli import commands

        commands.run(given)
    else:
        from lit_spu.cli import fit

        fit.run(given)


if __name__ == "__main__":
    main()
