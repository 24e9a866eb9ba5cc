"""A page to try class tokens on: look at ready ones, and learn a word live.

    python app.py                                    the miniature, on a CPU
    python app.py --config configs/imagenet.yml      Stable Diffusion, on a GPU, with the tokens in pipeline_token/
"""

import functools
import importlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from command_line import parse_settings
from evaluation.pictures import encode_address
from evaluation.report import plot_curves
from page.models import (
    Picture,
    Studio,
    choose_seeds,
    draw_pictures,
    learn_word,
    load_ready_token,
    open_studio,
    save_download,
    use_words,
)
from prompt_datasets import TEMPLATES, TargetClass, distinguish_labels
from runs.sweep import choose_device
from system.terminal import exit_code
from tokens.class_token import ClassToken, load_token
from utils import ROOT, UserError, write_text

SHOWN = 6  # pictures per row
LIFETIME = 86_400  # seconds that a visitor's folder stays, where the visitor does not go: no learning takes a day
CURRENT = "current.txt"  # in a visitor's folder: which learning is to go on
INTRO = """# Class tokens
Asked for "a crane", a text-to-image model may draw a bird or a machine. A **class token** is one learned word that
settles it: put before the class name, it makes the same frozen model draw what you mean. It is learned from a
classifier: draw pictures, have the classifier judge them, and change the word until it agrees."""
TEMPLATES_OF_PAGE = Environment(loader=FileSystemLoader(ROOT / "page"), autoescape=True, trim_blocks=True,
                                lstrip_blocks=True)


def show_errors(function: Callable) -> Callable:
    """A handler whose user errors are shown to the visitor, in one line."""
    @functools.wraps(function)
    def call_handler(*arguments):
        try:
            yield from function(*arguments)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return call_handler


def use_gpu(function: Callable) -> Callable:
    """The handler on a GPU that is lent for each call, where the `spaces` package is installed."""
    found = importlib.util.find_spec("spaces")
    if found is None or found.origin is None:  # or only the folder of this repository
        return function
    return importlib.import_module("spaces").GPU(duration=120)(function)


def show_rows(rows: list[tuple[str, list[Picture]]], target: TargetClass, seeds: list[int], labels: list[str]) -> str:
    """HTML of the same seeds in several ways, and how many of each the judge takes for the class.

    `labels` are those of the judge.
    """
    shown = distinguish_labels(labels)
    described = []
    for name, pictures in rows:
        right = sum(picture.seen_as[0][0] == target.index for picture in pictures)
        figures = []
        for picture, seed in zip(pictures, seeds, strict=True):
            bars = [(shown[index], share, index == target.index) for index, share in picture.seen_as]
            figures.append({"address": encode_image(picture.image), "bars": bars, "seed": f"seed {seed}"})
        note = f"{right} of {len(pictures)} are {shown[target.index]}, according to the judge"
        described.append((name, note, figures))
    return TEMPLATES_OF_PAGE.get_template("pictures.html").render(rows=described)


def encode_image(image: Image.Image) -> str:
    data = io.BytesIO()
    if max(image.size) > 128:
        image.save(data, format="JPEG", quality=90)
        return encode_address("jpeg", data)
    image.resize((2 * image.width, 2 * image.height), Image.NEAREST).save(data, format="PNG")
    return encode_address("png", data)


def compare_pictures(studio: Studio, target: TargetClass, token: ClassToken, template: str, seeds: list[int]) -> str:
    return show_rows([("Without the token", draw_pictures(studio, target, template, None, seeds)),
                      ("With the token", draw_pictures(studio, target, template, token, seeds))], target, seeds,
                     studio.judge.labels)


def make_folder() -> str:
    """A folder for what one visitor makes; gradio removes it by `remove_folder` when the visitor has gone."""
    return tempfile.mkdtemp(prefix="class-tokens-")


def remove_folder(folder: str):
    shutil.rmtree(folder, ignore_errors=True)


