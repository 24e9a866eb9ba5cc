"""Which class next: the same command, started several times, shares the classes of a run."""

import sys
import time
import traceback
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from config import names_deciding
from evaluation.files import MANY
from method.class_training import ClassTraining, DivergenceError, UpdateFigures
from method.update import compute_gradients
from runs.checks import check_settings, import_token, list_untrained, load_models
from runs.folders import RunFolder, describe_paths, list_titles
from runs.locks import warn_without_locks
from runs.session import Session
from utils import (
    DISK_FULL,
    UserError,
    error_message,
    is_out_of_memory,
    join_lines,
    require,
    write_text,
)


@dataclass
class ClassWork:
    """A class that this process holds: its training, if it has one, and its notes."""

    folder: RunFolder
    training: ClassTraining | None = None
    notes: list[str] = field(default_factory=list)


class Sweep:
    """The classes of one command; other processes may work on them too, each on its own classes."""

    def __init__(self, session: Session):
        self.session = session
        self.folders = list(session.folders.values())
        self.start_over = not session.config.skip_exists  # what was there before does not count
        self.changes_before = {folder: folder.last_change() for folder in self.folders}
        self.claimed: set[RunFolder] = set()  # by this process, as the next two
        self.failed: list[RunFolder] = []
        self.finished: set[RunFolder] = set()
        self.errors: list[Exception] = []  # of the failed classes
        self.to_do: list[RunFolder] = []  # what needed work at the start
        self.started = time.monotonic()

    def needs_work(self, folder: RunFolder) -> bool:
        """Return whether a class is neither finished nor failed in this sweep, by any process."""
        if folder in self.finished or self.has_failed(folder):
            return False
        if self.is_to_start_over(folder):
            return True
        if self.is_finished(folder):
            self.finished.add(folder)
        return folder not in self.finished

    def is_finished(self, folder: RunFolder) -> bool:
        """Return whether a class has all that this command asks for, with these settings."""
        if not folder.token_file.exists():
            return False
        if not self.session.config.evaluate:
            return True
        return self.session.evaluation.is_finished(folder)

    def is_to_start_over(self, folder: RunFolder) -> bool:
        """Return whether a class's files are from before this command, which starts over."""
        return self.start_over and folder.last_change() == self.changes_before[folder]

    def has_failed(self, folder: RunFolder) -> bool:
        """Return whether a class failed in this sweep, here or in another process."""
        *_, failed_before = self.changes_before[folder]
        *_, failed_now = folder.last_change()
        return folder in self.failed or failed_now not in (None, failed_before)

    def claim_class(self) -> RunFolder | None:
        """Claim the first class that needs work and that no other process holds.

        Its lock is held from now on. Takes over classes of dead processes. Does not wait for
        classes that others hold.
        """
        for folder in self.folders:
            if folder in self.claimed or not self.needs_work(folder) or not folder.try_lock():
                continue
            if not self.needs_work(folder):  # finished by another between look and lock
                folder.lock.release()
                continue
            self.claimed.add(folder)
            folder.delete_leftovers()
            return folder
        return None

    def finish_class(self, work: ClassWork):
        """Release a class that is trained and evaluated, and print its line."""
        folder = work.folder
        self.finished.add(folder)
        folder.error_file.unlink(missing_ok=True)
        folder.lock.release()
        notes = [*work.notes, *self.note_rest()]
        print_class(folder, f": {'; '.join(notes)}")

    def fail_class(self, work: ClassWork, error: Exception):
        """Write why a class failed into error.txt, release it, and print its line.

        Raises `error` if no other class would do better, as on a full disk.
        """
        if is_of_machine(error):
            raise error
        folder = work.folder
        if work.training:
            work.training.bar.close()
        self.failed.append(folder)
        if isinstance(error, (UserError, OSError)):
            write_text(folder.error_file, f"{error}\n")
        else:
            write_text(folder.error_file, "".join(traceback.format_exception(error)))
            error = unforeseen_error(error, folder)
        self.errors.append(error)
        folder.lock.release()
        rest = self.note_rest()
        if rest:  # else the command's own last line says it
            print_class(folder, f" failed: {'; '.join([error_message(error), *rest])}", sys.stderr)

    def note_rest(self) -> list[str]:
        """Describe how many of several classes are done, and how long the rest takes."""
        if len(self.folders) == 1:
            return []
        left = [folder for folder in self.to_do if self.is_untouched(folder)]
        seconds = time.monotonic() - self.started
        return [describe_rest(len(self.to_do), len(left), seconds)]

    def is_untouched(self, folder: RunFolder) -> bool:
        """Return whether no process has touched a class since this command began."""
        if folder in self.finished or folder in self.failed:
            return False
        return folder.last_change() == self.changes_before[folder]

    def left_to_others(self) -> list[RunFolder]:
        """List the classes that still need work and that other processes hold."""
        return [folder for folder in self.folders if self.needs_work(folder)]

    def release_locks(self):
        """Release the classes that this process did not finish."""
        for folder in self.folders:
            folder.lock.release()


