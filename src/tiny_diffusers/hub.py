"""What leaves the machine: a checkpoint with the code that it needs, its model card, and the push to the Hub."""

import importlib.resources
import inspect
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .evaluation.report import Report

# Stays on this machine when a folder is pushed: what resumes a run, trackers' files, and what tools leave behind.
NOT_PUSHED = ["checkpoint-*/*", "logs/*", "*.lock", "*.tmp", "*__pycache__/*", ".*", "*/.*"]

# What a card calls the model until it has a name on the Hub.
THIS_FOLDER = "path/to/this/folder"


def export(pipe: "DiffusionPipeline", directory: str | Path, with_code: bool = True) -> Path:
    """
    Saves a pipeline, and lays the source files of its own classes beside the weights, so that
    `DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)` loads it where this package isn't installed.

    The layout is diffusers' for custom components: the pipeline's file at the root, a component's in the component's
    folder, each with the siblings that it imports, and `model_index.json` naming the file and the class, such as
    `"unet": ["unet_tiny", "TinyUNet2DModel"]`. A pipeline that saves itself as diffusers' own classes alone needs no
    code and gets none.

    Args:
        pipe (`DiffusionPipeline`):
            The pipeline to save.
        directory (`str` or `Path`):
            The folder to save it in; made where it doesn't exist.
        with_code (`bool`, defaults to `True`):
            Whether to lay the code. `False` is `pipe.save_pretrained(directory)`.

    Returns:
        `Path`: `directory`.
    """
    directory = Path(directory)
    pipe.save_pretrained(directory)
    index_path = directory / "model_index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    if not with_code or _is_stock(index):
        return directory

    index.pop("_tiny_class_name", None)
    index["_class_name"] = _lay_code(type(pipe), directory)
    for name, component in pipe.components.items():
        if _travels(type(component)):
            index[name] = _lay_code(type(component), directory / name)
    index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return directory


def _is_stock(index: dict) -> bool:
    """
    Whether a `model_index.json` names diffusers' own classes, and means them: `_tiny_class_name` stands beside the
    stock name of a pipeline of ours that does more than that.
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


def _travels(cls: type) -> bool:
    """Whether a class's file is meant to travel: it is this package's, or came with a checkpoint itself."""
    return cls.__module__.split(".")[0] in (__package__.split(".")[0], "diffusers_modules")


def _lay_code(cls: type, folder: Path) -> list[str]:
    """Copies the file of `cls` and its relative imports into `folder`; returns the class's entry in the index."""
    from diffusers.utils.dynamic_modules_utils import get_relative_imports  # what the loader will look for

    source = Path(inspect.getsourcefile(cls))
    for file in [source, *(source.with_name(f"{sibling}.py") for sibling in get_relative_imports(source))]:
        shutil.copyfile(file, folder / file.name)
    return [source.stem, cls.__name__]


