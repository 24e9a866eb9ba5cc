"""Train class tokens and evaluate them.

    python run.py --class_index 283 --train True --evaluate True       Stable Diffusion 1.4 and ImageNet, on a GPU
    python run.py --config configs/miniature.yml --class_index all --train True --evaluate True      without a GPU
    python run.py --config configs/miniature.yml --list_classes
"""

import functools
import glob
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import class_token
from class_token import TOKEN_FILE
from classifiers import Classifier, folder_name, load_classifier, load_labels
from config import DECISIVE, RunConfig, as_typed, parse, to_yaml
from diffusion import Components, encode_prompts, initial_latents, load_components, noise_sources, trajectory
from distribution import check_counts, distribution, distribution_lines, load_extractor
from evaluation import (
    ARMS,
    Arm,
    aligned,
    arms_of,
    contexts_table_lines,
    drawing,
    evaluate_folder,
    film_of,
    forget,
    frames_of,
    generate,
    table_lines,
)
from learner import STATE_FILE, Job, Trained
from metrics import COMPARABLE_FID
from prompt_datasets import TEMPLATES, class_folder, class_names, class_title, evaluation_prompts, select_classes
from real import drawn, real_pictures
from report import side_by_side, write_report
from sweep import agreed, count_class, from_all, join, shared, wait_for_all
from training import train_tokens
from utils import (
    WITHOUT_GPU_OR_NETWORK,
    UserError,
    imported,
    peak_memory,
    read_yaml_mapping,
    replacing,
    require,
    same_source,
    write_json,
    write_text,
)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VECTORS_FILE = "vectors.safetensors"


