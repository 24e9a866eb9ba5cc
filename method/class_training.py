"""One class while it learns: its optimiser step, when it stops, its history, and its state on disk."""

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
SKIPPED_AT_MOST = 10  # non-finite updates in a row: a scaler of float16 halves its scale of 2**10 so often
HISTORY_KEYS = ("update", "loss", "accuracy", "grad_norm", "vector_norm")


class TrainingSettings(NamedTuple):
    """What decides a token besides generator, sampling and classifier; config.py explains each."""

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


class TrainedToken(NamedTuple):
    """The best vectors [K, D], their loss and accuracy (averaged as the stop rules do), and how training went."""

    vectors: torch.Tensor
    loss: float
    accuracy: float
    every_update: torch.Tensor  # [updates, K, D]
    stopped: str  # why
    seconds: float


class Trainer:
    """What a class carries from update to update, whoever shares its batches."""

    def __init__(self, target: TargetClass, vectors: torch.Tensor, settings: TrainingSettings, dtype: torch.dtype,
                 history_file: Path, state_file: Path, image_folder: Path):
        """Start from `vectors` [K, D], or from `state_file` where there is one; `dtype` is the generator's."""
        self.target, self.settings, self.dtype = target, settings, dtype
        self.history_file, self.state_file, self.image_folder = history_file, state_file, image_folder
        self.vectors = vectors.detach().clone().requires_grad_()
        beta1, beta2 = settings.betas
        self.optimizer = torch.optim.AdamW([self.vectors], settings.lr, (beta1, beta2), settings.eps,
                                           settings.weight_decay)
        self.scaler = torch.amp.GradScaler(vectors.device.type, init_scale=2.0**10, enabled=dtype == torch.float16)
        self.history: list[dict] = []  # of HISTORY_KEYS
        self.past: list[torch.Tensor] = []  # the vectors that each update's images were drawn with
        self.best, self.seconds = 0, 0.0  # the update whose vectors are the best so far; this class's share of the time
        if state_file.exists():
            self.load_state()
        self.bar = tqdm(total=settings.num_train_epochs, initial=len(self.history), desc=f"training {target.title}",
                        unit="update", leave=False)

    def next_images(self) -> PromptDataset:
        """The next update's prompts and seeds."""
        settings = self.settings
        first = settings.seed + (len(self.history) * settings.epoch_size if settings.fresh_noise else 0)
        return PromptDataset(f"{settings.placeholder_token} {self.target.name}",
                             TEMPLATES[:settings.number_of_prompts], list(range(first, first + settings.epoch_size)))

    def image_weights(self) -> torch.Tensor:
        """[N], so that the sum of the weighted losses is their mean, times the scale that float16 needs."""
        size = self.settings.epoch_size
        return self.scaler.scale(torch.full((size,), 1 / size, device=self.vectors.device))

    def list_image_paths(self) -> list[Path]:
        """Where the next update's images go."""
        return [self.image_folder / f"{len(self.history):03d}" / f"{seed}.png" for seed in self.next_images().seeds]

    def finish_update(self, losses: torch.Tensor, correct: torch.Tensor, seconds: float):
        """Record what an update's images gave and step the optimiser.

        Returns a TrainedToken at the end of training, a UserError where it diverged, else None. A non-finite loss or
        gradient leaves the vectors as they are.
        """
        update, settings = len(self.history), self.settings
        self.seconds += seconds
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_([self.vectors], settings.max_grad_norm).item()
        loss, accuracy = losses.mean().item(), correct.mean().item()
        if not math.isfinite(loss):
            accuracy = 0.0  # of non-finite logits class 1 would be the largest
        self.history.append({"update": update, "loss": finite_or_none(loss), "accuracy": round(accuracy, 6),
                             "grad_norm": finite_or_none(grad_norm),
                             "vector_norm": round(self.vectors.norm().item(), 6)})
        self.past.append(self.vectors.detach().clone())
        improved, stop = judge_progress(loss_and_accuracy(self.history), self.averaged_updates,
                                        settings.target_accuracy, settings.early_stopping)
        self.best = update if improved else self.best
        if not stop and update + 1 == settings.num_train_epochs:
            stop = "the last update"
        failure = self.divergence_error(bool(stop)) or self.zero_gradient_error()
        if failure:
            self.bar.close()
            return failure
        write_text(self.history_file, "".join(json.dumps(line) + "\n" for line in self.history))
        self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
        self.bar.update()
        if stop:
            self.bar.close()
            until_best = loss_and_accuracy(self.history)[:self.best + 1]
            return TrainedToken(self.past[self.best], *average_recent(until_best, self.averaged_updates),
                                torch.stack(self.past), stop, self.seconds)
        if is_finite(self.history[-1]):
            self.scaler.step(self.optimizer)
        self.scaler.update()  # a lower scale, where float16 was too narrow
        self.optimizer.zero_grad()
        self.save_state()
        return None

    @property
    def averaged_updates(self) -> int:
        return AVERAGED_UPDATES if self.settings.fresh_noise else 1

    def zero_gradient_error(self) -> UserError | None:
        """Where the first update cannot move the vectors, no later one can: weight decay alone would."""
        line = self.history[-1]
        if len(self.history) > 1 or self.vectors.grad.any() or not is_finite(line) \
                or line["accuracy"] > self.settings.target_accuracy:  # the class is right already
            return None
        cause = "float16 may be too narrow for it: try --mixed_precision bf16 or no" if self.scaler.is_enabled() else \
            "the loss does not depend on the token (every pixel black or white, or a loss that is constant)"
        return UserError(f"the gradient of the first update of class {self.target.title} is exactly zero: {cause}")

    def divergence_error(self, is_last: bool) -> UserError | None:
        """Why to give up: too many non-finite updates in a row, or nothing else until the last."""
        skipped = 0
        while skipped < len(self.history) and not is_finite(self.history[-1 - skipped]):
            skipped += 1
        repeats = not self.settings.fresh_noise and not self.scaler.is_enabled()  # the next update would be the same
        if skipped <= (0 if repeats else SKIPPED_AT_MOST) and not (is_last and skipped == len(self.history)):
            return None
        what = "loss" if self.history[-1]["loss"] is None else "gradient"
        cause, remedy = {
            torch.float16: ("float16 may be too narrow for this model", ", or --mixed_precision bf16 or no"),
            torch.bfloat16: ("the token may have diverged", ", or --mixed_precision no"),
        }.get(self.dtype, ("the token may have diverged", ""))
        return UserError(f"update {self.history[-1]['update']} of class {self.target.title} has a non-finite {what}"
                         f"{f', as the last {skipped} updates' * (skipped > 1)}: {cause}; try a lower --lr than "
                         f"{self.settings.lr}{remedy}")

    def save_state(self):
        """Write what the next update needs: a kill loses the update in flight at most."""
        data = io.BytesIO()
        torch.save({"vectors": self.vectors.detach(), "past": torch.stack(self.past), "history": self.history,
                    "best": self.best, "seconds": self.seconds, "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict()}, data)
        with replace_file(self.state_file) as temporary:
            temporary.write_bytes(data.getvalue())

    def load_state(self):
        """Resume where `save_state` left the class, exactly.

        Raises:
            UserError: a truncated or foreign file, or one of another model.
        """
        try:
            state = torch.load(self.state_file, map_location=self.vectors.device, weights_only=True)
            if state["vectors"].shape != self.vectors.shape:
                raise ValueError(f"its vectors are {list(state['vectors'].shape)}, not {list(self.vectors.shape)}")
            with torch.no_grad():
                self.vectors.copy_(state["vectors"])
            self.past, self.history = list(state["past"]), state["history"]
            self.best, self.seconds = state["best"], state["seconds"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # zip, pickle and torch raise their own kinds
            raise UserError(f"the half-trained token in '{self.state_file.parent}' is broken "
                            f"({join_lines(error)[:200]}): --skip_exists False starts the class over") from error


def finite_or_none(value: float) -> float | None:
    """As JSON has it, which has no infinity."""
    return round(value, 6) if math.isfinite(value) else None


def is_finite(line: dict) -> bool:
    """Whether an update's loss and gradient were finite."""
    return line["loss"] is not None and line["grad_norm"] is not None


def loss_and_accuracy(history: list[dict]) -> list[tuple[float, float]]:
    return [(math.inf if line["loss"] is None else line["loss"], line["accuracy"]) for line in history]


def average_recent(history: list[tuple[float, float]], window: int) -> tuple[float, float]:
    """Loss and accuracy averaged over the last `window` updates."""
    last = history[-window:]
    return tuple(sum(values) / len(last) for values in zip(*last, strict=True))


def judge_progress(history: list[tuple[float, float]], window: int, target_accuracy: float,
                   early_stopping: int) -> tuple[bool, str | None]:
    """After an update: whether its vectors are the best so far, and the reason to stop, if there is one.

    The best are those that reach the target accuracy, else those with the least averaged loss. `history` holds (loss,
    accuracy) of every update. Averages run over `window` updates and nothing counts before there are as many: one
    lucky update is neither the best nor a reason to stop.
    """
    averages = [average_recent(history[:end], window) for end in range(window, len(history) + 1)]
    if not averages:
        return True, None
    losses, accuracy = [loss for loss, _ in averages], averages[-1][1]
    best = losses.index(min(losses))
    improved = best == len(losses) - 1
    if accuracy > target_accuracy:
        return True, f"accuracy {accuracy:.2f} is above {target_accuracy}"
    if len(losses) - 1 - best >= early_stopping:
        return improved, f"no better loss in {early_stopping} updates"
    return improved, None
