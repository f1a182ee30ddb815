"""
`LinearOperator`: what an observation shows of an image, y = A x, by the exact singular value decomposition of A.
`Conditioning`: what a network is shown of an image, as further channels of its input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


# A singular direction counts as unobserved if its singular value is below this share of the largest one.
RELATIVE_TOLERANCE = 1e-4

# The share of each color in the gray of an image, as in PIL's conversion to mode "L" (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Conditioning:
    r"""
    The image that a network is given as a condition: further channels of its input, of the size of its images. Zeros,
    which are mid-gray, stand for no image.

    Args:
        kind (`str`):
            `"grayscale"`, the gray values of the image, as PIL computes them; `"low_resolution:F"`, the means of squares
            of F x F pixels; or `"image:K"`, an image of its own with K channels.
        image_shape (`tuple[int, int, int]`): The shape (C, H, W) of the images that the network generates.

    Raises:
        `ValueError`: If the kind is unknown, or images of this shape have no such condition.
    """

    kind: str
    image_shape: tuple[int, int, int]

    def __post_init__(self):
        name, _, number = str(self.kind).partition(":")
        channels, height, width = self.image_shape
        if name not in ("grayscale", "low_resolution", "image") or (name == "grayscale") != (number == ""):
            raise ValueError(
                f"{self.kind!r} is not grayscale, low_resolution:FACTOR such as low_resolution:2, or image:CHANNELS."
            )
        if number and (not number.isdecimal() or int(number) < 1):
            raise ValueError(f"{self.kind!r} must end in a positive integer, such as {name}:3.")
        if name == "grayscale" and channels != 3:
            raise ValueError(
                f"{self.kind!r} is for images of 3 channels, but these have {channels}: it would be the image itself."
            )
        if name == "low_resolution" and (int(number) < 2 or height % int(number) or width % int(number)):
            raise ValueError(
                f"{self.kind!r} must have a factor of at least 2 that divides the image's size {(height, width)}."
            )

    @classmethod
    def of_network(cls, kind: str, in_channels: int, height: int, width: int) -> "Conditioning":
        """Creates the conditioning of a network, from the channels of image and condition together."""
        name, _, number = str(kind).partition(":")
        further = {"low_resolution": in_channels // 2, "image": int(number) if number.isdecimal() else 0}.get(name, 1)
        conditioning = cls(kind, (in_channels - further, height, width))
        if further >= in_channels or further != conditioning.shape[0]:
            raise ValueError(f"{kind!r} does not fit a network that takes {in_channels} channels.")
        return conditioning

    @property
    def is_made(self) -> bool:
        """Returns whether the condition is made from the image itself."""
        return not self.kind.startswith("image")

    @property
    def factor(self) -> int:
        """Returns how many times smaller the condition is than the image."""
        return int(self.kind.partition(":")[2]) if self.kind.startswith("low_resolution") else 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns the shape (K, h, w) of the condition: of low resolution, the small image."""
        channels, height, width = self.image_shape
        if self.kind == "grayscale":
            channels = 1
        elif not self.is_made:
            channels = int(self.kind.partition(":")[2])
        return channels, height // self.factor, width // self.factor

    @property
    def description(self) -> str:
        """Returns what the condition is, in words."""
        channels, height, width = self.shape
        return f"a {'gray' if channels == 1 else 'color'} image of {height}x{width} pixels ({self.kind})"

    def observe(self, sample: torch.Tensor) -> torch.Tensor:
        """Makes the condition from images: (B, C, H, W) -> (B, K, h, w)"""
        if not self.is_made:
            raise ValueError(
                f"The condition is another image ({self.kind}), which can't be made from the image itself."
            )
        if self.kind == "grayscale":
            luma = torch.tensor(_LUMA, device=sample.device, dtype=sample.dtype)
            return (luma.view(-1, 1, 1) * sample).sum(dim=1, keepdim=True)
        return torch.nn.functional.avg_pool2d(sample, self.factor)

    def enlarge(self, image: torch.Tensor) -> torch.Tensor:
        """Repeats each pixel of a condition of low resolution, to the images' size: (B, K, h, w) -> (B, K, H, W)"""
        return image.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)


