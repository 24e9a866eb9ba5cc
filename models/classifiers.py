"""Frozen differentiable classifiers: images [B, 3, H, W] in [0, 1] -> logits [B, C].

inet, inat, cub, miniature, miniature_evaluator    labels.py's REGISTRY <hub id or folder>
any transformers image classifier mean:<hub id or folder>                            a ViT-MAE
fine-tuning (mean of the patch tokens, see below) timm:<name>
any timm model; timm:local-dir:<folder> for one on disk zero-shot:<hub id or folder>
CLIP or SigLIP over the words of a text file (zero_shot.py)
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import timm
import torch
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification

from models.checkpoints import NO_REMOTE_CODE, load_network, opening_checkpoint
from models.hub import locate_source
from models.labels import (
    check_problem_type,
    folder_name,
    labels_of_config,
    list_alternatives,
    read_labels,
    resolve_name,
)
from models.preprocessing import load_preprocessing
from models.zero_shot import load_zero_shot
from prompt_datasets import class_number
from system.paths import split_revision
from utils import UserError, join_lines, require, to_printable


class Classifier(NamedTuple):
    """A frozen model with the preprocessing of its own library; `name` is fit for a folder."""

    name: str
    labels: list[str]
    model: torch.nn.Module
    # images [B, 3, H, W] in [0, 1] -> [B, 3, h, w], differentiable
    preprocess: Callable[[torch.Tensor], torch.Tensor]
    compute_logits: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    device: torch.device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, C], float32, differentiable in `images` [B, 3, H, W] in [0, 1]."""
        return self.compute_logits(self.model, self.preprocess(images.float())).float()


def load_classifier(
    name: str, device: str, height: int = 64, width: int = 64, labels_file: str | None = None
) -> Classifier:
    """The classifier called `name`, frozen, in float32, tried on a picture of that size.

    The head of this file explains names.

    `labels_file` is read by zero-shot classifiers alone. On the meta device its shapes alone, from
    its config, untried.

    Raises:
        UserError: one line that says what is missing or what the checkpoint is not.
    """
    kind, source = resolve_name(name)
    with opening_checkpoint(name, source, list_alternatives(name)):
        if kind == "zero-shot":
            loaded = load_zero_shot(source, read_labels(labels_file), device)
        elif kind == "timm":
            loaded = _load_timm(source, device)
        else:
            loaded = _load_transformers(source, device, mean_pooled=kind == "mean")
        labels, model, preprocess, compute_logits = loaded
        classifier = Classifier(
            folder_name(name), labels, model, preprocess, compute_logits, torch.device(device)
        )
        classifier.model.requires_grad_(False).eval().to(device)
    if device != "meta":
        check_classifier(classifier, name, height, width)
    return classifier


def load_evaluator(
    name: str,
    labels: list[str],
    device: str,
    height: int = 64,
    width: int = 64,
    labels_file: str | None = None,
) -> Classifier:
    """Load the classifier called `name`, which judges pictures for another classifier.

    `labels` are the other one's.

    Raises:
        UserError: as `load_classifier`; other classes, or another order: both tell classes by
            index.
    """
    evaluator = load_classifier(name, device, height, width, labels_file)
    require(
        evaluator.labels == labels,
        f"the evaluator '{name}' must know the same classes in the same order as the classifier",
    )
    return evaluator


