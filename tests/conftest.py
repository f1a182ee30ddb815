import os

import pytest


# On tensors of a few kilobytes threads only wait for each other: here, and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_unet():
    """Builds a network of 8x8 grey images whose outputs are not zero: a fresh one's are, and any two would draw alike."""
    import torch  # which reads the number of threads when it is imported

    from tiny_diffusers import TinyUNet2DModel

    def build(attention=("none", "full"), **options):
        torch.manual_seed(0)
        sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
        unet = TinyUNet2DModel(**sizes, layers_per_block=1, norm_num_groups=4, attention=attention, **options)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return unet

    return build
