"""Attention maps are those of the UNet's own layers, and looking changes nothing."""

import pytest
import torch
from PIL import Image

from evaluation.attention import find_grid, map_attention, overlay_map, place_words
from evaluation.drawing import Condition, encode_condition
from models.generator import load_generator
from models.sampling import SamplingSettings
from utils import UserError

SAMPLING = SamplingSettings(64, 64, 3.0, 4)


@pytest.fixture(scope="module")
def generator():
    loaded = load_generator("miniature/weights/generator", "cpu", torch.float32)
    loaded.set_placeholder("newclas")
    return loaded


def make_condition(generator, count: int = 1) -> Condition:
    return Condition(
        "with", "A photo of a newclas jaguar", generator.initial_vectors("spotted", count), 1
    )


def test_maps_are_the_softmax_of_queries_and_keys(generator, monkeypatch):
    """Against maps computed from hooked inputs of every cross-attention layer."""
    condition, maps, inputs = make_condition(generator), [], []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, given, named: inputs.append(
                (module, given[0], named["encoder_hidden_states"])
            ),
            with_kwargs=True,
        )
        for name, module in generator.unet.named_modules()
        if name.endswith("attn2")
    ]
    found = map_attention(generator, condition, "jaguar", 0, SAMPLING)
    for hook in hooks:
        hook.remove()
    places = place_words(generator, condition, "jaguar")
    for module, hidden, context in inputs:
        # [heads, positions, width]
        query, key = (
            part[-1].unflatten(1, (module.heads, -1)).transpose(0, 1)
            for part in (module.to_q(hidden), module.to_k(context))
        )
        weights = (query @ key.transpose(1, 2) * module.scale).softmax(-1).mean(0)
        side = int(len(weights) ** 0.5)
        maps.append(
            torch.nn.functional.interpolate(
                torch.stack([weights[:, some].mean(1).view(side, side) for some in places])[None],
                (8, 8),
                mode="bilinear",
            )[0]
        )
    expected = torch.stack(maps).mean(0)
    assert torch.allclose(found, expected / expected.sum((1, 2), keepdim=True), atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_looking_changes_no_picture(generator):
    condition, before = make_condition(generator), generator.unet.attn_processors
    with torch.no_grad():
        latents = [generator.sample(encode_condition(generator, condition), [0], SAMPLING)]
        map_attention(generator, condition, "jaguar", 0, SAMPLING)
        latents.append(generator.sample(encode_condition(generator, condition), [0], SAMPLING))
    assert torch.equal(*latents) and generator.unet.attn_processors == before


@pytest.mark.parametrize("count", [1, 3])
def test_the_words_are_found_in_the_prompt(generator, count):
    tokens = [
        generator.prompt_encoders[0].tokenizer(text, add_special_tokens=False).input_ids
        for text in ("A photo of a", "jaguar")
    ]
    first = 1 + len(tokens[0])
    assert place_words(generator, make_condition(generator, count), "jaguar") == [
        list(range(first, first + count)),
        list(range(first + count, first + count + len(tokens[1]))),
    ]


def test_maps_of_pictures_that_are_not_square(generator):
    maps = map_attention(
        generator, make_condition(generator), "jaguar", 0, SAMPLING._replace(height=64, width=96)
    )
    assert maps.shape == (2, 8, 12) and maps.sum((1, 2)).tolist() == pytest.approx([1, 1])


def test_maps_of_sides_that_the_unet_halves_unevenly(generator):
    """17 x 36 latents have layers of 9 x 18, which the number of positions does not tell."""
    maps = map_attention(
        generator, make_condition(generator), "jaguar", 0, SAMPLING._replace(height=136, width=288)
    )
    assert maps.shape == (2, 17, 36) and maps.sum((1, 2)).tolist() == pytest.approx([1, 1])


def test_the_grids_of_layers_are_those_of_the_unet():
    assert [find_grid(count, (17, 36)) for count in (612, 162, 45, 15)] == [
        (17, 36),
        (9, 18),
        (5, 9),
        (3, 5),
    ]
    assert [find_grid(count, (90, 160)) for count in (14400, 3600, 920)] == [
        (90, 160),
        (45, 80),
        (23, 40),
    ]
    with pytest.raises(UserError, match="attention_maps: 100 positions"):
        find_grid(100, (17, 36))


def test_the_overlay_is_brightest_where_the_map_is(generator):
    attention = torch.zeros(8, 8)
    attention[1, 6] = 1
    found = overlay_map(Image.new("RGB", (64, 64), (128, 128, 128)), attention).convert("L")
    brightest = max(((x, y) for x in range(64) for y in range(64)), key=found.getpixel)
    assert 48 <= brightest[0] < 56 and 8 <= brightest[1] < 16 and found.size == (64, 64)


def test_nearest_words_are_by_cosine(generator):
    start = generator.initial_vectors("spotted")
    (words,) = generator.nearest_words(2 * start)
    assert words.startswith("spotted 1.00, ") and words.count(",") == 4
