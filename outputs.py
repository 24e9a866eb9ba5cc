"""What the folders of a class hold: a token of these settings or of others, one that is half trained, or none."""

import errno
import fcntl
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from tqdm import tqdm

import class_token
from class_token import TOKEN_FILE
from classifiers import folder_name
from config import DECISIVE, RunConfig, as_typed, to_yaml
from evaluation import forget, frames_of
from learner import STATE_FILE, Job, Trained
from memory import peak_memory
from prompt_datasets import class_folder
from utils import UserError, read_yaml_mapping, require, same_source, write_json, write_tensors, write_text

VECTORS_FILE = "vectors.safetensors"
COST_FILE = "cost.json"
HOLDER = 128  # bytes of a lock file for each class, in which its holder leaves its name


def output_folders(config: RunConfig, index: int, name: str) -> tuple[Path, Path]:
    """Where class `index` (from 0) keeps its token and its images: pipeline_token/... and img/..."""
    parts = folder_name(config.classifier), class_folder(index, name), config.exp_id
    return tuple(Path(config.output_path, kind, *parts) for kind in ("pipeline_token", "img"))


def say(title: str, text: str):
    """A line about a class: several may speak in turn, also from several processes."""
    tqdm.write(f"class {title}: {text}")
    sys.stdout.flush()


def is_trained(config: RunConfig, tokens: Path) -> bool:
    """Whether a class has its token already: with --skip_exists any, else one of this very run, stopped half-way.

    Raises:
        UserError: with --skip_exists: it has one of other settings, or half of one, which is another run.
    """
    trained, begun = (tokens / TOKEN_FILE).exists(), (tokens / STATE_FILE).exists()
    others = other_settings(config, tokens, DECISIVE) if trained or begun else []
    if not config.skip_exists:
        return trained and begun and not others
    what = "token" if trained else "half-trained token"
    require(not others, f"the {what} in '{tokens}' was trained with {'; '.join(others)}: another setting is another "
                        "run, so give a new --exp_id, or --skip_exists False to train it anew")
    return trained


def ended(folders: list[tuple[Path, Path]]):
    """All is well with the classes of these folders: the same command begins anew from here on."""
    for tokens, _ in folders:
        (tokens / STATE_FILE).unlink(missing_ok=True)


@contextmanager
def holding(config: RunConfig, classes: list[int], create: bool = True) -> Iterator[None]:
    """Keep other runs from writing the same classes meanwhile; the system lets go when this process ends, however.

    Without `create` it only sees whether another run holds one, and writes nothing.

    Raises:
        UserError: another run holds one of the classes.
    """
    path = Path(config.output_path, "img", folder_name(config.classifier), f".{config.exp_id}.lock")
    if not create and not path.exists():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
        for index in classes:
            take(file, index, path)
        yield


def take(file, index: int, path: Path):
    """Lock the record of class `index` in a lock file, and leave our name there."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, HOLDER, index * HOLDER)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.pread(file.fileno(), HOLDER, index * HOLDER).decode(errors="replace").strip("\0 \n")
            raise UserError(f"class {index + 1} of run '{path.stem[1:]}' is being written by "
                            f"{holder or 'another run'}: wait for it, or give another --exp_id") from error
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return  # a file system without locks
    name = f"process {os.getpid()} on {socket.gethostname()[:60]}"
    os.pwrite(file.fileno(), name.encode().ljust(HOLDER), index * HOLDER)


def clear_up(folders: list[tuple[Path, Path]]):
    """Remove what a killed run was just writing, in the folders of classes that this process holds and above them."""
    for folder in (each for pair in folders for each in pair):
        for unfinished in folder.rglob(".*.tmp"):
            unfinished.unlink()
    for _, images in folders[:1]:
        for unfinished in images.parent.parent.glob(".*.tmp"):  # of a summary or report, which other runs write too
            if not is_alive(int(unfinished.name.split(".")[-3])):
                unfinished.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this number is running here."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def other_settings(config: RunConfig, tokens: Path, which: tuple[str, ...]) -> list[str]:
    """What of `which` differs between the training that left config.yml in `tokens` and now, in words."""
    if not (tokens / "config.yml").exists():
        return []
    before, now = read_yaml_mapping(str(tokens / "config.yml"), "lr: 0.001"), as_typed(config)
    return [f"{name} {before[name]}, now {now[name]}" for name in which if before.get(name, now[name]) != now[name]
            and not (name in ("model", "classifier") and same_source(before[name], now[name]))]


def prepare(config: RunConfig, job: Job) -> Job:
    """Clear a class's folders for its training, but for one that was stopped half-way with the same settings."""
    token, state, settings = (job.tokens / name for name in (TOKEN_FILE, STATE_FILE, "config.yml"))
    if state.exists() and settings.exists() and not token.exists() and not other_settings(config, job.tokens, DECISIVE):
        say(job.title, "goes on where its training stopped")
        return job
    for old in (token, state):  # first, so that a kill in the midst of this leaves nothing that seems whole
        old.unlink(missing_ok=True)
    for old in (job.images / "train", job.tokens):  # a shorter run must not be mixed with what a longer one left
        if old.exists():
            shutil.rmtree(old)
    forget(job.images)
    write_text(job.tokens / "config.yml",
               to_yaml(replace(config, class_index=str(job.class_index + 1), skip_exists=False)))
    say(job.title, "begins its training")
    return job


def save(config: RunConfig, job: Job, trained: Trained):
    """Write a token with its settings and versions, last of all; the training's state stays until the run has ended."""
    if config.fresh_noise:  # no seed comes back: the film over the updates has to be drawn
        write_tensors(job.images / "train" / VECTORS_FILE, frames_of(trained.vectors))
    memory = peak_memory(config.device)
    write_json(job.tokens / COST_FILE, {"updates": len(trained.vectors), "seconds": round(trained.seconds, 1),
                                        "peak_memory_gb": round(memory, 2)})
    token = job.tokens / TOKEN_FILE
    class_token.save(token, config.placeholder_token, trained.vector, {
        "class_index": job.class_index + 1, "class_name": job.class_name, "label": job.label,
        "classifier": config.classifier, "base_model": config.model, "seed": config.seed,
        "updates": len(trained.vectors), "loss": f"{trained.loss:.4f}", "train_accuracy": f"{trained.accuracy:.4f}",
        "stopped": trained.stopped, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "python": platform.python_version()})
    share = " (its share)" if config.classes_at_once > 1 else ""
    say(job.title, f"{len(trained.vectors)} updates in {trained.seconds:.0f} s{share}, stopped: {trained.stopped}; "
                   f"peak memory of this process so far: {memory:.1f} GB")
    say(job.title, f"token: {token}")


def check_token(config: RunConfig, token_file: Path):
    """A token that was trained before must be there, of this classifier, and not have seen the evaluation's seeds."""
    _, _, header = class_token.load(token_file)
    guide = header.get("classifier", config.classifier)
    require(same_source(guide, config.classifier), f"'{token_file}' was trained with the classifier '{guide}', not "
                                                   f"'{config.classifier}': give it or another --exp_id")
    require(not config.evaluate or int(header.get("seed", config.test_size)) >= config.test_size,
            f"'{token_file}' was trained on seeds from {header.get('seed')} on, which {config.test_size} evaluation "
            f"images would use too: give --test_size {header.get('seed')} or less")


def warn_of_other_settings(config: RunConfig, tokens: Path):
    """Say where the pictures are not drawn as those were that the token learned from."""
    others = other_settings(config, tokens, ("model", "guidance_scale", "height", "width"))
    if others:
        print(f"warning: the token was trained with {'; '.join(others)}", file=sys.stderr)
