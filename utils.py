"""One-line errors and atomic file writes. Imports nothing slow: settings are checked with it."""

import difflib
import errno
import functools
import importlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from PIL import Image

# before torch is imported: threads that wait sleep instead of spinning, which on a busy CPU takes many times as long
# (docs/speed.md)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or transformers asks owners of .bin files to convert

ROOT = Path(__file__).parent
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGEST_TEXT = 2**20  # bytes of a YAML file or a list of prompts: a larger one is another kind of file
CHECKPOINT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".json", ".txt"}
TOKEN_SUFFIXES = (".safetensors", ".pt", ".bin")
FUNCTION = r"[A-Za-z_]\w*(\.\w+)*:\w+"  # module:function
WITHOUT_GPU_OR_NETWORK = "or try --config configs/miniature.yml, which needs no download, no account and no GPU"


class UserError(Exception):
    """A user error: entry points print it as one line and exit with code 2."""


def require(condition, message: str):
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def suggest_word(word: str, known: Iterable[str]) -> str:
    """A question where `word` is close to one of `known`, else an empty string."""
    close = difflib.get_close_matches(word, known := list(known), 1)
    return f"did you mean '{close[0]}'?" if close and word not in known else ""


def to_printable(text: str) -> str:
    """Untrusted text without the characters that move a terminal's cursor or end a line.

    A byte of a file's name that is not UTF-8, which Python keeps as a surrogate, is shown as \\xe9.
    """
    shown = []
    for letter in text:
        if letter.isprintable():
            shown.append(letter)
        elif "\udc80" <= letter <= "\udcff":
            shown.append(f"\\x{ord(letter) - 0xdc00:02x}")
        else:
            shown.append(" ")
    return "".join(shown)


def join_lines(text) -> str:
    return " ".join(str(text).split())


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is torch's error, told by its name: torch takes seconds to import."""
    return type(error).__name__ == "OutOfMemoryError"


def error_message(error: Exception) -> str:
    """One line for the user: our own message, or the system's about a file, or that the memory is full."""
    if is_out_of_memory(error):
        return "not enough memory on the device: try --mixed_precision bf16, smaller models, or another --device"
    if isinstance(error, UserError) or error.filename is None:
        return to_printable(str(error))
    full = "; free some space: the files on disk are whole, and the command can be given again"
    return to_printable(f"'{error.filename}': {error.strerror}{full if error.errno in DISK_FULL else ''}")


def expand_path(text: str, setting: str) -> str:
    """A path with its ~ and $VARIABLES filled in, also after 'mean:' and the like; a UserError for unknown ones."""
    prefix, path = re.fullmatch(r"((?:[\w-]+:)*)(.*)", text, re.DOTALL).groups()
    full = os.path.expanduser(path)
    require(not full.startswith("~") or os.path.lexists(path),
            f"{setting} '{text}': there is no user '{path.split('/')[0][1:]}'; ./{path} would be a folder")
    unset = [name for name in re.findall(r"\$\{?(\w+)", full) if name not in os.environ]
    require(not unset or os.path.lexists(full), f"{setting} '{text}': the variable ${''.join(unset[:1])} is not set")
    return prefix + os.path.expandvars(full)


def find_path(name: str) -> Path | None:
    """`name` as a path from here or from the repository; None where neither exists (a hub id, for example)."""
    for path in (Path(os.path.expanduser(name)), ROOT / name):
        with suppress(OSError, ValueError):  # too long, or with a NUL: not a path
            if path.exists():
                return path
    return None


def split_revision(source: str) -> tuple[str, str | None]:
    """'someone/model@v2' -> ('someone/model', 'v2'); a path that exists, or an id alone, has no revision."""
    place, at, revision = source.rpartition("@")
    if not at or find_path(source):
        return source, None
    return place, revision


def is_same_source(name: str, other: str) -> bool:
    """Whether two names stand for one checkpoint: the same hub id, or two paths of one folder.

    Of two revisions of a hub id one may be unknown, and then it is taken for the other.
    """
    (place, revision), (other_place, other_revision) = split_revision(name), split_revision(other)
    if revision and other_revision and revision != other_revision:
        return False
    paths = [find_path(place), find_path(other_place)]
    return place == other_place or all(paths) and paths[0].resolve() == paths[1].resolve()


def stamp_file(file: Path) -> list:
    """What tells that a file was replaced: its path, size and time of change."""
    found = file.stat()
    return [str(file), found.st_size, found.st_mtime_ns]


