"""One class while it learns: its optimiser step, stop rules, history and state on disk."""

import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from prompt_datasets import TEMPLATES, PromptDataset, TargetClass
from utils import UserError, join_lines, replace_file, write_text

AVERAGED_UPDATES = 3  # with fresh noise the few images of one update can be lucky
SKIPPED_AT_MOST = 10  # non-finite updates in a row: float16's scale of 2**10 can be halved so often
HISTORY_KEYS = ("update", "loss", "accuracy", "grad_norm", "vector_norm")


class TrainingSettings(NamedTuple):
    """What affects a token besides generator, sampling and classifier; see config.py."""

    placeholder_token: str
    initializer_token: str
    num_vectors: int | None
    num_train_epochs: int
    epoch_size: int
    number_of_prompts: int
    target_accuracy: float
    early_stopping: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float
    max_grad_norm: float
    seed: int
    fresh_noise: bool


class UpdateFigures(NamedTuple):
    """The results of one update's images: losses [N], whether each is correct [N], and seconds."""

    losses: torch.Tensor
    correct: torch.Tensor
    seconds: float


class Progress(NamedTuple):
    """A class after an update: its line in the history, and why its training ends, if it does."""

    line: dict  # of HISTORY_KEYS
    stop: str | None


class TrainedToken(NamedTuple):
    """What a training has learned.

    The best vectors [K, D], and their loss and accuracy, averaged as the stop rules do.
    """

    vectors: torch.Tensor
    loss: float
    accuracy: float
    every_update: torch.Tensor  # [updates, K, D]
    stopped: str  # why
    seconds: float


class DivergenceError(UserError):
    """A training that cannot go on: its loss or gradient is non-finite or zero."""


