import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

from tiny_diffusers import pipelines
from tiny_diffusers.models import TinyUNet2DModel
from tiny_diffusers.pipelines import TinyConditionalPipeline, TinyInterpolationPipeline, TinyPipeline
from tiny_diffusers.schedulers import TinyDDIMScheduler, TinyDDPMScheduler


NAMES = {0: "cat", 1: "dog", 2: "frog"}


@pytest.fixture(params=["stock", "tiny"])
def unet(request, make_unet):
    return make_unet(stock=request.param == "stock", classes=3)


@pytest.fixture
def saved(make_unet, tmp_path):
    """Returns the folder of an unconditional checkpoint with a network of this package."""
    TinyPipeline(make_unet(stock=False), TinyDDIMScheduler()).save_pretrained(tmp_path)
    return tmp_path


def read(path) -> dict:
    return json.loads(path.read_text())


def edit(path, **changes):
    path.write_text(json.dumps(read(path) | changes))


def images(pipe, *labels, **arguments) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"} | arguments
    return pipe(*labels, generator=torch.Generator().manual_seed(0), **arguments).images


# ----------------------------------------------------------------------------------------------------- from_pretrained


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        (TinyDDIMScheduler, {"beta_schedule": "cosine", "prediction_type": "v_prediction"}),
        (TinyDDPMScheduler, {"beta_schedule": "sigmoid", "loss_type": "huber"}),
        (diffusers.DPMSolverMultistepScheduler, {}),
    ],
)
@pytest.mark.parametrize("stock", [True, False])
def test_a_pipeline_survives_saving_and_loading(make_unet, tmp_path, stock, scheduler, config):
    pipe = TinyPipeline(make_unet(stock=stock), scheduler(**config))
    pipe.save_pretrained(tmp_path)
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert type(loaded) is TinyPipeline
    assert type(loaded.scheduler) is scheduler and type(loaded.unet) is type(pipe.unet)
    for name, value in config.items():
        assert loaded.scheduler.config[name] == pipe.scheduler.config[name], (name, value)
    assert loaded.unet.dtype == torch.float32 and not loaded.unet.training
    np.testing.assert_array_equal(images(loaded), images(pipe))


def test_the_base_class_returns_the_class_that_the_checkpoint_names(unet, tmp_path):
    for pipeline_class in (TinyConditionalPipeline, TinyInterpolationPipeline):
        folder = tmp_path / pipeline_class.__name__
        pipeline_class(unet, TinyDDIMScheduler(), id2label=NAMES, null_class_id=None).save_pretrained(folder)
        loaded = TinyPipeline.from_pretrained(folder)
        assert type(loaded) is pipeline_class
        assert loaded.config.id2label == NAMES and loaded.config.null_class_id is None


def test_a_subclass_loads_itself(unet, tmp_path):
    pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(), id2label=NAMES)
    pipe.save_pretrained(tmp_path)
    loaded = TinyInterpolationPipeline.from_pretrained(tmp_path)
    assert type(loaded) is TinyInterpolationPipeline and loaded.config.id2label == NAMES
    renamed = TinyPipeline.from_pretrained(tmp_path, id2label={0: "tiger"})
    assert renamed.config.id2label == {0: "tiger"}


def test_a_conditional_pipeline_survives_saving_and_loading(unet, tmp_path):
    pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(), id2label=NAMES)
    pipe.save_pretrained(tmp_path)
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert loaded.config.null_class_id == 3
    for labels in (["cat", "frog"], [1, 1]):
        expected = images(pipe, labels, guidance_scale=2.0)
        np.testing.assert_array_equal(images(loaded, labels, guidance_scale=2.0), expected)


def test_class_dropout_prob_is_saved(unet, tmp_path):
    TinyConditionalPipeline(unet, TinyDDIMScheduler(), class_dropout_prob=0.1).save_pretrained(tmp_path)
    for pipeline_class in (TinyPipeline, TinyInterpolationPipeline):
        assert pipeline_class.from_pretrained(tmp_path).config.class_dropout_prob == 0.1


