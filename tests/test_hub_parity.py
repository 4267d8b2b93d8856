"""Files go to transformers and back, and a real small model is read.

That it is the same function, with the same gradients: `test_families.py`.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import hub

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
def test_transformers_reads_what_was_written(tmp_path, kind, tied):
  torch, theirs = reference(kind, tied)
  theirs.save_pretrained(tmp_path / 'a')
  ours = hub.load(tmp_path / 'a')
  assert ours.config.tie_embeddings == tied
  assert ours.config.rope_theta == 700.0
  import transformers

  tokens = torch.arange(12).reshape(2, 6)
  for name, max_shard_bytes in (('b', 10**9), ('c', 2000)):
    hub.save(
      tmp_path / name, ours.config, ours.params, max_shard_bytes=max_shard_bytes
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert type(again) is type(theirs)
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
