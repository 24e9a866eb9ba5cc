"""Train class tokens and evaluate them.

    python run.py --class_index 283 --train True --evaluate True       Stable Diffusion 1.4 and ImageNet, on a GPU
    python run.py --config configs/miniature.yml --class_index all --train True --evaluate True      without a GPU
    python run.py --config configs/miniature.yml --list_classes
"""

import glob
import json
import math
import platform
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from tqdm import tqdm

import class_token
from classifiers import folder_name, load_classifier, load_labels
from config import RunConfig, parse, to_yaml
from diffusion import encode_prompts, initial_latents, load_components, noise_sources, trajectory
from distribution import check_counts, distribution, distribution_lines, load_extractor
from evaluation import ARMS, aligned, arms_of, contexts_table_lines, evaluate_folder, generate, table_lines
from metrics import COMPARABLE_FID
from prompt_datasets import (
    TEMPLATES,
    class_folder,
    class_names,
    class_title,
    evaluation_prompts,
    select_classes,
)
from real import readable, real_pictures
from report import side_by_side, write_report
from training import train_token
from utils import WITHOUT_GPU_OR_NETWORK, UserError, imported, require, write_json, write_text

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKEN_FILE = "learned_embeds.safetensors"


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
    check_device(config.device, config.mixed_precision)
    if config.context_judge:
        imported(config.context_judge, "context_judge")
    labels = load_labels(config.classifier)
    names = class_names(labels, config.class_names)
    chosen = select_classes(config.class_index, labels, names)
    folders = {index: output_folders(config, index, names[index]) for index in chosen}
    if not config.train:
        for tokens, _ in folders.values():
            class_token.load(tokens / TOKEN_FILE)  # before gigabytes are loaded for nothing
    real, extractor = dict.fromkeys(chosen, []), None
    if config.evaluate and config.real_images:
        real = all_real_pictures(config, chosen, names, labels, folders)
        extractor = load_extractor(config.features, config.device)
    judges = {"classifier": load_classifier(config.classifier, config.device)}
    if config.evaluator and config.evaluate:
        judges["evaluator"] = load_classifier(config.evaluator, config.device)
        require(judges["evaluator"].labels == labels, f"the evaluator '{config.evaluator}' must know the same classes "
                                                      f"in the same order as the classifier '{config.classifier}'")
    components = load_components(config.model, config.device, DTYPES[config.mixed_precision],
                                 config.gradient_checkpointing)
    token_id = class_token.add_placeholder(components.tokenizer, config.placeholder_token)
    check_prompts(config, components, token_id, [names[index] for index in chosen])
    results = []
    for index in chosen:
        tokens, images = folders[index]
        print(f"class {class_title(index, labels[index])}", flush=True)
        if config.train and not (config.skip_exists and (tokens / TOKEN_FILE).exists()):
            train(config, components, judges["classifier"], index, names[index], token_id, tokens, images)
        if config.evaluate:
            results.append(evaluate(config, components, judges, index, names[index], token_id, tokens / TOKEN_FILE,
                                    images, real[index]))
    if results:
        summarise(config, results, extractor, [folders[index][1] / "eval" for index in chosen],
                  [real[index] for index in chosen])


def summarise(config: RunConfig, results: list[dict], extractor, folders: list[Path], real: list[list[Path]]):
    """Print what the classes of this call gave; write their report and the summary of all classes of the run."""
    distances, lines, note = None, None, ""
    print(f"\naccuracy without -> with the token [Wilson 95 % interval], {config.test_size} images each, seeds 0 to "
          f"{config.test_size - 1}\n{aligned(table_lines(results))}")
    if config.eval_prompts:
        print(f"\nin other prompts\n{aligned(contexts_table_lines(results))}")
    if extractor:
        arms = {arm: [folder / arm / f"{seed}.png" for folder in folders for seed in range(config.test_size)]
                for arm in ARMS}
        distances = distribution(extractor, arms, real, config.batch_size)
        lines, note = distribution_lines(distances)
        print(f"\n{aligned(lines)}\n{note}")
    everything = Path(config.output_path, "img", folder_name(config.classifier))
    summary = everything / f"summary_{config.exp_id}.json"
    report = everything / f"report_{config.exp_id}.html" if len(folders) > 1 else folders[0].parent / "report.html"
    write_report([folder.parent for folder in folders], report, lines, note)
    metrics = sorted(everything.glob(f"*/{glob.escape(config.exp_id)}/eval/metrics.json"))
    write_json(summary, {
        "classes": [json.loads(path.read_text(encoding="utf-8")) for path in metrics], "distribution": distances})
    print(f"\nreport: {report}\nall classes of run '{config.exp_id}': {summary}")