def run_sweep(session: Session):
    """Train and evaluate the classes that no other process takes.

    Whoever finishes the last one writes the summary.

    Raises:
        UserError: settings that cannot work, classes that failed, or locks that seem abandoned.
    """
    warn_without_locks(session.config.output_path)
    check_settings(session)
    sweep = Sweep(session)
    notes = prepare_models(session, sweep)
    work_on_classes(session, sweep, notes)
    silent = print_results(session, sweep)
    if sweep.errors and len(sweep.folders) == 1:
        raise sweep.errors[0]
    require(
        not sweep.errors,
        f"{len(sweep.errors)} of {len(sweep.folders)} classes failed (see the messages above): "
        + list_titles(sweep.failed),
    )
    if silent:
        raise UserError(describe_silent(silent))


def work_on_classes(session: Session, sweep: Sweep, notes: list[str] | None = None):
    """Train and evaluate every class that this process can claim.

    A class that fails does not end the others; a full disk or memory ends all of them. `notes` are
    printed before the rest of every class's line.
    """
    classes_at_once = session.config.classes_at_once
    running: list[ClassWork] = []
    sweep.to_do = sweep.left_to_others()
    sweep.started = time.monotonic()
    try:
        while True:
            while len(running) < classes_at_once and (folder := sweep.claim_class()):
                work = ClassWork(folder, notes=list(notes or []))
                start_class(session, sweep, work)  # what is trained already is only evaluated
                if work.training:
                    running.append(work)
            if not running:
                break
            running = train_update(session, sweep, running)  # one update of all of them
    finally:  # also where the disk is full
        sweep.release_locks()


def start_class(session: Session, sweep: Sweep, work: ClassWork):
    """Begin or resume a class's training; what is trained already is evaluated."""
    config, folder = session.config, work.folder
    settings = asdict(config)
    start_over = sweep.is_to_start_over(folder)
    try:
        if config.train and not start_over:  # another command may have come in between
            folder.refuse_other_settings(settings, names_deciding("token"))
        if config.train and (start_over or not folder.token_file.exists()):
            work.notes += folder.begin_training(settings, start_over)
            work.training = session.start_training(folder)
            return
        if start_over:
            folder.delete_evaluation()
    except Exception as error:  # a broken state, say
        sweep.fail_class(work, error)
        return
    work.notes.append("trained already")
    evaluate_class(session, sweep, work)


def train_update(session: Session, sweep: Sweep, running: list[ClassWork]) -> list[ClassWork]:
    """Train one update of all running classes; return those that go on, and finish the others."""
    trainings = [work.training for work in running if work.training]
    try:
        updates = compute_gradients(
            trainings,
            session.generator,
            session.loss,
            session.training_sampling,
            session.fitted_gradient,
        )
    except Exception as error:  # in what they share, so that none of them can go on
        for work in running:
            sweep.fail_class(work, error)
        return []
    going_on = []
    for work, figures in zip(running, updates, strict=True):
        if finish_update(session, sweep, work, figures):
            going_on.append(work)
    return going_on


def finish_update(session: Session, sweep: Sweep, work: ClassWork, figures: UpdateFigures) -> bool:
    """Finish one class's update; return whether its training goes on."""
    try:
        stop = work.training.finish_update(figures).stop
    except Exception as error:
        if isinstance(error, DivergenceError):
            work.folder.state_file.unlink(missing_ok=True)  # other settings may be tried
            log_update(session, work, is_end=True)
        sweep.fail_class(work, error)
        return False
    log_update(session, work, is_end=stop is not None)
    if stop is None:
        return True
    end_training(session, sweep, work, stop)
    return False


