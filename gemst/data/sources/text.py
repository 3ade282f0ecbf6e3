"""Reading text files of unknown upbringing: every fault names the file and the line, none passes silently."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyarrow import csv

from gemst.errors import GemstError

_CHUNK = 1 << 24
_NULLS = ["NULL", "\\N"]  # as databases export them


def read_bytes(path: Path) -> bytes:
    """The content of a plain or gzip file. Raises GemstError when absent, empty or a truncated archive."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise GemstError(f"{path} does not exist", "Check data.path and data.source") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise GemstError(f"{path} is a damaged or truncated gzip file ({error})", "Download it again") from None
    if not content.strip():
        raise GemstError(f"{path} is empty", "Download or export it again")
    return content


def utf8(content: bytes, path: Path) -> bytes:
    """`content` without a byte-order mark; raises GemstError naming the first line that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    try:
        for start in range(0, len(content), _CHUNK):  # in chunks: as one string it takes up to four times its size
            decoder.decode(content[start : start + _CHUNK], final=start + _CHUNK >= len(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, start + error.start) + 1
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        fix = f"Convert it: iconv -f {encoding} -t utf-8 {path.name}"
        raise GemstError(f"{path}, line {line}, is not UTF-8", fix) from None
    return content.removeprefix(b"\xef\xbb\xbf")


def read_separated(path: Path, separator: str | None, *, quoted: bool = False, latin1: bool = False) -> pl.DataFrame:
    """A file with a header line as strings; an empty field is null. `latin1` accepts files that are not UTF-8.

    In a `quoted` file NULL and \\N are null as well. Without a `separator`, the one that is commonest in the header is
    taken: comma, semicolon, tab or bar. Raises GemstError when a row has more or fewer fields than the header, two
    columns have one name, or quotes do not close.
    """
    content = read_bytes(path)
    if latin1:
        try:
            content = utf8(content, path)
        except GemstError:
            content = content.decode("latin-1").encode()
    else:
        content = utf8(content, path)
    if separator is None:
        header = content.partition(b"\n")[0]
        separator = max(",;\t|", key=lambda mark: header.count(mark.encode()))
    content = content.rstrip(b"\r\n") + b"\n"  # blank lines at the end are no rows
    try:
        _check_fields(content, separator, quoted)
        return pl.read_csv(
            content, separator=separator, infer_schema=False, quote_char='"' if quoted else None,
            null_values=_NULLS if quoted else None,
        )  # fmt: skip
    except (pl.exceptions.PolarsError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        cause = f"{path} has rows that do not fit its header ({reason})"
        fix = "Check its separator and line ends" + ("; a quote inside a field is written twice" if quoted else "")
        raise GemstError(cause, fix) from None


def _check_fields(content: bytes, separator: str, quoted: bool) -> None:
    """Raise ArrowInvalid naming the first row with more or fewer fields than the header: polars fills short ones up."""
    parse = csv.ParseOptions(delimiter=separator, quote_char='"' if quoted else False, newlines_in_values=quoted)
    read = csv.ReadOptions(use_threads=False, block_size=_CHUNK)  # one thread: errors then name the row
    # A column that is not there: converting none at all. Types guessed from the first block need not fit the next.
    plain = csv.ConvertOptions(check_utf8=False, include_columns=["\0"], include_missing_columns=True)
    for _ in csv.open_csv(pa.BufferReader(content), read, parse, plain):
        pass


def read_json_lines(path: Path, schema: dict[str, pl.DataType | type[pl.DataType]]) -> pl.DataFrame:
    """The named fields of a file with one JSON object a line; absent fields are null.

    Raises GemstError naming the file when a line is not JSON or a field has another type.
    """
    content = utf8(read_bytes(path), path)
    try:
        return pl.read_ndjson(content, schema=schema)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        if "Series of type" in reason:
            kinds = ", ".join(f"{name} {_in_words(kind)}" for name, kind in schema.items())
            cause = f"{path} has a field of another type than expected ({reason})"
            raise GemstError(cause, f"Read here, where present: {kinds}") from None
        cause = f"{path} is not one JSON object a line as expected ({reason})"
        raise GemstError(cause, "Download or export it again") from None


def _in_words(kind: pl.DataType | type[pl.DataType]) -> str:
    return "(list of texts)" if kind == pl.List(pl.String) else "(text or number)"


def numeric_time(values: pl.Expr) -> pl.Expr:
    """Epoch numbers as strings, in seconds, milli-, micro- or nanoseconds, to Datetime("ms", "UTC").

    The unit is told by the size: seconds up to 1e11 (the year 5138), milliseconds up to 1e14, microseconds up to 1e17,
    nanoseconds beyond; seconds may have a fraction. What is not a number becomes null and is quarantined by `validate`.
    """
    # Integers first: a float holds microseconds, but not every digit string as written.
    whole, fraction = values.cast(pl.Int64, strict=False), values.cast(pl.Float64, strict=False)
    seconds = pl.when(fraction.abs() < 10**11).then((fraction * 1000).round().cast(pl.Int64, strict=False))
    ms = pl.coalesce(_in_ms(whole), seconds, _in_ms(fraction.cast(pl.Int64, strict=False)))
    return ms.cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")


def _in_ms(number: pl.Expr) -> pl.Expr:
    size = number.abs()
    ms = pl.when(size < 10**11).then(number * 1000).when(size < 10**14).then(number)
    return ms.when(size < 10**17).then(number // 1000).otherwise(number // 10**6)
