"""Learn one class token: draw, classify, backpropagate through the final denoising step alone (Sec. 3)."""

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from class_token import initial_vector, spliced
from classifiers import Classifier
from config import RunConfig
from diffusion import Components, encode_prompts, generate_images
from prompt_datasets import TEMPLATES, PromptDataset, class_title
from utils import require, save_images

AVERAGED_UPDATES = 3  # with fresh noise one update's few images can be lucky


class Trained(NamedTuple):
    """The best vector [D], its loss (averaged as the stop rules do), every update's vector and why the loop stopped."""

    vector: torch.Tensor
    loss: float
    accuracy: float
    vectors: torch.Tensor  # [updates, D]
    stopped: str


def train_token(config: RunConfig, components: Components, token_id: int, classifier: Classifier, class_index: int,
                class_name: str, image_folder: Path, history_path: Path) -> Trained:
    """Learn v_c for class `class_index` (from 0); images go to `image_folder`, one line an update to `history_path`.

    Raises:
        UserError: the loss is not finite.
    """
    vector = initial_vector(components.tokenizer, components.text_encoder, config.initializer_token)
    vector.requires_grad_()
    optimizer = torch.optim.AdamW([vector], config.lr, tuple(config.betas), config.eps, config.weight_decay)
    half = components.unet.dtype == torch.float16
    scaler = torch.amp.GradScaler(components.device.type, init_scale=2.0**10, enabled=half)
    window = AVERAGED_UPDATES if config.fresh_noise else 1
    history, vectors, best, stop = [], [], None, None
    bar = tqdm(range(config.num_train_epochs), desc=f"training {class_title(class_index, class_name)}", unit="update")
    for update in bar:
        started = time.perf_counter()
        loss, accuracy = accumulate_gradient(config, components, classifier, class_index, class_name, token_id, vector,
                                             update, scaler, image_folder / f"{update:03d}")
        require(math.isfinite(loss), f"the loss of update {update} is {loss}: try --mixed_precision bf16 or no, or a "
                                     f"lower --lr than {config.lr}")
        history.append((loss, accuracy))
        vectors.append(vector.detach().clone())
        improved, stop = verdict(history, window, config.target_accuracy, config.early_stopping)
        if improved:
            best = vectors[-1], *recent(history, window)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_([vector], config.max_grad_norm).item()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}")
        with history_path.open("a") as lines:
            lines.write(json.dumps({"update": update, "loss": loss, "accuracy": accuracy, "grad_norm": grad_norm,
                                    "vector_norm": vector.norm().item(),
                                    "seconds": round(time.perf_counter() - started, 3)}) + "\n")
        if stop:
            break
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return Trained(*best, torch.stack(vectors), stop or "the last update")


def accumulate_gradient(config: RunConfig, components: Components, classifier: Classifier, class_index: int,
                        class_name: str, token_id: int, vector: torch.Tensor, update: int,
                        scaler: torch.amp.GradScaler, image_folder: Path) -> tuple[float, float]:
    """One update's images, batch by batch: add dL/dv to `vector.grad`; return the mean loss and the share right."""
    first = config.seed + (update * config.epoch_size if config.fresh_noise else 0)
    dataset = PromptDataset(f"{config.placeholder_token} {class_name}", TEMPLATES[:config.number_of_prompts],
                            list(range(first, first + config.epoch_size)))
    loss, right = 0.0, 0
    for batch in DataLoader(dataset, config.batch_size):
        with spliced(components.text_encoder, token_id, vector):
            prompt_embeds = encode_prompts(components, batch["prompt"])
        images = generate_images(components, prompt_embeds, batch["seed"].tolist(), config.height, config.width,
                                 config.guidance_scale, config.num_inference_steps, config.train_timesteps)
        logits = classifier(images)
        targets = torch.full((len(images),), class_index, device=logits.device)
        batch_loss = F.cross_entropy(logits, targets, reduction="sum") / config.epoch_size
        scaler.scale(batch_loss).backward()
        loss += batch_loss.item()
        right += (logits.argmax(1) == targets).sum().item()
        save_images(images, [image_folder / f"{seed}.png" for seed in batch["seed"].tolist()])
    return loss, right / config.epoch_size


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
