"""The trained vectors v_c, which stand before a class name: how they are stored, here and by other programs."""

import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from models.generator import Generator
from system.paths import find_path
from system.tensor_files import write_tensors
from utils import TOKEN_SUFFIXES, UserError, join_lines, require

PAIR = ("clip_l", "clip_g")  # SDXL's text encoders, in the order in which it joins their embeddings
OTHER_NAMES = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}  # by diffusers' scripts for LoRAs
DIFFUSERS_NAME = "learned_embeds"  # and learned_embeds_2, of the name that diffusers' scripts give
LARGEST = 2**20  # numbers in a token; 77 vectors for SDXL have 157,696
HEADS = {  # how files begin that are something else
    rb"version https://git-lfs": "it is a Git LFS pointer, and `git lfs pull` fetches the file itself",
    rb"\s*<(!doctype|html|head)": "it is an HTML page: download the file itself, not the page that shows it"}
KINDS = {  # what a file is whose tensors have such names
    r"^lora_(unet|te)|[._]lora[._]": "a LoRA",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": "a full checkpoint",
    r"text_model\.|text_projection\.|token_embedding\.": "the weights of a text encoder",
    r"\.(weight|bias)$": "the weights of a model"}


class ClassToken(NamedTuple):
    """The word that stands for a class's vectors in prompts, the vectors [K, D], float32, and what the file says.

    D is the sum of `widths`, one for each text encoder: (768,) for SD 1.4, (768, 1280) for SDXL, whose clip_l is first.
    """

    placeholder: str
    vectors: torch.Tensor
    widths: tuple[int, ...]
    header: dict[str, str]


def start_vectors(generator: Generator, initializer: str, num_vectors: int | None) -> torch.Tensor:
    """The vectors [K, D] that training starts from: a phrase's tokens in turn, or those in a token file.

    Raises:
        UserError: a phrase or file that does not give `num_vectors`, or a token of another model.
    """
    if not names_file(initializer):
        return generator.initial_vectors(initializer, num_vectors)
    token = load_token(initializer)
    check_widths(token, generator, initializer)
    require(num_vectors in (None, len(token.vectors)), f"num_vectors is {num_vectors}, and '{initializer}' holds "
                                                       f"{len(token.vectors)} vectors: leave it out")
    return token.vectors.to(generator.device)


def names_file(initializer: str) -> bool:
    """Whether an initialiser is a token file, not a phrase."""
    return initializer.endswith(TOKEN_SUFFIXES)


def check_widths(token: ClassToken, generator: Generator, file: str):
    """Raise UserError where the vectors of the token in `file` are not what the generator's text encoders read."""
    found, needed = token.widths, generator.token_widths
    is_half = len(found) < len(needed) and found[0] in needed
    cause = "it is one half of a token for two text encoders, and the other, such as 'learned_embeds_2.safetensors' " \
            "beside 'learned_embeds.safetensors', is missing" if is_half else "it was trained for another --model"
    require(found == needed, f"the vectors in '{file}' have {' + '.join(map(str, found))} numbers and this model's "
                             f"{' + '.join(map(str, needed))}: {cause}")


