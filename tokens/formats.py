"""Token files of other tools, told by their content: suffixes of downloads may be wrong."""

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from utils import UserError, join_lines, require

# SDXL's text encoders, in the order in which it joins their embeddings.
PAIR = ("clip_l", "clip_g")
# As diffusers' scripts for LoRAs call them.
OTHER_NAMES = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
# The name that diffusers' scripts give, and learned_embeds_2 of SDXL's second text encoder.
DIFFUSERS_NAME = "learned_embeds"
NAMELESS = {"*", "emb_params", *PAIR}  # tensors that no placeholder names
LARGEST = 2**20  # numbers in a token; 77 vectors for SDXL have 157,696
HEADS = {  # how files begin that are something else
    rb"version https://git-lfs": "it is a Git LFS pointer, and `git lfs pull` fetches the file",
    rb"\s*<(!doctype|html|head)": (
        "it is an HTML page: download the file itself, not the page that shows it"
    ),
}
KINDS = {  # what a file is whose tensors have such names
    r"^lora_(unet|te)|[._]lora[._]": "a LoRA",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": (
        "a full checkpoint"
    ),
    r"text_model\.|text_projection\.|token_embedding\.": "the weights of a text encoder",
    r"\.(weight|bias)$": "the weights of a model",
}
PICKLE_HEADS = (b"P", b"\x80")  # first bytes of a zip archive and of a pickle


def find_halves(path: Path) -> tuple[Path, Path]:
    """Find the two files that diffusers writes for SDXL, if `path` is one of them.

    Twice the same path if it has another name.
    """
    first = path.name.replace(f"{DIFFUSERS_NAME}_2", DIFFUSERS_NAME, 1)
    second = first.replace(DIFFUSERS_NAME, f"{DIFFUSERS_NAME}_2", 1)
    return path.with_name(first), path.with_name(second)


def read_token_file(path: Path) -> tuple[str, list[torch.Tensor], dict[str, str]]:
    """Read the placeholder, the vectors [K, W] for every text encoder, and the file's header.

    Raises:
        UserError: no such file, or what it holds instead of one token.
    """
    content, header = read_content(path)
    wrong = f"'{path}' is not a token file: "
    is_checkpoint = isinstance(content.get("state_dict"), dict)
    require(not is_checkpoint, f"{wrong}it is a full checkpoint")
    for pattern, kind in KINDS.items():
        has_kind = any(re.search(pattern, str(key)) for key in content)
        require(not has_kind, f"{wrong}it is {kind}")
    tensors = {}
    for key, value in content.items():
        if isinstance(key, str) and torch.is_tensor(value):
            tensors[OTHER_NAMES.get(key, key)] = value
    require(tensors, f"{wrong}it holds no tensor that is named by a placeholder")
    is_paired = set(tensors) == set(PAIR)
    names = ", ".join(tensors)[:100]
    require(
        names not in PAIR,
        f"{wrong}it holds {names} alone, and SDXL needs both {' and '.join(PAIR)}",
    )
    if len(tensors) > 1 and not is_paired:
        is_vectors = all(value.dim() < 3 for value in tensors.values())
        kind = "tokens" if is_vectors else "tensors"
        raise UserError(f"{wrong}it holds {len(tensors)} {kind} ({names}), and must hold one")
    parts = [check_vectors(path, tensors[key]) for key in (PAIR if is_paired else tensors)]
    counts = [str(len(part)) for part in parts]
    require(
        len(set(counts)) == 1,
        f"'{path}' holds {' and '.join(counts)} vectors for SDXL's text encoders, which need the "
        "same number",
    )
    named = [key for key in tensors if key not in NAMELESS]
    placeholder = named[0] if named else header.get("placeholder") or header.get("name")
    return placeholder or path.stem, parts, header


def check_vectors(path: Path, vectors: torch.Tensor) -> torch.Tensor:
    """Return stored numbers [D] or [K, D] as float32 vectors [K, D]; raise UserError for others."""
    is_dense = vectors.layout == torch.strided and vectors.device.type == "cpu"
    is_of_size = vectors.dim() in (1, 2) and 0 < vectors.numel() <= LARGEST
    kind = str(vectors.dtype).removeprefix("torch.")
    require(
        vectors.is_floating_point() and is_dense and is_of_size,
        f"'{path}' holds {kind} {list(vectors.shape)}, not vectors [K, D]",
    )
    vectors = vectors.detach().float().reshape(-1, vectors.shape[-1])
    require(
        vectors.isfinite().all(),
        f"'{path}' holds non-finite numbers: no prompt can be drawn with it",
    )
    return vectors


def read_content(path: Path) -> tuple[dict, dict[str, str]]:
    """Read the tensors of a file by name, and its text."""
    require(
        not path.is_dir(),
        f"'{path}' is a folder: give a file in it, such as learned_embeds.safetensors",
    )
    require(path.is_file(), f"no file '{path}'")
    wrong = f"'{path}' is not a token file: "
    with path.open("rb") as file:
        head = file.read(100)
    require(head, f"{wrong}it is empty")
    for pattern, kind in HEADS.items():
        require(not re.match(pattern, head, re.IGNORECASE), wrong + kind)
    try:
        is_safetensors = head[8:9] == b"{"  # after its header's length
        return read_safetensors(path) if is_safetensors else read_pickle(path)
    except OSError:
        raise
    except SafetensorError as error:
        raise UserError(f"{wrong}{join_lines(error)[:200]}") from error
    except pickle.UnpicklingError as error:  # its text advises to execute what the file holds
        reason = "it is neither safetensors nor what torch.save writes"
        if head[:1] in PICKLE_HEADS:
            reason = "it holds code or objects besides tensors, which are not loaded"
        raise UserError(wrong + reason) from error
    except Exception as error:  # zip, pickle and torch each raise their own kind
        raise UserError(f"{wrong}it is truncated, or not what torch.save writes") from error


def read_safetensors(path: Path) -> tuple[dict, dict[str, str]]:
    """Read the tensors of a safetensors file, and its header."""
    tensors = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensors[key] = file.get_tensor(key)
        return tensors, file.metadata() or {}


def read_pickle(path: Path) -> tuple[dict, dict[str, str]]:
    """Read the tensors and text of a file written by torch.save; nothing in it is executed."""
    allowed = [torch.nn.ParameterDict]  # the original code's
    with path.open("rb") as file, torch.serialization.safe_globals(allowed):
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        return {}, {}
    vectors = content.get("string_to_param", content)
    if isinstance(vectors, torch.nn.ParameterDict):
        vectors = dict(vectors.named_parameters())
    words = {}
    for key, value in content.items():
        if isinstance(value, (str, int)):
            words[key] = str(value)
    return vectors if isinstance(vectors, dict) else {}, words