def end_training(session: Session, sweep: Sweep, work: ClassWork, stop: str):
    """Keep the token of a training that ended because of `stop`, and evaluate it."""
    trained = work.training.trained_token(stop)
    widths = session.generator.token_widths
    try:
        note = work.folder.save_training(trained, widths, asdict(session.config))
    except Exception as error:
        sweep.fail_class(work, error)
        return
    work.notes.append(note)
    evaluate_class(session, sweep, work)


def log_update(session: Session, work: ClassWork, is_end: bool):
    """Send a class's last update to the trackers, if there are any."""
    if session.trackers:
        session.trackers.log_update(work.folder, work.training, is_end)


def evaluate_class(session: Session, sweep: Sweep, work: ClassWork):
    """Evaluate a class that has its token, if this command asks for it, and finish it."""
    try:
        if session.config.evaluate:
            work.notes += session.evaluation.evaluate_class(work.folder)
    except Exception as error:
        sweep.fail_class(work, error)
        return
    sweep.finish_class(work)


def prepare_models(session: Session, sweep: Sweep) -> list[str]:
    """Load and try what this command needs, before anything is written.

    Returns notes about an imported token.
    """
    config = session.config
    untrained = list_untrained(session)
    notes = import_token(session) if config.token else []
    if config.evaluate:
        for folder in sweep.folders:
            if folder not in untrained:
                folder.check_token(config.classifier, config.test_size)
        session.evaluation.find_real(sweep.folders[0].cache)
    if untrained:
        session.load_now("generator")
    if any(sweep.needs_work(folder) for folder in sweep.folders):
        load_models(session, is_training=bool(untrained))
    return notes


def print_results(session: Session, sweep: Sweep) -> dict[RunFolder, str]:
    """Print where the results are, and the summary if no other process works on these classes.

    Returns the classes whose holder seems dead, and a description of their locks.
    """
    left = sweep.left_to_others()
    silent = {}
    alive = []
    for folder in left:
        silence = folder.describe_silence()
        if silence:
            silent[folder] = silence
        else:
            alive.append(folder)
    if alive:
        titles = list_titles(alive)
        print(f"not finished here, since other processes hold them: {titles}")
    done = [folder for folder in sweep.folders if folder in sweep.finished]
    if not done:
        return silent
    evaluates = session.config.evaluate
    if evaluates and not left:
        is_new = session.evaluation.summarise_classes(done)
        if not is_new and len(done) > MANY:  # a finished thousand is a line
            return silent
    print("token: " + describe_paths(done, "token_file"))
    if evaluates:
        print("pictures: " + describe_paths(done, "grid_file"))
    return silent


def describe_rest(total: int, left: int, seconds: float) -> str:
    """Describe how many of the classes are done, and how long the rest takes at this pace."""
    done = total - left
    text = f"{done} of {total} classes"
    if left:
        text += f", about {tqdm.format_interval(seconds / done * left)} left"
    return text


def is_of_machine(error: Exception) -> bool:
    """Return whether no other class would do better: the disk or the memory is full."""
    if is_out_of_memory(error):
        return True
    return isinstance(error, OSError) and error.errno in DISK_FULL


def unforeseen_error(error: Exception, folder: RunFolder) -> UserError:
    """Turn an unforeseen error into a line that says where its traceback is."""
    found = UserError(
        f"{type(error).__name__}: {join_lines(error)[:200]} (the traceback is in "
        f"'{folder.error_file}', and --debug shows it)"
    )
    found.__cause__ = error
    return found


def print_class(folder: RunFolder, text: str, stream=None):
    """Print a class's line, on stdout by default.

    `tqdm.write` would draw every bar again below it, which in a log is a line each.
    """
    write = tqdm.write if sys.stderr.isatty() else print
    write(f"class {folder.target.title}{text}", file=stream or sys.stdout)


def describe_silent(silences: dict[RunFolder, str]) -> str:
    """Describe what to do about classes whose holders seem dead, from their locks."""
    first, *others = silences
    more = f" (so are {list_titles(others)})" if others else ""
    return f"class {first.target.title} is not finished{more}, and its lock {silences[first]}"
