"""Train class tokens and evaluate them.

python run.py --class_index 283 --train True --evaluate True     (a GPU, Stable Diffusion 1.4)
python run.py --config configs/miniature.yml --class_index all --train True --evaluate True
python run.py --config configs/miniature.yml --list_classes
"""

import os
import sys
from contextlib import redirect_stdout

from command_line import check_classes, read_command
from config import RunConfig
from models.labels import find_downloaded_labels, find_labels
from prompt_datasets import number_labels
from runs.start import check_checkpoints
from system.signals import end_on_signals
from system.terminal import choose_progress, exit_code, show_step


def main(argv: list[str]) -> int:
    """Do what the command line asks for; the exit code: 2 for a user error."""
    is_quiet = "--quiet" in argv
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if is_quiet else sys.stdout):
        return exit_code(lambda: run_command(argv), debug="--debug" in argv)


def run_command(argv: list[str]):
    """Answer what can be answered at once; only then import torch, which takes seconds."""
    config, list_classes = read_command(argv, __doc__)
    if list_classes:
        labels = find_labels(config.classifier, config.labels) or load_labels(config)
        print(number_labels(labels))
        return
    check_checkpoints(config)
    check_classes(config, find_downloaded_labels(config.classifier))
    with show_step("importing torch and diffusers"):
        from runs import session, sweep
    if config.estimate:
        print(session.estimate_training(config))
    else:
        sweep.run_sweep(session.Session(config))


def load_labels(config: RunConfig) -> list[str]:
    """Load the labels of a classifier that no folder has."""
    check_checkpoints(config)
    labels = find_downloaded_labels(config.classifier)
    if labels:
        return labels
    with show_step("importing torch and transformers"):
        from models import classifiers
    return classifiers.load_labels(config.classifier, config.labels)


if __name__ == "__main__":
    if "IPython" not in sys.modules:  # a notebook's %run: its kernel is not ours to end
        end_on_signals()
    choose_progress(quiet="--quiet" in sys.argv)
    sys.exit(main(sys.argv[1:]))
