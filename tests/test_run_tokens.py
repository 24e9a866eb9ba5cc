"""Tokens of several vectors, tokens to continue, and tokens of other tools, by the command line."""

import json
import re

import pytest
import torch

from run import main
from tests.conftest import LABELS, error_of, file_times, flags, save_classifier
from tokens.class_token import load_token, save_token

UPDATE = ("--class_index", "3", "--train", "True", "--num_train_epochs", "1")


def train(config, *more):
    assert main(flags(config, *UPDATE, *more)) == 0


def token_of(tmp_path, exp_id="demo"):
    return load_token(next(tmp_path.rglob(f"{exp_id}/learned_embeds.safetensors")))


@pytest.mark.parametrize(
    "more, words",
    [
        (("--num_vectors", "4"), "a a a a"),
        (("--initializer_token", "tiger cat"), "tiger cat"),
        (("--initializer_token", "tiger cat", "--num_vectors", "3"), "tiger cat tiger"),
    ],
)
def test_a_token_of_several_vectors(tiny_config, tmp_path, generator, capsys, more, words):
    train(tiny_config, *more, "--evaluate", "True", "--controls", "True")
    start = generator.initial_vectors(words)
    assert f"the token has {len(start)} vectors" in capsys.readouterr().out
    # the first update's images are drawn with the initialiser
    assert torch.equal(token_of(tmp_path).vectors, start)
    arms = next(tmp_path.rglob("eval"))
    assert all(
        (arms / "with" / f"{seed}.png").read_bytes()
        == (arms / "untrained" / f"{seed}.png").read_bytes()
        for seed in range(2)
    )
    written = file_times(tmp_path)
    train(tiny_config, *more, "--evaluate", "True", "--controls", "True")
    assert file_times(tmp_path) == written


def test_a_token_file_is_continued(tiny_config, tmp_path):
    vectors = 0.1 * torch.randn(2, 32)
    save_token(tmp_path / "start.safetensors", "striped", vectors, (32,), {})
    train(tiny_config, "--initializer_token", str(tmp_path / "start.safetensors"))
    assert (
        torch.equal(token_of(tmp_path).vectors, vectors)
        and token_of(tmp_path).placeholder == "newclas"
    )


@pytest.mark.parametrize(
    "width, header, more, reason",
    [
        (48, {}, (), "48 dimensions"),
        (32, {}, ("--num_vectors", "3"), "num_vectors is 3, and .* holds 2 vectors"),
        (
            32,
            {"seed": "1"},
            (),
            "seeds from 1 on",
        ),
    ],
)
def test_token_files_that_cannot_be_continued(
    capsys, tiny_config, tmp_path, width, header, more, reason
):
    save_token(tmp_path / "start.safetensors", "striped", torch.randn(2, width), (width,), header)
    line = error_of(
        capsys,
        *flags(tiny_config, *UPDATE, "--initializer_token", tmp_path / "start.safetensors", *more),
    )
    assert re.search(reason, line)
    assert not list(tmp_path.rglob("pipeline_token"))


def evaluate(config, file, *more):
    return flags(config, *more, class_index=3, evaluate=True, token=file)


def test_a_token_of_another_tool_is_judged(tiny_config, tmp_path, capsys):
    """Automatic1111's file: pictures, metrics and report, and nothing again when asked again."""
    vectors = 0.1 * torch.randn(2, 32)
    torch.save(
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": vectors},
            "name": "cat-toy",
            "step": 500,
        },
        tmp_path / "cat-toy.pt",
    )
    assert main(evaluate(tiny_config, tmp_path / "cat-toy.pt")) == 0
    token = token_of(tmp_path)
    assert torch.equal(token.vectors, vectors) and token.header["imported_from"] == "cat-toy.pt"
    metrics = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert metrics["held_out"] is False
    written = file_times(tmp_path)
    assert (
        main(evaluate(tiny_config, tmp_path / "cat-toy.pt")) == 0
        and file_times(tmp_path) == written
    )
    assert main(evaluate(tiny_config, tmp_path / "cat-toy.pt", "--controls", "True")) == 0
    line = error_of(capsys, *flags(tiny_config, *UPDATE))
    assert "give a new --exp_id" in line


