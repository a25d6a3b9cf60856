"""Train one VQ-VAE: the command line of vqvae.train.

    python train.py --quantizer ba_vq --codebook_size 512 --epochs 30 --batch_size 256 --name ba_vq_k512
    python train.py --config config_gpu.yaml --quantizer vq_ema --seed 1
    torchrun --standalone --nproc_per_node 4 train.py --config config_gpu.yaml

Precedence: built-in default < YAML (config.yaml beside this script, or --config) < flag.
Exit codes: 0 done, 2 bad input, 130 Ctrl-C and 143 SIGTERM (saved; the same command resumes).
"""

import argparse
import dataclasses
import sys
import typing
from pathlib import Path

import vqvae

DEFAULT_CONFIG = Path(__file__).resolve().parent / "config.yaml"


class Parser(argparse.ArgumentParser):
    """argparse that reports errors as the other bad input: UserError, one line."""

    def error(self, message):
        raise vqvae.UserError(f"{message} (see --help)")


def count(word):
    """argparse type: an integer from 0 up."""
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} must be a whole number, 0 or more")
    return int(word)


def make_parser():
    """One flag per field of vqvae.Config; a flag that is not given stays out of the namespace."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings of this file instead of config.yaml")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--no_wandb", dest="wandb", action="store_false",
                        help="do not log to Weights & Biases, whatever the YAML says")
    hints = typing.get_type_hints(vqvae.Config)
    for field in dataclasses.fields(vqvae.Config):
        default = "" if field.default is None or field.default is False else f" (default {field.default})"
        help_text = (field.metadata["help"] + default).replace("%", "%%")
        if hints[field.name] is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=help_text)
            continue
        kind = next(t for t in (typing.get_args(hints[field.name]) or (hints[field.name],)) if t is not type(None))
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
    """The Config of `config_from`, for scripts that cannot only show it. Raises UserError."""
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
    sys.exit(vqvae.run_command(main))
