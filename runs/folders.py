"""A class's files: who holds them, what is finished, how they are begun and removed."""

import platform
import re
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from filelock import FileLock

from evaluation.drawing import RECORD, choose_frames
from evaluation.files import RunFiles
from method.class_training import TrainedToken, finite_or_none
from models.batch_size import peak_memory_gb
from models.labels import folder_name, read_labels
from prompt_datasets import TargetClass
from runs.locks import describe_silence, find_patience, try_lock
from system.paths import is_same_source, split_revision
from system.tensor_files import write_tensors
from system.text_files import read_yaml, to_words
from tokens.class_token import ClassToken, load_token, names_file, save_token
from utils import UserError, require, write_json, write_text, write_yaml

SOURCES = ("model", "classifier", "class_names", "initializer_token")  # may be paths
OF_EVERY_RUN = ("model", "classifier", "lr", "skip_exists")  # settings that config.yml must have
MOST_SEED = 2**32 - 1


class RunFolder(RunFiles):
    """A class under one exp_id: its files, its lock, and what of it is done."""

    def __init__(
        self,
        output_path: str,
        classifier: str,
        target: TargetClass,
        exp_id: str,
        defaults: dict | None = None,
    ):
        """`defaults` are those of settings that an older config.yml does not have."""
        super().__init__(Path(output_path, "img", folder_name(classifier), target.folder, exp_id))
        self.target = target
        self.defaults = to_words(defaults or {})
        self.lock = FileLock(self.tokens.with_name(f".{exp_id}.lock"))

    def try_lock(self) -> bool:
        """Claim the class, unless another process holds it."""
        return try_lock(self.lock)

    def describe_silence(self) -> str:
        """Describe the class's lock if its holder seems dead; else an empty string."""
        files = [*self.tokens.rglob("*"), *self.images.rglob("*")]
        return describe_silence(Path(self.lock.lock_file), files, find_patience(self))

    def results_of_images(self) -> list[Path]:
        """List the results derived from evaluation pictures, which are wrong once these change."""
        return [
            self.metrics_file,
            self.grid_file,
            self.report_file,
            self.summary_file,
            self.summary_report,
        ]

    def last_change(self) -> tuple:
        """Return a stamp that changes when a process trains, evaluates or fails the class.

        Not to be compared with a clock.
        """
        times = []
        for file in (self.token_file, self.metrics_file, self.error_file):
            times.append(file.stat().st_mtime_ns if file.exists() else None)
        return tuple(times)

    def changed_settings(self, settings: dict, names: list[str]) -> list[str]:
        """List, in words, which of `names` differ between config.yml and `settings`."""
        if not self.config_file.exists():
            return []
        now = to_words(settings)
        before = {**now, **self.defaults, **self.read_config()}
        changed = []
        for name in names:
            if name == "labels" or before[name] == now[name]:
                continue
            if name in SOURCES and is_same_source(before[name], now[name]):
                continue
            changed.append(f"{name} {before[name]}, now {now[name]}")
        if "initializer_token" in names and self.has_other_start(settings):
            changed.append(f"another content of '{settings['initializer_token']}'")
        if "labels" in names and self.has_other_labels(settings):
            changed.append(
                f"the labels of '{self.labels_file}', now those of '{settings['labels']}'"
            )
        return changed

    def read_config(self) -> dict[str, str | list[str]]:
        """Read the settings of config.yml, as words; raise UserError if it cannot be read."""
        remedy = f"remove '{self.tokens}' to train the class again"
        try:
            found = read_yaml(str(self.config_file), "lr: 0.001")
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        for name in OF_EVERY_RUN:
            require(
                isinstance(found.get(name), str),
                f"'{self.config_file}' does not hold the settings of a run; {remedy}",
            )
        return found

    def has_other_start(self, settings: dict) -> bool:
        """Return whether the token file that training started from has changed since."""
        start = settings.get("initializer_token", "")
        if not names_file(start) or not self.start_file.exists():
            return False
        return not torch.equal(load_token(self.start_file).vectors, load_token(start).vectors)

    def has_other_labels(self, settings: dict) -> bool:
        """Return whether a zero-shot classifier's labels have changed since."""
        if not settings["classifier"].startswith("zero-shot:"):
            return False
        if not self.labels_file.exists():
            return True
        return read_labels(str(self.labels_file)) != read_labels(settings["labels"])

    def refuse_other_settings(self, settings: dict, names: list[str]):
        """Raise UserError if the token, or half of one, was trained with other settings."""
        has_token = self.token_file.exists()
        old_state = self.state_file.with_suffix(".safetensors")
        require(
            has_token or not old_state.exists(),
            f"'{old_state}' was written by an earlier version and cannot be resumed: "
            "--skip_exists False starts over",
        )
        if not has_token and not self.state_file.exists():
            return
        require(
            not has_token or self.has_own_token(),
            f"'{self.tokens}' holds a token that was not trained there: give a new --exp_id, or "
            "--skip_exists False to start over",
        )
        changed = self.changed_settings(settings, names)
        what = "token" if has_token else "half-trained token"
        require(
            not changed,
            f"the {what} in '{self.tokens}' was trained with {'; '.join(changed)}: another setting "
            "is another run, so give a new --exp_id or the old setting; --skip_exists False starts "
            "over",
        )

    def has_own_token(self) -> bool:
        """Return whether the token was trained in this run."""
        if not self.config_file.exists():
            return False
        return "imported_from" not in load_token(self.token_file).header

    def check_token(self, classifier: str, test_size: int):
        """Raise UserError unless there is a token of this classifier.

        And one that has not seen the evaluation's seeds.
        """
        require(
            self.token_file.exists(), f"no token at '{self.token_file}'; --train True makes one"
        )
        try:
            header = load_token(self.token_file).header
        except UserError as error:
            raise UserError(f"{error}; remove it and train again") from error
        trained_by = header.get("classifier", classifier)
        # of another revision: a warning, once it is evaluated
        place, _ = split_revision(classifier)
        require(
            is_same_source(trained_by, place),
            f"'{self.token_file}' was trained with the classifier '{trained_by}', not "
            f"'{classifier}': give that one, or another --exp_id",
        )
        check_held_out(self.token_file, header, test_size)

    def import_token(
        self, token: ClassToken, placeholder: str, source: str, start_over: bool
    ) -> list[str]:
        """Keep a token of any origin as this class's, and return a note about it.

        No note if it is there already. Any classifier may judge it; the one that trained it, if its
        file names one, stays in the header as guided_by.

        Raises:
            UserError: the run has another token, or a training of its own.
        """
        require(
            not (self.config_file.exists() or self.state_file.exists()),
            f"'{self.tokens}' already holds a training: give a new --exp_id",
        )
        if self.token_file.exists() and not start_over:
            require(
                torch.equal(load_token(self.token_file).vectors, token.vectors),
                f"'{self.tokens}' holds another token than '{source}': give a new --exp_id, or "
                "--skip_exists False",
            )
            return []
        header = dict(token.header)
        trained_by = header.pop("classifier", None)
        if trained_by is not None:
            header["guided_by"] = trained_by
        header |= {**self.describe_class(), "imported_from": source}
        save_token(self.token_file, placeholder, token.vectors, token.widths, header)
        return [f"a token of {len(token.vectors)} vectors, taken from '{source}'"]

    def describe_class(self) -> dict:
        """Describe the class in a token's header."""
        return {
            "class_index": self.target.number,
            "class_name": self.target.name,
            "label": self.target.label,
        }

    def delete_leftovers(self):
        """Remove what a killed process was just writing, or about to remove.

        Only the holder of the class may.
        """
        if self.token_file.exists():
            self.state_file.unlink(missing_ok=True)
        for folder in (self.tokens, self.images):
            for half in folder.rglob(".*.tmp"):
                half.unlink()

    def delete_evaluation(self):
        """Delete the evaluation, so that every picture is drawn and judged again."""
        for file in (*self.results_of_images(), self.eval_images / RECORD):
            file.unlink(missing_ok=True)

    def begin_training(self, settings: dict, start_over: bool = False) -> list[str]:
        """Write config.yml in place of what is there; return notes.

        A half-trained token is kept if it can go on.
        """
        if self.state_file.exists() and not start_over:
            return ["training resumed"]
        # before anything is removed: the disk may be full
        written = self.tokens / ".config.yml.tmp"
        of_class = {"class_index": str(self.target.number), "skip_exists": True}
        write_yaml(written, {**settings, **of_class})
        # first of all: a kill here leaves nothing that seems whole
        self.token_file.unlink(missing_ok=True)
        self.state_file.unlink(missing_ok=True)
        for path in (*self.tokens.iterdir(), self.train_images):
            if path != written:
                remove_path(path)
        self.delete_evaluation()
        if settings.get("labels"):
            labels = read_labels(settings["labels"])
            write_text(self.labels_file, "".join(f"{label}\n" for label in labels))
        if names_file(settings.get("initializer_token", "")):
            start = load_token(settings["initializer_token"])
            save_token(
                self.start_file, start.placeholder, start.vectors, start.widths, start.header
            )
        written.replace(self.config_file)
        return []

    def save_training(self, trained: TrainedToken, widths: tuple[int, ...], settings: dict) -> str:
        """Write a token with its history and versions, the token last; return a summary in words.

        Then the training's state is no longer needed.
        """
        updates = len(trained.every_update)
        frames = choose_frames(trained.every_update)
        if settings["fresh_noise"]:  # no seed comes back: the film has to be drawn
            write_tensors(self.vectors_file, frames)
        self.delete_training_images(settings["train_images"], set(frames))
        peak = round(peak_memory_gb(str(trained.vectors.device)), 2)
        cost = {
            "updates": updates,
            "seconds": round(trained.seconds, 1),
            "peak_memory_gb": finite_or_none(peak),
        }
        write_json(self.cost_file, cost)
        header = {
            **self.describe_class(),
            "classifier": settings["classifier"],
            "base_model": settings["model"],
            **self.describe_seeds(settings["seed"]),
            "updates": updates,
            "loss": f"{trained.loss:.4f}",
            "train_accuracy": f"{trained.accuracy:.4f}",
            "stopped": trained.stopped,
            **describe_versions(),
        }
        placeholder = settings["placeholder_token"]
        save_token(self.token_file, placeholder, trained.vectors, widths, header)
        self.state_file.unlink(missing_ok=True)
        return f"{updates} updates in {trained.seconds:.0f} s, stopped: {trained.stopped}"

    def delete_training_images(self, kept: str, frames: set[str]):
        """Keep 'all' of the training pictures, those of the 'film' (`frames`), or 'none'."""
        if kept == "all":
            return
        kept_updates = frames if kept == "film" else set()
        for update in self.train_images.glob("[0-9]*"):
            if update.name not in kept_updates:
                shutil.rmtree(update)

    def describe_seeds(self, seed: int) -> dict:
        """The least seed that a token has seen, in its header.

        Nothing where the file it started from does not say.
        """
        if not self.start_file.exists():
            return {"seed": seed}
        before = load_token(self.start_file).header.get("seed")
        return {"seed": min(seed, int(before))} if before else {}


def describe_versions() -> dict[str, str]:
    """What a token was trained with, in its header."""
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def remove_path(path: Path):
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_held_out(path: Path | str, header: dict[str, str], test_size: int):
    """Raise UserError where a token's training, as its file says, saw seeds of the evaluation."""
    seed = header.get("seed", str(test_size))
    require(
        re.fullmatch("[0-9]{1,10}", seed) and int(seed) <= MOST_SEED,
        f"'{path}' names {seed[:20]!r} as the seed of its training, but seeds range from 0 to "
        f"{MOST_SEED}: remove it and train again",
    )
    require(
        int(seed) >= test_size,
        f"'{path}' was trained on seeds from {seed} on, which {test_size} evaluation images would "
        f"use too: give --test_size {seed} or less",
    )


def describe_paths(folders: list[RunFolder], file: str) -> str:
    """Return the path of one class's file, or the pattern of all classes'."""
    path = str(getattr(folders[0], file))
    if len(folders) == 1:
        return path
    return path.replace(f"/{folders[0].target.folder}/", "/*/")


def list_titles(folders: list[RunFolder]) -> str:
    """List the classes' titles, for a message."""
    return ", ".join(folder.target.title for folder in folders)
