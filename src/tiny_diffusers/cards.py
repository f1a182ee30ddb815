"""The model card of a checkpoint: what the model is, how to load it, how it was made, and what was measured."""

import contextlib
import importlib.resources
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .errors import UserError, code_block, markdown, refusals, say
from .files import load_json, read_text, replace_file
from .runs import MODEL_INDEX, RunFolder


if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from .evaluation.report import Report

# A card's name of the model until it has one on the Hub
THIS_FOLDER = "path/to/this/folder"

# Parts of a card that are written anew, between a first line of this form and `<!-- end of the PART -->`; all other lines
# are the user's
_MARKS = {
    "model": "<!-- model: `tiny-diffusers card` writes this part anew, so write your own text outside of it -->",
    "results": "<!-- results -->",
    "report": "<!-- report -->",
}
_PLAIN_NAME = r"[\w][\w .+-]*"  # that may stand in lines that are copied to a shell or Python


def write_card(
    output_dir: str | Path,
    *,
    model_name: str,
    command: str | None = None,
    settings: Mapping[str, object] | None = None,
    data: Mapping[str, object] | None = None,
    hub_model_id: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    results: Mapping[str, object] | None = None,
) -> Path:
    """
    Writes the model card, `output_dir/README.md`, with the metadata that the Hub reads.

    The model's class, size, prediction type and how to load it are read from the checkpoint in `output_dir`;
    `samples.png` and `loss_curves.png` are shown if they exist. Of a card that is there already, the text outside the
    marked parts stays, and so does what its metadata say; the report of an evaluation goes, as it may be of other weights
    ([`add_results`] adds it again). A card without the marks, or with metadata that can't be read, is kept as
    `README.original.md`.

    Args:
        output_dir (`str` or `Path`): A folder with a saved pipeline.
        model_name (`str`): The heading of a new card.
        command (`str`, *optional*): The command line that trained the model. The value of `--hub_token` is left out.
        settings (`dict`, *optional*): Every setting of the run, name -> value. Tokens are left out.
        data (`dict`, *optional*): The training data, such as `name`, `split`, `images`, `fingerprint`, `notes`. A `name`,
            or a setting `dataset_name`, that is a Hub id goes into the metadata.
        hub_model_id (`str`, *optional*):
            The model's Hub id, for the lines that load it; otherwise [`push`] fills it in.
        license (`str`, *optional*): The Hub's identifier of a license, such as `"apache-2.0"`.
        base_model (`str`, *optional*): The Hub id of the model that was fine-tuned.
        results (`dict`, *optional*): Metrics with their protocol, metric -> value.

    Returns:
        `Path`: The card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder, settings, data = RunFolder(output_dir), settings or {}, data or {}
    facts, earlier = _describe(folder.path), _load(folder)
    datasets = [name for name in (data.get("name"), settings.get("dataset_name")) if is_hub_id(name)]
    model_id = hub_model_id or (earlier and _model_id(earlier.text)) or THIS_FOLDER
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image" if facts["conditioning"] else "unconditional-image-generation",
        tags=["tiny-diffusers", "image-generation", "small-images", *(["diffusion"] if facts["scheduler"] else [])],
        datasets=datasets[:1] or None,
        license=license,
        base_model=base_model if is_hub_id(base_model) else None,
    )
    card = ModelCard.from_template(
        metadata,
        template_str=_read_template("template.md"),
        mark=_MARKS["model"],
        model_name=markdown(model_name),
        model_id=model_id,
        loading=_loading_section(facts, model_id),
        effort=_describe_effort(folder.read_facts()),
        command=command and code_block(re.sub(r"(--hub_token[ =])\S+", r"\1...", command), "bash"),
        settings=_table({name: str(value) for name, value in settings.items() if "token" not in name}),
        data=_table(data),
        has_samples=folder.samples.is_file(),
        has_loss_curves=folder.loss_curves.is_file(),
        **facts,
    )
    if earlier is not None:
        _keep_metadata(card, earlier)
        card.text = _replace(earlier.text, "model", _find(card.text, "model")[0])
        text = _replace(card.text, "report", "")
        card.text = re.sub(r"^## Results\s+(?=## |\Z)", "", text, flags=re.MULTILINE)
    elif folder.card.exists():
        say(f"{folder.card} is kept as {folder.set_card_aside().name}")
    if results:
        rows = [f"| {name} | {value} |" for name, value in _table(results)]
        _put_result(card, "results", "\n".join(["| metric | value |", "| --- | --- |", *rows]))
    folder.record(folder.card)
    replace_file(folder.card, str(card))
    return folder.card


def _describe_effort(facts: Mapping[str, object]) -> str | None:
    """Returns in words what a training took by its `run.json`, as far as this is known; None without its steps."""
    steps, batch, seconds = (
        value if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e12 else None
        for value in map(facts.get, ("steps", "global_batch", "seconds"))
    )
    if steps is None:
        return None
    words = f"It took {steps:,} step{'' if steps == 1 else 's'}"
    if batch is not None:
        words += f" of {batch:,} image{'' if batch == 1 else 's'}"
    if seconds is not None:
        words += f", {seconds / 60:,.0f} minutes" if seconds > 6000 else f", {seconds / 60:.3g} minutes"
    machine = markdown(str(facts.get("machine", ""))[:100]).strip()
    return f"{words} on {machine}." if machine else f"{words}."


def _load(folder: RunFolder) -> "ModelCard | None":
    """Loads the card of a folder; None if there is none, or one without the marks or with metadata that can't be read."""
    from huggingface_hub import ModelCard

    text = read_text(folder.card) if folder.card.is_file() else ""
    if _find(text, "model") is not None:
        with contextlib.suppress(ValueError, yaml.YAMLError):
            return ModelCard(text)
    return None


