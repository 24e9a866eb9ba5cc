"""The model card of exported tokens: what to type, figures, settings; foreign text escaped."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from evaluation.accuracy import pool_accuracy
from evaluation.drawing import PAIR
from evaluation.files import RunFiles
from evaluation.metrics import ClassMetrics
from models.hub import is_hub_id
from models.labels import REGISTRY
from prompt_datasets import TEMPLATES, class_name
from system.paths import split_revision
from system.text_files import read_yaml
from tokens.class_token import ClassToken
from utils import join_lines, to_printable

# Settings that say nothing to a stranger.
UNPUBLISHED = {
    "class_index",
    "output_path",
    "real_images",
    "device",
    "skip_exists",
    "train",
    "evaluate",
}
TITLE = "# Discriminative class tokens"
TAGS = ["textual_inversion", "text-to-image", "diffusers", "stable-diffusion"]
SDXL_TAG = "stable-diffusion-xl"


class CardEntry(NamedTuple):
    """A class of the card."""

    name: str  # of its files, and its word in prompts
    files: RunFiles
    token: ClassToken
    metrics: ClassMetrics


def write_card(entries: list[CardEntry]) -> str:
    """Write the card as Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escape_text,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = show_code
    environment.filters["json"] = show_json
    described = [describe_entry(entry) for entry in entries]
    models: dict[tuple, list] = {}
    settings: dict[str, list] = {}
    for found in described:
        models.setdefault((found["base_model"], found["paired"]), []).append(found)
        settings.setdefault(found["settings"], []).append(found["name"])
    return environment.get_template("model_card.md").render(
        head=Markup(write_head(described)), classes=described, models=models, settings=settings
    )


def write_head(described: list[dict]) -> str:
    """Write the card's metadata as YAML, which the Hub reads."""
    hub_ids = {found["base_model"] for found in described if is_hub_id(found["base_model"])}
    tags = list(TAGS)
    if any(found["paired"] for found in described):
        tags.append(SDXL_TAG)
    head = ModelCardData(
        base_model=sorted(hub_ids) or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    )
    return head.to_yaml() + "\n"


def describe_entry(entry: CardEntry) -> dict[str, Any]:
    """Describe a class in the card."""
    header, metrics, token = entry.token.header, entry.metrics, entry.token
    noun = to_one_line(header.get("class_name") or class_name(metrics.label))
    # diffusers finds only the first vector of a word with capitals
    word = f"<{entry.name.lower()}>"
    model = metrics.settings.get("model") or ""
    base_model = header.get("base_model") or model or "unknown"
    return {
        "name": entry.name,
        "noun": noun,
        "label": metrics.label,
        "number": metrics.class_index,
        "prompt": TEMPLATES[0].format(f"{word} {noun}"),
        "paired": len(token.widths) > 1,
        "base_model": describe_source(base_model),
        "drawn_with": describe_source(model),
        "vectors": len(token.vectors),
        "updates": header.get("updates"),
        "images": metrics.images,
        "held_out": metrics.held_out,
        "settings": describe_training(entry.files),
        "judged": describe_judges(entry),
    }


def describe_judges(entry: CardEntry) -> list[tuple]:
    """Describe every judge: its role, its name, and accuracy without and with the token."""
    metrics = entry.metrics
    guided = "imported_from" not in entry.token.header
    judged = []
    for role, name in metrics.judges.items():
        title = role
        if role == "classifier" and guided:
            title = "classifier that trained the token"
        source = describe_source(metrics.settings.get(role) or name)
        shares = [pool_accuracy([metrics.conditions], condition, role) for condition in PAIR]
        judged.append((title, source, *shares))
    return judged


def describe_training(files: RunFiles) -> str:
    """Return the settings of config.yml that others can use, one per line.

    Empty if the token came without it.
    """
    if not files.config_file.exists():
        return ""
    lines = []
    for key, value in read_yaml(str(files.config_file), "lr: 0.001").items():
        if key in UNPUBLISHED:
            continue
        parts = [value] if isinstance(value, str) else value
        words = " ".join(hide_folders(part) for part in parts)
        lines.append(f"{key}: {words}\n")
    return "".join(lines)


def describe_source(name: str) -> str:
    """Name a checkpoint for the card's readers: hub id without revision, or folder."""
    place, _ = split_revision(name)
    return hide_folders(REGISTRY.get(place, place))


def hide_folders(text: str) -> str:
    """Shorten local paths: 'mean:/home/me/vit' -> 'mean:vit'."""
    return re.sub(r"^((?:[\w-]+:)*)[~/.$].*/", r"\1", text.rstrip("/"))


def to_one_line(text: str) -> str:
    """Put untrusted text on one line."""
    return join_lines(to_printable(text))


def escape_text(value) -> str:
    """Put untrusted text on one line, its punctuation as entities: no HTML, no Markdown.

    Markup stays as it is.
    """
    if isinstance(value, Markup):
        return value
    text = to_one_line(str(value))
    return re.sub(r"[^\w\s,.()'-]|_", lambda match: f"&#{ord(match[0])};", text)


def show_code(text: str) -> Markup:
    """Show untrusted text as code, also in a table."""
    if set("`|") & set(text):
        return Markup(f"<code>{escape_text(text)}</code>")
    return Markup(f"`{to_one_line(text)}`")


def show_json(value) -> Markup:
    """Format a value so that Python reads it too."""
    return Markup(json.dumps(value, ensure_ascii=False))
