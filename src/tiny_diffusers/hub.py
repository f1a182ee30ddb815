"""Sharing: a checkpoint with the code that it needs, and the push to the Hub."""

import ast
import inspect
import json
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .cards import THIS_FOLDER, is_hub_id, is_stock, update_loading
from .errors import UserError, say
from .files import load_json
from .runs import MODEL_INDEX, RunFolder


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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
    if not with_code or is_stock(index):
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
        if "_name_or_path" in config and not is_hub_id(config["_name_or_path"]):
            del config["_name_or_path"]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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


def check_can_push(repo_id: str, token: str | None = None) -> None:
    """
    Checks, before the work, that a push can succeed: that the repository's name is valid, that the Hub can be reached, and
    that it knows the token.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If not, with the reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        HfApi(token=token).whoami()
    except Exception as error:  # name, network, token or Hub
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "log in by `hf auth login`, or " if _lacks_token(error, token) else ""
        if isinstance(error, HFValidationError):
            remedy = "give another --hub_model_id, or "
        raise UserError(
            f"--push_to_hub: {remedy}leave it out and push later by `tiny-diffusers push`: nothing can be pushed to "
            f"'{repo_id}' ({reason})."
        ) from error


def _lacks_token(error: Exception, token: str | None) -> bool:
    """Checks that a push failed for want of a token: none is given, stored or in `HF_TOKEN`, or the Hub refuses it."""
    from huggingface_hub import get_token

    return not (token or get_token()) or getattr(getattr(error, "response", None), "status_code", None) == 401


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
        remedy = "Log in by `hf auth login` and push again" if _lacks_token(error, token) else "Push later"
        raise UserError(
            f"{remedy} by `{later}`, as everything is still in '{directory}': the push to '{repo_id}' failed ({reason})."
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