def check_classifier(classifier: Classifier, name: str, height: int, width: int):
    """Classify one picture of noise and compute its gradient.

    Raises:
        UserError: the model does not fit its preprocessing or its labels, or no gradient reaches
            the picture.
    """
    count = len(classifier.labels)
    images = torch.rand(1, 3, height, width, device=classifier.device)
    try:
        with torch.enable_grad():
            logits = classifier(images.requires_grad_())
            gradient = torch.autograd.grad(logits.logsumexp(1).sum(), images, allow_unused=True)[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise whatever their arithmetic raises
        raise UserError(
            f"'{name}' cannot classify an RGB picture prepared by its own preprocessing, or "
            f"returns no gradient: {join_lines(error)[:200]}"
        ) from error
    require(
        logits.shape == (1, count),
        f"'{name}' gives {list(logits.shape)} logits for a picture but has {count} labels: they "
        "belong to another model",
    )
    require(count > 1, f"'{name}' has one class: its loss is always 0, so it cannot train a token")
    require(logits.isfinite().all(), f"'{name}' gives non-finite logits")
    require(
        gradient is not None and gradient.isfinite().all() and gradient.any(),
        f"'{name}' passes no gradient to the picture, so it cannot train a token",
    )


def load_labels(name: str, labels_file: str | None = None) -> list[str]:
    """Load only the labels, without the weights where the format allows it.

    `labels_file` is as in load_classifier.
    """
    kind, source = resolve_name(name)
    if kind == "zero-shot":
        return read_labels(labels_file)
    if kind == "timm":
        return load_classifier(name, "cpu").labels
    with opening_checkpoint(name, source, list_alternatives(name)):
        return labels_of_config(
            AutoConfig.from_pretrained(**locate_source(source), **NO_REMOTE_CODE).id2label, source
        )


def penultimate_features(classifier: Classifier, prepared: torch.Tensor) -> torch.Tensor:
    """Return what the last linear layer reads [B, D] for prepared images.

    Raises:
        UserError: the model does not end in a linear layer.
    """
    heads = [
        module
        for module in classifier.model.modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == len(classifier.labels)
    ]
    require(heads, f"features: '{classifier.name}' does not end in a linear layer over its classes")
    features = []
    hook = heads[-1].register_forward_hook(
        lambda module, inputs, output: features.append(inputs[0])
    )
    classifier.compute_logits(classifier.model, prepared)
    hook.remove()
    require(features, f"features: '{classifier.name}' does not use its last linear layer")
    return features[0].flatten(1)


def _mean_pooled_logits(model, pixel_values):
    """Compute the logits of ViT-MAE's fine-tuning head.

    The mean of the patch tokens BEFORE the final layernorm, then that layernorm, then a linear
    layer.
    """
    # [B, 1 + patches, D]
    hidden = model.vit(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-1]
    return model.classifier(model.vit.layernorm(hidden[:, 1:].mean(dim=1)))


def _load_transformers(source: str, device: str, mean_pooled: bool):
    require(
        AutoConfig.from_pretrained(**locate_source(source), **NO_REMOTE_CODE).model_type
        != "timm_wrapper",
        f"'{source}' is timm's: write timm:local-dir:<folder> or timm:hf-hub:<id>",
    )
    loader = ViTForImageClassification if mean_pooled else AutoModelForImageClassification
    model = load_network(loader, source, device)
    check_problem_type(model.config.problem_type, source)

    def compute_logits(model, pixel_values):
        return model(pixel_values=pixel_values).logits

    return (
        labels_of_config(model.config.id2label, source),
        model,
        load_preprocessing(source),
        _mean_pooled_logits if mean_pooled else compute_logits,
    )


def _load_timm(name: str, device: str):
    name, revision = (name, None) if is_timm_address(name) else split_revision(name)
    check_timm_name(name)
    overlay = {"hf_hub_id": f"{find_timm_id(name)}@{revision}"} if revision else None
    with torch.device("meta") if device == "meta" else nullcontext():
        model = timm.create_model(name, pretrained=device != "meta", pretrained_cfg_overlay=overlay)
    transform = create_transform(**resolve_model_data_config(model))
    labels = [join_lines(to_printable(label)) for label in _timm_labels(model)]
    return labels, model, transform, lambda model, pixels: model(pixels)


def is_timm_address(name: str) -> bool:
    """Return whether a timm name says itself where the checkpoint is."""
    return name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))


def check_timm_name(name: str):
    """Raise UserError for a name that timm does not know."""
    require(
        is_timm_address(name) or timm.is_model(name.split(".")[0]),
        f"timm knows no classifier '{name}'; timm.list_models(pretrained=True) lists them",
    )


def find_timm_id(name: str) -> str:
    """Find the hub id of the weights that timm uses for one of its names."""
    config = timm.get_pretrained_cfg(name)
    found = config.hf_hub_id or ""
    return f"{found}{config.architecture}.{config.tag}" if found.endswith("/") else found


def _timm_labels(model) -> list[str]:
    """Return the labels in the checkpoint, else ImageNet's if there are as many, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    descriptions = model.pretrained_cfg.get("label_descriptions")
    subset = infer_imagenet_subset(model)
    if names:
        found = None
        if isinstance(descriptions, dict):
            found = [descriptions.get(name, name) for name in names]
        return found or list(descriptions or names)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [f"class {class_number(i)}" for i in range(model.num_classes)]
