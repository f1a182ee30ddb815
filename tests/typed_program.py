# pyright: basic, reportUnnecessaryTypeIgnoreComment=true
"""A program with this package as a type checker reads it. CI checks it, and nobody runs it."""

from typing import assert_type

import torch

import tiny_diffusers
from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDDIMScheduler,
    TinyPipeline,
    TinyPixelCNNPipeline,
    TinyUNet2DModel,
)


# A name is its own class, not Any, and no other name is known
assert_type(TinyUNet2DModel(sample_size=8), TinyUNet2DModel)
assert_type(tiny_diffusers.TinyFlowMatchScheduler(), tiny_diffusers.TinyFlowMatchScheduler)
print(tiny_diffusers.TinyPipelines)  # pyright: ignore[reportAttributeAccessIssue]
TinyUNet2DModel(sample_sizes=8)  # pyright: ignore[reportCallIssue]

# A pipeline loads as the class that was asked for
assert_type(TinyPipeline.from_pretrained("runs/ddpm-digits"), TinyPipeline)
assert_type(TinyConditionalPipeline.from_pretrained("runs/ddpm-cifar10"), TinyConditionalPipeline)
pipe = TinyPipeline(TinyUNet2DModel(sample_size=8), TinyDDIMScheduler(beta_schedule="cosine"))
assert_type(TinyConditionalPipeline.from_pipe(pipe), TinyConditionalPipeline)

# The calls of the README need no cast
images = pipe(batch_size=16, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")
pipe(batchsize=16)  # pyright: ignore[reportCallIssue]
print(pipe(batch_size=16).pictures)  # pyright: ignore[reportAttributeAccessIssue]
(samples,) = pipe(batch_size=16, return_dict=False)
TinyConditionalPipeline.from_pipe(pipe)(class_labels=["cat", "frog"], guidance_scale=3.0).images[0].save("cat.png")
assert_type(TinyPixelCNNPipeline.from_pretrained("runs/pixelcnn").bits_per_dim(samples), torch.Tensor)

# So do those of a training loop
scheduler, sample = TinyDDIMScheduler(), torch.zeros(2, 1, 8, 8)
output = TinyUNet2DModel(sample_size=8)(sample, 10).sample
loss = scheduler.training_loss(output, sample, torch.randn_like(sample), torch.tensor([10, 20]))
assert_type(loss, torch.Tensor)
loss.backward()