class ClassTraining:
    """The state of one class's training, independent of the classes that share its batches."""

    def __init__(
        self,
        target: TargetClass,
        vectors: torch.Tensor,
        settings: TrainingSettings,
        dtype: torch.dtype,
        history_file: Path,
        state_file: Path,
        image_folder: Path,
    ):
        """Start from `vectors` [K, D], or from `state_file` if it exists.

        `dtype` is the generator's.
        """
        self.target = target
        self.settings = settings
        self.dtype = dtype
        self.history_file = history_file
        self.state_file = state_file
        self.image_folder = image_folder
        self.vectors = vectors.detach().clone().requires_grad_()
        self.optimizer = torch.optim.AdamW(
            [self.vectors],
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(
            vectors.device.type, init_scale=2.0**10, enabled=dtype == torch.float16
        )
        self.history: list[dict] = []  # of HISTORY_KEYS
        self.past: list[torch.Tensor] = []  # the vectors that each update's images were drawn with
        self.best = 0  # the update whose vectors are the best so far
        self.seconds = 0.0  # this class's share of the time
        if state_file.exists():
            self.load_state()
        self.bar = tqdm(
            total=settings.num_train_epochs,
            initial=len(self.history),
            desc=f"training {target.title}",
            unit="update",
            leave=False,
        )

    @property
    def averaged_updates(self) -> int:
        """Return over how many updates the stop rules average."""
        return AVERAGED_UPDATES if self.settings.fresh_noise else 1

    def next_images(self) -> PromptDataset:
        """Return the next update's prompts and seeds."""
        settings = self.settings
        first_seed = settings.seed
        if settings.fresh_noise:
            first_seed += len(self.history) * settings.epoch_size
        seeds = list(range(first_seed, first_seed + settings.epoch_size))
        phrase = f"{settings.placeholder_token} {self.target.name}"
        return PromptDataset(phrase, TEMPLATES[: settings.number_of_prompts], seeds)

    def image_weights(self) -> torch.Tensor:
        """Return weights [N] that make the sum of the losses their mean, scaled for float16."""
        size = self.settings.epoch_size
        mean_weights = torch.full((size,), 1 / size, device=self.vectors.device)
        return self.scaler.scale(mean_weights)

    def list_image_paths(self) -> list[Path]:
        """List where the next update's images go."""
        folder = self.image_folder / f"{len(self.history):03d}"
        return [folder / f"{seed}.png" for seed in self.next_images().seeds]

    def finish_update(self, figures: UpdateFigures) -> Progress:
        """Record an update whose gradient is in `vectors.grad`; step and save if training goes on.

        Raises:
            DivergenceError: the training cannot go on.
        """
        stop = self.record_update(figures)
        if stop is None:
            self.step_optimizer()
            self.save_state()
        else:
            self.bar.close()
        return Progress(self.history[-1], stop)

    def record_update(self, figures: UpdateFigures) -> str | None:
        """Add an update to history and past; return the reason to stop, if there is one."""
        settings = self.settings
        update = len(self.history)
        self.seconds += figures.seconds
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_([self.vectors], settings.max_grad_norm).item()
        loss = figures.losses.mean().item()
        accuracy = figures.correct.mean().item()
        if not math.isfinite(loss):
            accuracy = 0.0  # of non-finite logits class 1 would be the largest
        line = {
            "update": update,
            "loss": finite_or_none(loss),
            "accuracy": round(accuracy, 6),
            "grad_norm": finite_or_none(grad_norm),
            "vector_norm": round(self.vectors.norm().item(), 6),
        }
        self.history.append(line)
        self.past.append(self.vectors.detach().clone())

        is_best, stop = judge_progress(
            loss_and_accuracy(self.history),
            self.averaged_updates,
            settings.target_accuracy,
            settings.early_stopping,
        )
        if is_best:
            self.best = update
        if stop is None and update + 1 == settings.num_train_epochs:
            stop = "the last update"
        self.check_progress(is_last=stop is not None)
        write_text(self.history_file, "".join(json.dumps(line) + "\n" for line in self.history))
        self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
        self.bar.update()
        return stop

    def step_optimizer(self):
        """Take AdamW's step; a non-finite loss or gradient leaves the vectors as they are."""
        if is_finite(self.history[-1]):
            self.scaler.step(self.optimizer)
        self.scaler.update()  # a lower scale, where float16 was too narrow
        self.optimizer.zero_grad()

    def trained_token(self, stop: str) -> TrainedToken:
        """Return what a training that ended because of `stop` has learned."""
        until_best = loss_and_accuracy(self.history)[: self.best + 1]
        loss, accuracy = average_recent(until_best, self.averaged_updates)
        every_update = torch.stack(self.past)
        return TrainedToken(self.past[self.best], loss, accuracy, every_update, stop, self.seconds)

    def check_progress(self, is_last: bool):
        """Raise DivergenceError if this training cannot go on, or was of no use."""
        try:
            self.check_finite(is_last)
            self.check_first_gradient()
        except DivergenceError:
            self.bar.close()
            raise

    def check_first_gradient(self):
        """Raise DivergenceError for a first gradient of zero.

        If the first update cannot move the vectors, no later one can; only weight decay would.
        """
        line = self.history[-1]
        is_right_already = line["accuracy"] > self.settings.target_accuracy
        if len(self.history) > 1 or not is_finite(line) or is_right_already:
            return
        if self.vectors.grad.any():
            return
        if self.scaler.is_enabled():
            cause = "float16 may be too narrow for it: try --mixed_precision bf16 or no"
        else:
            cause = (
                "the loss does not depend on the token (every pixel black or white, or a loss "
                "that is constant)"
            )
        raise DivergenceError(
            f"the gradient of the first update of class {self.target.title} is exactly zero: "
            f"{cause}"
        )

    def check_finite(self, is_last: bool):
        """Raise DivergenceError for too many non-finite updates in a row.

        Or if no update was finite up to the last one.
        """
        skipped = 0
        while skipped < len(self.history) and not is_finite(self.history[-1 - skipped]):
            skipped += 1
        would_repeat = not self.settings.fresh_noise and not self.scaler.is_enabled()
        allowed = 0 if would_repeat else SKIPPED_AT_MOST
        is_useless = is_last and skipped == len(self.history)
        if skipped <= allowed and not is_useless:
            return
        line = self.history[-1]
        what = "loss" if line["loss"] is None else "gradient"
        since = f", as the last {skipped} updates" if skipped > 1 else ""
        cause, remedy = "the token may have diverged", ""
        if self.dtype == torch.float16:
            cause = "float16 may be too narrow for this model"
            remedy = ", or --mixed_precision bf16 or no"
        elif self.dtype == torch.bfloat16:
            remedy = ", or --mixed_precision no"
        raise DivergenceError(
            f"update {line['update']} of class {self.target.title} has a non-finite {what}{since}: "
            f"{cause}; try a lower --lr than {self.settings.lr}{remedy}"
        )

    def save_state(self):
        """Write what the next update needs: a kill loses at most the update in flight."""
        state = {
            "vectors": self.vectors.detach(),
            "past": torch.stack(self.past),
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        data = io.BytesIO()
        torch.save(state, data)
        with replace_file(self.state_file) as temporary:
            temporary.write_bytes(data.getvalue())

    def load_state(self):
        """Resume where `save_state` left the class, exactly.

        Raises:
            UserError: a truncated or foreign file, or one of another model.
        """
        device = self.vectors.device
        try:
            state = torch.load(self.state_file, map_location=device, weights_only=True)
            found, needed = list(state["vectors"].shape), list(self.vectors.shape)
            if found != needed:
                raise ValueError(f"its vectors are {found}, not {needed}")
            with torch.no_grad():
                self.vectors.copy_(state["vectors"])
            self.past = list(state["past"])
            self.history = state["history"]
            self.best = state["best"]
            self.seconds = state["seconds"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # zip, pickle and torch raise their own kinds
            raise UserError(
                f"the half-trained token in '{self.state_file.parent}' is broken "
                f"({join_lines(error)[:200]}): --skip_exists False starts the class over"
            ) from error


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it, which has no infinity."""
    return round(value, 6) if math.isfinite(value) else None


def is_finite(line: dict) -> bool:
    """Return whether an update's loss and gradient were finite."""
    return line["loss"] is not None and line["grad_norm"] is not None


def loss_and_accuracy(history: list[dict]) -> list[tuple[float, float]]:
    """Return (loss, accuracy) of every update, with infinity for a non-finite loss."""
    found = []
    for line in history:
        loss = math.inf if line["loss"] is None else line["loss"]
        found.append((loss, line["accuracy"]))
    return found


def average_recent(history: list[tuple[float, float]], window: int) -> tuple[float, float]:
    """Average loss and accuracy over the last `window` updates."""
    last = history[-window:]
    losses = [loss for loss, _ in last]
    accuracies = [accuracy for _, accuracy in last]
    return sum(losses) / len(last), sum(accuracies) / len(last)


def judge_progress(
    history: list[tuple[float, float]], window: int, target_accuracy: float, early_stopping: int
) -> tuple[bool, str | None]:
    """After an update: whether its vectors are the best so far, and the reason to stop, if any.

    The best are those that reach the target accuracy, else those with the least averaged loss.
    `history` holds (loss, accuracy) of every update. Averages run over `window` updates and nothing
    counts before there are as many: one lucky update is neither the best nor a reason to stop.
    """
    if len(history) < window:
        return True, None
    ends = range(window, len(history) + 1)
    averages = [average_recent(history[:end], window) for end in ends]
    losses = [loss for loss, _ in averages]
    accuracy = averages[-1][1]
    if accuracy > target_accuracy:
        return True, f"accuracy {accuracy:.2f} is above {target_accuracy}"
    best = losses.index(min(losses))
    updates_since_best = len(losses) - 1 - best
    is_best = updates_since_best == 0
    if updates_since_best >= early_stopping:
        return is_best, f"no better loss in {early_stopping} updates"
    return is_best, None
