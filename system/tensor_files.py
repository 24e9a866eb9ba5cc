"""Tensors on disk: our safetensors files, and images as PNG. Imports torch, which takes seconds."""

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from utils import broken_file_error, replace_file


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file of ours, and its header.

    Raises:
        UserError: a file that is truncated or not ours.
    """
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensors[key] = file.get_tensor(key)
            return tensors, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise broken_file_error(path, error) from error


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
):
    """Write a safetensors file, with the same bytes for the same content.

    The library writes its header in random order.
    """
    data = safetensors.torch.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    padding = -len(header) % 8  # the tensors start at a multiple of eight
    header += b" " * padding
    with replace_file(path) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Convert images [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3].

    On their device, so that fewer bytes leave a GPU.
    """
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def save_image(image: Image.Image, path: Path, **options):
    """Write one image in the format of its suffix, atomically."""
    with replace_file(path) as temporary:
        image.save(temporary, format=path.suffix[1:].upper(), **options)


def submit_images(
    pool: ThreadPoolExecutor,
    writes: list[Future],
    paths: list[Path],
    chosen: Iterable[int],
    pixels: np.ndarray,
):
    """Start writing uint8 [B, H, W, 3] to the paths with the indices `chosen` [B].

    Adds to `writes`.
    """
    for i, part in zip(chosen, pixels, strict=True):
        writes.append(pool.submit(save_image, Image.fromarray(part), paths[i]))


def save_pixels(pixels: np.ndarray, paths: list[Path]):
    """Write uint8 [B, H, W, 3] as PNG files, with four threads."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save_image, map(Image.fromarray, pixels), paths))
