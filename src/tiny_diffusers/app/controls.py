"""Controls that several tabs share: how a model is sampled. Each is shown for the models that have a use for it."""

from collections.abc import Sequence

import gradio as gr

from ..errors import unknown
from ..samplers import SCHEDULERS
from .models import Condition, Model
from .requests import MAX_STEPS, number, spell, whole
from .uploads import save_once


SAMPLING = ("steps", "sampler", "guidance", "eta", "threshold")
THRESHOLDS = ("0.99", "0.995", "0.999")
MAX_GUIDANCE = 15
MAX_SEED = 2**31 - 1  # of a box in the page
MAX_NUMBER = 1e12  # of a condition


def sampling_settings(model: Model, names: Sequence[str] = SAMPLING) -> list[dict]:
    """Returns what a model changes in each of the [`sampling_controls`]."""
    is_diffusion = model.family == "diffusion"
    is_guided = is_diffusion and model.can_be_guided
    samplers = [("as saved with the model", ""), *((name, name) for name in SCHEDULERS[model.objective])]
    settings = {
        "steps": {
            "visible": is_diffusion,
            "maximum": min(MAX_STEPS, model.num_train_timesteps),
            "value": model.default_steps,
        },
        "sampler": {"visible": is_diffusion, "choices": samplers, "value": ""},
        "eta": {
            "visible": is_diffusion,
            "maximum": 1 if model.objective == "betas" else 2,
            "value": model.default_eta,
        },
        "guidance": {"visible": is_guided},
        "threshold": {"visible": is_guided},
    }
    return [settings[name] for name in names]


def sampling_controls(model: Model, names: Sequence[str] = SAMPLING) -> list[gr.components.Component]:
    """Builds the named controls of sampling."""
    build = {
        "steps": lambda **of_model: gr.Slider(
            1,
            step=1,
            label="Steps",
            info="more are slower and better",
            **of_model,
        ),
        "sampler": lambda **of_model: gr.Dropdown(label="Sampler", info="what removes the noise", **of_model),
        "eta": lambda **of_model: gr.Slider(
            0,
            step=0.05,
            label="Eta",
            info="fresh noise in each step: 0 none, 1 as DDPM; untouched: the sampler's own",
            **of_model,
        ),
        "guidance": lambda **of_model: gr.Slider(
            *(0, MAX_GUIDANCE, 1),
            step=0.5,
            label="Guidance scale",
            info="1: as it is, above: more like its condition, 0: without one",
            **of_model,
        ),
        "threshold": lambda **of_model: gr.Dropdown(
            [("off", ""), *((name, name) for name in THRESHOLDS)],
            value="",
            label="Dynamic thresholding",
            info="percentile; keeps high guidance from saturating",
            **of_model,
        ),
    }
    return [
        of_any_model(build[name](**changes))
        for name, changes in zip(names, sampling_settings(model, names), strict=True)
    ]


def of_any_model(control: gr.components.Component) -> gr.components.Component:
    """
    Lets every value of a control through to its handler, which checks it: for a client of the API, which has not chosen its
    model in the page, gradio would compare it with what the first model allows.
    """
    control.preprocess = lambda value: value
    return control


def sampling_words(
    model: Model, steps: object, sampler: object, guidance: object, eta: object = None, threshold: object = None
) -> list[str]:
    """Returns the flags of a command that the [`sampling_controls`] stand for, of which a model has not all."""
    words = ["--dtype", "float32"]
    if model.family != "diffusion":
        return words
    words += ["--num_inference_steps", str(whole("Steps", steps, 1, min(MAX_STEPS, model.num_train_timesteps)))]
    if sampler:
        words += ["--scheduler", str(sampler)]
    eta = model.default_eta if eta is None else number("Eta", eta, 0, 100)
    if eta != model.default_eta:  # untouched, it is left to the sampler and the task, whose defaults may be others
        words += ["--eta", spell(eta)]
    if model.can_be_guided:
        guidance = number("Guidance scale", guidance, 0, MAX_GUIDANCE)
        words += ["--guidance_scale", spell(guidance)] if guidance != 1 else []
        words += ["--dynamic_thresholding", str(threshold)] if threshold else []
    return words


