"""Sharing: a checkpoint with the code that it needs, its model card, and the push to the Hub."""

import ast
import importlib.resources
import inspect
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, code_block, markdown, refusals, say
from .files import load_json, replace_file
from .runs import MODEL_INDEX, RunFolder


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .evaluation.report import Report

# A card's name of the model until it has one on the Hub
THIS_FOLDER = "path/to/this/folder"


def export(
    pipe: "DiffusionPipeline", directory: str | Path, with_code: bool = True, source: str | Path | None = None
) -> Path:
    """
    Saves a pipeline, and copies the source files of its classes beside the weights: then
    `DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)` loads it without this package.

    The layout is diffusers' layout of custom components: the pipeline's file at the root, a component's file in the
    component's folder, each with the siblings that it imports (in a network's file, itself), and `model_index.json` naming
    the file and the class, such as `"unet": ["unet_tiny", "TinyUNet2DModel"]`. A pipeline that is saved as stock classes
    needs no code and gets none.

    Args:
        pipe (`DiffusionPipeline`): The pipeline to save.
        directory (`str` or `Path`): The folder to save it in; created if it doesn't exist.
        with_code (`bool`, defaults to `True`): Whether to copy the code. `False` is `pipe.save_pretrained(directory)`.
        source (`str` or `Path`, *optional*):
            The folder of a run, whose card, pictures, log, settings and reports are copied as well.

    Returns:
        `Path`: `directory`.
    """

    def write(folder: Path) -> None:
        _save(pipe, folder, with_code)
        for name in RunFolder(source).list_shared() if source is not None else []:
            if not (folder / name).exists() and not name.endswith(".py"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(source) / name, folder / name)
        update_loading(folder)

    RunFolder(directory).place(write)
    return Path(directory)


def _save(pipe: "DiffusionPipeline", directory: Path, with_code: bool) -> None:
    pipe.save_pretrained(directory)
    _drop_local_paths(directory)
    index_path = directory / MODEL_INDEX
    index = load_json(index_path.read_text(encoding="utf-8"))
    if not with_code or _is_stock(index):
        return

    index.pop("_tiny_class_name", None)
    index["_class_name"] = _copy_code(type(pipe), directory)
    for name, component in pipe.components.items():
        component = getattr(component, "_orig_mod", component)  # of a network in the wrapper of `torch.compile`
        if _travels(type(component)):
            index[name] = _copy_code(type(component), directory / name)
    index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _drop_local_paths(directory: Path) -> None:
    """Deletes from the configs of a saved pipeline where on this machine its networks were loaded from."""
    for path in [directory / MODEL_INDEX, *directory.glob("*/*config.json")]:
        config = load_json(path.read_text(encoding="utf-8"))
        if "_name_or_path" in config and not _is_hub_id(config["_name_or_path"]):
            del config["_name_or_path"]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_stock(index: dict) -> bool:
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


def _travels(cls: type) -> bool:
    """Checks that a class's file travels with a checkpoint: it is this package's, or came with a checkpoint itself."""
    return cls.__module__.split(".")[0] in (__package__.split(".")[0], "diffusers_modules")


def _copy_code(cls: type, folder: Path) -> list[str]:
    """Copies the source of `cls` with what it imports to `folder`; returns the class's entry in the index."""
    from diffusers import ModelMixin
    from diffusers.utils.dynamic_modules_utils import get_relative_imports  # the loader's own

    source = Path(inspect.getsourcefile(cls))
    if issubclass(cls, ModelMixin):
        (folder / source.name).write_text(_inline_siblings(source), encoding="utf-8")
    else:
        for file in [source, *(source.with_name(f"{sibling}.py") for sibling in get_relative_imports(source))]:
            shutil.copyfile(file, folder / file.name)
    return [source.stem, cls.__name__]


