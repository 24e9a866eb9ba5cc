"""Settings from defaults, files and flags; every wrong one is one line that names it, and nothing
is made.
"""

import os
from pathlib import Path

import pytest

from command_line import parse_settings, read_settings
from config import SETTINGS, names_deciding
from run import main
from tests.conftest import error_of, flags
from utils import UserError

FLAGS = [  # a flag, its value, and what the line must say besides both
    ("class_index", "0", "the classifier's classes are 1 to 5"),
    ("class_index", "6", "the classifier's classes are 1 to 5"),
    ("class_index", "1001", "the classifier's classes are 1 to 5"),
    ("class_index", "-1", "must be a number (283), a range (1-12)"),
    ("class_index", "1-", "must be a number (283), a range (1-12)"),
    ("class_index", "1,,2", "must be a number (283), a range (1-12)"),
    ("class_index", "5-2", "runs backwards: write 2-5"),
    ("class_index", "2-1000000000", "the classifier's classes are 1 to 5"),
    ("class_index", "9" * 5000, "must be a number (283), a range (1-12)"),
    ("class_index", "tigre cat", "did you mean 'tiger cat'?"),
    ("class_index", "crane", "2 classes: give a number, 1 (crane, bird) or 2 (crane, machine)"),
    ("class_index", "zeppelin", "--list_classes shows its classes"),
    ("class_index", "", "give --class_index 283, 1-12, 1,5,9, all or a name"),
    ("exp_id", "../x", "a folder's name"),
    ("exp_id", "..", "a folder's name"),
    ("exp_id", "/etc", "a folder's name"),
    ("exp_id", "x" * 101, "of 100 bytes at most"),
    ("exp_id", "鶴" * 34, "of 100 bytes at most"),
    ("exp_id", "a\nb", "has unprintable characters"),
    ("model", " ", "a name or a folder"),
    (
        "model",
        "~nobody-of-this-name/model",
        "there is no user 'nobody-of-this-name'; ./~nobody-of-this-name/model",
    ),
    ("output_path", "~nobody-of-this-name", "there is no user 'nobody-of-this-name'"),
    ("output_path", "{tmp}/$NO_SUCH/x", "the variable $NO_SUCH is not set"),
    ("output_path", "${NO_SUCH}", "the variable $NO_SUCH is not set"),
    ("config", "$NO_SUCH/x.yml", "the variable $NO_SUCH is not set"),
    ("eval_prompts", "~nobody-of-this-name/prompts.txt", "there is no user 'nobody-of-this-name'"),
    ("model", "x" * 5000, "no such folder, and no hub id either"),
    ("model", "nowhere/at all", "no such folder, and no hub id either"),
    ("classifier", "", "a name or a folder"),
    ("classifier", "timm:resnet5o", "timm.list_models(pretrained=True) lists them"),
    ("classifier", "{tmp}", "lacks a file or holds a broken one"),
    ("classifier", "README.md", "it is a broken file, or not of the right kind"),
    ("evaluator", "", "a name or a folder (--help shows which), or none"),
    ("labels", " ", "a name or a folder (--help shows which), or none"),
    ("labels", "nowhere.txt", "has labels of its own"),
    ("class_names", "nowhere.yml", "no file"),
    ("class_names", "{tmp}/owl.yml", "must be a class number from 1 to 5 and a name"),
    ("real_images", "nowhere", "no real_images folder"),
    ("real_images", "math:sqrt", "has no source code"),
    ("real_images", ".world:draw", "neither a folder nor module:function"),
    ("output_path", "x" * 5000, "File name too long"),
    ("features", "inception:nowhere.pth", "no file"),
    ("fid_mode", "bicubic", "legacy or clean"),
    ("output_path", "{tmp}/owl.yml", "owl.yml' is a file"),
    ("output_path", "{tmp}/owl.yml/below", "cannot be a folder"),
    ("num_train_epochs", "0", "from 1 to 100,000"),
    ("num-train-epochs", "2.5", "from 1 to 100,000"),
    ("epoch_size", "0", "from 1 to 10,000"),
    ("epoch_size", "-5", "from 1 to 10,000"),
    ("epoch_size", "1000000000", "from 1 to 10,000"),
    ("number_of_prompts", "4", "from 1 to 3"),
    ("target_accuracy", "70", "from 0 to 1"),
    ("target_accuracy", "nan", "from 0 to 1"),
    ("early_stopping", "0", "from 1 to 100,000"),
    ("batch_size", "0", "from 1 to 10,000, or none"),
    ("batch_size", "auto", "from 1 to 10,000"),
    ("classes_at_once", "0", "from 1 to 1,000"),
    ("memory_gb", "0", "greater than 0"),
    ("memory_gb", "8", "is for --estimate True"),
    ("lr", "0", "greater than 0"),
    ("lr", "-0.001", "greater than 0"),
    ("lr", "inf", "1,000 at most"),
    ("lr", "nan", "greater than 0"),
    ("lr", "fast", "greater than 0"),
    ("betas", "0.9", "two numbers in [0, 1), such as 0.9 0.999"),
    ("betas", "0.9 1", "two numbers in [0, 1), such as 0.9 0.999"),
    ("weight_decay", "-1", "from 0 to 1,000"),
    ("eps", "0", "greater than 0"),
    ("max_grad_norm", "0", "greater than 0"),
    ("seed", "-1", "from 0 to"),
    ("seed", str(2**32), "from 0 to 4,294,967,295"),
    ("train_images", "some", "all, film or none"),
    (
        "seed",
        "1",
        "would train on images that evaluation uses (seeds 0 to 1): give --seed 2 or more",
    ),
    ("guidance_scale", "-1", "from 0 to 100"),
    ("guidance_scale", "nan", "from 0 to 100"),
    ("height", "500", "divisible by 8, for the VAE"),
    ("height", "0", "divisible by 8, for the VAE"),
    ("width", "-64", "divisible by 8, for the VAE"),
    ("width", "800000", "from 8 to 8,192"),
    ("num_inference_steps", "0", "from 1 to 999"),
    ("num_inference_steps", "1000", "from 1 to 999"),
    (
        "train_timesteps",
        "600 800",
        "falling numbers from 999 to 0, from noise to image, such as 999 800 600",
    ),
    ("train_timesteps", "1000 600", "from 999 to 0"),
    ("train_timesteps", "600 -1", "from 999 to 0"),
    ("train_timesteps", "999 999", "falling numbers"),
    ("fresh_noise", "perhaps", "must be True or False: invalid bool value"),
    ("placeholder_token", "new class", "without spaces"),
    ("placeholder_token", "", "one word"),
    ("placeholder_token", "__metadata__", "such as newclas"),
    ("placeholder_token", "{}", "such as newclas"),
    ("placeholder_token", "photo", "is part of"),
    ("placeholder_token", "ger", "is part of 'tiger cat'"),
    ("placeholder_token", "hig", "is part of 'a high resolution"),
    ("initializer_token", "no_such.safetensors", "no file 'no_such.safetensors'"),
    (
        "initializer_token",
        "{tmp}/folder",
        "a word, a phrase or a token file (.safetensors, .pt, .bin)",
    ),
    ("num_vectors", "0", "from 1 to 64, or none"),
    ("num_vectors", "60", "the model reads 24, so its end would be cut off"),
    ("loss", "hinge", "loss must be cross_entropy, norm_penalty or module:function"),
    ("loss", "math:no_such", "module 'math' has no function 'no_such'"),
    ("train_guidance_scale", "-1", "from 0 to 100, or none"),
    ("guidance_rescale", "2", "from 0 to 1"),
    ("token", "no_such.safetensors", "leave --train True out"),
    ("placeholder_token", "newclas", "is part of 'newclas owl'"),
    ("initializer_token", "", "a word, a phrase or a token file"),
    ("test_size", "0", "from 1 to 100,000"),
    ("eval_prompts", "", "is neither a file nor a prompt"),
    ("eval_prompts", "in the snow", "is neither a file nor a prompt"),
    ("eval_prompts", "{tmp}/blank.txt", "holds no prompt, such as"),
    ("eval_prompts", "{tmp}/escape.txt", "has unprintable characters"),
    ("eval_prompts", "{} and {}", "needs one {} where the class goes"),
    ("context_judge", "judge", "module:function"),
    ("context_judge", ".judge:f", "module:function"),
    ("context_judge", "os:no_such", "has no function 'no_such'"),
    ("device", "tpu", "cuda, cuda:1, mps or cpu"),
    ("device", "cuda:x", "cuda, cuda:1, mps or cpu"),
    ("mixed_precision", "fp8", "no, fp16 or bf16"),
    ("mixed_precision", "fp16", "--mixed_precision no"),  # on a CPU
    ("clas_index", "3", "did you mean '--class_index'?"),
]
LISTS = ("betas", "train_timesteps")
FILES = [  # what stands in a --config file, and what the line must say
    ("\tlr: 1", "is not YAML"),
    ("lr: 1\n\tseed: 2", "is not YAML"),
    ("- lr\n- seed", "must hold lines such as 'lr: 0.001'"),
    ("just words", "must hold lines such as 'lr: 0.001'"),
    ("lr: [0.1, 0.2]", "lr must be one value, not ['0.1', '0.2']"),
    ("lr: {a: 1}", "'lr' must have one value or a plain list"),
    ("betas: [[0.9], 0.999]", "'betas' must have one value or a plain list"),
    ("eval_prompts: ['--debug', '{}']", "eval_prompts: '--debug' needs one {}"),
    ("lr: --debug", "invalid float value: '--debug'"),
    ('"\\e]0;owned\\a\\nlr": 1', "has an unknown setting ' ]0;owned  lr'"),
    ("lr: 1e-3\nlr: 2e-3", "'lr' is there twice"),
    ("learning_rat: 1", "unknown setting 'learning_rat'"),
    ("guidance: 2", "did you mean 'guidance_scale'?"),
    ("lr: !!python/object/apply:os.system ['true']", "lr must be one value"),
    (
        "a: &a [x, x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nlr: [*c, *c, *c]",
        "must have one value or a plain",
    ),
    ("? [a, b]\n: 1", "is not YAML"),
    ("[" * 1000, "is not YAML"),
    ("lr: 1\n---\nlr: 2", "is not YAML"),
    ('lr: "1\\0"', "lr must be greater than 0"),
    ('exp_id: "a\\0b"', "has unprintable characters"),
    ("seed: [", "is not YAML"),
    ("lr: \udcff", "is not a text file in UTF-8"),
    ("#" * 2**21, "bytes: it is not a text file"),
]


