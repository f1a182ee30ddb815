"""Options, calls and equations of the U-Net, and what it refuses."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_diffusers.models import TinyUNet2DModel
from tiny_diffusers.models.layers_tiny import height_and_width
from tiny_diffusers.models.unet_tiny import (
    PRESETS,
    AttentionBlock,
    GroupNormAct,
    Layer,
    ResidualBlock,
    StandardizedConv2d,
)


TINY = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "attention": ("none", "full")}
K = 3  # classes

# every option of the constructor at another value than its default
OPTIONS = [
    {},
    {"in_channels": 1, "out_channels": 2},
    {"block_out_channels": (8, 16)},
    {"layers_per_block": 2},
    {"norm_num_groups": 1},
    {"attention": "none", "mid_attention": "none"},
    {"attention": "linear", "mid_attention": "linear"},
    {"attention": "full", "attention_head_dim": 4},
    {"dropout": 0.5},
    {"patch_size": 2},
    {"patch_size": 4},
    {"weight_standardization": True},
    {"weight_standardization": True, "weight_standardization_eps": 1e-3},
    {"skip_rescale": True},
    {"time_embedding": "fourier"},
    {"time_embedding": "learned", "num_train_timesteps": 20},
    {"time_embedding_dim": 12},
    {"act_fn": "gelu"},
    {"downsample": "maxpool"},
    {"upsample": "bilinear"},
    {"upsample": "transposed"},
    {"num_class_embeds": K},
    {"num_class_embeds": K, "class_conditioning": "scale"},
    {"resnet_time_scale_shift": "scale_shift"},
    {"num_class_embeds": K, "class_conditioning": "scale", "resnet_time_scale_shift": "scale_shift"},
    {"sample_size": (12, 16), "in_channels": 2, "out_channels": 2, "patch_size": 2},
    {"num_conditions": 2},
    {"num_class_embeds": K, "class_conditioning": "scale", "num_conditions": 2},
]


def make(seed: int = 0, **options) -> TinyUNet2DModel:
    """Builds a network whose outputs are not zero. Those of a new network are, as its last convolutions are zero."""
    torch.manual_seed(seed)
    unet = TinyUNet2DModel(**{**TINY, **options})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return unet.eval()


def block_config(**options) -> dict:
    """The entries of a config that a layer reads."""
    return {
        "time_embedding_dim": 4,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "act_fn": "silu",
        "dropout": 0.0,
        "weight_standardization": False,
        "weight_standardization_eps": 1e-10,
        "skip_rescale": False,
        "num_class_embeds": None,
        "class_conditioning": "add",
        "resnet_time_scale_shift": "default",
        **options,
    }


def images(unet: TinyUNet2DModel, batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = height_and_width(unet.config.sample_size)
    return torch.randn(batch_size, unet.config.in_channels, *size, generator=generator)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_keeps_the_size_trains_every_parameter_and_survives_a_save(options, tmp_path):
    unet = make(**options)
    sample, timesteps = images(unet), torch.tensor([3, 17])
    given = {"class_labels": torch.tensor([0, K])} if "num_class_embeds" in options else {}
    if "num_conditions" in options:
        given["conditions"] = torch.tensor([[0.5, -1.0], [float("nan")] * 2])

    output = unet(sample, timesteps, **given).sample
    assert output.shape == (2, unet.config.out_channels, *sample.shape[2:])

    unet.train()(sample, timesteps, **given).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())

    unet.eval().save_pretrained(tmp_path)
    loaded = TinyUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample, timesteps, **given).sample, output)
    public = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in public} == public


def test_a_new_network_predicts_zero_and_depends_only_on_the_seed():
    torch.manual_seed(0)
    first = TinyUNet2DModel(**TINY)
    torch.manual_seed(0)
    second = TinyUNet2DModel(**TINY)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first(images(first), 5).sample.abs().max() == 0


def test_the_default_has_the_parameters_of_the_stock_network_of_its_size():
    from diffusers import UNet2DModel

    with torch.device("meta"):
        tiny = TinyUNet2DModel()
        stock = UNet2DModel(
            sample_size=32,
            block_out_channels=(64, 128, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    assert sum(p.numel() for p in tiny.parameters()) == sum(p.numel() for p in stock.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_of_the_reports(name):
    with torch.device("meta"):
        unet = TinyUNet2DModel(**PRESETS[name])
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    stated = {
        "weight-standardized-32": 171.39,
        "weight-standardized-64": 171.39,
        "self-attention-3-levels": 23.332729,
        "self-attention-2-levels-half": 3.062531,
    }
    assert millions == pytest.approx(stated.get(name, millions), rel=0.02)


# ---- defaults that depend on the widths


@pytest.mark.parametrize(
    ("widths", "attention", "groups", "head_dim"),
    [
        ((64, 128, 128), ("none", "full", "none"), 4, 64),  # the default
        ((8,), ("none",), 4, 64),
        ((8, 16), ("none", "full"), 4, 64),
        ((6, 12), ("none", "full"), 3, 64),
        ((8, 8, 8, 8), ("none", "full", "none", "none"), 4, 64),
        ((10, 14), ("none", "full"), 2, 64),
        ((7, 7), ("none", "full"), 1, 64),
        ((8, 96), ("none", "full"), 4, 48),
        ((96, 8, 80), ("none", "full", "none"), 4, 40),  # 80 is in the middle block
        ((68,), ("none",), 4, 34),
    ],
)
def test_options_left_at_none_fit_the_widths_and_are_saved(widths, attention, groups, head_dim, tmp_path):
    torch.manual_seed(0)
    unet = TinyUNet2DModel(8, block_out_channels=widths, layers_per_block=1)
    resolved = {"attention": attention, "norm_num_groups": groups, "attention_head_dim": head_dim}
    assert {name: unet.config[name] for name in resolved} == resolved
    torch.manual_seed(0)
    explicit = TinyUNet2DModel(8, block_out_channels=widths, layers_per_block=1, **resolved)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), explicit.parameters(), strict=True))
    assert unet(images(unet), 3).sample.shape == (2, 3, 8, 8)

    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in resolved} == {**resolved, "attention": list(attention)}
    loaded = TinyUNet2DModel.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in resolved} == resolved


def test_defaults_fit_the_widths_of_another_network_of_the_same_config():
    config = TinyUNet2DModel(sample_size=8, block_out_channels=(8, 8)).config
    config = TinyUNet2DModel.from_config(config, block_out_channels=(9, 9, 9)).config
    assert (config.attention, config.norm_num_groups) == (("none", "full", "none"), 3)


def test_without_attention_any_width_has_the_default_head_dim():
    assert make(block_out_channels=(97, 97), attention="none", mid_attention="none").config.attention_head_dim == 64


# ---- how it is called


def test_a_timestep_may_be_a_number_or_a_tensor():
    unet = make()
    sample = images(unet)
    expected = unet(sample, torch.tensor([7, 7])).sample
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        assert torch.equal(unet(sample, timestep).sample, expected)
    assert not torch.equal(unet(sample, 8).sample, expected)
    assert torch.equal(unet(sample, 7, return_dict=False)[0], expected)


def test_an_image_does_not_depend_on_the_rest_of_its_batch():
    unet = make(num_class_embeds=K)
    sample, timesteps, labels = images(unet, 3), torch.tensor([1, 500, 999]), torch.tensor([0, 1, 3])
    together = unet(sample, timesteps, labels).sample
    apart = [unet(sample[i : i + 1], timesteps[i], labels[i : i + 1]).sample for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_other_sizes_than_its_own_can_be_given():
    unet = make()
    assert unet(torch.randn(1, 3, 16, 4), 0).sample.shape == (1, 3, 16, 4)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_the_callers_and_does_not_change_the_values(memory_format, patch_size):
    unet = make(patch_size=patch_size)
    sample = images(unet)
    expected = unet(sample, 3).sample
    output = unet.to(memory_format=memory_format)(sample.contiguous(memory_format=memory_format), 3).sample
    assert output.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_is_the_callers_whatever_the_weights_are_in(dtype):
    unet = make(time_embedding="fourier")
    sample = images(unet)
    expected = unet(sample, 3).sample
    output = unet.to(dtype)(sample, 3).sample
    assert output.dtype == torch.float32
    assert unet(sample.to(dtype), 3).sample.dtype == dtype
    error = (output - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_is_near_float32_and_gives_gradients_in_float32():
    unet = make(attention="full")
    sample = images(unet)
    expected = unet(sample, 3).sample
    gradients = torch.autograd.grad(expected.square().sum(), list(unet.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        output = unet(sample, 3).sample
    assert output.dtype == torch.float32
    assert (output - expected).norm() / expected.norm() < 0.05
    output.square().sum().backward()
    for parameter, gradient in zip(unet.parameters(), gradients, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).norm() <= 0.15 * gradient.norm() + 1e-3


def test_gradient_checkpointing_changes_nothing_but_memory():
    unet = make(num_class_embeds=K, class_conditioning="scale", attention="full").train()
    checkpointed = copy.deepcopy(unet)
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    for network in (unet, checkpointed):
        network(images(network), 3, torch.tensor([0, 1])).sample.square().sum().backward()
    for a, b in zip(unet.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("kind", "scale_shift"),
    [
        ("full", True),
        ("linear", False),
        pytest.param("full", False, marks=pytest.mark.exhaustive),
        pytest.param("linear", True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_layer_compiles_as_one_graph(kind, scale_shift):
    torch.manual_seed(0)
    classes = {"num_class_embeds": K, "class_conditioning": "scale"}
    options = {"weight_standardization": True, "skip_rescale": True, "attention_head_dim": 8, **classes}
    options["resnet_time_scale_shift"] = "scale_shift" if scale_shift else "default"
    layer = Layer(8, 16, kind, block_config(**options))
    inputs = torch.randn(2, 8, 4, 4), torch.randn(2, 4), torch.randn(2, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


def test_compiled_blocks_compute_the_same_with_torchs_attention():
    unet, captured = make(), []
    plain = unet(images(unet), 3).sample
    unet.compile_repeated_blocks(backend=lambda graph, _: captured.append(graph.code) or graph.forward)
    torch.testing.assert_close(unet(images(unet), 3).sample, plain)
    code = "".join(captured)
    assert "conv2d" in code and "group_norm" in code and "scaled_dot_product_attention" in code
    assert "autograd_function" not in code  # the CPU's own attention


def test_repeated_blocks_are_those_that_diffusers_compiles():
    names = {type(module).__name__ for module in make().modules()}
    assert set(TinyUNet2DModel._repeated_blocks) <= names
    assert set(TinyUNet2DModel._no_split_modules) <= names


# ---- classes


@pytest.mark.parametrize("conditioning", ["add", "scale"])
def test_the_last_row_is_no_class_and_floats_mix_the_rows(conditioning):
    unet = make(num_class_embeds=K, class_conditioning=conditioning)
    sample = images(unet)
    labeled = [unet(sample, 3, torch.tensor([label] * 2)).sample for label in range(K + 1)]
    assert torch.equal(unet(sample, 3).sample, labeled[K])
    for label in range(K):
        assert not torch.allclose(labeled[label], labeled[K])
        one_hot = F.one_hot(torch.tensor([label] * 2), K + 1).float()
        torch.testing.assert_close(unet(sample, 3, one_hot).sample, labeled[label])

    def halfway(w):
        return unet(sample, 3, torch.tensor([[1 - w, w, 0, 0]] * 2)).sample

    assert (halfway(0.51) - halfway(0.49)).norm() < (halfway(1.0) - halfway(0.0)).norm()


def test_a_scaling_class_multiplies_the_feature_map_and_the_time_is_added():
    torch.manual_seed(0)
    block = ResidualBlock(8, 8, block_config(num_class_embeds=K, class_conditioning="scale"))
    torch.nn.init.normal_(block.conv2.weight)
    x, temb, cemb = torch.randn(2, 8, 4, 4), torch.randn(2, 4), torch.randn(2, 4)
    a = block.conv1(block.norm1(x))
    c, t = block.class_proj(cemb)[:, :, None, None], block.time_proj(temb)[:, :, None, None]
    torch.testing.assert_close(block(x, temb, cemb), x + block.conv2(block.norm2(c * a + t)))


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_residual_block_is_that_of_diffusers(scale_shift):
    torch.manual_seed(0)
    norm = "scale_shift" if scale_shift else "default"
    block = ResidualBlock(8, 16, block_config(resnet_time_scale_shift=norm))
    torch.nn.init.normal_(block.conv2.weight)
    stock = ResnetBlock2D(
        in_channels=8, out_channels=16, temb_channels=4, groups=4, eps=1e-5, time_embedding_norm=norm
    )
    names = {"time_proj": "time_emb_proj", "shortcut": "conv_shortcut"}
    for name, parameter in block.named_parameters():
        part, kind = name.split(".")
        stock.get_submodule(names.get(part, part)).get_parameter(kind).data.copy_(parameter)
    x, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    # the network applies the activation to the embedding once for all blocks, diffusers in each block
    torch.testing.assert_close(block(x, F.silu(temb)), stock(x, temb))


def test_with_scale_and_shift_a_scaling_class_multiplies_the_times_scale():
    torch.manual_seed(0)
    options = {"class_conditioning": "scale", "resnet_time_scale_shift": "scale_shift"}
    block = ResidualBlock(8, 8, block_config(num_class_embeds=K, **options))
    torch.nn.init.normal_(block.conv2.weight)
    x, temb, cemb = torch.randn(2, 8, 4, 4), torch.randn(2, 4), torch.randn(2, 4)
    a = block.norm2(block.conv1(block.norm1(x)))
    c = block.class_proj(cemb)[:, :, None, None]
    s, t = block.time_proj(temb)[:, :, None, None].chunk(2, dim=1)
    torch.testing.assert_close(block(x, temb, cemb), x + block.conv2(F.silu(c * (1 + s) * a + t)))


# ---- parts, compared with their equations


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    group_width=st.sampled_from([1, 3, 8, 16]),
    size=st.integers(2, 9),
    act_fn=st.sampled_from([None, "silu", "gelu"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    channels_last=st.booleans(),
)
def test_norm_is_group_norm_and_activation_to_the_rounding_of_its_type(
    batch, groups, group_width, size, act_fn, dtype, channels_last
):
    channels = groups * group_width
    generator = torch.Generator().manual_seed(channels * size)
    norm = GroupNormAct(groups, channels, act_fn)
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)
    x = 1 + 2 * torch.randn(batch, channels, size, size, generator=generator)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    act = {None: lambda y: y, "silu": F.silu, "gelu": F.gelu}[act_fn]

    def reference(x):
        y = x.double().reshape(batch, groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        y = y.view(x.shape) * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
        return act(y)

    x, y = x.requires_grad_(), x.double().requires_grad_()
    norm = norm.double() if dtype == torch.float64 else norm
    out, expected = norm(x), reference(y)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)

    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
    (gradient,) = torch.autograd.grad(out, x, direction)
    (expected,) = torch.autograd.grad(expected, y, direction.double())
    scale = expected.abs().max() + 1e-3
    torch.testing.assert_close(gradient.double() / scale, expected / scale, rtol=0, atol=2 * tolerance)


def test_linear_attention_is_its_equation_and_ignores_the_order_of_the_positions():
    block = AttentionBlock(8, "linear", block_config(norm_num_groups=2))
    qkv = torch.randn(2, 9, 3, 2, 4)
    expected = torch.empty(2, 9, 2, 4)
    for b in range(2):
        for head in range(2):
            q, k, v = qkv[b, :, :, head].unbind(dim=1)  # (L, d) each
            context = torch.softmax(k, dim=0).T @ v
            expected[b, :, head] = torch.softmax(q, dim=1) @ context
    torch.testing.assert_close(block.attend(qkv), expected)
    order = torch.randperm(9)
    torch.testing.assert_close(block.attend(qkv[:, order]), expected[:, order])


def test_standardized_weights_have_mean_0_and_variance_1_over_fan_in():
    torch.manual_seed(0)
    conv = StandardizedConv2d(4, 6, 3, bias=False)
    torch.nn.init.normal_(conv.weight, mean=5.0, std=3.0)
    taps = torch.eye(36).view(36, 4, 3, 3)
    weight = conv(taps).view(36, 6)  # each output is one weight
    torch.testing.assert_close(weight.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.var(0, correction=0), torch.full((6,), 1 / 36), atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        scaled = copy.deepcopy(conv)
        scaled.weight.mul_(2).add_(1)
    torch.testing.assert_close(scaled(taps), conv(taps), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fan_in", [576, 13_824, 20_000])
def test_standardized_weights_do_not_depend_on_the_scale_of_the_weights(fan_in):
    torch.manual_seed(0)
    conv = StandardizedConv2d(fan_in, 4, 1)
    x = torch.randn(8, fan_in, 1, 1)
    with torch.no_grad():
        before = conv(x)
        conv.weight.mul_(0.1)
        assert (conv(x) - before).norm() < 1e-3 * before.norm()


def test_a_config_from_before_the_eps_of_weight_standardization_means_the_eps_of_then(tmp_path):
    unet = make(weight_standardization=True, weight_standardization_eps=1e-5)
    assert make(weight_standardization=True).config.weight_standardization_eps == 1e-10
    unet.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("weight_standardization_eps") == 1e-5
    file.write_text(json.dumps(config))
    loaded = TinyUNet2DModel.from_pretrained(tmp_path)
    assert loaded.config.weight_standardization_eps == 1e-5
    torch.testing.assert_close(loaded(images(unet), 3).sample, unet(images(unet), 3).sample)


def test_patches_are_pixel_unshuffle_and_back():
    unet = make(patch_size=2)
    inside = {}
    unet.conv_in.register_forward_hook(lambda module, args, output: inside.update(x=args[0]))
    sample = images(unet)
    unet(sample, 0)
    assert torch.equal(inside["x"], F.pixel_unshuffle(sample, 2))


def test_a_block_with_skip_rescale_keeps_the_variance_of_independent_sums():
    torch.manual_seed(0)
    plain, rescaled = (ResidualBlock(8, 8, block_config(skip_rescale=rescale)) for rescale in (False, True))
    rescaled.load_state_dict(plain.state_dict())
    x, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    torch.testing.assert_close(rescaled(x, temb) * math.sqrt(2), plain(x, temb))


# ---- bad input, refused before anything is allocated


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sample_size": 9}, "multiple of 2"),
        ({"sample_size": 12, "patch_size": 4}, "multiple of 8.*smaller patch_size.*block_out_channels.* 16"),
        ({"sample_size": (12, 15)}, "sample_size 12x15 .* multiple of 2.*the nearest size is 12x16"),
        ({"sample_size": (12, 16, 3)}, "sample_size \\(12, 16, 3\\)"),
        ({"patch_size": (1, 2)}, "patch_size \\(1, 2\\)"),
        ({"norm_num_groups": [4]}, "norm_num_groups \\[4\\]"),
        ({"mid_attention": ("none", "full")}, "mid_attention \\('none', 'full'\\)"),
        ({"norm_num_groups": 3}, "norm_num_groups 3 does not divide the width 8"),
        ({"attention": ("none",)}, "1 entries for 2 levels"),
        ({"attention": "fulll"}, "Unknown attention 'fulll'.*Did you mean 'full'"),
        ({"attention": ("none", "fulll")}, "Unknown attention 'fulll'"),
        ({"mid_attention": "lineer"}, "Did you mean 'linear'"),
        ({"time_embedding": "sinusoid"}, "Did you mean 'sinusoidal'"),
        ({"act_fn": "relu"}, "one of silu, gelu"),
        ({"downsample": "convolution"}, "one of conv, maxpool"),
        ({"upsample": "bilinar"}, "Did you mean 'bilinear'"),
        ({"class_conditioning": "added"}, "Did you mean 'add'"),
        ({"resnet_time_scale_shift": "scale-shift"}, "Did you mean 'scale_shift'"),
        ({"patch_size": 3}, "one of 1, 2, 4"),
        ({"attention_head_dim": 5}, "attention_head_dim 5 does not divide the width 8"),
        ({"attention_head_dim": 0}, "attention_head_dim 0"),
        ({"norm_num_groups": None, "attention": None, "block_out_channels": (0, 8)}, "block_out_channels 0"),
        ({"dropout": 1.5}, "dropout 1.5"),
        ({"weight_standardization_eps": 0}, "weight_standardization_eps 0"),
        ({"num_class_embeds": 0}, "num_class_embeds 0"),
        ({"layers_per_block": 2.5}, "layers_per_block 2.5"),
        ({"block_out_channels": (8, 10**9)}, "block_out_channels 1000000000"),
        ({"block_out_channels": (4096, 4096), "layers_per_block": 32}, "parameters"),
        ({"block_out_channels": (), "attention": ()}, "0 levels"),
        ({"block_out_channels": (), "attention": None}, "0 levels"),
        ({"block_out_channels": (8,) * 9, "attention": None, "sample_size": 256}, "9 levels.*1 to 8"),
        ({"num_class_embeds": 10**12}, "num_class_embeds 1000000000000"),
        ({"time_embedding": "learned", "num_train_timesteps": 10**12}, "num_train_timesteps 1000000000000"),
        ({"x_prediction": True, "out_channels": 6}, "x_prediction .* out_channels 6 and in_channels 3"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TinyUNet2DModel(**{**TINY, **options})


@pytest.mark.parametrize(
    "options, args, message",
    [
        ({}, (torch.zeros(2, 1, 8, 8), 0), "takes \\(batch, 3"),
        ({}, (torch.zeros(2, 3, 8, 9), 0), "multiples of 2"),
        ({}, (torch.zeros(2, 3, 8, 8), torch.zeros(3)), "one for each of 2 images"),
        ({}, (torch.zeros(2, 3, 8, 8), 0, torch.tensor([0, 1])), "without classes"),
        ({"num_class_embeds": K}, (torch.zeros(2, 3, 8, 8), 0, torch.tensor([0, 4])), "class label 4 .* from 0 to 3"),
        ({"num_class_embeds": K}, (torch.zeros(2, 3, 8, 8), 0, torch.tensor([-1, 0])), "class label -1"),
        ({"num_class_embeds": K}, (torch.zeros(2, 3, 8, 8), 0, torch.tensor([0])), "shape \\(1,\\)"),
        ({"num_class_embeds": K}, (torch.zeros(2, 3, 8, 8), 0, torch.zeros(2, K)), "shape \\(2, 4\\)"),
        ({"time_embedding": "learned"}, (torch.zeros(2, 3, 8, 8), 1000), "timestep 1000 .* from 0 to 999"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(options, args, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(*args)