def offer_token(studio: Studio, target: TargetClass, token: ClassToken, folder: Path) -> tuple[dict, str]:
    """The button that downloads the token, and what to type in which tool."""
    file = save_download(token, target, folder)
    usage = TEMPLATES_OF_PAGE.get_template("usage.html").render(
        name=file.stem, noun=target.name, model=studio.config.model, size=f"{file.stat().st_size / 1000:.1f}")
    return gr.update(value=str(file), interactive=True), usage


def look_at_class(studio: Studio, number: int, template: str, seed: float | None, folder: str) -> Iterator[tuple]:
    """The same seeds without and with a ready token; the first seed; the token to take away, in the visitor's folder.

    A handler may run in a process of its own, where a GPU is lent: what it writes must outlive it.
    """
    target = studio.targets[number - 1]
    token, seeds = load_ready_token(studio, target), choose_seeds(seed, SHOWN)
    yield compare_pictures(studio, target, token, template, seeds), seeds[0], *offer_token(
        studio, target, token, Path(folder))


def learn_live(studio: Studio, number: int, folder: str, words: str = "") -> Iterator[tuple]:
    """After every update: what happened, its pictures, the curves, and the best token so far; then a comparison.

    Ends after its update once `request_stop` was called with the visitor's `folder`, or another learning has begun.
    """
    home = begin_learning(folder)
    if words.strip():
        studio = use_words(studio, words, home)
        number = min(number, len(studio.targets))
    target = studio.targets[number - 1]
    yield f"Learning a word for **{target.title}** ...", "", "", "", gr.update(value=None, interactive=False), ""
    for progress in learn_word(studio, target, home):
        line = progress.line
        text = (f"**Update {line['update'] + 1}**, of {studio.config.num_train_epochs} at most: the classifier "
                f"takes {line['accuracy']:.0%} of {studio.config.epoch_size} new pictures for {target.label}.")
        shown = [{"address": encode_image(Image.open(file)), "bars": [], "seed": ""}
                 for file in progress.pictures[:SHOWN]]
        rows = [("The newest pictures", "drawn with the word as it is now", shown)]
        pictures = TEMPLATES_OF_PAGE.get_template("pictures.html").render(rows=rows)
        curve = plot_curves(progress.history_file)
        button, usage = offer_token(studio, target, progress.token, home)
        yield text, pictures, curve, "", button, ""
        if find_learning(folder) != home:
            return
    yield (f"**Learned** after {line['update'] + 1} updates: {progress.end}. Below, seeds that it never saw.",
           "", curve, compare_pictures(studio, target, progress.token, TEMPLATES[0],
                                       choose_seeds(0, SHOWN)), button, usage)


def begin_learning(folder: str) -> Path:
    """A new folder for a learning, which is then the visitor's; what earlier ones left is removed."""
    for old in Path(folder).glob("learning-*"):
        shutil.rmtree(old, ignore_errors=True)
    home = Path(tempfile.mkdtemp(prefix="learning-", dir=folder))
    write_text(Path(folder, CURRENT), home.name)
    return home


def find_learning(folder: str) -> Path | None:
    """The folder of the learning that is to go on; it may run in another process, so a file tells."""
    file = Path(folder, CURRENT)
    return Path(folder, file.read_text(encoding="utf-8")) if file.exists() else None


def request_stop(folder: str):
    """Have the learning in a visitor's folder end after its update."""
    Path(folder, CURRENT).unlink(missing_ok=True)


def finish_learning(studio: Studio, number: int, file: str | None, folder: str, words: str = "") -> Iterator[tuple]:
    """After a stop: the comparison with the best token so far."""
    if not file:
        yield "Stopped before the first update: there is no word yet.", gr.skip()
        return
    if words.strip():
        studio = use_words(studio, words, Path(folder))
        number = min(number, len(studio.targets))
    target = studio.targets[number - 1]
    yield ("**Stopped.** The best word so far is kept. Below, seeds that it never saw.",
           compare_pictures(studio, target, load_token(Path(file)), TEMPLATES[0], choose_seeds(0, SHOWN)))


def list_choices(targets: list[TargetClass], labels: list[str]) -> list[tuple[str, int]]:
    """The classes of a menu and their numbers; `labels` are those of all classes."""
    shown = distinguish_labels(labels)
    return [(shown[target.index], target.number) for target in targets]