def batch_words(model: Model, num_images: int) -> list[str]:
    """Returns the flag of the images at a time, where not all of them are."""
    return ["--batch_size", str(model.batch_size)] if num_images > model.batch_size else []


def picture_box(label: str) -> gr.Image:
    """Builds the place of a picture that is made."""
    return save_once(
        gr.Image(
            label=label,
            show_label=False,
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_classes="picture",
        )
    )


def single_images(label: str) -> gr.Gallery:
    """Builds the hidden place of single images, as which clients of the API get them."""
    return save_once(gr.Gallery(label=label, format="png", visible=False))


def seed_box(label: str = "Seed", value: int = 0, info: str = "the same seed draws the same images") -> gr.Number:
    """Builds the box of a seed."""
    return gr.Number(value, label=label, info=info, precision=0, minimum=0, maximum=MAX_SEED)


def seed_of(value: object, name: str = "Seed") -> str:
    """Returns the seed that a box holds, as a word of a command."""
    return str(whole(name, value, 0, MAX_SEED))


def class_words(model: Model, classes: Sequence[str] | str | None) -> list[str]:
    """Returns the flag of chosen classes; none where the model chooses them itself."""
    chosen = [classes] if isinstance(classes, str) else list(classes or ())
    if not (chosen and model.classes):
        return []
    for name in chosen:
        if name not in model.classes:
            raise unknown("class", f"{name!s:.40}", model.classes)
    return [f"--class_labels={','.join(_class_word(model, name) for name in chosen)}"]  # a name may begin with a dash


def _class_word(model: Model, name: str) -> str:
    """Returns a class as a list of them names it: by its id, if the name would be taken apart."""
    is_whole = name and name == name.strip() and "," not in name
    return name if is_whole else str(model.class_ids[model.classes.index(name)])


def one_class(model: Model, label: str, number: int = 0) -> gr.Dropdown:
    """Builds the choice of one class."""
    return of_any_model(gr.Dropdown(label=label, **class_settings(model, number)))


def class_settings(model: Model, number: int = 0) -> dict:
    """Returns what a model changes in [`one_class`]: its classes, of which one is chosen at first."""
    choices = list(model.classes) or [""]  # which a client of the API may leave out, as it is no None
    chosen = choices[min(number, len(choices) - 1)]
    return {"visible": bool(model.classes), "choices": choices, "value": chosen}


def code_box(label: str, language: str) -> gr.Code:
    """Builds the place of a command or of lines of Python."""
    return gr.Code(label=label, language=language, interactive=False, wrap_lines=True)


def condition_boxes(conditions: Sequence[Condition], count: int, end: str = "") -> list[gr.Number]:
    """Builds `count` boxes of conditions, of which those that a model has not are hidden; `end` is what they are of."""
    return [gr.Number(**changes) for changes in condition_settings(conditions, count, end)]


def condition_settings(conditions: Sequence[Condition], count: int, end: str = "") -> list[dict]:
    """Returns what a model changes in each of the [`condition_boxes`]."""
    shown = [
        {
            "visible": True,
            "label": f"{end} {name}".strip(),
            "info": f"{low:g} to {high:g} in training",
            "value": float(f"{mean:.3g}"),
        }
        for name, low, high, mean in conditions
    ]
    return shown + [{"visible": False, "value": 0}] * (count - len(shown))


def condition_words(model: Model, guidance: object, *values: Sequence[object]) -> list[str]:
    """
    Returns the flags of conditions, each with its number in every one of the lists `values`; none where the guidance scale
    draws samples without conditions.
    """
    if model.can_be_guided and guidance == 0:
        return []
    flags = []
    for condition, *numbers in zip(model.conditions, *values, strict=False):  # the boxes beyond are hidden
        numbers = [spell(number(condition.name, each, -MAX_NUMBER, MAX_NUMBER)) for each in numbers]
        flags.append(f"--condition={condition.name}={','.join(numbers)}")  # a name may begin with a dash
    return flags