class LinearOperator:
    r"""
    A linear map A of images `(B, C, H, W)`, with its singular value decomposition A = U S V^T.

    A small image has few values, so that A is a matrix that fits into memory. It acts on the channels and on the pixels
    separately, A = A_C ⊗ A_P, or on all values at once. The singular values of A are then the products of those of the
    two, and both decompositions are small.

    In the singular directions with S > 0, the observation y = A x + noise is S^-1 U^T y = V^T x + S^-1 U^T noise: each
    coordinate of x is seen by itself.

    Args:
        image_shape (`tuple[int, int, int]`): The shape (C, H, W) of the images.
        output_shape (`tuple[int, ...]`): The shape of y.
        channels (`torch.Tensor` of shape `(C', C)`, *optional*): A_C, by default the identity.
        pixels (`torch.Tensor` of shape `(P', H W)`, *optional*): A_P, by default the identity.
        values (`torch.Tensor` of shape `(M, C H W)`, *optional*): A itself, instead of both.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        output_shape: tuple[int, ...],
        channels: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ):
        self.image_shape, self.output_shape = tuple(image_shape), tuple(output_shape)
        # the images as (B, rows, columns): one row per channel, or all values in one row
        self._rows = 1 if values is not None else image_shape[0]
        self._left, self._right = channels, pixels if values is None else values
        self._left_svd, self._right_svd = _svd(self._left), _svd(self._right)
        left = torch.ones(self._rows) if self._left_svd is None else self._left_svd[1]
        right = torch.ones(self._columns) if self._right_svd is None else self._right_svd[1]
        self.singular_values = torch.outer(left, right)  # (rank of A_C, rank of A_P)

    @property
    def _columns(self) -> int:
        channels, height, width = self.image_shape
        return channels * height * width // self._rows

    @property
    def rank(self) -> int:
        """Returns the number of observed directions."""
        return self.singular_values.numel()

    def to(self, device: torch.device, dtype: torch.dtype) -> "LinearOperator":
        """Moves the matrices, in place."""
        self.singular_values = self.singular_values.to(device, dtype)
        for name in ("_left", "_right"):
            matrix, svd = getattr(self, name), getattr(self, f"{name}_svd")
            if matrix is not None:
                setattr(self, name, matrix.to(device, dtype))
                setattr(self, f"{name}_svd", tuple(part.to(device, dtype) for part in svd))
        return self

    def is_of(self, function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Checks on a random image that a function of images still gives what its matrix gives: it may have a state."""
        probe = _probes(self.image_shape)[0]
        values = torch.as_tensor(function(probe)).float().cpu()
        expected = self(probe.to(self.singular_values)).float().cpu()
        return values.shape == expected.shape and torch.allclose(values, expected, rtol=1e-3, atol=1e-3)

    # 1. Images, observations and coordinates

    def __call__(self, sample: torch.Tensor) -> torch.Tensor:
        """Computes A x: (B, C, H, W) -> (B, *output_shape)"""
        x = sample.reshape(len(sample), self._rows, self._columns)
        x = x if self._left is None else self._left @ x
        x = x if self._right is None else x @ self._right.T
        return x.reshape(len(sample), *self.output_shape)

    def coordinates(self, sample: torch.Tensor) -> torch.Tensor:
        """Computes V^T x: (B, C, H, W) -> (B, *singular_values.shape)"""
        x = sample.reshape(len(sample), self._rows, self._columns)
        x = x if self._left_svd is None else self._left_svd[2] @ x
        return x if self._right_svd is None else x @ self._right_svd[2].T

    def from_coordinates(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Computes V z: (B, *singular_values.shape) -> (B, C, H, W)"""
        x = coordinates if self._left_svd is None else self._left_svd[2].T @ coordinates
        x = x if self._right_svd is None else x @ self._right_svd[2]
        return x.reshape(len(coordinates), *self.image_shape)

    def observed_coordinates(self, observation: torch.Tensor) -> torch.Tensor:
        """Computes S^-1 U^T y: (B, *output_shape) -> (B, *singular_values.shape)"""
        rows = self._rows if self._left is None else len(self._left)
        y = observation.reshape(len(observation), rows, -1)
        y = y if self._left_svd is None else self._left_svd[0].T @ y
        y = y if self._right_svd is None else y @ self._right_svd[0]
        return y / self.singular_values

    # 2. Tasks

    @classmethod
    def inpaint(cls, image_shape: tuple[int, int, int], hidden: torch.Tensor) -> "LinearOperator":
        """Keeps the pixels where `hidden` (H, W) is False: y is (C, number of kept pixels)."""
        kept = torch.eye(hidden.numel())[~hidden.flatten().cpu()]
        return cls(image_shape, (image_shape[0], len(kept)), pixels=kept)

    @classmethod
    def super_resolution(cls, image_shape: tuple[int, int, int], factor: int) -> "LinearOperator":
        """Averages squares of `factor` x `factor` pixels: y is (C, H / factor, W / factor)."""
        channels, height, width = image_shape
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2 or height % factor or width % factor:
            raise ValueError(
                f"`factor` must be an integer of at least 2 that divides the image's size {(height, width)}, got "
                f"{factor!r}."
            )
        images = torch.eye(height * width).view(-1, 1, height, width)
        pooled = torch.nn.functional.avg_pool2d(images, factor)
        return cls(image_shape, (channels, height // factor, width // factor), pixels=pooled.flatten(1).T.contiguous())

    @classmethod
    def colorize(cls, image_shape: tuple[int, int, int]) -> "LinearOperator":
        """Computes the gray value of each pixel, as PIL does: y is (1, H, W)."""
        if image_shape[0] != 3:
            raise ValueError(f"The images have {image_shape[0]} channels, and only those of 3 can be colored.")
        return cls(image_shape, (1, *image_shape[1:]), channels=torch.tensor([_LUMA]))

    @classmethod
    def deblur(cls, image_shape: tuple[int, int, int], kernel: torch.Tensor) -> "LinearOperator":
        """Blurs by a kernel (h, w) with odd sides and the sum 1, mirrored at the border: y has the image's shape."""
        _, height, width = image_shape
        kernel = torch.as_tensor(kernel, dtype=torch.float32).cpu()
        if kernel.ndim != 2 or not all(size % 2 for size in kernel.shape) or not torch.isfinite(kernel).all():
            raise ValueError(f"`kernel` must be finite, of shape (h, w) with odd sides, got {tuple(kernel.shape)}.")
        if kernel.shape[0] > height or kernel.shape[1] > width:
            raise ValueError(f"`kernel` must be no larger than the image, got {tuple(kernel.shape)}.")
        if abs(kernel.sum() - 1) > 1e-3:
            raise ValueError(f"`kernel` must have the sum 1, got {kernel.sum():g}.")
        rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
        images = torch.eye(height * width).view(-1, 1, height, width)
        padded = torch.nn.functional.pad(images, (columns, columns, rows, rows), mode="reflect")
        blurred = torch.nn.functional.conv2d(padded, kernel[None, None])
        return cls(image_shape, image_shape, pixels=blurred.flatten(1).T.contiguous())

    @classmethod
    def from_callable(
        cls, function: Callable[[torch.Tensor], torch.Tensor], image_shape: tuple[int, int, int]
    ) -> "LinearOperator":
        """
        Builds the matrix of any linear function of a batch of images in [-1, 1], `(B, C, H, W)` -> `(B, ...)`.

        Raises:
            `ValueError`: If its values are not finite or not one for each image, or it is not linear.
        """
        size = image_shape[0] * image_shape[1] * image_shape[2]
        x, y = _probes(image_shape)
        a, b = 0.7, -1.3
        outputs = [torch.as_tensor(function(image)).float().cpu() for image in (x, y, a * x + b * y)]
        if any(len(output.shape) < 2 or len(output) != 1 for output in outputs):
            raise ValueError(
                f"`operator` must map (B, {', '.join(map(str, image_shape))}) to (B, ...), got {tuple(outputs[0].shape)} "
                "for one image."
            )
        if not all(torch.isfinite(output).all() for output in outputs):
            raise ValueError("`operator` has values that are not finite.")
        combined = a * outputs[0] + b * outputs[1]
        difference = (outputs[2] - combined).abs().max() / combined.abs().max().clamp(min=1e-12)
        if difference > 1e-3:
            raise ValueError(
                f"`operator` is not linear: A(a x + b y) differs from a A(x) + b A(y) by {difference:.2g} of its maximum."
            )
        images = torch.eye(size).view(-1, *image_shape)
        columns = [torch.as_tensor(function(part)).float().cpu().flatten(1) for part in images.split(256)]
        return cls(image_shape, outputs[0].shape[1:], values=torch.cat(columns).T.contiguous())


def _probes(image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Draws two random images, always the same ones: (2, 1, C, H, W)"""
    return torch.randn((2, 1, *image_shape), generator=torch.Generator().manual_seed(0))


def _svd(matrix: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Computes U (m, r), S (r,) and V^T (r, n) of a matrix (m, n), without the directions where S is near 0."""
    if matrix is None:
        return None
    matrix = matrix.double()
    gram = matrix @ matrix.T
    norms = gram.diagonal().sqrt()
    if not norms.max() > 0:
        raise ValueError("The operator maps every image to 0: nothing is observed.")
    if (gram - gram.diagonal().diag()).abs().max() <= 1e-9 * norms.max() ** 2:  # orthogonal rows: no search is needed
        left, singular_values, right = torch.eye(len(matrix), dtype=torch.double), norms, matrix / norms[:, None]
    else:
        left, singular_values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = singular_values > RELATIVE_TOLERANCE * singular_values.max()
    return left[:, kept].float(), singular_values[kept].float(), right[kept].float()
