"""Options, calls and equations of the transformer, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock

from tiny_diffusers.models import TinyTransformer2DModel
from tiny_diffusers.models.layers_tiny import height_and_width
from tiny_diffusers.models.transformer_tiny import (
    CHOICES,
    PRESETS,
    TransformerBlock,
    grid_positions,
    position_angles,
    rotate,
)


TINY = {"sample_size": 8, "patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4}
K = 3  # classes

# every option of the constructor at another value than its default
OPTIONS = [
    {},
    {"in_channels": 1, "out_channels": 2},
    {"patch_size": 1},
    {"patch_size": 4, "num_layers": 1},
    {"attention_head_dim": 8, "mlp_ratio": 0.5},
    *({"position_embedding": kind} for kind in CHOICES["position_embedding"]),
    {"num_layers": 5, "long_skips": True, "position_embedding": "relative"},
    {"dropout": 0.5},
    {"time_embedding": "fourier", "act_fn": "silu"},
    {"time_embedding": "learned", "num_train_timesteps": 20},
    {"time_embedding_dim": 12, "num_class_embeds": K},
    *({"sample_size": (4, 12), "position_embedding": kind} for kind in CHOICES["position_embedding"]),
    {"num_class_embeds": K, "num_conditions": 2},
]


def make(seed: int = 0, **options) -> TinyTransformer2DModel:
    """Builds a network whose outputs are not zero. Those of a new network are, as its last layer is."""
    torch.manual_seed(seed)
    transformer = TinyTransformer2DModel(**{**TINY, **options})
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return transformer.eval()


def images(transformer: TinyTransformer2DModel, batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = height_and_width(transformer.config.sample_size)
    return torch.randn(batch_size, transformer.config.in_channels, *size, generator=generator)


def shuffle_patches(x: torch.Tensor, order: torch.Tensor, patch_size: int) -> torch.Tensor:
    patches = F.pixel_unshuffle(x, patch_size)
    return F.pixel_shuffle(patches.flatten(2)[..., order].view_as(patches), patch_size)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_keeps_the_size_trains_every_parameter_and_survives_a_save(options, tmp_path):
    transformer = make(**options)
    sample, timesteps = images(transformer), torch.tensor([3, 17])
    given = {"class_labels": torch.tensor([0, K])} if "num_class_embeds" in options else {}
    if "num_conditions" in options:
        given["conditions"] = torch.tensor([[0.5, -1.0], [float("nan")] * 2])

    output = transformer(sample, timesteps, **given).sample
    assert output.shape == (2, transformer.config.out_channels, *sample.shape[2:])

    transformer.train()(sample, timesteps, **given).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in transformer.parameters())

    transformer.eval().save_pretrained(tmp_path)
    loaded = TinyTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample, timesteps, **given).sample, output)
    public = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in public} == public


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    transformer = TinyTransformer2DModel(**TINY, long_skips=True)
    assert transformer(images(transformer), 5).sample.abs().max() == 0
    x, emb = torch.randn(2, 16, 8), torch.randn(2, 8)
    first, last = transformer.blocks
    assert torch.equal(first(x, emb), x)
    torch.testing.assert_close(last(x, emb, skip=torch.randn(2, 16, 8)), x)


# Table 1 of the paper, for latents of 32x32x4 and 1,000 classes; its positions are fixed and count for nothing here
@pytest.mark.parametrize(("name", "millions"), [("dit-ti-2", 8.36), ("dit-s-2", 33), ("dit-b-2", 130)])
def test_presets_have_the_parameters_of_dit(name, millions):
    with torch.device("meta"):
        transformer = TinyTransformer2DModel(
            sample_size=32, in_channels=4, out_channels=8, num_class_embeds=1000, **PRESETS[name]
        )
    assert sum(p.numel() for p in transformer.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_parameters_are_those_of_the_layers():
    D, E, L, C = 8, 12, 3, 3
    transformer = make(num_layers=L, time_embedding_dim=E, num_class_embeds=K, long_skips=True)
    block = 6 * D * (E + 1) + 4 * D * (D + 1) + 4 * D * (D + 1) + D * (4 * D + 1)  # modulation, attention, MLP
    embeddings = E * (256 + 1) + E * (E + 1) + E * (K + 1) + D * (4 * C + 1)
    output = 2 * D * (E + 1) + 4 * C * (D + 1)
    skips = D * (2 * D + 1)  # one pair of three blocks
    expected = L * block + embeddings + output + skips
    assert sum(p.numel() for p in transformer.parameters()) == expected


# ---- positions


def test_without_positions_a_permutation_of_the_patches_permutes_the_output():
    transformer = make(position_embedding="none", long_skips=True)
    sample, order = images(transformer), torch.randperm(16)
    shuffled = transformer(shuffle_patches(sample, order, 2), 3).sample
    torch.testing.assert_close(shuffled, shuffle_patches(transformer(sample, 3).sample, order, 2))


@pytest.mark.parametrize("kind", ["sinusoidal", "fourier", "learned", "relative"])
def test_with_positions_it_does_not(kind):
    transformer = make(position_embedding=kind)
    sample, order = images(transformer), torch.arange(16).flip(0)
    shuffled = transformer(shuffle_patches(sample, order, 2), 3).sample
    assert not torch.allclose(shuffled, shuffle_patches(transformer(sample, 3).sample, order, 2), atol=1e-3)


def test_rotary_attention_is_unchanged_when_the_same_offset_is_added_to_all_positions():
    torch.manual_seed(0)
    block = make(position_embedding="relative", attention_head_dim=8).blocks[0]
    x, positions = torch.randn(2, 12, 16), grid_positions(3, 4)
    here, there, other = (
        block.attend(x, position_angles(where, "relative", 4))
        for where in (positions, positions + torch.tensor([5.0, -2.0]), positions * 2)
    )
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(other, here, atol=1e-3)


def test_a_rotation_keeps_the_norm_and_turns_each_pair_by_its_angle():
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(5, 4)
    turned = rotate(x, angles)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    pairs, turned = (torch.complex(*y.chunk(2, dim=-1)) for y in (x, turned))
    torch.testing.assert_close(turned, pairs * torch.polar(torch.ones(5, 4), angles)[:, None])


def test_angles_are_of_the_row_and_of_the_column():
    positions = grid_positions(2, 3)
    assert positions.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    for kind, base in (("sinusoidal", 10_000), ("relative", 100)):
        angles = position_angles(torch.tensor([[5.0, 7.0]]), kind, 4)
        torch.testing.assert_close(angles, torch.tensor([[5.0, 5 / base**0.5, 7.0, 7 / base**0.5]]))


def test_fourier_features_of_two_places_are_alike_as_by_a_gaussian_kernel_of_their_distance():
    """The mean cosine of N(0, s^2) frequencies at a distance r is exp(-s^2 r^2 / 2), in every direction."""
    offsets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [2.0, 2.0], [3.0, -4.0]])
    found = position_angles(offsets, "fourier", 4000).cos().mean(dim=1)
    expected = torch.exp(-((torch.pi / 8) ** 2) / 2 * offsets.square().sum(dim=1))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_other_sizes_than_its_own_can_be_given_unless_positions_are_learned():
    for kind in ("none", "sinusoidal", "fourier", "relative"):
        assert make(position_embedding=kind)(torch.randn(1, 3, 12, 4), 0).sample.shape == (1, 3, 12, 4)


# ---- blocks


def test_a_block_is_that_of_diffusers():
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 4, "time_embedding_dim": 8, "mlp_ratio": 4}
    block = TransformerBlock({**config, "act_fn": "gelu", "dropout": 0.0})
    stock = BasicTransformerBlock(
        8, 2, 4, activation_fn="gelu", attention_bias=True, norm_type="ada_norm_zero", num_embeds_ada_norm=1,
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    torch.nn.init.normal_(block.modulation.weight)
    x, emb = torch.randn(2, 5, 8), torch.randn(2, 8)
    stock.norm1.emb.forward = lambda *args, **kwargs: emb
    layers = {
        stock.norm1.linear: block.modulation,
        stock.attn1.to_out[0]: block.to_out,
        stock.ff.net[0].proj: block.mlp[0],
        stock.ff.net[2]: block.mlp[2],
    }
    for theirs, ours in layers.items():
        theirs.load_state_dict(ours.state_dict())
    for i, layer in enumerate((stock.attn1.to_q, stock.attn1.to_k, stock.attn1.to_v)):
        layer.weight.data, layer.bias.data = (p.data.chunk(3)[i] for p in (block.to_qkv.weight, block.to_qkv.bias))
    # the network applies the activation to the embedding once for all blocks, diffusers in each block
    torch.testing.assert_close(block(x, F.silu(emb)), stock(x, timestep=0, class_labels=0))


@pytest.mark.parametrize(("num_layers", "pairs"), [(1, []), (2, [(0, 1)]), (5, [(0, 4), (1, 3)])])
def test_long_skips_join_the_first_blocks_to_the_last(num_layers, pairs):
    transformer = make(num_layers=num_layers, long_skips=True)
    outputs, found = [], []
    for i, block in enumerate(transformer.blocks):
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
        if block.skip_proj is not None:
            block.register_forward_pre_hook(
                lambda block, args, i=i: found.append((next(j for j, out in enumerate(outputs) if out is args[3]), i))
            )
    transformer(images(transformer), 3)
    assert sorted(found) == pairs


# ---- how it is called


def test_a_timestep_may_be_a_number_or_a_tensor():
    transformer = make()
    sample = images(transformer)
    expected = transformer(sample, torch.tensor([7, 7])).sample
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7.0, 7.0])):
        assert torch.equal(transformer(sample, timestep).sample, expected)
    assert not torch.equal(transformer(sample, 8).sample, expected)
    assert torch.equal(transformer(sample, 7, return_dict=False)[0], expected)


def test_an_image_does_not_depend_on_the_rest_of_its_batch():
    transformer = make(num_class_embeds=K, position_embedding="relative")
    sample, timesteps, labels = images(transformer, 3), torch.tensor([1, 500, 999]), torch.tensor([0, 1, 3])
    together = transformer(sample, timesteps, labels).sample
    apart = [transformer(sample[i : i + 1], timesteps[i], labels[i : i + 1]).sample for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CHOICES["position_embedding"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_the_callers_whatever_the_weights_are_in(dtype, kind):
    transformer = make(position_embedding=kind, long_skips=True)
    sample = images(transformer)
    expected = transformer(sample, 3).sample
    output = transformer.to(dtype)(sample, 3).sample
    assert output.dtype == torch.float32
    assert transformer(sample.to(dtype), 3).sample.dtype == dtype
    error = (output - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_is_near_float32_and_gives_gradients_in_float32():
    transformer = make(position_embedding="relative", long_skips=True)
    sample = images(transformer)
    expected = transformer(sample, 3).sample
    gradients = torch.autograd.grad(expected.square().sum(), list(transformer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        output = transformer(sample, 3).sample
    assert output.dtype == torch.float32
    assert (output - expected).norm() / expected.norm() < 0.05
    output.square().sum().backward()
    for parameter, gradient in zip(transformer.parameters(), gradients, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).norm() <= 0.15 * gradient.norm() + 1e-3


def test_gradient_checkpointing_changes_nothing_but_memory():
    transformer = make(num_class_embeds=K, position_embedding="relative", long_skips=True).train()
    checkpointed = copy.deepcopy(transformer)
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    for network in (transformer, checkpointed):
        network(images(network), 3, torch.tensor([0, 1])).sample.square().sum().backward()
    for a, b in zip(transformer.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_blocks_compute_the_same_with_torchs_attention():
    transformer, captured = make(position_embedding="relative", long_skips=True), []
    plain = transformer(images(transformer), 3).sample
    backend = {"backend": lambda graph, _: captured.append(graph.code) or graph.forward}
    transformer.compile_repeated_blocks(fullgraph=True, **backend)
    torch.testing.assert_close(transformer(images(transformer), 3).sample, plain)
    code = "".join(captured)
    assert "scaled_dot_product_attention" in code and "autograd_function" not in code
    assert TinyTransformer2DModel._no_split_modules == TinyTransformer2DModel._repeated_blocks == ["TransformerBlock"]


def test_the_last_row_is_no_class_and_floats_mix_the_rows():
    transformer = make(num_class_embeds=K)
    sample = images(transformer)
    labeled = [transformer(sample, 3, torch.tensor([label] * 2)).sample for label in range(K + 1)]
    assert torch.equal(transformer(sample, 3).sample, labeled[K])
    for label in range(K):
        assert not torch.allclose(labeled[label], labeled[K])
        one_hot = F.one_hot(torch.tensor([label] * 2), K + 1).float()
        torch.testing.assert_close(transformer(sample, 3, one_hot).sample, labeled[label])

    def halfway(w):
        return transformer(sample, 3, torch.tensor([[1 - w, w, 0, 0]] * 2)).sample

    assert (halfway(0.51) - halfway(0.49)).norm() < (halfway(1.0) - halfway(0.0)).norm()


# ---- bad input, refused before anything is allocated


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sample_size": 9}, "sample_size 9 is not possible with patches of 2 pixels.*smaller patch_size"),
        ({"patch_size": 3}, "one of 1, 2, 4"),
        ({"position_embedding": "rotary"}, "one of none, sinusoidal, fourier, learned, relative"),
        ({"position_embedding": "sinusoid"}, "Did you mean 'sinusoidal'"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "'sinusoidal'.*the width, 6, must be a multiple of 4"),
        ({"position_embedding": "relative", "attention_head_dim": 6}, "attention_head_dim, 6, .* multiple of 4"),
        (
            {"position_embedding": "fourier", "num_attention_heads": 1, "attention_head_dim": 5},
            "the width, 5, must be a multiple of 2",
        ),
        ({"act_fn": "relu"}, "one of silu, gelu"),
        ({"time_embedding": "sinusoid"}, "Did you mean 'sinusoidal'"),
        ({"num_layers": None}, "num_layers None"),
        ({"num_layers": 10**9}, "num_layers 1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"attention_head_dim": None}, "attention_head_dim None"),
        ({"mlp_ratio": 0}, "mlp_ratio 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio nan"),
        ({"mlp_ratio": "4"}, "mlp_ratio '4'"),
        ({"dropout": 1.5}, "dropout 1.5"),
        ({"num_class_embeds": 0}, "num_class_embeds 0"),
        ({"num_layers": 64, "num_attention_heads": 256, "attention_head_dim": 64}, "parameters"),
        ({"position_embedding": "learned", "sample_size": 10**8}, "sample_size 100000000"),
        (
            {"position_embedding": "learned", "sample_size": 1024, "patch_size": 1, "attention_head_dim": 2048},
            "parameters",
        ),
        ({"time_embedding": "learned", "num_train_timesteps": 10**12}, "num_train_timesteps 1000000000000"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TinyTransformer2DModel(**{**TINY, **options})


@pytest.mark.parametrize(
    "options, args, message",
    [
        ({}, (torch.zeros(2, 1, 8, 8), 0), "takes \\(batch, 3"),
        ({}, (torch.zeros(2, 3, 8, 9), 0), "multiples of 2"),
        ({"position_embedding": "learned"}, (torch.zeros(2, 3, 8, 4), 0), "learned positions and takes 8 and 8"),
        ({}, (torch.zeros(2, 3, 8, 8), torch.zeros(3)), "one for each of 2 images"),
        ({}, (torch.zeros(2, 3, 8, 8), 0, torch.tensor([0, 1])), "without classes"),
        ({"num_class_embeds": K}, (torch.zeros(2, 3, 8, 8), 0, torch.tensor([0, 4])), "class label 4 .* from 0 to 3"),
        ({"num_class_embeds": K}, (torch.zeros(2, 3, 8, 8), 0, torch.zeros(2, K)), "shape \\(2, 4\\)"),
        ({"time_embedding": "learned"}, (torch.zeros(2, 3, 8, 8), 1000), "timestep 1000 .* from 0 to 999"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(options, args, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(*args)
