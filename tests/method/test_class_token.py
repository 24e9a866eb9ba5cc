"""The token's file: one small tensor of ours or of diffusers, and one line for any other file."""

import pytest
import torch
from safetensors import safe_open

from method.class_token import load_token, save_token
from utils import UserError


@pytest.mark.parametrize("count, shape", [(1, [768]), (3, [3, 768])])
def test_file_holds_one_small_tensor_and_its_story(tmp_path, count, shape):
    path, plain = tmp_path / "learned_embeds.safetensors", tmp_path / "plain"
    plain.touch()
    vectors = torch.randn(count, 768)
    save_token(path, "newclas", vectors, {"class_index": 283, "class_name": "tiger cat"})
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["newclas"] and list(file.get_tensor("newclas").shape) == shape
    assert path.stat().st_size < 10_000 and path.stat().st_mode == plain.stat().st_mode
    token = load_token(path)
    assert token.placeholder == "newclas" and torch.equal(token.vectors, vectors)
    assert token.header["class_index"] == "283" and token.header["class_name"] == "tiger cat"


@pytest.mark.parametrize("count", [1, 2])
def test_loads_diffusers_textual_inversion_files(tmp_path, count):
    vectors = torch.randn(count, 32)
    torch.save({"<cat-toy>": vectors}, tmp_path / "learned_embeds.bin")
    token = load_token(tmp_path / "learned_embeds.bin")
    assert token.placeholder == "<cat-toy>" and torch.equal(token.vectors, vectors)


@pytest.mark.parametrize("content, reason", [({"x": torch.zeros(2, 2, 32)}, r"\[2, 2, 32\], not vectors \[K, D\]"),
                                             ({"x": torch.zeros(0, 32)}, r"\[0, 32\], not vectors \[K, D\]"),
                                             ({"x": torch.zeros(3), "y": torch.zeros(3)}, "exactly one tensor"),
                                             ({"x": torch.tensor([1, torch.inf])}, "non-finite numbers")])
def test_refuses_files_that_are_no_token(tmp_path, content, reason):
    torch.save(content, tmp_path / "file.bin")
    with pytest.raises(UserError, match=reason):
        load_token(tmp_path / "file.bin")


def test_refuses_broken_and_missing_files(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not a token")
    with pytest.raises(UserError, match="is not a token file"):
        load_token(tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="no token at"):
        load_token(tmp_path / "none.safetensors")
