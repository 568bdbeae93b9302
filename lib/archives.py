"""Pictures by name, from folders and from zip and tar archives as they were downloaded.

An archive is not unpacked. A compact index of it says where each member is; it is made once, kept in the run's folder
and shared by all data workers. From then on an archive is as fast as a folder.
"""
import base64
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tarfile import TarError, nti
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np

from lib.common import visible_name
from lib.records import cached_arrays

MOST_BYTES = 1 << 28                # of a picture file; no larger one would be decoded
STORED, DEFLATED = 0, 8             # zip's numbers for how a member is packed, all below 100
IN_TAR, ENCRYPTED, LINK = 256, 257, 258
TAR_BLOCK = 512                     # tar's unit

Entry = tuple[bytes, int, int, int]                         # name, offset, size in the archive, how it is packed
# The columns of an index: an Entry, but for its name only a hash.
INDEX = np.dtype([("hash", np.uint64), ("offset", np.int64), ("size", np.int64), ("packed", np.uint16)])


@dataclass(frozen=True)
class Member:
    """A picture in an archive."""
    archive: Path
    name: str
    offset: int                     # in a zip, of the header in front of the data
    size: int                       # in the archive
    packed: int                     # STORED, DEFLATED, IN_TAR; anything else cannot be read

    def open(self) -> BinaryIO:
        """Its content, as a file in memory whose `name` says where it is from. ValueError if it cannot be read."""
        data, problem = read_member(self)
        file = io.BytesIO(data)
        file.name = f"{self.name} in {self.archive}"
        if problem:
            raise ValueError(f"image unreadable: {visible_name(file.name)}: {problem}")
        return file


def read_member(member: Member) -> tuple[bytes, str]:
    """A member's content, or what is wrong with it."""
    size, packed = member.size, member.packed
    if packed == ENCRYPTED:
        return b"", "it is encrypted"
    if packed == LINK:
        return b"", "it is a link to another member"
    if packed not in (STORED, DEFLATED, IN_TAR):
        return b"", f"it is packed by method {packed}; stored and deflated members are read"
    if size > MOST_BYTES:
        return b"", f"{size:,} bytes are too many for a picture"
    damaged = "the archive is damaged or cut short"
    with open(member.archive, "rb") as file:
        file.seek(member.offset)
        if packed != IN_TAR:
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\3\4":
                return b"", damaged
            file.seek(sum(struct.unpack("<HH", header[26:])), 1)        # its name and its extra fields
        data = file.read(size)
    if len(data) < size:
        return b"", damaged
    if packed == DEFLATED:
        unpacker = zlib.decompressobj(-15)
        try:
            data = unpacker.decompress(data, MOST_BYTES)
        except zlib.error:
            return b"", damaged
        if not unpacker.eof:
            return b"", f"it unpacks to more than {MOST_BYTES:,} bytes, or is cut short"
    return data, ""

# ---------------------------------------------------------------------------------------------------
# What is in an archive


def demand(fine: bool, problem: str) -> None:
    if not fine:
        raise BadZipFile(problem)


