"""Frozen differentiable classifiers: images [B, 3, H, W] in [0, 1] -> logits [B, C], and what the classes are called.

    inet, inat, cub, miniature, miniature_evaluator    the registry below
    <hub id or folder>                                 any transformers image classifier
    mean:<hub id or folder>                            a ViT-MAE fine-tuning (mean of the patch tokens, see below)
    timm:<name>                                        any timm model; timm:local-dir:<folder> for one on disk
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

from utils import UserError, find_path, opening, require

REGISTRY = {
    "inet": "google/vit-large-patch16-224",
    "inat": "mean:vesteinn/vit-mae-inat21",
    "cub": "mean:vesteinn/vit-mae-cub",
    "miniature": "miniature/weights/classifier",
    "miniature_evaluator": "miniature/weights/evaluator",
}


class Preprocessing(NamedTuple):
    """What a checkpoint wants done to an image: resize (both sides, or the short one), centre crop, normalise."""

    size: tuple[int, int] | int  # (height, width), or the short side alone
    crop: tuple[int, int] | None
    interpolation: InterpolationMode
    mean: list[float]
    std: list[float]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        size = list(self.size) if isinstance(self.size, tuple) else [self.size]
        # bicubic overshoots at edges; a processor's 8-bit resize cuts that off, so we do
        images = TF.resize(images, size, self.interpolation, antialias=True).clamp(0, 1)
        if self.crop:
            images = TF.center_crop(images, list(self.crop))
        return TF.normalize(images, self.mean, self.std)


class Classifier(NamedTuple):
    """A frozen model with its own preprocessing; `name` is fit for a folder."""

    name: str
    labels: list[str]
    model: torch.nn.Module
    preprocessing: Preprocessing
    forward: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, C], float32, differentiable in `images` [B, 3, H, W] in [0, 1]."""
        return self.forward(self.model, self.preprocessing(images.float())).float()


def load_classifier(name: str, device: str) -> Classifier:
    """The classifier called `name` (see the head of this file), frozen, in float32.

    Raises:
        UserError: one line that says what is missing or what the checkpoint is not.
    """
    spec = REGISTRY.get(name, name)
    with opening(name):
        if spec.startswith("timm:"):
            model, labels, preprocessing, forward = _load_timm(spec.removeprefix("timm:"))
        else:
            model, labels, preprocessing, forward = _load_transformers(spec.removeprefix("mean:"),
                                                                       spec.startswith("mean:"))
    model.requires_grad_(False).eval().to(device)
    return Classifier(folder_name(name), labels, model, preprocessing, forward)


def load_labels(name: str) -> list[str]:
    """The labels alone, without the weights where the format allows it."""
    spec = REGISTRY.get(name, name)
    if spec.startswith("timm:"):
        return load_classifier(name, "cpu").labels
    source = spec.removeprefix("mean:")
    with opening(name):
        return _labels(AutoConfig.from_pretrained(str(find_path(source) or source)))


def folder_name(name: str) -> str:
    """A classifier's name as a folder: 'timm:resnet50' -> 'timm_resnet50', a path -> its last two parts."""
    return re.sub(r"[^\w.-]+", "_", "/".join(name.rstrip("/").split("/")[-2:])).strip("._")


def _labels(config) -> list[str]:
    labels = {int(i): label for i, label in config.id2label.items()}
    return [labels[i] for i in range(len(labels))]


def _logits(model, pixel_values):
    return model(pixel_values=pixel_values).logits


def _mean_pooled_logits(model, pixel_values):
    """ViT-MAE's fine-tuning head: patch tokens' mean BEFORE the final layernorm, then that layernorm, then linear."""
    hidden = model.vit(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-1]  # [B, 1 + patches, D]
    return model.classifier(model.vit.layernorm(hidden[:, 1:].mean(dim=1)))


def _load_transformers(source: str, mean_pooled: bool):
    source = str(find_path(source) or source)
    loader = ViTForImageClassification if mean_pooled else AutoModelForImageClassification
    model, report = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    require(not report["missing_keys"],
            f"'{source}' is not an image classifier as stored: it lacks {sorted(report['missing_keys'])[:3]}")
    processor = AutoImageProcessor.from_pretrained(source)
    return model, _labels(model.config), _from_processor(processor), _mean_pooled_logits if mean_pooled else _logits


def _from_processor(processor) -> Preprocessing:
    """Preprocessing as a transformers image processor describes it.

    ConvNeXt's `crop_pct` (short side = size / crop_pct below 384, then crop) is the one special rule in use.
    """
    settings = processor.to_dict()
    size, crop = settings["size"], settings.get("crop_size") if settings.get("do_center_crop") else None
    short = size.get("shortest_edge")
    if short and settings.get("crop_pct"):
        resize, crop = (int(short / settings["crop_pct"]), (short, short)) if short < 384 else ((short, short), None)
    elif short:
        resize = short
    else:
        resize = (size["height"], size["width"])
    if isinstance(crop, dict):
        crop = (crop["height"], crop["width"])
    normalised = settings.get("do_normalize", True)
    return Preprocessing(resize, crop, _interpolation(settings.get("resample", 2)),
                         settings["image_mean"] if normalised else [0.0] * 3,
                         settings["image_std"] if normalised else [1.0] * 3)


def _interpolation(resample: int) -> InterpolationMode:
    """Pillow's number, as processors store it."""
    modes = {0: InterpolationMode.NEAREST, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
    require(int(resample) in modes, f"resample {resample} has no differentiable counterpart here")
    return modes[int(resample)]


def _load_timm(name: str):
    try:
        model = timm.create_model(name, pretrained=True)
    except RuntimeError as error:  # timm's own way of saying that it knows no such model
        raise UserError(f"timm knows no pretrained model '{name}'; timm.list_models(pretrained=True) lists them: "
                        f"{error}") from error
    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    require(data["crop_mode"] in ("center", "squash"), f"timm crop_mode '{data['crop_mode']}' is not supported")
    scaled = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
    preprocessing = Preprocessing(scaled if data["crop_mode"] == "squash" else min(scaled), (height, width),
                                  InterpolationMode(data["interpolation"]), list(data["mean"]), list(data["std"]))
    return model, _timm_labels(model), preprocessing, lambda model, pixels: model(pixels)


def _timm_labels(model) -> list[str]:
    """Labels that the checkpoint carries, ImageNet-1k's for 1,000 classes, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    if names:
        return list(names)
    if model.num_classes == 1000:
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(i) for i in range(1000)]
    return [f"class {i + 1}" for i in range(model.num_classes)]
