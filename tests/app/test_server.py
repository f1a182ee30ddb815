"""The served app, by clients of its API."""

import concurrent.futures
import subprocess
import sys
import threading
import time
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import psutil
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

from tiny_diffusers import TinyPipeline
from tiny_diffusers.app import server
from tiny_diffusers.app.edit import EditTab
from tiny_diffusers.app.generate import GenerateTab
from tiny_diffusers.app.models import list_models
from tiny_diffusers.app.requests import Tasks


pytestmark = pytest.mark.slow
FLOW = 0


@pytest.fixture
def served(checkpoints, monkeypatch):
    """Serves two models; returns the page, with the tasks in progress."""
    tasks = Tasks()
    monkeypatch.setattr(server, "Tasks", lambda: tasks)
    models = list_models([str(checkpoints[name]) for name in ("flow", "vae")])
    page = server.launch(models, device="cpu", block=False, queue_size=60)
    page.tasks = tasks
    yield page
    page.close()


@pytest.fixture
def connect(served, tmp_path):
    return lambda: Client(served.local_url, verbose=False, download_files=tmp_path)


def read(gallery):
    return [np.asarray(Image.open(item["image"])) for item in gallery]


def generate(client, values, seed):
    values = [values[0], seed, *values[2:]]
    _, status, images, archive, command, _ = client.predict(FLOW, *values, api_name="/generate")
    assert f"--seed {seed} " in command and Path(archive["value"]).suffix == ".zip"
    assert all(item["image"].endswith(".png") for item in images)
    return read(images)


def draw(checkpoints, seed, count=2):
    pipe = TinyPipeline.from_pretrained(checkpoints["flow"])
    pipe.unet.to(memory_format=torch.channels_last)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipe(batch_size=count, generator=generators, num_inference_steps=3).images


def test_the_api_gives_the_images_of_the_python_call(served, connect, store, index_of, open_tab, checkpoints):
    _, values = open_tab(GenerateTab, store.models[index_of["flow"]], **{"Number of images": 2, "Steps": 3})
    for given, expected in zip(generate(connect(), values, 7), draw(checkpoints, 7), strict=True):
        np.testing.assert_array_equal(given, np.asarray(expected))


def test_ten_clients_are_all_answered_and_none_is_given_the_images_of_another(
    served, connect, store, index_of, open_tab, checkpoints
):
    _, values = open_tab(GenerateTab, store.models[index_of["flow"]], **{"Number of images": 2, "Steps": 3})
    seeds = [[100 * client + request % 4 for request in range(5)] for client in range(10)]  # some ask twice
    generate(connect(), values, 0)
    before = psutil.Process().memory_info().rss

    def ask(seeds):
        client = connect()
        return [generate(client, values, seed) for seed in seeds]

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, seeds))
    assert psutil.Process().memory_info().rss - before < 500e6
    for asked, given in zip(seeds, answers, strict=True):
        for seed, images in zip(asked, given, strict=True):
            for image, expected in zip(images, draw(checkpoints, seed), strict=True):
                np.testing.assert_array_equal(image, np.asarray(expected))
    assert not served.tasks._tasks


def test_a_request_that_is_given_up_frees_its_place(served, connect, store, index_of, open_tab):
    model, client = store.models[index_of["flow"]], connect()
    _, values = open_tab(GenerateTab, model, **{"Number of images": 64, "Steps": 250})
    job = client.submit(FLOW, *values, api_name="/generate")
    for _ in range(600):
        if any(output[1].startswith("Drawing: step") for output in job.outputs()):
            break
        time.sleep(0.05)
    job.cancel()
    _, values = open_tab(GenerateTab, model, **{"Number of images": 2, "Steps": 3})
    assert len(generate(connect(), values, 1)) == 2
    assert not served.tasks._tasks
    assert threading.active_count() < 100


def test_the_server_outlives_what_is_wrong(served, connect, store, index_of, open_tab, tmp_path):
    client, model = connect(), store.models[index_of["flow"]]
    _, values = open_tab(GenerateTab, model, **{"Number of images": 2, "Steps": 3})
    for position, wrong in ((0, 65), (0, None), (1, -1), (3, 10_000), (4, "/etc/passwd"), (5, float("nan"))):
        with pytest.raises(Exception, match=r"is not|Unknown|choices|JSON|preprocess|(greater|less) than m"):
            client.predict(FLOW, *values[:position], wrong, *values[position + 1 :], api_name="/generate")
    for wrong in (99, -1, "/etc", "me/model"):
        with pytest.raises(Exception, match="choices|no model"):
            client.predict(wrong, *values, api_name="/generate")

    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    Image.new("1", (6_000, 6_000)).save(tmp_path / "large.png")
    _, values = open_tab(EditTab, model, Steps=2)
    small = handle_file(tmp_path / "bomb.png")
    with pytest.raises(Exception, match="20 layers"):
        drawing = {"background": small, "layers": [small] * 20, "composite": small}
        client.predict(FLOW, drawing, *values[1:], api_name="/edit")
    for wrong in ({"path": "http://127.0.0.1:9/x.png", "meta": {"_type": "gradio.FileData"}}, {"path": "/etc/passwd"}):
        with pytest.raises(Exception, match="is no uploaded file"):
            client.predict(
                FLOW, {"background": wrong, "layers": [], "composite": wrong}, *values[1:], api_name="/edit"
            )
    answer = httpx.post(f"{served.local_url}gradio_api/run/generate", json={"data": [FLOW]})
    assert answer.status_code != 200, "a request passes by the queue"
    for name, message in (("bomb.png", "can't be read as a picture"), ("large.png", "6000 x 6000 pixels")):
        file = handle_file(tmp_path / name)
        picture = {"background": file, "layers": [], "composite": file}
        with pytest.raises(Exception, match=message):
            client.predict(FLOW, picture, *values[1:], api_name="/edit")

    _, values = open_tab(GenerateTab, model, **{"Number of images": 2, "Steps": 3})
    assert len(generate(client, values, 1)) == 2


def test_the_app_is_reached_from_this_machine_alone_and_sends_nothing(served):
    assert served.local_url.startswith("http://127.0.0.1:") and served.share_url is None
    assert served.analytics_enabled is False and isinstance(served, gr.Blocks)


def test_the_page_is_up_before_torch_is_imported(checkpoints):
    lines = (
        "import sys\n"
        "from tiny_diffusers.app import models, server\n"
        "server._warm_up = lambda store: None\n"
        f"page = server.launch(models.list_models([{str(checkpoints['diffusion'])!r}]), block=False)\n"
        "import httpx\n"
        "assert httpx.get(page.local_url).status_code == 200\n"
        "assert 'torch' not in sys.modules\n"
        "page.close()\n"
    )
    subprocess.run([sys.executable, "-c", lines], check=True)