def test_the_reference_setting():
    """DESIGN: the paper's numbers are the defaults."""
    config, _ = parse_settings(["--class_index", "283", "--train", "True"])
    config.validate_settings()
    assert (config.lr, config.epoch_size, config.num_train_epochs, config.seed) == (
        1.25e-3,
        5,
        50,
        35,
    )
    assert (config.guidance_scale, config.num_inference_steps, config.mixed_precision) == (
        7.0,
        30,
        "fp16",
    )
    assert config.train is True and config.evaluate is False and config.train_timesteps is None
    assert config.skip_exists is True


@pytest.mark.parametrize("name", sorted(path.name for path in Path("configs").glob("*.yml")))
def test_shipped_configs_are_valid(name):
    config, _ = parse_settings(
        ["--config", f"configs/{name}", "--class_index", "1", "--train", "True"]
    )
    config.validate_settings()


def test_the_page_names_every_setting_of_the_authors_code():
    page = Path("docs/fidelity.md").read_text()
    given = read_settings("configs/authors.yml")
    assert [name for name in given if f"`{name}`" not in page] == []
    config, _ = parse_settings(["--config", "configs/authors.yml"])
    drawing, training = config.sampling_settings(), config.sampling_settings(training=True)
    assert (
        training["guidance_scale"],
        drawing["guidance_scale"],
        training["num_inference_steps"],
    ) == (7, 7.5, 30)


