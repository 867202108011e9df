"""The floors of the house, kept by walking the syntax tree."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT

FOLDERS = ("prefopt", "stages", "flows")
MODULES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((PROJECT / folder).rglob("*.py"))
}
PREFOPT_MAY_IMPORT = {
    "torch", "sympy", "numpy", "scipy", "statsmodels", "jaxtyping", "annotated_types",
    "safetensors",
}  # fmt: skip
# The only files, or the only folder, that may import a vendor.
HOMES = {
    "yaml": ["stages/params.py"],
    "ruamel": ["stages/recipes.py"],
    "pydantic": ["stages/params.py", "stages/runs.py"],
    "mlflow": ["stages/tracking.py", "stages/records.py"],
    "sympy": ["prefopt/"],
    "prefect": ["flows/"],
    "dvc": ["flows/"],
    "matplotlib": ["stages/figures.py"],
    "jinja2": ["stages/report.py", "flows/pages.py"],
    "securesystemslib": ["flows/signing.py"],
    "cryptography": ["flows/signing.py"],
    "grandalf": ["flows/picture.py"],
    "networkx": ["flows/picture.py"],
    "transformers": ["stages/models.py", "stages/oracle.py", "stages/pretrain.py"],
    "trl": ["stages/oracle.py"],
    "peft": ["stages/models.py"],
    "vllm": ["stages/sampling.py"],
    "openai": ["stages/endpoint.py"],
    "fastapi": ["stages/serve_judge.py"],
    "uvicorn": ["stages/serve_judge.py"],
}
# Parts that programs share; every other module of stages with a `main` is a program.
SHARED = {"stages.params", "stages.artefacts", "stages.models", "stages.judges", "stages.tracking"}
WITHOUT_A_STAGE = {
    "stages.pretrain",
    "stages.tracking",
    "stages.moments",
    "stages.claims",
    "stages.records",
    "stages.traces",
    # Of a round of retraining, around the pipeline.
    "stages.pull",
    "stages.drift",
    "stages.challenge",
    "stages.gate",
    "stages.registry",
}


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Full names of what a file imports when it runs, those inside functions if `lazy`."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pending += node.orelse
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not lazy:
                pass
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, f"{path}: relative import"
                assert node.module is not None
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case _:
                pending += ast.iter_child_nodes(node)


def first_party_imports(module: str) -> set[str]:
    """This project's modules that `module` imports itself, with the packages that hold them."""
    named = {name for name in imports(MODULES[module]) if name in MODULES}
    return named | {parent for name in {*named, module} for parent in packages_of(name)}


def packages_of(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def code_dependencies(module: str) -> list[str]:
    """Files of this project that running `module` may load, as dvc.yaml lists them."""
    found, pending = set[str](), [module]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += first_party_imports(name)
    return sorted(str(MODULES[name].relative_to(PROJECT)) for name in found)


def stages_of_dvc() -> dict[str, dict[str, Any]]:
    """dvc.yaml's stages by name, the templates in the place of what they unfold to."""
    stages = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


def program_of(stage: dict[str, Any]) -> str:
    python, flag, module, *_ = stage["cmd"].split()
    assert (python, flag) == ("python", "-m")
    return module


def programs() -> set[str]:
    def has_main(path: Path) -> bool:
        body = ast.parse(path.read_text()).body
        return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)

    return {name for name, path in MODULES.items() if name.startswith("stages.") and has_main(path)}


def root(name: str) -> str:
    return name.split(".")[0]


every_module = pytest.mark.parametrize("module", MODULES)


@every_module
def test_a_vendor_is_imported_in_its_home_alone(module: str) -> None:
    path = str(MODULES[module].relative_to(PROJECT))
    for vendor in {root(name) for name in imports(MODULES[module])} & set(HOMES):
        assert any(
            path == home or (home[-1] == "/" and path.startswith(home)) for home in HOMES[vendor]
        )


@every_module
def test_floors_import_only_what_lies_below_them(module: str) -> None:
    found = set(imports(MODULES[module]))
    roots = {root(name) for name in found}
    match root(module):
        case "prefopt":
            assert roots <= PREFOPT_MAY_IMPORT | set(sys.stdlib_module_names) | {"prefopt"}
        case "stages":
            assert "flows" not in roots
        case "flows":
            at_once = {root(name) for name in imports(MODULES[module], lazy=False)}
            assert not at_once & {"stages", "prefopt"}
            assert module == "flows.cli" or not roots & {"stages", "prefopt"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("stages.")])
def test_programs_never_import_programs(module: str) -> None:
    assert not (set(imports(MODULES[module])) & programs()) - SHARED - {module}


def test_every_stage_has_its_program_and_every_program_its_stage() -> None:
    assert {program_of(stage) for stage in stages_of_dvc().values()} == programs() - WITHOUT_A_STAGE


@pytest.mark.parametrize("name", stages_of_dvc())
def test_a_stage_depends_on_the_code_that_it_may_load_and_no_other(name: str) -> None:
    stage = stages_of_dvc()[name]
    code = [path for path in stage["deps"] if path.endswith(".py")]
    assert code == code_dependencies(program_of(stage))


@pytest.mark.parametrize("module", sorted(programs()))
def test_the_code_dependencies_hold_all_that_an_import_loads(
    module: str, loaded_by_program: dict[str, set[str]]
) -> None:
    files = {str(MODULES[name].relative_to(PROJECT)) for name in loaded_by_program[module]}
    assert str(MODULES[module].relative_to(PROJECT)) in files
    assert files <= set(code_dependencies(module))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("stages.judge", {"torch", "transformers", "mlflow", "openai"}),
        ("stages.evaluate", {"torch", "transformers", "mlflow"}),
        ("stages.compare", {"torch", "transformers", "mlflow", "statsmodels"}),
        ("prefopt.statistics.power", {"torch", "numpy", "scipy", "statsmodels"}),
        ("stages.label", {"torch", "transformers", "mlflow"}),
        ("stages.params", {"torch", "transformers", "mlflow"}),
        ("stages.tracking", {"torch", "transformers", "mlflow"}),
        ("stages.artefacts", {"torch", "transformers", "mlflow", "pandas"}),
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(module: str, heavy: set[str]) -> None:
    loaded = interpreted(f"import {module}, sys; print(*sys.modules)").split()
    assert not {root(name) for name in loaded} & heavy


def test_the_walk_sees_lazy_imports_and_not_those_for_type_checkers(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import a\nif TYPE_CHECKING:\n    import b\n"
        "def f():\n    from c import d\nclass E:\n    import g\n"
    )
    assert set(imports(path)) == {"a", "c", "c.d", "g"}
    assert set(imports(path, lazy=False)) == {"a", "g"}


# Forks a child for every program, after what all of them load of others was loaded once.
IMPORT_EACH = """
import os, sys
import pyarrow.parquet, tokenizers, torch, tqdm, transformers, transformers.modeling_utils
for module in sys.argv[1:]:
    if os.fork() == 0:
        __import__(module)
        own = [name for name in sys.modules if name.split(".")[0] in ("prefopt", "stages", "flows")]
        print(module, *own, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, module
"""


@pytest.fixture(scope="module")
def loaded_by_program() -> dict[str, set[str]]:
    """Program -> this project's modules in an interpreter that imported it and nothing before."""
    lines = interpreted(IMPORT_EACH, *sorted(programs())).splitlines()
    return {module: set(own) for module, *own in map(str.split, lines)}


def interpreted(code: str, *arguments: str) -> str:
    """What `code` prints in a fresh interpreter."""
    finished = subprocess.run(
        [sys.executable, "-B", "-c", code, *arguments],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout
