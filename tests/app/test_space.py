"""A Space that is exported: its files, its push, and its start in an environment of its own."""

import ast
import os
import subprocess
import sys
import time
import urllib.request
import venv
import zipfile

import pytest
import yaml

from tiny_diffusers import zoo
from tiny_diffusers.app.models import list_models
from tiny_diffusers.app.space import export_space
from tiny_diffusers.cli import main
from tiny_diffusers.errors import UserError


@pytest.fixture(scope="module")
def space(tmp_path_factory, checkpoints):
    folder = tmp_path_factory.mktemp("space") / "space"
    return export_space(list_models([str(checkpoints[name]) for name in ("flow", "vae")]), folder)


def test_a_space_has_its_settings_its_models_and_a_wheel_of_the_package(space):
    _, front_matter, _ = (space / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(front_matter)
    requirements = (space / "requirements.txt").read_text().splitlines()
    assert settings["sdk"] == "gradio" and f"gradio=={settings['sdk_version']}" in requirements
    assert settings["python_version"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    (models,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((space / "app.py").read_text()).body
        if isinstance(node, ast.Assign)
    )
    assert models == ["models/0-flow", "models/1-vae"]
    assert [model.family for model in list_models([str(space / model) for model in models])] == ["diffusion", "vae"]

    (wheel,) = space.glob("*.whl")
    assert requirements[0] == f"./{wheel.name}"
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("app/server.py", "pipelines/pipeline_tiny.py", "model_cards/template.md", "schedulers/__init__.py"):
        assert f"tiny_diffusers/{name}" in names
    assert any(name.endswith(".yaml") for name in names)
    assert not any(f"/{model}/" in name for name in names for model in zoo.NAMES)


def test_the_command_writes_a_space_and_spares_a_folder_that_holds_something(tmp_path, checkpoints, capsys):
    assert main(["app", str(checkpoints["vae"]), "--export_space", str(tmp_path / "new")]) == 0
    assert str(tmp_path / "new") in capsys.readouterr().out
    with pytest.raises(UserError, match="exists and is no empty folder"):
        export_space(list_models([str(checkpoints["vae"])]), tmp_path / "new")


@pytest.mark.slow
def test_a_space_starts_from_its_folder_alone(space, tmp_path):
    """In an environment with this machine's dependencies and the Space's wheel, not this repository."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = space.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    shared = [path for path in sys.path if path.endswith("site-packages")]
    with open(f"{site}/shared.pth", "w") as file:
        file.write("\n".join(shared))  # as paths alone: no .pth of theirs, which lead to this repository, is read
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = [python, "-c", "import tiny_diffusers; print(tiny_diffusers.__file__)"]
    assert site in subprocess.check_output(found, text=True, env=environment, cwd=tmp_path)

    port = 7871
    with subprocess.Popen([python, "app.py", "--port", str(port)], cwd=space, env=environment) as process:
        try:
            for _ in range(600):
                time.sleep(0.1)
                assert process.poll() is None
                try:
                    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=10).read().decode()
                    break
                except OSError:
                    pass
            assert "0-flow (diffusion, 8 x 8)" in page
        finally:
            process.terminate()
