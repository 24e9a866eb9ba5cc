"""Text, YAML and JSON files, by people or by us; what cannot be read is one line."""

import functools
import json
from collections import Counter
from pathlib import Path

import yaml

from system.paths import find_path
from utils import UserError, broken_file_error, join_lines, require

LARGEST_TEXT = 2**20  # bytes of a YAML file or a list of prompts: a larger one is something else


def read_text(path: str) -> str:
    """Read a text file that a person wrote.

    Raises:
        UserError: a file that is missing, larger than LARGEST_TEXT or not UTF-8.
    """
    found = find_path(path)
    require(found and found.is_file(), f"no file '{path}'")
    size = found.stat().st_size
    require(size <= LARGEST_TEXT, f"'{path}' has {size} bytes: it is not a text file")
    try:
        return found.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not a text file in UTF-8: save it as one") from error


class WordsLoader(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # in C it is ten times as fast
    """A YAML loader that makes only strings, lists and mappings; a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        """Construct a mapping as the base class does, if no key is repeated."""
        counts = Counter(str(key.value) for key, _ in node.value)
        for key, count in counts.items():
            if count > 1:
                problem = f"'{key}' is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str, example: str) -> dict[str, str | list[str]]:
    """Read a YAML file of lines such as `example`, every scalar as typed (`no` stays 'no').

    Raises:
        UserError: a file that is not of such lines.
    """
    text = read_text(path)
    try:
        values = yaml.load(text, Loader=WordsLoader) or {}  # nosec B506  # it makes strings alone
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"'{path}' is not YAML: {join_lines(error)}") from error
    require(isinstance(values, dict), f"'{path}' must hold lines such as '{example}'")
    for key, value in values.items():
        parts = value if isinstance(value, list) else [value]
        require(
            isinstance(key, str) and all(isinstance(part, str) for part in parts),
            f"'{path}': '{key}' must have one value or a plain list, as in '{example}'",
        )
    return values


def to_words(settings: dict) -> dict[str, str | list[str]]:
    """Convert settings to what `read_yaml` reads back from `write_yaml`'s file."""
    return dict(read_back(json.dumps(settings)))


@functools.lru_cache(maxsize=16)
def read_back(settings: str) -> dict[str, str | list[str]]:
    """Convert as `to_words`, from settings as JSON: the same for all classes of a run."""
    text = yaml.safe_dump(json.loads(settings))
    return yaml.load(text, Loader=yaml.BaseLoader)  # nosec B506  # it makes strings alone


def read_json(path: Path, *keys: str) -> dict:
    """Read a JSON object of ours with these `keys`; raise UserError if truncated or foreign."""
    return parse_json(path, path.read_bytes(), keys)


def read_json_lines(path: Path, *keys: str) -> list[dict]:
    """Read the JSON objects of a file of ours, one per line; errors as in `read_json`."""
    return [parse_json(path, line, keys) for line in path.read_bytes().splitlines()]


def parse_json(path: Path, data: bytes, keys: tuple[str, ...]) -> dict:
    """Parse the JSON object in `data`, the content of the file `path`; errors as in `read_json`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise broken_file_error(path, error) from error
    if not isinstance(value, dict):
        raise broken_file_error(path, "not a JSON object")
    if set(keys) - value.keys():
        raise broken_file_error(path, f"not a JSON object with {', '.join(keys)}")
    return value