def write_card(
    output_dir: str | Path,
    *,
    model_name: str,
    command: str,
    settings: Mapping[str, object],
    data: Mapping[str, object],
    hub_model_id: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    results: Mapping[str, object] | None = None,
) -> Path:
    """
    Writes the model card, `output_dir/README.md`, with the metadata that the Hub reads.

    What the card says of the model (its class, size, prediction type, how it can be loaded) is read from the
    checkpoint in `output_dir`; `samples.png` and `loss_curves.png` are shown where they are there.

    Args:
        output_dir (`str` or `Path`):
            A folder that a pipeline has been saved in.
        model_name (`str`):
            The card's heading.
        command (`str`):
            The command line that made the model. The value of `--hub_token` is left out.
        settings (`dict`):
            Every setting of the run, name -> value. Tokens are left out.
        data (`dict`):
            What it was trained on, such as `name`, `split`, `images`, `fingerprint`, `notes`. A `name` that is a Hub id
            goes into the metadata.
        hub_model_id (`str`, *optional*):
            Where the model will be on the Hub, for the lines that load it; [`push`] fills it in otherwise.
        license (`str`, *optional*):
            The Hub's identifier of a licence, such as `"apache-2.0"`.
        base_model (`str`, *optional*):
            The Hub id of the model that was fine-tuned.
        results (`dict`, *optional*):
            Measured figures with their protocol, measure -> value.

    Returns:
        `Path`: The card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    output_dir = Path(output_dir)
    facts = _describe(output_dir)
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["tiny-diffusers", "image-generation", "small-images", *(["diffusion"] if facts["scheduler"] else [])],
        datasets=[data["name"]] if _is_hub_id(data.get("name")) else None,
        license=license,
        base_model=base_model if _is_hub_id(base_model) else None,
    )
    template = importlib.resources.files(f"{__package__}.model_cards").joinpath("template.md")
    card = ModelCard.from_template(
        metadata,
        template_str=template.read_text(encoding="utf-8"),
        model_name=model_name,
        model_id=hub_model_id or THIS_FOLDER,
        command=re.sub(r"(--hub_token[ =])\S+", r"\1...", command),
        settings=_table({name: value for name, value in settings.items() if "token" not in name}),
        data=_table(data),
        results=_table(results or {}),
        has_samples=(output_dir / "samples.png").is_file(),
        has_loss_curves=(output_dir / "loss_curves.png").is_file(),
        **facts,
    )
    path = output_dir / "README.md"
    path.write_text(str(card), encoding="utf-8")
    return path


def add_results(output_dir: str | Path, report: "Report") -> Path:
    """
    Puts a report's figures into a model card: into its metadata as a `model-index`, which the Hub shows, and into its text
    as the section "Results", in place of an earlier one.

    Args:
        output_dir (`str` or `Path`):
            The folder of the card, `README.md`.
        report ([`~tiny_diffusers.evaluation.Report`]):
            The figures with their protocol.

    Returns:
        `Path`: The card.
    """
    from huggingface_hub import EvalResult, ModelCard

    path = Path(output_dir) / "README.md"
    card = ModelCard.load(path)
    heading = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    card.data.model_name = heading[1].strip() if heading else Path(output_dir).name
    card.data.eval_results = [EvalResult(**result) for result in report.card_results()]

    again = "`tiny-diffusers evaluate --from_report report.json` measures it again."
    section = f"## Results\n\n{report.markdown()}\n{again}\n\n"
    text = re.sub(r"^## Results\n.*?(?=^## |\Z)", "", card.text, flags=re.MULTILINE | re.DOTALL)
    place = re.search(r"^## What it is not good for", text, re.MULTILINE)
    cut = place.start() if place else len(text)
    card.text = text[:cut].rstrip("\n") + "\n\n" + section + text[cut:]
    path.write_text(str(card), encoding="utf-8")
    return path


def _describe(folder: Path) -> dict[str, object]:
    """What the template says of the checkpoint in `folder`, from its configs and the headers of its weights."""
    from safetensors import safe_open

    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise UserError(f"'{folder}' has no model_index.json: save a pipeline in it before its card is written.")
    index = json.loads(index_path.read_text(encoding="utf-8"))
    configs, parameters = {}, 0
    components = [name for name, entry in index.items() if name != "_class_name" and isinstance(entry, list)]
    for component in [name for name in components if name != "discriminator"]:  # which no sample needs
        for path in (folder / component).glob("*config.json"):
            configs[component] = json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / component).glob("*.safetensors"):
            with safe_open(path, framework="numpy") as weights:
                parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    network = next(config for config in configs.values() if "sample_size" in config)

    if _is_stock(index):
        loads_in = "diffusers"
    elif isinstance(index["_class_name"], list) and (folder / f"{index['_class_name'][0]}.py").is_file():
        loads_in = "diffusers with code"
    else:
        loads_in = "tiny-diffusers"

    size = network["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    classes = []
    if network.get("num_class_embeds") is not None and "id2label" in index:
        classes = list((index["id2label"] or {0: "0"}).values())[:4]
    return {
        "network": network["_class_name"],
        "parameters": f"{parameters / 1e6:.2f} M",
        "image_size": f"{width}x{height}",
        "colour": "grey" if network.get("in_channels", network.get("out_channels")) == 1 else "colour",
        "scheduler": configs.get("scheduler"),
        "classes": classes,  # some of them, for the examples
        "guided": index.get("null_class_id") is not None and index.get("class_dropout_prob") != 0,
        "loads_in": loads_in,
    }


def _is_hub_id(name: object) -> bool:
    """Whether `name` can only be an `owner/name` of the Hub: the metadata may name nothing else."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(name, str) or "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _table(rows: Mapping[str, object]) -> list[tuple[str, str]]:
    """Rows of a Markdown table, in which neither a bar nor a line's end can break it."""

    def cell(value: object) -> str:
        text = "; ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        return " ".join(text.replace("|", "\\|").split())

    return [(cell(name), cell(value)) for name, value in rows.items()]


def push(directory: str | Path, repo_id: str, token: str | None = None, private: bool = False) -> str:
    """
    Pushes a checkpoint's folder to the Hub in one commit, and makes the repository where it doesn't exist.

    The folders that resume a run (`checkpoint-*`), logs, lock files and hidden files stay behind. In the pushed card
    `repo_id` stands wherever the card on disk says `path/to/this/folder`.

    Args:
        directory (`str` or `Path`):
            A folder with a saved pipeline in it. Nothing in it is changed.
        repo_id (`str`):
            Where to push: `owner/name`, or a name alone for a repository of the token's owner.
        token (`str`, *optional*):
            A token of the Hub that may write. Defaults to the one that `hf auth login` stored, or `HF_TOKEN`.
        private (`bool`, defaults to `False`):
            Whether a repository that is made here is private.

    Returns:
        `str`: The commit's URL.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: where there is nothing to push, and where the push failed, whatever the
            cause; it names the cause and the command that pushes later.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import filter_repo_objects

    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise UserError(f"'{directory}' has no model_index.json: give the folder that a pipeline was saved in.")
    paths = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file())
    try:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner, if none was given
        operations = []
        for path in filter_repo_objects(paths, ignore_patterns=NOT_PUSHED):
            content = directory / path
            if path == "README.md":
                content = content.read_text(encoding="utf-8").replace(THIS_FOLDER, repo_id).encode("utf-8")
            operations.append(CommitOperationAdd(path, content))
        return api.create_commit(repo_id, operations, commit_message="Upload with tiny-diffusers").commit_url
    except Exception as error:  # the network, the token, the name, the Hub: the model is on disk whichever it was
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"The push to '{repo_id}' failed ({reason}). Everything is still in '{directory}': "
            f"push it later by `tiny-diffusers push {directory} {repo_id}`, after `hf auth login` where a token is missing."
        ) from error
