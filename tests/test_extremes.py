"""Values and gradients at the ends of what a run can produce.

All losses are one compiled function of a shape, called with many contents.
Arguments come by their names, shapes by the annotations.
"""

import inspect
import types
import typing
import zlib

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import losses

SHAPES = [(1, 1), (1, 7), (2, 1), (2, 2), (3, 5), (4, 8), (5, 3), (8, 16)]
CONTENTS = 25
MASKS = ('random', 'full', 'empty', 'empty rows', 'single tokens')
REQUIRED = {'kl_coef': 0.1, 'num_experts': 6}
# The default number of candidates is for real vocabularies.
OPTIONS = {'top_candidates': {'k': 2}}
# "p = 1 is infinitely far from q < 1": the metric says so, the loss is finite.
INFINITE_METRICS = {'dppo(divergence=kl)': {'divergence'}}


def logprob(rng, shape, scale):
  """From certain to impossible in any float."""
  ends = rng.choice([0.0, 1e-9, 1e-3, 1.0], shape)
  return -scale * np.where(rng.random(shape) < 0.5, ends, rng.random(shape))


def signed(rng, shape, scale):
  return scale * rng.choice([-1.0, -1e-9, 0.0, 1e-4, 1.0], shape)


def advantage(rng, shape, scale):
  return rng.choice([0.0, 1.0, -1.0, 1e6, -1e6, 1e-30], shape)


def share(rng, shape, scale):
  return rng.choice([0.0, 1.0, 0.5, 1e-30], shape)


def logit(rng, shape, scale):
  """Some candidates excluded, never all."""
  excluded = rng.random(shape) < 0.2
  excluded[..., 0] = False
  return np.where(excluded, -np.inf, scale * rng.standard_normal(shape))


def flag(rng, shape, scale):
  return rng.random(shape) < 0.5


def count(rng, shape, scale):
  return rng.integers(0, 4, shape).astype(np.int32)


def step(rng, shape, scale):
  return np.abs(signed(rng, shape, scale))


RULES = {
  **dict.fromkeys(['logprobs', 'old_logprobs', 'sampler_logprobs'], logprob),
  **dict.fromkeys(['ref_logprobs', 'teacher_logprobs'], logprob),
  **dict.fromkeys(['chosen', 'rejected'], logprob),
  **dict.fromkeys(['ref_chosen', 'ref_rejected'], logprob),
  **dict.fromkeys(['values', 'old_values', 'returns'], signed),
  **dict.fromkeys(['scores', 'rewards'], signed),
  **dict.fromkeys(['forward', 'backward', 'preference', 'labels'], share),
  **dict.fromkeys(['logits', 'teacher_logits', 'router_logits'], logit),
  **dict.fromkeys(['chosen_lengths', 'rejected_lengths', 'ranks'], count),
  'experts': count,
  'shares': share,
  **dict.fromkeys(['selected', 'desirable', 'where'], flag),
  'advantages': advantage,
  'margins': share,
  'reference_point': step,
  'step': step,
}
# Names that mean something else in one function.
OWN_RULES = {
  ('step_score', 'scores'): share,  # its product is of probabilities
  ('monte_carlo_labels', 'correct'): share,
  ('until_first_error', 'correct'): flag,
}


