"""Every family is the function that transformers computes, in every layout."""

import dataclasses
import functools
import json
import pathlib
import re
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from parity import checkpoints
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import hub
from postrain.logprobs import token_logprobs
from postrain.models import families
from postrain.models.transformer import transformer

ROOT = pathlib.Path(__file__).parent
GOLDEN = json.loads((ROOT / 'parity' / 'families.json').read_text())
PROMPT = 7  # slots; the longest padding is shorter
PACKED = [(0, 1), (2,)]  # rows of the batch that share a row


def whole(model, params, tokens, valid):
  hidden, _ = model.hidden(
    params, tokens, positions=places(valid), segment_ids=jnp.int32(valid)
  )
  return model.unembed(params, hidden)


def places(valid):
  return jnp.maximum(jnp.cumsum(valid, -1, dtype=jnp.int32) - 1, 0)


def decoded(model, params, tokens, valid):
  """A prompt at once, then token by token behind its cache."""
  positions, ids = places(valid), jnp.int32(valid)
  rows, length = tokens.shape

  def step(cache, start, stop):
    at = slice(start, stop)
    return model.hidden(
      params, tokens[:, at], positions=positions[:, at],
      segment_ids=ids[:, at], cache=cache,
    )  # fmt: skip

  first, cache = step(model.empty_cache(rows, PROMPT), 0, PROMPT)
  cache = model.empty_cache(rows, length - PROMPT, cache)

  def body(cache, slot):
    column = lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 1)  # noqa: E731
    hidden, cache = model.hidden(
      params, column(tokens), positions=column(positions),
      segment_ids=column(ids), cache=cache,
    )  # fmt: skip
    return cache, hidden[:, 0]

  slots = jnp.arange(PROMPT, length, dtype=jnp.int32)
  _, rest = jax.lax.scan(body, cache, slots)
  hidden = jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)
  return model.unembed(params, hidden)


def packed(model, params, tokens, valid):
  """Sequences side by side in rows, told apart by their segment ids."""
  rows, width = len(PACKED), 2 * tokens.shape[1]
  text, ids = np.zeros((2, rows, width), np.int32)
  positions = np.zeros((rows, width), np.int32)
  at = {}
  for row, members in enumerate(PACKED):
    stop = 0
    for number, member in enumerate(members):
      start, stop = stop, stop + int(valid[member].sum())
      text[row, start:stop] = tokens[member][valid[member]]
      ids[row, start:stop] = number + 1
      positions[row, start:stop] = np.arange(stop - start)
      at[member] = row, slice(start, stop)
  hidden, _ = model.hidden(
    params, jnp.array(text), positions=jnp.array(positions),
    segment_ids=jnp.array(ids),
  )  # fmt: skip
  out = model.unembed(params, hidden)
  return jnp.concatenate([out[at[i]] for i in range(len(tokens))])


class Case(NamedTuple):
  """A checkpoint, and what the model computes of it in every layout."""

  variant: str
  directory: pathlib.Path
  loaded: hub.Pretrained
  found: dict


@pytest.fixture(scope='module', params=checkpoints.VARIANTS)
def case(request, tmp_path_factory):
  """One program for all layouts and the gradient."""
  directory = checkpoints.write(
    request.param, tmp_path_factory.mktemp('families') / request.param
  )
  loaded = hub.load(directory)
  model = loaded.model
  tokens, valid = checkpoints.inputs()
  trained = valid[:, 1:] & valid[:, :-1]

  def loss(params):
    out = whole(model, params, jnp.array(tokens), jnp.array(valid))
    scores = token_logprobs(out[:, :-1], jnp.array(tokens)[:, 1:])
    return -jnp.where(trained, scores, 0).sum(), out

  @jax.jit
  def run(params):
    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return {
      'logits': out,
      'loss': value,
      'leaves': grads,
      'whole': out[valid],
      'decoded': decoded(model, params, jnp.array(tokens), valid)[valid],
      'packed': packed(model, params, tokens, valid),
    }

  found = jax.device_get(run(loaded.params))
  return Case(request.param, directory, loaded, found)


