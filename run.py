"""Train class tokens and evaluate them.

    python run.py --class_index 283 --train True --evaluate True       Stable Diffusion 1.4 and ImageNet, on a GPU
    python run.py --config configs/miniature.yml --class_index all --train True --evaluate True      without a GPU
    python run.py --config configs/miniature.yml --list_classes
"""

import stopping

if __name__ == "__main__":
    stopping.end_quietly()

import functools
import glob
import math
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

import class_token
from class_token import TOKEN_FILE
from classifiers import Classifier, folder_name, load_classifier, load_labels
from config import RunConfig, parse
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
    generate,
    table_lines,
)
from learner import Job
from metrics import COMPARABLE_FID
from outputs import (
    VECTORS_FILE,
    begin,
    check_token,
    end,
    holding,
    is_trained,
    output_folders,
    prepare,
    save,
    say,
    unfinished,
    warn_of_other_settings,
)
from prompt_datasets import TEMPLATES, class_names, class_title, evaluation_prompts, select_classes
from real import drawn, real_pictures
from report import keep_real, side_by_side, write_report
from stopping import Stopped, in_flight, listening
from sweep import agreed, close_bars, count_class, from_all, join, meet, shared, wait_for_all
from training import train_tokens
from utils import WITHOUT_GPU_OR_NETWORK, UserError, imported, read_json, read_tensors, require, said, write_json

NO_ROOM = ("the device's memory does not suffice for these models: try --mixed_precision fp16 or bf16, a smaller "
           "--model, --classifier or --evaluator, or another --device")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(argv: list[str]) -> int:
    """Do what the command line asks for; the exit code: 2 for what the user can mend, 130 and 143 for signals."""
    try:
        with listening():
            config, list_classes = parse(argv, __doc__)
            if list_classes:
                labels = load_labels(config.classifier)
                print("\n".join(f"{i + 1:5d}  {label}" for i, label in enumerate(labels)))
                return 0
            config = replace(config, eval_prompts=evaluation_prompts(config.eval_prompts))
            config.validate()
            run(config)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        close_bars()
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {NO_ROOM if isinstance(error, torch.OutOfMemoryError) else said(error)}", file=sys.stderr)
        return 2
    except Stopped as signal:
        close_bars()
        print(f"stopped by {signal}: nothing that was finished is lost, and the same command goes on from here",
              file=sys.stderr)
        return signal.exit_code
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
    check_placeholder(config, [names[index] for index in chosen])
    folders = {index: output_folders(config, index, names[index]) for index in chosen}
    held = functools.partial(holding, config, chosen) if processes.is_main_process else nullcontext
    todo = functools.partial(still_to_train, config, folders)
    with held(False):
        to_train = agreed("at first", todo)
    for index in set(chosen) - set(to_train):
        check_token(config, folders[index][0] / TOKEN_FILE)  # before gigabytes are loaded for nothing
    real, extractor = compared_with(config, names, labels, {index: folders[index][1] for index in chosen})
    judges = load_judges(config, labels)
    generator = functools.cache(lambda: load_generator(config, [names[index] for index in chosen]))
    if to_train:
        generator()  # before anything is written; where all pictures are drawn already it is never loaded
    with held():
        to_train = agreed("to train", todo)  # another run may have come in between
        if processes.is_main_process:
            begin(config, folders)
        meet()
        failed = work(config, labels, names, folders, to_train, generator, judges, real)
        done = [index for index in chosen if index not in failed]
        if processes.is_main_process:
            if config.evaluate and done:
                summarise(config, extractor, [folders[index][1] / "eval" for index in done],
                          [real[index] for index in done])
            require(not failed, f"{len(failed)} of {len(chosen)} classes failed, as said above: "
                                + ", ".join(class_title(index, labels[index]) for index in sorted(failed)))
            if config.train:
                with in_flight("the last file"):
                    end(config, folders)


def still_to_train(config: RunConfig, folders: dict[int, tuple[Path, Path]]) -> list[int]:
    """The classes that lack a token, or are to be trained anew."""
    goes_on = unfinished(config, folders).exists()
    return [index for index, (tokens, _) in folders.items()
            if config.train and not is_trained(config, tokens, goes_on)]


