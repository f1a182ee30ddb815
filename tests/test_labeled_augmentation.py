"""Augmentation that the network is told of: what is done to the images, what the labels say, and training with it."""

import math

import pytest
import torch

from tiny_diffusers import TinyPipeline, TinyTransformer2DModel, TinyUNet2DModel
from tiny_diffusers.data.labeled_augmentation import LABELED_DRAWS, NUM_LABELS, augment_labeled
from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training.batches import Batches


SCRIPT = train_unconditional
ONE = 1 / math.sqrt(2)


def draw(kind: int | None, *amounts: float) -> torch.Tensor:
    """Returns the random numbers by which one kind of augmentation is done, or none."""
    uniform = torch.full((1, LABELED_DRAWS), 0.99)
    if kind is not None:
        uniform[0, kind] = 0.0
        uniform[0, 8 + kind : 8 + kind + len(amounts)] = torch.tensor(amounts)
    return uniform


DEVIATION = float(torch.special.ndtr(torch.tensor(1.0)))  # the uniform number that stands for one standard deviation


@pytest.mark.parametrize(
    ("uniform", "expected", "labels"),
    [
        (draw(None), lambda x: x, {}),
        (draw(0, 0.1), lambda x: x.flip(3), {0: 1.0}),
        (draw(0, 0.6), lambda x: x, {}),  # half of those that may be mirrored are
        (draw(1, 0.1), lambda x: x.flip(2), {1: 1.0}),
        (draw(3, 0.75), lambda x: torch.rot90(x, -1, (2, 3)), {3: -1.0, 4: 1.0}),
        (draw(6, DEVIATION, 0.5), lambda x: torch.cat([x[..., :2].flip(3), x[..., :-2]], dim=3), {7: 1.0}),
    ],
)
def test_each_kind_is_done_and_labeled(uniform, expected, labels):
    x = 2 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    images, found = augment_labeled(x, uniform, 0.12)
    torch.testing.assert_close(images, expected(x), atol=1e-4, rtol=0)
    assert found.shape == (1, NUM_LABELS)
    torch.testing.assert_close(
        found[0], torch.tensor([labels.get(i, 0.0) for i in range(NUM_LABELS)]), atol=1e-5, rtol=0
    )


def test_scaling_and_stretching_move_a_spot_as_labeled():
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    spot = (
        2 * torch.exp(-((rows - 31.5) ** 2 + (columns - 41.5) ** 2) / 8)[None, None] - 1
    )  # 10 to the right of the middle

    def middle(images):
        weights = (images[0, 0] + 1) / (images + 1).sum()
        return float((weights * columns).sum() - 31.5), float((weights * rows).sum() - 31.5)

    for kind, label in ((2, 2), (4, 5)):  # both by 2^0.2 along the row
        images, labels = augment_labeled(spot, draw(kind, DEVIATION), 0.12)
        assert middle(images) == pytest.approx((10 * 2**0.2, 0), abs=0.05)
        assert float(labels[0, label]) == pytest.approx(1, abs=1e-4)
    images, labels = augment_labeled(spot, draw(3, 0.625), 0.12)  # an eighth of a turn
    assert middle(images) == pytest.approx((10 * ONE, 10 * ONE), abs=0.05)
    assert labels[0, 3:5].tolist() == pytest.approx([ONE - 1, ONE], abs=1e-5)


def test_each_kind_is_done_with_its_probability():
    uniform = torch.rand(20_000, LABELED_DRAWS, generator=torch.Generator().manual_seed(0))
    _, labels = augment_labeled(torch.zeros(20_000, 1, 2, 2), uniform, 0.3)
    shares = (labels != 0).float().mean(dim=0)
    assert shares.tolist() == pytest.approx([0.15, 0.15, 0.3, 0.3, 0.3, 0.3, 0.15, 0.3, 0.3], abs=0.02)
    assert float(labels[:, 2].square().mean()) == pytest.approx(0.3, abs=0.02)  # N(0, 1) where it is done


@pytest.mark.parametrize("network", [TinyUNet2DModel, TinyTransformer2DModel])
def test_the_network_is_told_and_nothing_is_the_default(network):
    torch.manual_seed(0)
    size = {"block_out_channels": (8,), "norm_num_groups": 4} if network is TinyUNet2DModel else {"num_layers": 1}
    net = network(sample_size=8, in_channels=1, out_channels=1, num_augment_labels=NUM_LABELS, **size).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, labels = torch.randn(2, 1, 8, 8), torch.rand(2, NUM_LABELS)
    with torch.no_grad():
        plain, zeros, told = (net(x, 5, augment_labels=each).sample for each in (None, 0 * labels, labels))
    assert torch.equal(plain, zeros) and not torch.allclose(plain, told)
    with pytest.raises(ValueError, match="takes no labels of augmentation"):
        network(sample_size=8, in_channels=1, out_channels=1, **size)(x, 5, augment_labels=labels)


def test_a_run_trains_with_it_resumes_and_samples_without(train, train_in_two, monkeypatch):
    seen = []
    assemble = Batches._assemble
    monkeypatch.setattr(Batches, "_assemble", lambda *args, **kw: seen.append(assemble(*args, **kw)) or seen[-1])
    folder = train("--augment_prob", "0.5", "--validation_split", "0.1", steps=2)
    told = [batch.augment_labels for batch in seen if batch.augment_labels is not None]
    assert len(told) == 2 and all((labels != 0).any() for labels in told) and len(seen) > 2  # not in validation
    resumed = train_in_two("--augment_prob", "0.5", "--validation_split", "0.1", stopped_at=1, steps=2)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (resumed / weights).read_bytes() == (folder / weights).read_bytes()
    pipe = TinyPipeline.from_pretrained(folder)
    assert pipe.unet.config.num_augment_labels == NUM_LABELS and len(pipe(2, num_inference_steps=2).images) == 2


def test_what_takes_no_labels_is_refused(check_mistake, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel", "block_out_channels": [32, 32]}')
    flags = ["--model_config_name_or_path", str(tmp_path / "config.json"), "--augment_prob", "0.1"]
    check_mistake(flags, ["--augment_prob: the network of", "stock UNet2DModel"], network=False)
    check_mistake(["--augment_prob", "1.5"], ["augment_prob", "1.5"])
