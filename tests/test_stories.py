"""A real pretrained checkpoint: decoded, trained and exported."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stories
from postrain import hub
from postrain.metrics import read
from postrain.sampling import sample
from postrain.trainer import Trainer

DATA = os.environ.get('POSTRAIN_DATA')
HOME = pathlib.Path(DATA or '', 'models', 'stories260K')
FULL_STOP = 426  # its id

pytestmark = pytest.mark.skipif(DATA is None, reason='POSTRAIN_DATA is not set')


@pytest.fixture(scope='module')
def pretrained():
  return hub.load(HOME / 'hf')


@pytest.fixture(scope='module')
def golden():
  return json.loads((HOME / 'golden_greedy.json').read_text('utf-8'))


def full_logits(model, params, tokens):
  hidden, _ = model.hidden(
    params,
    tokens,
    positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    segment_ids=jnp.ones_like(tokens),
  )
  return model.unembed(params, hidden)


def test_greedy_continuation_through_the_cache(pretrained, golden):
  prompt, expected = golden['prompt_ids'], golden['greedy_ids_200']
  draw = functools.partial(
    sample,
    pretrained.model,
    num_samples=1,
    max_new_tokens=len(expected) - len(prompt),
    stop_ids=(2,),
    pad_id=0,
    temperature=0.0,
  )
  tokens = jnp.asarray([prompt])
  samples = jax.jit(draw)(
    pretrained.params, tokens, jnp.ones_like(tokens, bool), jax.random.key(0)
  )
  assert prompt + samples.tokens[0].tolist() == expected


def test_greedy_continuation_by_full_forwards(pretrained, golden):
  prompt, expected = golden['prompt_ids'], golden['greedy_ids_200']

  @jax.jit
  def continuation(params, tokens):
    def extend(t, tokens):
      last = full_logits(pretrained.model, params, tokens)[0, t - 1]
      return tokens.at[0, t].set(last.argmax().astype(tokens.dtype))

    return jax.lax.fori_loop(len(prompt), tokens.shape[1], extend, tokens)

  # The slots to come hold any token: attention never looks ahead.
  start = np.full((1, len(expected)), 7)
  start[0, : len(prompt)] = prompt
  assert continuation(pretrained.params, start)[0].tolist() == expected


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Two small iterations of the recipe from the real weights."""
  config = stories.get_config()
  config.model.directory = str(HOME / 'hf')
  config.environment.tokenizer.directory = str(HOME / 'hf')
  # Stories are long: sentences end within the limit of a test.
  config.environment.stop_ids = (1, 2, FULL_STOP)
  config.rewards.length = dict(name='num_tokens', weight=-0.01)
  config.sampling.num_samples = 4
  config.sampling.max_new_tokens = 32
  config.rl.num_iterations = 2
  config.rl.num_prompts = 4
  config.rl.num_micro_batches = 2
  config.rl.num_score_slices = 2
  config.evaluation.every = 0
  path = tmp_path_factory.mktemp('stories')
  return Trainer(config, str(path)).run(), path


def test_iterations_start_at_the_reference_and_leave_it(trained):
  state, path = trained
  first, second = read(path / 'metrics.jsonl')
  assert first['reference/kl_sequence'] == 0
  assert second['reference/kl_sequence'] != 0
  assert second['reference/kl_token'] > 0
  assert all(0 <= row['reward/finished'] <= 1 for row in (first, second))
  assert max(row['sampler/logprob_gap_max'] for row in (first, second)) < 1e-4
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()),
    state.params['actor'],
    state.ref_params,
  )
  assert min(jax.tree.leaves(moved)) > 0


def test_reference_is_the_checkpoint(trained, pretrained):
  jax.tree.map(
    np.testing.assert_array_equal, trained[0].ref_params, pretrained.params
  )


def test_export_agrees_with_torch(trained, golden):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  state, path = trained
  tokens = np.asarray([golden['greedy_ids_200']])
  model = hub.load(path / 'export').model
  ours = full_logits(model, state.params['actor'], jnp.asarray(tokens))
  other = transformers.AutoModelForCausalLM.from_pretrained(path / 'export')
  with torch.no_grad():
    theirs = other(torch.from_numpy(tokens)).logits.numpy()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
  tokenizer = transformers.AutoTokenizer.from_pretrained(path / 'export')
  assert (
    tokenizer.decode(golden['greedy_ids_200'], skip_special_tokens=True)
    .strip()
    .startswith('Once upon a time')
  )
