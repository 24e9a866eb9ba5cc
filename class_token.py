"""The one trained vector v_c: put before a class name, spliced into the text encoder, saved in 3 kB."""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from utils import UserError, require, write_tensors

TOKEN_FILE = "learned_embeds.safetensors"


def add_placeholder(tokenizer, placeholder: str) -> int:
    """Teach `tokenizer` the new word and return its id, one past the vocabulary table, which stays as it is.

    Raises:
        UserError: it has a space, is a word of the vocabulary already, or the tokenizer does not find it in a prompt.
    """
    require(placeholder and placeholder == "".join(placeholder.split()),
            f"placeholder_token must be one word without spaces, not '{placeholder}'")
    known = tokenizer(placeholder, add_special_tokens=False).input_ids
    require(len(known) > 1, f"placeholder_token '{placeholder}' is in the vocabulary already; "
                            "take a word nobody uses, such as newclas")
    tokenizer.add_tokens(placeholder)
    token_id = tokenizer.convert_tokens_to_ids(placeholder)
    require(tokenizer(f"a {placeholder} a", add_special_tokens=False).input_ids.count(token_id) == 1,
            f"placeholder_token '{placeholder}' is not read as one token; take a plain word, such as newclas")
    return token_id


def initial_vector(tokenizer, text_encoder, initializer: str) -> torch.Tensor:
    """A float32 copy [D] of the embedding of `initializer`.

    Raises:
        UserError: the initialiser is not exactly one token of the vocabulary.
    """
    ids = tokenizer(initializer, add_special_tokens=False).input_ids
    require(len(ids) == 1, f"initializer_token must be one token of the vocabulary; '{initializer}' is {len(ids)}: "
                           f"{tokenizer.convert_ids_to_tokens(ids)}")
    table = text_encoder.get_input_embeddings().weight
    require(ids[0] < len(table), f"initializer_token '{initializer}' has no embedding of its own")
    return table[ids[0]].detach().float().clone()


@contextmanager
def spliced(text_encoder, token_id: int, vector: torch.Tensor):
    """Within this context the text encoder reads `vector` wherever `token_id` stands; its table is not touched.

    `vector` is [D], or [B, D] with one for each of a batch's B prompts.

    Gradients flow to `vector`; outside the context the encoder is exactly what it was.
    """
    embedding = text_encoder.get_input_embeddings()
    look_up = embedding.forward

    def forward(input_ids):
        ours = input_ids == token_id
        embeds = look_up(input_ids.masked_fill(ours, 0))  # [B, L, D]; id 0 only keeps the look-up in range
        rows = vector.to(embeds.dtype).view(-1, 1, vector.shape[-1])  # [1 or B, 1, D]
        return torch.where(ours[..., None], rows, embeds)

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward


def save(path: Path, placeholder: str, vector: torch.Tensor, metadata: dict):
    """Write {placeholder: [D]} as safetensors, as diffusers, A1111 and ComfyUI read it, with `metadata` as header."""
    header = {"format": "pt", **{key: str(value) for key, value in metadata.items()}}
    write_tensors(Path(path), {placeholder: vector.detach().float().cpu().contiguous()}, header)


def load(path: Path) -> tuple[str, torch.Tensor, dict]:
    """Read (placeholder, vector [D], header) from our file or from one of diffusers' textual inversion.

    Raises:
        UserError: no such file, not a token file, or more than one vector in it.
    """
    path = Path(path)
    require(path.is_file(), f"no token at '{path}'; --train True makes one")
    header = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each raise their own kind
        raise UserError(f"'{path}' is not a token file ({' '.join(str(error).split())[:200]}): remove it to have it "
                        "trained anew") from error
    require(isinstance(tensors, dict) and len(tensors) == 1 and torch.is_tensor(next(iter(tensors.values()))),
            f"'{path}' must hold exactly one tensor, named by its placeholder")
    placeholder, vector = next(iter(tensors.items()))
    vector = vector.squeeze(0) if vector.dim() == 2 and len(vector) == 1 else vector
    require(vector.dim() == 1, f"'{path}' holds {list(vector.shape)}, not one vector [D]")
    require(vector.isfinite().all(), f"'{path}' holds numbers that are not finite: no prompt can be drawn with it")
    return placeholder, vector.float(), header
