"""MHA, MHD, NRRD and NHDR to a CT volume, through SimpleITK (extra ``itk``).

The text header is read here first: what it declares is checked against limits and the file's size, and a data file that it names must
lie in the same folder. Compressed values are inflated here once to see that they are whole: ITK takes a damaged stream for an image of
whatever its memory held. ITK's world is LPS; it is turned to RAS once.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

import numpy as np

from medvl.geometry import lps_to_ras
from medvl.types import UnreadableImageError
from modalities.ct.hu import hu_verdict
from modalities.ct.nifti import MOST_DEFLATED
from modalities.ct.volume import MAX_VOXELS, CtVolume, affine_problem, check_file, narrow, refused, xyz_affine

SUFFIXES = frozenset({".mha", ".mhd", ".nrrd", ".nhdr"})
HEADER_BYTES = 2**16
META_START = re.compile(rb"\s*(ObjectType|NDims|Comment)\s*=")
CHUNK_BYTES = 2**22
META_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4, "FLOAT": 4, "DOUBLE": 8}
META_BYTES |= {"LONG_LONG": 8, "ULONG_LONG": 8}
NRRD_BYTES = {"char": 1, "short": 2, "int": 4, "longlong": 8, "float": 4, "double": 8}


def read_itk(path: Path) -> CtVolume:
    """Read one volume from ``.mha``, ``.mhd``, ``.nrrd`` or ``.nhdr``.

    Raises:
        UnreadableImageError: no such file, several volumes or colour in it, too large, cut short, a data file outside the folder, a coding
            other than raw or gzip, or SimpleITK is not installed.
    """
    path = Path(path)
    warnings: list[str] = []
    try:
        check_file(path)
        kind = _check_header(path, warnings)
    except UnreadableImageError:
        raise
    except Exception as error:  # hostile headers raise anything
        raise refused(path, f"not a readable MHA or NRRD file: {type(error).__name__} while reading its header") from None
    try:
        import SimpleITK
    except ImportError:
        raise refused(path, "reading MHA and NRRD needs SimpleITK: pip install 'medvl[itk]'") from None
    try:
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("MetaImageIO" if kind == "meta" else "NrrdImageIO")  # by content: a suffix may lie
        reader.SetFileName(str(path))
        image = reader.Execute()
    except Exception as error:
        raise refused(path, f"SimpleITK could not read it ({type(error).__name__}); it is damaged or cut short") from None
    dimensions, numbers = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if dimensions != 3 or numbers != 1:
        raise refused(path, f"holds {dimensions} dimensions and {numbers} values per voxel; expected a volume of one")
    stored = SimpleITK.GetArrayFromImage(image)  # (z, y, x)
    if stored.dtype.kind not in "iuf":
        raise refused(path, "holds complex values, expected integers or floats")
    lps = np.eye(4)
    lps[:3, :3] = np.asarray(image.GetDirection()).reshape(3, 3) * np.asarray(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    affine = xyz_affine(lps_to_ras(lps))
    problem = affine_problem(affine)
    if problem:
        raise refused(path, f"its geometry {problem}")
    values = narrow(stored)
    verdict = hu_verdict(values)
    if verdict.state != "ok":
        warnings.append(f"units: {verdict.state}: {verdict.evidence}")
    return CtVolume(values, affine, verdict, tuple(warnings))


def data_file(path: Path) -> Path | None:
    """The file that a MetaImage or NRRD header names for its values; None where they follow the header or the file is of another format.

    Raises:
        OSError: the file cannot be opened.
        UnreadableImageError: the name is of no file in the header's folder.
    """
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if start.startswith(b"NRRD000"):
        named = re.search(rb"^data ?file:[ \t]*(\S[^\r\n]*)", start, re.MULTILINE | re.IGNORECASE)
    else:
        named = META_START.match(start) and re.search(rb"^\s*ElementDataFile\s*=[ \t]*(\S[^\r\n]*)", start, re.MULTILINE)
    name = named.group(1).decode("latin-1").strip() if named else "LOCAL"
    return None if name.upper() == "LOCAL" else _beside(path, name)


def _check_header(path: Path, warnings: list[str]) -> Literal["meta", "nrrd"]:
    """Refuse what is too large, points elsewhere or cannot be whole; says which format it is."""
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if start.startswith(b"NRRD000"):
        _check_nrrd(path, start, warnings)
        return "nrrd"
    if META_START.match(start):
        _check_meta(path, start, warnings)
        return "meta"
    raise refused(path, "expected a MetaImage (.mha, .mhd) or NRRD file; it starts like neither")


def _check_meta(path: Path, start: bytes, warnings: list[str]) -> None:
    fields: dict[str, str] = {}
    length, ended = 0, False
    for line in start.split(b"\n"):
        length += len(line) + 1
        name, _, value = line.decode("latin-1").partition("=")
        fields[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            ended = True
            break
    if not ended:
        raise refused(path, f"has no ElementDataFile in its first {HEADER_BYTES} bytes")
    width = META_BYTES.get(fields.get("ElementType", "").removeprefix("MET_"))
    if width is None or fields.get("ElementNumberOfChannels", "1") != "1":
        raise refused(path, "holds colour or an unusual type of values, expected one number per voxel")
    sizes = _sizes(path, fields.get("DimSize", ""))
    packed = fields.get("CompressedData", "False").lower() in ("true", "1")
    data = fields["ElementDataFile"]
    if not {"TransformMatrix", "Rotation", "Orientation"} & set(fields):
        warnings.append("its header has no directions; the axes were taken as left, posterior, superior")
    skip = int(fields.get("HeaderSize", "0"))
    if not -1 <= skip <= 2**31:
        raise refused(path, f"declares {skip} bytes before its values")
    if packed and skip != 0:
        raise refused(path, "skips bytes before its compressed values; save it without")
    values, begin = (path, length) if data.upper() == "LOCAL" else (_beside(path, data), 0)
    _check_values(path, values, begin, sizes, width, packed)


def _check_nrrd(path: Path, start: bytes, warnings: list[str]) -> None:
    head, blank, _ = start.replace(b"\r\n", b"\n").partition(b"\n\n")
    fields: dict[str, str] = {}
    for line in head.decode("latin-1").split("\n")[1:]:
        if not line.startswith("#") and ":=" not in line and ":" in line:
            name, _, value = line.partition(":")
            fields[name.strip().lower().replace(" ", "")] = value.strip()
    data = fields.get("datafile")
    if not blank and data is None:
        raise refused(path, f"its header does not end within {HEADER_BYTES} bytes")
    coding = fields.get("encoding", "").lower()
    if coding not in ("raw", "gzip", "gz"):
        raise refused(path, "is coded in another way than raw or gzip; save it as one of these")
    kind = (
        fields.get("type", "").lower().replace("unsigned ", "u").replace("signed ", "").removesuffix("_t").replace("long long", "longlong")
    )
    width = NRRD_BYTES.get(_plain_type(kind))
    if width is None:
        raise refused(path, "holds an unusual type of values, expected integers or floats")
    sizes = _sizes(path, fields.get("sizes", ""))
    if "space" not in fields or "spacedirections" not in fields:
        warnings.append("its header has no space directions; the axes were taken as left, posterior, superior")
    if any(int(fields.get(name, "0")) for name in ("lineskip", "byteskip")):
        raise refused(path, "skips bytes before its values; save it without")
    blank_line = re.search(rb"\n\r?\n", start)
    values, begin = (path, blank_line.end() if blank_line else 0) if data is None else (_beside(path, data), 0)
    _check_values(path, values, begin, sizes, width, coding != "raw")


def _plain_type(name: str) -> str:
    """NRRD's many names of one type to the shortest."""
    sized = {"int8": "char", "int16": "short", "int32": "int", "int64": "longlong"}
    bare = name[1:] if name.startswith("u") else name
    bare = bare.removesuffix(" int") if bare != "int" else bare
    return sized.get(bare, bare)


