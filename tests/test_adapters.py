"""The losses in the training loops of others; the code is that of the docs."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from postrain import advantages
from postrain.logprobs import token_logprobs

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 'adapters.md').read_text()
SECTIONS = {
  part.splitlines()[0]: re.findall(r'```python\n(.*?)```', part, re.S)
  for part in PAGE.split('\n## ')[1:]
}
OWN_LOOP = SECTIONS["A loop of one's own: Flax NNX and Optax"]
TUNIX = SECTIONS['Tunix']
VOCAB, LENGTH, GROUP, PROMPTS = 5, 3, 8, 4


@pytest.fixture
def usual_promotion():
  """Optax's Adam mixes types, and strangers do not forbid it."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.mark.usefixtures('usual_promotion')
def test_a_loop_of_flax_nnx_and_optax_learns():
  nnx = pytest.importorskip(
    'flax.nnx', reason='this pair of flax and jax has no working nnx'
  )
  docs = {}
  exec('\n'.join(OWN_LOOP), docs)

  class Network(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(PROMPTS, 16, rngs=rngs)
      self.head = nnx.Linear(16, LENGTH * VOCAB, rngs=rngs)

    def __call__(self, prompts):
      flat = self.head(jnp.tanh(self.embed(prompts)))
      return flat.reshape(-1, LENGTH, VOCAB)

  model = Network(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
  prompts = jnp.repeat(jnp.arange(PROMPTS), GROUP)
  rewards = []
  for step in range(60):
    logits = model(prompts)
    key = jax.random.fold_in(jax.random.key(1), step)
    tokens = jax.random.categorical(key, logits)
    liked = jnp.float32(tokens == prompts[:, None] + 1)
    ended = (tokens == 0).astype(jnp.int32)
    mask = jnp.cumsum(ended, axis=1) - ended == 0
    reward = jnp.mean(jnp.where(mask, liked, 0), axis=1)
    groups = reward.reshape(PROMPTS, GROUP)
    centered = advantages.group_normalized(groups).reshape(-1, 1)
    batch = {
      'inputs': prompts,
      'tokens': tokens,
      'old_logprobs': token_logprobs(logits, tokens),
      'advantages': jnp.broadcast_to(centered, tokens.shape),
      'mask': mask,
    }
    for _ in range(2):
      value, clipped = docs['update'](model, optimizer, batch)
      assert np.isfinite(value)
      assert 0 <= float(clipped) <= 1
    rewards.append(float(jnp.mean(reward)))
  assert np.mean(rewards[:3]) < 0.4
  assert np.mean(rewards[-3:]) > 0.9


STRANGER = """
import jax
import numpy as np
import optax
from tunix.sft import peft_trainer


class Network(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(7, 8, rngs=rngs)
    self.head = nnx.Linear(8, 7, rngs=rngs)

  def __call__(self, tokens, positions, cache, attention_mask):
    return self.head(self.embed(tokens)), cache


rng = np.random.default_rng(0)
mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
example = common.TrainExample(
  prompt_ids=jnp.asarray(rng.integers(2, 7, (4, 2))),
  prompt_mask=jnp.ones((4, 2), int),
  completion_ids=jnp.asarray(np.where(mask, rng.integers(2, 7, (4, 3)), 0)),
  completion_mask=jnp.asarray(mask),
  advantages=jnp.asarray([1.0, -1.0, 0.5, -2.0]),
  ref_per_token_logps=None,
  old_per_token_logps=jnp.asarray(-4 * rng.random((4, 3)), jnp.float32),
)
config = GRPOConfig(beta=0.0, epsilon=0.2, loss_agg_mode='token-mean')
config.temperature = 1.0


def evaluate(fn):
  def total(model):
    return fn(model, example, algo_config=config, pad_id=0, eos_id=1)
  found = nnx.value_and_grad(total, has_aux=True)(Network(nnx.Rngs(0)))
  return found[0][0], found[0][1], jax.tree.leaves(found[1])


get = function_registry.get_policy_loss_fn
register('postrain_ppo_clip')(for_tunix(losses.ppo_clip))
theirs, _, their_gradient = evaluate(get('grpo'))
ours, metrics, gradient = evaluate(get('postrain_ppo_clip'))
np.testing.assert_allclose(ours, theirs, rtol=1e-5)
for a, b in zip(gradient, their_gradient, strict=True):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
assert float(metrics['pg_clipfrac']) > 0
value, metrics, gradient = evaluate(get('postrain_cispo'))
assert np.isfinite(value) and any(np.any(g != 0) for g in gradient)

assert algo_config.policy_loss_fn == 'postrain_cispo'

model = Network(nnx.Rngs(0))
before = [np.array(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
trainer = peft_trainer.PeftTrainer(
  model,
  optax.sgd(0.1),
  peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=3),
)
install(trainer, losses.cispo, config, 0, 1)
trainer.train([example] * 3)
after = jax.tree.leaves(nnx.state(model, nnx.Param))
assert any(np.any(a != b) for a, b in zip(after, before, strict=True))
assert all(np.all(np.isfinite(a)) for a in after)
print('trained', float(np.ravel(ours)[0]), float(np.ravel(theirs)[0]))
"""


@pytest.mark.skipif(
  importlib.util.find_spec('tunix') is None,
  reason='tunix is not installed: pip install google-tunix==0.1.7',
)
def test_tunix_trains_with_a_loss_of_this_library():
  done = subprocess.run(
    [sys.executable, '-c', '\n'.join([*TUNIX, STRANGER])],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  assert 'trained' in done.stdout


def test_the_blocks_of_the_page_are_python():
  assert len(OWN_LOOP) == 1
  assert len(TUNIX) == 3
  for block in OWN_LOOP + TUNIX:
    compile(block, 'docs/adapters.md', 'exec')
