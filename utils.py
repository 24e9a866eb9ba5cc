"""Small things every room needs: one-line errors, files that are never half written, images to and from disk."""

import difflib
import errno
import importlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or transformers asks owners of .bin files to convert

ROOT = Path(__file__).parent
PENDING = 8  # batches of pictures that may wait to be written
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGEST_TEXT = 2**20  # bytes of a YAML file or a list of prompts: what is larger is another kind of file
CHECKPOINT_KINDS = {".safetensors", ".bin", ".json", ".txt"}
WITHOUT_GPU_OR_NETWORK = "or try --config configs/miniature.yml, which needs no download, no account and no GPU"


class UserError(Exception):
    """Something the user can mend; `run.py` prints it as one line and exits with code 2."""


def require(condition, message: str):
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question where `word` is nearly one of the `known`, else nothing."""
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean '{close[0]}'?" if close else ""


def printable(text: str) -> str:
    """A stranger's words without what moves a terminal's cursor or ends a line."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def find_path(name: str) -> Path | None:
    """`name` as a path from here or from the repository, or None where neither exists (a hub id, say)."""
    for path in (Path(os.path.expanduser(name)), ROOT / name):
        with suppress(OSError, ValueError):  # too long, or a NUL in it: no path
            if path.exists():
                return path
    return None


def same_source(name: str, other: str) -> bool:
    """Whether two names are of one checkpoint: the same hub id, or two paths of one folder."""
    paths = [find_path(each) for each in (name, other)]
    return name == other or all(paths) and paths[0].resolve() == paths[1].resolve()


def read_text(path: str) -> str:
    """A small text file that a person wrote.

    Raises:
        UserError: no such file, larger than LARGEST_TEXT, or not UTF-8.
    """
    found = find_path(path)
    require(found and found.is_file(), f"no file '{path}'")
    require(found.stat().st_size <= LARGEST_TEXT, f"'{path}' has {found.stat().st_size} bytes: that is no text file of "
                                                  "settings, names or prompts")
    try:
        return found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not a text file in UTF-8") from error


class WordsLoader(yaml.BaseLoader):
    """Makes strings, lists and mappings alone; a key that is there twice is an error."""

    def construct_mapping(self, node, deep=False):
        counts = Counter(str(key.value) for key, _ in node.value)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml_mapping(path: str, example: str) -> dict[str, str | list[str]]:
    """A YAML file of 'key: value' lines, every scalar as it was typed (`no` stays 'no', 1e-3 stays '1e-3').

    Raises:
        UserError: no such file, not YAML, or not a mapping of words to words or plain lists; `example` is a right line.
    """
    try:
        values = yaml.load(read_text(path), Loader=WordsLoader) or {}  # nosec B506  # it makes strings alone
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    require(isinstance(values, dict), f"'{path}' must hold lines such as '{example}'")
    for key, value in values.items():
        parts = value if isinstance(value, list) else [value]
        require(isinstance(key, str) and all(isinstance(part, str) for part in parts),
                f"'{path}': '{key}' must have one value or a plain list, as in '{example}'")
    return values


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object that we wrote, which has these `keys`.

    Raises:
        UserError: not whole, or not ours.
    """
    value, = parsed(path, lambda text: [text], keys)
    return value


def read_json_lines(path: Path, *keys: str) -> list[dict]:
    """The JSON objects of a file that we wrote, one a line, which have these `keys`.

    Raises:
        UserError: not whole, or not ours.
    """
    return parsed(path, str.splitlines, keys)


def parsed(path: Path, parts: Callable[[str], list[str]], keys: tuple[str, ...]) -> list[dict]:
    """The JSON objects, all with these `keys`, of a file whose text `parts` takes apart."""
    try:
        values = [json.loads(part) for part in parts(path.read_text(encoding="utf-8"))]
    except (ValueError, RecursionError) as error:
        raise UserError(broken(path, error)) from error
    require(all(isinstance(value, dict) for value in values), broken(path, "no JSON object"))
    lacking = [key for value in values for key in keys if key not in value]
    require(not lacking, broken(path, f"without {lacking[:1]}"))
    return values


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file that we wrote, and its header.

    Raises:
        UserError: not whole, or not ours.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(broken(path, error)) from error


def broken(path: Path, why) -> str:
    """What to do about a file of ours that cannot be read."""
    return f"'{path}' is broken ({' '.join(str(why).split())}): remove it and give the same command again"


def imported(reference: str, setting: str):
    """The function that 'module:function' names.

    Raises:
        UserError: no such module or function; `setting` is the flag that named it.
    """
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{setting}: no module '{error.name}' for '{reference}'") from error
    require(callable(function), f"{setting} '{reference}': module '{module}' has no function '{name}'; it is written "
                                "module:function")
    return function


def files_of(source: str) -> dict[str, list[int]]:
    """Size and time of change of a local checkpoint's files: another one there, or another scheduler, is told apart."""
    folder = find_path(source)
    files = sorted(path for path in folder.rglob("*") if path.suffix in CHECKPOINT_KINDS) if folder else []
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


@contextmanager
def replacing(path: Path):
    """Yield a temporary path beside `path` that takes its place at the end: a reader never sees half a file.

    Raises:
        OSError: naming `path`: the disk is full, the folder read-only; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")  # two may write one file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def said(error: UserError | OSError) -> str:
    """One line for a person: what we say ourselves, or what the system says of a file."""
    if isinstance(error, UserError) or error.filename is None:
        return printable(str(error))
    full = "; make room: what is on the disk is whole, and the same command goes on with it"
    return printable(f"'{error.filename}': {error.strerror}{full if error.errno in NO_SPACE else ''}")


def write_text(path: Path, text: str):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """Write a safetensors file, the same bytes for the same content: the library's own header is in random order."""
    data = safetensors.torch.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors start at a multiple of eight
    with replacing(path) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_images(images: torch.Tensor, paths: list[Path]):
    """Write images [B, 3, H, W] in [0, 1] as 8-bit PNG files, rounded to the nearest level."""
    save_pixels(pixels_of(images), paths)


def pixels_of(images: torch.Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3]; made where the images are, so that a quarter of the bytes leaves a GPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_pixels(pixels: np.ndarray, paths: list[Path]):
    for array, path in zip(pixels, paths, strict=True):
        with replacing(path) as temporary:
            Image.fromarray(array).save(temporary, format="PNG")


def read_image(path: Path) -> Image.Image:
    """A picture that we drew, as RGB.

    Raises:
        UserError: no picture, or half of one.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(broken(path, error)) from error


def load_images(paths: list[Path]) -> torch.Tensor:
    """Read RGB images of one size as float [B, 3, H, W] in [0, 1].

    Raises:
        UserError: one that is broken, or of another size than the first.
    """
    arrays = [np.asarray(read_image(path)) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        require(array.shape == arrays[0].shape, broken(path, f"another size than {paths[0]}"))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


class ImageWriter(ThreadPoolExecutor):
    """Writes pictures in the background; what goes wrong there is raised by `wait`, or at the end."""

    def __init__(self):
        super().__init__(max_workers=4)
        self.pending = []

    def write(self, images: torch.Tensor, paths: list[Path]):
        if len(self.pending) == PENDING:
            self.wait()
        self.pending.append(self.submit(save_pixels, pixels_of(images), paths))

    def wait(self):
        """Until all that was given is on the disk."""
        for job in self.pending:
            job.result()
        self.pending = []

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if error is None:
            self.wait()
