"""Gradient skipping itself: how much of the trajectory should carry the gradient, and where should its end begin?

    python -m experiments.gradient_step

A token learns for a fixed number of updates in variants of the loop: the last 1, 2, 5 or all steps with a graph
(DRaFT-K of Clark et al. 2024), the final step starting at different timesteps, trajectories of different lengths, and
several noise draws for the last step from one trajectory without a graph (DRaFT-LV). Every variant is judged by the
full sampler on seeds it never saw. The cosine is that between minus the first update's gradient and a direction that
works: to the adjectives that name the class (a world that has them), or else to the token that run.py learned.
"""

import json
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from class_token import initial_vector, spliced
from diffusion import decode, encode_prompts, initial_latents, noise_sources, trajectory
from experiments.common import (
    Lab,
    open_lab,
    parser,
    pictures,
    publish,
    pyplot,
    save_figure,
    script,
    share_right,
    shown,
    tokens,
    vector_of,
)
from metrics import Proportion
from miniature.world import THINGS
from prompt_datasets import TEMPLATES
from utils import write_json

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
      for each in ([600], [999, 600], [999, 800, 600], [999, 900, 800, 700, 600])),
    *(Variant("noise draws for the final step", str(draws), [999, 800, 600], 1, draws) for draws in (1, 2, 4))]


def final_latents(lab: Lab, embeds: torch.Tensor, seeds: list[int], variant: Variant) -> torch.Tensor:
    """z_0 [B, 4, h, w] of prompt_embeds [B, L, D], with a graph through the last steps; groups of `draws` share noise.

    The first step with a graph has one through its conditional half alone, as in the method; what follows depends on
    its latents, so that both halves need one.
    """
    components, _ = lab.generator()
    unet, scale, draws = components.unet, lab.config.guidance_scale, variant.draws
    scheduler = trajectory(components, lab.config.num_inference_steps, variant.timesteps)
    generators = noise_sources(seeds[::draws])
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
                noise_pred = guided(latents, t, embeds[::draws], negative)
        else:
            if i == first and draws > 1:
                with torch.no_grad():
                    noise_pred = guided(latents, t, embeds[::draws], negative)
                    z_0 = scheduler.step(noise_pred, t, latents).prev_sample
                scheduler = trajectory(components, lab.config.num_inference_steps, variant.timesteps)
                latents = renoised(lab, scheduler, z_0, latents, t, seeds)
                negative = negative.repeat_interleave(draws, 0)
                scheduler.set_begin_index(i)
            noise_pred = guided(latents, t, embeds, negative)
        latents = scheduler.step(noise_pred, t, latents).prev_sample
    return latents


@torch.no_grad()
def renoised(lab: Lab, scheduler, z_0: torch.Tensor, latents: torch.Tensor, t, seeds: list[int]) -> torch.Tensor:
    """Of every trajectory its own latents at t, and its z_0 with other noise of t's strength (DRaFT-LV, Sec. 3.2)."""
    draws = len(seeds) // len(latents)
    noise = initial_latents(lab.generator()[0], noise_sources([seed + 10**6 for seed in seeds]), lab.config.height,
                            lab.config.width)
    again = scheduler.add_noise(z_0.repeat_interleave(draws, 0), noise, t.repeat(len(seeds)))
    again[::draws] = latents
    return again


