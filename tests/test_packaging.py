"""What is built, what an import does, and names that must not be taken."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def python(code, *, cwd):
    """Runs code in a fresh interpreter and returns what it prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Paths in the wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_has_two_packages_and_nothing_else(wheel):
    top = {name.split("/")[0] for name in wheel}
    (info,) = [name for name in top if name.endswith(".dist-info")]
    assert info.startswith("fastinterp-")
    assert top == {"fastinterp", "fastinterp_kernels", info}


def test_the_wheel_has_what_is_not_python(wheel):
    assert "fastinterp/py.typed" in wheel
    templates = ROOT / "fastinterp" / "report" / "templates"
    expected = {f"fastinterp/report/templates/{path.name}" for path in templates.iterdir() if path.is_file()}
    assert expected
    assert expected <= set(wheel)


def test_the_wheel_has_every_module(wheel):
    sources = {
        f"fastinterp/{path.relative_to(ROOT / 'fastinterp').as_posix()}" for path in (ROOT / "fastinterp").rglob("*.py")
    }
    kernels = ROOT / "kernels" / "fastinterp_kernels"
    sources |= {f"fastinterp_kernels/{path.relative_to(kernels).as_posix()}" for path in kernels.rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == sources


def test_the_wheel_names_its_command(wheel):
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)


# Names that must not be taken -------------------------------------------------------------------------------------


def test_folders_that_are_no_packages():
    # Either file would shadow a package: ``kernels`` belongs to Hugging Face, ``tests/kernels`` would hide it too.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_folder_of_kernels_is_no_package_with_code():
    code = (
        "import importlib.util; spec = importlib.util.find_spec('kernels'); print(spec is None or spec.origin is None)"
    )
    assert python(code, cwd=ROOT) == "True"


def test_transformers_can_be_imported_beside_the_folder():
    assert python("from transformers import GPT2LMHeadModel; print('imported')", cwd=ROOT) == "imported"


# What an import does ----------------------------------------------------------------------------------------------


HEAVY = ("transformers", "transformer_lens", "zarr", "triton")


@pytest.mark.parametrize(
    "what",
    [
        "import fastinterp",
        "import fastinterp; fastinterp.load; fastinterp.ablate; fastinterp.PromptSet",
        "import fastinterp_kernels",
    ],
)
def test_an_import_brings_no_heavy_module(what, tmp_path):
    code = f"import sys; {what}; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert python(code, cwd=tmp_path) == "[]"


def test_the_package_alone_imports_next_to_nothing(tmp_path):
    code = "import sys; import fastinterp; print('torch' in sys.modules, 'xarray' in sys.modules)"
    assert python(code, cwd=tmp_path) == "False False"


def test_an_import_sets_nothing_in_torch(tmp_path):
    code = """
import random, warnings, torch
def state():
    return (
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.flash_sdp_enabled(),
        torch.random.get_rng_state().tolist(), random.getstate(), list(warnings.filters),
    )
before = state()
import fastinterp
for name in fastinterp.__all__:
    getattr(fastinterp, name)
after = state()
print([index for index, (a, b) in enumerate(zip(before, after)) if a != b])
"""
    # Whatever other libraries do to warning filters (the last entry) is not this package's doing.
    assert python(code, cwd=tmp_path) in ("[]", "[11]")


def test_every_public_name_is_there_and_documented():
    import fastinterp

    assert sorted(set(fastinterp.__all__)) == sorted(fastinterp.__all__, key=str)
    for name in fastinterp.__all__:
        value = getattr(fastinterp, name)
        if name not in ("METRICS", "TASKS"):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), name
    assert set(fastinterp.__all__) <= set(dir(fastinterp))


def test_unknown_names_are_attribute_errors():
    import fastinterp

    with pytest.raises(AttributeError, match="'fastinterp' has no attribute 'lode'"):
        _ = fastinterp.lode


@pytest.mark.parametrize("module", ["fastinterp.load", "fastinterp.load.gguf", "fastinterp.load.hf"])
def test_load_stays_callable_after_importing_its_modules(module, tmp_path):
    code = f"""
import fastinterp, {module}
assert callable(fastinterp.load), fastinterp.load
try:
    fastinterp.load(3)
except fastinterp.FastinterpError as error:
    print(type(error).__name__)
"""
    assert python(code, cwd=tmp_path) == "ModelSourceError"
    assert callable(importlib.import_module("fastinterp.load"))


def test_the_version_is_that_of_the_project():
    import tomllib
    from importlib.metadata import version

    import fastinterp

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fastinterp.__version__ == project["version"] == version("fastinterp")
