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

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

from opening import opening
from utils import WITHOUT_GPU_OR_NETWORK, did_you_mean, find_path, printable, require

NO_STRANGERS_CODE = {"trust_remote_code": False}  # left open, transformers asks the user
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
    crop_rounds_down: bool = True  # an odd margin's half pixel: transformers rounds down, torchvision to even

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        size = list(self.size) if isinstance(self.size, tuple) else [self.size]
        # bicubic overshoots at edges; a processor's 8-bit resize cuts that off, so we do
        images = TF.resize(images, size, self.interpolation, antialias=True).clamp(0, 1)
        if self.crop and self.crop_rounds_down:
            top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], self.crop, strict=True))
            images = TF.crop(images, top, left, *self.crop)
        elif self.crop:
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
    kind, source = _resolve(name)
    with opening(name, source, other_than(name)):
        if kind == "timm":
            model, labels, preprocessing, forward = _load_timm(source)
        else:
            model, labels, preprocessing, forward = _load_transformers(source, mean_pooled=kind == "mean")
    model.requires_grad_(False).eval().to(device)
    return Classifier(folder_name(name), labels, model, preprocessing, forward)


def other_than(name: str) -> str:
    """What to take where `name` cannot be had."""
    known = [*REGISTRY, "inception"]
    return f"{did_you_mean(name, known)} or take one of {', '.join(REGISTRY)}, {WITHOUT_GPU_OR_NETWORK}".strip()


def load_labels(name: str) -> list[str]:
    """The labels alone, without the weights where the format allows it."""
    kind, source = _resolve(name)
    if kind == "timm":
        return load_classifier(name, "cpu").labels
    with opening(name, source, other_than(name)):
        return _labels(AutoConfig.from_pretrained(source, **NO_STRANGERS_CODE))


def penultimate(classifier: Classifier, prepared: torch.Tensor) -> torch.Tensor:
    """Features [B, D] that the last linear layer reads, for images that `classifier.preprocessing` has prepared.

    Raises:
        UserError: the model does not end in a linear layer.
    """
    heads = [module for module in classifier.model.modules()
             if isinstance(module, torch.nn.Linear) and module.out_features == len(classifier.labels)]
    require(heads, f"features: '{classifier.name}' does not end in a linear layer over its classes")
    features = []
    hook = heads[-1].register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    classifier.forward(classifier.model, prepared)
    hook.remove()
    return features[0].flatten(1)


def _resolve(name: str) -> tuple[str, str]:
    """A name as its kind ('timm', 'mean' or '') and the folder, hub id or timm name that it stands for."""
    spec = REGISTRY.get(name, name)
    kind = next((kind for kind in ("timm", "mean") if spec.startswith(f"{kind}:")), "")
    source = spec.removeprefix(f"{kind}:")
    return kind, source if kind == "timm" else str(find_path(source) or source)


def folder_name(name: str) -> str:
    """A classifier's name as a folder: 'timm:resnet50' -> 'timm_resnet50', a path -> its last two parts."""
    return re.sub(r"[^\w.-]+", "_", "/".join(name.rstrip("/").split("/")[-2:])).strip("._")[-80:] or "classifier"


def _labels(config) -> list[str]:
    labels = {int(i): str(label) for i, label in config.id2label.items()}
    require(labels, "its config.json names no classes (id2label)")
    return [one_line(labels[i]) for i in range(len(labels))]


def one_line(label: str) -> str:
    return " ".join(printable(label).split())


def _logits(model, pixel_values):
    return model(pixel_values=pixel_values).logits


def _mean_pooled_logits(model, pixel_values):
    """ViT-MAE's fine-tuning head: patch tokens' mean BEFORE the final layernorm, then that layernorm, then linear."""
    hidden = model.vit(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-1]  # [B, 1 + patches, D]
    return model.classifier(model.vit.layernorm(hidden[:, 1:].mean(dim=1)))


def _load_transformers(source: str, mean_pooled: bool):
    loader = ViTForImageClassification if mean_pooled else AutoModelForImageClassification
    model, report = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **NO_STRANGERS_CODE)
    require(not report["missing_keys"],
            f"'{source}' is not an image classifier as stored: it lacks {sorted(report['missing_keys'])[:3]}")
    preprocessing = _from_processor(AutoImageProcessor.from_pretrained(source, **NO_STRANGERS_CODE))
    return model, _labels(model.config), preprocessing, _mean_pooled_logits if mean_pooled else _logits


def _from_processor(processor) -> Preprocessing:
    """Preprocessing as a transformers image processor describes it, checked against that processor on one picture.

    ConvNeXt's `crop_pct` (short side = size / crop_pct below 384, then crop) is the one special rule we know.

    Raises:
        UserError: the processor does something else besides; `timm:<name>` is the way for timm's models on the hub.
    """
    settings = processor.to_dict()
    name = type(processor).__name__
    require("size" in settings, f"its {name} names no image size; a timm model is called timm:hf-hub:<hub id>")
    preprocessing = _described(settings)
    pixels = np.random.default_rng(0).integers(0, 256, (320, 400, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    ours = preprocessing(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    levels = (ours - theirs).abs().mean() * max(preprocessing.std) * 255 if ours.shape == theirs.shape else math.inf
    require(levels < 1, f"its {name} does more than resize, centre crop and normalise")  # two roundings to 8 bits
    return preprocessing


def _described(settings: dict) -> Preprocessing:
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
    normalised = settings.get("do_normalize")
    return Preprocessing(resize, crop, _interpolation(settings.get("resample", 2)),
                         settings["image_mean"] if normalised else [0.0] * 3,
                         settings["image_std"] if normalised else [1.0] * 3)


def _interpolation(resample: int) -> InterpolationMode:
    """Pillow's number, as processors store it."""
    modes = {0: InterpolationMode.NEAREST, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
    require(int(resample) in modes, f"resample {resample} has no differentiable counterpart here")
    return modes[int(resample)]


def _load_timm(name: str):
    require(name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name.split(".")[0]),
            f"timm knows no classifier '{name}'; timm.list_models(pretrained=True) lists them")
    model = timm.create_model(name, pretrained=True)
    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    require(data["crop_mode"] in ("center", "squash"), f"timm crop_mode '{data['crop_mode']}' is not supported")
    scaled = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
    preprocessing = Preprocessing(scaled if data["crop_mode"] == "squash" else min(scaled), (height, width),
                                  InterpolationMode(data["interpolation"]), list(data["mean"]), list(data["std"]),
                                  crop_rounds_down=False)
    return model, list(map(one_line, _timm_labels(model))), preprocessing, lambda model, pixels: model(pixels)


def _timm_labels(model) -> list[str]:
    """Labels that the checkpoint carries, else those of the ImageNet with as many classes, else numbers."""
    names, told = model.pretrained_cfg.get("label_names"), model.pretrained_cfg.get("label_descriptions")
    subset = infer_imagenet_subset(model)
    if names:
        return [told.get(name, name) for name in names] if isinstance(told, dict) else list(told or names)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [f"class {i + 1}" for i in range(model.num_classes)]
