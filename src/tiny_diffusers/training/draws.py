"""
Random numbers that depend on the configuration alone.

Every draw of a run is a pure function of (seed, step, index of the image in the global batch), independent of the number
of processes and of when the run was stopped. So a resumed run equals an uninterrupted one, and two processes equal one.
"""

import hashlib
from collections.abc import Callable

import torch


# Rows are drawn in blocks of this size with a generator each: a process draws little more than its own rows.
_BLOCK = 32


def make_generator(*keys: int | str) -> torch.Generator:
    """Returns a CPU generator seeded by a hash of `keys`, so that neighboring seeds and steps are independent."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class Draws:
    """
    The random numbers of the images `rows` of one step's global batch.

    Args:
        seed (`int`): The run's seed.
        step (`int` or `str`): The optimizer step, or a name for draws that never change, such as `"validation"`.
        rows (`range`): The images' indices in the global batch.
        device (`torch.device`, *optional*): Device of the returned numbers; they are always drawn on the CPU.
    """

    def __init__(self, seed: int, step: int | str, rows: range, device: torch.device | str = "cpu"):
        self.seed, self.step, self.rows, self.device = seed, step, rows, device

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        """Draws standard normal numbers, `(B, *shape)` float32. Draws of different `purpose` are independent."""
        return self._draw(purpose, lambda generator: torch.randn(_BLOCK, *shape, generator=generator))

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        """Draws uniform numbers in [0, 1), `(B, *shape)` float32."""
        return self._draw(purpose, lambda generator: torch.rand(_BLOCK, *shape, generator=generator))

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """Draws uniform integers in [0, high), `(B,)` int64."""
        return self._draw(purpose, lambda generator: torch.randint(high, (_BLOCK,), generator=generator))

    def _draw(self, purpose: str, draw: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
        first, last = self.rows.start // _BLOCK, (self.rows.stop - 1) // _BLOCK
        blocks = [draw(make_generator(self.seed, self.step, purpose, block)) for block in range(first, last + 1)]
        start = self.rows.start - first * _BLOCK
        return torch.cat(blocks)[start : start + len(self.rows)].to(self.device, non_blocking=True)


class DataOrder:
    """
    The endless order in which images are seen: the permutations of all epochs, one after the other. Every batch is full,
    and every epoch sees every image once, whatever the batch size.

    Args:
        seed (`int`): The run's seed.
        num_images (`int`): Size of the dataset.
    """

    def __init__(self, seed: int, num_images: int):
        self.seed, self.num_images = seed, num_images
        self._epoch, self._permutation = -1, None

    def __call__(self, positions: range) -> torch.Tensor:
        """Returns the indices into the dataset, `(len(positions),)` int64, at these positions of the order."""
        parts = []
        start = positions.start
        while start < positions.stop:
            epoch, offset = divmod(start, self.num_images)
            stop = min(positions.stop, (epoch + 1) * self.num_images)
            parts.append(self._epoch_order(epoch)[offset : offset + stop - start])
            start = stop
        return torch.cat(parts)

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            generator = make_generator(self.seed, "order", epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.num_images, generator=generator)
        return self._permutation
