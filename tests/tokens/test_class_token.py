"""The token's file: ours, those of other programs, and a line that says what others are."""

import io
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch.nn import Parameter, ParameterDict

from tokens.class_token import check_widths, load_token, save_token
from utils import UserError

ONE, TWO, WIDE = torch.randn(1, 32), torch.randn(2, 32), torch.randn(2, 48)
A1111 = {
    "string_to_token": {"*": 265},
    "name": "cat-toy",
    "step": 1999,
    "sd_checkpoint": None,
    "sd_checkpoint_name": None,
}


def torch_bytes(content, **options) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


@pytest.mark.parametrize("count, shape", [(1, [768]), (3, [3, 768])])
def test_file_holds_one_small_tensor_and_its_story(tmp_path, count, shape):
    path, plain = tmp_path / "learned_embeds.safetensors", tmp_path / "plain"
    plain.touch()
    vectors = torch.randn(count, 768)
    save_token(path, "newclas", vectors, (768,), {"class_index": 283, "class_name": "tiger cat"})
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["newclas"] and list(file.get_tensor("newclas").shape) == shape
    assert path.stat().st_size < 10_000 and path.stat().st_mode == plain.stat().st_mode
    token = load_token(path)
    assert (
        token.placeholder == "newclas"
        and torch.equal(token.vectors, vectors)
        and token.widths == (768,)
    )
    assert token.header == {"format": "pt", "class_index": "283", "class_name": "tiger cat"}


@pytest.mark.parametrize("count", [1, 2])
def test_file_of_two_text_encoders_holds_a_pair(tmp_path, count):
    vectors = torch.randn(count, 2048)
    save_token(tmp_path / "x.safetensors", "newclas", vectors, (768, 1280), {"class_index": 283})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["clip_g", "clip_l"]
        assert torch.equal(file.get_tensor("clip_l"), vectors[:, :768])
        assert torch.equal(file.get_tensor("clip_g"), vectors[:, 768:])
    token = load_token(tmp_path / "x.safetensors")
    assert (
        token.placeholder == "newclas"
        and torch.equal(token.vectors, vectors)
        and token.widths == (768, 1280)
    )
    assert token.header == {"format": "pt", "class_index": "283", "placeholder": "newclas"}


@pytest.mark.parametrize(
    "name, data, placeholder, vectors",
    [
        (
            "x.bin",
            torch_bytes({"<cat-toy>": ONE[0]}),
            "<cat-toy>",
            ONE,
        ),  # diffusers and sd-concepts-library
        ("x.bin", torch_bytes({"<cat-toy>": TWO}), "<cat-toy>", TWO),
        (
            "x.bin",
            torch_bytes({"<cat-toy>": TWO}, _use_new_zipfile_serialization=False),
            "<cat-toy>",
            TWO,
        ),
        ("x.bin", torch_bytes({"<cat-toy>": Parameter(TWO)}), "<cat-toy>", TWO),
        ("x.safetensors", save({"<cat-toy>": ONE[0]}), "<cat-toy>", ONE),
        ("x.pt", save({"<cat-toy>": TWO}), "<cat-toy>", TWO),  # renamed
        ("x.safetensors", torch_bytes({"<cat-toy>": TWO}), "<cat-toy>", TWO),
        ("cat-toy.safetensors", save({"emb_params": TWO}), "cat-toy", TWO),  # kohya, civitai
        ("x.safetensors", save({"emb_params": ONE}, {"placeholder": "newclas"}), "newclas", ONE),
        ("x.safetensors", save({"emb_params": ONE}, {"name": "cat-toy"}), "cat-toy", ONE),
        ("x.pt", torch_bytes({**A1111, "string_to_param": {"*": ONE}}), "cat-toy", ONE),
        ("x.pt", torch_bytes({**A1111, "string_to_param": {"*": Parameter(TWO)}}), "cat-toy", TWO),
        (
            "x.pt",
            torch_bytes({**A1111, "string_to_param": ParameterDict({"*": Parameter(TWO)})}),
            "cat-toy",
            TWO,
        ),
        (
            "cat.pt",
            torch_bytes(
                {
                    "string_to_token": {"*": torch.tensor(265)},  # the original code
                    "string_to_param": ParameterDict({"*": Parameter(TWO)}),
                }
            ),
            "cat",
            TWO,
        ),
        (
            "cat.pt",
            torch_bytes({"string_to_token": {"toy": 265}, "string_to_param": {"toy": ONE}}),
            "toy",
            ONE,
        ),
    ],
)
def test_loads_tokens_of_other_programs(tmp_path, name, data, placeholder, vectors):
    (tmp_path / name).write_bytes(data)
    token = load_token(tmp_path / name)
    assert (
        token.placeholder == placeholder
        and torch.equal(token.vectors, vectors)
        and token.widths == (32,)
    )
    assert not token.vectors.requires_grad and all(
        isinstance(word, str) for word in token.header.values()
    )


