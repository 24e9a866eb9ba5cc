"""Tensors to disk: our safetensors files, images as PNG. Not in utils.py, since torch takes seconds to import."""

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from utils import broken_file_error, replace_file, save_image


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file of ours, and its header; a UserError where it is truncated or not ours."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise broken_file_error(path, error) from error


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """Write a safetensors file, the same bytes for the same content: the library's own header is in random order."""
    data = safetensors.torch.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors start at a multiple of eight
    with replace_file(path) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3], converted on their device: fewer bytes leave a GPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def submit_images(pool: ThreadPoolExecutor, writes: list[Future], paths: list[Path], chosen: Iterable[int],
                  pixels: np.ndarray):
    """Start writing uint8 [B, H, W, 3] to those paths that the indices `chosen` [B] name; add to `writes`."""
    writes += [pool.submit(save_image, Image.fromarray(part), paths[i]) for i, part in zip(chosen, pixels, strict=True)]


def save_pixels(pixels: np.ndarray, paths: list[Path]):
    """Write uint8 [B, H, W, 3] as PNG files, on four threads."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save_image, map(Image.fromarray, pixels), paths))
