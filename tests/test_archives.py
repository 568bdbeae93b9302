"""Pictures from zip and tar archives: the bytes are those of loose files, and whatever is wrong is one line."""
import base64
import io
import os
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import GOLDEN

from lib import archives
from lib.archives import Pictures

PHOTO = (GOLDEN / "images/photo.jpg").read_bytes()
NAMES = ["a.jpg", "folder/b.jpg", "folder/é 中.jpg", "x" * 90 + "/" + "y" * 150 + ".jpg",
         "folder/" + "n" * 99 + ".jpg"]


def content(name: str) -> bytes:
    return name.encode() * 50


def write_zip(path: Path, names: list[str] = NAMES, packed: int = zipfile.ZIP_STORED, **more) -> Path:
    with zipfile.ZipFile(path, "w", packed, **more) as file:
        file.mkdir("folder")
        for name in names:
            file.writestr(name, content(name))
    return path


def write_tar(path: Path, names: list[str] = NAMES, form: int = tarfile.GNU_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=form) as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content(name))
            file.addfile(member, io.BytesIO(content(name)))
    return path


ARCHIVES = {
    "stored": write_zip,
    "deflated": lambda path: write_zip(path, packed=zipfile.ZIP_DEFLATED),
    "gnu": write_tar,
    "posix": lambda path: write_tar(path, form=tarfile.PAX_FORMAT),
    "dotted": lambda path: write_tar(path, ["./" + name for name in NAMES]),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_members_are_read_as_they_were_written(kind, tmp_path):
    """Long names and names in other alphabets among them; the kind is told by the content, not by the file's name."""
    path = ARCHIVES[kind](tmp_path / "pictures.data")
    pictures = Pictures([path])
    for name in NAMES:
        file = pictures.open(name)
        assert file.read().replace(b"./", b"") == content(name) and file.name == f"{name} in {path}"
    with pytest.raises(ValueError, match="image missing: 'absent.jpg' is not in"):
        pictures.open("absent.jpg")
    for folder in ("folder", "folder/"):
        with pytest.raises(ValueError, match="image missing"):
            pictures.open(folder)


def test_a_zip_of_more_than_65535_members(tmp_path, monkeypatch):
    """zip64, which the pictures of stage 1 need twice: for their number and for their 27 GB."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 300)
    pictures = Pictures([write_zip(tmp_path / "big.zip")])
    assert all(pictures.open(name).read() == content(name) for name in NAMES)


def test_old_names_of_a_zip(tmp_path):
    """Without the flag for UTF-8 a name is UTF-8 all the same, as Info-ZIP writes it, or else cp437."""
    path = write_zip(tmp_path / "old.zip", ["caf_.jpg", "ab__.jpg"])
    raw = path.read_bytes().replace(b"caf_", b"caf\x82").replace(b"ab__", "abé".encode())
    path.write_bytes(raw)
    pictures = Pictures([path])
    assert pictures.open("café.jpg").read() and pictures.open("abé.jpg").read()


def test_several_places(tmp_path):
    """Each picture from where it is; one that is in two of them would be a guess."""
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/c.jpg").write_bytes(b"c")
    one = write_zip(tmp_path / "one.zip", ["a.jpg", "same.jpg"])
    two = write_tar(tmp_path / "two.tar", ["b.jpg", "same.jpg"])
    pictures = Pictures([tmp_path / "loose", one, two])
    assert pictures.open("a.jpg").read() and pictures.open("b.jpg").read()
    assert pictures.open("c.jpg").read_bytes() == b"c"
    with pytest.raises(ValueError, match="image named twice: 'same.jpg' is 2 times in .*loose .*one.zip .*two.tar"):
        pictures.open("same.jpg")
    (tmp_path / "images.zip").write_bytes(one.read_bytes())
    assert Pictures([tmp_path / "images"]).open("a.jpg").read()         # as it was downloaded: nobody has to unzip it


def damaged(kind: str, path: Path) -> Path:
    if kind == "duplicate":
        with pytest.warns(UserWarning):
            return write_zip(path, ["a.jpg", "a.jpg"])
    if kind == "link":
        with tarfile.open(path, "w") as file:
            member = tarfile.TarInfo("a.jpg")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(member)
        return path
    if kind in ("gz", "bz2", "xz"):
        return write_tar(path, mode=f"w:{kind}")
    if kind == "lzma":
        return write_zip(path, packed=zipfile.ZIP_LZMA)
    raw = bytearray((write_tar if kind == "cut tar" else write_zip)(path, packed=8).read_bytes()
                    if kind != "cut tar" else write_tar(path).read_bytes())
    if kind == "encrypted":
        raw[raw.index(b"PK\1\2", raw.index(b"PK\1\2") + 1) + 8] |= 1
    elif kind == "damaged member":
        at = raw.index(b"a.jpg") + 5
        raw[at:at + 12] = b"\xff" * 12
    elif kind == "cut zip":
        del raw[-200:]
    elif kind == "cut front":
        del raw[:200]
    elif kind == "cut tar":
        del raw[700:]
    elif kind == "last of several":                         # as zip -s writes: the directory is in the last disk
        raw[raw.rindex(b"PK\5\6") + 4] = 2
    elif kind == "endless directory":
        raw[-22:-22] = struct.pack("<4s28x3Q4sLQL", b"PK\6\6", 3, 1 << 60, 0, b"PK\6\7", 0, len(raw) - 22, 1)
    elif kind == "empty":
        raw.clear()
    elif kind == "text":
        raw[:] = b"version https://git-lfs.github.com/spec/v1\n" * 20
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("kind, problem", [
    ("duplicate", "named twice"), ("link", "a link to another member"), ("gz", "unpack it"), ("bz2", "unpack it"),
    ("xz", "unpack it"), ("lzma", "packed by method 14"), ("encrypted", "it is encrypted"),
    ("damaged member", "damaged or cut"), ("cut zip", "no directory"),
    ("cut front", "a part of it is missing|not a zip or an uncompressed tar"),
    ("cut tar", "cut short in the member at byte 0"), ("empty", "too short"),
    ("last of several", "a part of it is missing"), ("endless directory", "a part of it is missing"),
    ("text", "not a zip or an uncompressed tar")])
def test_bad_archives_are_one_line(kind, problem, tmp_path):
    path = damaged(kind, tmp_path / "bad.zip")
    with pytest.raises(ValueError, match=problem) as e:
        Pictures([path]).open("a.jpg")
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name, problem", [
    ("../a.jpg", "outside"), ("/etc/passwd", "outside"), ("C:\\a.jpg", "outside"), ("a\0.jpg", "outside"),
    ("folder/../../a.jpg", "outside"), ("http://x/a.jpg", "an address"), ("file:///a.jpg", "an address"),
    ("data:image/png;base64,x", "an address"), ("data:image/png,abc", "an address"), ("data:", "an address")])
def test_names_that_leave_the_archive(name, problem, tmp_path):
    path = write_zip(tmp_path / "x.zip", ["a.jpg", "../a.jpg", "/etc/passwd"])
    with pytest.raises(ValueError, match=f"image (is )?{problem}"):
        Pictures([path]).open(name)


def test_a_picture_in_the_record_itself(tmp_path):
    address = "data:image/jpeg;base64," + base64.b64encode(PHOTO).decode()
    assert Pictures([]).open(address).read() == PHOTO


def test_the_index_is_made_once(tmp_path, monkeypatch):
    """And again when the archive changes, or when a power failure has cut it."""
    path, out = write_zip(tmp_path / "x.zip"), tmp_path / "out"
    Pictures([path], cache_dir=out)
    [cached] = out.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(archives, "index_archive", lambda path: pytest.fail("made again"))
        assert Pictures([path], cache_dir=out).open("a.jpg").read() == content("a.jpg")
        os.utime(path, (1, 1))
        with pytest.raises(pytest.fail.Exception):
            Pictures([path], cache_dir=out)
    for broken in (b"", cached.read_bytes()[:100], np.random.default_rng(0).bytes(500)):
        os.utime(path, ns=(0, 5))
        Pictures([path], cache_dir=out)
        for file in out.iterdir():
            file.write_bytes(broken)
        assert Pictures([path], cache_dir=out).open("a.jpg").read() == content("a.jpg")


def test_archives_of_random_names(tmp_path):
    rng = random.Random(0)
    names = list({f"{rng.randrange(99)}/{rng.randrange(10**9)}.jpg" for _ in range(3000)})
    for path in (write_zip(tmp_path / "x.zip", names), write_tar(tmp_path / "x.tar", names)):
        pictures = Pictures([path])
        assert all(pictures.open(name).read() == content(name) for name in rng.sample(names, 300))
        assert all(len(array) == len(names) for array in pictures.indexes[path].values())


def test_pictures_beside_the_data_are_found_from_there(tmp_path, monkeypatch):
    """--images . has no name to which an ending could be added."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    assert Pictures([Path(".")]).find("a.jpg").read_bytes() == PHOTO
