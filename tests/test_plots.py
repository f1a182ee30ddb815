import json

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_diffusers.errors import UserError
from tiny_diffusers.plots import compare_losses, image_grid, loss_curves, read_log, smooth, strip, to_pil


def pixels(image):
    return np.asarray(image)


@pytest.fixture
def batch():
    return torch.randint(0, 256, (5, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class TestToPil:
    def test_every_form_of_a_batch_gives_the_same_pixels(self, batch):
        nhwc = batch.permute(0, 2, 3, 1)
        forms = [batch, nhwc, batch.numpy(), nhwc.numpy(), batch / 255, nhwc.double() / 255]
        forms.append([Image.fromarray(image) for image in nhwc.numpy()])
        for form in forms:
            np.testing.assert_array_equal([pixels(image) for image in to_pil(form)], nhwc.numpy())

    def test_one_channel_is_gray(self, batch):
        gray = batch[:, :1]
        for form in (gray, gray[:, 0], gray.permute(0, 2, 3, 1)):
            images = to_pil(form)
            assert {image.mode for image in images} == {"L"}
            np.testing.assert_array_equal([pixels(image) for image in images], gray[:, 0])

    def test_bfloat16_tensors_with_gradients_are_drawn(self):
        image = torch.full((1, 1, 2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
        assert pixels(to_pil(image)[0]).tolist() == [[128, 128], [128, 128]]

    @pytest.mark.parametrize(
        ("value", "line"),
        [(-1.0, r"floats in \[0, 1\].* in \[-1, -1\]"), (1.5, r"floats in \[0, 1\]"), (float("nan"), "NaN pixels")],
    )
    def test_floats_outside_0_to_1_are_refused(self, value, line):
        with pytest.raises(ValueError, match=line):
            to_pil(torch.full((1, 1, 4, 4), value))

    def test_other_channels_are_drawn_side_by_side(self):
        batch = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 6), dtype=np.uint8)
        for image, channels in zip(to_pil(batch), batch, strict=True):
            assert image.mode == "L" and np.array_equal(pixels(image), np.hstack(channels))

    def test_four_channels_are_rgba(self):
        batch = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 6), dtype=np.uint8)
        images = to_pil(batch)
        assert np.array_equal(pixels(images[1]), batch[1].transpose(1, 2, 0))
        assert image_grid(images, scale=1, padding=0).mode == "RGBA"
        assert np.array_equal(pixels(image_grid(images, 2, 1, 0)), np.concatenate(list(batch), 2).transpose(1, 2, 0))

    @pytest.mark.parametrize("shape", [(4, 4), (1, 1, 3, 4, 4)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(ValueError, match="can't be drawn"):
            to_pil(np.zeros(shape, dtype=np.uint8))


class TestImageGrid:
    def test_every_pixel_has_its_position(self, batch):
        grid = pixels(image_grid(batch, columns=3, scale=2, padding=1))  # 2 rows of 3, the last position empty
        assert grid.shape == (2 * 17 + 1, 3 * 13 + 1, 3)
        expected = np.full_like(grid, 255)
        for i, image in enumerate(batch.permute(0, 2, 3, 1).numpy()):
            top, left = 1 + (i // 3) * 17, 1 + (i % 3) * 13
            expected[top : top + 16, left : left + 12] = image.repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(grid, expected)

    @pytest.mark.parametrize("size", [8, 16, 28, 32, 64])
    @pytest.mark.parametrize("count", [1, 16, 64, 100])
    def test_a_grid_of_small_images_fills_a_screen(self, size, count):
        longest = max(image_grid(np.zeros((count, size, size), dtype=np.uint8)).size)
        assert 512 <= longest <= 1024

    def test_large_images_are_not_reduced(self):
        assert image_grid(np.zeros((1, 1500, 1500), dtype=np.uint8), padding=0).size == (1500, 1500)

    def test_row_labels_are_left_of_the_unchanged_grid(self, batch):
        plain = pixels(image_grid(batch, columns=1, scale=4))
        labeled = pixels(image_grid(batch, columns=1, scale=4, row_labels=["a", "bb", "c", "d", "a long name"]))
        np.testing.assert_array_equal(labeled[:, -plain.shape[1] :], plain)
        margin = labeled[:, : -plain.shape[1]]
        assert all((rows < 128).any() for rows in np.array_split(margin, 5))

    def test_column_labels_are_above_the_unchanged_grid(self, batch):
        plain = pixels(image_grid(batch, scale=4, columns=5))
        labeled = pixels(image_grid(batch, scale=4, columns=5, column_labels=["a", "", "c", "", ""]))
        np.testing.assert_array_equal(labeled[-len(plain) :], plain)
        written = [(part < 128).any() for part in np.array_split(labeled[: -len(plain)], 5, axis=1)]
        assert written == [True, False, True, False, False]

    def test_bad_input_is_refused(self, batch):
        with pytest.raises(ValueError, match="1 labels were given for 5 columns"):
            image_grid(batch, columns=5, column_labels=["a"])
        with pytest.raises(ValueError, match="at least one image"):
            image_grid([])
        with pytest.raises(ValueError, match="one size"):
            image_grid([Image.new("L", (8, 8)), Image.new("L", (8, 9))])
        with pytest.raises(ValueError, match="1 labels were given for 5 rows"):
            image_grid(batch, columns=1, row_labels=["a"])
        with pytest.raises(ValueError, match="at least one column"):
            image_grid(batch, columns=0)


def test_a_strip_has_a_row_for_each_image_and_a_column_for_each_state(batch):
    states = [batch // (k + 1) for k in range(4)]
    image = pixels(strip(states, scale=1, padding=0))  # 5 rows of 4
    assert image.shape == (5 * 8, 4 * 6, 3)
    np.testing.assert_array_equal(image[2 * 8 : 3 * 8, 3 * 6 : 4 * 6], states[3][2].permute(1, 2, 0))
    with pytest.raises(ValueError, match="equally many"):
        strip([batch, batch[:2]])


class TestLossCurves:
    def write(self, path, *lines):
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    def test_a_log_is_read_as_its_series(self, tmp_path):
        log = self.write(
            tmp_path / "train_log.jsonl",
            {"step": 10, "loss": 1.0, "lr": 0.1, "note": "text"},
            {"step": 20, "loss": 0.5},
            {"step": 20, "val_loss": 0.6},
            {"step": 30, "loss": float("nan")},
            {"step": 20, "loss": 0.4},  # logged again after a resume
            '{"step": 40, "lo',  # cut off by a kill
        )
        series = read_log(log)
        assert {name: [part.tolist() for part in parts] for name, parts in series.items()} == {
            "loss": [[10, 20], [1.0, 0.4]],
            "lr": [[10], [0.1]],
            "val_loss": [[20], [0.6]],
        }

    def test_smoothing_keeps_a_constant_and_a_slope_and_reduces_noise(self):
        assert smooth(np.full(50, 3.0), 7) == pytest.approx(3.0)
        assert smooth(np.arange(50.0), 7)[3:-3] == pytest.approx(np.arange(50.0)[3:-3])
        noise = np.random.default_rng(0).normal(size=10_000)
        assert smooth(noise, 25).std() == pytest.approx(1 / 5, rel=0.1)
        assert len(smooth(np.ones(3), 10)) == 3

    @pytest.mark.parametrize("count", [1, 5, 200])
    def test_a_picture_is_drawn(self, tmp_path, count):
        lines = [{"step": i + 1, "loss": 1 / (i + 1)} for i in range(count)]
        log = self.write(tmp_path / "train_log.jsonl", *lines, {"step": count, "val_loss": 0.5})
        output = loss_curves(log, tmp_path / "loss_curves.png", title="a run")
        with Image.open(output) as picture:
            assert picture.size == (960, 540)
            colors = {color[:3] for _, color in picture.convert("RGB").getcolors(1 << 20)}
        assert (0x1F, 0x5F, 0xA8) in colors and (0xD9, 0x62, 0x2B) in colors  # both curves are there

    def test_a_log_without_losses_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="no training log"):
            loss_curves(tmp_path / "nothing.jsonl", tmp_path / "x.png")
        log = self.write(tmp_path / "train_log.jsonl", {"step": 1, "lr": 0.1})
        with pytest.raises(UserError, match="no loss in it yet"):
            loss_curves(log, tmp_path / "x.png")

    def test_runs_are_compared_by_a_loss_that_all_have(self, tmp_path):
        first = self.write(tmp_path / "a.jsonl", {"step": 1, "loss": 1.0, "val_loss": 0.5})
        second = self.write(tmp_path / "b.jsonl", {"step": 1, "loss": 2.0})
        assert compare_losses({"a": first, "b": second}, tmp_path / "x.svg").read_text().count("training loss") == 1
        assert "validation loss" in compare_losses({"a": first, "c": first}, tmp_path / "y.svg").read_text()
        third = self.write(tmp_path / "d.jsonl", {"step": 1, "lr": 1.0})
        with pytest.raises(UserError, match="no loss in common"):
            compare_losses({"a": first, "d": third}, tmp_path / "z.svg")
