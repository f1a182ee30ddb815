"""Both terms of the evidence lower bound, compared with closed forms and exact likelihoods."""

import math

import pytest
import torch
from torch import nn

from tiny_diffusers import TinyVAEModel
from tiny_diffusers.models.layers_tiny import height_and_width
from tiny_diffusers.models.vae_tiny import LOG_CDFS, discretized_log_prob


TINY = {"sample_size": 8, "in_channels": 1, "latent_dim": 3, "block_out_channels": (8, 8)}
OPTIONS = [
    {},
    {"in_channels": 3},
    {"sample_size": 12, "latent_dim": 17, "block_out_channels": (8, 16)},
    {"layers_per_block": 2},
    {"reconstruction": "gaussian"},
    {"reconstruction": "bernoulli"},
    {"reconstruction": "bernoulli", "num_levels": 2},
    {"reconstruction": "mse"},
    {"num_levels": 16},
    {"sample_size": (12, 16)},
    {"sample_size": (12, 16), "in_channels": 2, "num_conditions": 2},
    {"num_class_embeds": 3},
    {"num_class_embeds": 3, "num_conditions": 2, "class_embed_dim": 5},
]


def make(**options) -> TinyVAEModel:
    torch.manual_seed(0)
    vae = TinyVAEModel(**{**TINY, **options})
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return vae.eval()


def images(vae: TinyVAEModel, batch_size: int = 2, seed: int = 1) -> torch.Tensor:
    """Draws images at the 256 levels."""
    config, generator = vae.config, torch.Generator().manual_seed(seed)
    shape = (batch_size, config.in_channels, *height_and_width(config.sample_size))
    return torch.randint(256, shape, generator=generator) / 127.5 - 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_every_parameter_and_survives_a_save(options, tmp_path):
    vae = make(**options)
    sample, noise, given = images(vae), torch.randn(2, vae.config.latent_dim), {}
    if "num_class_embeds" in options:
        given["class_labels"] = torch.tensor([0, 3])
    if "num_conditions" in options:
        given["conditions"] = torch.tensor([[0.5, -1], [math.nan, math.nan]], requires_grad=True)
    output = vae(sample, noise, **given)
    assert output.sample.shape == sample.shape
    assert output.reconstruction_loss.shape == output.kl.shape == (2,)

    vae.train()(sample, noise, **given).reconstruction_loss.add(output.kl).sum().backward()
    vae(sample, noise, **given).kl.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())
    if "conditions" in given:
        assert (given["conditions"].grad != 0).tolist() == [[True, True], [False, False]]

    vae.eval().save_pretrained(tmp_path)
    loaded = TinyVAEModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded(sample, noise, **given).to_tuple(), output.to_tuple(), strict=True)
    )
    assert loaded.config.block_out_channels == vae.config.block_out_channels
    assert loaded.config.sample_size == vae.config.sample_size


