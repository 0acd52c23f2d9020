"""The sample store of ``store_child.py``, as a fixture; test folders are no packages."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def sample() -> ModuleType:
    path = Path(__file__).with_name("store_child.py")
    spec = importlib.util.spec_from_file_location("store_child", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture(scope="session")
def reference(sample: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the sample store written without disturbance, by path."""
    path = tmp_path_factory.mktemp("reference") / "run.zarr"
    sample.fill(path)
    return read_tree(path)


def read_tree(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="session")
def tree():
    return read_tree
