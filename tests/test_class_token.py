"""The trained vector: spliced in, saved, loaded, and everything else as it was."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import class_token
from diffusion import encode_prompts
from utils import UserError


def test_splice_equals_a_row_of_the_table(components):
    """The same vector put into the table under an existing word gives the same prompt_embeds."""
    token_id = class_token.add_placeholder(components.tokenizer, "newclas")
    vector = torch.randn(32)
    with class_token.spliced(components.text_encoder, token_id, vector):
        ours = encode_prompts(components, ["a photo of a newclas crane"])
    word = components.tokenizer("cat", add_special_tokens=False).input_ids[0]
    components.text_encoder.get_input_embeddings().weight[word] = vector
    assert torch.equal(ours, encode_prompts(components, ["a photo of a cat crane"]))


def test_encoder_is_untouched_after_the_splice(components):
    before = encode_prompts(components, ["a photo of a crane"])
    token_id = class_token.add_placeholder(components.tokenizer, "newclas")
    table = components.text_encoder.get_input_embeddings().weight.clone()
    with class_token.spliced(components.text_encoder, token_id, torch.randn(32)):
        assert torch.equal(encode_prompts(components, ["a photo of a crane"]), before)
    assert torch.equal(components.text_encoder.get_input_embeddings().weight, table)
    with pytest.raises(IndexError):
        encode_prompts(components, ["a photo of a newclas crane"])


@pytest.mark.parametrize("placeholder, reason", [("crane", "in the vocabulary already"), ("two words", "one word"),
                                                 ("", "one word")])
def test_bad_placeholder(components, placeholder, reason):
    with pytest.raises(UserError, match=reason):
        class_token.add_placeholder(components.tokenizer, placeholder)


def test_initialiser_must_be_one_token(components):
    vector = class_token.initial_vector(components.tokenizer, components.text_encoder, "a")
    row = components.tokenizer("a", add_special_tokens=False).input_ids[0]
    assert torch.equal(vector, components.text_encoder.get_input_embeddings().weight[row])
    with pytest.raises(UserError, match="one token of the vocabulary; 'tiger cat' is 2"):
        class_token.initial_vector(components.tokenizer, components.text_encoder, "tiger cat")


def test_a_prompt_that_would_lose_the_token_is_refused(components):
    class_token.add_placeholder(components.tokenizer, "newclas")
    with pytest.raises(UserError, match="27 tokens and the model reads 24"):
        encode_prompts(components, ["a " * 24 + "newclas"])


def test_file_holds_one_small_tensor_and_its_story(tmp_path):
    path, plain = tmp_path / "learned_embeds.safetensors", tmp_path / "plain"
    plain.touch()
    vector = torch.randn(768)
    class_token.save(path, "newclas", vector, {"class_index": 283, "class_name": "tiger cat"})
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["newclas"]
    assert path.stat().st_size < 10_000 and path.stat().st_mode == plain.stat().st_mode
    placeholder, loaded, header = class_token.load(path)
    assert placeholder == "newclas" and torch.equal(loaded, vector) and header["class_name"] == "tiger cat"


def test_loads_diffusers_textual_inversion_files(tmp_path):
    vector = torch.randn(1, 32)
    torch.save({"<cat-toy>": vector}, tmp_path / "learned_embeds.bin")
    placeholder, loaded, _ = class_token.load(tmp_path / "learned_embeds.bin")
    assert placeholder == "<cat-toy>" and torch.equal(loaded, vector[0])


@pytest.mark.parametrize("content, reason", [({"x": torch.zeros(2, 32)}, "not one vector"),
                                             ({"x": torch.zeros(3), "y": torch.zeros(3)}, "exactly one tensor")])
def test_refuses_files_that_are_no_token(tmp_path, content, reason):
    torch.save(content, tmp_path / "file.bin")
    with pytest.raises(UserError, match=reason):
        class_token.load(tmp_path / "file.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"not a token")
    with pytest.raises(UserError, match="is not a token file"):
        class_token.load(tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="no token at"):
        class_token.load(tmp_path / "none.safetensors")


def test_diffusers_reads_our_file(components, tiny_model, tmp_path):
    """`pipe.load_textual_inversion` gives the prompt_embeds that our splice gives."""
    vector = torch.randn(32)
    class_token.save(tmp_path / "learned_embeds.safetensors", "newclas", vector, {})
    pipeline = StableDiffusionPipeline(components.vae, components.text_encoder, components.tokenizer, components.unet,
                                       components.scheduler, None, None, requires_safety_checker=False)
    pipeline.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    theirs, _ = pipeline.encode_prompt("a photo of a newclas crane", "cpu", 1, False)
    token_id = components.tokenizer.convert_tokens_to_ids("newclas")
    with class_token.spliced(components.text_encoder, token_id, vector):
        assert torch.equal(encode_prompts(components, ["a photo of a newclas crane"]), theirs)
