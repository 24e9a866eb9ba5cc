"""Every hyper-parameter: its default in the paper's setting, what it does, what it may be.

Edit a default here, put it in a YAML file (`--config`), or give it as a flag; flags beat the file.
"""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from utils import UserError, did_you_mean, read_yaml_mapping, require


def setting(default, text: str):
    """A dataclass field with its help; a list default is copied for every config."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class RunConfig:
    """The reference setting of Discriminative Class Tokens (ICCV 2023): Stable Diffusion 1.4 on a CUDA GPU."""

    class_index: str = setting("", "Which classes: a number counted from 1 (283), a range (1-12), a list (1,5,9), "
                                   "'all', or a name ('tiger cat'). --list_classes shows them.")
    train: bool = setting(False, "Learn a token for each class.")
    evaluate: bool = setting(False, "Draw the same seeds without and with the token, and judge them.")
    exp_id: str = setting("demo", "The name of the run: the last folder of every output.")
    model: str = setting("CompVis/stable-diffusion-v1-4", "The generator: a hub id or folder in the layout of a "
                                                          "StableDiffusionPipeline.")
    classifier: str = setting("inet", "The guiding classifier: inet, inat, cub, miniature, miniature_evaluator, "
                                      "a transformers image classifier (hub id or folder), or timm:<name>.")
    evaluator: str | None = setting(None, "A second classifier that judges and never guides (the same choices). "
                                          "'none': only the guiding one judges.")
    class_names: str | None = setting(None, "A YAML file {number: name} of names to use in prompts instead of the "
                                            "classifier's own, such as {135: crane bird}.")
    real_images: str | None = setting(None, "Real pictures, shown beside the generated ones and compared with them: a "
                                            "folder with a folder for each class (named 0283_tiger_cat, 283, tiger cat "
                                            "or the label), or module:function that draws one.")
    features: str = setting("inception", "What FID, KID and coverage compare, where real_images are given: inception, "
                                         "inception:<file of weights>, or a classifier's last features (the same "
                                         "choices as classifier).")
    output_path: str = setting(".", "The folder that holds pipeline_token/ and img/.")
    num_train_epochs: int = setting(50, "Updates at most.")
    epoch_size: int = setting(5, "Images an update.")
    number_of_prompts: int = setting(3, "How many of the paper's prompt templates take turns (1 to 3).")
    target_accuracy: float = setting(0.7, "Stop when more than this share of an update's images is classified right; "
                                          "with fresh noise, of the last three updates' images.")
    early_stopping: int = setting(15, "Stop after this many updates without a better loss.")
    batch_size: int | None = setting(None, "Images that are held in memory with a graph at once; changes speed and "
                                           "memory, not results. 'none': as many as fit.")
    classes_at_once: int = setting(1, "Classes that learn together in the same batches; changes speed and memory, not "
                                      "results.")
    lr: float = setting(1.25e-3, "AdamW's learning rate (0.00025 x 5 images).")
    betas: list[float] = setting([0.9, 0.999], "AdamW's betas.")
    weight_decay: float = setting(1e-2, "AdamW's weight decay, on the one trained vector.")
    eps: float = setting(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = setting(1.0, "The gradient's norm is clipped to this.")
    seed: int = setting(35, "Seed of the first training image; the next ones count up. Evaluation uses 0 to "
                            "test_size - 1, so this must not be below test_size.")
    guidance_scale: float = setting(7.0, "Classifier-free guidance, in training and evaluation alike; 1 or less: none.")
    height: int = setting(512, "Image height in pixels, divisible by 8.")
    width: int = setting(512, "Image width in pixels, divisible by 8.")
    num_inference_steps: int = setting(30, "Denoising steps of the checkpoint's own scheduler.")
    train_timesteps: list[int] | None = setting(None, "Timesteps of the training trajectory, such as 999 800 600; it "
                                                      "jumps from the last one to z_0. 'none': the checkpoint's "
                                                      "own scheduler, as in the paper.")
    fresh_noise: bool = setting(False, "New noise every update instead of the paper's same seeds.")
    placeholder_token: str = setting("newclas", "The word that stands for the token in prompts.")
    initializer_token: str = setting("a", "The word whose embedding the token starts from.")
    test_size: int = setting(10, "Evaluation images a class, each without and with the token.")
    eval_prompts: list[str] = setting([], "More prompts to evaluate in, with {} for the class, such as \"A painting of "
                                          "{}\" \"A photo of a {} in the snow\"; or a text file with one a line.")
    context_judge: str | None = setting(None, "module:function that says which words of a prompt a picture (PIL) "
                                              "shows, or None: eval_prompts are then judged by it too.")
    controls: bool = setting(False, "Evaluate an untrained and a random token of the same norm too: what they gain is "
                                    "not the training's.")
    device: str = setting("cuda", "cuda, cuda:1, mps or cpu.")
    mixed_precision: str = setting("fp16", "Precision of the frozen generator: no, fp16 or bf16. The token and the "
                                           "classifiers are always float32.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the last step: slower, less memory.")
    torch_compile: bool = setting(False, "Compile the UNet and the VAE's decoder: minutes at the start, and again for "
                                         "batches of other sizes, then faster; for long sweeps.")
    skip_exists: bool = setting(False, "Do not train a class whose token is already there.")

    def validate(self):
        """Raise UserError for the first setting that cannot work, naming it, its value and what would be right."""
        require(self.class_index, "which class? give --class_index 283, 1-12, 1,5,9, all or a name; --list_classes "
                                  "shows the classes of the classifier")
        require(self.train or self.evaluate, "nothing to do: give --train True, --evaluate True or both")
        for name, value in asdict(self).items():
            for part in value if isinstance(value, list) else [value]:
                require(not isinstance(part, str) or part.isprintable(), f"{name} {part!r} has characters that cannot "
                                                                         "be printed")
            if name in ALLOWED and not (value is None and name in MAY_BE_NONE):
                require(ALLOWED[name][0](value), f"{name} must be {in_words(name)}, not "
                                                 f"{value if not isinstance(value, str) else repr(value)}")
        require(not self.train or self.seed >= self.test_size,
                f"seed {self.seed} would train on images that evaluation uses (seeds 0 to {self.test_size - 1}): give "
                f"--seed {self.test_size} or more, or --test_size {self.seed} or less")
        check_output_path(self.output_path)


def between(low: float, high: float) -> tuple[Callable[[float], bool], str]:
    return lambda value: low <= value <= high, f"from {low} to {high:,}"


def above(low: float, high: float) -> tuple[Callable[[float], bool], str]:
    return lambda value: low < value <= high, f"greater than {low}, {high:,} at most"


def is_folder_name(name: str) -> bool:
    return 0 < len(name.encode()) <= 100 and name.strip(". ") == name and not set(name) & set("/\\")


FUNCTION = r"[A-Za-z_]\w*(\.\w+)*:\w+"
WORD = (lambda value: 0 < len(value) <= 50 and not set(value) & set(" {}") and value != "__metadata__",
        "one word of 50 letters at most, without spaces, such as newclas")
SIDE = (lambda value: 8 <= value <= 8192 and value % 8 == 0, "divisible by 8, for the VAE, and from 8 to 8,192")
GIVEN = (lambda value: bool(value.strip()), "a name or a folder (--help shows which)")
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {  # what a setting may be: a test, and the same in words
    "exp_id": (is_folder_name, "a folder's name of 100 letters at most, without / or \\, and no dot or space at its "
                               "ends, such as demo"),
    "model": GIVEN, "classifier": GIVEN, "evaluator": GIVEN, "features": GIVEN, "class_names": GIVEN,
    "real_images": GIVEN, "output_path": GIVEN,
    "num_train_epochs": between(1, 100_000), "epoch_size": between(1, 10_000), "number_of_prompts": between(1, 3),
    "target_accuracy": between(0, 1), "early_stopping": between(1, 100_000), "batch_size": between(1, 10_000),
    "classes_at_once": between(1, 1000), "lr": above(0, 1000), "weight_decay": between(0, 1000), "eps": above(0, 1),
    "betas": (lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
              "two numbers in [0, 1), such as 0.9 0.999"),
    "max_grad_norm": above(0, 10**9), "seed": between(0, 2**32), "guidance_scale": between(0, 100), "height": SIDE,
    "width": SIDE, "num_inference_steps": between(1, 999),
    "train_timesteps": (lambda steps: steps and steps == sorted(set(steps), reverse=True) and steps[-1] >= 0
                        and steps[0] <= 999, "numbers from 999 to 0 that fall, from noise to image, such as 999 800 "
                                             "600"),
    "placeholder_token": WORD, "initializer_token": WORD, "test_size": between(1, 100_000),
    "context_judge": (lambda value: re.fullmatch(FUNCTION, value), "module:function"),
    "device": (lambda value: re.fullmatch(r"cuda(:\d{1,3})?|mps|cpu", value), "cuda, cuda:1, mps or cpu"),
    "mixed_precision": (lambda value: value in ("no", "fp16", "bf16"), "no, fp16 or bf16"),
}


def in_words(name: str) -> str:
    """What a setting may be."""
    return ALLOWED[name][1] + ", or none" * (name in MAY_BE_NONE)


def check_output_path(path: str):
    """Raise UserError where nothing can be written to `path`, or to the folder that it would be made in."""
    for folder in (Path(path).absolute(), Path(path, "img").absolute(), Path(path, "pipeline_token").absolute()):
        there = next(each for each in (folder, *folder.parents) if exists(each))
        require(there.is_dir(), f"output_path '{path}' cannot be a folder: '{there}' is none")
        require(os.access(there, os.W_OK | os.X_OK), f"output_path '{path}': '{there}' may not be written "
                                                     "to, or is on a read-only file system; give another folder")


def exists(path: Path) -> bool:
    """Also where it is a link to nowhere.

    Raises:
        UserError: it can be no path.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"output_path '{path}': {error.strerror}") from error
    return True


