"""
Train a PixelCNN on small images: the gated one, PixelCNN++, a PixelRNN of row LSTMs, or a small baseline.

    accelerate launch train_scripts/train_pixelcnn.py                                       # the embedded 8x8 digits
    accelerate launch train_scripts/train_pixelcnn.py --config train_scripts/recipes/pixelcnn_mnist.yaml
"""

import sys

from tiny_diffusers.families.conditions import measure_conditions
from tiny_diffusers.families.pixelcnn import (
    PixelCNN,
    PixelCNNArguments,
    build_pixelcnn,
    resolve_pixelcnn,
    take_single_image,
)
from tiny_diffusers.pipelines.pipeline_tiny_pixelcnn import TinyPixelCNNPipeline
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.family import load_pretrained
from tiny_diffusers.training.process import launch, load_data, setup_process
from tiny_diffusers.training.settings import resolve_settings
from tiny_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(PixelCNNArguments, argv, __doc__)
    accelerator = setup_process(arguments)
    data = load_data(arguments, accelerator, require_labels=arguments.class_conditional)
    if arguments.single_image is not None:
        data = take_single_image(data, arguments.single_image)
    pretrained = load_pretrained(arguments, TinyPixelCNNPipeline)
    settings = resolve_settings(arguments, accelerator, data, **resolve_pixelcnn(arguments, data, pretrained))

    data, statistics = measure_conditions(settings, data)
    num_conditions = None if statistics is None else len(statistics.names)
    pixelcnn = build_pixelcnn(settings, data, pretrained, num_conditions)
    id2label = data.id2label if settings.class_conditional else None
    family = PixelCNN(pixelcnn, id2label, settings.class_dropout_prob, settings.temperature, statistics)

    Trainer(settings, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
