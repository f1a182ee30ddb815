"""Limits of requests, their errors, and how they are stopped."""

import asyncio
import io
import math
import threading
import time
import types

import gradio as gr
import pytest
from gradio import processing_utils
from gradio.data_classes import ImageData
from PIL import Image

from tiny_diffusers.app.requests import Progress, Stopped, Task, Tasks, answers, number, spell, streams, whole
from tiny_diffusers.app.uploads import (
    MAX_DRAWINGS,
    MAX_UPLOAD_BYTES,
    Page,
    check_upload,
    checked,
    checked_image,
    save_once,
)
from tiny_diffusers.errors import UserError


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 0, 10_000, 1.5, "3", None, True, [1], {"a": 1}])
def test_numbers_of_a_client_are_whole_and_within_bounds(value):
    with pytest.raises(UserError, match="^Steps: .* is not (a whole number|from 1 to 250)"):
        whole("Steps", value, 1, 250)
    assert whole("Steps", 3.0, 1, 250) == 3


@pytest.mark.parametrize("value", [math.nan, -math.inf, -0.1, 1.1, "0.5", None, False])
def test_numbers_of_a_client_are_finite_and_within_bounds(value):
    with pytest.raises(UserError, match="^Eta: .* is not (a number|from 0 to 1)"):
        number("Eta", value, 0, 1)
    assert number("Eta", 1, 0, 1) == 1.0


def encode(picture, format="PNG"):
    file = io.BytesIO()
    picture.save(file, format)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "can't be read as a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 100, "can't be read as a picture"),
        (b"<svg onload='alert(1)'/>", "can't be read as a picture"),
        (encode(Image.new("1", (20_000, 20_000))), r"picture"),  # 400 megapixels in 50 kB
        (encode(Image.new("1", (5_000, 5_000))), "5000 x 5000 pixels"),
        (b"0" * (MAX_UPLOAD_BYTES + 1), "8 MB"),
    ],
)
def test_an_upload_is_checked_before_it_is_decoded(content, message):
    with pytest.raises(UserError, match=message):
        check_upload(content)


def test_a_small_picture_is_taken():
    check_upload(encode(Image.new("RGB", (30, 20)), "JPEG"))


def test_work_reports_its_progress_at_most_every_0_4_s_and_then_its_result(monkeypatch):
    def work(task):
        task.report("first", lambda: "a picture")
        task.report("too soon", lambda: pytest.fail("it is drawn in vain"))
        monkeypatch.setattr("tiny_diffusers.app.requests.REPORT_SECONDS", 0)
        task.report("third")
        return 7

    assert list(Task().run(work)) == [Progress("first", "a picture"), Progress("third"), 7]


def test_an_error_of_the_work_is_one_of_the_request():
    def work(task):
        raise UserError("no such class")

    with pytest.raises(UserError, match="no such class"):
        list(Task().run(work))


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen within 5 s")


@pytest.mark.parametrize("how", ["stop", "gone"])
def test_work_ends_at_its_next_step_once_its_user_has_stopped_it_or_gone(how):
    tasks, request, ended = Tasks(), types.SimpleNamespace(session_hash="me"), threading.Event()

    def work(task):
        try:
            while True:
                task.report("a step")
                time.sleep(0.001)
        finally:
            ended.set()

    reports = tasks.run(request, work)
    assert next(reports) == Progress("a step")
    tasks.stop(types.SimpleNamespace(session_hash="another"))
    assert next(reports) == Progress("a step")
    if how == "gone":
        reports.close()
    else:
        tasks.stop(request)
        with pytest.raises(Stopped):
            list(reports)
    wait_for(ended.is_set)
    assert not tasks._tasks


def test_a_mistake_is_one_line_in_the_page_and_a_fault_is_logged(caplog):
    @answers
    def mistaken():
        raise UserError("Steps: 0 is not\n from 1 to 250.")

    @streams
    def faulty():
        yield 1
        raise ZeroDivisionError("division by zero")

    with pytest.raises(gr.Error) as error:
        mistaken()
    assert error.value.message == "Steps: 0 is not from 1 to 250."
    with pytest.raises(gr.Error, match="failed in the server: division by zero"):
        list(faulty())
    assert "Traceback" in caplog.text


