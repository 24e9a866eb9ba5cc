"""What the page does with the models: draw a class without and with its token, judge it, learn a word live."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from config import RunConfig
from method.class_training import TrainedToken, Trainer, TrainingSettings
from method.losses import Loss, build_loss
from method.update import train_tokens
from models.classifiers import Classifier, load_classifier, load_evaluator
from models.generator import PRECISIONS, Generator, load_generator
from models.sampling import SamplingSettings
from prompt_datasets import TargetClass, class_names, select_classes
from runs.folders import RunFolder
from runs.start import pin_checkpoints
from system.tensor_files import to_pixels
from tokens.class_token import ClassToken, load_token, start_vectors
from tokens.gallery import ExportedClass, name_token, write_class
from utils import ROOT, UserError, require, write_text

READY = "ready"  # the exp_id of the tokens in the repository
MOST_SEED = 2**32 - 1


class Studio(NamedTuple):
    """A configuration with its models loaded, its classes, and the token files that are there."""

    config: RunConfig
    generator: Generator
    guide: Classifier
    judge: Classifier
    targets: list[TargetClass]
    tokens: dict[TargetClass, Path]


class Picture(NamedTuple):
    """A picture and what the judge takes it for: its most probable classes (from 0), best first."""

    image: Image.Image
    seen_as: list[tuple[int, float]]


class Progress(NamedTuple):
    """A class after an update: its history so far, the update's first pictures, the best token, why it ended."""

    history_file: Path
    line: dict
    pictures: list[Path]
    token: ClassToken
    end: str | None


def open_studio(config: RunConfig) -> Studio:
    """Load the models of `config` and find the tokens of its classes, of its exp_id or else READY.

    Raises:
        UserError: a model that cannot be loaded.
    """
    config = pin_checkpoints(config)
    size = config.height, config.width
    generator = load_generator(config.model, config.device, PRECISIONS[config.mixed_precision])
    generator.set_placeholder(config.placeholder_token)
    guide = load_classifier(config.classifier, config.device, *size, config.labels)
    judge = guide
    if config.evaluator:
        judge = load_evaluator(config.evaluator, guide.labels, config.device, *size, config.labels)
    targets = select_classes("all", guide.labels, class_names(guide.labels, config.class_names))
    tokens = {target: file for target in targets
              for folder, name in ((str(ROOT), READY), (config.output_path, config.exp_id))
              if (file := RunFolder(folder, config.classifier, target, name).token_file).exists()}
    return Studio(config, generator, guide, judge, targets, tokens)


def use_words(studio: Studio, words: str, folder: Path) -> Studio:
    """The studio with a zero-shot guide over other labels, one per line, which then judges too.

    Raises:
        UserError: labels that cannot be told apart, such as fewer than two.
    """
    write_text(folder / "labels.txt", words)
    config = studio.config
    try:
        guide = load_classifier(config.classifier, config.device, config.height, config.width,
                                str(folder / "labels.txt"))
    except UserError as error:
        raise UserError(str(error).replace(f"'{folder / 'labels.txt'}'", "your list")) from error
    targets = select_classes("all", guide.labels, class_names(guide.labels))
    return studio._replace(guide=guide, judge=guide, targets=targets, tokens={})


@torch.no_grad()
def draw_pictures(studio: Studio, target: TargetClass, template: str, token: ClassToken | None,
                  seeds: list[int]) -> list[Picture]:
    """The class in a prompt with {}, one picture per seed, judged.

    Raises:
        UserError: a prompt that is not one, or too long, or a token of another model.
    """
    require(template.count("{}") == 1 and not set(template.replace("{}", "")) & set("{}"),
            "the prompt needs one {} where the class goes, such as 'A painting of a {}'")
    word = studio.config.placeholder_token
    require(word.lower() not in template.lower(), f"leave '{word}' out: the token is put before the class name")
    generator = studio.generator
    vectors = token.vectors[None].to(generator.device) if token else None
    cond = generator.encode([template.format(f"{word} {target.name}" if token else target.name)], vectors)
    sampling = SamplingSettings(**studio.config.sampling_settings())
    images = generator.decode(generator.sample(cond.repeat_interleave(len(seeds), 0), seeds, sampling))
    probabilities = studio.judge(images).softmax(1).cpu()
    best = probabilities.topk(min(3, probabilities.shape[1]))
    pictures = []
    for pixels, classes, shares in zip(to_pixels(images), best.indices.tolist(), best.values.tolist(), strict=True):
        pictures.append(Picture(Image.fromarray(pixels), list(zip(classes, shares, strict=True))))
    return pictures


def learn_word(studio: Studio, target: TargetClass, folder: Path) -> Iterator[Progress]:
    """Train the class's token in `folder`, from fresh seeds; a caller that stops asking stops the training.

    Raises:
        UserError: the training diverged.
    """
    config, generator = studio.config, studio.generator
    loss: Loss = build_loss(config.loss, studio.guide, generator)
    settings = TrainingSettings(**config.pick_settings(TrainingSettings._fields))
    trainer = Trainer(target, start_vectors(generator, config.initializer_token, config.num_vectors), settings,
                      generator.dtype, folder / "history.jsonl", folder / "training_state.pt", folder / "train")
    sampling = SamplingSettings(**config.sampling_settings(training=True))
    pictures = trainer.list_image_paths()
    for _, end in train_tokens(generator, loss, iter([trainer]), 1, sampling, config.batch_size):
        if isinstance(end, UserError):
            raise end
        vectors = end.vectors if end else trainer.past[trainer.best]
        header = {"class_index": target.number, "class_name": target.name, "label": target.label,
                  "classifier": config.classifier, "base_model": config.model, "seed": config.seed,
                  "updates": len(trainer.history)}
        token = ClassToken(config.placeholder_token, vectors.detach().cpu(), generator.token_widths,
                           {key: str(value) for key, value in header.items()})
        yield Progress(trainer.history_file, trainer.history[-1], pictures, token, end and end.stopped)
        pictures = trainer.list_image_paths() if not isinstance(end, TrainedToken) else []


def save_download(token: ClassToken, target: TargetClass, folder: Path) -> Path:
    """The token as other tools read it, in a file whose name is its word there."""
    name = name_token(token.placeholder, target.folder)
    write_class(ExportedClass(name, None, token, None), folder, card=False)
    return folder / f"{name}.safetensors"


def choose_seeds(first: float | None, count: int) -> list[int]:
    """`count` seeds from `first` on, or from anywhere if there is none.

    Raises:
        UserError: no seed.
    """
    if first is None:
        first = random.randrange(10**6)  # nosec B311
    require(first == int(first) and 0 <= first <= MOST_SEED - count, f"the seed must be a whole number from 0 to "
                                                                     f"{MOST_SEED - count}")
    return list(range(int(first), int(first) + count))


def load_ready_token(studio: Studio, target: TargetClass) -> ClassToken:
    require(target in studio.tokens, f"there is no token for {target.title} yet: learn it on the other tab")
    return load_token(studio.tokens[target])
