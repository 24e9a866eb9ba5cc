"""Gradient skipping itself: how much of the trajectory should carry the gradient, and where should its end begin?

    python -m experiments.gradient_step

A token learns for a fixed number of updates in variants of the loop: the last 1, 2, 5 or all steps with a graph
(DRaFT-K of Clark et al. 2024), the final step starting at different timesteps, trajectories of different lengths, and
several noise draws for the last step from each trajectory without a graph (DRaFT-LV). Every variant is judged by the
full sampler on seeds it never saw. At the start, gradients of several updates' pictures are compared: their spread, and
the cosine between minus their mean and a direction that works: to the adjectives that name the class (a world that has
them), or else to the token that run.py learned.
"""

import functools
import time
from dataclasses import replace
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F

from class_token import initial_vector, spliced
from diffusion import decode, encode_prompts, initial_latents, noise_sources, trajectory
from evaluation import interval
from experiments.common import (
    Lab,
    kept,
    open_lab,
    parser,
    pictures,
    publish,
    pyplot,
    save_figure,
    script,
    settings_of,
    share_right,
    tokens,
    vector_of,
)
from memory import first_batch, fitting
from metrics import Proportion
from miniature.world import THINGS
from prompt_datasets import TEMPLATES

TEN = [999 - 100 * i for i in range(10)]  # ten steps, the last from 99


class Variant(NamedTuple):
    """A loop: its group and name, its timesteps, how many last ones carry the graph, noise draws for the last one."""

    group: str
    name: str
    timesteps: list[int] | None  # None: the sampler's own, as the paper trains
    graph_steps: int = 1
    draws: int = 1


