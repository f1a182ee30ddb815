"""
How fast `TinyUNet2DModel` trains and predicts on this machine, against stock `UNet2DModel` of the same size.

    python tests/benchmarks/benchmark_unet.py [--threads 2] [--batch_size 64] [--rounds 5]

Both have widths (64, 128, 128), two blocks a level, attention at 16x16 and in the middle, and 6,472,195 parameters. They
run in turns, so that whatever else the machine does slows all of them: read the ratios, and the images/s with their
spread.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from tiny_diffusers.hardware import default_dtype, physical_cores
from tiny_diffusers.models import TinyUNet2DModel


def stock_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


class Contender:
    """
    One network, as it is trained (autocast) and as it is sampled from (cast once).

    Args:
        unet (`torch.nn.Module`): The network.
        dtype (`torch.dtype`): What it computes in.
        fused (`bool`): Whether the optimiser and the moving average are fused, as in this project's training.
    """

    def __init__(self, unet: torch.nn.Module, dtype: torch.dtype, batch_size: int, fused: bool):
        self.unet = unet
        self.dtype = dtype
        self.fused = fused
        self.parameters = list(unet.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused)
        self.sample = torch.randn(batch_size, 3, 32, 32)
        self.noise = torch.randn(batch_size, 3, 32, 32)
        self.timesteps = torch.randint(0, 1000, (batch_size,))

    def loss(self) -> torch.Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return F.mse_loss(self.unet(self.sample, self.timesteps).sample.float(), self.noise)

    def train(self) -> None:
        """Forward, backward, clipping, optimiser, moving average."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            if self.fused:
                torch._foreach_lerp_(self.average, self.parameters, 1e-3)
            else:  # as diffusers' EMAModel does
                for average, parameter in zip(self.average, self.parameters, strict=True):
                    average.sub_(1e-3 * (average - parameter))

    @torch.no_grad()
    def predict(self) -> None:
        """One network evaluation, in the type that the network is sampled in."""
        self.unet(self.sample.to(self.unet.dtype), 500)

    def megabytes_kept(self) -> float:
        """Memory that the forward pass keeps for the backward pass, in MB, without the parameters."""
        parameters = {p.untyped_storage().data_ptr() for p in self.parameters}
        kept = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return sum(kept.values()) / 1e6


def in_turns(tasks: dict[str, Callable[[], None]], batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Images/s of each task, once a round, after one run that warms up."""
    rates = {name: [] for name in tasks}
    for i in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if i > 0:
                rates[name].append(batch_size / (time.perf_counter() - start))
    return rates


def show(title: str, rates: dict[str, list[float]]) -> None:
    print(f"\n{title:28s} {'images/s':>9s} {'lowest':>8s} {'highest':>8s}   tiny is")
    tiny = rates["TinyUNet2DModel"]
    for name, rate in rates.items():
        ratio = statistics.median(a / b for a, b in zip(tiny, rate, strict=True))
        print(f"{name:28s} {statistics.median(rate):9.1f} {min(rate):8.1f} {max(rate):8.1f}   {ratio:.2f}x as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = default_dtype(torch.device("cpu"))
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch_size}, tiny in {dtype}")

    tiny = TinyUNet2DModel().to(memory_format=torch.channels_last)
    contenders = {
        "UNet2DModel, float32": Contender(stock_unet(), torch.float32, args.batch_size, fused=False),
        f"UNet2DModel, {dtype}".replace("torch.", ""): Contender(stock_unet(), dtype, args.batch_size, fused=False),
        "TinyUNet2DModel": Contender(tiny, dtype, args.batch_size, fused=True),
    }
    kept = {name: contender.megabytes_kept() for name, contender in contenders.items()}
    trains = {name: contender.train for name, contender in contenders.items()}
    show("training", in_turns(trains, args.batch_size, args.rounds))

    for contender in contenders.values():
        contender.unet.to(contender.dtype)
    predicts = {name: contender.predict for name, contender in contenders.items()}
    show("one network evaluation", in_turns(predicts, args.batch_size, args.rounds))

    print(f"\n{'kept for the gradient':28s} {'MB':>9s}")
    for name, megabytes in kept.items():
        print(f"{name:28s} {megabytes:9.0f}")


if __name__ == "__main__":
    main()