def _inline_siblings(source: Path) -> str:
    """
    Returns a network's source with the siblings that it imports in place of the import: beside a network's weights
    diffusers downloads one file of code from the Hub, the one that the index names.
    """
    text = source.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            sibling = source.with_name(f"{node.module}.py").read_text(encoding="utf-8")
            lines[node.lineno - 1 : node.end_lineno] = [f"# {node.module}.py\n", sibling, f"# {source.name}\n"]
    return "".join(lines)


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

    The model's class, size, prediction type and how to load it are read from the checkpoint in `output_dir`;
    `samples.png` and `loss_curves.png` are shown if they exist.

    Args:
        output_dir (`str` or `Path`): A folder with a saved pipeline.
        model_name (`str`): The card's heading.
        command (`str`): The command line that trained the model. The value of `--hub_token` is left out.
        settings (`dict`): Every setting of the run, name -> value. Tokens are left out.
        data (`dict`): The training data, such as `name`, `split`, `images`, `fingerprint`, `notes`. A `name` that is a
            Hub id goes into the metadata.
        hub_model_id (`str`, *optional*):
            The model's Hub id, for the lines that load it; otherwise [`push`] fills it in.
        license (`str`, *optional*): The Hub's identifier of a license, such as `"apache-2.0"`.
        base_model (`str`, *optional*): The Hub id of the model that was fine-tuned.
        results (`dict`, *optional*): Metrics with their protocol, metric -> value.

    Returns:
        `Path`: The card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    output_dir = Path(output_dir)
    facts = _describe(output_dir)
    model_id = hub_model_id or THIS_FOLDER
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image" if facts["conditioning"] else "unconditional-image-generation",
        tags=["tiny-diffusers", "image-generation", "small-images", *(["diffusion"] if facts["scheduler"] else [])],
        datasets=[data["name"]] if _is_hub_id(data.get("name")) else None,
        license=license,
        base_model=base_model if _is_hub_id(base_model) else None,
    )
    card = ModelCard.from_template(
        metadata,
        template_str=_read_template("template.md"),
        model_name=markdown(model_name),
        model_id=model_id,
        loading=_loading_section(facts, model_id),
        command=code_block(re.sub(r"(--hub_token[ =])\S+", r"\1...", command), "bash"),
        settings=_table({name: value for name, value in settings.items() if "token" not in name}),
        data=_table(data),
        results=_table(results or {}),
        has_samples=RunFolder(output_dir).samples.is_file(),
        has_loss_curves=RunFolder(output_dir).loss_curves.is_file(),
        **facts,
    )
    folder = RunFolder(output_dir)
    folder.keep_foreign_card()
    folder.record(folder.card)
    replace_file(folder.card, str(card))
    return folder.card