def test_from_pipe_shares_the_components(unet):
    pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(), id2label=NAMES)
    walk = TinyInterpolationPipeline.from_pipe(pipe)
    assert walk.unet is pipe.unet and walk.config.id2label == NAMES


def test_components_can_be_given(saved, make_unet):
    unet, scheduler = make_unet(stock=False), TinyDDPMScheduler()
    loaded = TinyPipeline.from_pretrained(saved, unet=unet, scheduler=scheduler)
    assert loaded.unet is unet and loaded.scheduler is scheduler


def test_the_dtype_is_float32_by_default(make_unet, tmp_path):
    TinyPipeline(make_unet(stock=False).half(), TinyDDIMScheduler()).save_pretrained(tmp_path)
    assert TinyPipeline.from_pretrained(tmp_path).unet.dtype == torch.float32
    assert TinyPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_a_hub_id_is_loaded_from_the_cache(saved, tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    repository, commit = cache / "models--me--digits", "0" * 40
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = TinyPipeline.from_pretrained("me/digits", cache_dir=cache, local_files_only=True)
    assert type(loaded) is TinyPipeline and loaded.name_or_path == "me/digits"
    np.testing.assert_array_equal(images(loaded), images(TinyPipeline.from_pretrained(saved)))


def test_a_variant_is_loaded(make_unet, tmp_path):
    pipe = TinyPipeline(make_unet(stock=False), TinyDDIMScheduler())
    pipe.save_pretrained(tmp_path, variant="fp16")
    np.testing.assert_array_equal(images(TinyPipeline.from_pretrained(tmp_path, variant="fp16")), images(pipe))
    with pytest.raises(ValueError, match="variant=ema"):
        TinyPipeline.from_pretrained(tmp_path, variant="ema")


# ------------------------------------------------------------------------------------- exchange with stock diffusers


@pytest.mark.parametrize(("ours", "stock"), [(TinyDDIMScheduler, DDIMScheduler), (TinyDDPMScheduler, DDPMScheduler)])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine", "sigmoid", "quadratic"])
def test_stock_diffusers_loads_and_samples_a_checkpoint_with_a_stock_network(
    make_unet, tmp_path, ours, stock, beta_schedule
):
    options = {"prediction_type": "v_prediction", "clip_sample": False, "loss_type": "huber"}
    pipe = TinyPipeline(make_unet(), ours(beta_schedule=beta_schedule, **options))
    pipe.save_pretrained(tmp_path)
    index = read(tmp_path / "model_index.json")
    assert index["_class_name"] == "DDIMPipeline" and index["scheduler"] == ["diffusers", stock.__name__]
    config = read(tmp_path / "scheduler" / "scheduler_config.json")
    assert config["_class_name"] == stock.__name__ and config["loss_type"] == "huber"

    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is DDIMPipeline
    pipe.scheduler = TinyDDIMScheduler.from_config(pipe.scheduler.config)
    for eta in (0.0, 1.0):
        np.testing.assert_allclose(images(loaded, eta=eta), images(pipe, eta=eta), atol=1e-5)


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "ours"),
    [(DDIMPipeline, DDIMScheduler, TinyDDIMScheduler), (DDPMPipeline, DDPMScheduler, TinyDDPMScheduler)],
)
def test_a_stock_checkpoint_is_loaded_into_this_packages_classes(make_unet, tmp_path, pipeline, scheduler, ours):
    stock = pipeline(make_unet(), scheduler(beta_schedule="scaled_linear", clip_sample=False))
    stock.save_pretrained(tmp_path)
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert type(loaded) is TinyPipeline and type(loaded.scheduler) is ours
    np.testing.assert_allclose(images(loaded, eta=0.0), images(stock), atol=1e-5)


def test_stock_diffusers_loads_the_components_of_a_conditional_checkpoint(make_unet, tmp_path):
    TinyConditionalPipeline(make_unet(classes=3), TinyDDIMScheduler(), id2label=NAMES).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is DDIMPipeline and loaded.unet.config.num_class_embeds == 4