def test_encoder_and_decoder_see_class_and_conditions():
    vae = make(num_class_embeds=3, num_conditions=2)
    sample, latents = images(vae, 1), torch.zeros(1, 3)
    null = {"class_labels": torch.tensor([3]), "conditions": torch.full((1, 2), math.nan)}
    given = [{}, {"class_labels": torch.tensor([1])}, {"conditions": torch.tensor([[1.0, 0]])}]
    with torch.no_grad():
        assert torch.equal(vae.decode(latents), vae.decode(latents, **null))
        for function in (lambda **each: vae.encode(sample, **each).mean, lambda **each: vae.decode(latents, **each)):
            outputs = [function(**each) for each in given]
            assert all(not torch.allclose(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(ValueError, match="without them.*num_conditions"):
        make().decode(latents, conditions=torch.zeros(1, 2))


@pytest.mark.parametrize("log_cdf", LOG_CDFS.values(), ids=LOG_CDFS)
@pytest.mark.parametrize("num_levels", [2, 16, 256])
def test_a_discretized_likelihood_sums_to_one(log_cdf, num_levels):
    levels = torch.linspace(-1, 1, num_levels, dtype=torch.float64).view(-1, 1, 1)
    mean = torch.tensor([-30.0, -1.0, -0.503, 0.0, 0.2, 1.0, 2.5]).view(1, -1, 1)
    log_scale = torch.tensor([-7.0, -4.0, -2.0, 0.0, 2.0])
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.float64, 1e-8)):
        arguments = (tensor.to(dtype) for tensor in (levels, mean, log_scale))
        total = discretized_log_prob(*arguments, num_levels, log_cdf).exp().sum(0)
        torch.testing.assert_close(total, torch.ones(7, 5, dtype=dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("log_cdf", LOG_CDFS.values(), ids=LOG_CDFS)
def test_a_discretized_likelihood_and_its_gradient_are_finite_far_from_the_mean(log_cdf):
    levels = torch.linspace(-1, 1, 256)
    mean = torch.linspace(-40, 40, 81).view(-1, 1).requires_grad_()
    log_scale = torch.full((1, 1), -7.0, requires_grad=True)
    log_prob = discretized_log_prob(levels, mean, log_scale, 256, log_cdf)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all() and (log_prob <= 0).all()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log_scale.grad).all()


def test_the_bernoulli_likelihood_sums_to_one_on_binary_images_only():
    """Sums over all binary images of one pixel, and over all gray ones."""
    logits = torch.tensor([[-1.3, 0.4, 5.0]])
    sums = {}
    for num_levels in (2, 256):
        vae = make(reconstruction="bernoulli", num_levels=num_levels)
        levels = torch.linspace(-1, 1, num_levels).view(-1, 1)
        sums[num_levels] = (-vae._pixel_losses(logits.expand(num_levels, -1), levels.expand(-1, 3))).exp().sum(0)
        assert vae.has_likelihood == (num_levels == 2)
    torch.testing.assert_close(sums[2], torch.ones(3))
    assert (sums[256] > 2).all()


def test_the_kl_is_the_closed_form():
    vae = make()
    posterior = vae.encode(images(vae))
    mu, variance = posterior.mean, posterior.variance
    expected = 0.5 * (mu**2 + variance - variance.log() - 1).sum(1)
    torch.testing.assert_close(vae(images(vae)).kl, expected)


def test_the_squared_error_and_the_cross_entropy_are_their_equations():
    sample = images(make())
    vae = make(reconstruction="mse")
    output = vae(sample)
    torch.testing.assert_close(
        output.reconstruction_loss, 0.5 * (output.sample - sample).square().flatten(1).sum(1), rtol=1e-4, atol=1e-4
    )
    vae = make(reconstruction="bernoulli")
    output = vae(sample)
    p, x = output.sample / 2 + 0.5, sample / 2 + 0.5
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    torch.testing.assert_close(output.reconstruction_loss, expected, rtol=1e-4, atol=1e-4)


class Toy:
    """
    Linear model x = W z + b + s e with orthogonal columns of W. A VAE with a linear encoder and decoder represents its
    posterior exactly, whose precision is 1 + |w_i|^2 / s^2. With so many levels, the discretized likelihood is the
    density times the width of a level.
    """

    LEVELS, SCALE = 4096, 0.05

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        basis = torch.linalg.qr(torch.randn(16, 2, generator=generator, dtype=torch.float64)).Q
        self.W = basis * torch.tensor([0.3, 0.15], dtype=torch.float64)
        self.b = 0.1 * torch.randn(16, generator=generator, dtype=torch.float64)
        z = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
        e = torch.randn(1000, 16, generator=generator, dtype=torch.float64)
        self.x = z @ self.W.T + self.b + self.SCALE * e
        covariance = self.W @ self.W.T + self.SCALE**2 * torch.eye(16)
        density = torch.distributions.MultivariateNormal(self.b, covariance).log_prob(self.x)
        self.log_likelihood = density + 16 * math.log(2 / (self.LEVELS - 1))  # (1000,)

    def vae(self, off: float = 0.0) -> TinyVAEModel:
        """Builds the optimal VAE, or with `off` one whose posterior differs."""
        vae = TinyVAEModel(4, 1, 2, (8,), reconstruction="gaussian", num_levels=self.LEVELS).double()
        precision = 1 + self.W.square().sum(0) / self.SCALE**2
        encode, decode = nn.Linear(16, 4).double(), nn.Linear(2, 16).double()
        with torch.no_grad():
            to_mean = (self.W / self.SCALE**2 / precision).T
            encode.weight.copy_(torch.cat([to_mean, torch.zeros(2, 16)]))
            encode.bias.copy_(torch.cat([-to_mean @ self.b + off, -precision.log() + off]))
            decode.weight.copy_(self.W)
            decode.bias.copy_(self.b)
            vae.log_scale.fill_(math.log(self.SCALE))
        vae.encoder = nn.Sequential(nn.Flatten(), encode)
        vae.decoder = nn.Sequential(decode, nn.Unflatten(1, (1, 4, 4)))
        return vae

    @torch.no_grad()
    def elbo(self, vae: TinyVAEModel, draws: int = 64) -> torch.Tensor:
        torch.manual_seed(0)
        x = self.x.view(-1, 1, 4, 4)
        outputs = [vae(x) for _ in range(draws)]
        return -torch.stack([output.reconstruction_loss + output.kl for output in outputs]).mean(0)


def test_the_bound_bounds_the_exact_likelihood_and_meets_it_at_the_optimum():
    toy = Toy()
    exact = toy.log_likelihood.mean()
    best, worse, worst = (toy.elbo(toy.vae(off)).mean() for off in (0.0, 0.1, 0.5))
    torch.testing.assert_close(best, exact, atol=0.02, rtol=0)
    assert worst < worse < exact - 0.02


def test_the_gap_is_the_kl_between_the_posteriors():
    toy = Toy()
    optimum, off = toy.vae(), toy.vae(0.3)
    x = toy.x.view(-1, 1, 4, 4)
    gap = torch.distributions.kl_divergence(off.encode(x), optimum.encode(x)).sum(1).mean()
    torch.testing.assert_close(toy.log_likelihood.mean() - toy.elbo(off).mean(), gap, atol=0.03, rtol=0)


def test_pixels_are_rounded_to_the_levels():
    vae = make(num_levels=2)
    sample = torch.tensor([-1.0, -0.4, 0.4, 1.0]).repeat(16).view(1, 1, 8, 8)
    noise = torch.zeros(1, 3)
    binary = vae(torch.where(sample > 0, 1.0, -1.0), noise)
    assert all(torch.equal(a, b) for a, b in zip(vae(sample, noise).to_tuple(), binary.to_tuple(), strict=True))
    vae = make()
    assert torch.allclose(vae._round(images(vae)), images(vae), atol=1e-6)


def test_an_image_does_not_depend_on_its_batch():
    vae = make()
    sample, noise = images(vae, 4), torch.randn(4, 3)
    one, four = vae(sample[:1], noise[:1]), vae(sample, noise)
    for alone, together in zip(one.to_tuple(), four.to_tuple(), strict=True):
        torch.testing.assert_close(alone, together[:1], atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        vae = make(layers_per_block=2).train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        vae(images(vae), torch.ones(2, 3)).reconstruction_loss.sum().backward()
        grads.append([parameter.grad for parameter in vae.parameters() if parameter.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_keep_the_terms_in_float32(dtype):
    vae = make()
    expected = vae(images(vae), torch.zeros(2, 3)).reconstruction_loss
    output = vae.to(dtype)(images(vae), torch.zeros(2, 3))
    assert output.kl.dtype == output.reconstruction_loss.dtype == torch.float32
    torch.testing.assert_close(output.reconstruction_loss, expected, rtol=0.1, atol=1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_size": 10}, ["10", "multiple of 4"]),
        ({"block_out_channels": ()}, ["0 levels"]),
        ({"latent_dim": 0}, ["latent_dim", "0"]),
        ({"latent_dim": 10**9}, ["latent_dim"]),
        ({"num_levels": 1}, ["num_levels", "1"]),
        ({"layers_per_block": True}, ["layers_per_block"]),
        ({"sample_size": 1024, "block_out_channels": (4096,)}, ["more levels"]),
        ({"latent_dim": 65536, "block_out_channels": (64, 4096)}, ["parameters"]),
        (
            {
                "sample_size": 1024,
                "latent_dim": 1,
                "block_out_channels": (64,),
                "class_embed_dim": 1024,
                "num_conditions": 1,
            },
            ["class_embed_dim 1024", "parameters"],
        ),
        ({"reconstruction": "logistics"}, ["logistics", "Did you mean 'logistic'?"]),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_refused(options, words):
    with pytest.raises(ValueError) as error:
        TinyVAEModel(**{**TINY, **options})
    for word in words:
        assert word in str(error.value)


def test_tensors_of_a_wrong_size_are_refused():
    vae = make()
    for shape in [(2, 3, 8, 8), (2, 1, 16, 16), (2, 1, 8)]:
        with pytest.raises(ValueError, match=r"takes \(batch, 1, 8, 8\)"):
            vae(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"takes \(batch, 3\)"):
        vae.decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"must be \(2, 3\)"):
        vae(images(vae), torch.zeros(1, 3))
