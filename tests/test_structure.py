"""The design's rules about who imports whom and what a plug-in is, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import loratool
from loratool.cli.main import COMMANDS
from loratool.core import registry
from tests.builders import build, typical_parts, write_file

ROOT = Path(loratool.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

LEVELS = (
    frozenset({"core"}),
    frozenset({"architectures", "layouts", "families", "programs", "files"}),
    frozenset({"ops", "merging", "checks"}),
    frozenset({"report"}),
    frozenset({"cli"}),
)
"""Who may import whom: a folder itself and every level before its own."""

PLUGINS = {
    "architectures": "ARCHITECTURE",
    "layouts": "LAYOUT",
    "families": "FAMILY",
    "merging": "METHOD",
    "programs": "PROGRAM",
}
PLUGIN_FOLDERS = frozenset({*PLUGINS, "checks"})
TENSOR_LIBRARIES = frozenset({"torch", "numpy"})
TENSOR_FOLDERS = frozenset({"ops", "merging"})
HEADER_ONLY = ("ops/open.py", "ops/inspect.py", "ops/conformance.py", "ops/check.py")
"""What `loratool info` and `loratool check` run: no tensor library at all."""

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def folder_of(path: Path) -> str:
    """The folder of a module below loratool/; "" for loratool/__init__.py."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def imports(node: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, imported names) of every import below a node; relative ones begin with a dot."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, ()) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield "." * child.level + (child.module or ""), tuple(alias.name for alias in child.names)


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, blocks opened; not those for type checkers."""
    for node in body:
        if is_type_checking(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            for inner in getattr(node, field, []):
                yield from at_import_time(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def level_of(folder: str) -> int:
    return next(level for level, folders in enumerate(LEVELS) if folder in folders)


def test_every_folder_has_a_level() -> None:
    assert {folder_of(path) for path in SOURCES} - {""} == frozenset().union(*LEVELS)


def forbidden(folder: str, module: str, names: tuple[str, ...]) -> bool:
    """Whether a module of `folder` must not import this."""
    parts = module.split(".")
    if parts[0] != "loratool":
        return module.startswith(".")
    if len(parts) == 1:
        return names != ("__version__",)
    other = parts[1]
    return other != folder and level_of(other) >= level_of(folder)


@each_source
def test_imports_point_one_way(path: Path) -> None:
    folder = folder_of(path)
    if not folder:
        return  # the front door sees everything
    wrong = [module for module, names in imports(tree_of(path)) if forbidden(folder, module, names)]
    assert not wrong, f"{folder}/ must not import {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("folder", "module", "names", "expected"),
    [
        ("core", "loratool.layouts.kohya", (), True),
        ("layouts", "loratool.families.lora", (), True),
        ("files", "loratool.layouts.kohya", (), True),
        ("ops", "loratool.merging.linear", (), True),
        ("report", "loratool.cli.info", (), True),
        ("core", ".module", (), True),
        ("ops", "loratool", ("convert",), True),
        ("ops", "loratool", ("__version__",), False),
        ("layouts", "loratool.core.layout", (), False),
        ("cli", "loratool.report.info", (), False),
        ("core", "json", (), False),
    ],
)
def test_the_rule_itself(folder: str, module: str, names: tuple[str, ...], expected: bool) -> None:
    assert forbidden(folder, module, names) is expected


@each_source
def test_plugins_do_not_import_each_other(path: Path) -> None:
    folder = folder_of(path)
    if folder not in PLUGIN_FOLDERS:
        return
    for module, names in imports(tree_of(path)):
        package, _, name = module.rpartition(".")
        own = {name} if package == f"loratool.{folder}" else set(names) if module == f"loratool.{folder}" else set()
        assert all(one.startswith("_") for one in own), f"{path.name} imports the plug-in {module}"


@each_source
def test_tensor_libraries_are_imported_late(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    tree = tree_of(path)
    early = {
        module.partition(".")[0]
        for node in at_import_time(tree.body)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module, _ in imports(node)
    } & TENSOR_LIBRARIES
    if folder_of(path) not in TENSOR_FOLDERS or relative in HEADER_ONLY:
        assert not early, f"{relative} imports {', '.join(early)} when it is imported"


@each_source
def test_only_loads_and_operations_know_tensor_libraries(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    if folder_of(path) in TENSOR_FOLDERS and relative not in HEADER_ONLY:
        return
    if relative == "core/tensor.py":  # the inside of a load
        return
    tree = tree_of(path)
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and is_type_checking(node)]
    typed = {id(inner) for block in for_types for inner in ast.walk(block)}
    wrong = {
        module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in typed
        for module, _ in imports(node)
        if module.partition(".")[0] in TENSOR_LIBRARIES
    }
    assert not wrong, f"{relative} imports {', '.join(wrong)}"


# -- plug-ins -------------------------------------------------------------------------------------------------------


def plugin_files(folder: str) -> list[Path]:
    return [path for path in SOURCES if folder_of(path) == folder and not path.name.startswith("_")]


@pytest.mark.parametrize("folder", PLUGINS)
def test_a_plugin_is_one_object_in_a_file_of_its_name(folder: str) -> None:
    listed = {
        "architectures": registry.architectures,
        "layouts": registry.layouts,
        "families": registry.families,
        "merging": registry.methods,
        "programs": registry.programs,
    }
    found = {}
    for path in plugin_files(folder):
        names = [
            target.id
            for node in tree_of(path).body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        ]
        assert [name for name in names if name in PLUGINS.values()] == [PLUGINS[folder]], path.name
        plugin = getattr(sys.modules.get(f"loratool.{folder}.{path.stem}") or imported(folder, path), PLUGINS[folder])
        assert plugin.id.replace("-", "_") == path.stem
        found[plugin.id] = plugin
    registered = dict(listed[folder]())
    assert registered.keys() == found.keys()
    assert all(registered[name] is plugin for name, plugin in found.items())


def imported(folder: str, path: Path) -> ModuleType:
    from importlib import import_module

    return import_module(f"loratool.{folder}.{path.stem}")


def test_helpers_of_plugins_hold_no_plugin() -> None:
    for path in SOURCES:
        if folder_of(path) in PLUGINS and path.name.startswith("_"):
            assert not set(PLUGINS.values()) & {n.id for n in ast.walk(tree_of(path)) if isinstance(n, ast.Name)}


def test_two_plugins_with_one_id_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "loratool_twins"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    for name in ("one", "two"):
        text = "from types import SimpleNamespace\nLAYOUT = SimpleNamespace(id='same')\n"
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    (package / "_helper.py").write_text("raise RuntimeError('helpers are no plug-ins')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        registry,
        "import_module",
        lambda name: __import__("importlib").import_module(name.replace("loratool.twins", "loratool_twins")),
    )
    with pytest.raises(RuntimeError, match="same"):
        registry._discover("twins", "LAYOUT")
    (package / "two.py").unlink()
    assert registry._discover("twins", "LAYOUT") == {"same": SimpleNamespace(id="same")}


# -- docstrings -----------------------------------------------------------------------------------------------------


def undocumented(body: list[ast.stmt], where: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name = f"{where}{node.name}"
        if ast.get_docstring(node) is None:
            yield name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{name}.")


OVERRIDES = frozenset({"OpenNaming.name_of"})
"""Methods that say nothing new about what their base class documents."""


@each_source
def test_public_things_are_documented(path: Path) -> None:
    tree = tree_of(path)
    if tree.body:
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
    assert set(undocumented(tree.body, "")) <= OVERRIDES


# -- info is light --------------------------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `code`."""
    report = "\nimport sys\nprint('\\n'.join(['MODULES', *sys.modules]), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=60
    )
    return set(done.stderr.partition("MODULES\n")[2].split())