def list_checkpoint_files(source: str) -> dict[str, list[int]]:
    """{file: [size, time of change]} of a local checkpoint, to notice that it was replaced; {} for a hub id."""
    folder = find_path(source.removeprefix("local-dir:"))
    stamps = {}
    for parent, _, names in os.walk(folder, followlinks=True) if folder else ():  # parts may be links to other disks
        for name in names:
            path = Path(parent, name)
            if path.suffix in CHECKPOINT_SUFFIXES:
                stamps[path.relative_to(folder).as_posix()] = stamp_file(path)[1:]
    return dict(sorted(stamps.items()))


def import_function(reference: str, setting: str):
    """The function that 'module:function', the value of `setting`, names; a UserError where there is none."""
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{setting}: no module '{error.name}', which '{reference}' needs") from error
    except Exception as error:  # a user's module raises what it raises
        raise UserError(f"{setting}: module '{module}' cannot be imported: {type(error).__name__} "
                        f"{join_lines(error)[:200]}") from error
    require(callable(function), f"{setting} '{reference}': module '{module}' has no function '{name}'")
    return function


def check_output_path(path: str):
    """Raise UserError where nothing can be written to `path`, or to the folder that it would be made in."""
    for folder in (Path(path).absolute(), Path(path, "img").absolute(), Path(path, "pipeline_token").absolute()):
        there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
        require(there.is_dir(), f"output_path '{path}' cannot be a folder: '{there}' is a file")
        require(os.access(there, os.W_OK | os.X_OK), f"output_path '{path}': '{there}' may not be written "
                                                     "to, or is on a read-only file system; give another folder")


def broken_file_error(path: Path, reason) -> UserError:
    return UserError(f"'{path}' is broken ({join_lines(reason)}): remove it and run the same command again")


def read_text(path: str) -> str:
    """A text file that a person wrote; a UserError where it is missing, larger than LARGEST_TEXT or not UTF-8."""
    found = find_path(path)
    require(found and found.is_file(), f"no file '{path}'")
    require(found.stat().st_size <= LARGEST_TEXT, f"'{path}' has {found.stat().st_size} bytes: it is not a text file")
    try:
        return found.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not a text file in UTF-8: save it as one") from error


class WordsLoader(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # in C where it is there: ten times as fast
    """Makes strings, lists and mappings alone; a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        for key, count in Counter(str(key.value) for key, _ in node.value).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str, example: str) -> dict[str, str | list[str]]:
    """A YAML file of lines such as `example`, every scalar as it was typed (`no` stays 'no'); else a UserError."""
    try:
        values = yaml.load(read_text(path), Loader=WordsLoader) or {}  # nosec B506  # it makes strings alone
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"'{path}' is not YAML: {join_lines(error)}") from error
    require(isinstance(values, dict), f"'{path}' must hold lines such as '{example}'")
    for key, value in values.items():
        parts = value if isinstance(value, list) else [value]
        require(isinstance(key, str) and all(isinstance(part, str) for part in parts),
                f"'{path}': '{key}' must have one value or a plain list, as in '{example}'")
    return values


def to_words(settings: dict) -> dict[str, str | list[str]]:
    """Settings as `read_yaml` reads them back from the file that `write_yaml` made of them."""
    return dict(read_back(json.dumps(settings)))


@functools.lru_cache(maxsize=16)
def read_back(settings: str) -> dict[str, str | list[str]]:
    """As `to_words`, of settings as JSON: the same for all classes of a run."""
    return yaml.load(yaml.safe_dump(json.loads(settings)), Loader=yaml.BaseLoader)  # nosec B506  # it makes strings alone


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object of ours that has these `keys`; a UserError where it is truncated or not ours."""
    return parse_json(path, path.read_bytes(), keys)


def read_json_lines(path: Path, *keys: str) -> list[dict]:
    """The JSON objects of a file of ours, one per line; otherwise as `read_json`."""
    return [parse_json(path, line, keys) for line in path.read_bytes().splitlines()]


def parse_json(path: Path, data: bytes, keys: tuple[str, ...]) -> dict:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise broken_file_error(path, error) from error
    if not isinstance(value, dict) or set(keys) - value.keys():
        raise broken_file_error(path, f"not a JSON object{' with ' * bool(keys)}{', '.join(keys)}")
    return value


@contextmanager
def replace_file(path: Path):
    """Yield a temporary path beside `path` that takes its place at the end; an OSError leaves `path` as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")  # two may write one file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str):
    """Write UTF-8; bytes of a file's name that are not UTF-8 become \\udce9, which JSON reads back as they were."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, value: dict):
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def save_image(image: Image.Image, path: Path, **options):
    """Write one image in the format of its suffix, whole or not at all."""
    with replace_file(path) as temporary:
        image.save(temporary, format=path.suffix[1:].upper(), **options)
