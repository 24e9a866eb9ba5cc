"""Small things every room needs: one-line errors, files that are never half written, images to and from disk."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from PIL import Image

ROOT = Path(__file__).parent
WITHOUT_GPU_OR_NETWORK = "or try --config configs/miniature.yml, which needs no download, no account and no GPU"


class UserError(Exception):
    """Something the user can mend; `run.py` prints it as one line and exits with code 2."""


def require(condition, message: str):
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def find_path(name: str) -> Path | None:
    """`name` as a path from here or from the repository, or None where neither exists (a hub id, say)."""
    return next((path for path in (Path(name).expanduser(), ROOT / name) if path.exists()), None)


@contextmanager
def opening(name: str):
    """Turn what goes wrong while a checkpoint is opened or downloaded into one line that says what to do.

    Raises:
        UserError: for a gated or missing repository, no network, a folder without the files, an unknown format.
    """
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        causes, cause = [], error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"cannot open '{name}': {_why(name, causes)}") from error


def _why(name: str, causes: list[BaseException]) -> str:
    def caused_by(*kinds):
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(GatedRepoError):
        return ("its owner asks for a login: accept its terms on huggingface.co, then run `hf auth login`; "
                + WITHOUT_GPU_OR_NETWORK)
    if find_path(name):
        return "the folder lacks a file or holds a broken one: " + _first_line(causes[0])
    if caused_by(RepositoryNotFoundError):
        return ("no such folder here and no such model on the hub; check the spelling, or run `hf auth login` where "
                "it is private; " + WITHOUT_GPU_OR_NETWORK)
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) or any(
            type(cause).__module__.split(".")[0] in ("httpx", "httpcore", "requests", "urllib3") for cause in causes):
        return ("it is not downloaded yet and the hub cannot be reached; connect once, or give a local folder; "
                + WITHOUT_GPU_OR_NETWORK)
    return _first_line(causes[0]) + "; " + WITHOUT_GPU_OR_NETWORK


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


@contextmanager
def replacing(path: Path):
    """Yield a temporary path beside `path` that takes its place at the end: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_images(images: torch.Tensor, paths: list[Path]):
    """Write images [B, 3, H, W] in [0, 1] as 8-bit PNG files, rounded to the nearest level."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for array, path in zip(pixels, paths, strict=True):
        with replacing(path) as temporary:
            Image.fromarray(array).save(temporary, format="PNG")


def load_images(paths: list[Path]) -> torch.Tensor:
    """Read RGB images of one size as float [B, 3, H, W] in [0, 1]."""
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