def _sizes(path: Path, text: str) -> list[int]:
    """The declared sizes, three of them, or more where the rest are 1."""
    words = text.split()
    if not 3 <= len(words) <= 7 or not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
        raise refused(path, f"declares {len(words)} dimensions; expected the sizes of a volume of 3")
    sizes = [int(word) for word in words]
    if len(sizes) != 3:
        raise refused(path, f"has {len(sizes)} dimensions of sizes {sizes}; expected a volume of 3. Save the one that is meant")
    if min(sizes) < 1 or math.prod(sizes) > MAX_VOXELS:
        raise refused(path, f"declares {' x '.join(map(str, sizes))} voxels; expected 1 to {MAX_VOXELS}")
    return sizes


def _check_values(path: Path, values: Path, begin: int, sizes: list[int], width: int, packed: bool) -> None:
    """Refuse values, ``begin`` bytes into a file, that are fewer than declared or do not inflate to just what is declared."""
    need, have = math.prod(sizes) * width, values.stat().st_size - begin
    if have < need and not packed:
        raise refused(path, f"is cut short: {' x '.join(map(str, sizes))} voxels need {need} bytes, there are {have}")
    if packed and need > have * MOST_DEFLATED:
        raise refused(path, f"declares {need} bytes inflated, more than {have} bytes can hold; it is cut short or its header is wrong")
    if packed:
        with values.open("rb") as file:
            file.seek(begin)
            came = _inflated_length(file, need)
        if came != need:
            told = "are damaged or cut short" if came is None else f"are {'over ' * (came > need)}{min(came, need)} bytes"
            raise refused(path, f"its compressed values {told}, {need} are declared; copy or save the file again")


def _inflated_length(file: BinaryIO, most: int) -> int | None:
    """Bytes of the zlib or gzip stream that starts here, counted to just above ``most``; None if it is damaged or has no end."""
    inflater, total = zlib.decompressobj(zlib.MAX_WBITS + 32), 0  # as ITK does; igzip takes some damaged tables for whole
    try:
        while (chunk := inflater.unconsumed_tail or file.read(CHUNK_BYTES)) and not inflater.eof and total <= most:
            total += len(inflater.decompress(chunk, CHUNK_BYTES))  # the end of a stream checks its checksum
        total += len(inflater.flush()) if total <= most else 0  # what a full chunk left of a match
    except zlib.error:
        return None
    return total if inflater.eof or total > most else None


def _beside(path: Path, name: str) -> Path:
    """The one data file that a header names, which must lie in its folder."""
    words = name.split()
    if name.upper().startswith("LIST") or len(words) != 1 or "%" in name:
        raise refused(path, "its values lie in several files; save them in one")
    plain = name.replace("\\", "/")
    if PurePosixPath(plain).is_absolute() or plain[1:2] == ":" or len(PurePosixPath(plain).parts) != 1 or plain in (".", ".."):
        raise refused(path, "names a data file outside its own folder; not followed")
    data = path.parent / plain
    if data.resolve().parent != path.parent.resolve():
        raise refused(path, "names a data file that is a link out of its folder; not followed")
    try:
        check_file(data)
    except UnreadableImageError:
        raise refused(path, "names a data file that is not there or no regular file") from None
    return data
