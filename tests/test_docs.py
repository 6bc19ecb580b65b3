"""The documentation names what exists: links, headings, files, and the options of every command in it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest

from rdlm import cli
from rdlm.diffusion.samplers import SAMPLERS
from rdlm.exit_criteria import CRITERIA
from rdlm.sampling_params import Order, text_samplers
from serve.api.schemas import SamplingBody
from train.data.sources import SOURCES

REPO = Path(__file__).parents[1]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])
FENCE = re.compile(r"```.*?```", re.DOTALL)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_and_files_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http:", "https:")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link
    folders = "rdlm|serve|train|eval|tests|benchmarks|demo|configs|docs"
    for file in re.findall(rf"`((?:{folders})/[\w/.]+\.\w+)`", text):
        assert (REPO / file).exists(), file


def test_the_tables_of_serving_name_every_sampler_and_criterion_once() -> None:
    text = (REPO / "docs" / "serving.md").read_text()
    for title, names in (
        ("sampler", text_samplers()),
        ("criterion", list(CRITERIA)),
        ("order", get_args(Order)),
    ):
        [table] = re.findall(rf"^\| `?{title}`? \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
        assert sorted(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == sorted(names)


def test_help_and_schema_name_every_sampler_and_data_source() -> None:
    """They are made from the tables, so that an addition changes one file."""
    field = SamplingBody.model_json_schema()["properties"]["sampler"]
    [option] = [p for p in _resolve(["generate"]).params if "--sampler" in p.opts]
    [source] = [p for p in _resolve(["data", "prepare"]).params if p.name == "source"]
    for name in text_samplers():
        assert f"{name}: {SAMPLERS[name].description}" in field["description"]
        assert f"{name}: {' '.join(SAMPLERS[name].description.split())}" in option.help
    for kind in SOURCES:
        assert kind.spelling in source.help


def test_lines_of_pages_and_configs_are_short() -> None:
    """A row of a table cannot be broken; ruff bounds the lines of code."""
    files = [*PAGES, *sorted((REPO / "configs").rglob("*.yaml"))]
    long = [
        f"{file.relative_to(REPO)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")
    ]
    assert len(files) > 20 and long == []


CHECKS = {"nginx": ["-t", "-c"], "caddy": ["validate", "--adapter", "caddyfile", "--config"]}


@pytest.mark.parametrize("server", CHECKS)
def test_the_configurations_of_load_balancers_are_valid(server: str, tmp_path: Path) -> None:
    if shutil.which(server) is None:
        pytest.skip(f"{server} is not installed")
    text = (REPO / "docs" / "serving.md").read_text()
    [block] = re.findall(rf"^With {server}\b[^`]*(?:`[^`\n]+`[^`]*)*```\n(.*?)```", text, re.M | re.S | re.I)
    rest = f"pid {tmp_path}/pid; error_log {tmp_path}/errors; events {{}} http {{ {block} }}"
    file = tmp_path / "config"
    file.write_text(rest if server == "nginx" else block)
    done = subprocess.run([server, *CHECKS[server], str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every ``rdlm`` command in a fenced block, without comments and line ends."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines()[1:]:
                for part in re.split(r"&&|\|", line):
                    words = shlex.split(part.partition(" #")[0]) if re.match(r"\s*rdlm \w", part) else []
                    if words and words[1] != "train.pretrain":
                        found.append((str(page.relative_to(REPO)), words[1:]))
    return found


def _resolve(words: list[str]) -> Any:
    command: Any = cli.load_command(words[0])
    rest = words[1:]
    while hasattr(command, "commands"):
        _, command, rest = command.resolve_command(
            command.make_context("rdlm", [], resilient_parsing=True), rest
        )
    return command


def test_the_commands_of_the_documentation_have_the_options_that_it_gives() -> None:
    commands = _commands()
    assert len(commands) > 60
    for page, words in commands:
        if words[:2] == ["eval", "lm-eval"]:  # whose options are lm_eval's
            continue
        known = {spelling for p in _resolve(words).params for spelling in (*p.opts, *p.secondary_opts)}
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, f"{page}: rdlm {' '.join(words)}"
