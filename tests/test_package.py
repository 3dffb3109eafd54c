"""The package as such: its public names, what importing it costs, and what its files hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import ip2p

ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_public_names() -> None:
    assert sorted(ip2p.__all__) == ["Editor", "__version__", "edit"]
    assert all(hasattr(ip2p, name) for name in ip2p.__all__)


def test_importing_the_package_imports_no_torch() -> None:
    assert (
        python("import sys, ip2p, ip2p.settings, ip2p.cli.main; print('torch' in sys.modules)") == "False\n"
    )


def test_the_storybook_needs_no_torch() -> None:
    code = "import sys, ip2p_storybook.draw, ip2p_storybook.edits, ip2p.cli.storybook"
    assert python(f"{code}; print([m for m in ('torch', 'pyarrow') if m in sys.modules])") == "[]\n"


def test_locked_versions_lie_within_the_ranges() -> None:
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


def test_torch_is_locked_without_a_build() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert re.fullmatch(r"torch==[\d.]+", pins[0])
    assert not any(pin.startswith(("nvidia", "triton")) for pin in pins)


def test_the_python_examples_of_the_readme_name_what_there_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(((?:docs|examples)/[^)#]+|LICENSE)\)", readme):
        assert (ROOT / link).exists(), link
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        compile(block, "README.md", "exec")
