"""A card that is there already: what is written anew, what stays, and the metrics of a report."""

import json
from dataclasses import asdict

import pytest
from huggingface_hub import EvalResult, ModelCard

from tiny_diffusers import TinyDDIMScheduler, TinyPipeline, cards
from tiny_diffusers.cli import main
from tiny_diffusers.evaluation import Protocol, Report
from tiny_diffusers.evaluation.features import digest


@pytest.fixture
def pipeline(tiny_unet):
    return TinyPipeline(tiny_unet(), TinyDDIMScheduler())


@pytest.fixture
def folder(pipeline, tmp_path):
    """A saved pipeline with a card and what a run tells of itself."""
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text("dataset_name: me/pets\nseed: 3\nlicense: mit\n")
    facts = {"command": "tiny-diffusers train unconditional --seed 3", "data": {"name": "pets", "images": 9}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    cards.write_card(tmp_path, model_name="Pets", command="an earlier command")
    return tmp_path


def save_report(folder, pipeline, value, name="ddim-50"):
    features, reference = {"dtype": "float32", "resize": "none"}, {"name": "pets", "split": "test", "images": 9}
    source = {
        "kind": "pipeline",
        "name": "pets",
        "dtype": "float32",
        "weights_sha256": {"unet": digest(pipeline.unet)},
    }
    measured_by = {"num_images": 9, "features": features, "reference": reference | {"fingerprint": "f"}}
    figures = {"recall": {"value": value, "error": None, "error_kind": None}}
    Report(asdict(Protocol(features="pixels")), measured_by, source, figures).save(folder / "reports" / name)


def test_the_facts_of_the_run_are_written_anew_and_the_users_own_words_stay(folder):
    card = ModelCard.load(folder / "README.md")
    card.data.language, card.data.license, card.data.tags = "en", "cc0-1.0", ["pets"]
    card.text = card.text.replace("# Pets\n", "# My pets\n\nThey are mine.\n") + "\n## Thanks\n\nTo the cat.\n"
    (folder / "README.md").write_text(str(card))
    assert main(["card", str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert "# My pets\n\nThey are mine.\n" in card.text and card.text.endswith("## Thanks\n\nTo the cat.\n")
    assert "train unconditional --seed 3" in card.text and "an earlier command" not in card.text
    assert card.text.count("## How to load it") == 1 and "| seed | 3 |" in card.text and "| images | 9 |" in card.text
    assert (card.data.language, card.data.license, card.data.datasets) == ("en", "cc0-1.0", ["me/pets"])
    assert {"pets", "tiny-diffusers", "diffusion"} <= set(card.data.tags)
    again = (folder / "README.md").read_text()
    assert main(["card", str(folder)]) == 0 and (folder / "README.md").read_text() == again


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"steps": 3119, "global_batch": 512, "seconds": 344.6, "machine": "NVIDIA H200"},
            "It took 3,119 steps of 512 images, 5.74 minutes on NVIDIA H200.",
        ),
        ({"steps": 20, "global_batch": 8}, "It took 20 steps of 8 images."),  # a kill has lost the seconds
        ({"steps": 1, "global_batch": 1, "seconds": 72000}, "It took 1 step of 1 image, 1,200 minutes."),
        ({"steps": 2, "seconds": 10**400, "machine": "  "}, "It took 2 steps."),
        ({"steps": 2, "global_batch": -1, "seconds": float("nan")}, "It took 2 steps."),
        ({"steps": True}, None),
        ({"seconds": 5}, None),  # of a run that began with an older version
        ({"steps": 2, "machine": "<b>x</b>"}, "It took 2 steps on &lt;b>x&lt;/b>."),
    ],
)
def test_a_card_says_what_the_training_took(folder, facts, expected):
    (folder / "run.json").write_text(json.dumps({"command": "tiny-diffusers train unconditional"} | facts))
    assert main(["card", str(folder)]) == 0
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("It took")]
    assert lines == ([] if expected is None else [expected])


def test_a_card_without_the_marks_is_kept_beside_the_new_one(folder, capsys):
    for i, kept in enumerate(("README.original.md", "README.original-2.md")):
        (folder / "README.md").write_text(f"# My words {i}\n")
        assert main(["card", str(folder)]) == 0
        assert (folder / kept).read_text() == f"# My words {i}\n" and kept in capsys.readouterr().out
    assert "How to load it" in (folder / "README.md").read_text()


def test_the_metrics_of_a_report_of_these_weights_are_shown(folder, pipeline, capsys):
    for name, value in (("ddim-50", 0.25), ("flow-20", 0.5)):
        save_report(folder, pipeline, value, name)
    assert main(["card", str(folder)]) == 2
    assert "2 reports (ddim-50, flow-20) and none is published" in capsys.readouterr().err
    assert main(["card", str(folder), "--report", "flow-2"]) == 2
    assert "Did you mean 'flow-20'?" in capsys.readouterr().err
    for name, value in (("ddim-50", 0.25), ("flow-20", 0.5)):
        assert main(["card", str(folder), "--report", name]) == 0
        card = ModelCard.load(folder / "README.md")
        assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("recall", value)]
        assert card.text.count("## Results") == 1 and f"| pets | {value} |" in card.text
    assert main(["card", str(folder)]) == 0  # the published one

    pipeline.unet.conv_in.weight.data += 1
    pipeline.save_pretrained(folder)
    assert main(["card", str(folder)]) == 2
    assert "flow-20 measured other weights than" in capsys.readouterr().err


def test_training_again_takes_the_metrics_of_earlier_weights_away(folder, pipeline):
    save_report(folder, pipeline, 0.25)
    assert main(["card", str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    own = {"task_type": "image", "dataset_type": "mine", "dataset_name": "mine", "metric_type": "my_check"}
    card.data.eval_results.append(EvalResult(**own, metric_value=3))
    (folder / "README.md").write_text(str(card))
    cards.write_card(folder, model_name="Pets", command="train longer")
    card = ModelCard.load(folder / "README.md")
    assert [result.metric_type for result in card.data.eval_results] == ["my_check"]
    assert "## Results" not in card.text and "train longer" in card.text and "## What it is not good for" in card.text


@pytest.mark.parametrize("damage", ["library_name: [diffusers", "model-index: 3"])
def test_a_card_with_damaged_metadata_is_kept_beside_the_new_one(folder, damage):
    text = (folder / "README.md").read_text().replace("library_name: diffusers", damage)
    (folder / "README.md").write_text(text)
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.original.md").read_text() == text
    assert ModelCard.load(folder / "README.md").data.library_name == "diffusers"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "no model_index.json" in capsys.readouterr().err
