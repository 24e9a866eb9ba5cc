"""One class that is being learned: its vector, optimiser and history, when it stops, how it goes on after a kill."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from class_token import initial_vector
from config import RunConfig
from diffusion import Components
from prompt_datasets import class_title
from utils import UserError, read_json_lines, read_tensors, write_tensors, write_text

AVERAGED_UPDATES = 3  # with fresh noise one update's few images can be lucky
SKIPPED_AT_MOST = 10  # updates without numbers in a row: a scaler of float16 halves its scale of 2**10 so often
STATE_FILE = "training_state.safetensors"
HISTORY_FILE = "history.jsonl"
LINE = ("update", "loss", "accuracy", "grad_norm", "vector_norm")  # of the history


class Job(NamedTuple):
    """A class (index from 0) to be learned, the name that its prompts use, the folders of its files, its label."""

    class_index: int
    class_name: str
    tokens: Path
    images: Path
    label: str = ""

    @property
    def title(self) -> str:
        return class_title(self.class_index, self.label or self.class_name)


class Trained(NamedTuple):
    """The best vector [D], its loss (averaged as the stop rules do), every update's vector and why the loop stopped."""

    vector: torch.Tensor
    loss: float
    accuracy: float
    vectors: torch.Tensor  # [updates, D]
    stopped: str
    seconds: float


@dataclass(eq=False)
class Learner:
    """What a class carries from update to update, whoever shares its batches."""

    job: Job
    vector: torch.Tensor  # [D], float32
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    bar: tqdm | None = None
    history: list[dict] = field(default_factory=list)  # an update's loss, accuracy and norms
    vectors: list[torch.Tensor] = field(default_factory=list)
    best: int = 0  # the update whose vector is the one to keep so far
    seconds: float = 0.0  # its share of what the updates took

    def image_path(self, seed: int) -> Path:
        return self.job.images / "train" / f"{len(self.history):03d}" / f"{seed}.png"


def start(config: RunConfig, components: Components, job: Job) -> Learner:
    """A class at its first update, or where `save_progress` left it."""
    vector = initial_vector(components.tokenizer, components.text_encoder, config.initializer_token)
    vector = vector.to(components.device).requires_grad_()
    optimizer = torch.optim.AdamW([vector], config.lr, tuple(config.betas), config.eps, config.weight_decay)
    scaler = torch.amp.GradScaler(components.device.type, init_scale=2.0**10,
                                  enabled=components.unet.dtype == torch.float16)
    learner = Learner(job, vector, optimizer, scaler)
    if (job.tokens / STATE_FILE).exists():
        load_progress(learner)
    learner.bar = tqdm(total=config.num_train_epochs, initial=len(learner.history), desc=f"training {job.title}",
                       unit="update")
    return learner


def update(config: RunConfig, learner: Learner, loss: float, accuracy: float) -> Trained | UserError | None:
    """Take note of an update's images and move the vector; at the end, what was learned or why nothing was.

    Where loss or gradient is no number the vector stays; the end if that goes on.
    """
    number = len(learner.history)
    learner.scaler.unscale_(learner.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_([learner.vector], config.max_grad_norm).item()
    if not math.isfinite(loss):
        loss, accuracy = math.inf, 0.0  # of logits that are no numbers class 1 would be the largest
    learner.history.append({"update": number, "loss": number_or_none(loss), "accuracy": round(accuracy, 6),
                            "grad_norm": number_or_none(grad_norm),
                            "vector_norm": round(learner.vector.norm().item(), 6)})
    learner.vectors.append(learner.vector.detach().clone())
    improved, stop = verdict(measured(learner), window_of(config), config.target_accuracy, config.early_stopping)
    if improved:
        learner.best = number
    if not stop and number + 1 == config.num_train_epochs:
        stop = "the last update"
    failure = hopeless(config, learner, bool(stop))
    if failure:
        learner.bar.close()
        return failure
    write_text(learner.job.tokens / HISTORY_FILE, "".join(json.dumps(line) + "\n" for line in learner.history))
    learner.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
    learner.bar.update()
    if stop:
        return finish(config, learner, stop)
    if moves(learner.history[-1]):
        learner.scaler.step(learner.optimizer)
    learner.scaler.update()  # a lower scale, where float16 was too narrow
    learner.optimizer.zero_grad()
    save_progress(learner)
    return None


def number_or_none(value: float) -> float | None:
    """As JSON has it, which knows no inf."""
    return round(value, 6) if math.isfinite(value) else None


def moves(line: dict) -> bool:
    """Whether an update's loss and gradient were numbers."""
    return line["loss"] is not None and line["grad_norm"] is not None


def hopeless(config: RunConfig, learner: Learner, last: bool) -> UserError | None:
    """Why it is no use to go on, where too many updates in a row gave no numbers, or all of them until the last."""
    skipped = 0
    while skipped < len(learner.history) and not moves(learner.history[-1 - skipped]):
        skipped += 1
    stuck = not config.fresh_noise and not learner.scaler.is_enabled()  # the next update would be the same
    if skipped <= (0 if stuck else SKIPPED_AT_MOST) and not (last and skipped == len(learner.history)):
        return None
    what = "loss" if learner.history[-1]["loss"] is None else "gradient"
    cause, remedy = {
        "fp16": ("float16 may be too narrow for this model", ", or --mixed_precision bf16 or no"),
        "bf16": ("the vector may have gone too far", ", or --mixed_precision no"),
        "no": ("the vector may have gone too far", "")}[config.mixed_precision]
    return UserError(f"update {learner.history[-1]['update']} of class {learner.job.title} gave no number as its "
                     f"{what}{f', the last {skipped} updates neither' * (skipped > 1)}: {cause}; try a lower --lr than "
                     f"{config.lr}{remedy}")


def save_progress(learner: Learner):
    """Write what the next update needs: a kill loses the update in flight at most."""
    state = {f"optimizer.{key}": value for key, value in learner.optimizer.state.get(learner.vector, {}).items()}
    write_tensors(learner.job.tokens / STATE_FILE,
                  {**state, "vector": learner.vector.detach(), "vectors": torch.stack(learner.vectors)},
                  {"best": str(learner.best), "scaler": json.dumps(learner.scaler.state_dict()),
                   "seconds": str(learner.seconds)})


def load_progress(learner: Learner):
    """Go on from where `save_progress` left the class, exactly.

    Raises:
        UserError: its files are not whole, or not ours.
    """
    state, history = (learner.job.tokens / name for name in (STATE_FILE, HISTORY_FILE))
    try:
        restore(learner, *read_tensors(state), read_json_lines(history, *LINE))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the half-trained token in '{state.parent}' is broken ({' '.join(str(error).split())}): "
                        "remove that folder to train the class anew") from error


