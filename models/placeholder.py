"""The new word in a tokenizer and a text encoder of transformers: where the token's vectors enter."""

from contextlib import contextmanager

import torch

from utils import require


def add_placeholder(tokenizer, placeholder: str) -> int:
    """Teach `tokenizer` the new word and return its id, one past the vocabulary table, which stays as it is.

    Raises:
        UserError: it has a space, is a word of the vocabulary already, or the tokenizer does not find it in a prompt.
    """
    require(placeholder and placeholder == "".join(placeholder.split()),
            f"placeholder_token must be one word without spaces, not '{placeholder}'")
    known = tokenizer(placeholder, add_special_tokens=False).input_ids
    require(len(known) > 1, f"placeholder_token '{placeholder}' is in the vocabulary already: make up another word")
    tokenizer.add_tokens(placeholder)
    token_id = tokenizer.convert_tokens_to_ids(placeholder)
    require(tokenizer(f"a {placeholder} a", add_special_tokens=False).input_ids.count(token_id) == 1,
            f"placeholder_token '{placeholder}' is not read as one token: take a word of plain letters")
    return token_id


def initial_vectors(tokenizer, text_encoder, initializer: str) -> torch.Tensor:
    """A float32 copy [1, D] of the embedding of the word `initializer`.

    Raises:
        UserError: the initialiser is not exactly one token of the vocabulary.
    """
    ids = tokenizer(initializer, add_special_tokens=False).input_ids
    require(len(ids) == 1, f"initializer_token must be one token of the vocabulary; '{initializer}' is {len(ids)}: "
                           f"{tokenizer.convert_ids_to_tokens(ids)}; most short words are one")
    table = text_encoder.get_input_embeddings().weight
    require(ids[0] < len(table), f"initializer_token '{initializer}' is no word that the model learned: take another")
    return table[ids].detach().float().clone()


def tokenize_prompts(tokenizer, prompts: list[str], placeholder_id: int | None, num_vectors: int):
    """Token ids and attention mask [P, L], padded to L = model_max_length as in every Stable Diffusion pipeline.

    The placeholder becomes `num_vectors` tokens in a row, as diffusers expands it.

    Raises:
        UserError: a prompt longer than L tokens, whose end (and the token in it, perhaps) would be cut off.
    """
    length, rows, masks = tokenizer.model_max_length, [], []
    for prompt, ids in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        row = [part for i in ids for part in (range(i, i + num_vectors) if i == placeholder_id else (i,))]
        require(len(row) <= length, f"the prompt has {len(row)} tokens and the model reads {length}, so its end would "
                                    f"be cut off: shorten it, or the class's name in it by --class_names: '{prompt}'")
        rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
        masks.append([1] * len(row) + [0] * (length - len(row)))
    return torch.tensor(rows), torch.tensor(masks)


@contextmanager
def inserted_vectors(text_encoder, placeholder_id: int, vectors: torch.Tensor | None):
    """Within this context the encoder reads vectors[p, k] at token placeholder_id + k of prompt p; its table is not
    touched, and gradients flow to `vectors` [P, K, D].
    """
    if vectors is None:
        yield
        return
    seen = []

    def hide_placeholder(embedding, inputs):
        seen[:] = inputs
        return inputs[0].masked_fill(inputs[0] >= placeholder_id, 0)  # id 0 only keeps the look-up in range

    def insert_vectors(embedding, inputs, embeds):  # [P, L, D]
        for k in range(vectors.shape[1]):
            here = (seen[0] == placeholder_id + k)[..., None]
            embeds = torch.where(here, vectors[:, k, None].to(embeds.dtype), embeds)
        return embeds

    embedding = text_encoder.get_input_embeddings()
    hooks = [embedding.register_forward_pre_hook(hide_placeholder), embedding.register_forward_hook(insert_vectors)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
