"""Small classifiers of small pictures, trained here: guides, or pupils, whose training is known exactly."""

from pathlib import Path

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from utils import load_images

SIDE, BATCH = 64, 64
ALIKE = 8  # pictures of a batch that standard augmentation turns and shifts alike
AUGMENTATION = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomAffine(10, (0.1, 0.1), (0.85, 1.15), fill=0.5),
                           v2.ColorJitter(0.2, 0.2, 0.2)])


def new_classifier(labels: list[str], seed: int, width: int = 32) -> ResNetForImageClassification:
    """A small ResNet for 64 x 64 pictures, the same for the same seed."""
    torch.manual_seed(seed)
    return ResNetForImageClassification(ResNetConfig(
        embedding_size=width, hidden_sizes=[width * times for times in (1, 2, 3, 4)], depths=[1, 1, 1, 1],
        layer_type="basic", id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)}))


def fit(model: ResNetForImageClassification, parts: list[tuple[torch.Tensor, torch.Tensor]], steps: int, seed: int,
        name: str, batch: int = BATCH) -> ResNetForImageClassification:
    """Train on (pictures [N, 3, H, W] in [0, 1], class numbers [N]); several parts share each batch evenly."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in tqdm(range(steps), desc=name, unit="step", mininterval=2):
        chosen = [torch.randint(len(images), (batch // len(parts),), generator=generator) for images, _ in parts]
        images = torch.cat([part[0][rows] for part, rows in zip(parts, chosen, strict=True)])
        images = torch.cat([AUGMENTATION(alike) for alike in images.split(ALIKE)])
        targets = torch.cat([part[1][rows] for part, rows in zip(parts, chosen, strict=True)])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images * 2 - 1).logits, targets, label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: ResNetForImageClassification, images: torch.Tensor, targets: torch.Tensor) -> float:
    predicted = torch.cat([model(part * 2 - 1).logits.argmax(1) for part in images.split(256)])
    return (predicted == targets).float().mean().item()


def save(model: ResNetForImageClassification, folder: Path):
    """As a folder that --classifier takes; the processor, which is written last, says that it is whole."""
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def is_saved(folder: Path) -> bool:
    return (folder / "preprocessor_config.json").exists()


def squares(files: list[Path], height: int, width: int) -> torch.Tensor:
    """Pictures [N, 3, height, width] in [0, 1] of files of any sizes, resized by the short side and cropped."""
    short = max(height, width)
    return torch.cat([F.center_crop(F.resize(load_images([file]), short, antialias=True), [height, width])
                      for file in files])


def as_tensors(sets: dict[int, list[Path]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, 3, SIDE, SIDE] and class numbers [N] of {class: files}."""
    files = [file for each in sets.values() for file in each]
    return squares(files, SIDE, SIDE), torch.tensor([index for index, each in sets.items() for _ in each])
