"""What the folders of a class hold: a token of these settings or of others, one that is half trained, or none."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
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
from utils import UserError, printable, read_yaml_mapping, require, same_source, write_json, write_tensors, write_text

VECTORS_FILE = "vectors.safetensors"
COST_FILE = "cost.json"
Folders = dict[int, tuple[Path, Path]]  # of every class of a run: its token's and its images'
HOLDER = 128  # bytes of a lock file for each class, in which its holder leaves its name


def output_folders(config: RunConfig, index: int, name: str) -> tuple[Path, Path]:
    """Where class `index` (from 0) keeps its token and its images: pipeline_token/... and img/..."""
    parts = folder_name(config.classifier), class_folder(index, name), config.exp_id
    return tuple(Path(config.output_path, kind, *parts) for kind in ("pipeline_token", "img"))


def say(title: str, text: str):
    """A line about a class: several may speak in turn, also from several processes."""
    tqdm.write(f"class {title}: {text}")
    sys.stdout.flush()


def unfinished(config: RunConfig, folders: Folders) -> Path:
    """The file that says that a run over these classes has begun and not ended well."""
    digest = hashlib.sha256(json.dumps(list(folders)).encode()).hexdigest()[:8]
    return Path(config.output_path, "img", folder_name(config.classifier), f".{config.exp_id}.{digest}.unfinished")


def is_trained(config: RunConfig, tokens: Path, goes_on: bool = False) -> bool:
    """Whether a class has its token already: with --skip_exists any, else one of this very run, where it `goes_on`.

    Raises:
        UserError: with --skip_exists: it has one of other settings, or half of one, which is another run.
    """
    trained, begun = (tokens / TOKEN_FILE).exists(), (tokens / STATE_FILE).exists()
    others = other_settings(config, tokens, DECISIVE) if trained or begun else []
    if not config.skip_exists:
        return goes_on and trained and begun and not others
    what = "token" if trained else "half-trained token"
    require(not others, f"the {what} in '{tokens}' was trained with {'; '.join(others)}: another setting is another "
                        "run, so give a new --exp_id, or --skip_exists False to train it anew")
    return trained


def begin(config: RunConfig, folders: Folders):
    """A run over classes that this process holds begins, or goes on: what a killed one was just writing goes."""
    clear_up(list(folders.values()))
    if config.train and not unfinished(config, folders).exists():
        for tokens, _ in folders.values():
            if (tokens / TOKEN_FILE).exists():  # or this state, of a run that had ended, would be taken for our own
                (tokens / STATE_FILE).unlink(missing_ok=True)
        write_text(unfinished(config, folders), "")


def end(config: RunConfig, folders: Folders):
    """All is well: from here on the same command begins anew."""
    unfinished(config, folders).unlink(missing_ok=True)
    for tokens, _ in folders.values():
        (tokens / STATE_FILE).unlink(missing_ok=True)


@contextmanager
def holding(config: RunConfig, classes: list[int], create: bool = True) -> Iterator[None]:
    """Keep other runs from writing the same classes meanwhile; the system lets go when this process ends, however.

    Without `create` no file is made: where there is none, nobody holds a class.

    Raises:
        UserError: another run holds one of the classes.
    """
    path = Path(config.output_path, "img", folder_name(config.classifier), f".{config.exp_id}.lock")
    if not create and not path.exists():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0) as file:
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
        for half in folder.rglob(".*.tmp"):
            half.unlink()
    for half in folders[0][1].parent.parent.glob(".*.tmp"):  # of a summary or report, which other runs write too
        writer = re.fullmatch(r"\..*\.(\d{1,9})\.\d+\.tmp", half.name)
        if writer and not is_alive(int(writer[1])):
            half.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this number is running here."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def other_settings(config: RunConfig, tokens: Path, which: tuple[str, ...]) -> list[str]:
    """What of `which` differs between the training that left config.yml in `tokens` and now, in words."""
    if not (tokens / "config.yml").exists():
        return []
    now, remedy = as_typed(config), f"remove '{tokens}' to have the class trained anew"
    try:
        before = read_yaml_mapping(str(tokens / "config.yml"), "lr: 0.001")
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    require(all(isinstance(before.get(name), str) for name in ("model", "classifier", "lr")),
            f"'{tokens}/config.yml' does not hold the settings of a run; {remedy}")
    return [f"{name} {before[name]}, now {now[name]}" for name in which if before.get(name, now[name]) != now[name]
            and not (name in ("model", "classifier") and same_source(before[name], now[name]))]


def prepare(config: RunConfig, job: Job) -> Job:
    """Clear a class's folders for its training, but for one that was stopped half-way with the same settings."""
    token, state, settings = (job.tokens / name for name in (TOKEN_FILE, STATE_FILE, "config.yml"))
    if state.exists() and settings.exists() and not token.exists() and not other_settings(config, job.tokens, DECISIVE):
        say(job.title, "goes on where its training stopped")
        return job
    others = other_settings(config, job.tokens, DECISIVE) if token.exists() else []
    new = job.tokens.with_name(f".{job.tokens.name}.new")  # while there is no room for it nothing is removed
    write_text(new / "config.yml", to_yaml(replace(config, class_index=str(job.class_index + 1), skip_exists=False)))
    for old in (token, state):  # first, so that a kill in the midst of this leaves nothing that seems whole
        old.unlink(missing_ok=True)
    for old in (job.images / "train", job.tokens):  # a shorter run must not be mixed with what a longer one left
        if old.exists():
            shutil.rmtree(old)
    forget(job.images)
    new.rename(job.tokens)
    say(job.title, "begins its training" + f", in place of a token trained with {'; '.join(others)}" * bool(others))
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
    if config.skip_exists:  # the token alone says that this class is done
        (job.tokens / STATE_FILE).unlink(missing_ok=True)
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
    seed = header.get("seed", str(config.test_size))
    require(re.fullmatch("[0-9]{1,12}", seed), f"'{token_file}' names {seed[:20]!r} as the seed of its training: it is "
                                               "not ours")
    require(not config.evaluate or int(seed) >= config.test_size,
            f"'{token_file}' was trained on seeds from {header.get('seed')} on, which {config.test_size} evaluation "
            f"images would use too: give --test_size {header.get('seed')} or less")


def warn_of_other_settings(config: RunConfig, tokens: Path):
    """Say where the pictures are not drawn as those were that the token learned from."""
    others = other_settings(config, tokens, ("model", "guidance_scale", "height", "width"))
    if others:
        print(printable(f"warning: the token was trained with {'; '.join(others)}"), file=sys.stderr)
