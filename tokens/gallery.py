"""Tokens as other tools read them, and a folder of them with a model card, ready for the Hugging Face Hub."""

import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from evaluation.accuracy import load_metrics, pool_accuracy
from evaluation.files import RunFiles, check_exported
from evaluation.images import ARMS
from evaluation.pictures import draw_sheet
from evaluation.report import list_shown
from models.hub import is_hub_id
from models.labels import REGISTRY
from prompt_datasets import TEMPLATES, class_name
from system.paths import split_revision
from system.tensor_files import write_tensors
from system.text_files import read_yaml
from tokens.class_token import ClassToken, load_token, save_token
from utils import join_lines, require, to_printable, write_text

SHOWN = 5  # pictures per row of a class's sheet
UNPUBLISHED = {"class_index", "output_path", "real_images", "device", "skip_exists", "train", "evaluate"}  # settings
TITLE = "# Discriminative class tokens"  # of a card
TAGS = ["textual_inversion", "text-to-image", "diffusers", "stable-diffusion"]


class ExportedClass(NamedTuple):
    """A class's token, the name of its files, which is its word in prompts, and with a card its metrics.json."""

    name: str
    files: RunFiles
    token: ClassToken
    metrics: dict | None


def export_classes(paths: list[Path], out: Path, card: bool) -> list[str]:
    """Write the token of every run folder into `out`, with a model card if asked for; all of it or nothing.

    Returns the tokens' names. With a card, paths in the files' headers lose the folders that they lead through.

    Raises:
        UserError: a folder that is no run's, without a token or the card's evaluation, or two tokens of one name.
    """
    classes = load_classes(check_exported(paths, out, card), card)
    check_targets(out, classes, card)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
        for found in classes:
            write_class(found, Path(folder), card)
        if card:
            write_text(Path(folder, "README.md"), write_card(classes))
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            target = out / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    return [found.name for found in classes]


def check_targets(out: Path, classes: list[ExportedClass], card: bool):
    """Raise UserError where `out` holds what is not to be replaced, or a gallery that would not show all its tokens."""
    names, page = {found.name for found in classes}, out / "README.md"
    for name in names:
        require(not (out / f"{name}.safetensors").is_dir() and not (card and (out / name).is_file()),
                f"'{out / name}' is in the way: remove it, or take another folder")
    require(not (card and page.exists()) or TITLE in page.read_text(encoding="utf-8", errors="replace"),
            f"'{page}' is not a card of ours: take another folder")
    others = {path.stem for path in out.glob("*.safetensors")} - names if card else ()
    require(not others, f"'{out}' holds other tokens too ({', '.join(sorted(others))[:100]}): export all of them at "
                        "once, or take another folder")


def load_classes(runs: list[RunFiles], card: bool) -> list[ExportedClass]:
    """What is to be exported, once no two tokens have one name."""
    classes = {}
    for files in runs:
        token = load_token(files.token_file)
        name = name_token(token.placeholder, files.images.parent.name)
        same = classes.get(name.lower())  # some disks take both for one
        require(not same, f"'{same and same.files.images}' and '{files.images}' would both be {name}.safetensors: "
                "export one of them, or each to its own folder")
        classes[name.lower()] = ExportedClass(name, files, token, load_metrics(files.metrics_file) if card else None)
    return list(classes.values())


def name_token(placeholder: str, class_folder: str) -> str:
    """'newclas-0283_tiger_cat': 'crane' alone would replace that word in every prompt of A1111."""
    parts = (re.sub(r"[^A-Za-z0-9_-]+", "", part)[:100].strip("-") for part in (placeholder, class_folder))
    return "-".join(filter(None, parts))


def write_class(found: ExportedClass, folder: Path, card: bool):
    """Write <name>.safetensors, and for a card <name>/learned_embeds.safetensors and <name>/pictures.png."""
    token, path = found.token, folder / f"{found.name}.safetensors"
    header = {key: hide_folders(value) if card else value for key, value in token.header.items()}
    if len(token.widths) > 1:
        save_token(path, token.placeholder, token.vectors, token.widths, header)
    else:
        write_tensors(path, {"emb_params": token.vectors}, {**header, "format": "pt", "placeholder": token.placeholder})
    if card:
        save_token(folder / found.name / "learned_embeds.safetensors", token.placeholder, token.vectors, token.widths,
                   header)
        rows = [(label, files[:SHOWN]) for label, files in list_shown(found.files, found.metrics).items()
                if label != "real"]  # they may be others' property
        draw_sheet(rows, folder / found.name / "pictures.png", cell=160)


