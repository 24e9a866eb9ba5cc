"""Settings from words: the command line, and the YAML file of --config."""

import argparse
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

EMPTY = ("null", "~", "", [])  # values in a YAML file that leave the default


def value_reader(entry: Field) -> Callable[[str], Any]:
    """Return what turns a word of the command line or of a file into a value of the setting."""
    kind, _, is_optional = value_type(entry)
    is_path = entry.metadata["path"]

    def read_value(text: str):
        if is_optional and text == "none":
            return None
        try:
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
    """Read {setting: value} from a YAML file; a setting left empty keeps its default."""
    values = {}
    for key, words in read_yaml(path, "lr: 0.001").items():
        hint = suggest_word(key, SETTINGS) or "--help lists them"
        require(key in SETTINGS, f"'{path}' has an unknown setting '{key}'; {hint}")
        entry = SETTINGS[key]
        _, is_list, is_optional = value_type(entry)
        require(
            isinstance(words, str) or is_list, f"'{path}': {key} must be one value, not {words}"
        )
        is_none = is_optional and words == "none"
        if words in EMPTY or is_none:
            continue
        read_value = value_reader(entry)
        if is_list:
            parts = words if isinstance(words, list) else [words]
            values[key] = [read_value(part) for part in parts]
        else:
            values[key] = read_value(words)
    return values


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, instead of printing forty flags first."""

    def __init__(self, flags: Iterable[str], **options):
        """`flags` are what a mistyped flag may have meant."""
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        self.flags = flags

    def error(self, message):
        """Raise UserError with argparse's message and a suggestion."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        word = unknown.split(" ")[0]
        if word and not word.startswith("-"):
            hint = "a value with spaces needs quotes"
        else:
            hint = suggest_word(word, self.flags) or "--help explains it"
        raise UserError(f"{message.removeprefix('argument ').rstrip('.')}; {hint}")


def describe_setting(entry: Field, default) -> str:
    """Return the help of a setting, with its default if it has one."""
    text = entry.metadata["help"]
    if isinstance(default, list):
        default = " ".join(map(str, default))
    if default is None or default is False or default == "":
        return text
    return f"{text} [{default}]"


def build_parser(description: str | None) -> OneLineParser:
    """Build the parser of run.py; it returns only the settings that are given."""
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
        "--list_classes",
        action="store_true",
        help="Print the classes of --classifier and stop.",
    )
    parser.add_argument("--quiet", action="store_true", help="Print only warnings and errors.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    defaults = RunConfig()
    topic = parser
    for name, entry in SETTINGS.items():
        if entry.metadata["topic"]:
            topic = parser.add_argument_group(entry.metadata["topic"])
        kind, is_list, _ = value_type(entry)
        options: dict[str, Any] = {}
        if is_list:
            options = {"nargs": "+"}
        elif kind is bool:
            options = {"nargs": "?", "const": True}
        topic.add_argument(
            f"--{name}",
            type=value_reader(entry),
            default=argparse.SUPPRESS,
            metavar=kind.__name__.upper(),
            help=describe_setting(entry, getattr(defaults, name)),
            **options,
        )
    return parser


def read_command(argv: list[str], description: str | None = None) -> tuple[RunConfig, bool]:
    """Read the settings, and whether to list the classes.

    Checks them as far as possible before models are loaded, and imports nothing slow, so that a
    mistake is answered at once. Raises UserError.
    """
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if words:
        named = ["--class_index", " ".join(words), *argv[len(words) :]]
        raise UserError(f"a class is given by --class_index: {complete_command(named)}")
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
        config.estimate or config.train or config.evaluate,
        f"nothing to do; this {does}: {command}",
    )
    return config, False


def check_classes(config: RunConfig, labels: list[str]):
    """Raise UserError for a class that is not among these labels, if they are known."""
    if labels and config.class_index:
        select_classes(config.class_index, labels, class_names(labels, config.class_names))


def complete_command(argv: list[str], learns: bool = True) -> str:
    """Return the command of `argv` with an evaluation, quoted for a shell.

    With training too, if it `learns`.
    """
    training = ["--train", "True"] if learns else []
    return shlex.join(["python", "run.py", *argv, *training, "--evaluate", "True"])


def parse_settings(argv: list[str], description: str | None = None) -> tuple[RunConfig, bool]:
    """Read settings: defaults, then the file of --config, then flags.

    Also returns whether to list the classes.
    """
    given = vars(build_parser(description).parse_args([spell_flag(word) for word in argv]))
    values = read_settings(given["config"]) if given["config"] else {}
    for name in SETTINGS:
        if name in given:
            values[name] = given[name]
    for name, value in values.items():
        if value == [None]:  # a list that is 'none'
            values[name] = None
    return RunConfig(**values), given["list_classes"]


def spell_flag(word: str) -> str:
    """Normalise a flag: --class-index=7 -> --class_index=7."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value
