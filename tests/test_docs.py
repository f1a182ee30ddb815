import json
import re
from pathlib import Path

import pytest
import yaml

import tiny_diffusers
from tiny_diffusers.studies.table import write_table


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_each_public_name_has_its_place_in_the_api_reference():
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^::: tiny_diffusers\.(\w+)$", pages, flags=re.MULTILINE)
    assert sorted(documented) == tiny_diffusers.__all__


def test_each_page_is_in_the_navigation():
    def files(entries):
        for entry in entries:
            if isinstance(entry, str):
                yield entry
            else:
                yield from files(next(iter(entry.values())))

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(files(nav)) == sorted(pages)


@pytest.mark.parametrize("folder", ["pipelines", "schedulers", "src/tiny_diffusers/models"])
def test_each_class_of_ours_that_a_docstring_refers_to_is_in_the_api_reference(folder):
    """mkdocs_references.py makes links of them; `mkdocs build` checks their members."""
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: [\w.]+\.(\w+)$", pages, flags=re.MULTILINE))
    sources = "\n".join(file.read_text() for file in (ROOT / folder).glob("*.py"))
    named = set(re.findall(r"\[`~?(?:[a-z_]+\.)*(Tiny\w+)", sources))
    assert named and named <= documented


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/gallery.md"])
def test_the_links_of_a_page_lead_to_files(page):
    """`mkdocs build` checks those of the docs that are no HTML."""
    links = re.findall(r"""(?:\]\(|src=")([^)#"]+)""", (ROOT / page).read_text())
    local = [link for link in links if not link.startswith("http")]
    assert local and [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_first_page_leads_to_each_other_page():
    links = re.findall(r"\]\(([^)]+\.md)\)", (DOCS / "index.md").read_text())
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted([*links, "index.md"]) == sorted(pages)


def test_the_tables_of_studies_are_those_of_their_files(tmp_path):
    """In a section that links to `studies/NAME.json`, each number of a table is in the study's own, in the same row."""

    def rows_of(text):
        for line in text.splitlines():
            if line.startswith("|") and not line.startswith("| ---"):
                yield [cell.strip("* ") for cell in line.strip("|").split("|")]

    checked = []
    for section in re.split(r"^###+ ", (DOCS / "studies.md").read_text(), flags=re.MULTILINE):
        measured = {}
        for name in re.findall(r"\]\((studies/\w+\.json)\)", section):
            content = json.loads((DOCS / name).read_text())
            entries = [entry for row in content["rows"] for entry in row["measured"]]
            for figure in dict.fromkeys(figure for entry in entries for figure in entry["figures"]):
                table = write_table({**content, "main_metric": figure}, {}, tmp_path).read_text()
                for cell, *values in rows_of(table):
                    measured.setdefault(cell, set()).update(values)
            checked.append(name)
        for cell, *values in rows_of(section) if measured else []:
            known = measured.get(cell) or set().union(*measured.values())
            numbers = [value for value in values if re.fullmatch(r"-?\d[\d.,]*( ± [\d.]+)?", value)]
            assert [number for number in numbers if number not in known] == [], cell
    assert sorted(checked) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("studies/*.json"))
