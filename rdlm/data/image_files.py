"""Sets of images, labelled where the source says what they show: a folder of PNG and JPEG files, an array
file, or a parquet file."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rdlm.errors import UserError, reason

SUFFIXES = (".png", ".jpg", ".jpeg")
DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Decoders of pillow that may read a file, whatever it is called. Its others include a PostScript
interpreter."""
MAX_CLASSES = 1 << 16
"""Labels that are numbers end below: every one gets a name."""
KINDS = (
    "a folder of PNG or JPEG files, an .npy or .npz array of uint8 [N, H, W, 3], or a parquet file with one "
    "image column"
)


@dataclass(frozen=True)
class ImageSet:
    """Images that are read one at a time. ``option`` is what named the set on the command line."""

    option: str
    path: Path
    count: int
    read: Callable[[int], np.ndarray]
    """Index -> uint8 [H, W, 3]; UserError for one that cannot be decoded."""
    labels: np.ndarray | None = None
    """int64 [count], places in ``classes``; None where the source does not say."""
    classes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    """What was read, in order of their paths."""
    skipped: dict[str, int] = field(default_factory=dict)
    """What was left out -> how many."""

    @property
    def name(self) -> str:
        """The folder's or the file's name, without the folders above it."""
        return self.path.resolve().name


def open_images(path: Path, option: str, label_column: str = "label") -> ImageSet:
    """UserError for anything that is not KINDS, and for a set without images.

    Labels come from the integer column ``label_column`` of a parquet file (names from its Hugging Face
    metadata, else the numbers), or from the subfolders of a folder, sorted, if every image lies in one.
    """
    if not path.exists():
        raise UserError(option, str(path), "does not exist", f"give {KINDS}")
    read = _folder if path.is_dir() else READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(option, str(path), "is not a set of images", f"give {KINDS}")
    found = read(path, option, label_column)
    if found.count == 0:
        raise UserError(option, str(path), "holds no images", f"give {KINDS}")
    return found


def numbered(labels: np.ndarray, name: str, option: str) -> tuple[str, ...]:
    """The numbers as names, up to the largest label: labels stay what they are in the source. UserError for one
    that no set of classes has."""
    largest = int(labels.max(initial=-1))
    if largest >= MAX_CLASSES:
        problem = f"has label {largest}; classes are numbered 0 to at most {MAX_CLASSES - 1}"
        raise UserError(option, name, problem, "number the classes from 0, or name another --label-column")
    return tuple(str(i) for i in range(largest + 1))


def pillow(option: str, name: str) -> Any:
    """The module PIL.Image."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise UserError(
            option, name, "decoding images needs pillow", "run `pip install 'pillow>=12'`"
        ) from None
    return Image


def to_rgb(image: Any) -> np.ndarray:
    """A pillow image as uint8 [H, W, 3]: turned as its EXIF says, of several frames the first, without its alpha,
    of 16 bits a channel the higher 8, as pillow reads colour. ValueError for other depths."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):  # convert() would clip the values to 255
        raise ValueError(f"it has 32 bits a pixel (mode {image.mode}); write it with 8 or 16")
    return np.asarray(image.convert("RGB"))


def _decoded(option: str, name: str, source: Path | io.BytesIO) -> np.ndarray:
    image_module = pillow(option, name)
    try:
        with image_module.open(source, formats=DECODERS) as image:
            return to_rgb(image)
    except (
        OSError,
        ValueError,
        SyntaxError,
        image_module.DecompressionBombError,
    ) as error:  # SyntaxError: a broken PNG chunk
        raise UserError(
            option, name, f"cannot be decoded ({reason(error)})", "remove or replace this image"
        ) from None


