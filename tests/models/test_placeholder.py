"""The token in tokenizer and text encoder: its vectors where its word stands, and everything else
as it was.
"""

import pytest
import torch
from transformers import CLIPTokenizer

from tests.models.pipelines import as_pipeline
from tokens.class_token import save_token
from utils import UserError

PROMPTS = ["a photo of a newclas crane", "newclas cat", "a photo of a crane"]


def table_of(generator) -> torch.Tensor:
    return generator.prompt_encoders[0].text_encoder.get_input_embeddings().weight


@pytest.mark.parametrize("count", [1, 2, 3])
def test_vectors_equal_rows_of_the_table(generator, count):
    """The same vectors put into the table under existing words give the same prompt_embeds."""
    generator.set_placeholder("newclas")
    words = ["cat", "crane", "tiger"][:count]
    vectors = torch.randn(count, 32)
    ours = generator.encode(["a photo of a newclas image"], vectors[None])
    rows = (
        generator.prompt_encoders[0].tokenizer(" ".join(words), add_special_tokens=False).input_ids
    )
    table_of(generator)[rows] = vectors
    assert torch.equal(ours, generator.encode([f"a photo of a {' '.join(words)} image"]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_diffusers_reads_our_file_alike(generator, tiny_model, tmp_path, count):
    """`pipe.load_textual_inversion` of the saved token gives the prompt_embeds of `encode`."""
    vectors = torch.randn(count, 32)
    generator.set_placeholder("newclas")
    ours = generator.encode(PROMPTS, vectors.expand(len(PROMPTS), -1, -1))
    save_token(tmp_path / "learned_embeds.safetensors", "newclas", vectors, (32,), {})
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model, subfolder="tokenizer")
    pipeline = as_pipeline(generator, generator.scheduler)
    pipeline.tokenizer = tokenizer
    pipeline.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    theirs, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_prompt_has_its_own_vectors_and_gradient(generator, count):
    generator.set_placeholder("newclas")
    vectors = torch.randn(len(PROMPTS), count, 32, requires_grad=True)
    together = generator.encode(PROMPTS, vectors)
    for i, prompt in enumerate(PROMPTS):
        alone = generator.encode([prompt], vectors[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-5
        (gradient,) = torch.autograd.grad(together[i].square().sum(), vectors, retain_graph=True)
        touched = gradient.abs().sum(2) > 0  # [P, K]
        assert touched[i].all() == ("newclas" in prompt) and touched.sum() in (0, count)


def test_encoder_is_untouched_by_the_token(generator):
    before = generator.encode(["a photo of a crane"])
    generator.set_placeholder("newclas")
    table = table_of(generator).clone()
    assert torch.equal(generator.encode(["a photo of a crane"], torch.randn(1, 1, 32)), before)
    assert torch.equal(table_of(generator), table)
    with pytest.raises(IndexError):
        generator.encode(["a photo of a newclas crane"])


def test_hooks_are_gone_after_an_error(generator):
    generator.set_placeholder("newclas")
    with pytest.raises(RuntimeError):
        generator.encode(["a newclas crane"], torch.randn(1, 1, 31))
    with pytest.raises(IndexError):
        generator.encode(["a newclas crane"])


@pytest.mark.parametrize(
    "placeholder, reason",
    [("crane", "already in the vocabulary"), ("two words", "one word"), ("", "one word")],
)
def test_bad_placeholder(generator, placeholder, reason):
    with pytest.raises(UserError, match=reason):
        generator.set_placeholder(placeholder)


@pytest.mark.parametrize("placeholder", ["newclas", "crane"])
def test_no_advice_to_take_what_was_refused(generator, placeholder):
    generator.prompt_encoders[0].tokenizer.add_tokens("newclas")  # as a checkpoint may have it
    with pytest.raises(UserError) as raised:
        generator.set_placeholder(placeholder)
    assert (
        "already in the vocabulary" in str(raised.value)
        and str(raised.value).count(placeholder) == 1
    )


@pytest.mark.parametrize(
    "phrase, num_vectors, words",
    [
        ("a", None, "a"),
        ("tiger cat", None, "tiger cat"),
        ("a", 3, "a a a"),
        ("tiger cat", 5, "tiger cat tiger cat tiger"),
    ],
)
def test_vectors_start_from_the_phrases_tokens_in_turn(generator, phrase, num_vectors, words):
    vectors = generator.initial_vectors(phrase, num_vectors)
    rows = generator.prompt_encoders[0].tokenizer(words, add_special_tokens=False).input_ids
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, table_of(generator)[rows])


@pytest.mark.parametrize(
    "phrase, num_vectors, reason",
    [
        (
            "tiger cat",
            1,
            r"num_vectors 1 .*'tiger cat'.* 2 tokens",
        ),
        ("", None, "initializer_token '' has no tokens"),
    ],
)
def test_initialisers_that_fit_no_vectors_are_refused(generator, phrase, num_vectors, reason):
    with pytest.raises(UserError, match=reason):
        generator.initial_vectors(phrase, num_vectors)


@pytest.mark.parametrize("known, new", [("newclas", "newclas_1"), ("newclas_12", "newclas")])
def test_words_that_diffusers_would_mix_up_are_refused(generator, known, new):
    """It reads 'x_1' beside 'x' as the second vector of 'x'."""
    generator.prompt_encoders[0].tokenizer.add_tokens(known)
    with pytest.raises(
        UserError, match=f"'{new}' beside '{known}': diffusers expands one into the other"
    ):
        generator.set_placeholder(new)


def test_prompt_that_would_lose_the_token_is_refused(generator):
    generator.set_placeholder("newclas")
    with pytest.raises(UserError, match="27 tokens and the model reads 24"):
        generator.encode(["a " * 24 + "newclas"])
    fitting = ["a " * 21 + "newclas"]  # 24 tokens with one vector, 25 with two
    assert generator.encode(fitting, torch.zeros(1, 1, 32)).shape == (1, 24, 32)
    with pytest.raises(UserError, match="25 tokens and the model reads 24"):
        generator.encode(fitting, torch.zeros(1, 2, 32))
