"""Sets of images: a folder of PNG and JPEG files, an array file, or a parquet file with an image column."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rdlm.errors import UserError, reason

SUFFIXES = (".png", ".jpg", ".jpeg")
KINDS = "a folder of PNG or JPEG files, an .npy or .npz array of uint8 [N, H, W, 3], or a parquet file with one image column"


@dataclass(frozen=True)
class ImageSet:
    """Images that are read when they are asked for. ``option`` is what named the set on the command line."""

    option: str
    path: Path
    count: int
    read: Callable[[int], np.ndarray]
    """Index -> uint8 [H, W, 3]; UserError for one that cannot be decoded."""

    @property
    def name(self) -> str:
        """The folder's or the file's name, without the folders above it."""
        return self.path.resolve().name


def open_images(path: Path, option: str) -> ImageSet:
    """UserError for anything that is not KINDS, and for a set without images."""
    if path.is_dir():
        found = _folder(path, option)
    elif not path.exists():
        raise UserError(option, str(path), "does not exist", f"give {KINDS}")
    elif path.suffix in (".npy", ".npz"):
        found = _array(path, option)
    elif path.suffix == ".parquet":
        found = _parquet(path, option)
    else:
        raise UserError(option, str(path), "is no set of images", f"give {KINDS}")
    if found.count == 0:
        raise UserError(option, str(path), "holds no images", f"give {KINDS}")
    return found


def digests(
    images: ImageSet, indices: Sequence[int], size: tuple[int, ...] | None, progress: Callable[[int], object] | None
) -> list[str]:
    """sha256 of the pixels of each image; UserError where one has not ``size`` (H, W), or without it not that of the first."""
    out = []
    for index in indices:
        pixels = images.read(index)
        size = size or pixels.shape[:2]
        if pixels.shape[:2] != size:
            problem = f"image {index} is {_by(pixels.shape[:2])}, others are {_by(size)}, and a resize would decide the distance"
            raise UserError(images.option, str(images.path), problem, "bring both sets to the size that is generated")
        out.append(hashlib.sha256(pixels.tobytes()).hexdigest())
        if progress:
            progress(1)
    return out


def _by(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"


def _decoded(option: str, name: str, source: Path | io.BytesIO) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(source) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(option, name, f"cannot be decoded ({reason(error)})", "remove or replace this image") from None


def _folder(path: Path, option: str) -> ImageSet:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return ImageSet(option, path, len(files), lambda i: _decoded(option, str(files[i]), files[i]))


def _array(path: Path, option: str) -> ImageSet:
    try:
        loaded = np.load(path, mmap_mode="r")
        if path.suffix == ".npz":
            names = list(loaded)
            if len(names) != 1 and "arr_0" not in names:
                raise UserError(option, str(path), f"holds the arrays {names}", "keep one, or call the images arr_0")
            loaded = loaded["arr_0" if "arr_0" in names else names[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(option, str(path), f"cannot be read as an array ({reason(error)})", f"give {KINDS}") from None
    if loaded.ndim != 4 or loaded.shape[-1] != 3 or loaded.dtype != np.uint8:
        raise UserError(
            option, str(path), f"holds {loaded.dtype} {list(loaded.shape)}", "images are uint8 [N, H, W, 3], 0 to 255"
        )
    return ImageSet(option, path, len(loaded), lambda i: np.asarray(loaded[i]))


def _parquet(path: Path, option: str) -> ImageSet:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(option, str(path), "reading parquet needs pyarrow", "run `pip install 'pyarrow>=26'`") from None
    try:
        schema = pq.read_schema(path)
        structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        columns = structs or [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
        if len(columns) != 1:
            raise UserError(option, str(path), f"has {len(columns)} image columns {columns}", "give a file with exactly one")
        column = pq.read_table(path, columns=columns)[columns[0]]
    except (OSError, pa.ArrowException) as error:
        raise UserError(option, str(path), f"cannot be read as parquet ({reason(error)})", f"give {KINDS}") from None

    def read(index: int) -> np.ndarray:
        value = column[index].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise UserError(
                option, f"{path}, row {index}", "holds no image bytes", "write the images into the file, not their paths"
            )
        return _decoded(option, f"{path}, row {index}", io.BytesIO(content))

    return ImageSet(option, path, len(column), read)
