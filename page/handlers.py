"""What the page's buttons do; what a visitor makes lies in a folder of the visitor's own."""

import functools
import importlib
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from evaluation.report import plot_curves
from evaluation.sheets import encode_address
from page.models import (
    LiveUpdate,
    Picture,
    choose_seeds,
    draw_pictures,
    find_tokens,
    learn_word,
    load_ready_token,
    save_download,
    use_words,
)
from prompt_datasets import TEMPLATES, TargetClass, distinguish_labels
from runs.session import Session
from tokens.class_token import ClassToken, load_token
from utils import ROOT, UserError, write_text

SHOWN = 6  # pictures per row
CURRENT = "current.txt"  # in a visitor's folder: which learning is to go on
SMALL = 128  # pixels up to which a picture is shown at twice its size
PAGE_TEMPLATES = Environment(
    loader=FileSystemLoader(ROOT / "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def show_errors(function: Callable) -> Callable:
    """Wrap a handler so that its user errors are shown to the visitor, in one line."""

    @functools.wraps(function)
    def call_handler(*arguments):
        try:
            yield from function(*arguments)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return call_handler


def use_gpu(function: Callable) -> Callable:
    """Run the handler on a GPU lent for each call, if the `spaces` package is installed."""
    if importlib.util.find_spec("spaces") is None:
        return function
    return importlib.import_module("spaces").GPU(duration=120)(function)


def make_folder() -> str:
    """Make a folder for one visitor's files, until `remove_folder` removes it."""
    return tempfile.mkdtemp(prefix="class-tokens-")


def remove_folder(folder: str):
    """Remove a visitor's files."""
    shutil.rmtree(folder, ignore_errors=True)


def encode_image(image: Image.Image) -> str:
    """Encode a picture as an address for the page."""
    data = io.BytesIO()
    if max(image.size) > SMALL:
        image.save(data, format="JPEG", quality=90)
        return encode_address("jpeg", data)
    double = (2 * image.width, 2 * image.height)
    image.resize(double, Image.NEAREST).save(data, format="PNG")
    return encode_address("png", data)


def show_rows(
    rows: list[tuple[str, list[Picture]]],
    target: TargetClass,
    seeds: list[int],
    labels: list[str],
) -> str:
    """Return HTML of the same seeds in several conditions, with the judge's count of each.

    `labels` are those of the judge.
    """
    shown = distinguish_labels(labels)
    described = []
    for name, pictures in rows:
        right = 0
        figures = []
        for picture, seed in zip(pictures, seeds, strict=True):
            bars = []
            for index, share in picture.seen_as:
                bars.append((shown[index], share, index == target.index))
            figures.append(
                {"address": encode_image(picture.image), "bars": bars, "seed": f"seed {seed}"}
            )
            likeliest, _ = picture.seen_as[0]
            right += likeliest == target.index
        note = f"{right} of {len(pictures)} are {shown[target.index]}, according to the judge"
        described.append((name, note, figures))
    return PAGE_TEMPLATES.get_template("pictures.html").render(rows=described)


def compare_pictures(
    session: Session, target: TargetClass, token: ClassToken, template: str, seeds: list[int]
) -> str:
    """Return HTML of the same seeds without and with a token."""
    rows = [
        ("Without the token", draw_pictures(session, target, template, None, seeds)),
        ("With the token", draw_pictures(session, target, template, token, seeds)),
    ]
    return show_rows(rows, target, seeds, session.judge.labels)


def offer_token(
    session: Session, target: TargetClass, token: ClassToken, folder: Path
) -> tuple[dict, str]:
    """Return the button that downloads the token, and what to type in other tools."""
    file = save_download(token, target, folder)
    usage = PAGE_TEMPLATES.get_template("usage.html").render(
        name=file.stem,
        noun=target.name,
        model=session.config.model,
        size=f"{file.stat().st_size / 1000:.1f}",
    )
    return gr.update(value=str(file), interactive=True), usage


def look_at_class(
    session: Session, number: int, template: str, seed: float | None, folder: str
) -> Iterator[tuple]:
    """Draw the same seeds without and with a ready token; return them, the first seed, the token.

    A handler may run in a process of its own, where a GPU is lent: what it writes into the
    visitor's `folder` outlives it.
    """
    target = session.targets[number - 1]
    token = load_ready_token(find_tokens(session), target)
    seeds = choose_seeds(seed, SHOWN)
    pictures = compare_pictures(session, target, token, template, seeds)
    button, usage = offer_token(session, target, token, Path(folder))
    yield pictures, seeds[0], button, usage


def learn_live(session: Session, number: int, folder: str, words: str = "") -> Iterator[tuple]:
    """Yield what happened after every update: pictures, curves and best token; then a comparison.

    Ends after its update once `request_stop` was called with the visitor's `folder`, or another
    learning has begun.
    """
    home = begin_learning(folder)
    session, target = choose_class(session, number, words, home)
    no_token = gr.update(value=None, interactive=False)
    yield f"Learning a word for **{target.title}** ...", "", "", "", no_token, ""
    for update in learn_word(session, target, home):
        curve = plot_curves(update.history_file)
        button, usage = offer_token(session, target, update.token, home)
        text = describe_update(session, target, update)
        yield text, show_newest(update), curve, "", button, ""
        if find_learning(folder) != home:
            return
    text = (
        f"**Learned** after {update.line['update'] + 1} updates: {update.stop}. Below, seeds that "
        "it never saw."
    )
    seeds = choose_seeds(0, SHOWN)
    compared = compare_pictures(session, target, update.token, TEMPLATES[0], seeds)
    yield text, "", curve, compared, button, usage


def choose_class(
    session: Session, number: int, words: str, folder: Path
) -> tuple[Session, TargetClass]:
    """Find the class of a number, among the visitor's own `words` if there are any."""
    if words.strip():
        session = use_words(session, words, folder)
        number = min(number, len(session.targets))
    return session, session.targets[number - 1]


def describe_update(session: Session, target: TargetClass, update: LiveUpdate) -> str:
    """Describe what the judge saw in an update's pictures."""
    config, line = session.config, update.line
    return (
        f"**Update {line['update'] + 1}**, of {config.num_train_epochs} at most: the classifier "
        f"takes {line['accuracy']:.0%} of {config.epoch_size} new pictures for {target.label}."
    )


def show_newest(update: LiveUpdate) -> str:
    """Return HTML of an update's first pictures."""
    shown = []
    for file in update.pictures[:SHOWN]:
        shown.append({"address": encode_image(Image.open(file)), "bars": [], "seed": ""})
    rows = [("The newest pictures", "drawn with the word as it is now", shown)]
    return PAGE_TEMPLATES.get_template("pictures.html").render(rows=rows)


def begin_learning(folder: str) -> Path:
    """Make a new folder for this visitor's learning, and remove earlier ones."""
    for old in Path(folder).glob("learning-*"):
        shutil.rmtree(old, ignore_errors=True)
    home = Path(tempfile.mkdtemp(prefix="learning-", dir=folder))
    write_text(Path(folder, CURRENT), home.name)
    return home


def find_learning(folder: str) -> Path | None:
    """Find the folder of the learning that is to go on; a file tells, also another process."""
    file = Path(folder, CURRENT)
    if not file.exists():
        return None
    return Path(folder, file.read_text(encoding="utf-8"))


def request_stop(folder: str):
    """Make the learning in a visitor's folder end after its update."""
    Path(folder, CURRENT).unlink(missing_ok=True)


def finish_learning(
    session: Session, number: int, file: str | None, folder: str, words: str = ""
) -> Iterator[tuple]:
    """Return, after a stop, the comparison with the best token so far."""
    if not file:
        yield "Stopped before the first update: there is no word yet.", gr.skip()
        return
    session, target = choose_class(session, number, words, Path(folder))
    token = load_token(Path(file))
    seeds = choose_seeds(0, SHOWN)
    compared = compare_pictures(session, target, token, TEMPLATES[0], seeds)
    yield "**Stopped.** The best word so far is kept. Below, seeds that it never saw.", compared
