"""Names and descriptions of the subcommands, and the quick help. Imports nothing, so that the help is instant."""

from __future__ import annotations

RUNS = {
    "fit": "Train a method on a task, validating after every epoch.",
    "validate": "Score a trained method on the validation split.",
    "test": "Score a trained method on the test split, if it has labels.",
    "predict": "Predict the labels of the test split, or of sentences given by --data.text.",
}
"""The subcommands that run a Trainer (`lit_spu.cli.fit`)."""

COMMANDS = {
    "estimate": "Estimate the peak memory of every method before training.",
    "compare": "Run methods x tasks x backbones x seeds, and report their costs and scores.",
    "export": "Write a trained method for other tools: peft, Hugging Face, safetensors.",
    "replay": "Rebuild the weights of a MeZO run, at any step, from the trajectory that it recorded.",
    "separate": "Write a distilled student as a model without its teacher, and compare both.",
    "doctor": "Check versions, devices, caches and the hub, and report what to do.",
}
"""The other subcommands (`lit_spu.cli.commands`)."""

_HELP = """usage: lit-spu [-h] [--version] SUBCOMMAND ...

Memory- and time-efficient fine-tuning of pretrained transformers.

subcommands:
{subcommands}

  lit-spu fit --config configs/kladder.yaml    train with k-ladder side-tuning on the embedded sample data
  lit-spu fit --help                           every flag of a subcommand, and the names of the methods
  lit-spu fit --model.help KLadder             the settings of one method
"""


def quick_help() -> str:
    """Return the text of `lit-spu --help`."""
    subcommands = RUNS | COMMANDS
    width = max(map(len, subcommands))
    lines = (f"  {name:<{width}}  {text}" for name, text in subcommands.items())
    return _HELP.format(subcommands="\n".join(lines))
