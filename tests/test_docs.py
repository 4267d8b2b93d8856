"""The pages of docs/ name every function, with its defaults, and quote runs."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest

from postrain import (
  advantages,
  aggregation,
  importance,
  kl,
  losses,
  masks,
  shaping,
)

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / 'docs').glob('*.md'))
TEXT = {page.name: page.read_text() for page in PAGES}
MODULES = (losses, advantages, kl, masks, importance, aggregation, shaping)
PUBLIC = {name: getattr(m, name) for m in MODULES for name in m.__all__}
BLOCKS = [
  block
  for name, text in TEXT.items()
  if name != 'adapters.md'  # test_adapters runs them, in order
  for block in re.findall(r'```python\n(.*?)```', text, re.S)
]
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def rows() -> dict[str, list[list[str]]]:
  """Cells of the rows that define a function, by its name."""
  found: dict[str, list[list[str]]] = {}
  for line in '\n'.join(TEXT.values()).splitlines():
    cells = [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
    if len(cells) == 4 and re.fullmatch(r'`\w+`', cells[0]):
      found.setdefault(cells[0].strip('`'), []).append(cells[1:])
  return found


ROWS = rows()


@pytest.mark.parametrize('name', PUBLIC)
def test_a_function_has_one_row_with_its_defaults(name):
  assert name in ROWS, f'no row for {name} in docs/'
  ((values, defaults, when),) = ROWS[name]
  assert values
  assert when
  # One sentence of each page gives the limit that all have.
  expected = [
    p.name if p.default is p.empty else f'{p.name}={p.default!r}'
    for p in inspect.signature(PUBLIC[name]).parameters.values()
    if p.kind is p.KEYWORD_ONLY and p.name != 'max_log_ratio'
  ]
  assert re.findall(r'`([^`]*)`', defaults) == expected


def test_no_row_is_left_of_a_function_that_went():
  assert ROWS.keys() == PUBLIC.keys()


@pytest.mark.parametrize('name', PUBLIC)
def test_the_limit_of_log_ratios_is_what_the_pages_say(name):
  parameter = inspect.signature(PUBLIC[name]).parameters.get('max_log_ratio')
  assert parameter is None or parameter.default == 20.0


@each_page
def test_a_page_is_short_and_its_links_lead_somewhere(page):
  text = TEXT[page.name]
  assert len(text.splitlines()) < 130
  for target in re.findall(r'\]\(([^)#]+)', text):
    assert (page.parent / target).resolve().is_file(), target


def test_figures_are_small_and_shown():
  for figure in (ROOT / 'docs' / 'figures').iterdir():
    assert figure.stat().st_size < 60_000
    assert any(f'figures/{figure.name}' in text for text in TEXT.values())


@pytest.mark.parametrize('block', BLOCKS)
def test_blocks_run(block, capsys):
  exec(block, {})
  assert capsys.readouterr().out


@pytest.mark.slow
def test_quoted_figures_are_printed(tmp_path):
  done = subprocess.run(
    [sys.executable, 'experiments/figures/run.py', f'--folder={tmp_path}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  printed = set(re.findall(r'-?\d+\.\d+', done.stdout))
  for name, text in TEXT.items():
    quoted = re.findall(r'−?\d+\.\d{3,}', re.sub(r'`[^`]*`', '', text))
    numbers = {x.replace('−', '-') for x in quoted}
    assert numbers <= printed, (name, numbers - printed)
  drawn = {path.name for path in tmp_path.iterdir()}
  assert drawn == {p.name for p in (ROOT / 'docs' / 'figures').iterdir()}
