"""
For all tests: a training run that takes a second (its flags, the run in this process, its log), and pipelines of the
families without guidance that take conditions.
"""

import json
from pathlib import Path
from unittest import mock


TINY_NETWORK = [
    *("--block_out_channels", "8", "--norm_num_groups", "4", "--attention", "none", "--mid_attention", "none"),
    *("--layers_per_block", "1"),
]
TINY_RUN = [
    *("--max_train_samples", "64", "--train_batch_size", "8", "--eval_batch_size", "4", "--checkpointing_steps", "2"),
    *("--logging_steps", "2", "--mixed_precision", "no", "--num_threads", "1"),
]
TINY_DIFFUSION = [*TINY_NETWORK, *TINY_RUN, "--ddpm_num_inference_steps", "2"]


def train(folder: Path, *argv: str, steps: int | None = 6, script=None, flags=TINY_DIFFUSION, plots=False) -> Path:
    """
    Runs a script (the unconditional one by default) in this process; returns the run's folder. The loss curves are
    drawn only with `plots`: matplotlib takes a third of a tiny run.
    """
    from matplotlib.figure import Figure

    from tiny_diffusers.train_scripts import train_unconditional

    length = ["--max_train_steps", str(steps)] if steps else []
    draw = Figure.savefig if plots else lambda figure, path: Path(path).touch()
    with mock.patch.object(Figure, "savefig", draw):
        (script or train_unconditional).main([*flags, *length, "--output_dir", str(folder), *argv])
    return folder


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def conditional_pipeline(family: str, statistics: dict | None, classes: int | None = None, **options):
    """
    Builds the pipeline of a PixelCNN, VAE or DCGAN of images of 12x16 pixels and two channels (of a PixelCNN, 3x4), with
    conditions, classes, or both, and outputs that are not zero.
    """
    import torch

    from tiny_diffusers import models, pipelines

    torch.manual_seed(0)
    given = {"num_class_embeds": classes, "num_conditions": statistics and len(statistics["names"])}
    if family == "pixelcnn":
        network = models.TinyPixelCNNModel((3, 4), 2, 16, hidden_channels=8, num_layers=1, **given)
        pipeline_class = pipelines.TinyPixelCNNPipeline
    elif family == "vae":
        network = models.TinyVAEModel((12, 16), 2, 4, (8,), class_embed_dim=8, **given)
        pipeline_class = pipelines.TinyVAEPipeline
    else:
        network = models.TinyDCGANGenerator((12, 16), 2, 4, (8,), class_embed_dim=8, **given)
        pipeline_class = pipelines.TinyDCGANPipeline
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    names = None if classes is None else {i: f"kind {i}" for i in range(classes)}
    pipe = pipeline_class(network.eval(), id2label=names, condition_statistics=statistics, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
