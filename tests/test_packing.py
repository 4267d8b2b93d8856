"""Batches packed into rows: the same run, in programs known beforehand."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from postrain.actors import Actor, jitted_init
from postrain.environments import Environment
from postrain.models.wrap import plain
from postrain.packing import make_layout, real_tokens, with_slots
from postrain.reporting import Report
from postrain.trainer import Trainer
from postrain.types import Samples

quick_compiler = tiny.quick_compiler


@pytest.mark.parametrize('width', [8, 13, 16, 40])
@pytest.mark.parametrize('num_slices', [1, 3])
def test_no_batch_needs_more_rows_than_are_foreseen(width, num_slices):
  draw = np.random.default_rng(width)
  layout = make_layout(
    12, 8, width, num_slices=num_slices, num_shards=2, num_sizes=4
  )
  assert list(layout.sizes) == sorted({*layout.sizes})
  assert len(layout.sizes) <= 4
  assert not any(size % 2 for size in layout.sizes)
  shapes = {
    num_rows: [(x.shape, x.dtype) for x in arrays]
    for num_rows, arrays in layout.shapes().items()
  }
  for share in np.linspace(0, 1, 40):
    valid = np.arange(8) < draw.binomial(8, share, size=12)[:, None]
    found = layout.pack(valid)
    num_rows = len(found[0])
    assert [(x.shape, x.dtype) for x in found] == shapes[num_rows]
    smaller = [n for n in layout.sizes if n * num_slices < num_rows]
    if smaller:
      with pytest.raises(ValueError, match='rows are needed'):
        layout._replace(sizes=tuple(smaller)).pack(valid)


def test_prompts_of_all_rollouts_get_the_same_slots():
  prompts = np.array([[3, 4], [0, 5]])
  mask = prompts > 0
  tokens = np.ones((4, 3), np.int32)
  experts = np.ones((4, 5, 1, 2), np.int32)
  samples = Samples(tokens, tokens > 0, tokens, tokens, tokens, None, experts)
  wide, wide_mask, found = with_slots(prompts, mask, samples, 4)
  assert wide.tolist() == [[0, 0, 3, 4], [0, 0, 0, 5]]
  assert wide_mask.tolist() == (wide > 0).tolist()
  assert (found.experts[:, :2] == -1).all()
  assert (found.experts[:, 2:] == experts).all()
  assert found.tokens is tokens
  real = real_tokens(wide_mask, found)
  assert real.sum(-1).tolist() == [5, 5, 4, 4]


def averages(environment: Environment) -> Actor:
  """A policy that compiles fast: means over the tokens of the segment."""

  def init(key):
    return {'table': 0.3 * jax.random.normal(key, (environment.vocab_size, 8))}

  def hidden(params, tokens, positions, segment_ids):
    x = params['table'][tokens] * jnp.cos(jnp.float32(positions))[..., None]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = jnp.tril(same & (segment_ids > 0)[:, None, :]).astype(x.dtype)
    count = jnp.sum(seen, -1, keepdims=True)
    return jnp.einsum('bmn,bnd->bmd', seen, x) / jnp.maximum(count, 1)

  def unembed(params, hidden):
    return jnp.einsum('...d,vd->...v', hidden, params['table'])

  model = plain(init, hidden, unembed, environment.vocab_size)
  return Actor(model, jitted_init(model))


def written(folder: pathlib.Path) -> ConfigDict:
  """Prompts of 4 to 16 tokens, supervision and reinforcement."""
  config = tiny.text(folder)
  rows = [
    {'question': f'{a}+{b}=' + '?' * (4 * b), 'answer': '9' * (1 + a)}
    for a in range(6)
    for b in range(4)
  ]
  tiny.json_lines(folder / 'train.jsonl', rows)
  config.environment.max_prompt_length = 16
  config.environment.max_length = 24
  config.environment.stop_ids = (1, *range(5, 261, 4))
  config.model = dict(name='test_packing:averages')
  config.sampling.max_new_tokens = 8
  config.sft.update(num_steps=1, batch_size=8, num_micro_batches=2)
  config.rl.update(
    num_prompts=4, num_minibatches=2, num_micro_batches=2, share_prompts=False
  )
  config.kl.loss_coef = 0.1
  config.num_row_buckets = 2
  sgd = dict(name='sgd', learning_rate=0.3)
  config.sft.optimizer = config.rl.optimizer = sgd
  return config


def packed(config: ConfigDict) -> ConfigDict:
  config.sft.row_length, config.rl.row_length = 32, 24
  config.mesh.data = 2
  return config


def lines(directory: pathlib.Path, name: str) -> list[dict]:
  text = (directory / name).read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_a_packed_run_is_the_same_run(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """And nothing of it is compiled after its first step began."""
  found, counts, write = {}, [], Report.write

  def noting(self: Report, step: int, *rest: object) -> None:
    counts.append(len(tiny.compilations))
    write(self, step, *rest)

  for name in ('padded', 'packed'):
    config = written(tmp_path)
    trainer = Trainer(
      packed(config) if name == 'packed' else config, str(tmp_path / name)
    )
    if name == 'packed':
      monkeypatch.setattr(Report, 'write', noting)
    found[name] = trainer.run().params
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5),
    found['packed'], found['padded'],
  )  # fmt: skip
  assert tiny.compilations[counts[0] : counts[-1]] == []
  figures, wanted = (
    lines(tmp_path / name, 'metrics.jsonl') for name in ('packed', 'padded')
  )
  assert len(figures) == len(wanted) == 2
  for mine, other in zip(figures, wanted, strict=True):
    assert 0.3 < mine.pop('update/fill') <= 1
    assert mine == pytest.approx(other, rel=2e-5, abs=2e-5)
  rows = [lines(tmp_path / name, 'samples.jsonl') for name in found]
  assert len({each['length'] for each in rows[0]}) > 2
  for mine, other in zip(*rows, strict=True):
    for name in ('prompt', 'completion'):
      assert mine.pop(name) == other.pop(name)
    assert mine == pytest.approx(other, rel=2e-5, abs=2e-5)
