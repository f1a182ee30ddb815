import pytest
import torch
from diffusers import UNet2DModel

from tiny_diffusers import TinyUNet2DModel


@pytest.fixture
def make_unet():
    """Returns a factory of small networks, stock or this package's, with random weights that give nonzero outputs."""

    def make(stock: bool = True, classes: int | None = None, channels: int = 1, learned: bool = False, **config):
        torch.manual_seed(0)
        config = {
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": channels * (2 if learned else 1),
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            **config,
        }
        if stock:
            config |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
            unet = UNet2DModel(**config, num_class_embeds=None if classes is None else classes + 1)
        else:
            unet = TinyUNet2DModel(**config, attention="none", mid_attention="none", num_class_embeds=classes)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return unet.eval()

    return make


@pytest.fixture
def quiet():
    """Returns a function that disables a pipeline's progress bar."""

    def silence(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return silence