def test_what_a_setting_decides():
    """What changes only speed, memory or what is measured decides neither."""
    assert {"lr", "seed", "guidance_scale", "model", "classifier"} <= set(names_deciding("token"))
    assert {"guidance_scale", "model", "height", "mixed_precision"} <= set(
        names_deciding("pictures")
    )
    neither = set(SETTINGS) - {*names_deciding("token"), *names_deciding("pictures")}
    assert {
        "batch_size",
        "classes_at_once",
        "device",
        "evaluator",
        "skip_exists",
        "exp_id",
        "test_size",
        "train_images",
    } <= neither
    assert not {"lr", "seed"} & set(names_deciding("pictures"))


@pytest.mark.parametrize(
    "argv, seed",
    [  # and the highest seed that these settings may have
        ([], 2**32 - 5),
        (["--epoch_size", "1"], 2**32 - 1),
        (["--num_train_epochs", "7"], 2**32 - 5),
        (["--fresh_noise", "True"], 2**32 - 250),
        (["--fresh_noise", "True", "--num_train_epochs", "7"], 2**32 - 35),
    ],
)
def test_training_never_reaches_the_seeds_of_evaluation(argv, seed):
    """Noise of seed 2**32 is noise of seed 0."""

    def check(*more):
        parse_settings(["--class_index", "1", "--train", "True", *argv, *more])[
            0
        ].validate_settings()

    check("--seed", str(seed))
    with pytest.raises(
        UserError, match=f"too high for .* training images: .* give --seed {seed} or less|from 0 to"
    ):
        check("--seed", str(seed + 1))
    check("--seed", str(2**32 - 1), "--train", "False", "--evaluate", "True")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "owl.yml").write_text("9: owl\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "escape.txt").write_text("a {} \x1b]0;owned\x07\n")
    (tmp_path / "taken.yml").write_text("3: newclas owl\n")
    return tmp_path


