"""Which pictures are drawn, with what, and which are drawn again."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation.drawing import (
    Condition,
    Drawer,
    choose_frames,
    list_conditions,
    list_controls,
    list_film,
)
from evaluation.read_image import load_images
from models.sampling import SamplingSettings
from prompt_datasets import target_class
from run import main
from tests.conftest import flags
from tokens.class_token import save_token
from utils import UserError

SAMPLING = SamplingSettings(height=32, width=32, guidance_scale=7.0, num_inference_steps=3)
TIGER_CAT = target_class(2, "tiger cat", "tiger cat")


def test_a_smaller_evaluation_judges_its_own_images_alone(tiny_config, tmp_path):
    argv = flags(tiny_config, class_index=3, evaluate=True, train=True, num_train_epochs=1)
    assert main([*argv, "--test_size", "4"]) == 0
    assert main([*argv, "--test_size", "3"]) == 0
    metrics = json.loads(next((tmp_path / "img").rglob("metrics.json")).read_text())
    assert metrics["images"] == 3
    assert len(metrics["conditions"]["with"]["classifier"]["right"]) == 3


def test_evaluating_again_draws_only_what_is_missing(capsys, tiny_config, tmp_path):
    argv = flags(tiny_config, class_index=3, evaluate=True)
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    folder, warnings = next((tmp_path / "img").rglob("eval")), []

    def list_drawn(*more):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*/*.png")}
        capsys.readouterr()
        assert main([*argv, *more]) == 0
        warnings.append(capsys.readouterr().err)
        return {
            f"{path.parent.name}/{path.stem}"
            for path in folder.rglob("*/*.png")
            if path.stat().st_mtime_ns != before.get(path)
        }

    assert not list_drawn()
    (folder / "with" / "1.png").unlink()
    assert list_drawn() == {"with/1"}
    assert list_drawn("--test_size", "3") == {"without/2", "with/2"}
    token = next((tmp_path / "pipeline_token").rglob("*.safetensors"))
    save_token(token, "newclas", torch.ones(1, 32), (32,), {})
    assert list_drawn() == {"with/0", "with/1"}
    everything = {"without/0", "without/1", "with/0", "with/1"}
    assert list_drawn("--guidance_scale", "2") == everything
    assert "guidance_scale 7.0, now 2.0" in warnings[-1]
    # another checkpoint in the same place
    os.utime(next(Path(tiny_config.model).rglob("*.safetensors")))
    assert list_drawn("--guidance_scale", "2") == everything
    os.utime(Path(tiny_config.model, "scheduler", "scheduler_config.json"))  # another sampler
    assert list_drawn("--guidance_scale", "2") == everything
    assert list_drawn("--guidance_scale", "2", "--skip_exists", "False") == everything


def test_the_generator_is_loaded_only_where_a_picture_is_missing(generator, tmp_path):
    conditions, loads = [Condition("without", "A photo of a crane", None, 2)], []
    drawer = Drawer(lambda: loads.append(1) or generator, SAMPLING, {"model": "tiny"}, "cpu")
    assert (
        drawer.draw_conditions(conditions, tmp_path, "crane") == 2
        and drawer.draw_conditions(conditions, tmp_path, "crane") == 0
    )
    assert len(loads) == 1
    assert (
        Drawer(lambda: generator, SAMPLING, {"model": "other"}, "cpu").draw_conditions(
            conditions, tmp_path, "crane"
        )
        == 2
    )


def test_pictures_do_not_depend_on_their_batches(generator, tmp_path):
    """Neither do those of a killed run that a second one completes, bit for bit."""
    conditions = [
        Condition("without", "A photo of a crane", None, 5),
        Condition("with", "A photo of a tiger cat", None, 5),
    ]
    folders = [tmp_path / name for name in ("whole", "resumed", "single")]
    # four at once, without a graph
    for folder, batch_size in zip(folders, (1, 1, None), strict=True):
        Drawer(lambda: generator, SAMPLING, {}, "cpu", batch_size).draw_conditions(
            conditions, folder, "crane"
        )
    for path in ("without/2.png", "without/4.png", "with/3.png"):
        (folders[1] / path).unlink()
    assert (
        Drawer(lambda: generator, SAMPLING, {}, "cpu", 1).draw_conditions(
            conditions, folders[1], "crane"
        )
        == 3
    )
    for path in sorted(folders[0].rglob("*.png")):
        name = path.relative_to(folders[0])
        assert path.read_bytes() == (folders[1] / name).read_bytes()
        assert (
            load_images([path]) - load_images([folders[2] / name])
        ).abs().max() <= 1 / 255 + 1e-6


def test_classes_of_one_name_share_the_pictures_without_a_token(generator, tmp_path):
    """They are drawn once, and are what each would draw alone, bit for bit; those with a token are
    not shared.
    """
    generator.set_placeholder("newclas")
    drawn, directions = [], torch.randn(1, sum(generator.token_widths))
    watched = SimpleNamespace(
        encode=generator.encode,
        decode=generator.decode,
        token_widths=generator.token_widths,
        device=generator.device,
        sample=lambda cond, seeds, sampling: (
            drawn.extend(seeds) or generator.sample(cond, seeds, sampling)
        ),
    )
    drawer = Drawer(lambda: watched, SAMPLING, {}, "cpu")
    for name, value in (("bird", 5.0), ("machine", -5.0)):
        conditions = [
            Condition("without", "A photo of a crane", None, 3),
            Condition("with", "A photo of a newclas crane", value * directions, 2),
        ]
        assert drawer.draw_conditions(conditions, tmp_path / name, name) == 5
    assert drawn == [0, 1, 2, 0, 1, 0, 1]
    Drawer(lambda: generator, SAMPLING, {}, "cpu").draw_conditions(
        conditions, tmp_path / "alone", "machine"
    )
    for file in sorted((tmp_path / "alone").rglob("*.png")):
        name = file.relative_to(tmp_path / "alone")
        assert file.read_bytes() == (tmp_path / "machine" / name).read_bytes()
        assert (name.parts[0] == "without") == (
            file.read_bytes() == (tmp_path / "bird" / name).read_bytes()
        )


def test_a_picture_that_is_not_finite_is_not_written(tmp_path):
    generator = SimpleNamespace(
        encode=lambda prompts: torch.zeros(1, 4, 4),
        sample=lambda cond, seeds, sampling: torch.zeros(len(seeds), 4, 4, 4),
        decode=lambda latents: torch.full((len(latents), 3, 32, 32), torch.nan),
    )
    stale = tmp_path / "metrics.json"
    stale.write_text("{}")
    drawer = Drawer(lambda: generator, SAMPLING, {}, "cpu")
    with pytest.raises(
        UserError,
        match="3 .tiger cat. is not finite: .*--mixed_precision bf16",
    ):
        drawer.draw_conditions(
            [Condition("without", "A photo of a tiger cat", None, 2)],
            tmp_path,
            TIGER_CAT.title,
            [stale],
        )
    assert not list(tmp_path.rglob("*.png")) and not stale.exists()


def test_a_token_of_another_width_is_refused(generator, tmp_path):
    drawer = Drawer(lambda: generator, SAMPLING, {}, "cpu")
    with pytest.raises(UserError, match="48 dimensions .* 32"):
        drawer.draw_conditions(
            [Condition("with", "A photo of a cat", torch.zeros(1, 48), 1)], tmp_path, "cat"
        )


def test_contexts_and_controls(tiny_config, tmp_path, generator):
    """Every condition has its own pictures; the untrained control is the initialiser's word in the
    token's place.
    """
    argv = flags(
        tiny_config,
        "--class_index",
        "3",
        "--evaluate",
        "True",
        "--eval_prompts",
        "A painting of a {}",
        "{} at night",
        "--controls",
        "True",
        "--context_judge",
        "miniature.world:context_of",
    )
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    folder = next((tmp_path / "img").rglob("eval"))
    conditions = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("*/0.png")}
    assert conditions == {
        "without",
        "with",
        "untrained",
        "random",
        "prompts/a_painting_of_a/without",
        "prompts/a_painting_of_a/with",
        "prompts/at_night/without",
        "prompts/at_night/with",
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["contexts"]) == {"A painting of a {}", "{} at night"}
    assert (
        0
        <= metrics["contexts"]["{} at night"]["conditions"]["with"]["classifier"]["accuracy"][
            "value"
        ]
        <= 1
    )
    kept = metrics["contexts"]["{} at night"]["context_kept"]
    assert set(kept) == {"without", "with"} and 0 <= kept["with"]["value"] <= 1
    with torch.no_grad():
        cond = generator.encode(["A photo of a a tiger cat"])
        expected = generator.decode(generator.sample(cond, [1], SAMPLING))
    assert (
        load_images([folder / "untrained" / "1.png"]) - expected
    ).abs().max() <= 0.5 / 255 + 1e-5


def test_the_random_control_has_the_norms_of_the_token():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    without, with_token = list_conditions(TIGER_CAT, vectors, "newclas", 4, [])
    _, random = list_controls(TIGER_CAT, vectors, (2,), "newclas", 4, "a")
    assert random.vectors.norm(dim=1).tolist() == pytest.approx([5, 2]) and random.images == 4
    assert not torch.allclose(random.vectors, vectors)
    assert without.prompt == "A photo of a tiger cat"
    assert with_token.prompt == random.prompt == "A photo of a newclas tiger cat"


def test_the_film_of_a_picture_starts_untrained(tiny_config, tmp_path):
    """With fresh noise no training picture comes back: one seed is drawn by the vectors of the
    updates.
    """
    argv = flags(
        tiny_config,
        "--class_index",
        "3",
        "--train",
        "True",
        "--evaluate",
        "True",
        "--num_train_epochs",
        "3",
        "--lr",
        "1",
        "--fresh_noise",
        "True",
        "--train_timesteps",
        "999",
        "600",
        "--controls",
        "True",
    )
    assert main(argv) == 0
    folder = next((tmp_path / "img").rglob("eval"))
    assert json.loads((folder / "metrics.json").read_text())["film"] == [
        f"updates/00{i}" for i in range(3)
    ]
    frames = load_images([folder / "updates" / f"00{i}" / "0.png" for i in range(3)])
    untrained = load_images([folder / "untrained" / "0.png"])[0]
    assert (
        frames[0] - untrained
    ).abs().max() <= 1 / 255 + 1e-6  # its vectors were kept in half precision
    assert (frames[2] - frames[0]).abs().max() > 2 / 255
    assert (frames[1] != frames[0]).any() and (frames[2] != frames[1]).any()
    assert (folder.parent / "report.html").read_text().count("data:image/gif") == 1


def test_the_film_shows_some_updates_evenly():
    every_update = torch.arange(31.0)[:, None, None].expand(31, 1, 4)
    frames = choose_frames(every_update)
    assert len(frames) == 10 and list(frames)[0] == "000" and list(frames)[-1] == "030"
    assert all(frames[name][0, 0] == int(name) for name in frames)
    conditions = list_film(TIGER_CAT, "newclas", frames)
    assert [condition.folder for condition in conditions] == [f"updates/{name}" for name in frames]
    assert all(
        condition.prompt == "A photo of a newclas tiger cat" and condition.images == 1
        for condition in conditions
    )


def test_the_names_of_a_film_are_numbers():
    with pytest.raises(UserError, match="not a vector of an update"):
        list_film(TIGER_CAT, "newclas", {"../../x": torch.zeros(4)})
