"""The same function as transformers and torch, and a real small model."""

import json
import os
import pathlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import hub
from postrain.logprobs import token_logprobs
from postrain.models import families

SHAPE = {
  'vocab_size': 31, 'num_hidden_layers': 2, 'hidden_size': 16,
  'intermediate_size': 24, 'num_attention_heads': 4, 'num_key_value_heads': 2,
  'head_dim': 4, 'max_position_embeddings': 64, 'rms_norm_eps': 1e-5,
  'initializer_range': 0.3,
}  # fmt: skip
CLASSES = {'llama': 'Llama', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}


def reference(kind, tied):
  """A random model of transformers, no bias 0 and no scale 1."""
  torch = pytest.importorskip('torch', reason='parity needs torch')
  transformers = pytest.importorskip('transformers')
  name = CLASSES[kind]
  torch.manual_seed(0)
  config = getattr(transformers, f'{name}Config')(
    **SHAPE, tie_word_embeddings=tied, rope_theta=700.0
  )
  model = getattr(transformers, f'{name}ForCausalLM')(config).eval()
  with torch.no_grad():
    for param in model.parameters():
      if param.ndim == 1:
        param.add_(0.3 * torch.randn_like(param))
  return torch, model


def logits(model, params, tokens, valid):
  hidden, _ = model.hidden(
    params,
    tokens,
    positions=jnp.maximum(jnp.cumsum(valid, -1, dtype=jnp.int32) - 1, 0),
    segment_ids=valid.astype(jnp.int32),
  )
  return model.unembed(params, hidden)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('kind', CLASSES)
def test_logits_and_gradients_equal_those_of_transformers(tmp_path, kind, tied):
  torch, theirs = reference(kind, tied)
  theirs.save_pretrained(tmp_path / 'a')
  ours = hub.load(tmp_path / 'a')
  assert ours.config.tie_embeddings == tied
  assert ours.config.rope_theta == 700.0
  tokens = np.random.default_rng(0).integers(0, 31, (3, 7))
  valid = np.arange(7)[None] >= np.array([[0], [2], [5]])  # left padding
  trained = valid.copy()
  trained[:, 1:] &= valid[:, :-1]
  trained[:, 0] = False

  expected = theirs(
    input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid),
    position_ids=torch.tensor(np.maximum(valid.cumsum(-1) - 1, 0)),
  ).logits  # fmt: skip
  scores = torch.log_softmax(expected[:, :-1], -1).gather(
    -1, torch.tensor(tokens)[:, 1:, None]
  )[..., 0]
  scores[torch.tensor(trained)[:, 1:]].sum().backward()

  @jax.jit
  def loss(params):
    out = logits(ours.model, params, jnp.asarray(tokens), jnp.asarray(valid))
    scores = token_logprobs(out[:, :-1], jnp.asarray(tokens)[:, 1:])
    return jnp.where(trained[:, 1:], scores, 0).sum(), out

  (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(ours.params)
  expected = expected.detach().numpy()
  assert np.abs(expected[valid]).max() > 1
  np.testing.assert_allclose(found[valid], expected[valid], atol=1e-4)
  leaves = traverse_util.flatten_dict(gradient)
  named = dict(theirs.named_parameters())
  for name, place in families.tensors(ours.config).items():
    expected = named[name].grad.numpy()
    np.testing.assert_allclose(
      place.stored(leaves), expected, rtol=1e-4,
      atol=1e-4 * np.abs(expected).max(), err_msg=name,
    )  # fmt: skip


@pytest.mark.parametrize('max_shard_bytes', [10**9, 2000])
@pytest.mark.parametrize('kind', CLASSES)
def test_transformers_reads_what_was_written(tmp_path, kind, max_shard_bytes):
  torch, theirs = reference(kind, tied=kind == 'qwen2')
  theirs.save_pretrained(tmp_path / 'a')
  ours = hub.load(tmp_path / 'a')
  hub.save(
    tmp_path / 'b', ours.config, ours.params, max_shard_bytes=max_shard_bytes
  )
  import transformers

  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
  assert type(again) is type(theirs)
  tokens = torch.arange(12).reshape(2, 6)
  assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def stories():
  root = os.environ.get('POSTRAIN_DATA')
  if not root:
    pytest.skip('POSTRAIN_DATA does not point at the data')
  folder = pathlib.Path(root) / 'models' / 'stories260K'
  golden = json.loads((folder / 'golden_greedy.json').read_text())
  assert golden['prompt_ids'] == golden['greedy_ids_200'][:1]
  return hub.load(folder / 'hf'), jnp.array([golden['greedy_ids_200']])


def test_greedy_continuation_by_whole_forwards():
  loaded, golden = stories()
  found = jax.jit(logits, static_argnums=0)(
    loaded.model, loaded.params, golden, jnp.ones(golden.shape, bool)
  )
  np.testing.assert_array_equal(found.argmax(-1)[:, :-1], golden[:, 1:])


def test_greedy_continuation_with_the_cache():
  loaded, golden = stories()
  model, steps = loaded.model, golden.shape[1] - 1

  def body(carry, position):
    token, cache = carry
    at = jnp.broadcast_to(position, (1, 1))
    hidden, cache = model.hidden(
      loaded.params, token[:, None], positions=at,
      segment_ids=jnp.ones((1, 1), jnp.int32), cache=cache,
    )  # fmt: skip
    token = model.unembed(loaded.params, hidden[:, 0]).argmax(-1)
    return (token.astype(jnp.int32), cache), token[0]

  start = (golden[:, 0], model.empty_cache(1, steps))
  _, found = jax.jit(
    lambda: jax.lax.scan(body, start, jnp.arange(steps, dtype=jnp.int32))
  )()
  np.testing.assert_array_equal(found, golden[0, 1:])


def test_an_export_of_it_has_the_same_logits(tmp_path):
  torch = pytest.importorskip('torch', reason='parity needs torch')
  transformers = pytest.importorskip('transformers')
  loaded, golden = stories()
  hub.save(tmp_path / 'a', loaded.config, loaded.params, source=loaded.source)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'a')
  with torch.no_grad():
    expected = theirs(torch.tensor(np.array(golden))).logits.numpy()
  found = jax.jit(logits, static_argnums=0)(
    loaded.model, loaded.params, golden, jnp.ones(golden.shape, bool)
  )
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(expected.argmax(-1)[:, :-1], golden[:, 1:])
