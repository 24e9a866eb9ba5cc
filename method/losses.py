"""Losses: any differentiable function of images, classes and vectors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.classifiers import Classifier
from models.generator import Generator
from utils import UserError, import_function, join_lines, require

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Images [B, 3, H, W] in [0, 1], classes [B] and vectors [B, K, D] -> loss [B] and correct [B]."""


def cross_entropy(classifier: Classifier, generator: Generator | None = None) -> Loss:
    """Return the cross-entropy of a frozen classifier (Sec. 3.1)."""

    def compute_loss(images, targets, vectors=None):
        logits = classifier(images)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets

    return compute_loss


def norm_penalty(classifier: Classifier, generator: Generator) -> Loss:
    """Return the cross-entropy plus a penalty on vectors whose norm is not the vocabulary's.

    The penalty is the squared distance of the norm from the vocabulary's mean norm, in units of
    that mean. It keeps the token among words that the text encoder knows, against images that
    please only the classifier.
    """
    compute_cross_entropy, norms = cross_entropy(classifier), generator.vocabulary_norms()

    def compute_loss(images, targets, vectors):
        loss, correct = compute_cross_entropy(images, targets)
        parts = vectors.split(generator.token_widths, dim=-1)  # [B, K, W] of every text encoder
        excess = torch.stack(
            [part.norm(dim=-1) / norm - 1 for part, norm in zip(parts, norms, strict=True)]
        )
        return loss + excess.square().mean((0, 2)), correct

    return compute_loss


LOSSES = {"cross_entropy": cross_entropy, "norm_penalty": norm_penalty}


def build_loss(name: str, classifier: Classifier, generator: Generator) -> Loss:
    """Build a loss of LOSSES, or of 'module:function', a function of images and targets.

    The classifier always decides whether an image is correct.

    Raises:
        UserError: no such function, or one that gives no loss to learn from.
    """
    if name in LOSSES:
        return LOSSES[name](classifier, generator)
    function = import_function(name, "loss")
    check_function(function, name, classifier.device)

    def compute_loss(images, targets, vectors):
        with torch.no_grad():
            correct = classifier(images).argmax(1) == targets
        return function(images, targets).float(), correct

    return compute_loss


def check_function(function: Callable, name: str, device: torch.device):
    """Raise UserError unless two noise images get finite losses [2] with a gradient."""
    images = torch.rand(2, 3, 64, 64, device=device, requires_grad=True)
    targets = torch.zeros(2, device=device).long()
    try:
        with torch.enable_grad():
            losses = function(images, targets)
            (gradient,) = torch.autograd.grad(losses.flatten()[0], images, allow_unused=True)
    except Exception as error:  # a user's function raises what it raises
        raise UserError(
            f"loss '{name}' fails on images [2, 3, 64, 64] and targets [2], or gives no gradient: "
            f"{type(error).__name__} {join_lines(error)[:200]}"
        ) from error
    require(
        losses.shape == (2,),
        f"loss '{name}' gives {list(losses.shape)} for two images; it must give [2]",
    )
    require(
        losses.isfinite().all()
        and gradient is not None
        and gradient.isfinite().all()
        and gradient[0].any(),
        f"loss '{name}' gives a non-finite loss, or no gradient for the images",
    )
    require(
        not gradient[1].any(),
        f"loss '{name}' of an image depends on the others, so the batch size would change the "
        "token",
    )
