"""What an image is scored by: any differentiable function of images and target classes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def classifier_loss(classifier) -> Loss:
    """Cross-entropy of a frozen classifier (Sec. 3.1).

    The loss takes images [B, 3, H, W] in [0, 1] and target classes [B], and gives loss [B] and correct [B].
    """
    def cross_entropy(images, targets):
        logits = classifier(images)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets

    return cross_entropy