def gradients(case):
  leaves = traverse_util.flatten_dict(case.found['leaves'])
  return {
    name: place.stored(leaves)
    for name, place in families.tensors(case.loaded.config).items()
  }


def test_logits_loss_and_gradients_are_those_on_record(case):
  found = case.found
  expected = GOLDEN[case.variant]
  shown = np.array(expected['logits'])
  assert np.abs(shown).max() > 1
  np.testing.assert_allclose(
    found['logits'][:, -shown.shape[1] :], shown, rtol=0, atol=1e-4
  )
  np.testing.assert_allclose(found['loss'], expected['loss'], rtol=1e-5)
  norms = {k: np.linalg.norm(v) for k, v in gradients(case).items()}
  assert norms == pytest.approx(expected['gradient_norms'], rel=1e-3, abs=1e-6)


def test_logits_loss_and_gradients_are_those_of_transformers(case):
  pytest.importorskip('torch', reason='parity needs torch')
  from parity import generate

  found = case.found
  expected = generate.reference(case.directory, checkpoints.names(case.variant))
  _, valid = checkpoints.inputs()
  np.testing.assert_allclose(
    found['logits'][valid], expected['logits'][valid], rtol=0, atol=1e-4
  )
  np.testing.assert_allclose(found['loss'], expected['loss'], rtol=1e-5)
  for name, value in gradients(case).items():
    right = expected['gradients'][name]
    np.testing.assert_allclose(
      value, right, rtol=1e-3, atol=1e-3 * np.abs(right).max(), err_msg=name
    )
  # And the record is what it computes.
  kept = generate.summary(expected)['logits']
  np.testing.assert_allclose(kept, GOLDEN[case.variant]['logits'], atol=1e-4)


@pytest.mark.parametrize('layout', ['decoded', 'packed'])
def test_every_layout_is_the_same_function(case, layout):
  found = case.found
  assert np.isfinite(found['whole']).all()
  np.testing.assert_allclose(found[layout], found['whole'], rtol=0, atol=1e-4)


def test_an_export_is_the_same_model(case, tmp_path):
  torch = pytest.importorskip('torch', reason='parity needs torch')
  from parity import generate

  loaded = case.loaded
  hub.save(tmp_path / 'b', loaded.config, loaded.params, source=loaded.source)
  again = hub.load(tmp_path / 'b')
  assert again.config == loaded.config
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
  theirs, exported = map(generate.load, (case.directory, tmp_path / 'b'))
  assert type(exported) is type(theirs)
  tokens, valid = checkpoints.inputs()
  with torch.no_grad():
    found = generate.logits(exported, tokens, valid)
    assert torch.equal(found, generate.logits(theirs, tokens, valid))
  for key in ('bos_token_id', 'eos_token_id'):
    assert getattr(exported.config, key) == getattr(theirs.config, key)


def test_every_family_has_a_variant_and_a_row():
  kinds = {kind for kind, _ in checkpoints.VARIANTS.values()}
  assert kinds == families.FAMILIES.keys()
  page = (ROOT.parent / 'docs' / 'models.md').read_text()
  assert set(re.findall(r'^\| `(\w+)` \|', page, re.M)) == kinds


@pytest.mark.parametrize('case', ['gemma3', 'qwen2_moe', 'gpt2'], indirect=True)
def test_scanned_and_unrolled_layers_agree(case):
  loaded, found = case.loaded, case.found
  tokens, valid = checkpoints.inputs()
  unrolled = transformer(dataclasses.replace(loaded.config, scan_layers=False))
  out = jax.jit(functools.partial(whole, unrolled))(
    loaded.params, jnp.array(tokens), jnp.array(valid)
  )
  np.testing.assert_allclose(out[valid], found['whole'], rtol=0, atol=1e-4)
