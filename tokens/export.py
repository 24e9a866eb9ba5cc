"""Tokens as other tools read them, alone or with a model card for the Hugging Face Hub."""

import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from evaluation.files import RunFiles, check_exported
from evaluation.metrics import ClassMetrics, load_metrics
from evaluation.report import list_shown
from evaluation.sheets import draw_sheet
from system.tensor_files import write_tensors
from tokens.class_token import ClassToken, load_token, save_token
from tokens.model_card import TITLE, CardEntry, hide_folders, write_card
from utils import require, write_text

SHOWN = 5  # pictures per row of a class's sheet


class ExportedClass(NamedTuple):
    """A class's token and the name of its files, which is its word in prompts."""

    name: str
    files: RunFiles
    token: ClassToken
    metrics: ClassMetrics | None  # with a card


def export_classes(paths: list[Path], out: Path, card: bool) -> list[str]:
    """Write the token of every run folder into `out`, with a model card if asked for.

    All of it or nothing. With a card, paths in the files' headers lose the folders that they lead
    through. Returns the tokens' names.

    Raises:
        UserError: a folder that is no run's, without a token or the card's evaluation, or two
            tokens of one name.
    """
    classes = load_classes(check_exported(paths, out, card), card)
    check_targets(out, classes, card)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as temporary:
        folder = Path(temporary)
        for found in classes:
            write_token(found.name, found.token, folder, card)
            if card:
                write_card_files(found, folder)
        if card:
            entries = [
                CardEntry(found.name, found.files, found.token, found.metrics) for found in classes
            ]
            write_text(folder / "README.md", write_card(entries))
        written = [path for path in folder.rglob("*") if path.is_file()]
        for file in sorted(written):
            target = out / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    return [found.name for found in classes]


def check_targets(out: Path, classes: list[ExportedClass], card: bool):
    """Raise UserError if `out` holds what must not be replaced.

    Or if a card would not show all its tokens.
    """
    names = {found.name for found in classes}
    for name in names:
        is_in_the_way = (out / f"{name}.safetensors").is_dir()
        if card and (out / name).is_file():
            is_in_the_way = True
        require(
            not is_in_the_way,
            f"'{out / name}' is in the way: remove it, or use another folder",
        )
    if not card:
        return
    page = out / "README.md"
    if page.exists():
        text = page.read_text(encoding="utf-8", errors="replace")
        require(
            TITLE in text,
            f"'{page}' is not a model card written by this program: use another folder",
        )
    others = {path.stem for path in out.glob("*.safetensors")} - names
    listed = ", ".join(sorted(others))[:100]
    require(
        not others,
        f"'{out}' holds other tokens too ({listed}): export all of them at once, or use another "
        "folder",
    )


def load_classes(runs: list[RunFiles], card: bool) -> list[ExportedClass]:
    """Load what is to be exported, if no two tokens have the same name."""
    classes: dict[str, ExportedClass] = {}
    for files in runs:
        token = load_token(files.token_file)
        name = name_token(token.placeholder, files.images.parent.name)
        same = classes.get(name.lower())  # some disks take both for one
        if same:
            require(
                False,
                f"'{same.files.images}' and '{files.images}' would both be {name}.safetensors: "
                "export one of them, or each to its own folder",
            )
        metrics = load_metrics(files.metrics_file) if card else None
        classes[name.lower()] = ExportedClass(name, files, token, metrics)
    return list(classes.values())


def name_token(placeholder: str, class_folder: str) -> str:
    """Return 'newclas-0283_tiger_cat': 'crane' alone would replace that word in A1111's prompts."""
    parts = []
    for part in (placeholder, class_folder):
        plain = re.sub(r"[^A-Za-z0-9_-]+", "", part)[:100].strip("-")
        if plain:
            parts.append(plain)
    return "-".join(parts)


def write_token(name: str, token: ClassToken, folder: Path, hide_paths: bool = False) -> Path:
    """Write folder/<name>.safetensors, as other tools read it."""
    file = folder / f"{name}.safetensors"
    header = clean_header(token) if hide_paths else token.header
    if len(token.widths) > 1:
        save_token(file, token.placeholder, token.vectors, token.widths, header)
    else:
        words = {**header, "format": "pt", "placeholder": token.placeholder}
        write_tensors(file, {"emb_params": token.vectors}, words)
    return file


def clean_header(token: ClassToken) -> dict[str, str]:
    """Return a token file's header without the folders in paths."""
    return {key: hide_folders(value) for key, value in token.header.items()}


def write_card_files(found: ExportedClass, folder: Path):
    """Write <name>/learned_embeds.safetensors for diffusers, and <name>/pictures.png."""
    token, home = found.token, folder / found.name
    file = home / "learned_embeds.safetensors"
    save_token(file, token.placeholder, token.vectors, token.widths, clean_header(token))
    rows = []
    for label, files in list_shown(found.files, found.metrics).items():
        if label != "real":  # they may be others' property
            rows.append((label, files[:SHOWN]))
    draw_sheet(rows, home / "pictures.png", cell=160)