def test_a_loss_that_cannot_teach_starts_no_training(tiny_config, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken_loss.py").write_text("def none(images, targets): return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "loss 'broken_loss:none' fails" in error_of(
        capsys, *flags(tiny_config, *UPDATE, "--loss", "broken_loss:none")
    )
    assert not list(tmp_path.rglob("config.yml"))


def test_our_own_token_may_be_judged_by_another_classifier(tiny_config, tmp_path, capsys):
    """The classifier that trained it is remembered: as evaluator it is not independent."""
    train(tiny_config)
    file, classifier = next(tmp_path.rglob("learned_embeds.safetensors")), tiny_config.classifier
    tiny_config.classifier = save_classifier(tmp_path / "other", LABELS)
    argv = evaluate(tiny_config, file, "--class_index", "1", "--exp_id", "copied")
    assert main(argv) == 0 and "flatters" not in capsys.readouterr().err
    token = token_of(tmp_path, "copied")
    assert torch.equal(token.vectors, token_of(tmp_path).vectors)
    assert (token.header["guided_by"], token.header["class_name"]) == (classifier, "crane")
    assert (
        main([*argv, "--evaluator", classifier]) == 0
        and "the evaluator also trained this token" in capsys.readouterr().err
    )


def test_a_changed_file_is_another_start(tiny_config, tmp_path, capsys):
    file, argv = (
        tmp_path / "start.safetensors",
        flags(tiny_config, *UPDATE, "--initializer_token", str(tmp_path / "start.safetensors")),
    )
    save_token(file, "striped", torch.randn(2, 32), (32,), {"seed": "4"})
    assert main([*argv, "--evaluate", "True"]) == 0 and token_of(tmp_path).header["seed"] == "4"
    assert main(argv) == 0
    save_token(file, "striped", torch.randn(2, 32), (32,), {"seed": "4"})
    assert "another content of" in error_of(capsys, *argv)
    assert "seeds from 4 on" in error_of(
        capsys, *flags(tiny_config, class_index=3, evaluate=True, test_size=5)
    )


def test_a_token_from_elsewhere_and_continued_is_not_held_out(tiny_config, tmp_path):
    save_token(tmp_path / "start.safetensors", "striped", torch.randn(2, 32), (32,), {})
    train(
        tiny_config,
        "--evaluate",
        "True",
        "--initializer_token",
        str(tmp_path / "start.safetensors"),
    )
    assert json.loads(next(tmp_path.rglob("metrics.json")).read_text())["held_out"] is False


def test_settings_that_an_older_run_did_not_know_have_their_defaults(tiny_config, tmp_path, capsys):
    train(tiny_config)
    file = next(tmp_path.rglob("config.yml"))
    file.write_text(
        "".join(line for line in file.read_text().splitlines(True) if not line.startswith("loss:"))
    )
    train(tiny_config)
    assert "was trained with loss cross_entropy, now norm_penalty" in error_of(
        capsys, *flags(tiny_config, *UPDATE, "--loss", "norm_penalty")
    )


def test_tokens_that_cannot_be_evaluated(capsys, tiny_config, tmp_path):
    for name, width, header in (
        ("wide", 48, {}),
        ("seen", 32, {"seed": "1"}),
        ("one", 32, {}),
        ("two", 32, {}),
    ):
        save_token(tmp_path / f"{name}.safetensors", name, torch.randn(1, width), (width,), header)
    for name, reason in (("none", "no file"), ("wide", "have 48 dimensions and this model's 32")):
        assert reason in error_of(capsys, *evaluate(tiny_config, tmp_path / f"{name}.safetensors"))
        assert not list(tmp_path.rglob("learned_embeds.safetensors"))
    assert "leave --train True out" in error_of(
        capsys, *evaluate(tiny_config, tmp_path / "one.safetensors", "--train")
    )
    assert "leave it out" in error_of(
        capsys, *evaluate(tiny_config, tmp_path / "one.safetensors", "--num_vectors", "5")
    )
    assert "that class as --class_index" in error_of(
        capsys, *evaluate(tiny_config, tmp_path / "one.safetensors", "--class_index", "all")
    )
    assert "seeds from 1 on" in error_of(
        capsys, *evaluate(tiny_config, tmp_path / "seen.safetensors")
    )
    assert main(evaluate(tiny_config, tmp_path / "one.safetensors")) == 0
    assert "holds another token than 'two.safetensors'" in error_of(
        capsys, *evaluate(tiny_config, tmp_path / "two.safetensors")
    )
    assert main(evaluate(tiny_config, tmp_path / "two.safetensors", "--skip_exists", "False")) == 0
    assert torch.equal(token_of(tmp_path).vectors, load_token(tmp_path / "two.safetensors").vectors)
    train(tiny_config, "--exp_id", "trained")
    assert "already holds a training" in error_of(
        capsys, *evaluate(tiny_config, tmp_path / "two.safetensors", "--exp_id", "trained")
    )


def test_training_without_guidance_draws_with_it(tiny_config, tmp_path):
    """Evaluation's pictures, of tokens that have not moved yet, do not know of it."""
    train(tiny_config, "--exp_id", "plain")
    train(tiny_config, "--exp_id", "unguided", "--train_guidance_scale", "1")
    histories = [
        next(tmp_path.rglob(f"{name}/history.jsonl")).read_text() for name in ("plain", "unguided")
    ]
    assert histories[0] != histories[1]
    for name, more in (("plain", ()), ("unguided", ("--train_guidance_scale", "1"))):
        assert main(flags(tiny_config, *UPDATE, *more, "--evaluate", "True", "--exp_id", name)) == 0
    pictures = [
        [file.read_bytes() for file in sorted(tmp_path.rglob(f"{name}/eval/with*/*.png"))]
        for name in ("plain", "unguided")
    ]
    assert len(pictures[0]) == 4 and pictures[0] == pictures[1]
