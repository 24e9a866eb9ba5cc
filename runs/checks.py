"""Checks before any long work, and before anything is written."""

import re
from dataclasses import asdict
from pathlib import Path

from config import names_deciding
from method.losses import LOSSES
from prompt_datasets import TEMPLATES, class_name
from runs.folders import RunFolder, check_held_out
from runs.session import Session
from system.terminal import print_warning
from tokens.class_token import load_token, names_file
from utils import require

UNNAMED = r"LABEL_\d+|class \d+"  # labels that transformers and we make up


def check_settings(session: Session):
    """Raise UserError for the first setting that cannot work with these classes and files."""
    config = session.config
    require(
        config.loss in LOSSES or ":" in config.loss,
        f"loss must be {', '.join(LOSSES)} or module:function, not '{config.loss}'",
    )
    names = [target.name for target in session.targets]
    for text in (*names, *TEMPLATES, *config.eval_prompts):
        require(
            config.placeholder_token.lower() not in text.lower(),  # the tokenizer would find it
            f"placeholder_token '{config.placeholder_token}' is part of '{text}': use a word that "
            "appears nowhere else",
        )
    if config.train:
        warn_of_unnamed(session)
    if config.train and config.skip_exists:
        for folder in session.folders.values():
            folder.refuse_other_settings(asdict(config), names_deciding("token"))
    if config.train and names_file(config.initializer_token):
        start = load_token(config.initializer_token)
        check_held_out(config.initializer_token, start.header, config.test_size)
    if config.token:
        require(
            len(session.targets) == 1,
            "a token belongs to one class: give that class as --class_index",
        )
        check_held_out(config.token, load_token(config.token).header, config.test_size)


def warn_of_unnamed(session: Session):
    """Warn that prompts will contain a label that is no name."""
    for target in session.targets:
        is_unnamed = re.fullmatch(UNNAMED, target.label)
        if is_unnamed and target.name == class_name(target.label):
            print_warning(
                f"'{session.config.classifier}' does not name its classes, so prompts will say "
                f"'{target.name}': give their names by --class_names"
            )
            return


def list_untrained(session: Session) -> list[RunFolder]:
    """List the classes that this command is to train."""
    config = session.config
    if not config.train:
        return []
    folders = session.folders.values()
    if not config.skip_exists:
        return list(folders)
    return [folder for folder in folders if not folder.token_file.exists()]


def load_models(session: Session, is_training: bool):
    """Load the models that score pictures, in training and in evaluation."""
    config = session.config
    classifier = session.classifier
    if config.evaluate and session.evaluator and session.evaluator.name == classifier.name:
        print_warning("the result is biased: the evaluator is the classifier that trains the token")
    if is_training:
        session.load_now("loss")
    if config.evaluate and any(session.evaluation.real.values()):
        session.evaluation.load_extractor()


def import_token(session: Session) -> list[str]:
    """Copy the token of the setting into the run, once the generator has taken it."""
    config = session.config
    (folder,) = session.folders.values()
    token = load_token(config.token)
    if not folder.token_file.exists():
        session.load_now("generator")  # refuses a token of another model
    source = Path(config.token).name
    start_over = not config.skip_exists
    return folder.import_token(token, config.placeholder_token, source, start_over)