@pytest.mark.parametrize(
    "name, encode", [("cat.safetensors", save), ("cat.pt", torch_bytes), ("cat.bin", torch_bytes)]
)
def test_loads_pairs_of_sdxl(tmp_path, name, encode):
    (tmp_path / name).write_bytes(encode({"clip_g": WIDE, "clip_l": TWO}))
    token = load_token(tmp_path / name)
    assert token.placeholder == "cat" and token.widths == (32, 48)
    assert torch.equal(token.vectors, torch.cat([TWO, WIDE], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("encode", [save, torch_bytes])
def test_vectors_are_float32(tmp_path, dtype, encode):
    (tmp_path / "x").write_bytes(encode({"newclas": TWO.to(dtype)}))
    vectors = load_token(tmp_path / "x").vectors
    assert vectors.dtype == torch.float32 and torch.equal(vectors, TWO.to(dtype).float())


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"x": torch.zeros(2, 2, 32)}, r"holds float32 \[2, 2, 32\], not vectors \[K, D\]"),
        ({"x": torch.zeros(0, 32)}, r"\[0, 32\], not vectors \[K, D\]"),
        ({"x": torch.zeros(())}, r"\[\], not vectors \[K, D\]"),
        ({"x": torch.zeros(2000, 768)}, r"\[2000, 768\], not vectors \[K, D\]"),
        (
            {"x": torch.zeros(1).expand(10**12, 768)},
            r"\[1000000000000, 768\], not vectors",
        ),  # four bytes on disk
        ({"x": torch.zeros(2, 32, dtype=torch.int64)}, "holds int64"),
        ({"x": torch.zeros(2, 32).to_sparse()}, "not vectors"),
        ({"x": torch.zeros(2, 32, device="meta")}, "not vectors"),
        ({"x": torch.tensor([1, torch.inf])}, "non-finite numbers"),
        ({"clip_l": ONE, "clip_g": ONE * torch.nan}, "finite"),
        (
            {"<cat>": torch.zeros(3), "<dog>": torch.zeros(3)},
            r"2 tokens \(<cat>, <dog>\)",
        ),
        ({**A1111, "string_to_param": {"cat": ONE, "dog": ONE}}, r"it holds 2 tokens \(cat, dog\)"),
        ({"mean": ONE, "kernel": torch.zeros(3, 3, 1)}, "it holds 2 tensors"),
        ({"clip_l": ONE}, "clip_l alone"),
        ({"clip_g": ONE}, "it holds clip_g alone"),
        ({"clip_l": ONE, "clip_g": WIDE}, "1 and 2 vectors"),
        ({"lora_unet_down.lora_up.weight": ONE}, "it is a LoRA"),
        ({"unet.to_q.lora_A.weight": ONE, "y": ONE}, "a LoRA"),
        (
            {"model.diffusion_model.out.0.bias": ONE, "cond_stage_model.text_model.x": ONE},
            "it is a full checkpoint",
        ),
        ({"state_dict": {"x": ONE}, "epoch": 3}, "it is a full checkpoint"),
        (
            {"text_model.embeddings.token_embedding.weight": TWO},
            "text encoder",
        ),
        ({"conv_in.weight": ONE, "conv_in.bias": ONE}, "weights of a model"),
        ({"epoch": 3}, "no tensor that is named"),
        ({}, "no tensor that is named"),
        ({3: ONE}, "no tensor that is named"),
        ([ONE], "no tensor that"),
        (ONE, "no tensor that"),
        ({**A1111, "string_to_param": 3}, "no tensor that"),
        ({"x": torch.nn.Linear(2, 2)}, "code or objects"),
    ],
)
def test_tells_what_a_file_holds_instead(tmp_path, content, reason):
    torch.save(content, tmp_path / "file.bin")
    assert_refused(tmp_path / "file.bin", reason)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "it is empty"),
        (b"not a token", "neither safetensors nor"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3840\n",
            "a Git LFS pointer, and `git lfs pull`",
        ),
        (b"\n<!DOCTYPE html><html>", "it is an HTML page"),
        (b"<html lang='en'>", "it is an HTML page"),
        (save({"x": ONE})[:-1], "is not a token file: .*incomplete"),
        (torch_bytes({"x": ONE})[:-99], "it is truncated"),
        (pickle.dumps({"x": ONE}), "it holds code or objects"),
        (pickle.dumps({"x": print}), "it holds code or objects"),
    ],
)
@pytest.mark.parametrize("name", ["file.safetensors", "file.pt"])
def test_tells_what_kind_of_file_it_is(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    assert_refused(tmp_path / name, reason)


def test_refuses_a_folder_and_a_missing_file(tmp_path):
    assert_refused(tmp_path, "is a folder")
    assert_refused(tmp_path / "none.safetensors", "no file '.*none.safetensors'")


def assert_refused(path, reason):
    """In one line that names the file, and gives neither torch's advice nor ours to remove what may
    not be ours.
    """
    with pytest.raises(UserError, match=reason) as raised:
        load_token(path)
    line = str(raised.value)
    assert str(path) in line and "\n" not in line and len(line) < 300 + len(str(path))
    assert not any(word in line for word in ("weights_only", "safe_globals", "train again"))


@pytest.mark.parametrize(
    "placeholder", ["my_weight", "conditioner", "text_projection", "state_dict"]
)
def test_words_that_sound_like_parts_of_a_model_come_back(tmp_path, placeholder):
    save_token(tmp_path / "x.safetensors", placeholder, TWO, (32,), {})
    assert load_token(tmp_path / "x.safetensors").placeholder == placeholder


def test_a_lora_in_safetensors(tmp_path):
    save_file(
        {"lora_te_text_model.lora_up.weight": ONE, "lora_te_text_model.alpha": torch.tensor(4.0)},
        tmp_path / "x",
    )
    assert_refused(tmp_path / "x", "it is a LoRA")


@pytest.mark.parametrize(
    "names",
    [
        ("learned_embeds", "learned_embeds_2"),
        ("learned_embeds-steps-500", "learned_embeds_2-steps-500"),
    ],
)
@pytest.mark.parametrize("given", [0, 1])
def test_the_two_files_of_diffusers_sdxl_script_are_one_token(tmp_path, names, given):
    halves = torch.rand(2, 4), torch.rand(2, 6)
    files = [tmp_path / f"{name}.safetensors" for name in names]
    for file, half in zip(files, halves, strict=True):
        save_file({"<cat>": half}, file)
    token = load_token(files[given])
    assert (
        token.widths == (4, 6)
        and torch.equal(token.vectors, torch.cat(halves, 1))
        and token.placeholder == "<cat>"
    )
    files[1 - given].unlink()
    assert load_token(files[given]).widths == (halves[given].shape[1],)


def test_two_tokens_beside_each_other_are_two(tmp_path):
    """Of another word, or of the same width."""
    for width, word in ((6, "<dog>"), (4, "<cat>")):
        save_file({"<cat>": torch.rand(4)}, tmp_path / "learned_embeds.safetensors")
        save_file({word: torch.rand(width)}, tmp_path / "learned_embeds_2.safetensors")
        assert load_token(tmp_path / "learned_embeds.safetensors").widths == (4,)


def test_the_names_of_diffusers_lora_scripts(tmp_path):
    halves = torch.rand(1, 4), torch.rand(1, 6)
    save_file(
        {f"text_encoders_{i}": half for i, half in enumerate(halves)}, tmp_path / "cat.safetensors"
    )
    token = load_token(tmp_path / "cat.safetensors")
    assert (
        token.widths == (4, 6)
        and torch.equal(token.vectors, torch.cat(halves, 1))
        and token.placeholder == "cat"
    )


def test_half_a_token_is_told_which_half_is_missing(tmp_path):
    class TwoEncoders:
        token_widths = (4, 6)

    save_file({"<cat>": torch.rand(4)}, tmp_path / "learned_embeds.safetensors")
    token = load_token(tmp_path / "learned_embeds.safetensors")
    with pytest.raises(
        UserError,
        match="learned_embeds.safetensors' have 4 dimensions.*learned_embeds_2.safetensors",
    ):
        check_widths(token, TwoEncoders(), str(tmp_path / "learned_embeds.safetensors"))
