"""Small things every room needs: one-line errors, files that are never half written, images to and from disk."""

import importlib
import json
import logging
import os
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import yaml
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from PIL import Image

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or transformers asks owners of .bin files to convert

ROOT = Path(__file__).parent
WITHOUT_GRAPH = 4  # times as many images fit into memory where no graph is kept
PENDING = 8  # batches of pictures that may wait to be written
CHECKPOINT_KINDS = {".safetensors", ".bin", ".json", ".txt"}
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


def same_source(name: str, other: str) -> bool:
    """Whether two names are of one checkpoint: the same hub id, or two paths of one folder."""
    paths = [find_path(each) for each in (name, other)]
    return name == other or all(paths) and paths[0].resolve() == paths[1].resolve()


def read_yaml_mapping(path: str, example: str) -> dict[str, str | list[str]]:
    """A YAML file of 'key: value' lines, every scalar as it was typed (`no` stays 'no', 1e-3 stays '1e-3').

    Raises:
        UserError: no such file, not YAML, or not a mapping; `example` shows a right line.
    """
    found = find_path(path)
    require(found and found.is_file(), f"no file '{path}'")
    try:
        values = yaml.load(found.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    require(isinstance(values, dict), f"'{path}' must hold lines such as '{example}'")
    return values


def imported(reference: str, setting: str):
    """The function that 'module:function' names.

    Raises:
        UserError: no such module or function; `setting` is the flag that named it.
    """
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module or "None"), name, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{setting}: no module '{error.name}' for '{reference}'") from error
    require(callable(function), f"{setting}: module '{module}' has no function '{name}'; it is written module:function")
    return function


def files_of(source: str) -> dict[str, list[int]]:
    """Size and time of change of a local checkpoint's files: another one there, or another scheduler, is told apart."""
    folder = find_path(source)
    files = sorted(path for path in folder.rglob("*") if path.suffix in CHECKPOINT_KINDS) if folder else []
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


@contextmanager
def opening(name: str, source: str | None = None, instead: str = WITHOUT_GPU_OR_NETWORK):
    """Turn whatever goes wrong while a checkpoint is opened or downloaded into one line that says what to do.

    `source` is the folder or hub id that `name` stands for, `instead` what to do without it; library chatter below a
    critical error is held back.

    Raises:
        UserError: a gated, private or missing repository, no network, a folder with missing or broken files.
    """
    logging.disable(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds, some straight from Exception
        causes, cause = [], error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        source = source or name
        called = f"'{name}'" if source in (name, str(find_path(name))) else f"'{name}' ({source})"
        raise UserError(f"cannot open {called}: {_why(source, causes, instead)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _why(source: str, causes: list[BaseException], instead: str) -> str:
    def caused_by(*kinds):
        return any(isinstance(cause, kinds) for cause in causes)

    answers = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]
    # the hub's HTTP library has changed its name before; its connection errors have not
    unreachable = any(kind.__name__ == "TransportError" for cause in causes for kind in type(cause).__mro__)
    if find_path(source):
        return "the folder lacks a file or holds a broken one: " + _first_line(causes[0])
    if caused_by(GatedRepoError):
        return (f"its owner asks for a login: accept the terms at huggingface.co/{source}, then run `hf auth login`; "
                + instead)
    if caused_by(HFValidationError):
        return "no such folder, and no hub id either (the miniature's weights come from `make miniature`)"
    if caused_by(RepositoryNotFoundError):
        return ("no such folder here and no such model on the hub; check the spelling, or run `hf auth login` where "
                "it is private; " + instead)
    if set(answers) & {401, 403}:
        return ("the hub refuses your access: run `hf auth login` with a token that may read gated repositories; "
                + instead)
    if answers:
        return f"the hub answered with status {answers[0]}; try again later, {instead}"
    if unreachable or caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, URLError):
        return ("it is not downloaded yet and the hub cannot be reached; connect once, or give the path of a copy; "
                + instead)
    return (f"{_first_line(causes[0])} (half downloaded, perhaps, and the hub cannot be reached); "
            + instead)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


@contextmanager
def replacing(path: Path):
    """Yield a temporary path beside `path` that takes its place at the end: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")  # two may write one file
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes files that their owner alone may read
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
    save_pixels(pixels_of(images), paths)


def pixels_of(images: torch.Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3]; made where the images are, so that a quarter of the bytes leaves a GPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_pixels(pixels: np.ndarray, paths: list[Path]):
    for array, path in zip(pixels, paths, strict=True):
        with replacing(path) as temporary:
            Image.fromarray(array).save(temporary, format="PNG")


def load_images(paths: list[Path]) -> torch.Tensor:
    """Read RGB images of one size as float [B, 3, H, W] in [0, 1]."""
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
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


def first_batch(images: int, device: str, height: int, width: int) -> int:
    """How many images to try at once: `images` on a GPU, and elsewhere as many of the miniature's 64 x 64 pixels.

    Where memory is the system's own nothing is raised when it is short: the process is killed.
    """
    return images if device.startswith("cuda") else max(1, images * 64 * 64 // (height * width))


def fitting(function, batch_size: int | None, start: int):
    """`function` with its first argument, the batch size, filled in.

    `batch_size` where it is given; else `start`, and half of it again and again while memory does not suffice,
    remembered from call to call. (accelerate's own find_executable_batch_size collects garbage before every call,
    which takes half as long as an update of the miniature.)

    Raises:
        UserError: not even one image fits, or not the `batch_size` that was given.
    """
    size = batch_size or start

    def call(*arguments):
        nonlocal size
        while True:
            try:
                return function(size, *arguments)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                require(size > 1, "memory does not suffice for one image at a time: try --gradient_checkpointing True, "
                                  "--mixed_precision fp16 or bf16, fewer --classes_at_once, or smaller images")
                require(not batch_size, f"memory does not suffice for {size} images at a time: give a smaller "
                                        "--batch_size, or none for as many as fit")
            size //= 2
            clear_device_cache(garbage_collection=True)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # the peak is that of what fits

    return call


def peak_memory(device: str) -> float:
    """Gigabytes that this process has used at most so far: of the GPU where it computes on one, else of memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