def write_card(classes: list[ExportedClass]) -> str:
    """The model card: what to type, figures and settings, every word from elsewhere escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
                              finalize=escape_text, keep_trailing_newline=True)
    environment.filters |= {"code": show_code, "json": lambda value: Markup(json.dumps(value, ensure_ascii=False))}
    described = [describe_class(found) for found in classes]
    models, settings = {}, {}
    for found in described:
        models.setdefault((found["base_model"], found["paired"]), []).append(found)
        settings.setdefault(found["settings"], []).append(found["name"])
    hub_ids = sorted({found["base_model"] for found in described if is_hub_id(found["base_model"])})
    head = {**({"base_model": hub_ids} if hub_ids else {}), "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": TAGS + ["stable-diffusion-xl"] * any(found["paired"] for found in described)}
    return environment.get_template("card.md").render(head=Markup(yaml.safe_dump(head, sort_keys=False)),
                                                      classes=described, models=models, settings=settings)


def describe_class(found: ExportedClass) -> dict:
    """What the card says of a class."""
    header, metrics = found.token.header, found.metrics
    noun = to_one_line(header.get("class_name") or class_name(metrics["label"]))
    guide = "classifier" if "imported_from" in header else "guiding classifier"
    judges = {role: metrics["settings"].get(role) or name for role, name in metrics["judges"].items()}
    word = f"<{found.name.lower()}>"  # diffusers finds only the first vector of a word with capitals
    return {"name": found.name, "noun": noun, "label": metrics["label"], "number": metrics["class_index"],
            "prompt": TEMPLATES[0].format(f"{word} {noun}"), "paired": len(found.token.widths) > 1,
            "base_model": describe_source(header.get("base_model") or metrics["settings"].get("model") or "unknown"),
            "drawn_with": describe_source(metrics["settings"].get("model") or ""),
            "vectors": len(found.token.vectors), "updates": header.get("updates"), "images": metrics["images"],
            "held_out": metrics["held_out"],
            "settings": describe_training(found.files),
            "judged": [(guide if role == "classifier" else role, describe_source(name),
                        *(pool_accuracy([metrics], arm, role) for arm in ARMS)) for role, name in judges.items()]}


def describe_training(files: RunFiles) -> str:
    """The settings of config.yml that a stranger can use, one per line; empty where the token came without it."""
    if not files.config_file.exists():
        return ""
    settings = read_yaml(str(files.config_file), "lr: 0.001")
    return "".join(f"{key}: {' '.join(map(hide_folders, [value] if isinstance(value, str) else value))}\n"
                   for key, value in settings.items() if key not in UNPUBLISHED)


def describe_source(name: str) -> str:
    """A checkpoint as a card's reader finds it: its hub id without the revision, or its folder's own name."""
    place, _ = split_revision(name)
    return hide_folders(REGISTRY.get(place, place))


def hide_folders(text: str) -> str:
    """Local paths without the folders that they lead through: 'mean:/home/me/vit' -> 'mean:vit'."""
    return re.sub(r"^((?:[\w-]+:)*)[~/.$].*/", r"\1", text.rstrip("/"))


def to_one_line(text: str) -> str:
    return join_lines(to_printable(text))


def escape_text(value) -> str:
    """Untrusted text on one line, its punctuation as entities: neither HTML nor Markdown; Markup stays as it is."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"[^\w\s,.()'-]|_", lambda match: f"&#{ord(match[0])};", to_one_line(str(value)))


def show_code(text: str) -> Markup:
    """Untrusted text as code, in a table too."""
    return Markup(f"<code>{escape_text(text)}</code>" if set("`|") & set(text) else f"`{to_one_line(text)}`")
