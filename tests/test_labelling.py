"""Labels of steps as a stage: what it writes, however often it is stopped."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from postrain import hub, labelling, pipeline, tokenizers
from postrain.models.config import Config
from postrain.models.transformer import transformer

quick_compiler = tiny.quick_compiler
SHAPE = {k: v for k, v in tiny.transformer().items() if k != 'name'}
STEPS, ROLLOUTS, TOKENS = 3, 4, 6


def odd(completions: list, examples: list) -> list[float]:
  """Right by chance, but always alike."""
  return [float(sum(map(ord, each.text)) % 2) for each in completions]


@pytest.fixture(scope='module')
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
  """A random policy on bytes, and three questions."""
  folder = tmp_path_factory.mktemp('policy')
  config = Config(vocab_size=262, **SHAPE)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: np.float32(draw.standard_normal(x.shape) / 4),
    transformer(config).shapes,
  )
  tokenizer = tokenizers.byte_level()
  source = {'pad_token_id': 0}
  hub.save(folder / 'model', config, params, source=source, tokenizer=tokenizer)
  rows = [{'question': text} for text in ('1+1=', '2+2', '3')]
  return dict(
    program='postrain.labelling:label_steps', model=str(folder / 'model'),
    questions=str(tiny.json_lines(folder / 'questions.jsonl', rows)),
    prompt='question', reward=dict(name=f'{__name__}:odd'),
    separators=[chr(i) for i in range(32, 80)], max_new_tokens=TOKENS,
    max_steps=STEPS, num_samples=2, num_rollouts=ROLLOUTS, batch_size=2,
  )  # fmt: skip


def rows_of(stage: pipeline.Planned) -> list[dict[str, Any]]:
  text = pathlib.Path(stage.directory, labelling.FILE).read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_m61_a_stage_labels_steps_and_goes_on_where_it_stopped(
  given: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  stages = [pipeline.Stage('labels', given)]
  write, written = labelling._write, []

  def once(path: pathlib.Path, lines: Any) -> None:
    if written:
      raise KeyboardInterrupt
    written.append(path.name)
    write(path, lines)

  with monkeypatch.context() as patched:
    patched.setattr(labelling, '_write', once)
    with pytest.raises(KeyboardInterrupt):
      pipeline.run(stages, str(tmp_path / 'a'))
  assert written == ['part-0.jsonl']
  (stopped,) = pipeline.run(stages, str(tmp_path / 'a'))
  (whole,) = pipeline.run(stages, str(tmp_path / 'b'))
  rows = rows_of(whole)
  assert rows_of(stopped) == rows
  assert {*pipeline.digests(whole.directory)} == {labelling.FILE}
  assert [row['prompt'] for row in rows[::2]] == ['1+1=', '2+2', '3']
  labels = [label for row in rows for label in row['labels']]
  assert {label * ROLLOUTS % 1 for label in labels} == {0}
  assert {0, 1} < {*labels}
  assert any(len(row['labels']) < STEPS for row in rows)
  for row in rows:
    assert len(row['completions']) == len(row['labels']) <= STEPS
    if len(row['labels']) < STEPS:  # its last step is the end of it
      assert row['labels'][-1] == row['reward']
      (said,) = odd([tiny_text(row)], [])
      assert said == row['reward']


def tiny_text(row: dict) -> Any:
  """A completion that consists of its steps."""
  return labelling.Completion(''.join(row['completions']), [], False)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [(dict(max_steps=0), 'max_steps=0: it must be at least 1'),
   (dict(num_rollouts=0), 'num_rollouts=0: it must be at least 1'),
   (dict(separators=['']), r"separators=\[''\]: give at least one text"),
   (dict(max_new_tokens=14), 'a question has 4 tokens, .* leaves room for 2'),
   (dict(reward=dict(name='num_tokens')), 'reward says .* between 0 and 1')],
)  # fmt: skip
def test_what_cannot_be_meant(
  changes: dict, message: str, given: dict, tmp_path: pathlib.Path
) -> None:
  block = {**given, **changes}
  del block['program']
  with pytest.raises(ValueError, match=message):
    labelling.label_steps(directory=str(tmp_path), **block)