def gradient(lab: Lab, index: int, vector: torch.Tensor, update: int, variant: Variant) -> tuple[float, float]:
    """Set vector.grad by one update's images; their mean loss and the share that is right."""
    config, (components, token_id) = lab.config, lab.generator()
    first = config.seed + update * config.epoch_size
    seeds = list(range(first, first + config.epoch_size))
    prompts = [TEMPLATES[i // variant.draws % config.number_of_prompts] for i in range(config.epoch_size)]
    phrase = f"{config.placeholder_token} {lab.names[index]}"
    with spliced(components.text_encoder, token_id, vector):
        embeds = encode_prompts(components, [prompt.format(phrase) for prompt in prompts])
    logits = lab.guide()(decode(components, final_latents(lab, embeds, seeds, variant)))
    loss = F.cross_entropy(logits, torch.full((len(logits),), index, device=logits.device))
    loss.backward()
    return loss.item(), (logits.argmax(1) == index).float().mean().item()


def learn(lab: Lab, index: int, variant: Variant, updates: int) -> dict:
    """The mean of the last three vectors after `updates` of AdamW as the config has it, and what they cost."""
    config, (components, _) = lab.config, lab.generator()
    vector = initial_vector(components.tokenizer, components.text_encoder, config.initializer_token)
    vector = vector.to(components.device).requires_grad_()
    optimizer = torch.optim.AdamW([vector], config.lr, tuple(config.betas), config.eps, config.weight_decay)
    first, vectors, started = None, [], time.monotonic()
    for update in range(updates):
        optimizer.zero_grad()
        gradient(lab, index, vector, update, variant)
        first = vector.grad.clone() if first is None else first
        torch.nn.utils.clip_grad_norm_([vector], config.max_grad_norm)
        optimizer.step()
        vectors.append(vector.detach().clone())
    return {"vector": torch.stack(vectors[-3:]).mean(0).tolist(), "first_gradient": first.tolist(),
            "seconds": (time.monotonic() - started) / updates}


def working_direction(lab: Lab, index: int) -> torch.Tensor:
    components, _ = lab.generator()
    start = initial_vector(components.tokenizer, components.text_encoder, lab.config.initializer_token)
    adjectives = next((thing.adjectives for thing in THINGS if thing.label == lab.labels[index]), ())
    if adjectives:
        words = [initial_vector(components.tokenizer, components.text_encoder, word) for word in adjectives]
        return torch.stack(words).mean(0) - start
    return vector_of(tokens(lab, "token", classes=[index])[index]) - start


def kept_for_backward(lab: Lab, index: int, variant: Variant) -> float:
    """Megabytes an image that autograd keeps of one update."""
    components, _ = lab.generator()
    vector = initial_vector(components.tokenizer, components.text_encoder, lab.config.initializer_token)
    kept = {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradient(lab, index, vector.to(components.device).requires_grad_(), 0, variant)
    return sum(kept.values()) / 1e6 / lab.config.epoch_size


def measured(lab: Lab, variant: Variant, options) -> dict:
    """What a variant learned for every class, kept in the work folder, and how its pictures are judged."""
    name = f"{variant.group} {variant.name}".replace(" ", "_").replace("=", "")
    file = lab.work / "gradient_step" / f"{name}.json"
    if not file.exists():
        write_json(file, {"classes": {index: learn(lab, index, variant, options.updates) for index in lab.classes},
                          "kept_mb": kept_for_backward(lab, lab.classes[0], variant)})
    found = json.loads(file.read_text(encoding="utf-8"))
    learned = {int(index): each for index, each in found["classes"].items()}
    sets = {index: pictures(lab, index, f"gradient_step/{name}", torch.tensor(each["vector"]), options.images)
            for index, each in learned.items()}
    cosines = [F.cosine_similarity(-torch.tensor(each["first_gradient"]), working_direction(lab, index), dim=0).item()
               for index, each in learned.items()]
    return {"group": variant.group, "variant": variant.name, "timesteps": variant.timesteps,
            "right": share_right(lab, sets)._asdict(), "cosine": sum(cosines) / len(cosines),
            "seconds_an_update": sum(each["seconds"] for each in learned.values()) / len(learned),
            "kept_mb_an_image": found["kept_mb"]}


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
        axis.set_xticks(x, [each["variant"] for each in these])
        axis.set_xlabel(group, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(-0.1, 1.02)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def recommended(results: list[dict]) -> tuple[dict, dict]:
    """The variant that is right most often, and the quickest whose interval reaches it."""
    best = max(results, key=lambda each: each["right"]["value"])
    as_good = [each for each in results if each["right"]["high"] >= best["right"]["value"]]
    return best, min(as_good, key=lambda each: each["seconds_an_update"])


def called(variant: dict) -> str:
    return f"{variant['group']}: {variant['variant']}"


def hypothesis(advised: dict) -> str:
    """What the recommendation would mean elsewhere."""
    if not advised["timesteps"]:
        return ""
    return ("\n\nHypothesis for Stable Diffusion 1.4, whose noise schedule is the same; not tested: `--train_timesteps "
            f"{' '.join(map(str, advised['timesteps']))}` takes fewer updates to the same accuracy than its own "
            "sampler's steps, the last of which starts from almost no noise.")


def main():
    arguments = parser(__doc__, "7,13,16")
    arguments.add_argument("--updates", type=int, default=12, help="updates of every variant (12)")
    arguments.add_argument("--epoch_size", type=int, default=8, help="pictures an update (8)")
    arguments.add_argument("--images", type=int, default=15, help="held-out pictures a class that judge it (15)")
    options = arguments.parse_args()
    lab = open_lab(options, epoch_size=options.epoch_size)
    plain = share_right(lab, {index: pictures(lab, index, "without", None, options.images) for index in lab.classes})
    results = [measured(lab, variant, options) for variant in VARIANTS]
    draw_figure(results, plain.value, lab.out / "gradient_step.png")
    best, advised = recommended(results)
    rows = [[each["group"], each["variant"], shown(Proportion(**each["right"])), f"{each['cosine']:.2f}",
             f"{each['seconds_an_update']:.2f}", f"{each['kept_mb_an_image']:.1f}"] for each in results]
    publish(lab, "gradient_step", "One final step is enough, if it starts early enough",
            f"Best after {options.updates} updates: {called(best)}, {best['right']['value']:.2f} right "
            f"({plain.value:.2f} without a token); recommended: {called(advised)}, the quickest within its interval.",
            ["variant of the loop", "", "right class", "cosine", "s an update", "MB an image kept"], rows,
            {"results": results, "without": plain._asdict(), "updates": options.updates,
             "epoch_size": options.epoch_size, "classes": [lab.labels[index] for index in lab.classes]},
            "Right [Wilson 95 % interval]: held-out seeds, full sampler, evaluator. Cosine: minus the first gradient "
            "with the way to the class's own adjectives. The vector is the mean of the last three."
            + hypothesis(advised),
            "gradient_step.png")


if __name__ == "__main__":
    script(main)
