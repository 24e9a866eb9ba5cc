"""What the page does with the models: draw a class, judge it, learn a word live."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from config import RunConfig
from method.class_training import ClassTraining
from method.losses import build_loss
from method.update import fit_token_gradient, train_update
from prompt_datasets import TargetClass
from runs.folders import RunFolder
from runs.session import Session
from system.tensor_files import to_pixels
from tokens.class_token import ClassToken, load_token
from tokens.export import name_token, write_token
from utils import ROOT, UserError, require, write_text

READY = "ready"  # the exp_id of the tokens in the repository
MOST_SEED = 2**32 - 1
SEEN_AS = 3  # classes that a picture is said to be taken for


class Picture(NamedTuple):
    """A picture and what the judge takes it for: its most probable classes (from 0), best first."""

    image: Image.Image
    seen_as: list[tuple[int, float]]


class LiveUpdate(NamedTuple):
    """A class after an update, as the page shows it."""

    history_file: Path
    line: dict  # of the history
    pictures: list[Path]  # the update's first ones
    token: ClassToken  # the best so far
    stop: str | None  # why training ends here


def open_session(config: RunConfig) -> Session:
    """Open the session of a page: all classes of its classifier, with models loaded.

    Raises:
        UserError: a setting that cannot work, or a model that cannot be loaded.
    """
    config = replace(config, class_index="all")
    config.validate_settings()
    session = Session(config)
    session.load_now("generator", "classifier", "evaluator")
    return session


def find_tokens(session: Session) -> dict[TargetClass, Path]:
    """Find the existing token files: of the session's exp_id, or else those of the repository."""
    config = session.config
    tokens = {}
    for target in session.targets:
        ready = RunFolder(str(ROOT), config.classifier, target, READY).token_file
        own = session.folders[target].token_file
        for file in (ready, own):
            if file.exists():
                tokens[target] = file
    return tokens


def use_words(session: Session, words: str, folder: Path) -> Session:
    """Open a session whose zero-shot classifier has other labels, one per line, and also judges.

    Raises:
        UserError: labels that cannot be told apart, such as fewer than two.
    """
    file = folder / "labels.txt"
    write_text(file, words)
    config = replace(session.config, labels=str(file), evaluator=None)
    try:
        opened = Session(config)
        opened.load_now("classifier")
    except UserError as error:
        raise UserError(str(error).replace(f"'{file}'", "your list")) from error
    opened.generator = session.generator
    return opened


@torch.no_grad()
def draw_pictures(
    session: Session,
    target: TargetClass,
    template: str,
    token: ClassToken | None,
    seeds: list[int],
) -> list[Picture]:
    """Draw the class in a prompt with {}, one picture per seed, and judge it.

    Raises:
        UserError: a prompt that is not one, or too long, or a token of another model.
    """
    around = template.replace("{}", "")
    require(
        template.count("{}") == 1 and not set(around) & set("{}"),
        "the prompt needs one {} where the class goes, such as 'A painting of a {}'",
    )
    word = session.config.placeholder_token
    require(
        word.lower() not in template.lower(),
        f"leave '{word}' out: the token is put before the class name",
    )
    generator = session.generator
    if token:
        prompt = template.format(f"{word} {target.name}")
        cond = generator.encode([prompt], token.vectors[None].to(generator.device))
    else:
        cond = generator.encode([template.format(target.name)])
    latents = generator.sample(cond.repeat_interleave(len(seeds), 0), seeds, session.sampling)
    images = generator.decode(latents)
    probabilities = session.judge(images).softmax(1).cpu()
    best = probabilities.topk(min(SEEN_AS, probabilities.shape[1]))
    pictures = []
    for i, pixels in enumerate(to_pixels(images)):
        seen_as = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
        pictures.append(Picture(Image.fromarray(pixels), list(seen_as)))
    return pictures


def learn_word(session: Session, target: TargetClass, folder: Path) -> Iterator[LiveUpdate]:
    """Train the class's token in `folder`, from fresh seeds.

    A caller that stops asking stops the training.

    Raises:
        UserError: the training diverged.
    """
    config, generator = session.config, session.generator
    loss = build_loss(config.loss, session.classifier, generator)
    fitted_gradient = fit_token_gradient(
        config.epoch_size, config.batch_size, session.training_sampling, session.device
    )
    training = ClassTraining(
        target,
        session.start_vectors(generator),
        session.training_settings,
        generator.dtype,
        folder / "history.jsonl",
        folder / "training_state.pt",
        folder / "train",
    )
    stop = None
    while stop is None:
        pictures = training.list_image_paths()
        progress = train_update(
            training, generator, loss, session.training_sampling, fitted_gradient
        )
        stop = progress.stop
        token = make_token(session, target, training)
        yield LiveUpdate(training.history_file, progress.line, pictures, token, stop)


def make_token(session: Session, target: TargetClass, training: ClassTraining) -> ClassToken:
    """Make the best token of a training so far."""
    config = session.config
    vectors = training.past[training.best].detach().cpu()
    header = {
        "class_index": target.number,
        "class_name": target.name,
        "label": target.label,
        "classifier": config.classifier,
        "base_model": config.model,
        "seed": config.seed,
        "updates": len(training.history),
    }
    words = {key: str(value) for key, value in header.items()}
    return ClassToken(config.placeholder_token, vectors, session.generator.token_widths, words)


def save_download(token: ClassToken, target: TargetClass, folder: Path) -> Path:
    """Save the token as other tools read it, in a file whose name is its word there."""
    name = name_token(token.placeholder, target.folder)
    return write_token(name, token, folder)


def choose_seeds(first: float | None, count: int) -> list[int]:
    """Choose `count` seeds from `first` on, or anywhere without it.

    Raises:
        UserError: no seed.
    """
    if first is None:
        first = random.randrange(10**6)  # nosec B311
    most = MOST_SEED - count
    require(
        first == int(first) and 0 <= first <= most,
        f"the seed must be a whole number from 0 to {most}",
    )
    return list(range(int(first), int(first) + count))


def load_ready_token(tokens: dict[TargetClass, Path], target: TargetClass) -> ClassToken:
    """Load the token of a class; raise UserError if there is none yet."""
    require(
        target in tokens,
        f"there is no token for {target.title} yet: learn it on the other tab",
    )
    return load_token(tokens[target])