def restore(learner: Learner, tensors: dict[str, torch.Tensor], header: dict[str, str], history: list[dict]):
    """Set a learner that has just started to what `save_progress` wrote.

    Raises:
        KeyError, ValueError: something is missing, or of another model.
    """
    device, size = learner.vector.device, learner.vector.shape
    vector, vectors = tensors.pop("vector"), tensors.pop("vectors")
    if not vector.shape == vectors.shape[1:] == size or any(each.shape not in (size, ()) for each in tensors.values()):
        raise ValueError(f"it is not of a vector of {len(learner.vector)} numbers")
    if len(history) < len(vectors):
        raise ValueError(f"its history has {len(history)} of {len(vectors)} updates")
    learner.vectors, learner.history = list(vectors.to(device)), history[:len(vectors)]
    learner.best = int(header["best"])
    moments = {f"optimizer.{name}" for name in ("step", "exp_avg", "exp_avg_sq")}
    if tensors.keys() != (moments if any(map(moves, learner.history)) else set()):
        raise ValueError("it lacks what AdamW remembers")
    if not 0 <= learner.best < len(vectors):
        raise ValueError(f"its best update is {learner.best} of {len(vectors)}")
    verdict(measured(learner), 1, 1, 1)  # of numbers
    with torch.no_grad():
        learner.vector.copy_(vector)
    learner.optimizer.state[learner.vector] = {
        key.removeprefix("optimizer."): value if key == "optimizer.step" else value.to(device)
        for key, value in tensors.items()}
    learner.scaler.load_state_dict(json.loads(header["scaler"]))
    learner.seconds = float(header["seconds"])


def finish(config: RunConfig, learner: Learner, stopped: str) -> Trained:
    """What was learned: the best vector so far, and how good it was."""
    learner.bar.close()
    loss, accuracy = recent(measured(learner)[:learner.best + 1], window_of(config))
    return Trained(learner.vectors[learner.best], loss, accuracy, torch.stack(learner.vectors), stopped,
                   learner.seconds)


def measured(learner: Learner) -> list[tuple[float, float]]:
    return [(math.inf if line["loss"] is None else line["loss"], line["accuracy"]) for line in learner.history]


def window_of(config: RunConfig) -> int:
    return AVERAGED_UPDATES if config.fresh_noise else 1


def recent(history: list[tuple[float, float]], window: int) -> tuple[float, float]:
    """Loss and accuracy averaged over the last `window` updates."""
    last = history[-window:]
    return tuple(sum(values) / len(last) for values in zip(*last, strict=True))


def verdict(history: list[tuple[float, float]], window: int, target_accuracy: float,
            early_stopping: int) -> tuple[bool, str | None]:
    """After an update: is it the one to keep so far, and the reason to stop, if there is one.

    To keep is what reaches the target accuracy, and else what has the least averaged loss.

    `history` holds (loss, accuracy) of every update so far. Averages run over `window` updates and nothing counts
    before there are as many: one lucky update is neither the best nor a reason to stop.
    """
    averages = [recent(history[:end], window) for end in range(window, len(history) + 1)]
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