def _keep_metadata(card: "ModelCard", earlier: "ModelCard") -> None:
    """Puts an earlier card's metadata in place of a card's, but the metrics of a report; tags are joined."""
    from .evaluation.report import Report

    written = card.data.to_dict()
    card.data = earlier.data
    card.data.tags = list(dict.fromkeys([*(earlier.data.tags or []), *written.pop("tags")]))
    for name, value in written.items():
        if not card.data.get(name):
            card.data[name] = value
    others = [result for result in card.data.eval_results or [] if not Report.knows(result.metric_type)]
    card.data.eval_results = others or None
    card.data.model_name = card.data.model_name if others else None  # else it would be a key of its own


def _find(text: str, part: str) -> re.Match | None:
    """Finds a marked part of a card, with its marks."""
    return re.search(rf"^<!-- {part}\b[^\n]*-->$.*?^<!-- end of the {part} -->$", text, re.MULTILINE | re.DOTALL)


def _replace(text: str, part: str, new: str) -> str:
    """Replaces a marked part of a card, if it has it, by new text with marks, or by nothing."""
    found = _find(text, part)
    if found is None:
        return text
    before, after = text[: found.start()], text[found.end() :]
    return before + new + after if new else before.rstrip("\n") + "\n\n" + after.lstrip("\n")