def refused(capsys, config, folder, *more) -> str:
    """The line that such a run prints; it made no file."""
    before = sorted(folder.rglob("*"))
    line = error_of(
        capsys,
        *flags(config, *more, class_index=3, train=True, evaluate=True, output_path=folder / "new"),
    )
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize(
    "name, value, right", FLAGS, ids=[f"{name} {value[:20]!r}" for name, value, _ in FLAGS]
)
def test_a_wrong_flag(capsys, tiny_config, folder, name, value, right):
    value = value.replace("{tmp}", str(folder))
    compared = (
        ["--test_size", "6", "--real_images", "tests.drawings:draw_noise"]
        if name == "features"
        else []
    )
    taken = ["--class_names", str(folder / "taken.yml")] if value == "newclas" else []
    more = [*compared, *taken, f"--{name}"]
    line = refused(
        capsys, tiny_config, folder, *more, *(value.split() if name in LISTS else [value])
    )
    assert right in line and "Traceback" not in line
    called = {
        "model": "cannot open",
        "classifier": "cannot open",
        "class_names": "owl.yml",
        "output_path": "File name too long",
        "config": "the variable",
    }
    assert (
        name.replace("-", "_") in line
        or called.get(name, "no such name") in line
        or f"no file '{value}'" in line
    )
    shown = value.split()[-1] if name in LISTS else value.strip().removeprefix("timm:")
    assert shown in line or repr(value) in line or value.endswith("escape.txt")


@pytest.mark.parametrize("text, right", FILES, ids=[repr(text[:30]) for text, _ in FILES])
def test_a_wrong_file(capsys, tiny_config, folder, text, right):
    (folder / "settings.yml").write_bytes(text.encode(errors="surrogateescape"))
    line = refused(capsys, tiny_config, folder, "--config", str(folder / "settings.yml"))
    assert right in line and ("settings.yml" in line or text.split(":")[0] in line)


def test_nothing_may_be_written_there(capsys, tiny_config, folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    assert f"'{folder}' may not be written to" in refused(capsys, tiny_config, folder)


def test_a_folder_that_the_system_refuses_to_make(capsys, tiny_config):
    line = error_of(
        capsys,
        *flags(tiny_config, class_index=3, train=True, output_path="/proc/nowhere"),
    )
    assert "'/proc/nowhere" in line


@pytest.mark.parametrize(
    "more",
    [
        ["--class_index", "3,3,3-3"],
        ["--guidance_scale", "1"],
        ["--guidance_scale", "0.5"],
        ["--num_inference_steps", "1"],
        ["--placeholder_token", "neu-wört"],
        ["--test_size", "1"],
        pytest.param(
            ["--num_inference_steps", "999", "--train", "False", "--guidance_scale", "1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_odd_but_right(tiny_config, tmp_path, capsys, more):
    """Duplicates are done once; a guidance of 1 or less is none; any word that stands nowhere else
    serves.
    """
    out = tmp_path / "wörter und mehr"
    argv = flags(tiny_config, class_index=3, train=True, num_train_epochs=1, output_path=out)
    if "--train" in more:
        assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--evaluate", "True", *more]) == 0
    assert (
        capsys.readouterr().out.count("pictures: ") == 1
        and len(list(out.rglob("metrics.json"))) == 1
    )
