"""Pictures that a page sends and gets: their limits, checked before they are decoded, and their files."""

import functools
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio import processing_utils
from gradio_client.utils import is_file_obj, is_file_obj_with_meta, is_http_url_like

from ..commands.shared import save_numbered
from ..errors import UserError, first_line
from .requests import one_line_errors


if TYPE_CHECKING:
    from PIL import Image


MAX_UPLOAD_BYTES = 8 * 2**20
MAX_UPLOAD_PIXELS = 2**24
MAX_LAYERS = 4  # of a drawing
MAX_DRAWINGS = 100  # that pages have sent and no request has used yet


class Page(gr.Blocks):
    """
    Blocks that take files which were uploaded to them alone. Gradio would fetch one that is named by its address, so that a
    client makes the server ask others, and would open one anywhere on this machine if the mark of a file is left out.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list, *args, **kwargs) -> list:
        with one_line_errors():
            _check_files(inputs)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _check_files(value: Any) -> None:
    """Refuses files in what a client has sent that Gradio would not look for among the uploads."""
    if is_file_obj(value) and (is_http_url_like(value["path"]) or not is_file_obj_with_meta(value)):
        raise UserError(f"'{value['path']:.80}' is no uploaded file: upload it.")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        _check_files(each)


def check_upload(content: bytes) -> None:
    """Refuses an uploaded file that is too large, or no picture, before it is decoded."""
    import io

    from ..data.sources import open_image

    if len(content) > MAX_UPLOAD_BYTES:
        raise UserError(
            f"The file has {len(content) / 2**20:.0f} MB: give one of at most {MAX_UPLOAD_BYTES >> 20} MB."
        )
    try:
        picture = open_image(io.BytesIO(content))
    except Exception as error:  # each format has its own
        raise UserError(
            f"The file can't be read as a picture ({type(error).__name__}): give a PNG or JPEG."
        ) from error
    if picture.width * picture.height > MAX_UPLOAD_PIXELS:
        raise UserError(
            f"The picture has {picture.width} x {picture.height} pixels: give one of at most {MAX_UPLOAD_PIXELS:,}."
        )


def save_once(component: gr.Image | gr.Gallery) -> gr.Image | gr.Gallery:
    """
    Makes a component keep the file of a picture that it has saved before: Gradio's own saving writes over a file that a
    browser may be reading.
    """
    from PIL.Image import Image

    postprocess = component.postprocess

    def save(picture: Any) -> Any:
        if not isinstance(picture, Image):
            return picture
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image.png"
            picture.save(file)
            return processing_utils.save_file_to_cache(file, cache_dir=component.GRADIO_CACHE)

    def save_and_postprocess(value: Any) -> Any:
        return postprocess([save(picture) for picture in value] if isinstance(value, list) else save(value))

    component.postprocess = save_and_postprocess
    return component


def checked(editor: gr.ImageEditor) -> gr.ImageEditor:
    """Makes a component check the files and the number of its pictures before they are decoded."""
    accept, preprocess, convert = editor.accept_blobs, editor.preprocess, editor.convert_and_format_image

    @functools.wraps(accept)
    def check_and_accept(data: Any) -> Any:
        index = str(data.data.get("index") or 0)
        if index != "null" and not (index.isdecimal() and int(index) < MAX_LAYERS):
            raise ValueError(f"A drawing has at most {MAX_LAYERS} layers.")
        while len(editor.blob_storage) >= MAX_DRAWINGS:
            editor.blob_storage.pop(next(iter(editor.blob_storage)))
        return accept(data)

    def check_and_preprocess(payload: Any) -> Any:
        sent = payload and editor.blob_storage.get(payload.id, payload)
        with one_line_errors():
            if sent and len(sent.layers or ()) > MAX_LAYERS:
                raise UserError(f"The drawing has {len(sent.layers)} layers: give at most {MAX_LAYERS}.")
            return preprocess(payload)

    def check_and_convert(file: Any, flatten_on_white: bool = False) -> Any:
        return None if file is None else _decode(file, lambda: convert(file, flatten_on_white))

    editor.accept_blobs, editor.preprocess = check_and_accept, check_and_preprocess
    editor.convert_and_format_image = check_and_convert
    return editor


def checked_image(box: gr.Image) -> gr.Image:
    """Makes a component check the file of its picture before it is decoded."""
    preprocess = box.preprocess

    def check_and_preprocess(file: Any) -> Any:
        if file is None or file.path is None:
            return None
        file = file.model_copy(update={"url": None})  # which may hold another picture
        return _decode(file, lambda: preprocess(file))

    box.preprocess = check_and_preprocess
    return box


def _decode(file: Any, decode: Callable[[], Any]) -> Any:
    """Decodes a file of Gradio, or the content of one, once it is checked."""
    with one_line_errors():
        is_content = isinstance(file, (bytes, bytearray, memoryview))
        if not is_content and Path(file.path).stat().st_size > MAX_UPLOAD_BYTES:
            raise UserError(f"The file is too large: give one of at most {MAX_UPLOAD_BYTES >> 20} MB.")
        check_upload(file if is_content else Path(file.path).read_bytes())
        try:
            return decode()
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"The file can't be read as a picture ({first_line(error)}).") from error


def fit_picture(picture: "Image.Image", size: tuple[int, int], num_channels: int) -> "Image.Image":
    """Crops and resizes a picture to the width and height `size`, and converts it to gray or color."""
    from PIL import Image, ImageOps

    resampling = Image.Resampling.LANCZOS if picture.width > size[0] else Image.Resampling.NEAREST
    return ImageOps.fit(picture.convert("L" if num_channels == 1 else "RGB"), size, resampling)


def save_archive(images: "Sequence[Image.Image]", folder: Path) -> Path:
    """Saves images as numbered PNGs in a zip file, in the folder of a request, with the pictures that it was given there."""
    given = sorted(folder.glob("*.png"))
    with tempfile.TemporaryDirectory() as numbered:
        save_numbered(images, Path(numbered))
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for file in [*given, *sorted(Path(numbered).iterdir())]:
                archive.write(file, file.name)
    return folder / "images.zip"
