"""The stock harness finds the model without any import by the user, and torch never notices us."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dynamax_lm_eval import tasks_dir

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_entry_points_are_declared() -> None:
    found = {
        (point.group, point.name, point.value)
        for point in importlib.metadata.distribution("dynamax-lm-eval").entry_points
    }
    assert ("lm_eval.models", "dynamax", "dynamax_lm_eval.lm:DynamaxLM") in found
    assert ("torch.backends", "dynamax_lm_eval", "_dynamax_lm_eval_autoload:register") in found


@pytest.mark.parametrize("order", ["import torch, lm_eval.models", "import lm_eval.models, torch"])
def test_registered_whatever_is_imported_first(order: str) -> None:
    output = python(
        f"{order}\nfrom lm_eval.api.registry import model_registry as r\n"
        "print('dynamax' in r, 'hf' in r, 'dummy' in r, len(r._objs) > 20)\n"
        "import sys; print(any(type(f).__name__ == '_OneShotFinder' for f in sys.meta_path))\n"
        "print(type(sys.modules['lm_eval.models'].__spec__.loader).__name__)"
    )
    assert output.split() == ["True", "True", "True", "True", "False", "SourceFileLoader"]


@pytest.mark.slow
def test_a_harness_that_discovers_the_entry_point_finds_one_model() -> None:
    """It enters the entry point where the name is not taken; loading it imports our class, which registers itself."""
    output = python(
        "import torch, lm_eval.models, importlib.metadata as m\nfrom lm_eval.api import registry\n"
        "found = {point.name: point for point in m.entry_points(group='lm_eval.models')}\n"
        "taken = registry.model_registry._objs['dynamax']\n"
        "assert found['dynamax'].value == getattr(taken, 'value', taken)\n"
        "assert 'dynamax' in registry.model_registry, 'taken, so that discovery leaves it alone'\n"
        "loaded = found['dynamax'].load()\n"
        "print(registry.get_model('dynamax') is loaded, sum('dynamax' in name for name in registry.model_registry))"
    )
    assert output.split()[-2:] == ["True", "1"]


@pytest.mark.slow
def test_found_by_name_as_the_command_does() -> None:
    """The harness seeds torch, then looks the model up."""
    output = python(
        "from lm_eval.utils import set_torch_seed\nset_torch_seed(1)\n"
        "import lm_eval.evaluator\nfrom lm_eval.api.registry import get_model\nprint(get_model('dynamax').__name__)"
    )
    assert output.split()[-1] == "DynamaxLM"


def test_import_torch_loads_nothing_of_the_harness() -> None:
    output = python(
        "import torch, sys\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('lm_eval', 'transformers')])\n"
        "print(sorted(m for m in sys.modules if 'dynamax_lm_eval' in m))"
    )
    ours = ["_dynamax_lm_eval_autoload", "dynamax_lm_eval", "dynamax_lm_eval._autoload"]
    assert output.splitlines() == ["[]", str(ours)]


def test_the_bridge_uses_the_standard_library_only() -> None:
    # -S: without site-packages. What it imports must be found all the same.
    for name in ("_dynamax_lm_eval_autoload.py", "dynamax_lm_eval/__init__.py", "dynamax_lm_eval/_autoload.py"):
        code = f"import runpy; runpy.run_path({str(ROOT / name)!r})"
        subprocess.run([sys.executable, "-S", "-c", code], check=True)


def test_the_bridge_never_raises() -> None:
    python(
        "import sys, types\nfrom dynamax_lm_eval import _autoload\n"
        "sys.modules['lm_eval.models'] = types.ModuleType('lm_eval.models')\n_autoload.register()\n"
        "del sys.modules['lm_eval.models']\nsys.meta_path = None\n_autoload.register()\n"
    )


def test_looking_for_the_module_without_importing_it_keeps_the_hook() -> None:
    output = python(
        "import torch, importlib.util\nimportlib.util.find_spec('lm_eval.models')\n"
        "import lm_eval.models\nfrom lm_eval.api.registry import model_registry as r\nprint('dynamax' in r)"
    )
    assert output.split() == ["True"]


@pytest.mark.slow
def test_run_works_where_torch_loads_no_extensions() -> None:
    """`dynamax-lm-eval run` does not need the bridge."""
    output = python(
        "import sys\nfrom dynamax_lm_eval.cli import main\n"
        "status = main(['run', '--model_args', 'backbone=/no/such/folder', '--tasks', 'trivia_demo'])\n"
        "print(status)",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert output.split()[-1] == "2"


def test_tasks_folder_holds_the_tasks() -> None:
    assert (tasks_dir() / "trivia_demo" / "trivia_demo.yaml").is_file()


def built(kind: str, folder: Path) -> Path:
    """A wheel of this checkout, ``standard`` or ``editable``."""
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling to build a wheel")
    (wheel,) = hatchling.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=[kind])
    return Path(wheel)


def test_the_wheel_carries_tasks_and_types(tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(built("standard", tmp_path)).namelist())
    assert {"_dynamax_lm_eval_autoload.py", "dynamax_lm_eval/_autoload.py", "dynamax_lm_eval/py.typed"} <= names
    for file in ("trivia_demo.yaml", "questions.jsonl", "fewshot.jsonl", "utils.py", "README.md"):
        assert f"dynamax_lm_eval/tasks/trivia_demo/{file}" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)


@pytest.mark.parametrize("kind", ["standard", "editable"])
def test_the_entry_point_of_tasks_is_a_module_whose_folder_holds_them(kind: str, tmp_path: Path) -> None:
    """By its place, as a harness would look for it, and loaded; from a wheel and from a checkout."""
    if kind == "editable":
        pytest.importorskip("editables", reason="needs editables to build an editable wheel")
    with zipfile.ZipFile(built(kind, tmp_path)) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
        "import importlib.metadata, importlib.util\n"
        "(point,) = importlib.metadata.entry_points(group='lm_eval.tasks')\n"
        "print(list(importlib.util.find_spec(point.module).submodule_search_locations)[0])\n"
        "print(list(point.load().__path__)[0])\n"
    )
    # Isolated: what is installed in this environment is not found.
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    place, loaded = map(Path, found.stdout.splitlines())
    assert place == loaded
    assert (place / "trivia_demo" / "trivia_demo.yaml").is_file()
    assert place == (ROOT / "tasks" if kind == "editable" else tmp_path / "site" / "dynamax_lm_eval" / "tasks")


def test_torch_imports_when_the_checkout_is_gone(tmp_path: Path) -> None:
    """Of an editable installation only its own files are left, and not what its .pth file points to."""
    pytest.importorskip("editables", reason="needs editables to build an editable wheel")
    with zipfile.ZipFile(built("editable", tmp_path)) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site", [name for name in names if not name.endswith(".pth")])
    assert any(name.endswith(".pth") for name in names)
    assert "dynamax_lm_eval/_autoload.py" not in names, "the package itself stays in the checkout"
    output = python(
        "import sys\nsys.modules['dynamax_lm_eval'] = None  # imports of it fail\n"
        "import torch, _dynamax_lm_eval_autoload as ours\nprint(ours.__file__)",
        PYTHONPATH=str(tmp_path / "site"),
        PYTHONSAFEPATH="1",  # nor is the module of the working directory found
    )
    assert output.split() == [str(tmp_path / "site" / "_dynamax_lm_eval_autoload.py")]


@pytest.mark.parametrize(
    ("imports", "error", "is_short"),
    [
        ("import lm_eval._cli.run, torch", "UserError('do\\nthis')", True),
        ("import lm_eval._cli.run, torch", "ValueError('do this')", False),
        ("import torch", "UserError('do this')", False),
    ],
)
def test_errors_of_the_user_end_the_harness_command_in_one_line(imports: str, error: str, is_short: bool) -> None:
    code = f"{imports}\nfrom dynamax_lm_eval.errors import UserError\nraise {error}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert (ended.stderr == "dynamax-lm-eval: error: do this\n") is is_short
    assert ("Traceback" in ended.stderr) is not is_short