def _folder(path: Path, option: str, _: str) -> ImageSet:
    found = [file for file in path.rglob("*") if not _hidden(file.relative_to(path)) and not file.is_dir()]
    files = tuple(sorted(f for f in found if f.suffix.lower() in SUFFIXES and f.is_file()))
    used = set(files)
    skipped = Counter(f"files {f.suffix.lower() or 'without an ending'}" for f in found if f not in used)
    parts = [file.relative_to(path).parts for file in files]
    labels, classes = None, tuple(sorted({part[0] for part in parts}))
    if all(len(part) > 1 for part in parts):
        if any(is_no_text(name) for name in classes):
            raise UserError(
                option, ascii(str(path)), "has a class whose name is not UTF-8", "rename the folder"
            )
        place = {name: i for i, name in enumerate(classes)}
        labels = np.array([place[part[0]] for part in parts], dtype=np.int64)
    return ImageSet(
        option,
        path,
        len(files),
        lambda i: _decoded(option, str(files[i]), files[i]),
        labels,
        () if labels is None else classes,
        files,
        dict(sorted(skipped.items())),
    )


def is_no_text(name: str) -> bool:
    """Whether a name on disk is no UTF-8: Python stands in surrogates for its other bytes."""
    return any("\ud800" <= character <= "\udfff" for character in name)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _array(path: Path, option: str, _: str) -> ImageSet:
    try:
        loaded = np.load(path, mmap_mode="r")
        if path.suffix.lower() == ".npz":
            names = list(loaded)
            if len(names) != 1 and "arr_0" not in names:
                raise UserError(
                    option, str(path), f"holds the arrays {names}", "keep one, or call the images arr_0"
                )
            loaded = loaded["arr_0" if "arr_0" in names else names[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            option, str(path), f"cannot be read as an array ({reason(error)})", f"give {KINDS}"
        ) from None
    if loaded.ndim != 4 or loaded.shape[-1] != 3 or loaded.dtype != np.uint8:
        raise UserError(
            option,
            str(path),
            f"holds {loaded.dtype} {list(loaded.shape)}",
            "images are uint8 [N, H, W, 3], 0 to 255",
        )
    return ImageSet(option, path, len(loaded), lambda i: np.asarray(loaded[i]), files=(path,))


def _parquet(path: Path, option: str, label_column: str) -> ImageSet:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(
            option, str(path), "reading parquet needs pyarrow", "run `pip install 'pyarrow>=26'`"
        ) from None
    try:
        schema = pq.read_schema(path)
        values = {f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema}
        structs = [name for name, t in values.items() if pa.types.is_struct(t) and _is_bytes(t, "bytes")]
        columns = structs or [name for name, t in values.items() if _is_bytes(t)]
        if len(columns) != 1:
            raise UserError(
                option,
                str(path),
                f"has {len(columns)} image columns {columns}",
                "give a file with exactly one",
            )
        labelled = label_column in values and pa.types.is_integer(values[label_column])
        wanted = columns + [label_column] * labelled
        table = pq.read_table(path, columns=wanted, page_checksum_verification=True)
        labels = None
        if labelled and not table[label_column].null_count:
            labels = table[label_column].cast(values[label_column]).cast(pa.int64()).to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            option, str(path), f"cannot be read as parquet ({reason(error)})", f"give {KINDS}"
        ) from None
    column = table[columns[0]]

    def read(index: int) -> np.ndarray:
        value = column[index].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise UserError(
                option,
                f"{path}, row {index}",
                "holds no image bytes",
                "write the images into the file, not their paths",
            )
        return _decoded(option, f"{path}, row {index}", io.BytesIO(content))

    names = _class_names(schema.metadata, label_column) if labels is not None else ()
    if labels is not None and not names:
        names = numbered(labels, str(path), option)
    return ImageSet(option, path, len(column), read, labels, names, (path,))


def _is_bytes(kind: Any, field: str | None = None) -> bool:
    """Whether a column of this type, or this field of it, holds bytes."""
    import pyarrow as pa

    if field is not None:
        place = kind.get_field_index(field)
        return place >= 0 and _is_bytes(kind.field(place).type)
    kinds = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(check(kind) for check in kinds)


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """Names of a ``ClassLabel`` column, which the library ``datasets`` writes into the schema; () where
    there are none."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
        return tuple(names) if all(isinstance(name, str) for name in names) else ()
    except (KeyError, ValueError, TypeError):
        return ()


READERS: dict[str, Callable[[Path, str, str], ImageSet]] = {
    ".npy": _array,
    ".npz": _array,
    ".parquet": _parquet,
}
"""Ending -> what reads such a file, given its path, the option that named it, and the column of labels."""
