"""Train one VQ-VAE: the command line of vqvae.train.

    python train.py --quantizer ba_vq --codebook_size 512 --epochs 30 --batch_size 256 --name ba_vq_k512
    python train.py --config config_gpu.yaml --quantizer vq_ema --seed 1
    torchrun --standalone --nproc_per_node 4 train.py --config config_gpu.yaml

Precedence: built-in default < YAML (config.yaml beside this script, or --config) < flag.
Exit codes: 0 done, 2 bad input, 130 Ctrl-C, 143 SIGTERM and 129 a closed terminal (saved; the same command resumes),
141 nobody reads the output, as after `| head` (resumes from the last checkpoint).
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

# Read when PyTorch is imported. Threads that sleep as soon as they wait train at 0.7 times the speed on an idle CPU, threads that
# spin for long at a tenth on a busy one; this many turns (tens of microseconds) before they sleep cost nothing on either.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import vqvae  # noqa: E402

DEFAULT_CONFIG = Path(__file__).resolve().parent / "config.yaml"


class Parser(argparse.ArgumentParser):
    """argparse for a script's docstring: no abbreviated flags, and a mistake is a UserError, one line, as other bad input."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **options)

    def error(self, message):
        raise vqvae.UserError(f"{message} (see --help)")


def whole(low):
    """argparse type: a whole number from `low` up."""
    def number(word):
        if not word.isdecimal() or int(word) < low:
            raise argparse.ArgumentTypeError(f"{word!r} must be a whole number, {low} or more")
        return int(word)
    return number


def several(kind):
    """argparse type: values with commas between, as a list; kind: the type of one, as `int`."""
    def values(text):
        try:
            return [kind(word) for word in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between") from error
    return values


def make_parser():
    """One flag per field of vqvae.Config; a flag that is not given stays out of the namespace."""
    parser = Parser(__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings of this file instead of config.yaml")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--no_wandb", dest="wandb", action="store_false",
                        help="do not log to Weights & Biases, whatever the YAML says")
    for field in dataclasses.fields(vqvae.Config):
        default = "" if field.default is None or field.default is False else f" (default {field.default})"
        help_text = (field.metadata["help"] + default).replace("%", "%%")
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=help_text)
            continue
        kind = vqvae.kind_of(field)
        choices = field.metadata["choices"]
        metavar = "|".join(map(str, choices)) if choices else {int: "N", float: "X", str: "TEXT"}[kind]
        parser.add_argument(f"--{field.name}", type=kind, metavar=metavar, help=help_text)
    return parser


def config_from(argv):
    """(Config, dry_run) from command-line words and the YAML file. Raises UserError."""
    flags = vars(make_parser().parse_args(argv))
    dry_run = flags.pop("dry_run", False)
    settings = vqvae.read_yaml(flags.pop("config", DEFAULT_CONFIG))
    settings.update(flags)
    return vqvae.Config.from_dict(settings), dry_run


def config_to_run(argv):
    """The Config of `config_from`, for scripts without --dry_run. Raises UserError."""
    config, dry_run = config_from(argv)
    if dry_run:
        raise vqvae.UserError("dry_run: belongs to train.py; drop it here")
    return config


def main(argv=None):
    config, dry_run = config_from(argv)
    if dry_run:
        print(vqvae.config_yaml(config), end="")
        return
    vqvae.train(config)


if __name__ == "__main__":
    code = vqvae.run_command(main)  # wandb, imported by then, wants to see the call of sys.exit
    sys.exit(code)