VARIANTS = [
    *(Variant("steps with a graph (of ten, to t = 99)", str(count), TEN, count) for count in (1, 2, 5, 10)),
    *(Variant("timestep of the final step", str(t), [999, (999 + t) // 2, t])
      for t in (900, 800, 700, 600, 400, 200, 50)),
    Variant("timestep of the final step", "paper's", None),
    *(Variant("steps of the trajectory (to t = 600)", str(len(each)), each)
      for each in ([600], [999, 600], [999, 900, 800, 700, 600])),
    *(Variant("noise draws for the final step", str(draws), [999, 800, 600], 1, draws) for draws in (1, 2, 4))]
SPREAD = 3  # updates' pictures at the start, whose gradients are compared


def final_latents(lab: Lab, embeds: torch.Tensor, seeds: list[int], variant: Variant) -> torch.Tensor:
    """z_0 [B * draws, 4, h, w] of prompt_embeds [B, L, D] and their seeds, with a graph through the last steps.

    The first step with a graph has one through its conditional half alone, as in the method; what follows depends on
    its latents, so that both halves need one.
    """
    components, _ = lab.generator()
    unet, scale, draws = components.unet, lab.config.guidance_scale, variant.draws
    scheduler = trajectory(components, lab.config.num_inference_steps, variant.timesteps)
    generators = noise_sources(seeds)
    latents = initial_latents(components, generators, lab.config.height, lab.config.width) * scheduler.init_noise_sigma
    with torch.no_grad():
        negative = encode_prompts(components, [""]).expand(len(latents), -1, -1)
    first = len(scheduler.timesteps) - variant.graph_steps

    def guided(latents, t, embeds, negative):
        model_input = scheduler.scale_model_input(latents, t)
        with torch.set_grad_enabled(latents.requires_grad):
            unconditional = unet(model_input, t, encoder_hidden_states=negative).sample
        conditional = unet(model_input, t, encoder_hidden_states=embeds).sample
        return unconditional + scale * (conditional - unconditional)

    for i, t in enumerate(scheduler.timesteps):
        if i < first:
            with torch.no_grad():
                noise_pred = guided(latents, t, embeds, negative)
        else:
            if i == first and draws > 1:
                with torch.no_grad():
                    noise_pred = guided(latents, t, embeds, negative)
                    z_0 = scheduler.step(noise_pred, t, latents).prev_sample
                scheduler = trajectory(components, lab.config.num_inference_steps, variant.timesteps)
                latents = renoised(lab, scheduler, z_0, latents, t, seeds, draws)
                embeds, negative = (each.repeat_interleave(draws, 0) for each in (embeds, negative))
                scheduler.set_begin_index(i)
            noise_pred = guided(latents, t, embeds, negative)
        latents = scheduler.step(noise_pred, t, latents).prev_sample
    return latents


@torch.no_grad()
def renoised(lab: Lab, scheduler, z_0: torch.Tensor, latents: torch.Tensor, t, seeds: list[int],
             draws: int) -> torch.Tensor:
    """[B * draws, 4, h, w]: every trajectory's own latents at t, then its z_0 with other noise of t's strength.

    DRaFT-LV of Clark et al. 2024, Sec. 3.2.
    """
    others = [seed + 10**6 * draw for seed in seeds for draw in range(draws)]
    noise = initial_latents(lab.generator()[0], noise_sources(others), lab.config.height, lab.config.width)
    again = scheduler.add_noise(z_0.repeat_interleave(draws, 0), noise, t.repeat(len(others)))
    again[::draws] = latents
    return again


def gradient(batch_size: int, lab: Lab, index: int, vector: torch.Tensor, update: int,
             variant: Variant) -> torch.Tensor:
    """One update's gradient [D] at `vector`, `batch_size` trajectories at a time."""
    config, (components, token_id) = lab.config, lab.generator()
    first, phrase = config.seed + update * config.epoch_size, f"{config.placeholder_token} {lab.names[index]}"
    vector = vector.detach().clone().requires_grad_()
    for part in torch.arange(config.epoch_size).split(batch_size):
        prompts = [TEMPLATES[i % config.number_of_prompts].format(phrase) for i in part.tolist()]
        with spliced(components.text_encoder, token_id, vector):
            embeds = encode_prompts(components, prompts)
        latents = final_latents(lab, embeds, (first + part).tolist(), variant)
        logits = lab.guide()(decode(components, latents))
        loss = F.cross_entropy(logits, torch.full((len(logits),), index, device=logits.device), reduction="sum")
        (loss / (config.epoch_size * variant.draws)).backward()
    return vector.grad


def learn(lab: Lab, index: int, variant: Variant, updates: int) -> dict:
    """The mean of the last three vectors after `updates` of AdamW as the config has it; seconds, first gradients."""
    config, (components, _) = lab.config, lab.generator()
    step = fitting(gradient, config.batch_size, first_batch(config.epoch_size, config.device, config.height,
                                                            config.width))
    vector = initial_vector(components.tokenizer, components.text_encoder, config.initializer_token)
    vector = vector.to(components.device).requires_grad_()
    gradients = [step(lab, index, vector, update, variant) for update in range(SPREAD)]
    optimizer = torch.optim.AdamW([vector], config.lr, tuple(config.betas), config.eps, config.weight_decay)
    vectors, started = [], time.monotonic()
    for update in range(updates):
        vector.grad = step(lab, index, vector, update, variant)
        torch.nn.utils.clip_grad_norm_([vector], config.max_grad_norm)
        optimizer.step()
        vectors.append(vector.detach().clone())
    return {"vector": torch.stack(vectors[-3:]).mean(0).tolist(), "gradients": torch.stack(gradients).tolist(),
            "seconds": (time.monotonic() - started) / updates}


def working_direction(lab: Lab, index: int) -> torch.Tensor:
    """From the initialiser to what names the class [D], on the CPU."""
    components, _ = lab.generator()
    start = initial_vector(components.tokenizer, components.text_encoder, lab.config.initializer_token).cpu()
    adjectives = next((thing.adjectives for thing in THINGS if thing.label == lab.labels[index]), ())
    if adjectives:
        words = [initial_vector(components.tokenizer, components.text_encoder, word) for word in adjectives]
        return torch.stack(words).mean(0).cpu() - start
    return vector_of(tokens(lab, "gradient_step", classes=[index])[index]) - start


def kept_for_backward(lab: Lab, index: int, variant: Variant) -> float:
    """Megabytes of activations that autograd keeps for one trajectory."""
    components, _ = lab.generator()
    vector = initial_vector(components.tokenizer, components.text_encoder, lab.config.initializer_token)
    models = (components.unet, components.vae, components.text_encoder, lab.guide().model)
    weights = {weight.untyped_storage().data_ptr() for model in models for weight in model.parameters()}
    activations = {}

    def note(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            activations[storage.data_ptr()] = storage.nbytes()
        return tensor

    one = lab._replace(config=replace(lab.config, epoch_size=1))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradient(1, one, index, vector.to(components.device), 0, variant)
    return sum(activations.values()) / 1e6


def measured(lab: Lab, variant: Variant, options) -> dict:
    """What a variant learned for every class, kept in the work folder, and how its pictures are judged."""
    steps = "_".join(map(str, variant.timesteps or ["paper"]))
    name = f"{steps}_graph{variant.graph_steps}_draws{variant.draws}"
    settings = settings_of(lab, updates=options.updates, spread=SPREAD)
    learned = {index: kept(lab.work / f"gradient_step/{name}_{index + 1}.json", settings,
                           functools.partial(learn, lab, index, variant, options.updates)) for index in lab.classes}
    sets = {index: pictures(lab, index, f"gradient_step/{name}", torch.tensor(each["vector"]), options.images)
            for index, each in learned.items()}
    gradients = {index: torch.tensor(each["gradients"]) for index, each in learned.items()}
    cosines = [F.cosine_similarity(-each.mean(0), working_direction(lab, index), dim=0).item()
               for index, each in gradients.items()]
    spreads = [(each.std(0).norm() / each.mean(0).norm()).item() for each in gradients.values()]
    return {**variant._asdict(), "right": share_right(lab, sets)._asdict(), "cosine": mean(cosines),
            "spread": mean(spreads), "seconds_an_update": mean(each["seconds"] for each in learned.values()),
            "kept_mb_a_trajectory": kept(lab.work / f"gradient_step/{name}_mb.json", settings,
                                         lambda: kept_for_backward(lab, lab.classes[0], variant))}


def draw_figure(results: list[dict], plain: float, path):
    """Accuracy and cosine of each group's variants."""
    groups = list(dict.fromkeys(each["group"] for each in results))
    figure, axes = pyplot.subplots(1, len(groups), figsize=(3.4 * len(groups), 3), sharey=True)
    for axis, group in zip(axes, groups, strict=True):
        these = [each for each in results if each["group"] == group]
        right, x = [each["right"] for each in these], range(len(these))
        axis.errorbar(x, [each["value"] for each in right], fmt="o-", capsize=3, label="right class",
                      yerr=[[each["value"] - each["low"] for each in right],
                            [each["high"] - each["value"] for each in right]])
        axis.plot(x, [each["cosine"] for each in these], "s--", label="cosine")
        axis.axhline(plain, color="grey", linewidth=0.8, linestyle=":", label="right without a token")
        axis.set_xticks(x, [each["name"] for each in these], fontsize=8)
        axis.set_xlabel(group, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(-0.1, 1.02)
    axes[0].set_ylabel("share, or cosine", fontsize=8)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def recommended(results: list[dict]) -> tuple[dict, dict]:
    """The variant that is right most often, and of those that run.py has settings for the quickest as good as it."""
    best = max(results, key=lambda each: each["right"]["value"])
    plain = [each for each in results if each["graph_steps"] == each["draws"] == 1]
    as_good = [each for each in plain if each["right"]["high"] >= best["right"]["value"]]
    return best, min(as_good or [max(plain, key=lambda each: each["right"]["value"])],
                     key=lambda each: each["seconds_an_update"])


def flag(variant: dict) -> str:
    return f"`--train_timesteps {' '.join(map(str, variant['timesteps'] or ['none']))}`"


def main():
    arguments = parser(__doc__, "7,16")
    arguments.add_argument("--updates", type=int, default=10, help="updates of every variant (10)")
    arguments.add_argument("--epoch_size", type=int, default=8, help="pictures an update (8)")
    arguments.add_argument("--images", type=int, default=10, help="held-out pictures a class that judge it (10)")
    options = arguments.parse_args()
    lab = open_lab(options, epoch_size=options.epoch_size)
    if lab.config.mixed_precision == "fp16":  # gradients are compared here without a loss scale
        lab = open_lab(options, epoch_size=options.epoch_size, mixed_precision="bf16")
    plain = share_right(lab, {index: pictures(lab, index, "without", None, options.images) for index in lab.classes})
    results = [measured(lab, variant, options) for variant in VARIANTS]
    draw_figure(results, plain.value, lab.out / "gradient_step.png")
    report(lab, results, plain, options)


def report(lab: Lab, results: list[dict], plain: Proportion, options):
    best, advised = recommended(results)
    ties = [f"{each['group']}: {each['name']}" for each in results if each["right"] == best["right"]]
    rows = [[each["group"], each["name"], interval(Proportion(**each["right"])), f"{each['cosine']:.2f}",
             f"{each['spread']:.1f}", f"{each['seconds_an_update']:.1f}", f"{each['kept_mb_a_trajectory']:.1f}"]
            for each in results]
    publish(lab, "gradient_step", "How many steps need a gradient, and from where",
            f"After {options.updates} updates best, {best['right']['value']:.2f} right ({plain.value:.2f} without a "
            f"token), with {', and '.join(ties)}. Recommended here: {flag(advised)}, the quickest single gradient step "
            "whose interval reaches that.",
            ["variant of the loop", "", "right class", "cosine", "spread", "s an update", "MB a trajectory"], rows,
            {"results": results, "without": plain._asdict(), "updates": options.updates,
             "classes": [lab.title(index) for index in lab.classes]},
            f"Right by {lab.judged}, on held-out seeds drawn by the full sampler [Wilson 95 % interval over the "
            f"pictures of one training a class, {len(lab.classes)} classes: of {len(results)} variants the best and "
            "the worst may be so by chance, and no config was changed on this]; as many trajectories an update for "
            f"every variant, {options.epoch_size}. Cosine: between the first way down and the way from the first word "
            f"to the adjectives that name the class, or to its token. Spread: standard deviation of {SPREAD} updates' "
            "gradients at the start over the norm of their mean. Seconds vary by a third between equal loops, on a "
            "machine that did other things too. MB: activations kept for backward.\n\nHypothesis for Stable Diffusion "
            "1.4, whose noise schedule is the same, not tested: a final step that starts from far more noise than its "
            f"sampler's own last one (\"paper's\"), such as {flag(advised)}, needs no more updates there either, and a "
            "fraction of the UNet's calls.",
            "gradient_step.png")


if __name__ == "__main__":
    script(main)
