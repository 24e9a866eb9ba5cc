"""A loss that interrupts the second update, as Ctrl-C does."""

import torch

CALLS = []  # of this process; a test clears it
SECOND_UPDATE = 3  # after the check of the loss and the first update


def brightness(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    CALLS.append(len(images))
    if len(CALLS) == SECOND_UPDATE:
        raise KeyboardInterrupt
    return -images.mean((1, 2, 3))
