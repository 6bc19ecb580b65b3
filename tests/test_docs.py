"""The documentation names what exists: links, headings, files, and the options of every command in it."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from rdlm import cli
from rdlm.command_line import checkpoint_first
from rdlm.config import model
from rdlm.diffusion.samplers import SAMPLERS
from rdlm.exit_criteria import CRITERIA
from rdlm.sampling_params import Order, text_samplers
from serve.api.schemas import SamplingBody
from train.config_file import load
from train.data.sources import SOURCES
from train.settings import TrainConfig

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
    [option] = [p for p in _resolve(["rdlm", "generate"])[0].params if "--sampler" in p.opts]
    [source] = [p for p in _resolve(["rdlm", "data", "prepare"])[0].params if p.name == "source"]
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


def test_versions_on_pages_are_the_pinned_ones() -> None:
    pin = re.compile(r"([\w-]+(?:\[\w+\])?)==([\d.]+\w*)")
    pinned = dict(
        pin.findall((REPO / "pyproject.toml").read_text() + (REPO / "requirements.txt").read_text())
    )
    found = [
        (name, version)
        for page in PAGES
        for line in re.findall(r"pip install.*", page.read_text())
        for name, version in pin.findall(line)
    ]
    assert len(found) > 8
    assert [(name, version) for name, version in found if pinned.get(name, version) != version] == []


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


SHELL = re.compile(r"^```(?:sh)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^\n((?: {4}.*\n)+)", re.MULTILINE)
CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))


def _lines() -> list[tuple[str, str]]:
    """(file, command) of every command line in a block of a page, without its comment."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in [*SHELL.findall(text), *INDENTED.findall(FENCE.sub("", text))]:
            for line in re.sub(
                r"\[([^]]*)\]", r"\1", block.replace("\\\n", " ").replace("[options]", "")
            ).splitlines():
                for part in re.split(r"&&|\||&$", line.partition(" #")[0]):
                    if part.strip() and not part.startswith("#"):
                        found.append((str(page.relative_to(REPO)), part.strip()))
    return found


def _mentions() -> list[tuple[str, str]]:
    """(file, command) of every command in running text: code spans of pages and of the code's messages, comments of
    configs, cards and `rdlm inspect`."""
    texts = {page: FENCE.sub("", page.read_text()) for page in PAGES}
    for folder in ("rdlm", "train", "serve", "eval", "demo"):
        for file in (REPO / folder).rglob("*.py"):
            texts[file] = re.sub(r'"\s*\n\s*f?"', "", file.read_text())
    found = [
        (str(file.relative_to(REPO)), " ".join(span.split()))
        for file, text in texts.items()
        for span in re.findall(r"`((?:rdlm|python -m) [^`]+)`", text)
    ]
    for file, text in texts.items():
        for examples in re.findall(r'"Examples?: (rdlm [^"]+)"', text) if file.suffix == ".py" else []:
            found += [(str(file.relative_to(REPO)), each.strip()) for each in re.split(r"&&|\|", examples)]
    for config in CONFIGS:
        comments = "\n".join(line.lstrip("# ") for line in config.read_text().splitlines() if line[:1] == "#")
        for command in re.findall(r"\brdlm \w.*", re.sub(r"\\\n", " ", comments)):
            found.append((str(config.relative_to(REPO)), command))
    cards = {command for each in vars(model).values() for command in getattr(each, "commands", ())}
    return [*found, *(("a card", command) for command in cards)]


def _resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that ``words`` name, of rdlm or ``python -m``, and its arguments."""
    if words[:2] == ["python", "-m"]:
        module = importlib.import_module(words[2])
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer()
            app.command()(module.main)
        command: Any = typer.main.get_command(app)
        rest = words[3:]
    else:
        command = cli.load_command(words[1])
        rest = cli.new_names(words[1], words[2:])
    while rest and rest[0][0] not in "-{" and hasattr(command, "commands"):
        context = command.make_context("rdlm", [], resilient_parsing=True)
        _, found, left = command.resolve_command(context, rest)
        if found is None:
            assert rest[0].isupper() or rest[0] == "...", words  # any of its commands
            break
        command, rest = found, left
    return command, checkpoint_first(command, rest)


def _checked(command: str) -> bool:
    """Whether the options are ours: not those of lm_eval, pytest and DeepSpeed, and no argparse."""
    ours = r"rdlm (?!eval lm-eval)[a-z]|python -m (benchmarks\.(?!counts|gpu)|demo\.chat)"
    return re.match(ours, command) is not None


def test_commands_in_blocks_are_parsed() -> None:
    """Options exist and have their values, and no word is left over."""
    commands = [(page, line) for page, line in _lines() if _checked(line)]
    assert len(commands) > 75
    for page, line in commands:
        command, rest = _resolve([word for word in shlex.split(line) if word != "..."])
        context = command.make_context("rdlm", [], resilient_parsing=True)
        context.resilient_parsing = False  # which the parser would take for leave to ignore mistakes
        values, left, _ = command.make_parser(context).parse_args(rest)
        left = [] if command.context_settings.get("allow_extra_args") else left
        assert left == [], f"{page}: {line}"
        for parameter in command.params:
            given = not parameter.required or "..." in line or values.get(parameter.name) is not None
            assert given, f"{page}: {line}: {parameter.name}"


def test_options_named_in_running_text_exist() -> None:
    commands = [(file, line) for file, line in _mentions() if _checked(line)]
    assert len(commands) > 60
    wrong = []
    for file, line in commands:
        command, rest = _resolve(re.split(r"[\s\[\]]+", line))
        known = {spelling for p in command.params for spelling in (*p.opts, *p.secondary_opts)} | {"--help"}
        options = {word.partition("=")[0].rstrip(".,;:)") for word in rest if word.startswith("--")}
        if not hasattr(command, "commands") and not options <= known:
            wrong.append((file, line))
    assert wrong == []


def test_settings_on_pages_are_those_of_training() -> None:
    """Overrides behind `rdlm train CONFIG`, and sections such as `ema: {decay: 0.999}`. The objective that
    docs/architecture.md adds exists there only."""
    for _, line in [*_lines(), *_mentions()]:
        words = line.split()
        if words[:2] == ["rdlm", "train"] and "=" in line and words[2].startswith("configs/"):
            settings = [word for word in words[3:] if re.match(r"[\w.]+=", word) and word != "objective=late"]
            load(REPO / words[2], settings)
    sections = 0
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for source in [*re.findall(r"`(\w+: [^`]+)`", FENCE.sub("", text)), *blocks]:
            if source.partition(":")[0] in TrainConfig.model_fields:
                for name, value in YAML(typ="safe").load(source).items():
                    field = TrainConfig.model_fields[name]
                    short = name == "objective" and isinstance(value, str)
                    given = (
                        {"name": value}
                        if short
                        else {"init_from": str(REPO), "precision": "bf16"}.get(name, value)
                    )
                    TypeAdapter(Annotated[field.annotation, field]).validate_python(given)
                    sections += 1
    assert sections > 20


def test_every_fault_names_tests_that_exist() -> None:
    """An entry has a file of tests at least, or says that it is open. A file without its folder lies in that of the
    file before it."""
    for entry in re.split(r"^- ", (REPO / "docs" / "faults.md").read_text(), flags=re.MULTILINE)[1:]:
        named, folder = re.findall(r"`((?:tests/(?:\w+/)?)?test_\w+\.py)`", entry), Path()
        assert named, entry
        for name in named:
            folder = Path(name).parent if name.startswith("tests/") else folder
            file = REPO / folder / Path(name).name
            assert file.is_file() and re.search(r"^ *(async )?def test_", file.read_text(), re.MULTILINE), (
                name
            )
