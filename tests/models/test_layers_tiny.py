"""The embeddings, the attention, the class weights, the checks and the limits that the networks share."""

import inspect
import math
import typing

import pytest
import torch
import torch.nn.functional as F

from tiny_diffusers import TinyTransformer2DModel, TinyUNet2DModel, models
from tiny_diffusers.models.layers_tiny import (
    SIZES,
    ClassEmbedding,
    ConditionEmbedding,
    TimeEmbedding,
    _CPUAttention,
    as_sample_size,
    check_choice,
    check_levels,
    check_shape,
    check_sizes,
    class_weights,
    count_embedding,
    height_and_width,
    self_attention,
    velocity_of_x0,
)


K = 3
TABLE = torch.zeros(5, K + 1, dtype=torch.float64)


def test_labels_become_rows_of_weights_in_the_dtype_of_the_table():
    rows = torch.eye(K + 1, dtype=torch.float64)
    assert torch.equal(class_weights(torch.tensor([2, 0, K]), 3, K, TABLE), rows[[2, 0, K]])
    assert torch.equal(class_weights(torch.tensor([1], dtype=torch.uint8), 1, K, TABLE), rows[[1]])
    assert torch.equal(class_weights(None, 2, K, TABLE), rows[[K, K]])  # no class
    mixed = torch.tensor([[0.25, 0.75, 0, 0], [2, -1, 0, 0]])
    weights = class_weights(mixed, 2, K, TABLE)
    assert weights.dtype == torch.float64 and torch.equal(weights, mixed.double())
    assert class_weights(torch.empty(0, dtype=torch.long), 0, K, TABLE).shape == (0, K + 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, K + 1]), "class label 4 is not known to this network: it must be from 0 to 3"),
        (torch.tensor([-1, 0]), "class label -1"),
        (torch.tensor([0]), r"shape \(1,\) and torch.int64: for 2 images of 3 classes .* shape \(2,\)"),
        (torch.ones(2, K), r"shape \(2, 3\) and torch.float32: .* floats of shape \(2, 4\)"),
        (torch.ones(2), r"floats of shape \(2, 4\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        class_weights(labels, 2, K, TABLE)


def test_attention_has_the_gradient_of_its_equation():
    qkv = torch.randn(3, 7, 3, 2, 5, dtype=torch.float64, requires_grad=True)  # (B, L, 3, heads, d)
    assert torch.autograd.gradcheck(_CPUAttention.apply, (qkv,))


def test_attention_is_the_same_for_a_few_images_at_a_time(monkeypatch):
    qkv = torch.randn(5, 16, 3, 2, 8, requires_grad=True)
    direction = torch.randn(5, 16, 2, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(self_attention(qkv), expected)
    (expected,) = torch.autograd.grad(expected, qkv, direction)
    monkeypatch.setattr(_CPUAttention, "ELEMENTS_AT_ONCE", 2 * 2 * 16 * 16)  # two images at a time, and one left over
    (gradient,) = torch.autograd.grad(self_attention(qkv), qkv, direction)
    torch.testing.assert_close(gradient, expected)


def test_sinusoidal_features_are_those_of_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    embedding = TimeEmbedding("sinusoidal", 16, 4, "silu", 1000)
    timesteps = torch.tensor([0.0, 1.0, 499.5, 999.0])
    expected = get_timestep_embedding(timesteps, 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(embedding.features(timesteps), expected, atol=1e-4, rtol=0)


def test_fourier_frequencies_are_gaussian_and_survive_a_cast():
    embedding = TimeEmbedding("fourier", 2000, 4, "silu", 1000)
    t = 1e-3  # small enough that the sine is its angle
    frequencies = embedding.features(torch.tensor([t]))[0, 1000:] / t * 1000 / (2 * math.pi)
    assert frequencies.square().mean().sqrt() == pytest.approx(embedding.FOURIER_SCALE, rel=0.01)
    kept = embedding.features(torch.tensor([999.0]))
    assert torch.equal(embedding.to(torch.bfloat16).features(torch.tensor([999.0])), kept)


@pytest.mark.parametrize("name", models.__all__)
def test_every_integer_option_of_a_network_has_a_limit(name):
    for option, parameter in inspect.signature(getattr(models, name)).parameters.items():
        if int in (parameter.annotation, *typing.get_args(parameter.annotation)) and option != "patch_size":
            assert option in SIZES


def test_sizes_are_integers_within_their_limits():
    check_sizes({"sample_size": 1024, "block_out_channels": (1, 4096), "num_class_embeds": None, "other": "any"})
    check_sizes({"in_channels": 17, "sample_size": (1, 1024)})
    with pytest.raises(ValueError, match="num_layers None is not possible: it must be an integer from 1 to 8"):
        check_sizes({"num_layers": None}, num_layers=(1, 8))
    refused = {
        "sample_size 0 is not possible: it must be an integer from 1 to 1024": {"sample_size": 0},
        "sample_size None": {"sample_size": None},
        "layers_per_block True": {"layers_per_block": True},
        "latent_dim 2.0": {"latent_dim": 2.0},
        "sample_size 1025 .* from 1 to 1024, or a height and a width": {"sample_size": (8, 1025)},
        r"sample_size \(8, 8, 8\)": {"sample_size": (8, 8, 8)},
        "block_out_channels 4097": {"block_out_channels": (8, 4097)},
        "in_channels 17 .* from 1 to 16": {"in_channels": 17},
    }
    for message, config in refused.items():
        with pytest.raises(ValueError, match=message):
            check_sizes(config, in_channels=(1, 16))


def test_the_parameters_of_the_embeddings_are_counted():
    config = {"num_class_embeds": 5, "num_conditions": 3, "class_embed_dim": 7}
    modules = ClassEmbedding(5, 7), ConditionEmbedding(3, 7)
    of_each = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    assert count_embedding(config) == (7, sum(of_each))
    assert count_embedding({**config, "num_conditions": None}) == (7, of_each[0])
    assert count_embedding({**config, "num_class_embeds": None, "num_conditions": None}) == (0, 0)


def test_a_height_and_width_are_a_pair_and_of_squares_the_side():
    assert [as_sample_size(size) for size in (12, (12, 12), [12, 16])] == [12, 12, (12, 16)]
    assert [height_and_width(size) for size in (12, (12, 16))] == [(12, 12), (12, 16)]
    assert as_sample_size([8, 8, 8]) == (8, 8, 8)  # for `check_sizes` to refuse


def test_levels_divide_both_sides_or_the_nearest_size_is_named():
    check_levels({"block_out_channels": (8, 8), "sample_size": (12, 16)}, 4)
    for size, message in {
        9: "sample_size 9 .* 2 levels: each side must be a multiple of 4. .* the nearest size is 8",
        (12, 15): "sample_size 12x15 .* multiple of 4. .* the nearest size is 12x16",
        (1, 6): "sample_size 1x6 .* the nearest size is 4x8",
        (11, 13): "the nearest size is 12",
    }.items():
        with pytest.raises(ValueError, match=f"{message}\\.$"):
            check_levels({"block_out_channels": (8, 8), "sample_size": size}, 4)


def test_an_unknown_name_is_refused_with_its_closest_match():
    check_choice("kind", "full", ("none", "full"))
    with pytest.raises(ValueError, match="Unknown kind 'ful': it must be one of none, full. Did you mean 'full'?"):
        check_choice("kind", "ful", ("none", "full"))
    with pytest.raises(ValueError, match=r"Unknown patch_size \[2\]: it must be one of 1, 2\.$"):
        check_choice("patch_size", [2], (1, 2))


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 1, 8, 8), (2, 3, 8, 9, 1)])
def test_a_shape_that_does_not_fit_is_refused(shape):
    check_shape("sample", torch.zeros(2, 3, 8, 9), 3, 8, "width")
    with pytest.raises(ValueError, match=r"this network takes \(batch, 3, 8, width\)"):
        check_shape("sample", torch.zeros(shape), 3, 8, "width")


