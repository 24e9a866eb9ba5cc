"""The page as it looks: two tabs over one session."""

import functools
import os

import gradio as gr

from page.handlers import (
    finish_learning,
    learn_live,
    look_at_class,
    make_folder,
    remove_folder,
    request_stop,
    show_errors,
    use_gpu,
)
from page.models import find_tokens
from prompt_datasets import TEMPLATES, TargetClass, distinguish_labels
from runs.session import Session
from utils import ROOT

# Seconds that a visitor's folder stays, where the visitor does not go: no learning takes a day.
LIFETIME = 86_400
QUEUE = 20  # visitors who may wait
INTRO = """# Class tokens
Asked for "a crane", a text-to-image model may draw a bird or a machine. A **class token** is one
learned word that settles it: put before the class name, it makes the same frozen model draw what
you mean. It is learned from a classifier: draw pictures, have the classifier judge them, and change
the word until it agrees."""


def list_choices(targets: list[TargetClass], labels: list[str]) -> list[tuple[str, int]]:
    """List the classes of a menu and their numbers; `labels` are those of all classes."""
    shown = distinguish_labels(labels)
    return [(shown[target.index], target.number) for target in targets]


def list_words(text: str) -> list[tuple[str, int]]:
    """List a visitor's own words, one per line, as `list_choices` does."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line, number) for number, line in enumerate(lines, 1)]


def build_page(session: Session) -> gr.Blocks:
    """Build the page: two tabs over one session; visitors wait in a queue while models work."""
    models = {"concurrency_id": "models", "concurrency_limit": 1, "show_progress": "minimal"}
    with gr.Blocks(
        title="Class tokens", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(INTRO)
        folder = gr.State(make_folder, time_to_live=LIFETIME, delete_callback=remove_folder)
        with gr.Tab("Look"):
            build_look_tab(page, session, folder, models)
        with gr.Tab("Learn a word live"):
            build_learn_tab(session, folder, models)
    return page


def build_look_tab(page: gr.Blocks, session: Session, folder: gr.State, models: dict):
    """Build the tab of ready tokens: the same seeds without and with one."""
    ready = list(find_tokens(session))
    if not ready:
        gr.Markdown(
            "No token is there yet: learn one on the other tab, or by `python run.py --train True`."
        )
        return
    with gr.Row():
        choices = list_choices(ready, session.labels)
        number = gr.Dropdown(choices, value=ready[0].number, label="Class")
        template = gr.Textbox(
            TEMPLATES[0], label="Prompt", info="{} is where the class goes", max_length=300
        )
        seed = gr.Number(0, label="First seed", precision=0, minimum=0)
    with gr.Row():
        draw = gr.Button("Draw", variant="primary")
        other = gr.Button("Other seeds")
    pictures = gr.HTML(label="Pictures")
    download = gr.DownloadButton("Download the token", interactive=False)
    usage = gr.HTML()

    handler = use_gpu(show_errors(functools.partial(look_at_class, session)))
    given = [number, template, seed, folder]
    outputs = [pictures, seed, download, usage]
    models = {**models, "show_progress_on": pictures}
    for event in (page.load, draw.click, template.submit, number.input):
        event(handler, given, outputs, **models)
    other.click(lambda: None, outputs=seed).then(handler, given, outputs, **models)


def build_learn_tab(session: Session, folder: gr.State, models: dict):
    """Build the tab on which one watches a word being learned."""
    is_open = session.config.classifier.startswith("zero-shot:")
    words = gr.Textbox(
        "\n".join(session.labels),
        lines=4,
        max_lines=12,
        max_length=5000,
        visible=is_open,
        label="Words to tell apart, one per line",
        info="what is before a comma goes into the prompt",
    )
    choices = list_choices(session.targets, session.labels)
    number = gr.Dropdown(choices, value=1, label="Learn a word for")
    with gr.Row():
        start = gr.Button("Start", variant="primary")
        stop = gr.Button("Stop", variant="stop")
    status = gr.Markdown(
        "Press Start: every update draws pictures, has the classifier judge them, and changes the "
        "word's numbers a little. The rest of the model stays as it is."
    )
    pictures = gr.HTML()
    curve = gr.HTML(elem_classes="ct-curve")
    result = gr.HTML()
    download = gr.DownloadButton("Download the token", interactive=False)
    usage = gr.HTML()

    own_words = [words] if is_open else []
    learning = start.click(
        use_gpu(show_errors(functools.partial(learn_live, session))),
        [number, folder, *own_words],
        [status, pictures, curve, result, download, usage],
        show_progress_on=status,
        **models,
    )
    stop.click(request_stop, folder, queue=False, cancels=learning).then(
        use_gpu(show_errors(functools.partial(finish_learning, session))),
        [number, download, folder, *own_words],
        [status, result],
        show_progress_on=status,
        **models,
    )
    if is_open:
        words.change(lambda text: gr.Dropdown(list_words(text), value=1), words, number)


def serve_page(session: Session):
    """Serve the page until the process ends."""
    page = build_page(session).queue(max_size=QUEUE)
    page.launch(
        server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        css_paths=ROOT / "page/page.css",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        ssr_mode=False,
        footer_links=[],
    )
