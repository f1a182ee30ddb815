"""The architecture of the paper, its initialization, and classes as further channels."""

import math

import pytest
import torch
from torch import nn

from tiny_diffusers import TinyDCGANDiscriminator, TinyDCGANGenerator
from tiny_diffusers.models.layers_tiny import height_and_width


K = 3
NETWORKS = [TinyDCGANGenerator, TinyDCGANDiscriminator]
OPTIONS = [
    {},
    {"sample_size": 12, "block_out_channels": (8, 16)},
    {"block_out_channels": (8,)},
    {"num_class_embeds": K},
    {"num_class_embeds": K, "class_embed_dim": 5},
    {"sample_size": (12, 16)},
    {"sample_size": (12, 16), "num_conditions": 2},
    {"num_class_embeds": K, "num_conditions": 2},
]
CONDITIONS = torch.tensor([[0.5, 1], [-1, 2], [math.nan, math.nan], [0, -1]])


def make(network: type, channels: int = 1, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"out_channels": channels, "latent_dim": 6} if network is TinyDCGANGenerator else {"in_channels": channels}
    return network(**{"sample_size": 8, "block_out_channels": (8, 8), **sizes, **options})


def inputs(network: nn.Module, batch_size: int = 4) -> torch.Tensor:
    config, generator = network.config, torch.Generator().manual_seed(1)
    if isinstance(network, TinyDCGANGenerator):
        return torch.randn(batch_size, config.latent_dim, generator=generator)
    shape = (batch_size, config.in_channels, *height_and_width(config.sample_size))
    return torch.rand(shape, generator=generator) * 2 - 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_option_trains_every_parameter_and_survives_a_save(network, options, tmp_path):
    model = make(network, **options)
    given = {}
    if "num_class_embeds" in options:
        given["class_labels"] = torch.tensor([0, 1, 2, K])
    if "num_conditions" in options:
        given["conditions"] = CONDITIONS.clone().requires_grad_()
    model.train()(inputs(model), **given)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    if "conditions" in given:
        assert (given["conditions"].grad != 0).equal(~CONDITIONS.isnan())

    output = model.eval()(inputs(model), **given)[0]
    size = height_and_width(model.config.sample_size)
    assert output.shape == ((4, 1, *size) if network is TinyDCGANGenerator else (4,))
    model.save_pretrained(tmp_path)
    loaded = network.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs(model), **given, return_dict=False)[0], output)
    assert loaded.config.block_out_channels == model.config.block_out_channels
    assert loaded.config.sample_size == model.config.sample_size


def test_at_64_pixels_it_is_the_network_of_the_paper():
    """Compares layers, weights and order with PyTorch's DCGAN tutorial, which follows the paper."""
    nz = nc = 3

    def up(cin, cout, *how):
        return [nn.ConvTranspose2d(cin, cout, 4, *how, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]

    def down(cin, cout):
        return [nn.Conv2d(cin, cout, 4, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.LeakyReLU(0.2)]

    generator = nn.Sequential(
        *(*up(nz, 64, 1, 0), *up(64, 32, 2, 1), *up(32, 16, 2, 1), *up(16, 8, 2, 1)),
        *(nn.ConvTranspose2d(8, nc, 4, 2, 1, bias=False), nn.Tanh()),
    )
    discriminator = nn.Sequential(
        *(nn.Conv2d(nc, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)),
        *(*down(8, 16), *down(16, 32), *down(32, 64), nn.Conv2d(64, 1, 4, 1, 0, bias=False)),
    )
    ours = [TinyDCGANGenerator(64, nc, nz, (8, 16, 32, 64)), TinyDCGANDiscriminator(64, nc, (8, 16, 32, 64))]
    for theirs, network in zip((generator, discriminator), ours, strict=True):
        network.load_state_dict(dict(zip(network.state_dict(), theirs.state_dict().values(), strict=True)))
        x = inputs(network)
        expected = theirs(x[:, :, None, None] if network is ours[0] else x)
        torch.testing.assert_close(network(x)[0], expected.view_as(network(x)[0]))


def test_its_initial_weights_are_those_of_the_paper():
    for network in (TinyDCGANGenerator(), TinyDCGANDiscriminator()):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05) and module.bias is None
            if isinstance(module, nn.BatchNorm2d):
                assert module.weight.mean().item() == pytest.approx(1.0, abs=0.01)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.3) and not module.bias.any()


