"""The trained vectors v_c, which stand before a class name: how they are stored."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from utils import UserError, join_lines, require, write_tensors


class ClassToken(NamedTuple):
    """The word that stands for a class's vectors in prompts, the vectors [K, D], float32, and what the file says."""

    placeholder: str
    vectors: torch.Tensor
    header: dict[str, str]


def save_token(path: Path, placeholder: str, vectors: torch.Tensor, header: dict):
    """Write {placeholder: [D], or [K, D] for K > 1} as safetensors, as diffusers reads it, with a text header."""
    tensor = vectors.detach().float().cpu().contiguous()
    text = {"format": "pt", **{key: str(value) for key, value in header.items()}}
    write_tensors(Path(path), {placeholder: tensor[0] if len(tensor) == 1 else tensor}, text)


def load_token(path: Path) -> ClassToken:
    """The token in our file or in one of diffusers' textual inversion.

    Raises:
        UserError: no such file, not a token file, or more than one tensor in it.
    """
    path, header = Path(path), {}
    require(path.is_file(), f"no token at '{path}'; --train True makes one")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                header = file.metadata() or {}
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each raise their own kind
        raise UserError(f"'{path}' is not a token file ({join_lines(error)[:200]}): remove it and train "
                        "again") from error
    require(isinstance(tensors, dict) and len(tensors) == 1 and torch.is_tensor(next(iter(tensors.values()))),
            f"'{path}' must hold exactly one tensor, named by its placeholder")
    placeholder, vectors = next(iter(tensors.items()))
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    require(vectors.dim() == 2 and len(vectors), f"'{path}' holds {list(vectors.shape)}, not vectors [K, D]")
    require(vectors.isfinite().all(), f"'{path}' holds non-finite numbers: no prompt can be drawn with it")
    return ClassToken(placeholder, vectors.float(), header)
