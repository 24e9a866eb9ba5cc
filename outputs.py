"""What the folders of a class hold: a token of these settings or of others, one that is half trained, or none."""

import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

import class_token
from class_token import TOKEN_FILE
from classifiers import folder_name
from config import DECISIVE, RunConfig, as_typed, to_yaml
from evaluation import forget, frames_of
from learner import STATE_FILE, Job, Trained
from prompt_datasets import class_folder
from utils import peak_memory, read_yaml_mapping, replacing, require, same_source, write_json, write_text

VECTORS_FILE = "vectors.safetensors"
COST_FILE = "cost.json"


def output_folders(config: RunConfig, index: int, name: str) -> tuple[Path, Path]:
    """Where class `index` (from 0) keeps its token and its images: pipeline_token/... and img/..."""
    parts = folder_name(config.classifier), class_folder(index, name), config.exp_id
    return tuple(Path(config.output_path, kind, *parts) for kind in ("pipeline_token", "img"))


def say(title: str, text: str):
    """A line about a class: several may speak in turn, also from several processes."""
    tqdm.write(f"class {title}: {text}")
    sys.stdout.flush()


def is_trained(config: RunConfig, tokens: Path) -> bool:
    """Whether a class has its token already.

    Raises:
        UserError: it has one of other settings, or half of one, which is another run.
    """
    trained, begun = (tokens / TOKEN_FILE).exists(), (tokens / STATE_FILE).exists()
    others = other_settings(config, tokens, DECISIVE) if trained or begun else []
    what = "token" if trained else "half-trained token"
    require(not others, f"the {what} in '{tokens}' was trained with {'; '.join(others)}: another setting is another "
                        "run, so give a new --exp_id, or --skip_exists False to train it anew")
    return trained


def other_settings(config: RunConfig, tokens: Path, which: tuple[str, ...]) -> list[str]:
    """What of `which` differs between the training that left config.yml in `tokens` and now, in words."""
    if not (tokens / "config.yml").exists():
        return []
    before, now = read_yaml_mapping(str(tokens / "config.yml"), "lr: 0.001"), as_typed(config)
    return [f"{name} {before[name]}, now {now[name]}" for name in which if before.get(name, now[name]) != now[name]
            and not (name in ("model", "classifier") and same_source(before[name], now[name]))]


def prepare(config: RunConfig, job: Job) -> Job:
    """Clear a class's folders for its training, but for one that was killed half-way with the same settings."""
    token, state, settings = (job.tokens / name for name in (TOKEN_FILE, STATE_FILE, "config.yml"))
    if state.exists() and settings.exists() and not token.exists() and not other_settings(config, job.tokens, DECISIVE):
        say(job.title, "goes on where its training stopped")
        for unfinished in [*job.tokens.rglob(".*.tmp"), *job.images.rglob(".*.tmp")]:
            unfinished.unlink()
        return job
    for old in (token, state):  # first, so that a kill in the midst of this leaves nothing that seems whole
        old.unlink(missing_ok=True)
    for old in (job.images / "train", job.tokens):  # a shorter run must not be mixed with what a longer one left
        if old.exists():
            shutil.rmtree(old)
    forget(job.images)
    write_text(job.tokens / "config.yml",
               to_yaml(replace(config, class_index=str(job.class_index + 1), skip_exists=False)))
    say(job.title, "begins its training")
    return job


def save(config: RunConfig, job: Job, trained: Trained):
    """Write a token with its settings and versions; the training's state is needed no more."""
    if config.fresh_noise:  # no seed comes back: the film over the updates has to be drawn
        with replacing(job.images / "train" / VECTORS_FILE) as temporary:
            save_file(frames_of(trained.vectors), temporary)
    token = job.tokens / TOKEN_FILE
    class_token.save(token, config.placeholder_token, trained.vector, {
        "class_index": job.class_index + 1, "class_name": job.class_name, "label": job.label,
        "classifier": config.classifier, "base_model": config.model, "seed": config.seed,
        "updates": len(trained.vectors), "loss": f"{trained.loss:.4f}", "train_accuracy": f"{trained.accuracy:.4f}",
        "stopped": trained.stopped, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "python": platform.python_version()})
    memory = peak_memory(config.device)
    write_json(job.tokens / COST_FILE, {"updates": len(trained.vectors), "seconds": round(trained.seconds, 1),
                                        "peak_memory_gb": round(memory, 2)})
    (job.tokens / STATE_FILE).unlink(missing_ok=True)
    share = " (its share)" if config.classes_at_once > 1 else ""
    say(job.title, f"{len(trained.vectors)} updates in {trained.seconds:.0f} s{share}, stopped: {trained.stopped}; "
                   f"peak memory of this process so far: {memory:.1f} GB")
    say(job.title, f"token: {token}")


def check_token(config: RunConfig, token_file: Path):
    """A token that was trained before must be there, of this classifier, and not have seen the evaluation's seeds."""
    _, _, header = class_token.load(token_file)
    guide = header.get("classifier", config.classifier)
    require(same_source(guide, config.classifier), f"'{token_file}' was trained with the classifier '{guide}', not "
                                                   f"'{config.classifier}': give it or another --exp_id")
    require(not config.evaluate or int(header.get("seed", config.test_size)) >= config.test_size,
            f"'{token_file}' was trained on seeds from {header.get('seed')} on, which {config.test_size} evaluation "
            f"images would use too: give --test_size {header.get('seed')} or less")


def warn_of_other_settings(config: RunConfig, tokens: Path):
    """Say where the pictures are not drawn as those were that the token learned from."""
    others = other_settings(config, tokens, ("model", "guidance_scale", "height", "width"))
    if others:
        print(f"warning: the token was trained with {'; '.join(others)}", file=sys.stderr)
