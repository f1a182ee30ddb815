"""The class weights, the checks and the limits that the networks share."""

import inspect
import typing

import pytest
import torch

from tiny_diffusers import models
from tiny_diffusers.models.layers_tiny import SIZES, check_choice, check_shape, check_sizes, class_weights


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


@pytest.mark.parametrize("name", models.__all__)
def test_every_integer_option_of_a_network_has_a_limit(name):
    for option, parameter in inspect.signature(getattr(models, name)).parameters.items():
        if int in (parameter.annotation, *typing.get_args(parameter.annotation)) and option != "patch_size":
            assert option in SIZES


def test_sizes_are_integers_within_their_limits():
    check_sizes({"sample_size": 1024, "block_out_channels": (1, 4096), "num_class_embeds": None, "other": "any"})
    check_sizes({"in_channels": 17})
    refused = {
        "sample_size 0 is not possible: it must be an integer from 1 to 1024": {"sample_size": 0},
        "sample_size None": {"sample_size": None},
        "layers_per_block True": {"layers_per_block": True},
        "latent_dim 2.0": {"latent_dim": 2.0},
        r"sample_size \(8, 8\)": {"sample_size": (8, 8)},
        "block_out_channels 4097": {"block_out_channels": (8, 4097)},
        "in_channels 17 .* from 1 to 16": {"in_channels": 17},
    }
    for message, config in refused.items():
        with pytest.raises(ValueError, match=message):
            check_sizes(config, in_channels=(1, 16))


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
