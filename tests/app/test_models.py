"""What the app reads of a checkpoint without loading it, and how it keeps loaded ones."""

import json
import shutil
import types

import psutil
import pytest

from tiny_diffusers import TinyDDIMScheduler, TinyEDMScheduler, TinyFlowMatchScheduler, TinyPipeline, hardware, zoo
from tiny_diffusers.app.controls import sampling_settings
from tiny_diffusers.app.models import MAX_CONDITIONS, ModelStore, list_models, published_checkpoints
from tiny_diffusers.app.server import _warm_up
from tiny_diffusers.commands import shared
from tiny_diffusers.errors import UserError


def test_the_configs_say_what_a_model_can_do(store):
    found = {model.name: model for model in store.models}
    assert {name: model.family for name, model in found.items()} == {
        **dict.fromkeys(
            ("diffusion", "conditional", "flow", "rectangle", "channels", "conditions", "enlarging"), "diffusion"
        ),
        **{name: name for name in ("pixelcnn", "vae", "dcgan")},
        **{f"{name}_of_all": name for name in ("pixelcnn", "vae")},
    }
    assert found["conditional"].classes == found["pixelcnn"].classes == ("cat", "dog", "frog")
    assert found["conditional"].can_be_guided and found["conditions"].can_be_guided
    assert found["rectangle"].can_be_guided
    assert not found["diffusion"].can_be_guided and not found["pixelcnn"].can_be_guided
    assert (found["diffusion"].objective, found["flow"].objective) == ("betas", "flow")
    assert found["rectangle"].size == (12, 8)  # width, height
    assert found["channels"].num_channels == 2 and found["vae"].num_channels == found["dcgan"].num_channels == 1
    assert [condition.name for condition in found["conditions"].conditions] == ["age", "size"]
    assert found["conditions"].can_walk and found["conditions"].can_edit and not found["enlarging"].can_edit
    assert found["enlarging"].takes_picture and found["enlarging"].is_picture_made
    assert found["enlarging"].given_picture(True) == ((8, 8), 1)
    assert found["enlarging"].given_picture(False) == ((4, 4), 1)
    assert not found["pixelcnn"].can_walk and not found["dcgan"].can_edit and not found["channels"].can_edit


@pytest.mark.parametrize("name", ["diffusion", "flow", "rectangle"])
def test_the_defaults_of_sampling_are_those_of_the_pipeline(store, name):
    index = [model.name for model in store.models].index(name)
    model = store.models[index]
    with store.use(index) as (pipe,):
        assert (model.default_steps, model.default_eta) == (pipe._default_steps, pipe._default_eta)


def test_published_models_are_listed_by_default():
    models = list_models(published_checkpoints())
    assert tuple(model.name for model in models) == zoo.NAMES


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"unet": ["diffusers", "UNet2DModel"], "_class_name": "X"}'])
def test_what_is_no_model_is_refused_in_a_line(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=r"model_index.json|config"):
        list_models([str(tmp_path)])


@pytest.mark.parametrize(
    "scheduler",
    [
        TinyDDIMScheduler(),
        *(TinyFlowMatchScheduler(solver=solver) for solver in ("euler", "multistep", "heun")),
        TinyEDMScheduler(solver="multistep"),
    ],
)
def test_the_page_begins_with_the_noise_of_the_pipeline(tmp_path, tiny_unet, scheduler):
    pipe = TinyPipeline(tiny_unet(), scheduler)
    pipe.save_pretrained(tmp_path)
    (model,) = list_models([str(tmp_path)])
    assert sampling_settings(model, ["eta"])[0]["value"] == model.default_eta == pipe._default_eta


def test_a_consistency_model_has_two_steps(tmp_path, tiny_unet):
    TinyPipeline(tiny_unet(), TinyFlowMatchScheduler(stochastic_sampling=True)).save_pretrained(tmp_path)
    (model,) = list_models([str(tmp_path)])
    assert sampling_settings(model, ["steps"])[0]["value"] == model.default_steps == 2


def test_more_conditions_than_the_page_has_room_for_are_refused(tmp_path, checkpoints):
    shutil.copytree(checkpoints["conditions"], tmp_path / "many")
    path = tmp_path / "many" / "model_index.json"
    numbers = list(range(MAX_CONDITIONS + 1))
    statistics = {"names": [f"c{i}" for i in numbers], "means": numbers, "lows": numbers, "highs": numbers}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"condition_statistics": statistics}))
    with pytest.raises(UserError, match=f"takes {len(numbers)} conditions: the app has room for {MAX_CONDITIONS}"):
        list_models([str(path.parent)])


@pytest.mark.parametrize("index", [-1, 12, 0.0, True, None, "0", "/etc/passwd", "me/model", [0], {"path": "x"}])
def test_a_client_can_choose_listed_models_alone(store, index):
    with pytest.raises(UserError, match="There is no model number"), store.use(index):
        pass
    assert store.loaded == []


def test_a_model_is_loaded_once_and_the_least_recently_used_is_dropped_before_the_next_is_loaded(
    checkpoints, monkeypatch
):
    models = list_models([str(checkpoints[name]) for name in ("vae", "dcgan", "diffusion")])
    store = ModelStore(models, device="cpu")
    with store.use(0) as (first,):
        pass
    with store.use(1, 0) as (_, again):
        assert again is first
    assert store.loaded == [1, 0]

    small = ModelStore(models, max_bytes=0, device="cpu")
    load = shared.load_checkpoint

    def load_after_the_others_are_dropped(args):
        assert small.loaded == []
        return load(args)

    monkeypatch.setattr(shared, "load_checkpoint", load_after_the_others_are_dropped)
    for index in (0, 1, 2, 1):
        with small.use(index):
            pass
        assert small.loaded == [index]


def test_a_request_leaves_the_saved_scheduler_to_the_next(store, index_of):
    from tiny_diffusers import TinyDDPMScheduler

    with store.use(index_of["diffusion"]) as (pipe,):
        saved = pipe.scheduler
        pipe.scheduler = TinyDDPMScheduler.from_config(saved.config)
    with store.use(index_of["diffusion"]) as (pipe,):
        assert pipe.scheduler is saved


@pytest.mark.parametrize(
    "groups, limits, expected",
    [
        ("0::/", {"memory.max": "max"}, 16),
        ("0::/", {"memory.max": "5"}, 5),  # in a container
        ("0::/user/app", {"memory.max": "max", "user/memory.max": "7", "user/app/memory.max": "9"}, 7),
        (
            "3:cpu:/\n4:memory:/job\n0::/",
            {"memory/memory.limit_in_bytes": "99", "memory/job/memory.limit_in_bytes": "3"},
            3,
        ),
        (None, {}, 16),  # not on Linux
    ],
)
def test_the_memory_is_that_of_the_control_group(tmp_path, monkeypatch, groups, limits, expected):
    limits = {f"sys/fs/cgroup/{name}": limit for name, limit in limits.items()}
    for name, text in (limits | ({} if groups is None else {"proc/self/cgroup": groups})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(hardware, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=16))
    assert hardware.memory_limit() == expected


def test_a_first_model_that_can_not_be_loaded_is_one_line(tmp_path, checkpoints, caplog):
    shutil.copytree(checkpoints["vae"], tmp_path / "vae")
    models = list_models([str(tmp_path / "vae")])
    shutil.rmtree(tmp_path / "vae" / "vae")
    with caplog.at_level("WARNING", "tiny_diffusers"):
        _warm_up(ModelStore(models, device="cpu"))
    assert "vae (VAE, 8 x 8) can't be loaded: " in caplog.text and "Traceback" not in caplog.text
