"""Images as rows: a folder for each class, or a column of paths or of encoded images."""

import glob
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import ClassLabel, Dataset, Image, Value
from datasets.exceptions import DatasetGenerationError

from fedex_lora.data.read import quiet
from fedex_lora.errors import DataError
from fedex_lora.tasks.base import with_columns


def read_folder(folder: Path) -> Dataset:
    """The images in the folders of `folder`, which are named as the classes: FOLDER/cat/1.png.

    Columns `image` and `label`, the class as a text; with a `metadata.csv` or `metadata.jsonl`
    its columns instead (the `imagefolder` of datasets). Files that are no images are passed over.

    Raises:
        UserError: There are no images, or the metadata cannot be read.
    """
    try:
        # a cache of its own, thrown away: rows refer to the images by path
        with tempfile.TemporaryDirectory() as cache, quiet():
            rows = datasets.load_dataset(
                "imagefolder",
                data_files={"train": f"{glob.escape(str(folder.absolute()))}/**"},
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                drop_labels=False,
            )
    except (DatasetGenerationError, ValueError, TypeError, OSError) as error:
        raise DataError(f"{folder}: {_LAYOUT}: {error.__cause__ or error}") from error
    assert isinstance(rows, Dataset)
    if not len(rows):
        raise DataError(f"{folder}: {_LAYOUT}.")
    return _named(rows)


_LAYOUT = "no images can be read there; expected a folder for each class with its images"


def _named(rows: Dataset) -> Dataset:
    """Class names in place of numbers, which count the folders that happen to be there."""
    feature = rows.features.get("label")
    if not isinstance(feature, ClassLabel):
        return rows
    names = [feature.names[i] for i in rows["label"]]
    return with_columns(rows, {"label": names})


def with_images(rows: Dataset, column: str, folder: Path | None, where: str) -> Dataset:
    """The rows with the cells of `column` as images, to be decoded when they are read.

    Args:
        rows: Any rows; where they lack the column they stay as they are.
        column: Paths as texts, encoded images as bytes, or images already.
        folder: What relative paths are relative to; None for rows that came from no file.
        where: How an error names the rows.

    Raises:
        UserError: The column holds something else.
    """
    feature = rows.features.get(column)
    if feature is None:
        return rows
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string") and folder:
        # joined, an address of the network is a path like any other, so that nothing is fetched
        paths = [None if path is None else str(folder.absolute() / path) for path in rows[column]]
        rows = with_columns(rows, {column: paths})
    try:
        return rows.cast_column(column, Image())
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: column '{column}' holds neither paths of images nor images ({feature}); "
            "name the column that does (task.image_column)."
        ) from error
