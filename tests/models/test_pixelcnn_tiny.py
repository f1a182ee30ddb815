"""Causality, likelihoods and incremental evaluation of the PixelCNNs and the PixelRNN."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tiny_diffusers import TinyPixelCNNModel
from tiny_diffusers.models import pixelcnn_tiny
from tiny_diffusers.models.layers_tiny import height_and_width
from tiny_diffusers.models.pixelcnn_tiny import Frequencies, Gate, LinearCrossEntropy, RowLSTM, _logistic_log_prob


WITH_LIKELIHOOD = ("gated", "plusplus", "row_lstm")
VARIANTS = ("baseline", *WITH_LIKELIHOOD)
NETWORKS = [*((variant, {}) for variant in VARIANTS), ("gated", {"num_frequencies": 4, "dilations": (2, 1, 3)})]


def make_model(variant="gated", channels=1, size=8, levels=256, classes=None, width=12, layers=3, **config):
    """Builds a random network whose outputs are not zero."""
    torch.manual_seed(0)
    model = TinyPixelCNNModel(
        sample_size=size,
        in_channels=channels,
        num_levels=levels,
        variant=variant,
        hidden_channels=width,
        num_layers=layers,
        num_mixtures=3,
        num_class_embeds=classes,
        **config,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_images(batch, channels, size, levels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (batch, channels, *height_and_width(size)), generator=generator) / (levels - 1)


def raster_order(channels, size):
    """Returns the position of each sub-pixel in the order of generation, (C, H, W)."""
    height, width = height_and_width(size)
    return torch.arange(height * width * channels).view(height, width, channels).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize(("channels", "size"), [(1, 6), (3, 4), (2, (3, 6))])
@pytest.mark.parametrize(("variant", "options"), NETWORKS)
def test_an_output_depends_on_all_sub_pixels_before_it_and_no_others(variant, options, channels, size):
    layers = {"gated": 5, "plusplus": 2, "row_lstm": 5}.get(variant)
    height, width = height_and_width(size)
    model = make_model(variant, channels, size, levels=16, width=24, layers=layers, **options)
    x = torch.rand(3, channels, height, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = model(x).sample
    order = raster_order(channels, size)
    directions = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        position = (slice(None), c, ..., i, j)
        (gradient,) = torch.autograd.grad((output[position] * directions[position]).sum(), x, retain_graph=True)
        gradient = gradient.abs().amax(0)
        before = order < order[c, i, j]
        assert (gradient[~before] == 0).all(), f"{(c, i, j)} sees itself or a later sub-pixel"
        if (
            variant == "row_lstm"
        ):  # a triangle, which each row up widens by a column, and the first convolution by two more
            rows, columns = torch.arange(height)[:, None], torch.arange(width)
            seen = before & (columns - j <= i - rows + 2)
            assert ((gradient > 0) == seen).all(), f"{(c, i, j)} sees no triangle"
        elif variant in WITH_LIKELIHOOD:  # the receptive field is larger than the image
            assert (gradient[before] > 0).all(), f"{(c, i, j)} has a blind spot"


def test_a_row_lstm_is_torchs_lstm_along_a_column_of_one_pixel():
    """In an image of one column, only the middle taps of the convolutions see something."""
    torch.manual_seed(0)
    layer = RowLSTM(8, 1, 0)
    cell = torch.nn.LSTM(8, 4)
    parts = [slice(4 * k, 4 * k + 4) for k in (2, 1, 3, 0)]  # torch has i, f, g, o, and the paper o, f, i, g
    with torch.no_grad():
        for ours, conv, column in (("ih", layer.input_to_state, 1), ("hh", layer.state_to_state, 1)):
            conv.bias.normal_()
            getattr(cell, f"weight_{ours}_l0").copy_(torch.cat([conv.weight[part, :, 0, column] for part in parts]))
            getattr(cell, f"bias_{ours}_l0").copy_(torch.cat([conv.bias[part] for part in parts]))
        x = torch.randn(2, 6, 1, 8)
        hidden, _ = cell(x[:, :, 0].transpose(0, 1))  # (H, B, 4)
        expected = x + layer.conv_out(hidden.transpose(0, 1)[:, :, None])
        torch.testing.assert_close(layer(x, None), expected)


def test_a_gated_layer_extends_the_receptive_field_by_its_dilation():
    for layers, dilations in ((1, (1,)), (3, (1,)), (1, (3,)), (3, (1, 4))):
        model = make_model(layers=layers, size=15, levels=4, dilations=dilations)
        x = torch.rand(1, 1, 15, 15).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sample[..., 14, 7].sum(), x)
        rows, columns = (gradient[0, 0] != 0).nonzero().T
        reach = 3 + sum((dilations * layers)[:layers])
        assert 14 - rows.min() == reach
        assert (7 - columns.min(), columns.max() - 7) == (min(7, reach), min(7, reach))


# ------------------------------------------------------------------------------------------ incremental sampling


@pytest.mark.parametrize(
    ("channels", "size", "levels", "batch", "classes", "conditions"),
    [
        pytest.param(1, 8, 256, 1, None, None, marks=pytest.mark.exhaustive),
        (3, 4, 256, 2, None, None),
        (3, 5, 16, 3, 4, None),
        (1, 7, 3, 2, None, None),
        (2, 2, 2, 2, None, None),
        (1, 1, 2, 1, 2, None),
        (2, (3, 6), 16, 2, None, 2),
        (1, (7, 2), 16, 2, 3, 1),
    ],
)
@pytest.mark.parametrize(("variant", "options"), NETWORKS)
def test_conditionals_with_and_without_a_cache_equal_those_of_the_whole_image(
    variant, options, channels, size, levels, batch, classes, conditions
):
    classes, conditions = (None, None) if variant == "baseline" else (classes, conditions)
    model = make_model(variant, channels, size, levels, classes, num_conditions=conditions, **options)
    images = random_images(batch, channels, size, levels)
    labels = None if classes is None else torch.arange(batch) % (classes + 1)
    values = None if conditions is None else torch.arange(1.0, batch * conditions + 1).view(batch, conditions)
    check_conditionals(model, images, labels, values)


@pytest.mark.slow
@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_they_do_for_a_rectangle_with_a_class_and_conditions(variant):
    model = make_model(variant, 2, (12, 16), 16, classes=3, width=8, layers=1, num_conditions=2)
    check_conditionals(model, random_images(1, 2, (12, 16), 16), torch.tensor([1]), torch.tensor([[0.5, -1]]))


def check_conditionals(model, images, labels, values):
    """Compares what `conditionals` yields, with a cache and without, to a forward pass."""
    with torch.no_grad():
        expected = model(images, labels, conditions=values).sample
    for use_cache in (True, False):
        canvas = torch.zeros_like(images)
        positions = []
        for (c, i, j), parameters in model.conditionals(canvas, labels, use_cache, values):
            torch.testing.assert_close(parameters, expected[:, c, ..., i, j], rtol=1e-5, atol=1e-5)
            canvas[:, c, i, j] = images[:, c, i, j]
            positions.append((c, i, j))
        height, width = images.shape[2:]
        in_order = itertools.product(range(height), range(width), range(images.shape[1]))
        assert positions == [(c, i, j) for i, j, c in in_order]


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_conditions_reach_every_sub_pixel_and_leave_the_order_as_it_is(variant):
    model = make_model(variant, 2, (12, 16), 16, classes=3, width=24, layers=1, num_conditions=2)
    images = random_images(2, 2, (12, 16), 16).requires_grad_()
    conditions = torch.tensor([[0.5, -1], [math.nan, math.nan]], requires_grad=True)
    output = model(images, torch.tensor([1, 3]), conditions=conditions).sample
    at = (slice(None), 1, ..., 6, 9)
    of_image, of_conditions = torch.autograd.grad(output[at].square().sum(), (images, conditions))
    order = raster_order(2, (12, 16))
    assert (of_image.abs().amax(0)[order >= order[1, 6, 9]] == 0).all()
    assert (of_conditions != 0).tolist() == [[True, True], [False, False]]  # NaN is the learned vector
    with torch.no_grad():
        other = model(images, torch.tensor([1, 3]), conditions=torch.ones(2, 2)).sample
        assert (other != output).flatten(2, -3).any(dim=2).all()  # (B, C, H, W)
        assert torch.equal(model(images).sample[1], output[1])  # neither class nor conditions


# -------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
@pytest.mark.parametrize(("channels", "size", "levels"), [(1, 2, 3), (3, 1, 5), (3, 1, 2), (6, 1, 2)])
def test_probabilities_of_all_images_sum_to_one(variant, channels, size, levels):
    model = make_model(variant, channels, size, levels)
    dimensions = channels * size * size
    every = torch.tensor(list(itertools.product(range(levels), repeat=dimensions))) / (levels - 1)
    with torch.no_grad():
        bits = model.nll(every.view(-1, channels, size, size))
    assert (2 ** (-bits.double() * dimensions)).sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_the_likelihood_is_the_product_of_the_conditionals(variant):
    levels = 8
    model = make_model(variant, channels=3, size=4, levels=levels)
    images = random_images(2, 3, 4, levels)
    with torch.no_grad():
        parameters, bits = model(images).sample, model.nll(images)
    if variant != "plusplus":
        target = (images * (levels - 1)).round().long()
        log_prob = -F.cross_entropy(parameters.transpose(1, 2), target, reduction="none")
    else:
        log_weights, means, log_scales = parameters.unbind(2)  # (B, C, K, H, W)
        x = 2 * images[:, :, None] - 1
        log_prob = (log_weights + _logistic_log_prob(x, means, log_scales, levels)).logsumexp(2)
    torch.testing.assert_close(bits, -log_prob.flatten(1).mean(1) / math.log(2))


def test_the_discretized_logistic_sums_to_one_wherever_it_lies():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    means = torch.tensor([-40.0, -1.0, -0.37, 0.0, 1.0, 3.0], dtype=torch.float64).repeat(4)
    log_scales = torch.tensor([-7.0, -3.0, 0.0, 4.0], dtype=torch.float64).repeat_interleave(6)
    log_prob = _logistic_log_prob(levels, means, log_scales, 256)
    assert torch.isfinite(log_prob).all()
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(24, dtype=torch.float64))
    inner = torch.sigmoid((levels + 1 / 255 + 0.37) * math.e**3) - torch.sigmoid((levels - 1 / 255 + 0.37) * math.e**3)
    torch.testing.assert_close(log_prob[1:-1, 8].exp(), inner[1:-1, 0])  # eq. 2 itself: mean -0.37, log-scale -3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gate_is_torchs(dtype):
    torch.manual_seed(0)
    f, g = (4 * torch.randn(2, 50, 8, dtype=torch.float64)).to(dtype).requires_grad_().unbind(0)
    grad = torch.randn(50, 8).to(dtype)
    expected = torch.tanh(f.double()) * torch.sigmoid(g.double())
    theirs = torch.autograd.grad(expected, (f, g), grad.double(), retain_graph=True)
    ours = torch.autograd.grad(Gate.apply(f, g), (f, g), grad)
    torch.testing.assert_close(Gate.apply(f, g), expected.to(dtype))
    torch.testing.assert_close(ours, theirs)


def test_frequencies_tell_all_levels_apart():
    levels = torch.linspace(-1, 1, 256)
    numbers = Frequencies(8, 256)(levels[:, None])
    distances = torch.cdist(numbers, numbers) + torch.eye(256) * 9
    assert numbers.shape == (256, 17)
    assert torch.equal(numbers[:, 0], levels)
    assert distances.min() > 1.9  # any two levels; neighbors' plain values are 0.008 apart


@pytest.mark.parametrize("channels", [1, 3])
def test_the_chunked_cross_entropy_is_torchs(channels, monkeypatch):
    monkeypatch.setattr("tiny_diffusers.models.pixelcnn_tiny._CHUNK", 8 * channels)
    torch.manual_seed(0)
    x = torch.randn(21, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels * 5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels * 5, dtype=torch.float64, requires_grad=True)
    target, scale = torch.randint(5, (21, channels)), torch.rand(21, channels)
    logits = F.linear(x, weight, bias).view(21, channels, 5)
    expected = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    loss = LinearCrossEntropy.apply(x, weight, bias, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)  # which sums in float32
    ours = torch.autograd.grad((loss * scale).sum(), (x, weight, bias))
    theirs = torch.autograd.grad((expected * scale).sum(), (x, weight, bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "width", "layers", "steps"),
    [("gated", 16, 2, 250), pytest.param("plusplus", 8, 1, 80, marks=pytest.mark.slow), ("row_lstm", 16, 2, 120)],
)
def test_it_learns_a_known_markov_random_field(variant, width, layers, steps):
    """Trains on an Ising model of 3x3 binary images, whose probabilities and entropy are known by enumeration."""
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=9))).view(-1, 1, 3, 3)
    spins = 2 * states - 1
    bonds = (spins[..., 1:] * spins[..., :-1]).sum((1, 2, 3)) + (spins[..., 1:, :] * spins[..., :-1, :]).sum((1, 2, 3))
    p = (0.4 * bonds + 0.3 * spins.sum((1, 2, 3))).softmax(0)
    entropy = -(p * p.log2()).sum().item() / 9

    torch.manual_seed(0)
    model = TinyPixelCNNModel(3, 1, 2, variant, hidden_channels=width, num_layers=layers, num_mixtures=2, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    model.initialize(states[torch.multinomial(p, 64, replacement=True, generator=generator)])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        batch = states[torch.multinomial(p, 128, replacement=True, generator=generator)]
        model(batch, return_loss=True).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        cross_entropy = (p * model.nll(states)).sum().item()  # exact: over all states
    assert entropy - 1e-5 <= cross_entropy <= entropy + 0.02


def test_the_mixture_sums_to_one_over_the_256_values_at_every_position():
    model = make_model("plusplus", channels=3, size=5)
    with torch.no_grad():
        parameters = model(random_images(2, 3, 5, 256)).sample  # (B, C, 3, K, H, W)
    log_weights, means, log_scales = parameters.double().unbind(2)
    values = torch.linspace(-1, 1, 256, dtype=torch.float64).view(-1, 1, 1, 1, 1, 1)
    p = (log_weights + _logistic_log_prob(values, means, log_scales, 256)).exp().sum(3)  # over the logistics
    torch.testing.assert_close(p.sum(0), torch.ones(2, 3, 5, 5, dtype=torch.float64), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_draws_follow_the_probabilities(variant):
    levels = 5
    model = make_model(variant, channels=1, size=1, levels=levels)
    every = torch.arange(levels).view(-1, 1, 1, 1) / (levels - 1)
    with torch.no_grad():
        p = 2 ** -model.nll(every)
    _, parameters = next(model.conditionals(torch.zeros(1, 1, 1, 1)))
    uniform = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    drawn = model.draw(parameters.expand(20_000, *parameters.shape[1:]), uniform)
    shares = torch.bincount((drawn * (levels - 1)).round().long(), minlength=levels) / 20_000
    torch.testing.assert_close(shares, p, rtol=0, atol=0.015)


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_a_low_temperature_draws_the_likeliest(variant):
    model = make_model(variant, channels=1, size=1, levels=16)
    _, parameters = next(model.conditionals(torch.zeros(1, 1, 1, 1)))
    uniform = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-3, 1e-40, 1e-300):
        drawn = model.draw(parameters.expand(64, *parameters.shape[1:]), uniform, temperature)
        assert len(drawn.unique()) == 1
    if variant != "plusplus":
        assert (drawn * 15).round().unique() == parameters.argmax()


def test_a_level_without_probability_is_never_drawn():
    model = make_model(channels=1, size=1, levels=4)
    uniform = torch.tensor([[0.0, 0.0], [1 - 2**-24, 0.0]])  # the smallest and the largest possible numbers
    drawn = model.draw(torch.tensor([[-200.0, -200.0, 0.0, -1.0]]).expand(2, 4), uniform)
    assert (drawn * 3).round().tolist() == [2, 3]


# -------------------------------------------------------------------------------------------------- the network


def test_sizes():
    with torch.device("meta"):
        count = {v: sum(p.numel() for p in TinyPixelCNNModel(variant=v).parameters()) for v in VARIANTS}
    assert count["baseline"] == pytest.approx(1_307_651, rel=0.01)
    assert count["gated"] == 10_726_464
    assert count["plusplus"] == pytest.approx(54e6, rel=0.02)  # the paper's code has 53 M
    assert count["row_lstm"] == 6_009_960
    config = TinyPixelCNNModel(hidden_channels=6, num_layers=1).config
    assert (config.sample_size, config.in_channels, config.num_levels, config.variant) == (32, 3, 256, "gated")


@pytest.mark.parametrize(("variant", "channels"), [("gated", 5), ("baseline", 4), ("plusplus", 7), ("row_lstm", 5)])
def test_the_default_width_has_as_many_features_for_each_channel(variant, channels):
    with torch.device("meta"):
        TinyPixelCNNModel(8, channels, variant=variant)


def test_networks_that_differ_in_training_mode_refuse_to_measure_or_draw():
    for variant, options in (("baseline", {}), ("plusplus", {}), ("plusplus", {"dropout": 0.3})):
        model = make_model(variant, size=4, **options).train()
        with pytest.raises(ValueError, match="eval"):
            next(model.conditionals(torch.zeros(1, 1, 4, 4)))
    with pytest.raises(ValueError, match="eval"):
        model.nll(torch.zeros(1, 1, 4, 4))
    for variant in WITH_LIKELIHOOD:
        make_model(variant, size=4, dropout=0.0).train().nll(torch.zeros(1, 1, 4, 4))


def test_initialization_changes_only_weight_norms():
    for variant in ("baseline", "gated"):
        model = make_model(variant, size=4).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.initialize(random_images(4, 1, 4, 256))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_conditionals_load_an_offloaded_network():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counts.calls += 1
            return args, kwargs

    model = make_model(size=2)
    add_hook_to_module(model, Counts())
    list(model.conditionals(torch.zeros(1, 1, 2, 2)))
    assert Counts.calls == 1


def test_autocast_does_not_round_the_mixtures_means():
    model = make_model("plusplus", channels=1, size=4)
    seen = []
    model.network.out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(random_images(1, 1, 4, 256))
    assert seen == [torch.float32]


def test_a_row_lstm_samples_with_cell_states_in_float32(monkeypatch):
    caches, build = [], pixelcnn_tiny.RowCache
    monkeypatch.setattr(pixelcnn_tiny, "RowCache", lambda *args: caches.append(build(*args)) or caches[0])
    model = make_model("row_lstm", channels=1, size=3).to(torch.bfloat16)
    list(model.conditionals(torch.zeros(1, 1, 3, 3)))
    states = [each for each in caches[0].buffers.values() if isinstance(each, tuple)]
    assert len(states) == len(model.network.layers)
    assert all((hidden.dtype, cell.dtype) == (torch.bfloat16, torch.float32) for hidden, cell in states)


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_classes_matter_and_mix(variant):
    model = make_model(variant, channels=1, size=4, levels=4, classes=2)
    images = random_images(1, 1, 4, 4).expand(3, -1, -1, -1)
    with torch.no_grad():
        bits = model.nll(images, torch.tensor([0, 1, 2]))
        assert len(bits.unique()) == 3
        torch.testing.assert_close(model.nll(images[:1]), bits[2:])  # none is the last row
        torch.testing.assert_close(model.nll(images, torch.eye(3)), bits)


def test_plusplus_starts_from_the_data():
    torch.manual_seed(0)
    model = TinyPixelCNNModel(8, 1, 16, "plusplus", hidden_channels=8, num_layers=1, num_mixtures=2)
    images = random_images(32, 1, 8, 16)
    model.initialize(images)
    seen = {}
    block = model.network.vertical_stream.encoder[0][0]
    for name, conv in (("in", block.conv_in), ("gate", block.conv_out)):
        conv.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.flatten(0, -2)}))
    with torch.no_grad():
        model.train()  # as initialized: with dropout, which averages out
        torch.manual_seed(1)
        model(images)
    torch.testing.assert_close(seen["in"].mean(0), torch.zeros(8), rtol=0, atol=0.2)
    torch.testing.assert_close(seen["in"].std(0), torch.ones(8), rtol=0, atol=0.2)
    torch.testing.assert_close(seen["gate"].std(0), torch.full((16,), 0.1), rtol=0, atol=0.03)


def test_plusplus_starts_calmly_where_it_sees_next_to_nothing():
    """The coarsest position of a 3x3 image sees nothing: outputs that hardly vary there must not be scaled up."""
    torch.manual_seed(0)
    model = TinyPixelCNNModel(3, 1, 2, "plusplus", hidden_channels=16, num_layers=2, num_mixtures=2, dropout=0.0)
    model.initialize(random_images(64, 1, 3, 2))
    assert max(conv.gain.max() for conv in model.modules() if getattr(conv, "gain", None) is not None) < 4
    with torch.no_grad():
        assert model.nll(random_images(256, 1, 3, 2, seed=1)).max() < 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    model = make_model(variant, channels=3, size=4, levels=4, width=6)
    model.save_pretrained(tmp_path)
    loaded = TinyPixelCNNModel.from_pretrained(tmp_path)
    images = random_images(2, 3, 4, 4)
    assert torch.equal(loaded(images).sample, model(images).sample)
    private = ("_name_or_path", "_use_default_values")  # neither describes the network
    configs = [{k: v for k, v in m.config.items() if k not in private} for m in (loaded, model)]
    assert configs[0] == configs[1]


def test_forward_returns_the_loss_to_run_within_wrappers():
    images = random_images(2, 1, 8, 256)
    for variant in VARIANTS:
        model = make_model(variant)
        loss = model(images, return_loss=True).loss
        assert loss.shape == (2,)
        if variant == "baseline":
            torch.testing.assert_close(loss, (model(images).sample - images).abs().mean((1, 2, 3)))
        else:
            torch.testing.assert_close(loss, model.nll(images))


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "gatd"}, "Did you mean 'gated'"),
        ({"num_levels": 1}, "num_levels 1"),
        ({"sample_size": 10**9}, "sample_size"),
        ({"hidden_channels": 32}, "multiple of in_channels"),
        ({"variant": "row_lstm", "hidden_channels": 9}, "multiple of twice in_channels"),
        ({"dropout": 0.1}, "only 'plusplus' has dropout"),
        ({"variant": "plusplus", "dropout": 1.0}, "dropout 1.0"),
        ({"variant": "plusplus", "num_frequencies": 4}, "only 'gated' takes"),
        ({"num_frequencies": -1}, "num_frequencies -1"),
        ({"dilations": (1, 0)}, "dilations"),
        ({"dilations": ()}, "one or more"),
        ({"variant": "baseline", "dilations": (2,)}, "only the layers of 'gated'"),
        ({"variant": "baseline", "num_class_embeds": 10}, "no gates"),
        ({"variant": "baseline", "num_conditions": 2}, "num_conditions 2.*no gates"),
        ({"variant": "baseline", "num_layers": 2}, "3 or more"),
    ],
)
def test_impossible_configs(config, message):
    with pytest.raises(ValueError, match=message):
        TinyPixelCNNModel(**config)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 1, 8, 8), 1.2), r"\[1.2, 1.2\].*\[0, 1\]"),
        (torch.full((1, 1, 8, 8), torch.nan), "nan"),
        (torch.zeros(1, 1, 8, 7), r"\(1, 1, 8, 7\): this network takes \(batch, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), "takes"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "divide"),
        (torch.full((1, 1, 8, 8), 0.43), "between the network's 16 levels"),
    ],
)
def test_images_without_a_likelihood_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        make_model(levels=16).nll(images)


def test_the_baseline_has_no_likelihood():
    with pytest.raises(ValueError, match="no likelihood"):
        make_model("baseline").nll(random_images(1, 1, 8, 256))


def test_labels_that_do_not_fit():
    images = random_images(2, 1, 4, 4)
    with pytest.raises(ValueError, match="without classes"):
        make_model(size=4, levels=4).nll(images, torch.tensor([0, 1]))
    model = make_model(size=4, levels=4, classes=2)
    refused = {
        "class label 3 .* from 0 to 2": torch.tensor([0, 3]),
        "class label -1": torch.tensor([-1, 0]),
        "class_labels has shape \\(1,\\)": torch.tensor([0]),
        "floats of shape \\(2, 3\\)": torch.ones(2, 2),
    }
    for message, labels in refused.items():
        with pytest.raises(ValueError, match=message):
            model.nll(images, labels)


def test_quantizing_fills_the_levels_evenly():
    values = torch.arange(256).view(1, 1, 16, 16) / 255
    for levels in (2, 16, 256):
        counts = torch.bincount((make_model(levels=levels).quantize(values) * (levels - 1)).round().long().flatten())
        assert counts.tolist() == [256 // levels] * levels
    with pytest.raises(ValueError, match="512 levels"):
        make_model(levels=512).quantize(values)


def test_a_level_survives_rounding_to_8_bits():
    levels = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
    model = make_model(size=4, levels=16)
    assert torch.equal(model.to_levels((levels * 255).round() / 255), model.to_levels(levels))