def test_a_picture_that_is_saved_again_leaves_its_file_alone(tmp_path):
    box = save_once(gr.Image(format="png"))
    box.GRADIO_CACHE = str(tmp_path)
    picture = Image.effect_noise((8, 8), 50)
    first, second = box.postprocess(picture), box.postprocess(picture.copy())
    (file,) = tmp_path.rglob("*.png")
    assert first.path == second.path == str(file)
    with Image.open(file) as saved:
        assert saved.tobytes() == picture.tobytes()


def test_a_page_can_send_few_layers_and_keeps_few_drawings():
    with gr.Blocks(analytics_enabled=False):
        editor = checked(gr.ImageEditor())
    for drawing in range(MAX_DRAWINGS + 5):
        sent = {"type": "layer", "index": "0", "id": str(drawing)}
        editor.accept_blobs(types.SimpleNamespace(data=sent, files=[("file", b"")]))
    assert len(editor.blob_storage) == MAX_DRAWINGS and "0" not in editor.blob_storage
    for index in ("10000000000", "-1", "x"):
        sent = {"type": "layer", "index": index, "id": "0"}
        with pytest.raises(ValueError, match="at most 4 layers"):
            editor.accept_blobs(types.SimpleNamespace(data=sent, files=[("file", b"")]))
    assert editor.accept_blobs._is_server_fn  # what gradio asks for


MARK = {"_type": "gradio.FileData"}


@pytest.mark.parametrize(
    "sent",
    [
        {"path": "http://127.0.0.1:1/x.png", "meta": MARK},
        {"path": "https://example.com/x.png"},
        {"path": "/etc/passwd"},  # Gradio looks for marked files alone among the uploads
        {"path": "x", "meta": MARK, "background": {"path": "http://127.0.0.1:1/x.png", "meta": MARK}},
        [{"layers": [{"path": "http://127.0.0.1:1/x.png", "meta": MARK}]}],
    ],
)
def test_no_file_is_fetched_from_an_address_or_opened_outside_of_the_uploads(monkeypatch, sent):
    async def fetch(*args, **kwargs):
        pytest.fail("the server asks another one")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    with Page(analytics_enabled=False) as page:
        event = gr.Button().click(lambda picture, number: None, [gr.Image(), gr.Number()])
    function = page.fns[event["id"]]
    for inputs in ([sent, 1], [None, sent]):
        with pytest.raises(gr.Error, match="is no uploaded file: upload it"):
            asyncio.run(page.preprocess_data(function, inputs, None))


def test_a_picture_is_checked_before_it_is_decoded(tmp_path):
    with gr.Blocks(analytics_enabled=False):
        box = checked_image(gr.Image(type="pil", image_mode="RGB"))
    (tmp_path / "large.png").write_bytes(encode(Image.new("1", (5_000, 5_000))))
    (tmp_path / "small.png").write_bytes(encode(Image.new("L", (6, 5), 9)))
    with pytest.raises(gr.Error, match="5000 x 5000 pixels"):
        box.preprocess(ImageData(path=str(tmp_path / "large.png")))
    given = ImageData(path=str(tmp_path / "small.png"), url="data:image/png;base64,AAAA")
    assert box.preprocess(given).getpixel((0, 0)) == (9, 9, 9) and box.preprocess(None) is None


@pytest.mark.parametrize("value", [0.1, 1 / 3, 2.0, -40.0, 1e-7, 0.30000000000000004, 123456789.125, 1e300])
def test_a_number_is_spelled_so_that_it_comes_back(value):
    assert float(spell(value)) == value
    assert spell(2.0) == "2"


def test_names_in_an_error_are_no_html():
    @answers
    def mistaken():
        raise UserError("Unknown class '<img src=x onerror=alert(1)>'.")

    with pytest.raises(gr.Error) as error:
        mistaken()
    assert "<" not in error.value.message
