"""Small classifiers of 64 x 64 pictures, trained here on known pictures only."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from evaluation.read_image import load_squares
from prompt_datasets import TargetClass

SIDE, WIDTH = 64, 16
LR = 2e-3
ALIKE = 8  # pictures of a batch that the augmentation transforms alike, for speed
AUGMENTATION = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(10, (0.1, 0.1), (0.85, 1.15), fill=0.5),
        v2.ColorJitter(0.2, 0.2, 0.2),
    ]
)
Samples = tuple[torch.Tensor, torch.Tensor]  # pictures [N, 3, H, W] in [0, 1] and classes [N]


def new_classifier(labels: list[str]) -> ResNetForImageClassification:
    """Make a small ResNet with random weights."""
    config = ResNetConfig(
        embedding_size=WIDTH,
        hidden_sizes=[WIDTH, 2 * WIDTH, 3 * WIDTH, 4 * WIDTH],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return ResNetForImageClassification(config)


def train_classifier(
    labels: list[str], parts: list[Samples], steps: int, batch: int, seed: int, title: str
) -> ResNetForImageClassification:
    """Train a small ResNet with standard augmentation; `parts` share every batch evenly."""
    torch.manual_seed(seed)
    model = new_classifier(labels)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    model.train()
    for _ in tqdm(range(steps), desc=title, unit="step", mininterval=2):
        images, targets = sample_batch(parts, batch, generator)
        augmented = torch.cat([AUGMENTATION(some) for some in images.split(ALIKE)])
        optimizer.zero_grad()
        logits = model(augmented * 2 - 1).logits
        F.cross_entropy(logits, targets, label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def sample_batch(parts: list[Samples], batch: int, generator: torch.Generator) -> Samples:
    """Sample `batch` samples, equally many of each part."""
    size = batch // len(parts)
    rows = [torch.randint(len(images), (size,), generator=generator) for images, _ in parts]
    images = [part[chosen] for (part, _), chosen in zip(parts, rows, strict=True)]
    targets = [part[chosen] for (_, part), chosen in zip(parts, rows, strict=True)]
    return torch.cat(images), torch.cat(targets)


@torch.no_grad()
def measure_classifier(
    model: ResNetForImageClassification, images: torch.Tensor, targets: torch.Tensor
) -> list[float]:
    """Measure the accuracy on every class, in the classes' order."""
    predicted = torch.cat([model(part * 2 - 1).logits.argmax(1) for part in images.split(256)])
    return [(predicted[targets == i] == i).float().mean().item() for i in targets.unique()]


def save_classifier(model: ResNetForImageClassification, folder: Path):
    """Write a folder for --classifier; preprocessor_config.json comes last."""
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def load_sets(sets: dict[TargetClass, list[Path]]) -> Samples:
    """Load the pictures of some classes as tensors."""
    images, targets = [], []
    for target, files in sets.items():
        images.append(load_squares(files, SIDE, SIDE))
        targets += [target.index] * len(files)
    return torch.cat(images), torch.tensor(targets)
