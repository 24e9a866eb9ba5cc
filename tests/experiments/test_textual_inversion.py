"""The baseline learns its pictures by the denoising loss, and is compared with the class token."""

import pytest
import torch

from experiments import textual_inversion
from experiments.material import load_real_images, measure_accuracy
from models.denoising import compute_denoising_loss, encode_images
from utils import UserError


def test_the_command(run_experiment, tmp_path):
    result = run_experiment("textual_inversion")
    names = [
        textual_inversion.TOKEN,
        textual_inversion.ALONE,
        textual_inversion.NOUN,
        textual_inversion.TIMED,
        textual_inversion.SNOWY,
    ]
    assert list(result["methods"]) == ["no token", *names] and len(result["tests"]) == len(
        textual_inversion.CONTRASTS
    )
    # by class
    assert all(
        len(values) == 2 for found in result["methods"].values() for values in found.values()
    )
    assert set(result["by_k"]) == {f"{name}, k = {k}" for name in names[1:3] for k in (1, 2)}
    cached = {path: path.read_text() for path in (tmp_path / "work/cached").iterdir()}
    assert run_experiment("textual_inversion")["methods"] == result["methods"]
    assert cached == {path: path.read_text() for path in (tmp_path / "work/cached").iterdir()}


def test_too_few_pictures_for_the_neighbours_are_one_line(run_experiment):
    with pytest.raises(
        UserError, match="--images and --k_images must be greater than --nearest_k 5"
    ):
        run_experiment("textual_inversion", "--images", "5", "--nearest_k", "5")


def test_snowy_pictures_show_snow_and_their_class(study):
    study.options.main_k = 3
    sets = textual_inversion.draw_snowy_pictures(study)
    ((target, files),) = sets.items()
    judge = study.config.context_judge
    assert textual_inversion.measure_context(judge, "in the snow", files).value == 1
    assert measure_accuracy(study, sets).value > 0.6


def test_it_learns_its_pictures(study):
    """The denoising loss on the real pictures falls, from the first word's on, and no weight
    changes.
    """
    real = load_real_images(study, 4)
    generator, (target, files), placeholder = (
        study.session.generator,
        *real.items(),
        study.config.placeholder_token,
    )
    before = [
        parameter.clone() for network in generator.networks for parameter in network.parameters()
    ]
    start = textual_inversion.embed_first_word(study.session.generator, target.name, "a")
    steps = textual_inversion.learn_pictures(study, real, [1, 40])
    assert (
        list(steps) == [1, 40] and 0 < (steps[1][0] - start).norm() < (steps[40][0] - start).norm()
    )
    learned = steps[40][0]
    latents = encode_images(generator, textual_inversion.load_squares(files, 64, 64))[0].repeat(
        16, 1, 1, 1
    )
    with torch.no_grad():
        losses = [
            compute_denoising_loss(
                generator,
                latents,
                generator.encode([f"A photo of a {placeholder}"], vectors.view(1, 1, -1)).expand(
                    64, -1, -1
                ),
                torch.Generator().manual_seed(5),
            ).item()
            for vectors in (start, learned)
        ]
    assert losses[1] < losses[0]
    assert all(
        map(
            torch.equal,
            before,
            (parameter for network in generator.networks for parameter in network.parameters()),
        )
    )


def test_a_first_word_of_several_tokens_starts_from_the_initialiser(study):
    target = study.targets[0]._replace(name="zyzzyva beetle")
    start = textual_inversion.embed_first_word(study.session.generator, target.name, "a")
    assert torch.equal(start, study.session.generator.initial_vectors("a"))