@pytest.mark.parametrize("network", NETWORKS)
def test_classes_are_labels_or_mixing_weights_and_none_is_the_last_row(network):
    model = make(network, num_class_embeds=K).eval()
    x = inputs(model)
    with torch.no_grad():
        of_class = [model(x, torch.full((4,), k))[0] for k in range(K + 1)]
        assert torch.equal(model(x)[0], of_class[K])
        assert all(not torch.allclose(of_class[K], of_class[k]) for k in range(K))
        one_hot = torch.nn.functional.one_hot(torch.full((4,), 1), K + 1).float()
        assert torch.equal(model(x, one_hot)[0], of_class[1])


def test_a_class_embedding_is_tiled_over_the_image_as_further_channels():
    model = make(TinyDCGANDiscriminator, channels=3, num_class_embeds=K, class_embed_dim=5).eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = inputs(model)
    model(x, torch.tensor([0, 1, 2, 1]))
    rows = model.class_embed.table.weight.T[[0, 1, 2, 1]]
    assert seen[0].shape == (4, 3 + 5, 8, 8)
    assert torch.equal(seen[0][:, :3], x)
    assert torch.equal(seen[0][:, 3:], rows[:, :, None, None].expand(-1, -1, 8, 8))


@pytest.mark.parametrize("network", NETWORKS)
def test_class_and_conditions_share_an_embedding_and_none_of_them_is_a_learned_vector(network):
    model = make(network, num_class_embeds=K, num_conditions=2).eval()
    x, labels, embedding = inputs(model), torch.tensor([0, 1, 2, 1]), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: embedding.append(args[0][:, -16:, 0, 0]))
    with torch.no_grad():
        model(x, labels, conditions=CONDITIONS)
        expected = model.class_embed(labels, 4) + model.condition_embed(CONDITIONS, 4)
        torch.testing.assert_close(embedding[0], expected)
        assert torch.equal(model(x)[0], model(x, torch.full((4,), K), conditions=torch.full((4, 2), math.nan))[0])


@pytest.mark.parametrize("network", NETWORKS)
def test_in_evaluation_an_image_does_not_depend_on_its_batch(network):
    model = make(network)
    model.train()(inputs(model))
    model.eval()
    torch.testing.assert_close(model(inputs(model))[0][:1], model(inputs(model)[:1])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_size": 10}, ["10", "multiple of 4"]),
        ({"block_out_channels": ()}, ["0 levels"]),
        ({"block_out_channels": (8, 10**9)}, ["block_out_channels"]),
        ({"num_class_embeds": 0}, ["num_class_embeds", "0"]),
        ({"class_embed_dim": None}, ["class_embed_dim"]),
        ({"sample_size": None}, ["sample_size None"]),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_refused(network, options, words):
    with pytest.raises(ValueError) as error:
        make(network, **options)
    for word in words:
        assert word in str(error.value)


def test_a_first_convolution_that_would_fill_the_memory_is_refused():
    message = r"block_out_channels \(4096,\), latent_dim 65536, sample_size 1024 .* 4e\+09 .* more levels"
    with pytest.raises(ValueError, match=message):
        TinyDCGANGenerator(sample_size=1024, latent_dim=65536, block_out_channels=(4096,))
    given = {"latent_dim": 1, "class_embed_dim": 1024, "num_class_embeds": 2}
    with pytest.raises(ValueError, match=r"sample_size 1024, class_embed_dim 1024 .* more levels"):
        TinyDCGANGenerator(sample_size=1024, block_out_channels=(64,), **given)


@pytest.mark.parametrize("network", NETWORKS)
def test_wrong_labels_and_conditions_are_refused(network):
    plain, model = make(network), make(network, num_class_embeds=K, num_conditions=2)
    with pytest.raises(ValueError, match="without them.*num_conditions"):
        plain(inputs(plain), conditions=CONDITIONS)
    with pytest.raises(ValueError, match=r"conditions has shape \(4, 3\)"):
        model(inputs(model), conditions=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="without classes"):
        plain(inputs(plain), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="class label 4"):
        model(inputs(model), torch.tensor([0, 1, 2, K + 1]))
    with pytest.raises(ValueError, match="shape"):
        model(inputs(model), torch.tensor([0, 1]))


def test_tensors_of_a_wrong_size_are_refused():
    with pytest.raises(ValueError, match=r"takes \(batch, 6\)"):
        make(TinyDCGANGenerator)(torch.zeros(2, 5))
    for shape in [(2, 3, 8, 8), (2, 1, 16, 16)]:
        with pytest.raises(ValueError, match=r"takes \(batch, 1, 8, 8\)"):
            make(TinyDCGANDiscriminator)(torch.zeros(shape))
