"""Which classes and which GPU this process takes: the same command, started as often as one likes, shares them."""

import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from tqdm import tqdm

from method.class_training import Trainer, TrainingSettings
from method.losses import Loss
from method.update import train_tokens
from models.generator import Generator
from models.sampling import SamplingSettings
from runs.folders import RunFolder
from runs.tracking import RunTrackers
from tokens.class_token import start_vectors
from utils import (
    DISK_FULL,
    WITHOUT_GPU_OR_NETWORK,
    UserError,
    error_message,
    is_out_of_memory,
    join_lines,
    require,
    write_text,
)


def choose_device(device: str, mixed_precision: str, local_rank: int) -> str:
    """The device to compute on; `local_rank` is this process's number among a launcher's on this machine, or -1."""
    kind, _, number = device.partition(":")
    require(kind != "cuda" or torch.cuda.is_available(), "no CUDA GPU here: use --device cpu --mixed_precision no, "
                                                         f"which is slow, {WITHOUT_GPU_OR_NETWORK}")
    require(not number or int(number) < torch.cuda.device_count(),
            f"no GPU {number} here: there are {torch.cuda.device_count()}, counted from 0")
    require(kind != "mps" or torch.backends.mps.is_available(), f"no Apple GPU here, {WITHOUT_GPU_OR_NETWORK}")
    require(kind != "cpu" or mixed_precision != "fp16", "a CPU has no fast fp16: use --mixed_precision no")
    if kind != "cuda" or local_rank < 0:
        return device
    require(not number, f"--device {device} would put all processes on one GPU: give --device cuda, for one each")
    require(local_rank < torch.cuda.device_count(),
            f"no GPU for process {local_rank + 1} of this machine, which has {torch.cuda.device_count()}: give as many "
            "--num_processes per machine as it has GPUs")
    return f"cuda:{local_rank}"


class Sweep:
    """The classes of one command; other processes may work on them at the same time, each class by one of them."""

    def __init__(self, folders: list[RunFolder], is_finished: Callable[[RunFolder], bool], start_over: bool):
        """`start_over`: what was finished before this command does not count."""
        self.folders, self.is_finished, self.start_over = folders, is_finished, start_over
        self.changes_before = {folder: folder.last_change() for folder in folders}
        self.failed: list[RunFolder] = []  # by this process
        self.finished: set[RunFolder] = set()

    def needs_work(self, folder: RunFolder) -> bool:
        """Whether a class is neither finished nor failed in this sweep, by any process."""
        if folder in self.finished or self.has_failed(folder):
            return False
        if self.is_to_start_over(folder):
            return True
        if self.is_finished(folder):
            self.finished.add(folder)
        return folder not in self.finished

    def is_to_start_over(self, folder: RunFolder) -> bool:
        return self.start_over and folder.last_change() == self.changes_before[folder]

    def has_failed(self, folder: RunFolder) -> bool:
        *_, before = self.changes_before[folder]
        *_, now = folder.last_change()
        return folder in self.failed or now not in (None, before)

    def claim_classes(self) -> Iterator[RunFolder]:
        """Every class that needs work and that no other process holds, its lock held until `release_class`.

        Takes over what a process that died left. Does not wait for classes that others hold.
        """
        claimed = set()
        while True:
            for folder in self.folders:
                if folder not in claimed and self.needs_work(folder) and folder.try_lock():
                    if self.needs_work(folder):  # not finished by another between look and lock
                        break
                    folder.lock.release()
            else:
                return
            claimed.add(folder)
            folder.delete_leftovers()
            yield folder

    def release_class(self, folder: RunFolder, error: Exception | None = None):
        """The class is done with, finished or failed; error.txt says why, of an unforeseen error all of it."""
        if error:
            self.failed.append(folder)
            is_foreseen = isinstance(error, (UserError, OSError))
            write_text(folder.error_file, f"{error}\n" if is_foreseen else "".join(traceback.format_exception(error)))
        else:
            self.finished.add(folder)
            folder.error_file.unlink(missing_ok=True)
        folder.lock.release()

    def list_untouched(self, folders: list[RunFolder]) -> list[RunFolder]:
        """Those that no process has trained, evaluated or failed since this command began: a look at a few files."""
        return [folder for folder in folders if folder not in self.finished and folder not in self.failed
                and folder.last_change() == self.changes_before[folder]]

    def left_to_others(self) -> list[RunFolder]:
        return [folder for folder in self.folders if self.needs_work(folder)]


class TrainingJob(NamedTuple):
    """How the classes of a sweep are trained; models are loaded when the first class is."""

    get_generator: Callable[[], Generator]
    get_loss: Callable[[], Loss]
    settings: TrainingSettings
    sampling: SamplingSettings
    record: dict  # all settings of the run, for config.yml
    decisive: list[str]  # the names of those that decide the token
    classes_at_once: int
    batch_size: int | None
    trackers: RunTrackers | None = None


