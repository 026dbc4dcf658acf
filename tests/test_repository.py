"""What lies around the package says the truth: workflows, templates, citation, changelog, links of the root's pages."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import shrp_hf
from shrp_hf.publishing.card import CITATIONS
from tests.markdown_code import check_command, commands_of

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TESTS = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
FORMS = sorted(set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) - {ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"})
ROOT_PAGES = [*sorted(ROOT.glob("*.md")), ROOT / ".github" / "pull_request_template.md"]


def metadata():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def test_matrix_covers_what_setup_claims():
    matrix = TESTS["jobs"]["tests"]["strategy"]["matrix"]
    claimed = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", metadata()["metadata"]["classifiers"], re.MULTILINE)
    assert matrix["python"] == claimed
    assert f">={claimed[0]}" == metadata()["options"]["python_requires"]
    assert {"pinned", "oldest", "newest"} == {*matrix["dependencies"], *(more["dependencies"] for more in matrix["include"])}
    for name in re.findall(r"[\w-]+\.txt", str(TESTS["jobs"]["tests"])):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_commands_that_exist(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    made = [step["run"] for job in jobs.values() for step in job.get("steps", ()) if step.get("run", "").startswith("make ")]
    for command in made:
        for words in commands_of(command):
            check_command(words)
    assert all(set(job.get("needs", "").split()) <= set(jobs) for job in jobs.values())


def test_release_publishes_what_was_tested_and_stores_no_token():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert (jobs["tests"]["uses"], jobs["publish"]["needs"]) == ("./.github/workflows/tests.yml", "tests")
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in text
    (upload,) = (step for step in TESTS["jobs"]["dist"]["steps"] if "upload-artifact" in step.get("uses", ""))
    (download,) = (step for step in jobs["publish"]["steps"] if "download-artifact" in step.get("uses", ""))
    assert upload["with"]["name"] == download["with"]["name"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_a_form_needs(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)


def test_changelog_knows_this_version_or_what_is_not_released():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title) for title in titles[1:])
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
    assert f"[{shrp_hf.__version__}]" in text or f"{shrp_hf.__version__} will be the first" in text


def test_citation_names_the_license_and_every_paper_of_the_cards():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == metadata()["metadata"]["license"]
    assert [author["name"] for author in citation["authors"]] == [metadata()["metadata"]["author"]]
    titles = {reference["title"] for reference in citation["references"]}
    cards = {re.search(r"title = \{(.+)\},$", text, re.MULTILINE)[1] for text in CITATIONS.values()}
    assert {re.sub(r"[{}]", "", title) for title in cards} == titles


@pytest.mark.parametrize("page", ROOT_PAGES, ids=lambda page: page.name)
def test_links_of_the_roots_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
