"""What is installed: the wheel and the source distribution hold what runs, and the imports are what is declared."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distributions whose import name differs.
IMPORT_NAMES = {"pyyaml": "yaml"}
SHIPPED = ("engine", "kernels", "selfreward")


def sources(*folders):
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "/engine/kernels/" not in str(path)
    ]


def imports(path):
    """Every module that a file imports, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """File names in the wheel and in the source distribution, built from a copy without network and isolation."""
    tree = tmp_path_factory.mktemp("house") / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    unneeded = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("engine", "kernels", "csrc", "selfreward"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=unneeded)
    command = "import setuptools.build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    build = subprocess.run([sys.executable, "-c", command], cwd=tree, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    (wheel,), (archive,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = {member.name.split("/", 1)[1]: member for member in tar.getmembers() if "/" in member.name}
    return {info.filename: info for info in zipfile.ZipFile(wheel).infolist()}, members


@pytest.mark.full  # the wheel is compiled anew, which takes a minute
def test_the_wheel_holds_every_module_and_every_data_file(built):
    wheel, _ = built
    modules = {str(path.relative_to(ROOT)) for path in sources("engine", "selfreward")}
    kernels = {f"engine/{path.relative_to(ROOT)}" for path in sources("kernels")}
    folders = ("recipes", "templates", "tiny/data", "tiny/m0")
    data = {str(path.relative_to(ROOT)) for name in folders for path in (ROOT / "selfreward" / name).iterdir()}
    expected = modules | kernels | data | {"engine/py.typed", "engine/_C.pyi", "selfreward/py.typed"}
    assert {
        "selfreward/recipes/tiny.yaml",
        "engine/kernels/gumbel.py",
        "selfreward/tiny/m0/model.safetensors",
    } <= expected
    assert expected - set(wheel) == set()
    assert any(re.fullmatch(r"engine/_C\..*(so|pyd)", name) for name in wheel)
    assert all(wheel[name].file_size > 0 for name in kernels)  # real files, not a link


@pytest.mark.full  # the wheel is compiled anew, which takes a minute
def test_the_wheel_installs_no_top_level_package_but_engine_and_selfreward(built):
    wheel, _ = built
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"engine", "selfreward"}


@pytest.mark.full  # the wheel is compiled anew, which takes a minute
def test_the_source_distribution_holds_what_the_extension_is_built_from(built):
    _, sdist = built
    extension = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    kernels = {f"engine/{path.relative_to(ROOT)}" for path in sources("kernels")}
    assert extension | kernels | {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"} <= set(sdist)
    assert all(sdist[name].isfile() for name in kernels)


def test_every_import_is_declared_and_every_requirement_is_imported():
    declared = {re.split(r"[^A-Za-z0-9_-]", name)[0].lower() for name in PROJECT["dependencies"]}
    declared = {IMPORT_NAMES.get(name, name) for name in declared}
    found = {name.split(".")[0] for path in sources(*SHIPPED) for name in imports(path)}
    assert found - set(sys.stdlib_module_names) - {"engine", "selfreward", "triton"} == declared


def test_only_one_file_imports_triton_which_need_not_be_installed():
    importers = {path.name for path in sources("kernels", "engine", "selfreward") if "triton" in set(imports(path))}
    assert importers == {"jit.py"}


def test_only_the_op_table_and_the_native_functions_import_kernels_and_the_extension():
    def device_code(name):
        return name.startswith(("engine.kernels", "engine._C"))

    importers = {
        str(path.relative_to(ROOT)) for path in sources("engine", "selfreward") if any(map(device_code, imports(path)))
    }
    assert importers == {"engine/native.py", "engine/native_rows.py", "engine/ops.py"}


def test_kernels_import_torch_and_triton_only():
    found = {name.split(".")[0] for path in sources("kernels") for name in imports(path)}
    assert found - set(sys.stdlib_module_names) <= {"torch", "triton"}


def test_constraints_pin_every_requirement_and_test_extra():
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split())
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert {re.split(r"[^A-Za-z0-9_-]", name)[0].lower() for name in wanted} - set(pins) == set()