def work_on_classes(sweep: Sweep, job: TrainingJob | None, evaluate_class: Callable[[RunFolder], None]):
    """Train (with a `job`) and evaluate every class that this process can claim; the errors of those that failed.

    Whatever one class fails of does not end the others; a full disk or memory ends all of them.
    """
    errors, to_do, started = [], sweep.left_to_others(), time.monotonic()

    def finish_class(folder: RunFolder, error: Exception | None):
        try:
            if error:
                raise error
            evaluate_class(folder)
        except Exception as failure:
            if is_of_machine(failure):
                raise
            error = failure
            errors.append(as_user_error(error, folder))
        sweep.release_class(folder, error)
        if len(sweep.folders) > 1:
            left = len(sweep.list_untouched(to_do))
            rest = describe_rest(len(to_do), left, time.monotonic() - started)
            print_class(folder, f" failed: {error_message(errors[-1])}; {rest}" if error else
                        f": {'; '.join([*folder.notes, rest])}", error)
        elif not error:
            print_class(folder, f": {'; '.join(folder.notes)}")

    try:
        # models are loaded only where a class is to be trained; asked again at the end: others may have died meanwhile
        while first := next(trainers := start_trainers(sweep, job, finish_class), None):
            train_classes(sweep, job, itertools.chain([first], trainers), finish_class)
    finally:  # also where the disk is full
        for folder in sweep.folders:
            folder.lock.release()
    return errors


def train_classes(sweep: Sweep, job: TrainingJob, trainers: Iterator[Trainer],
                  finish_class: Callable[[RunFolder, Exception | None], None]):
    """Train and finish the classes of `trainers`; an unforeseen error fails those that were just training."""
    folder_of = {folder.target: folder for folder in sweep.folders}
    running: set[RunFolder] = set()

    def note_started() -> Iterator[Trainer]:
        for trainer in trainers:
            running.add(folder_of[trainer.target])
            yield trainer

    try:
        for trainer, end in train_tokens(job.get_generator(), job.get_loss(), note_started(), job.classes_at_once,
                                         job.sampling, job.batch_size):
            folder = folder_of[trainer.target]
            if job.trackers:
                job.trackers.log_update(folder, trainer, is_end=end is not None)
            if end is None:
                continue
            if isinstance(end, UserError):
                folder.state_file.unlink(missing_ok=True)  # it diverged: other settings may be tried
                finish_class(folder, end)
            else:
                folder.save_training(end, job.get_generator().token_widths, job.record)
                finish_class(folder, None)
            running.remove(folder)
    except Exception as failure:
        if is_of_machine(failure):
            raise
        for folder in running:
            finish_class(folder, failure)


def is_of_machine(error: Exception) -> bool:
    """Whether no other class would fare better: the disk or the memory is full."""
    return is_out_of_memory(error) or isinstance(error, OSError) and error.errno in DISK_FULL


def as_user_error(error: Exception, folder: RunFolder) -> Exception:
    """An error that has its line, as it is; an unforeseen one as a line that says where its traceback is."""
    if isinstance(error, (UserError, OSError)):
        return error
    found = UserError(f"{type(error).__name__}: {join_lines(error)[:200]} (the traceback is in "
                      f"'{folder.error_file}', and --debug shows it)")
    found.__cause__ = error
    return found


def print_class(folder: RunFolder, text: str, error: Exception | None = None):
    """Print a class's line; `tqdm.write` would draw every bar again below it, which in a log is a line each."""
    write = tqdm.write if sys.stderr.isatty() else print
    write(f"class {folder.target.title}{text}", file=sys.stderr if error else sys.stdout)


def describe_rest(total: int, left: int, seconds: float) -> str:
    """How many of the classes are done, and how long the rest takes at this pace."""
    rest = f", about {tqdm.format_interval(seconds / (total - left) * left)} left" if left else ""
    return f"{total - left} of {total} classes{rest}"


def start_trainers(sweep: Sweep, job: TrainingJob | None,
                   finish_class: Callable[[RunFolder, Exception | None], None]) -> Iterator[Trainer]:
    """The trainer of every class that this process claims; what has its token, or cannot start, is finished here."""
    for folder in sweep.claim_classes():
        start_over = sweep.is_to_start_over(folder)
        try:
            if job and not start_over:  # another command may have come in between
                folder.refuse_other_settings(job.record, job.decisive)
            if job and (start_over or not folder.token_file.exists()):
                folder.begin_training(job.record, start_over)
                generator, settings = job.get_generator(), job.settings
                start = start_vectors(generator, settings.initializer_token, settings.num_vectors)
                trainer = Trainer(folder.target, start, settings, generator.dtype, folder.history_file,
                                  folder.state_file, folder.train_images)
            else:
                if start_over:
                    folder.delete_evaluation()
                folder.notes.append("trained already")
                finish_class(folder, None)
                continue
        except Exception as error:  # a broken state, say
            finish_class(folder, error)
            continue
        yield trainer
