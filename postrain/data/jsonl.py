"""JSON lines, read whole and checked row by row."""

from collections.abc import Iterator, Sequence
import gzip
import json
import os
import pathlib
from typing import Any, NoReturn
import zlib


def read_jsonl(
  path: str | os.PathLike[str],
  *,
  fields: Sequence[str],
  num_examples: int | None = None,
) -> list[dict[str, Any]]:
  """Read the examples of a file, one JSON object per line.

  Blank lines are passed over. Fields that are not asked for stay as they are.

  Args:
    path: of the file, in UTF-8; compressed if it ends in ``.gz``.
    fields: each row must have them, and not empty.
    num_examples: read the first ones only; None for all.

  Raises:
    ValueError: no file, or no row in it; a row that is no JSON object (NaN is
      no JSON), lacks a field or has it empty. Names file, row and field.
  """
  rows = rows_of(path, fields=fields, num_examples=num_examples)
  return [example for _, example in rows]


def rows_of(
  path: str | os.PathLike[str],
  *,
  fields: Sequence[str],
  num_examples: int | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Each example after the name of its place, for errors: file and row."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'{path} is no file: give the path of a JSON lines file')
  count = 0
  for row, line in enumerate(_lines(path), start=1):
    if num_examples is not None and count >= num_examples:
      break
    if line.strip():
      count += 1
      yield f'{path}, row {row}', _example(line, fields, f'{path}, row {row}')
  if not count:
    raise ValueError(f'{path} has no examples: expected one JSON object a line')


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  if path.suffix != '.gz':
    with path.open('rb') as lines:
      yield from lines
    return
  try:
    with gzip.open(path) as lines:
      yield from lines
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f'{path} is no whole gzip file: {error}') from error


def _example(line: bytes, fields: Sequence[str], where: str) -> dict[str, Any]:
  try:
    example = json.loads(line, parse_constant=_refuse)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where} is no JSON in UTF-8: {error}') from error
  if not isinstance(example, dict):
    raise ValueError(
      f'{where} is {line[:60]!r}: expected an object with the fields'
      f' {", ".join(fields)}'
    )
  for field in fields:
    if field not in example:
      raise ValueError(
        f'{where} has no field {field!r}, only {", ".join(example) or "none"}:'
        ' correct the row or name another field'
      )
    if _empty(example[field]):
      raise ValueError(
        f'{where}: field {field!r} is {example[field]!r}: fill it or remove the'
        ' row'
      )
  return example


def _empty(value: Any) -> bool:
  if isinstance(value, str):
    return not value.strip()
  return value is None or value in ([], {})


def _refuse(constant: str) -> NoReturn:
  raise ValueError(f'{constant} is not in the JSON standard')