def update_loading(output_dir: str | Path) -> None:
    """
    Writes the section "How to load it" of a model card anew, by what lies in the folder: with the code beside the weights
    or without it. A card without this section, and a folder without a card, stay as they are.

    Args:
        output_dir (`str` or `Path`): The folder of the card, `README.md`, and of a saved pipeline.
    """
    path = RunFolder(output_dir).card
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    section = re.search(r"^## How to load it\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    model_id = section and re.search(r'from_pretrained\("([^"]+)"', section[0])
    if model_id:
        loading = _loading_section(_describe(Path(output_dir)), model_id[1]) + "\n\n"
        replace_file(path, text[: section.start()] + loading + text[section.end() :])


_PLAIN_NAME = r"[\w][\w .+-]*"  # that may stand in lines that are copied to a shell or Python

# The part of a card's section "Results" that a report replaces
_REPORT = ("<!-- report -->", "<!-- end of the report -->")


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
    card.data.model_name = heading[1].strip() if heading else Path(output_dir).name
    others = [result for result in card.data.eval_results or [] if not report.knows(result.metric_type)]
    card.data.eval_results = [*others, *(EvalResult(**result) for result in report.card_results())]

    start, end = _REPORT
    again = f"`tiny-diffusers evaluate --from_report reports/{name}/report.json` reproduces it."
    block = f"{start}\n\n{report.markdown()}\n{again}\n\n{end}"
    text = re.sub(rf"\n*{start}.*?{end}", "", card.text, flags=re.DOTALL)
    section = re.search(r"^## Results\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        place = re.search(r"^## What it is not good for", text, re.MULTILINE)
        cut, block = (place.start() if place else len(text)), f"## Results\n\n{block}"
    else:
        cut = section.end()
    card.text = text[:cut].rstrip("\n") + f"\n\n{block}\n\n" + text[cut:]
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

    is_consistency = bool(configs.get("scheduler", {}).get("stochastic_sampling"))
    if _is_stock(index):
        loads_in = "diffusers"
    elif isinstance(index["_class_name"], list) and (folder / f"{index['_class_name'][0]}.py").is_file():
        loads_in = "diffusers with code"
    else:
        loads_in = "tiny-diffusers"

    height, width = height_and_width(network["sample_size"])
    channels = network.get("in_channels", network.get("out_channels"))
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
        "parameters": f"{parameters / 1e6:.2f} M",
        "image_size": f"{height}x{width}",
        "colour": {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel"),
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


def _loading_section(facts: dict[str, object], model_id: str) -> str:
    """Returns the section "How to load it" of a card."""
    import jinja2

    return jinja2.Template(_read_template("loading.md")).render(model_id=model_id, **facts)


def _read_template(name: str) -> str:
    return importlib.resources.files(f"{__package__}.model_cards").joinpath(name).read_text(encoding="utf-8")


def _is_hub_id(name: object) -> bool:
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


def check_can_push(repo_id: str, token: str | None = None) -> None:
    """
    Checks, before the work, that a push can succeed: that the repository's name is valid, that the Hub can be reached, and
    that it knows the token.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If not, with the reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        HfApi(token=token).whoami()
    except Exception as error:  # name, network, token or Hub
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"--push_to_hub: nothing can be pushed to '{repo_id}' ({reason}). Give another --hub_model_id, log in by "
            "`hf auth login`, or leave it out and push later by `tiny-diffusers push`."
        ) from error


def push(
    directory: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool = False,
    include: Iterable[str] = (),
    dry_run: bool = False,
) -> str | None:
    """
    Pushes a model, or a Space of `tiny-diffusers app --export_space`, to the Hub in one commit, and creates the repository
    if it doesn't exist.

    These files are pushed, and printed first: the pipeline with its code, card, pictures, log, settings and reports. What
    else lies in the folder is pushed by name only, and no link is followed. In the pushed card `repo_id` replaces
    `path/to/this/folder`, and in a Space's requirements the wheel's address replaces its place in the folder.

    Args:
        directory (`str` or `Path`): A folder with a saved pipeline. Nothing in it is changed.
        repo_id (`str`): The repository: `owner/name`, or a name alone for a repository of the token's owner.
        token (`str`, *optional*):
            A Hub token with write access. Defaults to the one that `hf auth login` stored, or `HF_TOKEN`.
        private (`bool`, defaults to `False`): Whether a repository that is created here is private.
        include (`Iterable[str]`, *optional*): Further files, relative to `directory`.
        dry_run (`bool`, defaults to `False`): Whether to print the list alone.

    Returns:
        `str`: The commit's URL; None with `dry_run`.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: if there is nothing to push, or if the push failed for any cause; it names
            the cause and the command that pushes later.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    directory, folder = Path(directory), RunFolder(directory)
    is_space = (directory / "app.py").is_file() and (directory / "requirements.txt").is_file()
    if not is_space and not folder.model_index.is_file():
        raise UserError(
            f"'{directory}' has no {MODEL_INDEX}: give the folder that a pipeline was saved in, or a Space's folder."
        )
    for name in include:
        if not (directory / name).is_file() or ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"'{name}' is no file in '{directory}': name each file relative to it.")
        folder.check_inside(folder.path / name)
    names = sorted({*(_list_space(directory) if is_space else folder.list_shared()), *include})
    size = sum((directory / name).stat().st_size for name in names)
    say(f"{len(names)} files, {size / 1e6:.1f} MB, to {repo_id}: {', '.join(names)}")
    if dry_run:
        return None
    try:
        api = HfApi(token=token)
        kind = {"repo_type": "space"} if is_space else {}
        sdk = {"space_sdk": "gradio"} if is_space else {}
        repository = api.create_repo(repo_id, private=private, exist_ok=True, **kind, **sdk)
        repo_id = repository.repo_id  # with its owner
        operations = []
        for name in names:
            content = directory / name
            if name == "README.md":
                content = content.read_text(encoding="utf-8").replace(THIS_FOLDER, repo_id).encode("utf-8")
            elif is_space and name == "requirements.txt":  # they are installed before the Space's files are there
                address = f"{__package__} @ {repository}/resolve/main/"
                content = content.read_text(encoding="utf-8").replace("./", address, 1).encode("utf-8")
            operations.append(CommitOperationAdd(name, content))
        message = "Upload with tiny-diffusers"
        return api.create_commit(repo_id, operations, commit_message=message, **kind).commit_url
    except Exception as error:  # network, token, name or Hub: the model is on disk in any case
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        later = shlex.join(["tiny-diffusers", "push", str(directory), repo_id])
        raise UserError(
            f"The push to '{repo_id}' failed ({reason}). Everything is still in '{directory}': push it later by `{later}`, "
            "after `hf auth login` if a token is missing."
        ) from error


def _list_space(directory: Path) -> list[str]:
    """Lists the files of a Space that are pushed, with those of its models, relative to the folder."""
    wheels = [path.name for path in directory.glob("*.whl")]
    models = [path.parent for path in directory.glob(f"models/*/{MODEL_INDEX}")]
    files = [
        f"{model.relative_to(directory).as_posix()}/{name}"
        for model in models
        for name in RunFolder(model).list_shared()
    ]
    return ["README.md", "app.py", "requirements.txt", *wheels, *files]
