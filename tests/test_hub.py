import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyPipeline,
    TinyUNet2DModel,
    cards,
    hub,
    zoo,
)
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import Protocol, Report


WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a push and a download of small files need. It has one repository."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def respond(self, content, status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.respond({"error": "Invalid username or password."}, status=401)
        elif self.path == "/api/repos/create":
            self.respond({"url": f"{self.server.url}/me/tiny"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.respond({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.respond({"commitUrl": f"{self.server.url}/me/tiny/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.respond({})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        files = self.server.files
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name in files:
                etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                self.respond(files[name], ETag=etag, X_Repo_Commit=COMMIT)
            else:
                self.respond(b"", status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        elif "/tree/" in path:
            self.respond([{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self.respond({"id": "me/tiny", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    do_HEAD = do_GET


@pytest.fixture
def fake_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.requests, server.files = [], {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_unet):
    scheduler = TinyDDIMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    return lambda **options: TinyPipeline(tiny_unet(**options), scheduler)


def stock_pipeline():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=8,
    )
    return TinyPipeline(unet, TinyDDIMScheduler())


def draw(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(3)]
    return pipe(batch_size=3, generator=generator, num_inference_steps=4, output_type="np", **kwargs).images


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_pipeline):
    """A checkpoint with its code, as a run leaves it, and the images that its pipeline draws."""
    pipe = tiny_pipeline()
    directory = hub.export(pipe, tmp_path_factory.mktemp("exported"))
    for name in ("samples.png", "loss_curves.png"):
        (directory / name).write_bytes(b"")
    return directory, draw(pipe)


def write_card(directory, **kwargs):
    arguments = {
        "model_name": "Digits",
        "command": "tiny-diffusers train unconditional --seed 0",
        "settings": {"learning_rate": 1e-3, "seed": 0},
        "data": {"name": "digits", "split": "train", "images": 1797, "notes": ["2 broken files skipped", "gray"]},
    }
    (directory / "README.md").unlink(missing_ok=True)  # a new one: tests share the folder
    path = cards.write_card(directory, **{**arguments, **kwargs})
    assert path == directory / "README.md"
    return ModelCard.load(path)


class TestExport:
    def test_every_class_lies_where_the_index_says_with_what_it_imports(self, exported):
        directory, _ = exported
        index = json.loads((directory / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline_tiny", "TinyPipeline"]
        assert index["unet"] == ["unet_tiny", "TinyUNet2DModel"]
        assert index["scheduler"] == ["scheduling_tiny_ddim", "TinyDDIMScheduler"]
        code = {path.relative_to(directory).as_posix() for path in directory.rglob("*.py")}
        assert code == {
            "pipeline_tiny.py",
            "unet/unet_tiny.py",
            "scheduler/scheduling_tiny_ddim.py",
            "scheduler/scheduling_tiny_common.py",
        }

    def test_this_package_loads_it_without_running_its_code(self, exported):
        directory, images = exported
        pipe = TinyPipeline.from_pretrained(directory)
        assert type(pipe) is TinyPipeline and type(pipe.unet) is TinyUNet2DModel
        np.testing.assert_array_equal(draw(pipe), images)

    def test_a_compiled_network_takes_its_code_along(self, exported, tmp_path, tiny_pipeline):
        directory, _ = exported
        pipe = tiny_pipeline()
        pipe.unet = torch.compile(pipe.unet)
        hub.export(pipe, tmp_path)
        for name in ("model_index.json", "unet/unet_tiny.py", f"unet/{WEIGHTS}"):
            assert (tmp_path / name).read_bytes() == (directory / name).read_bytes(), name

    def test_without_code_it_is_what_the_pipeline_saves(self, tmp_path, tiny_pipeline):
        pipe = tiny_pipeline()
        hub.export(pipe, tmp_path / "exported", with_code=False)
        pipe.save_pretrained(tmp_path / "saved")
        for path in (tmp_path / "saved").rglob("*.*"):
            assert path.read_bytes() == (tmp_path / "exported" / path.relative_to(tmp_path / "saved")).read_bytes()

    def test_a_pipeline_of_stock_classes_needs_no_code_and_gets_none(self, tmp_path):
        from diffusers import DiffusionPipeline

        pipe = stock_pipeline()
        hub.export(pipe, tmp_path)
        assert not list(tmp_path.rglob("*.py"))
        assert type(DiffusionPipeline.from_pretrained(tmp_path)).__module__.startswith("diffusers.")

    def test_a_pipeline_of_ours_around_a_stock_network_has_its_own_code_laid(self, tmp_path):
        from diffusers import UNet2DModel

        stock = stock_pipeline()
        unet = UNet2DModel.from_config(stock.unet.config, num_class_embeds=3)
        hub.export(TinyConditionalPipeline(unet, stock.scheduler), tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline_tiny_conditional", "TinyConditionalPipeline"]
        assert index["unet"] == ["diffusers", "UNet2DModel"]
        assert {"pipeline_tiny_conditional.py", "pipeline_tiny.py"} <= {path.name for path in tmp_path.glob("*.py")}
        assert not list((tmp_path / "unet").glob("*.py"))
        assert type(TinyPipeline.from_pretrained(tmp_path)) is TinyConditionalPipeline

    @pytest.mark.slow  # the fast one, of folders alone, is in pipelines/test_travel.py
    def test_diffusers_alone_loads_it_from_a_folder_and_from_the_hub(
        self, exported, fake_hub, tmp_path, tiny_pipeline
    ):
        """In a process where this package can't be imported, the same images to 1e-5."""
        directory, images = exported
        pipe = TinyConditionalPipeline(
            tiny_pipeline(num_class_embeds=2).unet, TinyDDIMScheduler(), id2label={0: "cat", 1: "frog"}
        )
        call = {"class_labels": ["cat", "frog", "cat"], "guidance_scale": 3.0}
        hub.push(hub.export(pipe, tmp_path / "conditional"), "me/tiny", token="hf_good")
        jobs = [(str(directory), {}), ("me/tiny", call)]
        script = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tiny_diffusers":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import numpy as np, torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
for i, (source, call) in enumerate(json.loads(sys.argv[1])):
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    generator = [torch.Generator().manual_seed(i) for i in range(3)]
    np.save(f"{i}.npy", pipe(batch_size=3, generator=generator, num_inference_steps=4, output_type="np", **call).images)
assert not any(name.split(".")[0] == "tiny_diffusers" for name in sys.modules)
"""
        environment = {
            **os.environ,
            "HF_ENDPOINT": fake_hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HF_MODULES_CACHE": str(tmp_path / "home" / "modules"),
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-c", script, json.dumps(jobs)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(np.load(tmp_path / "0.npy"), images, atol=1e-5)
        np.testing.assert_allclose(np.load(tmp_path / "1.npy"), draw(pipe, **call), atol=1e-5)


class TestCard:
    def test_the_hub_reads_its_metadata(self, exported):
        card = write_card(
            exported[0],
            data={"name": "ylecun/mnist", "split": "train"},
            license="apache-2.0",
            base_model="me/other",
        )
        assert card.data.library_name == "diffusers"
        assert card.data.pipeline_tag == "unconditional-image-generation"
        assert {"tiny-diffusers", "diffusion"} <= set(card.data.tags)
        assert card.data.datasets == ["ylecun/mnist"]
        assert card.data.license == "apache-2.0"
        assert card.data.base_model == "me/other"

    @pytest.mark.parametrize("name", ["digits", "../data/mnist", "/data/mnist", "C:\\data\\mnist", "a/b/c"])
    def test_data_that_is_not_on_the_hub_stays_out_of_the_metadata(self, exported, name):
        card = write_card(exported[0], data={"name": name})
        assert card.data.datasets is None and card.data.license is None and card.data.base_model is None
        assert f"| name | {name} |" in card.text

    def test_a_folder_is_no_hub_id_though_it_looks_like_one(self, exported, tmp_path, monkeypatch):
        (tmp_path / "data" / "mnist").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert write_card(exported[0], data={"name": "data/mnist"}).data.datasets is None

    def test_it_says_what_the_model_is_and_how_it_was_made(self, exported):
        directory, _ = exported
        (directory / "checkpoint-100").mkdir()  # what resumes a run is no part of the model
        shutil.copyfile(directory / "unet" / WEIGHTS, directory / "checkpoint-100" / "model.safetensors")
        text = write_card(directory, results={"held for a digit": "81% of 500 samples, 50 DDIM steps"}).text
        parameters = sum(p.numel() for p in TinyPipeline.from_pretrained(directory).unet.parameters())
        assert f"`TinyUNet2DModel`, {parameters / 1e6:.2f} M parameters" in text
        assert "unconditional diffusion model of 8x8 gray images" in text and "`v_prediction`" in text
        assert "tiny-diffusers train unconditional --seed 0" in text
        assert "| learning_rate | 0.001 |" in text
        assert "| notes | 2 broken files skipped; gray |" in text
        assert "| held for a digit | 81% of 500 samples, 50 DDIM steps |" in text
        assert "](samples.png)" in text and "](loss_curves.png)" in text
        assert "What it is not good for" in text

    def test_no_name_runs_in_a_shell_or_writes_into_the_page(self, tmp_path, tiny_unet):
        names = ["$(touch PWNED)", "`x`", 'a";b', "plain cat"]
        pipe = TinyConditionalPipeline(
            tiny_unet(num_class_embeds=4), TinyDDIMScheduler(), id2label=dict(enumerate(names))
        )
        hub.export(pipe, tmp_path)
        hostile = "x\n# Heading\n<script>alert(1)</script> ![a](http://b/c.png) a|b \x1b[2J"
        command = "tiny-diffusers train conditional --dataset_name '```\n# Heading'"
        card = write_card(tmp_path, model_name=hostile, command=command, data={hostile: hostile, "classes": names})
        shell = [line for line in card.text.splitlines() if line.startswith("tiny-diffusers sample")]
        assert len(shell) == 1 and '--class_labels "0,1,2,plain cat"' in shell[0]
        assert 'class_labels=[0, 1, 2, "plain cat"]' in card.text
        headings = [line for line in card.text.splitlines() if line.startswith("# ")]
        assert len(headings) == 2 and headings[0].startswith(
            "# x # Heading &lt;script>"
        )  # the other is in a code block
        assert f"````bash\n{command}\n````" in card.text
        assert "<script" not in card.text and "](http" not in card.text and "\x1b" not in card.text
        assert "a\\|b" in card.text

    def test_a_report_replaces_the_last_one_and_keeps_what_else_the_card_holds(self, exported):
        def report(value):
            protocol = asdict(Protocol(features="pixels"))
            features = {"dtype": "float32", "resize": "none"}
            reference = {"name": "pets", "split": "test", "images": 9, "load": {"train_data_dir": "pets"}}
            measured_by = {"num_images": 9, "features": features, "reference": reference}
            figures = {"recall": {"value": value, "error": None, "error_kind": None}}
            return Report(protocol, measured_by, {"kind": "pipeline", "name": "tiny"}, figures)

        directory, _ = exported
        write_card(directory, results={"training time": "16 minutes"})
        card = ModelCard.load(directory / "README.md")
        own = {"task_type": "image", "dataset_type": "mine", "dataset_name": "mine", "metric_type": "my_check"}
        card.data.model_name, card.data.eval_results = "Digits", [EvalResult(**own, metric_value=3)]
        (directory / "README.md").write_text(str(card))
        for value in (0.25, 0.5):
            cards.add_results(directory, report(value), "ddim-50")
        card = ModelCard.load(directory / "README.md")
        assert card.text.count("## Results") == 1 and "| training time | 16 minutes |" in card.text
        assert card.text.count("Recall") == 1 and "| tiny | 0.5 |" in card.text and "0.25" not in card.text
        assert "--from_report reports/ddim-50/report.json" in card.text
        assert (
            card.text.index("16 minutes") < card.text.index("Recall") < card.text.index("## What it is not good for")
        )
        results = {result.metric_type: (result.metric_value, result.dataset_name) for result in card.data.eval_results}
        assert results == {"my_check": (3, "mine"), "recall": (0.5, "pets")}

    def test_how_it_loads_is_what_the_folder_allows(self, exported, tmp_path, tiny_pipeline):
        def card_of(pipe, name, with_code):
            return write_card(hub.export(pipe, tmp_path / name, with_code=with_code), hub_model_id="me/tiny").text

        ours = 'TinyPipeline.from_pretrained("me/tiny")'
        stock, with_code = (
            f'DiffusionPipeline.from_pretrained("me/tiny"{end})' for end in ("", ", trust_remote_code=True")
        )
        texts = {
            "stock": card_of(stock_pipeline(), "stock", True),
            "code": card_of(tiny_pipeline(), "code", True),
            "bare": card_of(tiny_pipeline(), "bare", False),
        }
        assert all(ours in text for text in texts.values())
        assert [name for name, text in texts.items() if stock in text] == ["stock"]
        assert [name for name, text in texts.items() if with_code in text] == ["code"]
        assert "samples.png)" not in texts["bare"]  # there is no such picture in that folder

    @pytest.mark.parametrize(
        ("scheduler", "words"),
        [
            (
                TinyDDIMScheduler(),
                "Trained with prediction type `epsilon` and beta schedule `linear` over 1000 timesteps.",
            ),
            (
                TinyFlowMatchScheduler(),
                "Trained for rectified flow, with timesteps up to 1000 of the distribution `mixed`.",
            ),
            (TinyEDMScheduler(), "Trained with EDM's preconditioning, for images of standard deviation 0.5."),
        ],
    )
    def test_what_a_model_was_trained_for_is_said(self, tmp_path, tiny_pipeline, scheduler, words):
        pipe = TinyPipeline(tiny_pipeline().unet, scheduler)
        assert f"parameters. {words}" in write_card(hub.export(pipe, tmp_path)).text

    def test_the_examples_of_a_model_with_classes_name_some(self, tmp_path, tiny_pipeline):
        unet = tiny_pipeline(num_class_embeds=2).unet
        pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(), id2label={0: "cat", 1: "frog"})
        text = write_card(hub.export(pipe, tmp_path)).text
        assert "A class-conditional diffusion model" in text
        assert 'pipe(class_labels=["cat", "frog"], guidance_scale=3.0)' in text
        assert '--class_labels "cat,frog" --guidance_scale 3 --output' in text

    @pytest.mark.parametrize("name", zoo.NAMES)
    def test_the_commands_of_a_published_card_are_those_of_an_installed_package(self, name):
        from tiny_diffusers.cli import COMMANDS

        text = (Path(__file__).parents[1] / "model_cards" / name / "README.md").read_text()
        commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        words = [line.split()[:2] for line in commands if not line.startswith("pip install")]
        assert words and all(program == "tiny-diffusers" and command in COMMANDS for program, command in words)

    def test_no_token_gets_into_it(self, exported):
        for form in ("--hub_token hf_secret", "--hub_token=hf_secret"):
            text = write_card(
                exported[0], command=f"train.py {form} --seed 0", settings={"hub_token": "hf_secret"}
            ).text
            assert "hf_secret" not in text and "--seed 0" in text

    def test_a_value_cannot_break_its_table(self, exported):
        text = write_card(exported[0], settings={"a|b": "c|d\ne", "none": None}).text
        assert "| a\\|b | c\\|d e |\n| none | None |\n" in text

    def test_a_folder_without_a_checkpoint_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="no model_index.json"):
            write_card(tmp_path)

    def test_damaged_conditions_are_one_line(self, exported, tmp_path):
        shutil.copytree(exported[0], tmp_path / "model")
        index = tmp_path / "model" / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"condition_statistics": {"name": ["age"]}}))
        with pytest.raises(UserError, match="`condition_statistics` must be a dict of names.*got .*'name'"):
            write_card(tmp_path / "model")


class TestPush:
    def test_what_the_model_needs_is_pushed_and_what_only_this_machine_needs_is_not(
        self, exported, fake_hub, tmp_path, tiny_pipeline
    ):
        directory = hub.export(tiny_pipeline(), tmp_path)
        write_card(directory)
        card = (directory / "README.md").read_text(encoding="utf-8")
        kept = {path.relative_to(directory).as_posix() for path in directory.rglob("[!.]*.*") if path.is_file()}
        for name in (
            "checkpoint-100/state.safetensors",
            "checkpoint-best/unet/config.json",
            "logs/run/events.1",
            "data.lock",
            ".cache/x",
            "unet/.hidden",
            ".paths.json",
            "reports/ddim-50/.paths.json",
            "unet/__pycache__/unet_tiny.cpython-311.pyc",
        ):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(b"x")

        url = hub.push(directory, "me/tiny", token="hf_good", private=True)

        assert url == f"{fake_hub.url}/me/tiny/commit/{COMMIT}"
        assert fake_hub.files.keys() == kept
        assert fake_hub.files["unet/unet_tiny.py"] == (directory / "unet" / "unet_tiny.py").read_bytes()
        path, _, body = fake_hub.requests[0]
        assert path == "/api/repos/create"
        asked = json.loads(body)
        assert (asked["organization"], asked["name"]) == ("me", "tiny")
        assert asked.get("private") or asked["visibility"] == "private"  # the older and the newer spelling
        # the pushed card loads the model by its name there, and the one on disk is as it was
        assert 'TinyPipeline.from_pretrained("me/tiny")' in fake_hub.files["README.md"].decode()
        assert (directory / "README.md").read_text(encoding="utf-8") == card
        assert 'TinyPipeline.from_pretrained("path/to/this/folder")' in card

    def test_a_pipeline_that_was_saved_by_itself_is_pushed_with_its_card(self, fake_hub, tmp_path, tiny_pipeline):
        tiny_pipeline().save_pretrained(tmp_path)
        saved = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*") if path.is_file()}
        write_card(tmp_path)
        hub.push(tmp_path, "me/tiny", token="hf_good")
        assert fake_hub.files.keys() == saved | {"README.md"}

    def test_a_space_is_pushed_with_its_models_and_the_address_of_its_wheel(self, fake_hub, tmp_path, tiny_pipeline):
        tiny_pipeline().save_pretrained(tmp_path / "models" / "0-tiny")
        wheel = "tiny_diffusers-0.1.0-py3-none-any.whl"
        for name in ("app.py", "README.md", wheel, "notes.txt", "models/notes.txt"):
            (tmp_path / name).write_text(name)
        (tmp_path / "requirements.txt").write_text(f"./{wheel}\ntorch\n")
        hub.push(tmp_path, "me/tiny", token="hf_good")

        assert f"models/0-tiny/unet/{WEIGHTS}" in fake_hub.files and "models/0-tiny/model_index.json" in fake_hub.files
        assert {"app.py", "README.md", wheel} <= set(fake_hub.files)
        assert "notes.txt" not in fake_hub.files and "models/notes.txt" not in fake_hub.files
        address = f"tiny_diffusers @ {fake_hub.url}/me/tiny/resolve/main/{wheel}"
        assert fake_hub.files["requirements.txt"].decode() == f"{address}\ntorch\n"
        assert (tmp_path / "requirements.txt").read_text().startswith("./")
        created = json.loads(fake_hub.requests[0][2])
        assert created["type"] == "space" and created["sdk"] == "gradio"
        assert any(path.startswith("/api/spaces/me/tiny/commit/") for path, _, _ in fake_hub.requests)

    def test_strays_and_links_are_pushed_by_name_alone(self, fake_hub, tmp_path, tiny_pipeline, capsys):
        directory = hub.export(tiny_pipeline(), tmp_path / "model")
        own = {path.relative_to(directory).as_posix() for path in directory.rglob("[!.]*.*") if path.is_file()}
        for name in (
            "id_rsa",
            "token",
            "credentials.json",
            "slurm-1.out",
            "optimizer.pt",
            "wandb/a.json",
            "unet/notes.txt",
        ):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text("x")
        (tmp_path / "secret.png").write_text("x")
        (directory / "samples.png").symlink_to(tmp_path / "secret.png")

        assert hub.push(directory, "me/tiny", token="hf_good", dry_run=True) is None
        assert not fake_hub.requests and "id_rsa" not in capsys.readouterr().out
        hub.push(directory, "me/tiny", token="hf_good", include=["unet/notes.txt"])
        assert fake_hub.files.keys() == own | {"unet/notes.txt"}
        assert f"{len(fake_hub.files)} files" in capsys.readouterr().out
        for name, words in (("samples.png", "is a link"), ("../secret.png", "no file in"), ("nowhere", "no file in")):
            with pytest.raises(UserError, match=words):
                hub.push(directory, "me/tiny", token="hf_good", include=[name])

    @pytest.mark.parametrize("fault", ["token", "network", "name"])
    def test_a_failed_push_keeps_the_folder_and_says_how_to_push_later(self, exported, fake_hub, monkeypatch, fault):
        directory, _ = exported
        before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        if fault == "network":
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        repo_id = "me/no/such/name" if fault == "name" else "me/tiny"
        with pytest.raises(UserError) as refusal:
            hub.push(directory, repo_id, token="hf_bad" if fault == "token" else "hf_good")
        remedy = "Log in by `hf auth login` and push again" if fault == "token" else "Push later"
        assert str(refusal.value).startswith(f"{remedy} by `tiny-diffusers push {directory} {repo_id}`, as everything")
        assert "\n" not in str(refusal.value)
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
        assert not fake_hub.files

    def test_without_a_token_the_remedy_comes_first(self, exported, fake_hub, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        with pytest.raises(UserError, match=r"^Log in by `hf auth login` and push again by `tiny-diffusers push"):
            hub.push(exported[0], "me/tiny")
        with pytest.raises(UserError, match=r"^--push_to_hub: log in by `hf auth login`, or leave it out"):
            hub.check_can_push("me/tiny")

    def test_a_name_alone_is_completed_with_its_owner(self, exported, fake_hub):
        write_card(exported[0])
        assert hub.push(exported[0], "tiny", token="hf_good").startswith(f"{fake_hub.url}/me/tiny/")
        assert any(path == "/api/models/me/tiny/commit/main" for path, _, _ in fake_hub.requests)
        assert 'from_pretrained("me/tiny")' in fake_hub.files["README.md"].decode()

    def test_a_folder_without_a_checkpoint_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="no model_index.json"):
            hub.push(tmp_path, "me/tiny")