def work(config: RunConfig, labels: list[str], names: list[str], folders: dict[int, tuple[Path, Path]],
         to_train: list[int], generator, judges: dict[str, Classifier], real: dict[int, list[Path]]) -> list[int]:
    """Train and evaluate the classes that come to this process; those of all processes that failed, as was said."""
    chosen, draw_batch, failed = list(folders), drawing(config), []

    def judge(index):
        tokens, images = folders[index]
        arms, film = draw(config, generator, draw_batch, index, names[index], labels[index], tokens, images)
        evaluate(config, judges, index, arms, film, tokens, images, drawn(config.real_images, index, real[index]))

    bar = tqdm(total=len(chosen), desc="classes", unit="class",
               disable=len(chosen) == 1 or not PartialState().is_main_process)
    jobs = (prepare(config, Job(index, names[index], *folders[index], labels[index]))
            for index in shared(to_train, "to train"))
    before = [index for index in chosen if index not in to_train]
    together = min(config.classes_at_once, max(1, math.ceil(len(to_train) / PartialState().num_processes)))
    training = replace(config, classes_at_once=together)  # or the first process would take all
    for index, failure in with_tokens(training, generator, judges["classifier"], jobs if to_train else None, before):
        try:
            if failure:
                raise failure
            if config.evaluate:
                judge(index)
        except UserError as error:
            if len(chosen) == 1:
                raise
            failed.append(index)
            tqdm.write(f"class {class_title(index, labels[index])} failed: {said(error)}", file=sys.stderr)
        count_class(bar)
    wait_for_all(bar)
    return from_all(failed)


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
    results = [read_json(folder / "metrics.json", "class_index") for folder in folders]
    everything = Path(config.output_path, "img", folder_name(config.classifier))
    summary = everything / f"summary_{config.exp_id}.json"
    metrics = [other for path in sorted(everything.glob(f"*/{glob.escape(config.exp_id)}/eval/metrics.json"))
               if (other := of_another_run(path))]
    metrics = list({each["class_index"]: each for each in [*metrics, *results]}.values())  # a renamed class counts once
    before = read_json(summary, "distribution")["distribution"] if summary.exists() else None
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


def of_another_run(file: Path) -> dict | None:
    """What another run measured of another class, which may be evaluating it anew just now."""
    try:
        return read_json(file, "class_index")
    except FileNotFoundError:
        return None
    except UserError as error:
        print(f"warning: left out of the summary: {said(error)}", file=sys.stderr)
        return None


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


def draw(config: RunConfig, generator, draw_batch, index: int, name: str, label: str, tokens: Path,
         images: Path) -> tuple[list[Arm], list[Arm]]:
    """Write the pictures of one class without and with its token, and of the film over the token's updates."""
    _, vector, _ = class_token.load(tokens / TOKEN_FILE)
    warn_of_other_settings(config, tokens)
    arms, history = arms_of(config, index, name, vector), images / "train" / VECTORS_FILE
    film = film_of(config, name, read_tensors(history)[0]) if history.exists() else []
    if not generate(config, generator, class_title(index, label), arms + film, images / "eval", draw_batch):
        say(class_title(index, label), "the pictures are there already, drawn with this token and these settings")
    return arms, film


def evaluate(config: RunConfig, judges, index: int, arms: list[Arm], film: list[Arm], tokens: Path, images: Path,
             real: list[Path]) -> dict:
    """Judge and show the pictures of one class."""
    folder = images / "eval"
    _, _, header = class_token.load(tokens / TOKEN_FILE)
    metrics = evaluate_folder(config, judges, index, arms, folder, film=[arm.folder for arm in film],
                              held_out="seed" in header, settings=asdict(config))
    keep_real(real, folder / "real")
    side_by_side(folder, f"class {class_title(index, judges['classifier'].labels[index])}", real)
    say(class_title(index, judges["classifier"].labels[index]), f"pictures: {folder / 'grid.png'}")
    return metrics


def check_prompts(config: RunConfig, components, token_id: int, names: list[str]):
    """Find out before any long work, and before anything is written, what the generator cannot be asked."""
    vector = class_token.initial_vector(components.tokenizer, components.text_encoder, config.initializer_token)
    trajectory(components, config.num_inference_steps, config.train_timesteps)
    initial_latents(components, noise_sources([0]), config.height, config.width)
    templates = [*TEMPLATES[:config.number_of_prompts], *(config.eval_prompts if config.evaluate else [])]
    with torch.no_grad(), class_token.spliced(components.text_encoder, token_id, vector.to(components.device)):
        for name in names:
            encode_prompts(components, [prompt.format(f"{config.placeholder_token} {name}") for prompt in templates])


def check_placeholder(config: RunConfig, names: list[str]):
    """The tokenizer would find the placeholder in any word that holds it, also where no token is meant."""
    for text in (*names, *TEMPLATES, *config.eval_prompts):
        require(config.placeholder_token.lower() not in text.lower(),
                f"placeholder_token '{config.placeholder_token}' is part of '{text}': take a word that stands nowhere "
                "else, such as newclas")


def check_device(device: str, mixed_precision: str):
    """Say at once what the device cannot do."""
    kind, _, number = device.partition(":")
    require(kind != "cuda" or torch.cuda.is_available(), "no CUDA GPU here: use --device cpu --mixed_precision no, "
                                                         f"which is slow, {WITHOUT_GPU_OR_NETWORK}")
    require(not number or int(number) < torch.cuda.device_count(),
            f"no GPU {number} here: there are {torch.cuda.device_count()}, counted from 0")
    require(kind != "mps" or torch.backends.mps.is_available(), f"no Apple GPU here, {WITHOUT_GPU_OR_NETWORK}")
    require(kind != "cpu" or mixed_precision != "fp16", "a CPU has no fast fp16: use --mixed_precision no")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
