"""Reads the rows of files and Hugging Face datasets, each with its place."""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from quatro_ray.config import HuggingFaceSourceConfig, JsonLinesSourceConfig, ParquetSourceConfig
from quatro_ray.errors import DataError

RowSource = JsonLinesSourceConfig | ParquetSourceConfig | HuggingFaceSourceConfig
Row = dict[str, Any]
"""A row as its file has it: values by column."""


class BadRow(Exception):
    """A row cannot be used; the message says why, without the place of the row.

    Args:
        rule: the rule that the row breaks, by which such rows are counted.
        detail: what this row has instead.
    """

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(rule + detail)
        self.rule = rule


PlacedRow = tuple[str, Row | BadRow]
"""File and number of a row, and the row."""
_OPEN: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""The functions that open compressed files, by the end of the name."""


def read(config: RowSource, label: str) -> Iterator[PlacedRow]:
    """Yield the rows of a source.

    Args:
        config: kind and path of the source.
        label: section of the data, for messages.

    Raises:
        DataError: a file does not exist or cannot be read.
    """
    if isinstance(config, HuggingFaceSourceConfig):
        yield from _hugging_face(config)
        return
    read_file = _json_lines if isinstance(config, JsonLinesSourceConfig) else _parquet
    for file in files_of(config, label):
        yield from read_file(file, label)


def files_of(config: JsonLinesSourceConfig | ParquetSourceConfig, label: str) -> list[Path]:
    """Return the files of a source: those listed, with patterns replaced by the files that match, sorted by name.

    Raises:
        DataError: a pattern matches nothing, a path is a folder, or a file is given twice.
    """
    files: list[Path] = []
    for path in config.path:
        is_pattern = glob.has_magic(path) and not Path(path).exists()
        found = sorted(map(Path, glob.glob(path, recursive=True))) if is_pattern else [Path(path)]
        if not found:
            raise DataError(f"data.{label}.path={path}: no file matches; correct the pattern")
        files += found
    for file in files:
        if file.is_dir():
            raise DataError(f"data.{label}.path={file}: is a folder; give its files, such as {file}/*.{config.kind}")
        if files.count(file) > 1:
            raise DataError(f"data.{label}.path: {file} is given twice; give it once")
    return files


def _unreadable(file: Path, label: str, reason: str) -> DataError:
    return DataError(f"data.{label}.path={file}: cannot be read {reason}; correct the path, or repair the file")


def _json_lines(file: Path, label: str) -> Iterator[PlacedRow]:
    open_file = _OPEN.get(file.suffix, open)
    try:
        with open_file(file, "rt", encoding="utf-8-sig") as opened:  # -sig: without a byte order mark
            for number, line in enumerate(opened, start=1):
                if line.strip():
                    yield f"{file}:{number}", _parse_line(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.{label}.path={file}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _unreadable(file, label, f"({reason})") from error


def _parse_line(line: str) -> Row | BadRow:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow("is not JSON", f" ({error.msg} at column {error.colno})")
    except ValueError as error:  # an integer of thousands of digits
        return BadRow("cannot be read", f" ({error})")
    except RecursionError:
        return BadRow("is nested too deeply")
    return row if isinstance(row, dict) else BadRow("must be a JSON object", f", not {type(row).__name__}")


def _parquet(file: Path, label: str) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
        name_labels = _label_names(opened.schema_arrow)
        rows = (row for batch in opened.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{file}: row {number}", name_labels(row)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(file, label, f"as Parquet ({str(error).splitlines()[0]})") from error


def _label_names(schema: Any) -> Callable[[Row], Row]:
    """Return a function that puts the names of class labels in place of their numbers, by an Arrow schema."""
    if b"huggingface" not in (schema.metadata or {}):
        return lambda row: row
    import datasets

    return _with_names(datasets.Features.from_arrow_schema(schema))


def _with_names(features: Any) -> Callable[[Row], Row]:
    import datasets

    labels = {name: feature for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}

    def name_labels(row: Row) -> Row:
        # a number without a name, such as -1 for a hidden label, is no answer
        named = {
            name: label.int2str(row[name]) if row[name] is not None and 0 <= row[name] < label.num_classes else None
            for name, label in labels.items()
        }
        return row | named

    return name_labels


def _hugging_face(config: HuggingFaceSourceConfig) -> Iterator[PlacedRow]:
    loaded = _load_hugging_face(config)
    features = getattr(loaded, "features", None)
    name_labels = _with_names(features) if features is not None else dict
    for number, row in enumerate(loaded):
        yield f"{config.path}: row {number}", name_labels(row)


def _load_hugging_face(config: HuggingFaceSourceConfig) -> Iterable[Row]:
    import datasets

    try:
        if Path(config.path).is_dir() and not _is_repository(Path(config.path)):
            loaded = datasets.load_from_disk(config.path)
        else:
            loaded = datasets.load_dataset(config.path, config.name, split=config.split, revision=config.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{config.path}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    if not isinstance(loaded, datasets.DatasetDict):
        rows: Iterable[Row] = loaded
        return rows
    if config.split not in loaded:
        raise DataError(f"{config.path}: has splits {sorted(loaded)}, not {config.split!r}; set its split")
    split: Iterable[Row] = loaded[config.split]
    return split


def _is_repository(path: Path) -> bool:
    """Return whether the folder is a local copy of a hub dataset; save_to_disk writes other files."""
    return not any((path / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))