def test_importing_the_command_line_is_light() -> None:
    loaded = loaded_by("import loratool.cli.main")
    assert not loaded & TENSOR_LIBRARIES
    assert "loratool.cli.merge" not in loaded  # each command comes when it is asked for


def test_every_command_has_a_module_of_its_name() -> None:
    files = {path.stem for path in SOURCES if folder_of(path) == "cli" and not path.name.startswith("_")} - {"main"}
    assert set(COMMANDS) == files


@pytest.mark.parametrize("options", [[], ["--json"], ["--keys", "--metadata"]], ids=" ".join)
def test_info_loads_no_tensor_library(tmp_path: Path, options: list[str]) -> None:
    file = write_file(tmp_path / "a.safetensors", build(typical_parts("sdxl", "kohya", alpha=2.0), "kohya"))
    code = f"from loratool.cli.main import app\napp(['info', {str(file)!r}, *{options!r}], standalone_mode=False)"
    loaded = loaded_by(code)
    assert "loratool.ops.inspect" in loaded
    assert not loaded & (TENSOR_LIBRARIES | {"safetensors"})


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("architecture", ["sdxl", "flux"])
def test_check_loads_no_tensor_library(architecture: str, layout: str, tmp_path: Path) -> None:
    """Nor does it where parts of a fused weight are zero, which only values would tell."""
    parts = [replace(part, zero_up=True) for part in typical_parts(architecture, layout, alpha=2.0)]
    file = write_file(tmp_path / "a.safetensors", build(parts, layout))
    words = ["check", str(file)]
    for name in ("kohya", "diffusers", "comfyui", "peft", "a1111", "invokeai", "onetrainer", "vllm"):
        words += ["--for", name]
    code = (
        f"from loratool.cli.main import app\ntry:\n app({words!r}, standalone_mode=False)\nexcept BaseException: pass"
    )
    loaded = loaded_by(code)
    assert "loratool.report.check" in loaded
    assert not loaded & (TENSOR_LIBRARIES | {"safetensors"})


def test_resizing_on_the_cpu_needs_no_torch(tmp_path: Path) -> None:
    """Its import takes longer than resizing a small file."""
    file = write_file(tmp_path / "a.safetensors", build(typical_parts("sdxl", "kohya", alpha=2.0), "kohya"))
    out = tmp_path / "b.safetensors"
    words = ["resize", str(file), "--rank", "2", "-o", str(out), "--device", "cpu"]
    code = f"from loratool.cli.main import app\napp({words!r}, standalone_mode=False)"
    loaded = loaded_by(code)
    assert out.exists()
    assert "numpy" in loaded
    assert "torch" not in loaded
