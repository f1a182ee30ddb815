"""The files of pipelines, schedulers and networks work where this package is not installed."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tiny_diffusers import hub, models, pipelines, schedulers
from tiny_diffusers.pipelines import TinyConditionalPipeline, TinyPipeline


ROOMS = [Path(room.__file__).parent for room in (pipelines, schedulers, models)]
FILES = [file for room in ROOMS for file in sorted(room.glob("*.py")) if file.name != "__init__.py"]
ALLOWED = {"diffusers", "numpy", "PIL", "torch"} | sys.stdlib_module_names

# Loads each folder in an environment without this package and saves its samples there.
SAMPLE = """
import json, sys
sys.modules["tiny_diffusers"] = None
import numpy as np, torch
from diffusers import DiffusionPipeline
for folder, load, call in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **load)
    call |= {name: np.array(call[name], np.float32) for name in ("image", "mask_image") if name in call}
    images = pipe(generator=torch.Generator().manual_seed(0), output_type="np", **call).images
    np.save(folder + "/images.npy", images)
    print(type(pipe).__name__)
"""


def imports(file: Path) -> tuple[set[str], set[str]]:
    """Returns the packages and the siblings that a file imports, at any place in it."""
    packages, siblings = set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module, f"{file.name} imports from outside its folder"
            siblings.add(node.module)
    return packages, siblings


def definitions(file: Path) -> set[str]:
    """Returns the names of the functions, classes and constants that a file defines."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    assigned = {target.id for node in nodes if isinstance(node, ast.Assign) for target in node.targets}
    return assigned | {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def check_network_code(folder: Path, network: type) -> None:
    """Checks that an exported network has one file, the only one that diffusers downloads, with all that it needs."""
    source = Path(inspect.getsourcefile(network))
    (file,) = folder.glob("*.py")
    assert file.name == source.name and imports(file)[1] == set()
    siblings = [source.with_name(f"{sibling}.py") for sibling in imports(source)[1]]
    assert [sibling.name for sibling in siblings] == ["layers_tiny.py"]
    assert definitions(file) == set.union(*map(definitions, [source, *siblings]))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_that_travels_needs_only_its_siblings(file):
    packages, siblings = imports(file)
    assert packages <= ALLOWED
    for sibling in siblings:
        assert imports(file.with_name(f"{sibling}.py"))[1] == set()


@pytest.mark.parametrize("file", [file for file in FILES if file.parent == ROOMS[-1]], ids=lambda file: file.stem)
def test_a_network_redefines_no_name_of_its_siblings(file):
    for sibling in imports(file)[1]:  # an exported checkpoint has both in one file
        assert not definitions(file) & definitions(file.with_name(f"{sibling}.py"))


def test_file_names_are_unique_across_the_rooms():
    names = [file.name for file in FILES]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_checkpoints_with_their_code_sample_the_same_without_this_package(make_unet, quiet, tmp_path):
    unets = {"stock": make_unet(classes=3), "tiny": make_unet(stock=False, classes=3)}
    ddim, labels = schedulers.TinyDDIMScheduler(), {0: "cat", 1: "dog"}
    steps = {"num_inference_steps": 4}
    guided = {"class_labels": ["cat", "dog"], "guidance_scale": 2.0, **steps}
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8, 1)
    mask = np.float32(np.arange(64).reshape(8, 8) % 8 > 3)
    sizes = {"sample_size": (8, 12), "block_out_channels": (8,), "num_class_embeds": 2, "num_conditions": 2}
    generator = models.TinyDCGANGenerator(latent_dim=4, out_channels=1, **sizes).eval()
    discriminator = models.TinyDCGANDiscriminator(in_channels=1, **sizes)
    vae = models.TinyVAEModel(in_channels=1, latent_dim=4, **sizes)
    sizes = {"sample_size": (8, 12), "in_channels": 1, "out_channels": 1, "num_class_embeds": 2}
    transformer = models.TinyTransformer2DModel(**sizes, num_layers=2, num_attention_heads=1, attention_head_dim=8)
    for parameter in transformer.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    autoencoder = AutoencoderKL(1, 1, block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=8)
    pixelcnn = models.TinyPixelCNNModel((4, 6), 1, 4, hidden_channels=8, num_layers=1, num_conditions=2).eval()
    statistics = {"names": ["smiling", "age"], "means": [0.5, 40], "deviations": [0.5, 10]}
    statistics |= {"lows": [0, 20], "highs": [1, 60]}
    conditions = {"conditions": {"age": [20, 60], "smiling": 1}}
    by_class_too = {"class_labels": ["cat", "dog"], **conditions}
    plans = {
        "unconditional": (TinyPipeline(make_unet(stock=False), ddim), {"batch_size": 2, **steps}),
        "rectangle": (TinyPipeline(make_unet(stock=False, sample_size=(8, 12)), ddim), {"batch_size": 2, **steps}),
        "stock_rectangle_by_edm": (
            TinyPipeline(make_unet(sample_size=(8, 12)), schedulers.TinyEDMScheduler()),
            {"batch_size": 2, **steps},
        ),
        "conditional": (TinyConditionalPipeline(unets["tiny"], ddim, labels), guided),
        "by_image": (
            TinyConditionalPipeline(
                make_unet(stock=False, classes=3, in_channels=2), ddim, labels, conditioning="low_resolution:2"
            ),
            {"image": image[:, ::2, ::2], **guided},
        ),
        "by_conditions": (
            TinyConditionalPipeline(
                make_unet(stock=False, classes=3, num_conditions=2), ddim, labels, condition_statistics=statistics
            ),
            {**conditions, **guided},
        ),
        "by_image_around_stock": (
            TinyConditionalPipeline(make_unet(in_channels=2), ddim, conditioning="image:1"),
            {"image": image, **steps},
        ),
        "around_stock": (TinyConditionalPipeline(unets["stock"], ddim, labels), guided),
        "flow": (
            TinyPipeline(make_unet(stock=False), schedulers.TinyFlowMatchScheduler(solver="heun")),
            {"batch_size": 2, "eta": 1.0, **steps},
        ),
        "edm": (
            TinyConditionalPipeline(unets["tiny"], schedulers.TinyEDMScheduler(clip_sample=True), labels),
            guided,
        ),
        "walk": (
            pipelines.TinyInterpolationPipeline(unets["tiny"], ddim),
            {"seeds": [0, 1], "class_labels": [0, 2], **steps},
        ),
        "img2img": (pipelines.TinyImg2ImgPipeline(unets["tiny"], ddim), {"image": image, "class_labels": 1, **steps}),
        "inpaint": (
            pipelines.TinyInpaintPipeline(unets["tiny"], ddim),
            {"image": image, "mask_image": mask, "class_labels": 1, **steps},
        ),
        "restoration": (
            pipelines.TinyRestorationPipeline(unets["tiny"], ddim),
            {"image": image[:, ::2, ::2], "operator": "super_resolution", "factor": 2, "class_labels": 1, **steps},
        ),
        "transformer": (TinyConditionalPipeline(transformer, schedulers.TinyFlowMatchScheduler(), labels), guided),
        "vae": (pipelines.TinyVAEPipeline(vae, None, labels, statistics), by_class_too),
        "autoencoder": (pipelines.TinyVAEPipeline(autoencoder), {"batch_size": 2}),
        "latent": (
            pipelines.TinyLatentPipeline(autoencoder, make_unet(stock=False, classes=3, channels=2), ddim, labels),
            guided,
        ),
        "pixelcnn": (pipelines.TinyPixelCNNPipeline(pixelcnn, condition_statistics=statistics), conditions),
        "dcgan": (pipelines.TinyDCGANPipeline(generator, discriminator, labels, None, statistics), by_class_too),
    }
    jobs = []
    for name, (pipe, call) in plans.items():
        hub.export(pipe, tmp_path / name)
        for key, component in pipe.components.items():
            if type(component).__name__ in models.__all__:
                check_network_code(tmp_path / name / key, type(component))
        jobs.append([str(tmp_path / name), {}, call])
    # a stock checkpoint, loaded into one of our pipelines by its file
    stock_folder = tmp_path / "community"
    pipe = TinyConditionalPipeline(unets["stock"], ddim, labels)
    pipe.save_pretrained(stock_folder)
    plans["community"] = (pipe, guided)
    jobs.append([str(stock_folder), {"custom_pipeline": str(ROOMS[0] / "pipeline_tiny_conditional.py")}, guided])

    ran = subprocess.run(
        [sys.executable, "-c", SAMPLE, json.dumps(jobs, default=np.ndarray.tolist)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [type(pipe).__name__ for pipe, _ in plans.values()]
    for name, (pipe, call) in plans.items():
        here = quiet(pipe)(generator=torch.Generator().manual_seed(0), output_type="np", **call).images
        np.testing.assert_allclose(np.load(tmp_path / name / "images.npy"), here, atol=1e-5)
        assert type(TinyPipeline.from_pretrained(tmp_path / name)) is type(pipe)
