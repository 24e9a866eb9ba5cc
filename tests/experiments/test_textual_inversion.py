"""The baseline learns its pictures by the denoising loss, and is compared with the class token."""

import json

import pytest
import torch

from experiments import common, textual_inversion
from models.denoising import compute_denoising_loss, encode_images
from utils import UserError


def test_the_command(run_experiment, settings, tmp_path):
    flags = "--class_index", "7,13", "--k", "2", "--images", "4", "--truth", "6", "--nearest_k", "1", "--steps"
    result = run_experiment("textual_inversion", settings, *flags, "2")
    assert set(result["methods"]) == {"no token", "class token", "textual inversion"}
    learned, = (tmp_path / "work/cached").iterdir()
    before = json.loads(learned.read_text())["value"]
    assert before["seconds"] > 0 and result["methods"]["class token"]["seconds_per_class"] > 0
    again = run_experiment("textual_inversion", settings, *flags, "2")
    assert json.loads(learned.read_text())["value"] == before and again["methods"] == result["methods"]
    run_experiment("textual_inversion", settings, *flags, "1")
    assert len(list((tmp_path / "work/cached").iterdir())) == 2  # other settings, another result
    assert set(result["methods"]["no token"]["context_kept"]) == set(textual_inversion.CONTEXTS)


def test_too_few_pictures_for_the_neighbours_are_one_line(run_experiment, settings):
    with pytest.raises(UserError, match="--images must be greater than --nearest_k 5"):
        run_experiment("textual_inversion", settings, "--images", "5")


def test_it_learns_its_pictures(lab):
    """The denoising loss on the real pictures falls, from the first word's on, and no weight changes."""
    real = common.load_real_images(lab, 4)
    generator, (target, files), placeholder = lab.get_generator(), *real.items(), lab.config.placeholder_token
    before = [parameter.clone() for network in generator.networks for parameter in network.parameters()]
    start, (learned,) = (textual_inversion.learn_vectors(lab, real, steps) for steps in (0, 40))
    assert torch.equal(start[0], textual_inversion.embed_first_word(lab, target)) and (learned - start).norm() > 0.01
    latents = encode_images(generator, textual_inversion.crop_squares(files, 64, 64))[0].repeat(16, 1, 1, 1)
    with torch.no_grad():
        losses = [compute_denoising_loss(generator,
            latents, generator.encode([f"A photo of a {placeholder}"], vectors.view(1, 1, -1)).expand(64, -1, -1),
            torch.Generator().manual_seed(5)).item() for vectors in (start, learned)]
    assert losses[1] < losses[0]
    assert all(map(torch.equal, before, (parameter for network in generator.networks
                                         for parameter in network.parameters())))


def test_a_first_word_of_several_tokens_starts_from_the_initialiser(lab):
    target = lab.targets[0]._replace(name="zyzzyva beetle")
    assert torch.equal(textual_inversion.embed_first_word(lab, target), lab.get_generator().initial_vectors("a"))