def test_a_checkpoint_has_the_files_and_keys_of_stock_diffusers(make_unet, tmp_path):
    TinyPipeline(make_unet(), TinyDDIMScheduler()).save_pretrained(tmp_path / "ours")
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / "stock")
    ours, stock = (
        {path.relative_to(folder) for path in folder.rglob("*")} for folder in (tmp_path / "ours", tmp_path / "stock")
    )
    assert ours == stock
    assert set(read(tmp_path / "ours" / "model_index.json")) == set(read(tmp_path / "stock" / "model_index.json"))


# ----------------------------------------------------------------------------------------------- code in checkpoints


def test_this_packages_classes_are_found_whatever_module_the_index_names(saved):
    for unet_module in ("unet_tiny", "diffusers_modules.local.unet_tiny", "no.such.module", "subprocess"):
        edit(
            saved / "model_index.json",
            _class_name=["pipeline_tiny", "TinyPipeline"],
            unet=[unet_module, "TinyUNet2DModel"],
            scheduler=["scheduling_tiny_ddim", "TinyDDIMScheduler"],
        )
        loaded = TinyPipeline.from_pretrained(saved)
        assert type(loaded) is TinyPipeline
        assert type(loaded.unet) is TinyUNet2DModel and type(loaded.scheduler) is TinyDDIMScheduler


def test_code_beside_the_weights_is_not_run_for_this_packages_classes(saved):
    marker = saved / "ran"
    for path in ("pipeline_tiny.py", "unet/unet_tiny.py"):
        (saved / path).write_text(f"open({str(marker)!r}, 'w')\n")
    named = {"_class_name": ["pipeline_tiny", "TinyPipeline"], "unet": ["unet_tiny", "TinyUNet2DModel"]}
    edit(saved / "model_index.json", **named)
    TinyPipeline.from_pretrained(saved)
    assert not marker.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": ["subprocess", "Popen"]},
        {"unet": ["unet_mine", "MyUNet"]},
        {"unet": ["os", "TinyVirus"]},
        {"unet": ["diffusers", "DiffusionPipeline"]},
        {"unet": ["diffusers", "no_such_class"]},
        {"unet": ["diffusers", "UNet2DConditionModel"]},
        {"unet": ["diffusers", "SD3Transformer2DModel"]},
        {"unet": ["transformers", "AutoModel"]},
        {"unet": ["tiny_diffusers", "TinyPipeline"]},
        {"../evil": ["diffusers", "UNet2DModel"]},
        {"/evil": ["diffusers", "UNet2DModel"]},
        {"unet": ["diffusers"]},
        {"_class_name": "StableDiffusionPipeline"},
        {"_class_name": ["pipeline_mine", "MyPipeline"]},
        {"_class_name": "TinyDDIMScheduler"},
        {"_class_name": None},
    ],
)
def test_other_classes_are_refused(saved, changes):
    marker = saved / "ran"
    for path in ("pipeline_mine.py", "unet/unet_mine.py"):
        (saved / path).write_text(f"open({str(marker)!r}, 'w')\n")
    edit(saved / "model_index.json", **changes)
    with pytest.raises(ValueError, match="model_index.json|only networks|not a pipeline of this package") as error:
        TinyPipeline.from_pretrained(saved)
    assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.parametrize("loader", [TinyPipeline, TinyConditionalPipeline, TinyInterpolationPipeline])