@pytest.mark.parametrize("network_class", [TinyUNet2DModel, TinyTransformer2DModel])
def test_a_row_of_nan_is_none_and_conditions_of_another_shape_are_refused(network_class):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8)} if network_class is TinyUNet2DModel else {"num_layers": 1}
    network = network_class(sample_size=8, in_channels=1, out_channels=1, **sizes, num_conditions=2).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sample, values = torch.randn(2, 1, 8, 8), torch.tensor([[0.5, -1.0], [float("nan")] * 2])
    mixed, none = network(sample, 3, conditions=values).sample, network(sample, 3).sample
    alone = network(sample[:1], 3, conditions=values[:1]).sample
    torch.testing.assert_close(mixed, torch.cat([alone, none[1:]]))
    assert mixed.isfinite().all() and not torch.allclose(mixed[0], none[0])
    for wrong in (values[:1], values[:, :1], values.nan_to_num().long()):
        with pytest.raises(ValueError, match=r"it must be floats of shape \(2, 2\), standardized"):
            network(sample, 3, conditions=wrong)
    without = network_class(sample_size=8, in_channels=1, out_channels=1, **sizes)
    with pytest.raises(ValueError, match="build it with num_conditions"):
        without(sample, 3, conditions=values)
    with pytest.raises(ValueError, match="num_conditions 0 is not possible"):
        network_class(num_conditions=0)


def test_the_velocity_of_the_true_image_is_that_of_the_flow():
    x_0, noise = torch.randn(2, 3, 3, 8, 8)
    t = torch.tensor([1000.0, 400.0, 10.0])
    s = (t / 1000)[:, None, None, None]
    x_t = (1 - s) * x_0 + s * noise
    assert torch.allclose(velocity_of_x0(x_0, x_t, t, 1000), noise - x_0, atol=1e-4)
    assert velocity_of_x0(x_0, x_t.bfloat16(), torch.zeros(3), 1000).isfinite().all()


@pytest.mark.parametrize("network_class", [TinyUNet2DModel, TinyTransformer2DModel])
def test_x_prediction_changes_the_output_of_the_same_weights_alone(network_class, tmp_path):
    # with the channels of a conditioning image after those of the noisy one
    options = {"in_channels": 3, "out_channels": 2, "sample_size": 8, "num_train_timesteps": 100}
    options |= {"block_out_channels": (8, 8)} if network_class is TinyUNet2DModel else {"num_layers": 1}
    direct, network = network_class(**options), network_class(**options, x_prediction=True)
    network.load_state_dict({name: torch.randn_like(w) for name, w in direct.state_dict().items()})
    direct.load_state_dict(network.state_dict())
    network.save_pretrained(tmp_path)
    network = network_class.from_pretrained(tmp_path)
    sample = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for t in (100, 25, 2.5):
            expected = (sample[:, :2] - direct(sample, t).sample) / (t / 100)
            assert torch.allclose(network(sample, t).sample, expected, atol=1e-4)