def _put_result(card: "ModelCard", part: str, content: str) -> None:
    """Writes a marked part of the section "Results", in its place or at the end of the section."""
    block = f"{_MARKS[part]}\n\n{content}\n\n<!-- end of the {part} -->"
    if _find(card.text, part) is not None:
        card.text = _replace(card.text, part, block)
        return
    section = re.search(r"^## Results\n.*?(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)
    if section is None:
        place = re.search(r"^## What it is not good for", card.text, re.MULTILINE)
        cut, block = (place.start() if place else len(card.text)), f"## Results\n\n{block}"
    else:
        cut = section.end()
    card.text = card.text[:cut].rstrip("\n") + f"\n\n{block}\n\n" + card.text[cut:]


def update_loading(output_dir: str | Path) -> None:
    """
    Writes the section "How to load it" of a model card anew, by what lies in the folder: with the code beside the weights
    or without it. A card without this section, and a folder without a card, stay as they are.

    Args:
        output_dir (`str` or `Path`): The folder of the card, `README.md`, and of a saved pipeline.
    """
    path = RunFolder(output_dir).card
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    section, model_id = _find_loading(text), _model_id(text)
    if model_id is not None:
        loading = _loading_section(_describe(Path(output_dir)), model_id) + "\n\n"
        replace_file(path, text[: section.start()] + loading + text[section.end() :])


def _find_loading(text: str) -> re.Match | None:
    return re.search(r"^## How to load it\n.*?(?=^## |^<!-- |\Z)", text, re.MULTILINE | re.DOTALL)


def _model_id(text: str) -> str | None:
    """Returns the name by which a card loads the model."""
    section = _find_loading(text)
    model_id = section and re.search(r'from_pretrained\("([^"]+)"', section[0])
    return model_id and model_id[1]


def add_results(output_dir: str | Path, report: "Report", name: str) -> Path:
    """
    Adds a report's metrics to a model card: to its metadata as a `model-index`, which the Hub shows, and to its text in
    the section "Results". They replace those of an earlier report; what else a card holds there stays.

    Args:
        output_dir (`str` or `Path`): The folder of the card, `README.md`.
        report ([`~tiny_diffusers.evaluation.Report`]): The metrics with their protocol.
        name (`str`): The name of the report's folder in `reports/`.

    Returns:
        `Path`: The card.
    """
    from huggingface_hub import EvalResult, ModelCard

    folder = RunFolder(output_dir)
    path = folder.card
    folder.check_inside(path)
    card = ModelCard.load(path)
    heading = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    card.data.model_name = heading[1].strip() if heading else folder.path.name
    others = [result for result in card.data.eval_results or [] if not report.knows(result.metric_type)]
    card.data.eval_results = [*others, *(EvalResult(**result) for result in report.card_results())]
    again = f"`tiny-diffusers evaluate --from_report reports/{name}/report.json` reproduces it."
    _put_result(card, "report", f"{report.markdown()}\n{again}")
    replace_file(path, str(card))
    return path


def _describe(folder: Path) -> dict[str, object]:
    """Returns the template's facts about the checkpoint in `folder`, from its configs and the headers of its weights."""
    from safetensors import safe_open

    from .models.layers_tiny import height_and_width
    from .pipelines.pipeline_tiny_conditions import ConditionStatistics
    from .pipelines.pipeline_tiny_operators import Conditioning

    index_path = folder / MODEL_INDEX
    if not index_path.is_file():
        raise UserError(f"'{folder}' has no {MODEL_INDEX}: save a pipeline in it before its card is written.")
    index = load_json(index_path.read_text(encoding="utf-8"))
    configs, parameters = {}, 0
    components = [name for name, entry in index.items() if name != "_class_name" and isinstance(entry, list)]
    for component in [name for name in components if name not in ("discriminator", "guidance_model")]:
        for path in (folder / component).glob("*config.json"):
            configs[component] = load_json(path.read_text(encoding="utf-8"))
        for path in (folder / component).glob("*.safetensors"):
            with safe_open(path, framework="numpy") as weights:
                parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    network = next(config for config in configs.values() if "sample_size" in config)
    of_images = network
    if "vae" in configs:  # beside the network that denoises its latents
        network, of_images = configs.get("unet", network), configs["vae"]

    is_consistency = bool(configs.get("scheduler", {}).get("stochastic_sampling"))
    if is_stock(index):
        loads_in = "diffusers"
    elif isinstance(index["_class_name"], list) and (folder / f"{index['_class_name'][0]}.py").is_file():
        loads_in = "diffusers with code"
    else:
        loads_in = "tiny-diffusers"

    height, width = height_and_width(of_images["sample_size"])
    channels = of_images.get("in_channels", of_images.get("out_channels"))
    conditioning = None
    if index.get("conditioning") is not None:
        conditioning = Conditioning.of_network(index["conditioning"], channels, height, width)
        channels = conditioning.image_shape[0]
    classes = []
    if network.get("num_class_embeds") is not None and "id2label" in index:
        names = list((index["id2label"] or {0: "0"}).items())[:4]
        # A name may hold anything: in lines that are copied to a shell or Python, only plain ones stand.
        classes = [name if re.fullmatch(_PLAIN_NAME, name) else int(class_id) for class_id, name in names]
    statistics = index.get("condition_statistics")
    conditions = {}
    if statistics is not None:
        with refusals(f"'{folder}': "):
            rows, _ = ConditionStatistics.from_config(statistics).examples()
        conditions = rows[len(rows) // 2]
    if not all(re.fullmatch(_PLAIN_NAME, name) for name in conditions):
        conditions = {}
    return {
        "network": markdown(network["_class_name"]),
        "autoencoder": markdown(of_images["_class_name"]) if of_images is not network else None,
        "parameters": f"{parameters / 1e6:.2f} M",
        "image_size": f"{height}x{width}",
        "color": {1: "gray", 3: "color"}.get(channels, f"{channels}-channel"),
        "value_range": index.get("value_range"),
        "conditioning": conditioning and conditioning.description,
        "channels": (network.get("in_channels"), network.get("out_channels")),
        "scheduler": {name: markdown(str(value)) for name, value in configs.get("scheduler", {}).items()},
        "classes": classes,  # some of them, for the examples
        "conditions": {name: float(f"{value:.8g}") for name, value in conditions.items()},  # a value of each
        "takes_conditions": bool(statistics),
        "guided": index.get("null_class_id") is not None
        and index.get("class_dropout_prob") != 0
        and not is_consistency,
        "is_consistency": is_consistency,
        "loads_in": loads_in,
    }


def is_stock(index: dict) -> bool:
    """
    Checks that a `model_index.json` names stock classes and means them: a pipeline of ours that does more has a
    `_tiny_class_name` beside its stock name.
    """
    import diffusers

    libraries = {entry[0] for name, entry in index.items() if name != "_class_name" and isinstance(entry, list)}
    named = index["_class_name"]
    return (
        libraries <= {"diffusers", None}
        and isinstance(named, str)
        and hasattr(diffusers, named)
        and "_tiny_class_name" not in index
    )


def _loading_section(facts: dict[str, object], model_id: str) -> str:
    """Returns the section "How to load it" of a card."""
    import jinja2

    return jinja2.Template(_read_template("loading.md")).render(model_id=model_id, **facts)


def _read_template(name: str) -> str:
    return importlib.resources.files(f"{__package__}.model_cards").joinpath(name).read_text(encoding="utf-8")


def is_hub_id(name: object) -> bool:
    """Checks that `name` can only be an `owner/name` on the Hub: metadata may name nothing else."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(name, str) or "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _table(rows: Mapping[str, object]) -> list[tuple[str, str]]:
    """Returns the rows of a Markdown table."""

    def cell(value: object) -> str:
        return markdown("; ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))

    return [(cell(name), cell(value)) for name, value in rows.items()]