DECISIVE = ("model", "classifier", "class_names", "num_train_epochs", "epoch_size", "number_of_prompts",
            "target_accuracy", "early_stopping", "lr", "betas", "weight_decay", "eps", "max_grad_norm", "seed",
            "guidance_scale", "height", "width", "num_inference_steps", "train_timesteps", "fresh_noise",
            "placeholder_token", "initializer_token", "mixed_precision")
MAY_BE_NONE = [f.name for f in fields(RunConfig) if f.default is None]
LISTS = ("betas", "train_timesteps", "eval_prompts")


def settings_from_file(path: str) -> list[str]:
    """The flags that a YAML file of settings stands for: {'lr': 0.01} -> ['--lr=0.01'].

    Raises:
        UserError: no such file, not a mapping, or a key that is no setting.
    """
    known, flags = [f.name for f in fields(RunConfig)], []
    for key, value in read_yaml_mapping(path, "lr: 0.001").items():
        require(key in known, f"'{path}' has an unknown setting '{key}'; "
                              + (did_you_mean(key, known) or "--help lists them"))
        require(isinstance(value, str) or key in LISTS, f"'{path}': {key} must be one value, not {value}")
        if value in ("null", "~", "", []) or value == "none" and key in MAY_BE_NONE:
            continue
        parts = value if isinstance(value, list) else []
        like_flags = [part for part in parts if re.match(r"-[^\d.]", part)]
        require(not like_flags, f"'{path}': {key} must not begin with '-', as in {like_flags}")
        flags += [f"--{key}", *parts] if parts else [f"--{key}={value}"]
    return flags


