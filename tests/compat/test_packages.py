"""Two families of OpenMMLab packages: neither is pulled in, and a mixture is told."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from importlib.metadata import requires
from pathlib import Path

import pytest

from prune_mm.compat import check_openmmlab_packages
from prune_mm.compat.packages import DISTRIBUTIONS, installed_distributions


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that is looked into first; ``site(name, version)`` installs the metadata of one."""

    def install(name, version):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    return install


def name_of(requirement):
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_no_family_comes_without_being_asked_for():
    families = {name for names in DISTRIBUTIONS.values() for name in names}
    asked = {name_of(line) for line in requires("prune_mm") if "extra ==" not in line}
    assert "torch" in asked
    assert not asked & families


def test_an_extra_brings_one_family():
    extras = {"openmmlab": set(), "openmmlab-upstream": set()}
    for line in requires("prune_mm"):
        extra = re.search(r"extra == ['\"](.+?)['\"]", line)
        if extra and extra.group(1) in extras:
            extras[extra.group(1)].add(name_of(line))
    assert all(name.startswith("onedl-") for name in extras["openmmlab"])
    assert not any(name.startswith("onedl-") for name in extras["openmmlab-upstream"])
    for names in DISTRIBUTIONS.values():
        assert all(found & set(names) for found in extras.values())


def test_the_packages_here_are_of_one_family():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_openmmlab_packages()
    assert [len(installed_distributions(folder)) for folder in DISTRIBUTIONS] == [1, 1, 1, 1]


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_two_packages_that_write_one_folder_are_named(folder, site):
    (here,) = installed_distributions(folder)
    other = next(name for name in DISTRIBUTIONS[folder] if name != here)
    site(other, "9.8.7")
    with pytest.warns(UserWarning, match=f"the same folder '{folder}'") as seen:
        check_openmmlab_packages()
    (message,) = [str(warning.message) for warning in seen]
    assert f"{other} 9.8.7" in message
    assert here in message
    assert "pip uninstall" in message


def test_a_mixture_is_told_when_prune_mm_is_imported(site, tmp_path):
    (here,) = installed_distributions("mmcv")
    site("mmcv-full" if here != "mmcv-full" else "mmcv", "1.7.2")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import prune_mm"
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert end.returncode == 0, end.stderr
    assert end.stderr.count("are both installed") == 1, end.stderr


def test_an_mmengine_without_its_pkg_resources_is_told(site, tmp_path, monkeypatch):
    package = tmp_path / "mmengine"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "utils/package_utils.py").write_text("def is_installed(package):\n    import pkg_resources\n")

    def find(name):
        return None if name == "pkg_resources" else _Spec(str(package / "__init__.py"))

    monkeypatch.setattr("prune_mm.compat.packages.find_spec", find)
    with pytest.warns(UserWarning, match="pip install 'setuptools<82'"):
        check_openmmlab_packages()
    (package / "utils/package_utils.py").write_text("from importlib.metadata import version\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_openmmlab_packages()


class _Spec:
    def __init__(self, origin):
        self.origin = origin


def test_nothing_is_looked_for_where_mmengine_is_missing(monkeypatch):
    monkeypatch.setattr("prune_mm.compat.packages.find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_openmmlab_packages()


def test_the_upstream_environment_is_described_by_names_and_versions_only():
    text = (Path(__file__).parents[2] / "requirements/upstream.txt").read_text()
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    assert all(re.fullmatch(r"[\w.-]+(==|<)[\w.]+", line) for line in lines if line)
    assert not re.search(r"^onedl-", text, re.M)