@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("pipeline_mine.py", {"_class_name": ["pipeline_mine", "TinyMine"], "_tiny_class_name": None}),
        ("None.py", {}),
        ("scheduler/None.py", {"scheduler": [None, None]}),
        ("scheduler/None.py", {"scheduler": [None, "Mine"]}),
        ("unet/a.py", {"unet": "ab"}),
        ("unet/a.py", {"unet": {"a": 1, "b": 2}}),
        ("unet/diffusers.py", {}),
    ],
)
def test_no_file_of_the_checkpoint_is_run_whatever_the_index_says(make_unet, tmp_path, loader, file, changes):
    """diffusers 0.35 to 0.37 run such files without `trust_remote_code`."""
    TinyConditionalPipeline(make_unet(classes=3), TinyDDIMScheduler()).save_pretrained(tmp_path)
    (tmp_path / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass TinyMine: pass\nclass b: pass\n")
    edit(tmp_path / "model_index.json", **changes)
    with pytest.raises(ValueError) as error:
        loader.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_file_that_poses_as_a_library_is_refused(make_unet, tmp_path):
    TinyPipeline(make_unet(), TinyDDIMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusers.py").write_text("")
    with pytest.raises(ValueError, match="poses as the library"):
        TinyPipeline.from_pretrained(tmp_path)


def test_trusted_code_is_run(saved):
    (saved / "pipeline_mine.py").write_text(
        "from diffusers import DDIMPipeline\n\n\nclass MyPipeline(DDIMPipeline):\n    mine = True\n"
    )
    edit(saved / "model_index.json", _class_name=["pipeline_mine", "MyPipeline"])
    assert TinyPipeline.from_pretrained(saved, trust_remote_code=True).mine


def test_pickled_weights_run_no_code(saved):
    class Virus:
        def __reduce__(self):
            return open, (str(saved / "ran"), "w")

    os.remove(saved / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({"weight": Virus()}, saved / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError):
        TinyPipeline.from_pretrained(saved)
    assert not (saved / "ran").exists()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_missing_checkpoint_is_named(tmp_path, monkeypatch):
    for given in ("no such name", "../nowhere/b/c"):
        with pytest.raises(ValueError) as error:
            TinyPipeline.from_pretrained(given)
        assert str(error.value) == (
            f"There is no folder '{given}' here, and no model of that name that can be loaded from the Hub (whose names "
            "are of the form owner/name)."
        )
    with pytest.raises(ValueError, match="no folder 'me/nothing-of-that-name' here, and no model of that name"):
        TinyPipeline.from_pretrained("me/nothing-of-that-name", local_files_only=True, cache_dir=tmp_path)
    (tmp_path / "runs" / "ddpm-digits").mkdir(parents=True)
    with pytest.raises(ValueError) as error:
        TinyPipeline.from_pretrained(tmp_path / "runs" / "ddpm-digts")
    assert str(error.value).endswith(f"ddpm-digts'. Did you mean '{tmp_path / 'runs' / 'ddpm-digits'}'?")
    for given in (tmp_path / "mnist", "runs/mnist"):  # no owner "runs" is asked for on the Hub
        (tmp_path / "runs").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=f"no folder '{given}'[.]"):
            TinyPipeline.from_pretrained(given)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        TinyPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"_class_name": 3}'])
def test_a_damaged_index_is_named(saved, content):
    (saved / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match="model_index.json|not a pipeline of this package"):
        TinyPipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("model_index.json", {"_class_name": {"a": 1}}),
        ("model_index.json", {"unet": {"a": 1}}),
        ("model_index.json", {"unet": None}),
        ("unet/config.json", {"_use_default_values": 5}),
        ("unet/config.json", {"quantization_config": 5}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1e13}),
        ("scheduler/scheduler_config.json", {"trained_betas": {"a": 1}}),
        ("scheduler/scheduler_config.json", {"clip_sample_range": "1"}),
        ("scheduler/scheduler_config.json", {"beta_start": None}),
        ("scheduler/scheduler_config.json", {"beta_end": float("nan")}),
        ("scheduler/scheduler_config.json", {"beta_schedule": 7}),
        ("unet/config.json", {"dropout": [0.1]}),
        ("unet/config.json", {"in_channels": float("-inf")}),
    ],
)
def test_config_values_of_a_wrong_type_are_refused_in_one_line(saved, path, changes):
    edit(saved / path, **changes)
    with pytest.raises(ValueError, match=f"{saved.name}.* is damaged") as error:
        TinyPipeline.from_pretrained(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_num_groups": 5},
        {"attn_norm_num_groups": True},
        {"downsample_padding": 2},
        {"time_embedding_type": "x"},
        {"sample_size": 8.0},
    ],
)
def test_a_stock_network_that_no_image_can_pass_is_refused_in_one_line(make_unet, tmp_path, changes):
    TinyPipeline(make_unet(stock=True), TinyDDIMScheduler()).save_pretrained(tmp_path)
    edit(tmp_path / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{tmp_path.name} can't be loaded: ") as error:
        TinyPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"layers_per_block": 10**6}, 64),
        ({"sample_size": 10**6}, 4096),
        ({"in_channels": 10**6}, 4096),
        ({"block_out_channels": [8] * 65}, 4096),
        ({"norm_num_groups": 2**21}, 2**20),
    ],
)
def test_sizes_that_would_take_all_memory_or_time_are_refused(saved, changes, limit):
    edit(saved / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is too large, at most 64 integers up to {limit} are"):
        TinyPipeline.from_pretrained(saved)


def test_weights_outside_the_folder_are_refused(saved):
    index = saved / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}))
    with pytest.raises(ValueError, match="names '../../secret.safetensors', which is not a file in the same folder"):
        TinyPipeline.from_pretrained(saved)