def to_yaml(config: RunConfig) -> str:
    """The resolved settings, as saved beside each token; `--config` reads them back."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def as_typed(config: RunConfig) -> dict[str, str | list[str]]:
    """The settings as `read_yaml_mapping` reads them back from a saved file."""
    return yaml.load(to_yaml(config), Loader=yaml.BaseLoader)  # nosec B506  # it makes strings alone


class OneLineParser(HfArgumentParser):
    """Says what is wrong in one line instead of printing forty flags first."""

    def error(self, message):
        flag = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        wrong = re.match(r"argument --(\w+)[^:]*: (invalid \w+ value: .*|expected .*argument.*)", message)
        if wrong and wrong[1] in ALLOWED:
            message = f"{wrong[1]} must be {in_words(wrong[1])}: {wrong[2]}"
        hint = did_you_mean(flag, self._option_string_actions) or "--help explains it"
        raise UserError(f"{message.rstrip('.')}; {hint}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples at the top as written and shows each default."""


def without_none(argv: list[str]) -> tuple[list[str], list[str]]:
    """The flags but for '--name none' and '--name=none' of settings that may be None; those for which it stood last."""
    argv = [part for flag in argv for part in (flag.split("=") if re.fullmatch(r"--\w+=none", flag) else [flag])]
    unset = []
    for name in MAY_BE_NONE:
        places = [i for i, part in enumerate(argv) if part.split("=")[0] == f"--{name}"]
        nones = [i for i in places if argv[i:i + 2] == [f"--{name}", "none"]]
        unset += [name] if nones and nones[-1] == places[-1] else []
        argv = [part for i, part in enumerate(argv) if not {i, i - 1} & set(nones)]
    return argv, unset


def parse(argv: list[str], description: str | None = None) -> tuple[RunConfig, bool]:
    """The settings of defaults, then the file of --config, then flags; and whether to list the classes.

    '--train_timesteps none' and the like unset a setting that may be None.

    Raises:
        UserError: a flag, key or value that is no setting.
    """
    parser = OneLineParser(RunConfig, usage="python run.py [--config FILE.yml] [--SETTING VALUE ...]",
                           description=description, allow_abbrev=False)
    parser.formatter_class = HelpFormatter
    parser.add_argument("--config", metavar="FILE.yml", help="A YAML file of these settings; flags beat it.")
    parser.add_argument("--list_classes", action="store_true", help="Print the classes of --classifier and stop.")
    parser.add_argument("--debug", action="store_true", help="Show where in the code an error came from.")
    argv = [re.sub("^--[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), part) for part in argv]
    argv, unset = without_none(argv)
    config_file = parser.parse_args(argv).config
    from_file = settings_from_file(config_file) if config_file else []
    config, extra = parser.parse_args_into_dataclasses([*from_file, *argv], look_for_args_file=False)
    return replace(config, **dict.fromkeys(unset)), extra.list_classes
