"""The served app: its API gives the pipeline's pixels, and its queue serves many clients, of whom some go away."""

import random
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(models):
    from tiny_diffusers.app.server import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch(models, port=port, queue_size=100, device="cpu", block=False)
    yield page
    page.close()


@pytest.fixture
def connect(page):
    from gradio_client import Client

    clients = []

    def build():
        clients.append(Client(page.local_url, verbose=False, analytics_enabled=False))
        return clients[-1]

    yield build
    for client in clients:
        client.close()


def generate(client, index, num_images=2, seed=0, steps=3, classes=(), sampler="", wait=True):
    """Asks for images by the API; returns them, or the job."""
    values = (index, num_images, seed, list(classes), steps, sampler, 1, 1, "", 1, 1)
    job = client.submit(*values, api_name="/generate")
    return images_of(job.result(timeout=300)) if wait else job


def images_of(outputs):
    return [np.asarray(Image.open(entry["image"])) for entry in outputs[2]]


@pytest.mark.parametrize("name", ["diffusion", "conditional", "flow", "pixelcnn", "vae", "dcgan"])
def test_the_api_gives_the_pixels_of_the_pipelines_call(connect, checkpoints, index_of, name):
    import torch

    from tiny_diffusers import TinyPipeline
    from tiny_diffusers.pipelines.pipeline_tiny import image_generators

    classes = ["dog"] if name in ("conditional", "pixelcnn") else []
    pipe = TinyPipeline.from_pretrained(checkpoints[name])
    getattr(pipe, pipe._network_name).to(memory_format=torch.channels_last)
    options = {"class_labels": "dog"} if classes else {}
    options |= {"num_inference_steps": 3} if "unet" in pipe.components else {}
    expected = pipe(batch_size=2, generator=image_generators(7, 2), **options).images
    images = generate(connect(), index_of[name], seed=7, classes=classes)
    assert len(images) == 2
    for image, other in zip(images, expected, strict=True):
        assert np.array_equal(image, np.asarray(other))


def test_ten_clients_with_five_requests_each_are_answered_and_none_mixed_up(connect, index_of):
    import psutil

    reference = connect()
    requests = [(index_of[name], seed) for name in ("diffusion", "flow", "vae") for seed in range(3)]
    expected = {(index, seed): generate(reference, index, seed=seed) for index, seed in requests}
    before = psutil.Process().memory_info().rss
    failures = []

    def ask(client, number):
        choice = random.Random(number)
        for _ in range(5):
            index, seed = choice.choice(requests)
            try:
                images = generate(client, index, seed=seed)
                assert all(map(np.array_equal, images, expected[index, seed]))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask, args=(connect(), number)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert psutil.Process().memory_info().rss - before < 500 * 2**20


def test_a_client_that_goes_away_frees_its_place(connect, index_of):
    leaving = connect()
    job = generate(leaving, index_of["diffusion"], num_images=64, steps=250, wait=False)
    while not job.outputs():
        time.sleep(0.1)
    job.cancel()
    leaving.close()
    began = time.perf_counter()
    assert len(generate(connect(), index_of["vae"])) == 2
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: "../secret"}, "Value"),
        ({0: 99}, "Value"),
        ({4: 10_000}, "10000"),
        ({4: "NaN"}, "not a whole number"),
        ({1: 10**9}, "1000000000"),
        ({5: "rm -rf"}, "Unknown --scheduler"),
        ({0: 1, 3: ["unicorn"]}, "Unknown class"),
    ],
)
def test_the_server_lives_on_after_what_no_page_would_send(connect, index_of, changes, words):
    from gradio_client.exceptions import AppError

    client = connect()
    values = [index_of["diffusion"], 2, 0, [], 3, "", 1, 1, "", 1, 1]
    for position, value in changes.items():
        values[position] = value
    with pytest.raises((AppError, ValueError)) as error:
        client.predict(*values, api_name="/generate")
    assert words in str(error.value) and "Traceback" not in str(error.value)
    assert len(generate(client, index_of["vae"])) == 2


def test_a_path_in_place_of_an_upload_is_refused(connect, index_of, tmp_path):
    from gradio_client.exceptions import AppError

    client = connect()
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    drawing = {"background": file, "layers": [], "composite": file, "id": None}
    values = (drawing, "Variations", 0.5, "lower half", 2, 1.0, True, 0.5, None, 2, 0, 3, "", 1, 1)
    with pytest.raises((AppError, ValueError)) as error:
        client.predict(index_of["diffusion"], *values, api_name="/edit")
    assert "root:" not in str(error.value)


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
