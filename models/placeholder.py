"""The new word in a tokenizer and a text encoder: where the token's vectors enter."""

import re
from contextlib import contextmanager
from itertools import cycle, islice

import torch
import torch.nn.functional as F

from utils import require


class PromptEncoder:
    """A tokenizer and its text encoder, and the id of the new word once it is added."""

    def __init__(self, tokenizer, text_encoder):
        self.tokenizer, self.text_encoder, self.placeholder_id = tokenizer, text_encoder, None
        self.token_width = text_encoder.config.hidden_size

    def set_placeholder(self, placeholder: str):
        """Teach the tokenizer the new word; see `add_placeholder`."""
        self.placeholder_id = add_placeholder(self.tokenizer, placeholder)

    def initial_vectors(self, initializer: str, num_vectors: int | None) -> torch.Tensor:
        """Return a float32 copy [K, D] of the embeddings of a phrase's tokens, in turn.

        K is their number by default.

        Raises:
            UserError: a phrase without tokens, or with more than `num_vectors`, or with words that
                were never learned.
        """
        ids = self.tokenizer(initializer, add_special_tokens=False).input_ids
        require(ids, f"initializer_token '{initializer}' has no tokens")
        count = num_vectors or len(ids)
        require(
            len(ids) <= count,
            f"num_vectors {count} is too few for initializer_token '{initializer}', which is "
            f"{len(ids)} tokens: {self.tokenizer.convert_ids_to_tokens(ids)}",
        )
        table = self.text_encoder.get_input_embeddings().weight
        require(
            max(ids) < len(table),
            f"initializer_token '{initializer}' is not a word that the model learned: use another",
        )
        repeated = list(islice(cycle(ids), count))
        return table[repeated].detach().float().clone()

    def nearest_words(self, vectors: torch.Tensor, count: int = 5) -> list[str]:
        """Find the words with the largest cosine to each vector [K, D], and that cosine."""
        table = self.text_encoder.get_input_embeddings().weight.float()
        table = F.normalize(table, dim=1)
        directions = F.normalize(vectors.float().to(table.device), dim=1)
        cosines, ids = (directions @ table.T).topk(min(count, len(table)))
        described = []
        for of_vector, words in zip(cosines.tolist(), ids.tolist(), strict=True):
            named = []
            for cosine, word in zip(of_vector, words, strict=True):
                named.append(f"{self.tokenizer.decode([word]).strip()} {cosine:.2f}")
            described.append(", ".join(named))
        return described

    def mean_norm(self) -> float:
        """Return the mean norm of the vocabulary's vectors."""
        return self.text_encoder.get_input_embeddings().weight.float().norm(dim=1).mean().item()

    def check_prompts(self, prompts: list[str], num_vectors: int):
        """Raise the errors of `tokenize_prompts`, without encoding.

        Encoding takes a second per class at SD 1.4's size.
        """
        tokenize_prompts(self.tokenizer, prompts, self.placeholder_id, num_vectors)

    def encode(
        self, prompts: list[str], vectors: torch.Tensor | None, use_mask: bool = False, **options
    ):
        """Return the text encoder's output for prompts [P] with the token [P, K, D] in each."""
        count = 1 if vectors is None else vectors.shape[1]
        input_ids, mask = (
            tokens.to(self.text_encoder.device)
            for tokens in tokenize_prompts(self.tokenizer, prompts, self.placeholder_id, count)
        )
        with inserted_vectors(self.text_encoder, self.placeholder_id, vectors):
            return self.text_encoder(
                input_ids, attention_mask=mask if use_mask else None, **options
            )


def add_placeholder(tokenizer, placeholder: str) -> int:
    """Teach `tokenizer` the new word and return its id.

    It is one past the vocabulary table, which stays as it is.

    Raises:
        UserError: it has a space, is a word of the vocabulary already, the tokenizer does not find
            it in a prompt, or
            diffusers would take it for one of several vectors of another added word ('x_1' beside
                'x').
    """
    require(
        placeholder and placeholder == "".join(placeholder.split()),
        f"placeholder_token must be one word without spaces, not '{placeholder}'",
    )
    known = tokenizer(placeholder, add_special_tokens=False).input_ids
    require(
        len(known) > 1,
        f"placeholder_token '{placeholder}' is already in the vocabulary: make up another word",
    )
    for word in tokenizer.get_added_vocab():
        require(
            not is_numbered(placeholder, word) and not is_numbered(word, placeholder),
            f"placeholder_token '{placeholder}' beside '{word}': diffusers expands one into the "
            "other; make up another word",
        )
    tokenizer.add_tokens(placeholder)
    token_id = tokenizer.convert_tokens_to_ids(placeholder)
    require(
        tokenizer(f"a {placeholder} a", add_special_tokens=False).input_ids.count(token_id) == 1,
        f"placeholder_token '{placeholder}' is not read as one token: use a word of plain letters",
    )
    return token_id


def is_numbered(word: str, stem: str) -> bool:
    """Return whether `word` is `stem` with a number: 'x_1' of 'x'.

    diffusers names the further vectors of a token like this.
    """
    return re.fullmatch(re.escape(stem) + r"_\d+", word) is not None


def tokenize_prompts(
    tokenizer, prompts: list[str], placeholder_id: int | None, num_vectors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [P, L], as in every Stable Diffusion pipeline.

    Padded to L = model_max_length. The placeholder becomes `num_vectors` tokens in a row, as
    diffusers expands it.

    Raises:
        UserError: a prompt longer than L tokens, whose end (and the token in it, perhaps) would be
            cut off.
    """
    length = tokenizer.model_max_length
    rows, masks = [], []
    for prompt, ids in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        row = expand_placeholder(ids, placeholder_id, num_vectors)
        remedy = "shorten it, or the class's name in it by --class_names"
        if num_vectors > 1:
            remedy += f", or num_vectors {num_vectors}"
        require(
            len(row) <= length,
            f"the prompt has {len(row)} tokens and the model reads {length}, so its end would be "
            f"cut off: {remedy}: '{prompt}'",
        )
        padding = length - len(row)
        rows.append(row + [tokenizer.pad_token_id] * padding)
        masks.append([1] * len(row) + [0] * padding)
    return torch.tensor(rows), torch.tensor(masks)


def expand_placeholder(ids: list[int], placeholder_id: int | None, num_vectors: int) -> list[int]:
    """Return token ids with the placeholder expanded to `num_vectors` consecutive ids."""
    row = []
    for token_id in ids:
        if token_id == placeholder_id:
            row += range(token_id, token_id + num_vectors)
        else:
            row.append(token_id)
    return row


@contextmanager
def inserted_vectors(text_encoder, placeholder_id: int, vectors: torch.Tensor | None):
    """Within this context the encoder reads the token's vectors.

    vectors[p, k] stands at token placeholder_id + k of prompt p. The encoder's table is not
    touched, and gradients flow to `vectors` [P, K, D].
    """
    if vectors is None:
        yield
        return
    seen = []

    def hide_placeholder(embedding, inputs):
        seen[:] = inputs
        # id 0 only keeps the look-up in range
        return inputs[0].masked_fill(inputs[0] >= placeholder_id, 0)

    def insert_vectors(embedding, inputs, embeds):  # [P, L, D]
        for k in range(vectors.shape[1]):
            here = (seen[0] == placeholder_id + k)[..., None]
            embeds = torch.where(here, vectors[:, k, None].to(embeds.dtype), embeds)
        return embeds

    embedding = text_encoder.get_input_embeddings()
    hooks = [
        embedding.register_forward_pre_hook(hide_placeholder),
        embedding.register_forward_hook(insert_vectors),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