def zip_entries(file: BinaryIO) -> Iterator[Entry]:
    """The members of a zip. Python's zipfile takes a third of a gigabyte for the 558,128 pictures of stage 1."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 65_557 - 20))                   # the longest comment, and zip64's locator in front
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    demand(end >= 0, "it has no directory, as if it was cut short")
    disk, n, length, start = struct.unpack_from("<4xH4xHLL", tail, end)
    if tail[end - 20:end - 16] == b"PK\6\7":                # zip64: more than 65,535 members, or than 4 GB
        file.seek(*struct.unpack_from("<8xQ", tail, end - 20))
        n, length, start = struct.unpack("<32x3Q", file.read(56))
    demand(disk in (0, 0xFFFF) and start + length < size, "a part of it is missing")
    file.seek(start)
    directory = file.read(length)
    header = struct.Struct("<4s4xHH8xLLHHH8xL")
    i = 0
    for _ in range(n):
        sign, flags, packed, stored, unpacked, n_name, n_extra, n_comment, offset = header.unpack_from(directory, i)
        demand(sign == b"PK\1\2", "its directory is damaged")
        extra = i + 46 + n_name
        name = directory[i + 46:extra]
        if 0xFFFFFFFF in (stored, unpacked, offset):
            stored, offset = zip64_sizes(directory[extra:extra + n_extra], stored, unpacked, offset)
        i = extra + n_extra + n_comment
        try:
            name.decode()                                   # UTF-8, even without its flag: so does Info-ZIP write it
        except UnicodeDecodeError:
            name = name.decode("cp437").encode()            # an old DOS program
        if not name.endswith(b"/"):                         # a folder
            yield name, offset, stored, ENCRYPTED if flags & 1 else packed


def zip64_sizes(extra: bytes, stored: int, unpacked: int, offset: int) -> tuple[int, int]:
    """The stored size and the offset of a member, at least one of whose numbers did not fit into 32 bits."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            values = iter(struct.unpack(f"<{length // 8}Q", extra[4:4 + length // 8 * 8]))
            unpacked, stored, offset = (next(values, x) if x == 0xFFFFFFFF else x for x in (unpacked, stored, offset))
        extra = extra[4 + length:]
    return stored, offset


def tar_entries(file: BinaryIO) -> Iterator[Entry]:
    """The members of an uncompressed tar, long names of GNU and POSIX among them. Python's tarfile is slower."""
    end = file.seek(0, 2)
    position = 0
    long_name, long_size = b"", -1                          # of the next member, from the one in front of it
    while position + TAR_BLOCK <= end:
        file.seek(position)
        header = file.read(TAR_BLOCK)
        checksum = header[148:156]
        if not any(checksum):
            return                                          # zeros, the end
        is_ustar = header[257:262] == b"ustar"              # older archives have only a checksum, which takes longer
        if not is_ustar:
            right = nti(checksum) == sum(header) - sum(checksum) + 8 * ord(" ")
            demand(right, f"there is no member at byte {position:,}")
        size = nti(header[124:136])
        kind = header[156:157]
        if kind not in (b"L", b"K", b"x", b"g") and long_size >= 0:
            size = long_size
        data = position + TAR_BLOCK
        position = data + -(-size // TAR_BLOCK) * TAR_BLOCK
        demand(0 <= size <= end - data, f"it is cut short in the member at byte {data - TAR_BLOCK:,}")
        if kind == b"L":
            long_name = file.read(size).rstrip(b"\0")
        elif kind == b"x":
            records = dict(re.findall(rb"\d+ ([^=\n]+)=([^\n]*)\n", file.read(size)))
            long_name, long_size = records.get(b"path", long_name), int(records.get(b"size", -1))
        elif kind not in (b"K", b"g"):
            name = header[:100].split(b"\0")[0]
            if is_ustar and header[262] == 0 and header[345] != 0:
                name = header[345:500].split(b"\0")[0] + b"/" + name
            if kind in (b"0", b"\0", b"7", b"1", b"2"):
                yield long_name or name, data, size, LINK if kind in (b"1", b"2") else IN_TAR
            long_name, long_size = b"", -1
    demand(position > 0, "it is too short")


def hash_of(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name.removeprefix(b"./"), digest_size=8).digest(), "little")


def index_archive(path: Path) -> dict[str, np.ndarray]:
    """The columns of INDEX: one row a member, ordered by hash."""
    with open(path, "rb") as file:
        magic = file.read(2)
        entries = zip_entries(file) if magic == b"PK" else tar_entries(file)
        try:
            packed_whole = magic in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5", b"7z", b"Ra")
            demand(not packed_whole, "it is compressed as a whole, so no picture can be read by itself: unpack it")
            rows = np.fromiter(((hash_of(name), *place) for name, *place in entries), dtype=INDEX)
        except (BadZipFile, TarError, struct.error, ValueError, OverflowError) as e:
            problem = "a part of it is missing" if isinstance(e, struct.error) else e
            raise ValueError(f"{path} is not a zip or an uncompressed tar: {problem}") from e
    order = np.argsort(rows["hash"], kind="stable")
    return {column: rows[column][order] for column in INDEX.names}

# ---------------------------------------------------------------------------------------------------
# Pictures by name


class Pictures:
    """Where the pictures that records name are: folders and archives, searched together."""

    def __init__(self, places: list[Path], follow_links: bool = False, cache_dir: Path | None = None):
        """FileNotFoundError or ValueError if one is not there, or is neither a folder nor an archive that can be read.

        follow_links: allow links that lead out of a folder. cache_dir: where indexes of archives are kept, if anywhere.
        """
        self.places = [find_place(Path(place)) for place in places]
        self.follow_links = follow_links
        self.indexes = {}
        for place in self.places:
            if not place.is_dir():
                key = [str(place.resolve()), place.stat().st_size, place.stat().st_mtime_ns]
                make = partial(index_archive, place)
                self.indexes[place] = cached_arrays(cache_dir, "pictures", key, INDEX.names, make)

    def find(self, name: str) -> Path | Member:
        """The file that a record names. Records are untrusted: they must not reach outside the folders."""
        found, problem = [], name_problem(name)
        for place in [] if problem else self.places:
            if place in self.indexes:
                found += find_members(place, self.indexes[place], name)
            elif len(self.places) == 1 or (place / name).exists():
                found.append(place / name)
                if not self.follow_links and not found[-1].resolve().is_relative_to(place.resolve()):
                    problem = (f"image outside the folder: {name!r} is a link to {found[-1].resolve()}; --follow-links "
                               "allows it")
        if len(found) > 1:
            problem = f"image named twice: {name!r} is {len(found)} times in {self}"
        if not found and not problem:
            problem = f"image missing: {name!r} is not in {self}"
        if problem:
            raise ValueError(problem)
        return found[0]

    def open(self, name: str) -> Path | BinaryIO:
        """What data.load_image opens: a file's path, or a picture from an archive or from a data: address in memory."""
        if name.startswith("data:"):
            return picture_in_address(name)
        found = self.find(name)
        return found.open() if isinstance(found, Member) else found

    def __str__(self) -> str:
        return " ".join(map(str, self.places)) or "--images, which is not given"


def find_place(path: Path) -> Path:
    """A folder or an archive; of data/images also data/images.zip, as it was downloaded, if there is no such folder."""
    for there in (path, Path(f"{path}.zip"), Path(f"{path}.tar")):
        if there.exists():
            return there
    raise FileNotFoundError(f"no image folder at {path} (--images); expected a folder, a .zip or a .tar")


def name_problem(name: str) -> str:
    if "://" in name:
        return f"image is an address: {name[:80]}; download it and give the file"
    absolute = name.startswith("/") or re.match("[A-Za-z]:", name)
    if absolute or "\0" in name or "\\" in name or ".." in name.split("/"):
        problem = "path has backslashes" if "\\" in name and not absolute else "outside the folder"
        return f"image {problem}: {name!r}; expected a path with / that is relative to the image folder"
    return ""


def find_members(archive: Path, index: dict[str, np.ndarray], name: str) -> list[Member]:
    """Those of that name: one, none, or several where a name was used twice."""
    key = np.uint64(hash_of(name.encode(errors="surrogateescape")))
    first, last = np.searchsorted(index["hash"], key), np.searchsorted(index["hash"], key, side="right")
    return [Member(archive, name, *(int(index[column][i]) for column in ("offset", "size", "packed")))
            for i in range(first, last)]


def picture_in_address(address: str) -> BinaryIO:
    """The picture that a data: address holds."""
    form, comma, data = address.partition(",")
    try:
        return io.BytesIO(base64.b64decode(data if comma and form.endswith(";base64") else "-", validate=True))
    except ValueError:
        raise ValueError(f"image is an address: {address[:80]!r} does not hold a picture in base64") from None