def main(argv: list[str]) -> int:
    try:
        config, list_classes = parse(argv, __doc__)
        if list_classes:
            labels = load_labels(config.classifier)
            print("\n".join(f"{i + 1:5d}  {label}" for i, label in enumerate(labels)))
            return 0
        config.validate()
        run(replace(config, eval_prompts=evaluation_prompts(config.eval_prompts)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: RunConfig):
    """Train and evaluate every selected class, then print and write the summary."""
    processes = join(config.device)
    check_device(config.device, config.mixed_precision)
    if config.context_judge:
        imported(config.context_judge, "context_judge")
    labels = load_labels(config.classifier)
    names = class_names(labels, config.class_names)
    chosen = select_classes(config.class_index, labels, names)
    folders = {index: output_folders(config, index, names[index]) for index in chosen}
    to_train = agreed([index for index in chosen if config.train and not (
        config.skip_exists and is_trained(config, folders[index][0]))])
    for index in set(chosen) - set(to_train):
        check_token(config, folders[index][0] / TOKEN_FILE)  # before gigabytes are loaded for nothing
    config = replace(config, classes_at_once=min(config.classes_at_once,  # or the first process would take all
                                                 max(1, math.ceil(len(to_train) / processes.num_processes))))
    real, extractor = compared_with(config, names, labels, {index: folders[index][1] for index in chosen})
    judges = load_judges(config, labels)
    generator = functools.cache(lambda: load_generator(config, [names[index] for index in chosen]))
    if to_train:
        generator()  # before anything is written; where all pictures are drawn already it is never loaded
    draw_batch, failed = drawing(config), []

    def judge(index):
        tokens, images = folders[index]
        arms, film = draw(config, generator, draw_batch, index, names[index], labels[index], tokens, images)
        evaluate(config, judges, index, arms, film, tokens, images, drawn(config.real_images, index, real[index]))

    bar = tqdm(total=len(chosen), desc="classes", unit="class",
               disable=len(chosen) == 1 or not processes.is_main_process)
    jobs = (prepare(config, Job(index, names[index], *folders[index], labels[index]))
            for index in shared(to_train, "to train"))
    before = [index for index in chosen if index not in to_train]
    for index, failure in with_tokens(config, generator, judges["classifier"], jobs if to_train else None, before):
        try:
            if failure:
                raise failure
            if config.evaluate:
                judge(index)
        except UserError as error:
            if len(chosen) == 1:
                raise
            failed.append(index)
            tqdm.write(f"class {class_title(index, labels[index])} failed: {error}", file=sys.stderr)
        count_class(bar)
    wait_for_all(bar)
    failed = from_all(failed)
    done = [index for index in chosen if index not in failed]
    if config.evaluate and done and processes.is_main_process:
        summarise(config, extractor, [folders[index][1] / "eval" for index in done], [real[index] for index in done])
    require(not failed or not processes.is_main_process,
            f"{len(failed)} of {len(chosen)} classes failed, as said above: "
            + ", ".join(class_title(index, labels[index]) for index in sorted(failed)))


def with_tokens(config: RunConfig, generator, classifier: Classifier, jobs: Iterator[Job] | None,
                before: list[int]) -> Iterator[tuple[int, UserError | None]]:
    """Every class as its token is there, or why it is not: those that are trained here, then those trained before."""
    for job, trained in train_tokens(config, *generator(), classifier, jobs) if jobs else ():
        if isinstance(trained, UserError):
            yield job.class_index, trained
        else:
            save(config, job, trained)
            yield job.class_index, None
    for index in shared(before, "trained before"):
        say(class_title(index, classifier.labels[index]), "has its token already")
        yield index, None


def say(title: str, text: str):
    """A line about a class: several may speak in turn, also from several processes."""
    tqdm.write(f"class {title}: {text}")
    sys.stdout.flush()


def compared_with(config: RunConfig, names: list[str], labels: list[str], runs: dict[int, Path]):
    """Every class's real pictures, and what measures the distance to them, in the process that does; or none."""
    if not (config.evaluate and config.real_images):
        return dict.fromkeys(runs, []), None
    real = real_pictures(config.real_images, names, labels, runs,
                         config.test_size + math.ceil(COMPARABLE_FID / len(runs)))
    check_counts(config.test_size * len(runs), sum(map(len, real.values())))
    return real, load_extractor(config.features, config.device) if PartialState().is_main_process else None


def load_judges(config: RunConfig, labels: list[str]) -> dict[str, Classifier]:
    """The guiding classifier, and for an evaluation the evaluator."""
    judges = {"classifier": load_classifier(config.classifier, config.device)}
    if config.evaluator and config.evaluate:
        judges["evaluator"] = load_classifier(config.evaluator, config.device)
        require(judges["evaluator"].labels == labels, f"the evaluator '{config.evaluator}' must know the same classes "
                                                      f"in the same order as the classifier '{config.classifier}'")
        if judges["evaluator"].name == judges["classifier"].name:
            print("warning: the evaluator is the guiding classifier itself: a token flatters its own judge",
                  file=sys.stderr)
    return judges


def summarise(config: RunConfig, extractor, folders: list[Path], real: list[list[Path]]):
    """Print what the classes of this call gave; write their report and the summary of all classes of the run."""
    results = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    everything = Path(config.output_path, "img", folder_name(config.classifier))
    summary = everything / f"summary_{config.exp_id}.json"
    metrics = [json.loads(path.read_text(encoding="utf-8"))
               for path in sorted(everything.glob(f"*/{glob.escape(config.exp_id)}/eval/metrics.json"))]
    metrics = list({each["class_index"]: each for each in [*metrics, *results]}.values())  # a renamed class counts once
    before = json.loads(summary.read_text(encoding="utf-8"))["distribution"] if summary.exists() else None
    write_json(summary, {"classes": metrics, "distribution": before})  # it names the pictures that it is of
    print(f"\naccuracy without -> with the token [Wilson 95 % interval], {config.test_size} images each, seeds 0 to "
          f"{config.test_size - 1}\n{aligned(table_lines(results))}")
    if config.eval_prompts:
        print(f"\nin other prompts\n{aligned(contexts_table_lines(results))}")
    if extractor:
        arms = {arm: [folder / arm / f"{seed}.png" for folder in folders for seed in range(config.test_size)]
                for arm in ARMS}
        distances = distribution(extractor, arms, real)
        distances["pictures"] = {str(result["class_index"]): result["pictures"] for result in results}
        write_json(summary, {"classes": metrics, "distribution": distances})
        lines, note = distribution_lines(distances)
        print(f"\n{aligned(lines)}\n{note}")
    report = everything / f"report_{config.exp_id}.html" if len(folders) > 1 else folders[0].parent / "report.html"
    write_report([folder.parent for folder in folders], report)
    print(f"\nreport: {report}\nall classes of run '{config.exp_id}': {summary}")


def output_folders(config: RunConfig, index: int, name: str) -> tuple[Path, Path]:
    """Where class `index` (from 0) keeps its token and its images: pipeline_token/... and img/..."""
    parts = folder_name(config.classifier), class_folder(index, name), config.exp_id
    return tuple(Path(config.output_path, kind, *parts) for kind in ("pipeline_token", "img"))


def load_generator(config: RunConfig, names: list[str]) -> tuple[Components, int]:
    """The frozen generator and the number of its placeholder token, sure to take every prompt of these classes."""
    components = load_components(config.model, config.device, DTYPES[config.mixed_precision],
                                 config.gradient_checkpointing)
    if config.torch_compile:
        components.unet.compile()
        components.vae.decoder.compile()
    token_id = class_token.add_placeholder(components.tokenizer, config.placeholder_token)
    check_prompts(config, components, token_id, names)
    return components, token_id


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
    (job.tokens / STATE_FILE).unlink(missing_ok=True)
    share = " (its share)" if config.classes_at_once > 1 else ""
    say(job.title, f"{len(trained.vectors)} updates in {trained.seconds:.0f} s{share}, stopped: {trained.stopped}; "
                   f"peak memory of this process so far: {peak_memory(config.device):.1f} GB")
    say(job.title, f"token: {token}")


def draw(config: RunConfig, generator, draw_batch, index: int, name: str, label: str, tokens: Path,
         images: Path) -> tuple[list[Arm], list[Arm]]:
    """Write the pictures of one class without and with its token, and of the film over the token's updates."""
    _, vector, _ = class_token.load(tokens / TOKEN_FILE)
    warn_of_other_settings(config, tokens)
    arms, history = arms_of(config, index, name, vector), images / "train" / VECTORS_FILE
    film = film_of(config, name, load_file(history)) if history.exists() else []
    if not generate(config, generator, class_title(index, label), arms + film, images / "eval", draw_batch):
        say(class_title(index, label), "the pictures are there already, drawn with this token and these settings")
    return arms, film


def evaluate(config: RunConfig, judges, index: int, arms: list[Arm], film: list[Arm], tokens: Path, images: Path,
             real: list[Path]) -> dict:
    """Judge and show the pictures of one class."""
    folder = images / "eval"
    _, _, header = class_token.load(tokens / TOKEN_FILE)
    metrics = evaluate_folder(config, judges, index, arms, folder, film=[arm.folder for arm in film],
                              held_out="seed" in header,
                              token_folder=os.path.relpath(tokens, folder),
                              real=[os.path.relpath(file, folder) for file in real[:20]], settings=asdict(config))
    side_by_side(folder, f"class {class_title(index, judges['classifier'].labels[index])}", real)
    say(class_title(index, judges["classifier"].labels[index]), f"pictures: {folder / 'grid.png'}")
    return metrics


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


def check_prompts(config: RunConfig, components, token_id: int, names: list[str]):
    """Find out before any long work, and before anything is written, what the generator cannot be asked."""
    vector = class_token.initial_vector(components.tokenizer, components.text_encoder, config.initializer_token)
    trajectory(components, config.num_inference_steps, config.train_timesteps)
    initial_latents(components, noise_sources([0]), config.height, config.width)
    templates = [*TEMPLATES[:config.number_of_prompts], *(config.eval_prompts if config.evaluate else [])]
    with torch.no_grad(), class_token.spliced(components.text_encoder, token_id, vector.to(components.device)):
        for name in names:
            encode_prompts(components, [prompt.format(f"{config.placeholder_token} {name}") for prompt in templates])


def check_device(device: str, mixed_precision: str):
    """Say at once what the device cannot do."""
    kind, _, number = device.partition(":")
    require(kind in ("cuda", "mps", "cpu") and (not number or kind == "cuda" and number.isdecimal()),
            f"device must be cuda, cuda:1, mps or cpu, not '{device}'")
    require(kind != "cuda" or torch.cuda.is_available(), "no CUDA GPU here: use --device cpu --mixed_precision no, "
                                                         f"which is slow, {WITHOUT_GPU_OR_NETWORK}")
    require(not number or int(number) < torch.cuda.device_count(),
            f"no GPU {number} here: there are {torch.cuda.device_count()}, counted from 0")
    require(kind != "mps" or torch.backends.mps.is_available(), f"no Apple GPU here, {WITHOUT_GPU_OR_NETWORK}")
    require(kind != "cpu" or mixed_precision != "fp16", "a CPU has no fast fp16: use --mixed_precision no")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