def all_real_pictures(config: RunConfig, chosen: list[int], names, labels, folders) -> dict[int, list[Path]]:
    """Every class's real pictures; where a function draws them, enough for an FID that can be compared."""
    count = config.test_size + math.ceil(COMPARABLE_FID / len(chosen))
    real = {index: readable(real_pictures(config.real_images, index, names[index], labels[index],
                                          folders[index][1].parent / "real", count))
            for index in tqdm(chosen, desc="real pictures", unit="class", delay=1)}
    check_counts(config.test_size * len(chosen), sum(map(len, real.values())))
    return real


def output_folders(config: RunConfig, index: int, name: str) -> tuple[Path, Path]:
    """Where class `index` (from 0) keeps its token and its images: pipeline_token/... and img/..."""
    parts = folder_name(config.classifier), class_folder(index, name), config.exp_id
    return tuple(Path(config.output_path, kind, *parts) for kind in ("pipeline_token", "img"))


def train(config, components, classifier, index, name, token_id, tokens: Path, images: Path):
    """Learn one token and save it with its settings and history."""
    for old in (images / "train", tokens):  # a shorter run must not be mixed with what a longer one left
        shutil.rmtree(old, ignore_errors=True)
    tokens.mkdir(parents=True)
    write_text(tokens / "config.yml", to_yaml(replace(config, class_index=str(index + 1))))
    started = time.time()
    trained = train_token(config, components, classifier, index, name, token_id, images / "train",
                          tokens / "history.jsonl")
    class_token.save(tokens / TOKEN_FILE, config.placeholder_token, trained.vector, {
        "class_index": index + 1, "class_name": name, "label": classifier.labels[index],
        "classifier": config.classifier, "base_model": config.model, "seed": config.seed,
        "updates": trained.updates, "loss": f"{trained.loss:.4f}", "train_accuracy": f"{trained.accuracy:.4f}",
        "stopped": trained.stopped, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "python": platform.python_version()})
    print(f"  {trained.updates} updates in {time.time() - started:.0f} s, stopped: {trained.stopped}\n"
          f"  token: {tokens / TOKEN_FILE}")


def evaluate(config, components, judges, index, name, token_id, token_file: Path, images: Path, real) -> dict:
    """Draw, judge and show one class without and with its token."""
    _, vector, header = class_token.load(token_file)
    width = components.text_encoder.config.hidden_size
    require(len(vector) == width, f"'{token_file}' holds a vector of {len(vector)} numbers; the text encoder of "
                                  f"'{config.model}' reads {width}: it was trained for another model")
    require(int(header.get("seed", config.test_size)) >= config.test_size,
            f"'{token_file}' was trained on seeds from {header.get('seed')} on, which {config.test_size} evaluation "
            f"images would use too: give --test_size {header.get('seed')} or less")
    folder = images / "eval"
    untrained = class_token.initial_vector(components.tokenizer, components.text_encoder, config.initializer_token)
    arms = arms_of(config, name, vector, untrained)
    title = class_title(index, judges["classifier"].labels[index])
    if not generate(config, components, title, token_id, arms, folder):
        print("  the pictures are there already, drawn with this token and these settings")
    metrics = evaluate_folder(config, judges, index, arms, folder, token_folder=str(token_file.parent),
                              real=[str(file) for file in real[:20]])
    side_by_side(folder, f"class {title}", real)
    print(f"  pictures: {folder / 'grid.png'}")
    return metrics


def check_prompts(config: RunConfig, components, token_id: int, names: list[str]):
    """Find out before any long work, and before anything is written, what the generator cannot be asked."""
    vector = class_token.initial_vector(components.tokenizer, components.text_encoder, config.initializer_token)
    trajectory(components, config.num_inference_steps, config.train_timesteps)
    initial_latents(components, noise_sources([0]), config.height, config.width)
    templates = [*TEMPLATES, *(config.eval_prompts if config.evaluate else [])]
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