def build_page(studio: Studio) -> gr.Blocks:
    """The page: two tabs over one studio; whoever comes while the models work waits in a queue."""
    models = {"concurrency_id": "models", "concurrency_limit": 1, "show_progress": "minimal"}
    with gr.Blocks(title="Class tokens", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRO)
        folder = gr.State(make_folder, time_to_live=LIFETIME, delete_callback=remove_folder)
        with gr.Tab("Look"):
            build_look_tab(page, studio, folder, models)
        with gr.Tab("Learn a word live"):
            build_learn_tab(studio, folder, models)
    return page


def build_look_tab(page: gr.Blocks, studio: Studio, folder: gr.State, models: dict):
    ready = list(studio.tokens)
    if not ready:
        gr.Markdown("No token is there yet: learn one on the other tab, or by `python run.py --train True`.")
        return
    with gr.Row():
        number = gr.Dropdown(list_choices(ready, studio.guide.labels), value=ready[0].number, label="Class")
        template = gr.Textbox(TEMPLATES[0], label="Prompt", info="{} is where the class goes", max_length=300)
        seed = gr.Number(0, label="First seed", precision=0, minimum=0)
    with gr.Row():
        draw = gr.Button("Draw", variant="primary")
        other = gr.Button("Other seeds")
    pictures = gr.HTML(label="Pictures")
    download, usage = gr.DownloadButton("Download the token", interactive=False), gr.HTML()
    handler = use_gpu(show_errors(functools.partial(look_at_class, studio)))
    outputs, models = [pictures, seed, download, usage], {**models, "show_progress_on": pictures}
    given = [number, template, seed, folder]
    for event in (page.load, draw.click, template.submit, number.input):
        event(handler, given, outputs, **models)
    other.click(lambda: None, outputs=seed).then(handler, given, outputs, **models)


def build_learn_tab(studio: Studio, folder: gr.State, models: dict):
    config = studio.config
    is_open = config.classifier.startswith("zero-shot:")
    words = gr.Textbox("\n".join(studio.guide.labels), lines=4, max_lines=12, max_length=5000, visible=is_open,
                       label="Words to tell apart, one per line", info="what is before a comma goes into the prompt")
    number = gr.Dropdown(list_choices(studio.targets, studio.guide.labels), value=1, label="Learn a word for")
    with gr.Row():
        start, stop = gr.Button("Start", variant="primary"), gr.Button("Stop", variant="stop")
    status = gr.Markdown("Press Start: every update draws pictures, has the classifier judge them, and changes the "
                         "word's numbers a little. The rest of the model stays as it is.")
    pictures, curve, result = gr.HTML(), gr.HTML(elem_classes="ct-curve"), gr.HTML()
    download, usage = gr.DownloadButton("Download the token", interactive=False), gr.HTML()
    own_words = [words] if is_open else []
    given = [number, folder, *own_words]
    learning = start.click(use_gpu(show_errors(functools.partial(learn_live, studio))), given,
                           [status, pictures, curve, result, download, usage], show_progress_on=status, **models)
    after = [number, download, folder, *own_words]
    stop.click(request_stop, folder, queue=False, cancels=learning).then(
        use_gpu(show_errors(functools.partial(finish_learning, studio))), after, [status, result],
        show_progress_on=status, **models)
    if is_open:
        words.change(lambda text: gr.Dropdown([(line, i) for i, line in enumerate(
            filter(str.strip, text.splitlines()), 1)], value=1), words, number)


def main(argv: list[str]) -> int:
    """Serve the page; the exit code: 2 for a user error."""
    def serve_page():
        config, _ = parse_settings(argv if "--config" in argv else ["--config", "configs/miniature.yml", *argv])
        choose_device(config.device, config.mixed_precision, local_rank=-1)
        build_page(open_studio(config)).queue(max_size=20).launch(
            server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), css_paths=ROOT / "page/page.css",
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), ssr_mode=False,
            footer_links=[])

    return exit_code(serve_page)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