def test_out_of_memory_is_not_reported_as_damage(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        TinyPipeline.from_pretrained(saved)


def test_missing_weights_are_named(saved):
    path = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unet lacks 1 weights, first conv_in.weight"):
        TinyPipeline.from_pretrained(saved)


# ------------------------------------------------------------------------------------- checkpoints of training runs


def test_a_training_checkpoint_is_loaded_with_its_averaged_weights(saved, make_unet):
    average = make_unet(stock=False)
    torch.nn.init.constant_(average.conv_out.bias, 0.5)
    average.save_pretrained(saved / "unet_ema")
    loaded = TinyPipeline.from_pretrained(saved)
    for name, value in average.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value), name
    own = make_unet(stock=False)
    assert TinyPipeline.from_pretrained(saved, unet=own).unet is own  # a given network stays


def test_pickled_weights_are_not_read(saved, make_unet):
    (saved / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(make_unet(stock=False).state_dict(), saved / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
        TinyPipeline.from_pretrained(saved)


def test_an_unknown_device_map_is_named(saved):
    with pytest.raises(NotImplementedError, match="auto not supported"):
        TinyPipeline.from_pretrained(saved, device_map="auto")


# ----------------------------------------------------------------------------------------------------- custom_pipeline


@pytest.fixture
def stock_checkpoint(make_unet, tmp_path):
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.mark.parametrize("kind", ["", "_conditional", "_interpolation", "_img2img", "_inpaint", "_restoration"])
def test_each_pipeline_of_diffusion_is_a_community_pipeline_for_stock_checkpoints(stock_checkpoint, kind):
    file = Path(pipelines.__file__).with_name(f"pipeline_tiny{kind}.py")
    pipe = DiffusionPipeline.from_pretrained(stock_checkpoint, custom_pipeline=str(file), trust_remote_code=True)
    assert type(pipe).__module__ == f"diffusers_modules.local.{file.stem}"
    assert type(pipe.unet) is diffusers.UNet2DModel and type(pipe.scheduler) is DDIMScheduler
    if not kind:
        np.testing.assert_array_equal(images(pipe), images(TinyPipeline(pipe.unet, pipe.scheduler)))


def test_a_folder_with_the_file_as_pipeline_py_is_a_community_pipeline_too(stock_checkpoint, tmp_path):
    code = shutil.copytree(Path(pipelines.__file__).parent, tmp_path / "code")
    shutil.copyfile(code / "pipeline_tiny_inpaint.py", code / "pipeline.py")
    pipe = DiffusionPipeline.from_pretrained(stock_checkpoint, custom_pipeline=str(code), trust_remote_code=True)
    assert type(pipe).__name__ == "TinyInpaintPipeline" and type(pipe).__module__ == "diffusers_modules.local.pipeline"
