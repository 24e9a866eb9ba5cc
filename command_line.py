"""Settings from words: the command line, and the YAML file of --config."""

import argparse
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import Field
from itertools import takewhile
from typing import Any

from config import SETTINGS, TRUTH, RunConfig, describe_values, value_type
from models.labels import find_labels
from prompt_datasets import class_names, read_eval_prompts, select_classes
from system.paths import expand_path
from system.text_files import read_yaml
from utils import UserError, require, suggest_word


def value_reader(entry: Field) -> Callable[[str], Any]:
    """What turns a word of the command line or of a file into a value of the setting."""
    kind, is_list, is_optional = value_type(entry)

    def read_value(text: str):
        if is_optional and text == "none":
            return None
        try:
            is_path = entry.metadata["path"]
            if is_path(text) if callable(is_path) else is_path:
                return expand_path(text, entry.name)
            return TRUTH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{entry.name} must be {describe_values(entry)}: invalid {kind.__name__} value: "
                f"'{text}'; --help explains it"
            ) from error

    return read_value


def read_settings(path: str) -> dict[str, Any]:
    """{setting: value} of a YAML file; one that is left empty keeps its default."""
    values = {}
    for key, words in read_yaml(path, "lr: 0.001").items():
        require(
            key in SETTINGS,
            f"'{path}' has an unknown setting '{key}'; "
            + (suggest_word(key, SETTINGS) or "--help lists them"),
        )
        read_value, (_, is_list, is_optional) = (
            value_reader(SETTINGS[key]),
            value_type(SETTINGS[key]),
        )
        require(
            isinstance(words, str) or is_list, f"'{path}': {key} must be one value, not {words}"
        )
        if words in ("null", "~", "", []) or words == "none" and is_optional:
            continue
        parts = words if isinstance(words, list) else [words]
        values[key] = [read_value(part) for part in parts] if is_list else read_value(words)
    return values


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing forty flags first."""

    def __init__(self, flags: Iterable[str], **options):
        """`flags` are what a mistyped flag may have meant."""
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        self.flags = flags

    def error(self, message):
        word = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        if word and not word.startswith("-"):
            hint = "a value with spaces needs quotes"
        else:
            hint = suggest_word(word, self.flags) or "--help explains it"
        raise UserError(f"{message.removeprefix('argument ').rstrip('.')}; {hint}")


def describe_setting(entry: Field, default) -> str:
    """The help of a setting, with its default where it has one."""
    words = " ".join(map(str, default)) if isinstance(default, list) else default
    return entry.metadata["help"] + (
        f" [{words}]" if words or words == 0 and words is not False else ""
    )


def build_parser(description: str | None) -> OneLineParser:
    parser = OneLineParser(
        [f"--{name}" for name in SETTINGS],
        description=description,
        usage="python run.py [--config FILE.yml] [--SETTING VALUE ...]",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yml",
        type=lambda text: expand_path(text, "config"),
        help="A YAML file of these settings; flags override it.",
    )
    parser.add_argument(
        "--list_classes", action="store_true", help="Print the classes of --classifier and stop."
    )
    parser.add_argument("--quiet", action="store_true", help="Print warnings and errors alone.")
    parser.add_argument(
        "--debug", action="store_true", help="Show where in the code an error came from."
    )
    defaults = RunConfig()
    topic = parser
    for name, entry in SETTINGS.items():
        if entry.metadata["topic"]:
            topic = parser.add_argument_group(entry.metadata["topic"])
        kind, is_list, _ = value_type(entry)
        more = {"nargs": "+"} if is_list else {"nargs": "?", "const": True} if kind is bool else {}
        default = getattr(defaults, name)
        topic.add_argument(
            f"--{name}",
            type=value_reader(entry),
            default=default,
            metavar=kind.__name__.upper(),
            help=describe_setting(entry, default),
            **more,
        )
    return parser


def read_command(argv: list[str], description: str | None = None) -> tuple[RunConfig, bool]:
    """The settings, checked as far as they can be before models are loaded, and whether to list the
    classes.

    Imports nothing slow, so that a mistake is answered at once. Raises UserError.
    """
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    named = ["--class_index", " ".join(words), *argv[len(words) :]]
    require(not words, f"a class is given by --class_index: {complete_command(named)}")
    config, list_classes = parse_settings(argv, description)
    if list_classes:
        config.check_labels()
        return config, True
    config.eval_prompts = read_eval_prompts(config.eval_prompts)
    config.validate_settings()
    check_classes(config, find_labels(config.classifier, config.labels))
    command = complete_command(argv, learns=not config.token)
    does = "judges the token" if config.token else "learns a token and judges it"
    require(
        config.estimate or config.train or config.evaluate, f"nothing to do; this {does}: {command}"
    )
    return config, False


def check_classes(config: RunConfig, labels: list[str]):
    """Raise UserError for a class that is not among these labels, as far as they are known."""
    if labels and config.class_index:
        select_classes(config.class_index, labels, class_names(labels, config.class_names))


def complete_command(argv: list[str], learns: bool = True) -> str:
    """The command of `argv`, asking for an evaluation and, where it `learns`, for training; as a
    shell takes it.
    """
    training = ["--train", "True"] if learns else []
    return shlex.join(["python", "run.py", *argv, *training, "--evaluate", "True"])


def parse_settings(argv: list[str], description: str | None = None) -> tuple[RunConfig, bool]:
    """The settings of defaults, then the file of --config, then flags; and whether to list the
    classes.
    """
    parser = build_parser(description)
    argv = [
        re.sub("^--[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), part) for part in argv
    ]
    config_file = parser.parse_args(argv).config
    parser.set_defaults(**(read_settings(config_file) if config_file else {}))
    options = vars(parser.parse_args(argv))
    values = {name: options[name] for name in SETTINGS}
    return (
        RunConfig(**{name: None if value == [None] else value for name, value in values.items()}),
        options["list_classes"],
    )
