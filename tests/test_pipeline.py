"""Stages that read one another: run once, found again, never mixed up."""

import os
import pathlib

from ml_collections import ConfigDict
import pytest
import tiny

from postrain import pipeline
from postrain.pipeline import Stage
from postrain.trainer import Trainer

quick_compiler = tiny.quick_compiler


def write(*, directory: str, text: str, source: str | None = None) -> None:
  """A program: a file, behind what an earlier one wrote."""
  before = pathlib.Path(source).read_text() if source else ''
  pathlib.Path(directory, 'out.txt').write_text(before + text)


def program(text: str, **more: str) -> dict[str, str]:
  return dict(program=f'{__name__}:write', text=text, **more)


def chain(first: str = 'a') -> list[Stage]:
  second = program('b', source='{stages.one}/out.txt')
  return [Stage('one', program(first)), Stage('two', second)]


def test_what_is_finished_is_found_and_what_changed_is_made_anew(tmp_path):
  one, two = pipeline.run(chain(), str(tmp_path))
  out = pathlib.Path(two.directory, 'out.txt')
  assert out.read_text() == 'ab'
  before = out.stat().st_mtime_ns
  assert pipeline.run(chain(), str(tmp_path)) == [one, two]
  assert out.stat().st_mtime_ns == before
  others = pipeline.run(chain('c'), str(tmp_path))
  assert not {s.directory for s in others} & {one.directory, two.directory}
  assert pathlib.Path(others[1].directory, 'out.txt').read_text() == 'cb'


def test_a_file_that_a_config_names_is_part_of_it(tmp_path):
  source = tmp_path / 'in.txt'
  stages = [Stage('one', program('x', source=str(source)))]

  def identity(text: str) -> str:
    source.write_text(text)
    return pipeline.plan(stages, str(tmp_path))[0].identity

  first = identity('a')
  assert identity('b') != first == identity('a')


def test_files_that_changed_since_are_not_read(tmp_path):
  one, _ = pipeline.run(chain(), str(tmp_path))
  pathlib.Path(one.directory, 'out.txt').write_text('tampered')
  with pytest.raises(
    ValueError, match=r'out.txt .* is not as the stage left it'
  ):
    pipeline.run(chain(), str(tmp_path))


def config(**changes: object) -> ConfigDict:
  made = tiny.arithmetic()
  made.evaluation.every = 0
  made.update(changes)
  return made


def test_a_run_goes_on_from_the_model_of_another(tmp_path):
  supervised, online = config(), config()
  supervised.rl.num_iterations = 0
  online.sft.num_steps = 0
  online.rl.num_iterations = 1
  online.model = dict(name='pretrained', directory='{stages.supervised}/export')
  stages = [Stage('supervised', supervised), Stage('online', online)]
  # As if killed between the two.
  (first,) = pipeline.run(stages[:1], str(tmp_path))
  planned = pipeline.run(stages, str(tmp_path))
  assert planned[0] == first
  assert planned[1].config['model']['directory'].startswith(first.directory)
  assert os.path.isdir(os.path.join(planned[1].directory, 'export'))
  assert os.path.exists(tmp_path / 'pipeline.json')


def test_what_changes_no_bit_changes_no_stage(tmp_path):
  quiet, loud = config(), config()
  loud.logging.table_every = 7
  found = [
    pipeline.plan([Stage('one', c)], str(tmp_path))[0].identity
    for c in (quiet, loud)
  ]
  assert found[0] == found[1]


@pytest.mark.parametrize(
  ('stages', 'message'),
  [
    ([], 'without a stage'),
    ([Stage('One', program('a'))], "called 'One'"),
    ([Stage('a', program('a')), Stage('a', program('b'))], "called 'a'"),
    (chain()[::-1], "reads 'one', which is no stage before it"),
    ([Stage('one', {'seed': 0})], "stage 'one': config"),
    ([Stage('one', program('a') | {'program': 'nowhere:at_all'})], 'nowhere'),
    ([Stage('one', {'program': f'{__name__}:absent'})], 'module:function'),
  ],
)
def test_mistakes_are_named(tmp_path, stages, message):
  with pytest.raises(ValueError, match=message):
    pipeline.run(stages, str(tmp_path))


def test_a_stage_that_fails_says_which(tmp_path, monkeypatch):
  def fail(self: Trainer) -> None:
    raise ValueError('no reason')

  monkeypatch.setattr(Trainer, 'run', fail)
  with pytest.raises(ValueError, match="stage 'one': no reason"):
    pipeline.run([Stage('one', config())], str(tmp_path))
