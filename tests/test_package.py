"""The package: its public names, its imports, and its project files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import ip2p

ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_public_names_are_exactly_these() -> None:
    errors = ["InputError", "Ip2pError", "ModelError", "ResourceError"]
    settings = ["DistillConfig", "EditSettings", "ModelSettings", "TrainConfig"]
    functions = ["Editor", "distill", "edit", "evaluate", "save_image", "synth", "train"]
    assert sorted(ip2p.__all__) == sorted([*errors, *settings, *functions, "__version__"])
    assert all(hasattr(ip2p, name) for name in ip2p.__all__)
    assert all(hasattr(ip2p.synth, name) for name in ip2p.synth.__all__)
    assert (ROOT / "src/ip2p/py.typed").is_file()


def test_every_public_function_and_class_has_a_unique_name() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):  # both packages
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
            if named and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.name)
    twice = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert not twice


def test_importing_the_package_does_not_import_torch() -> None:
    assert (
        python("import sys, ip2p, ip2p.settings, ip2p.cli.main; print('torch' in sys.modules)") == "False\n"
    )


def test_the_storybook_imports_neither_torch_nor_pyarrow() -> None:
    code = "import sys, ip2p_storybook.draw, ip2p_storybook.edits, ip2p.cli.storybook"
    assert python(f"{code}; print([m for m in ('torch', 'pyarrow') if m in sys.modules])") == "[]\n"


def test_locked_versions_meet_the_minimum_versions() -> None:
    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(n) for n in re.findall(r"\d+", version)[:3])

    lock = (ROOT / "requirements-dev.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)$", lock, re.M))
    locked = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    project = (ROOT / "pyproject.toml").read_text()
    needed = project[project.index("dependencies = [") : project.index("[project.optional")]
    needed += project[project.index("dev = [") : project.index("[project.scripts]")]
    ranges = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', needed))
    assert len(ranges) > 15
    for name, floor in ranges.items():
        assert numbers(locked[name]) >= numbers(floor), name


def test_torch_is_locked_without_a_build_tag_or_cuda_packages() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert re.fullmatch(r"torch==[\d.]+", pins[0])
    assert not any(pin.startswith(("nvidia", "triton")) for pin in pins)


def test_the_readmes_links_exist_and_its_python_examples_compile() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(((?:docs|examples)/[^)#]+|LICENSE)\)", readme):
        assert (ROOT / link).exists(), link
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        compile(block, "README.md", "exec")