def split_vectors(vectors: torch.Tensor, widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """SDXL's vectors [K, W_l + W_g] as {"clip_l": [K, W_l], "clip_g": [K, W_g]}."""
    return {key: part.contiguous() for key, part in zip(PAIR, vectors.split(widths, 1), strict=True)}


def save_token(path: Path, placeholder: str, vectors: torch.Tensor, widths: tuple[int, ...], header: dict):
    """Write vectors [K, D] as safetensors with a text header, as diffusers reads them.

    One width: {placeholder: [D], or [K, D] for K > 1}. Two: `split_vectors`, and the header names the placeholder.
    """
    vectors = vectors.detach().float().cpu().contiguous()
    text = {"format": "pt", **{key: str(value) for key, value in header.items()}}
    if len(widths) > 1:
        write_tensors(Path(path), split_vectors(vectors, widths), {**text, "placeholder": placeholder})
    else:
        write_tensors(Path(path), {placeholder: vectors[0] if len(vectors) == 1 else vectors}, text)


def load_token(path: Path | str) -> ClassToken:
    """The token in our file, or in one of textual inversion by diffusers, Automatic1111, kohya or the original code.

    The placeholder is the tensor's name; where it has none, what the file says, or else the file's own name. Of the two
    files that diffusers writes for SDXL either may be given.

    Raises:
        UserError: no such file, or what it holds instead of one token.
    """
    path = find_path(str(path)) or Path(path)
    first, second = find_halves(path)
    if first == second or not (first.is_file() and second.is_file()):
        return load_file(path)
    half, other = load_file(first), load_file(second)
    widths = half.widths + other.widths
    is_one_word = half.placeholder == other.placeholder and len(half.vectors) == len(other.vectors)
    if not is_one_word or len(set(widths)) != 2:  # two tokens beside each other
        return load_file(path)
    return ClassToken(half.placeholder, torch.cat([half.vectors, other.vectors], 1), widths, half.header)


def find_halves(path: Path) -> tuple[Path, Path]:
    """Where diffusers writes the vectors for SDXL's first and second text encoder, if one of the files is `path`.

    Twice the same path where it has another name.
    """
    first = path.name.replace(f"{DIFFUSERS_NAME}_2", DIFFUSERS_NAME, 1)
    second = first.replace(DIFFUSERS_NAME, f"{DIFFUSERS_NAME}_2", 1)
    return path.with_name(first), path.with_name(second)


def load_file(path: Path) -> ClassToken:
    """The token in one file, as `load_token`."""
    content, header = read_content(path)
    wrong = f"'{path}' is not a token file: "
    require(not isinstance(content.get("state_dict"), dict), f"{wrong}it is a full checkpoint")
    for pattern, kind in KINDS.items():
        require(not any(re.search(pattern, str(key)) for key in content), f"{wrong}it is {kind}")
    tensors = {OTHER_NAMES.get(key, key): value for key, value in content.items()
               if isinstance(key, str) and torch.is_tensor(value)}
    require(tensors, f"{wrong}it holds no tensor that is named by a placeholder")
    names, paired = ", ".join(tensors)[:100], set(tensors) == set(PAIR)
    require(names not in PAIR, f"{wrong}it holds {names} alone, and SDXL needs both {' and '.join(PAIR)}")
    kind = "tokens" if all(value.dim() < 3 for value in tensors.values()) else "tensors"
    require(len(tensors) == 1 or paired, f"{wrong}it holds {len(tensors)} {kind} ({names}), and must hold one")
    parts = [check_vectors(path, tensors[key]) for key in (PAIR if paired else tensors)]
    require(len(set(map(len, parts))) == 1, f"'{path}' holds {' and '.join(str(len(part)) for part in parts)} vectors "
                                            "for SDXL's text encoders, which need the same number")
    named = next(iter(tensors)) if set(tensors) - {"*", "emb_params", *PAIR} else ""
    placeholder = named or header.get("placeholder") or header.get("name") or path.stem
    return ClassToken(placeholder, torch.cat(parts, 1), tuple(part.shape[1] for part in parts), header)


def check_vectors(path: Path, vectors: torch.Tensor) -> torch.Tensor:
    """Stored numbers [D] or [K, D] of any precision as vectors [K, D], float32; else a UserError."""
    usable = vectors.is_floating_point() and vectors.layout == torch.strided and vectors.device.type == "cpu"
    require(usable and vectors.dim() in (1, 2) and 0 < vectors.numel() <= LARGEST,
            f"'{path}' holds {str(vectors.dtype).removeprefix('torch.')} {list(vectors.shape)}, not vectors [K, D]")
    vectors = vectors.detach().float().reshape(-1, vectors.shape[-1])
    require(vectors.isfinite().all(), f"'{path}' holds non-finite numbers: no prompt can be drawn with it")
    return vectors


def read_content(path: Path) -> tuple[dict, dict[str, str]]:
    """What a file holds by name, and its words, told by its first bytes: suffixes of downloads may be wrong."""
    require(not path.is_dir(), f"'{path}' is a folder, and a token is a file such as learned_embeds.safetensors in it")
    require(path.is_file(), f"no file '{path}'")
    wrong = f"'{path}' is not a token file: "
    with path.open("rb") as file:
        head = file.read(100)
    require(head, f"{wrong}it is empty")
    for pattern, kind in HEADS.items():
        require(not re.match(pattern, head, re.IGNORECASE), wrong + kind)
    try:
        if head[8:9] == b"{":  # after its header's length
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with path.open("rb") as file, torch.serialization.safe_globals([torch.nn.ParameterDict]):  # the original code's
            content = torch.load(file, map_location="cpu", weights_only=True)
        words = content if isinstance(content, dict) else {}
        vectors = words.get("string_to_param", words)
        vectors = dict(vectors.named_parameters()) if isinstance(vectors, torch.nn.ParameterDict) else vectors
        return (vectors if isinstance(vectors, dict) else {},
                {key: str(value) for key, value in words.items() if isinstance(value, (str, int))})
    except OSError:
        raise
    except SafetensorError as error:
        raise UserError(f"{wrong}{join_lines(error)[:200]}") from error
    except pickle.UnpicklingError as error:  # its text advises to execute what the file holds
        code = head[:1] in (b"P", b"\x80")  # a zip or pickle
        raise UserError(wrong + ("it holds code or objects besides tensors, which are not loaded" if code else
                                 "it is neither safetensors nor what torch.save writes")) from error
    except Exception as error:  # zip, pickle and torch each raise their own kind
        raise UserError(f"{wrong}it is truncated, or not what torch.save writes") from error