def dimensions(shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
  """Sizes by the shape strings of the annotations."""
  rows, length = shape
  return {
    'B T': shape,
    'P K': shape,
    'N': (rows,),
    '*n': (rows,),
    '*n V': (rows, length, 2 * length + 1),
    'B S M': (rows, length, 3),
    'B T E': (rows, length, 6),
    'B T K': (rows, length, 2),
    'E': (6,),
    '': (),
  }


def annotation(parameter: inspect.Parameter):
  """The array type of a parameter, the first of several."""
  kind = parameter.annotation
  if isinstance(kind, types.UnionType) or typing.get_origin(kind):
    kind = typing.get_args(kind)[0]
  return kind


def arrays(fn) -> dict[str, str]:
  """Shape strings of a function's arrays by name, in order."""
  return {
    p.name: annotation(p).dim_str.strip()
    for p in inspect.signature(fn).parameters.values()
    if p.kind is not p.KEYWORD_ONLY
  }


def variants(name: str, fn) -> dict[str, dict]:
  """The function with its defaults, and with each choice of each option."""
  options = dict(OPTIONS.get(name, {}))
  calls = {}
  for p in inspect.signature(fn).parameters.values():
    if p.kind is p.KEYWORD_ONLY and p.default is p.empty:
      options[p.name] = REQUIRED[p.name]
  for p in inspect.signature(fn).parameters.values():
    choices = ()
    if typing.get_origin(p.annotation) is typing.Literal:
      choices = typing.get_args(p.annotation)
    elif p.annotation is bool:
      choices = (False, True)
    for choice in choices:
      calls[f'{name}({p.name}={choice})'] = options | {p.name: choice}
  return calls or {name: options}


def key_of(name: str, argument: str, shape: str) -> str:
  """One array for all losses that mean the same by it."""
  if argument in ('mask', 'where') and shape != 'N':
    return 'mask'
  rule = (name, argument)
  return '/'.join([*rule, shape] if rule in OWN_RULES else [argument, shape])


def mask_of(kind: str, rng, shape) -> np.ndarray:
  mask = rng.random(shape) < 0.6
  if kind == 'full':
    mask[:] = True
  if kind == 'empty':
    mask[:] = False
  if kind == 'empty rows':
    mask[rng.random(shape[0]) < 0.5] = False
  if kind == 'single tokens':
    mask[:] = False
    mask[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True
  return mask


def content(fns, shape, seed, kind, scale, poison) -> dict[str, np.ndarray]:
  """Arguments of all functions; what is off the mask is poisoned."""
  mask = mask_of(kind, np.random.default_rng(seed), shape)
  drawn = {'mask': mask}
  for name, fn in fns.items():
    for argument, dims in arrays(fn).items():
      key = key_of(name, argument, dims)
      if key in drawn:
        continue
      rule = OWN_RULES.get((name, argument)) or RULES.get(argument)
      if rule is None:
        raise LookupError(f'{name} asks for {argument}: give it a rule')
      rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
      array = np.asarray(rule(rng, dimensions(shape)[dims], scale))
      if array.dtype.kind == 'f':
        array = array.astype(np.float32)
        if dims in ('B T', 'P K'):
          array = np.where(mask, array, np.float32(poison))
      drawn[key] = array
  return drawn


def finite(tree) -> jax.Array:
  flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(flags)) if flags else jnp.bool_(True)


def silent(array, mask) -> jax.Array:
  """Whether places, or else rows, that nothing trains are exactly 0."""
  if array.shape == mask.shape:
    return ~jnp.any(~mask & array.astype(bool))
  if array.shape == mask.shape[:1]:
    return ~jnp.any(~jnp.any(mask, axis=1) & array.astype(bool))
  return jnp.bool_(True)


def verdicts(name, call, fn, options, drawn) -> dict[str, jax.Array]:
  """What must be true of one function at one content."""
  shapes = arrays(fn)
  given = [drawn[key_of(name, k, dims)] for k, dims in shapes.items()]

  def parts(first):
    output = fn(first, *given[1:], **options)
    whole = isinstance(output, tuple) and isinstance(output[1], dict)
    return output if whole else (output, {})

  values, metrics = parts(given[0])
  unlimited = INFINITE_METRICS.get(call, set())
  bounded = {k: v for k, v in metrics.items() if k not in unlimited}
  checks = {'value': finite(values), 'metrics': finite(bounded)}
  tested = {'value': values}
  if jnp.issubdtype(given[0].dtype, jnp.floating):
    tested['gradient'] = jax.grad(
      lambda first: sum(jnp.sum(x) for x in jax.tree.leaves(parts(first)[0]))
    )(given[0])
    checks['gradient'] = finite(tested['gradient'])
  if {'mask', 'where'} & set(shapes):
    for k, v in tested.items():
      checks[f'{k} off the mask'] = silent(v, drawn['mask'])
  return checks


def judge(fns):
  """One function of a content: all verdicts on all functions."""

  def judged(drawn):
    return {
      call: verdicts(name, call, fn, options, drawn)
      for name, fn in fns.items()
      for call, options in variants(name, fn).items()
    }

  # Half the time is the compiler's; the code is run a few times only.
  return jax.jit(judged, compiler_options={'xla_backend_optimization_level': 0})


def failures(judged, drawn) -> list[str]:
  found = jax.device_get(judged(drawn))
  return [
    f'{n}: {k}' for n, c in found.items() for k, ok in c.items() if not ok
  ]


def functions(shape) -> dict:
  fns = {name: getattr(losses, name) for name in losses.__all__}
  if shape[0] == 1:  # documented: no completion of another prompt
    with pytest.raises(ValueError, match='mismatched'):
      fns.pop('kto_reference_point')(jnp.zeros(1), jnp.zeros(1))
  return fns


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_every_loss_is_finite_and_silent_off_the_mask(shape):
  fns = functions(shape)
  judged = judge(fns)

  @settings(
    max_examples=CONTENTS,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink would compile again and again
  )
  @given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(MASKS),
    scale=st.sampled_from([1e-6, 1.0, 30.0, 1e3, 1e4]),
    poison=st.sampled_from([-np.inf, np.nan, np.inf, 0.0]),
  )
  def hold(seed, kind, scale, poison):
    drawn = content(fns, shape, seed, kind, scale, poison)
    assert failures(judged, drawn) == []

  hold()


def unguarded(
  logprobs: losses.ppo_clip.__annotations__['logprobs'],
  old_logprobs: losses.ppo_clip.__annotations__['logprobs'],
  mask: losses.ppo_clip.__annotations__['mask'],
):
  """A loss as one writes it first: a ratio times a mask."""
  return jnp.exp(logprobs - old_logprobs) * mask.astype(jnp.float32), {}


@pytest.mark.parametrize('poison', [-np.inf, 0.0])
def test_the_instrument_sees_an_unguarded_ratio(poison):
  fns = {'unguarded': unguarded}
  drawn = content(fns, (4, 8), 0, 'random', 1e4, poison)
  assert {'unguarded: value', 'unguarded: gradient'} <= set(
    failures(judge(fns), drawn)
  )


def test_a_loss_without_a_rule_is_an_error():
  def stranger(novelty: losses.ppo_clip.__annotations__['logprobs']):
    return novelty

  with pytest.raises(LookupError, match='stranger asks for novelty'):
    content({'stranger': stranger}, (2, 2), 0, 'full', 1.0, 0.0)
