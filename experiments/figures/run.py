"""Draw the plots of docs/ and print the numbers that its pages quote.

  python experiments/figures/run.py

Everything is enumerated, in closed form or on a grid, with the library's own
functions in float64; nothing is sampled, so that two runs print the same.
"""

import argparse
import functools
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
from matplotlib import pyplot as plt
import numpy as np

from postrain import advantages, importance, kl, losses

OLD = 0.2  # probability of the token under the old policy
POLICY_LOSSES = {
  'reinforce': losses.reinforce,
  'ppo_clip': losses.ppo_clip,
  'ppo_clip, dual_clip=3': functools.partial(losses.ppo_clip, dual_clip=3.0),
  'gspo': losses.gspo,
  'gspo_token': losses.gspo_token,
  'sequence_clip': losses.sequence_clip,
  'cispo': losses.cispo,
  'minirl': lambda x, old, a, m: losses.minirl(x, old, old, a, m),
  'dppo': losses.dppo,
  'kl_cov': lambda x, old, a, m: losses.kl_cov(x, old, a, m, m),
  'dro, kl_coef=1': functools.partial(losses.dro, kl_coef=1.0),
  'mirror_descent, kl_coef=1': functools.partial(
    losses.mirror_descent, kl_coef=1.0
  ),
  'sapo': losses.sapo,
  'vespo': losses.vespo,
  'geometric_mean': losses.geometric_mean,
}
# Of these the value is a function of the ratio alone.
OF_RATIO = ('ppo_clip', 'ppo_clip, dual_clip=3', 'geometric_mean', 'sapo')
DRAWN = (*OF_RATIO, 'gspo', 'cispo', 'dppo')
ESTIMATORS = {
  'k1': kl.k1,
  'k2': kl.k2,
  'k3': kl.k3,
  'importance_weighted(k3)': lambda x, ref: kl.importance_weighted(
    kl.k3(x, ref), x, jax.lax.stop_gradient(x)
  ),
  'straight_through(k3, k2)': lambda x, ref: kl.straight_through(
    kl.k3(x, ref), kl.k2(x, ref)
  ),
}
PREFERENCES = {
  'dpo': losses.dpo,
  'robust_dpo': losses.robust_dpo,
  'hinge': losses.hinge,
  'ipo': losses.ipo,
  'exo_pair': losses.exo_pair,
  'discopop': losses.discopop,
  'apo_zero': losses.apo_zero,
  'apo_down': losses.apo_down,
  'bco_pair': losses.bco_pair,
  'nca_pair': losses.nca_pair,
  'sppo_hard': losses.sppo_hard,
}


def push(loss, ratios, advantage):
  """Value and −∂ℓ/∂log π of sequences of one token, for each ratio."""
  old = jnp.full((len(ratios), 1), math.log(OLD))
  mask = jnp.ones_like(old, bool)
  gains = jnp.full_like(old, advantage)

  def total(logprobs):
    values, _ = loss(logprobs, old, gains, mask)
    return jnp.sum(values), values[:, 0]

  logprobs = old + jnp.log(jnp.asarray(ratios))[:, None]
  gradient, values = jax.grad(total, has_aux=True)(logprobs)
  return np.asarray(values), -np.asarray(gradient)[:, 0]


def clip_regions(folder):
  """Where each surrogate lets a token go, and how hard it still pushes."""
  ratios = np.linspace(0.02, 4, 600)
  figure, axes = plt.subplots(2, 2, figsize=(8, 5.2), sharex=True)
  for column, advantage in enumerate((1.0, -1.0)):
    for name in DRAWN:
      values, gradients = push(POLICY_LOSSES[name], ratios, advantage)
      place = DRAWN.index(name)  # thinner each, so that none is hidden
      style = dict(color=f'C{place}', lw=5 - 0.65 * place)
      if name in OF_RATIO:
        axes[0, column].plot(ratios, values, **style)
      axes[1, column].plot(ratios, gradients, **style, label=name)
    axes[0, column].set_title(f'A = {advantage:+.0f}')
    axes[1, column].set_xlabel('ratio')
  axes[0, 0].set_ylabel('value')
  axes[1, 0].set_ylabel('−gradient by log π')
  axes[1, 1].legend(fontsize=7, loc='lower left')
  finish(figure, folder / 'clip_regions.png')
  shown = (0.5, 0.9, 1.0, 1.1, 1.5, 3.5)
  for advantage in (1.0, -1.0):
    rows = {
      name: push(loss, shown, advantage)[1]
      for name, loss in POLICY_LOSSES.items()
    }
    table(f'−∂ℓ/∂log π, A = {advantage:+.0f}', [f'ρ={r}' for r in shown], rows)


def ratio_weights(folder):
  """Weights against the mismatch of a token, and what a product costs."""
  ratios = np.linspace(0.02, 7, 600)
  sampler = jnp.zeros((len(ratios), 1))
  args = (jnp.log(jnp.asarray(ratios))[:, None], sampler, sampler == 0)
  figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
  left.plot(ratios, ratios, ':', color='grey', label='π_old / μ')
  for cap in (2.0, 5.0):
    weights = importance.truncated(*args, cap=cap)[:, 0]
    left.plot(ratios, weights, label=f'truncated, cap={cap:g}')
  left.plot(ratios, importance.masked(*args)[:, 0], label='masked')
  left.set(xlabel='π_old / μ', ylabel='weight')
  left.legend(fontsize=7)
  lengths = (1, 10, 100, 300, 1000)
  # Token log-ratios N(−s²/2, s²) make E[w]² / E[w²] = exp(−s² T).
  rows = {
    f'token noise {noise}': [math.exp(-(noise**2) * n) for n in lengths]
    for noise in (0.01, 0.02, 0.05, 0.1)
  }
  for name, shares in rows.items():
    right.semilogx(lengths, shares, marker='.', label=name)
  right.set(xlabel='tokens', ylabel='effective share of sequences')
  right.legend(fontsize=7)
  finish(figure, folder / 'ratio_weights.png')
  table('effective sample size of products', lengths, rows)


def expectations(estimator, logits, ref):
  """Mean, deviation and mean gradient over every token of the vocabulary."""
  probs = jax.nn.softmax(logits)

  def mean(logits):
    return jnp.sum(probs * estimator(jax.nn.log_softmax(logits), ref))

  values = estimator(jnp.log(probs), ref)
  expected, gradient = jax.value_and_grad(mean)(logits)
  deviation = jnp.sqrt(jnp.sum(probs * (values - expected) ** 2))
  return float(expected), float(deviation), np.asarray(gradient)


def at_distance(scale):
  """Logits of policy and reference that differ by `scale`."""
  places = jnp.arange(32.0)
  ref = jnp.cos(places)
  return ref + scale * jnp.sin(1.7 * places), jax.nn.log_softmax(ref)


def kl_estimators(folder):
  """Bias and deviation against the distance, and the gradients as losses."""
  scales = np.geomspace(0.03, 5, 50)
  figure, axes = plt.subplots(1, 2, figsize=(8, 3))
  for name in ('k1', 'k2', 'k3'):
    found = [
      (float(kl.exact(x, r)), *expectations(ESTIMATORS[name], x, r)[:2])
      for x, r in map(at_distance, scales)
    ]
    distance, means, deviations = map(np.asarray, zip(*found, strict=True))
    axes[0].semilogx(distance, means / distance, label=name)
    axes[1].loglog(distance, deviations / distance, label=name)
  for axis, label in zip(axes, ('mean / KL', 'deviation / KL'), strict=True):
    axis.set(xlabel='KL(π‖π_ref) in nats', ylabel=label)
  axes[0].legend()
  finish(figure, folder / 'kl_estimators.png')
  for scale in (0.1, 0.5, 1.5, 4.0):
    logits, ref = at_distance(scale)
    exact, true = jax.value_and_grad(kl.exact)(logits, ref)
    true, rows = np.asarray(true), {}
    for name, estimator in ESTIMATORS.items():
      mean, deviation, gradient = expectations(estimator, logits, ref)
      norm = np.linalg.norm(gradient)
      along = gradient @ true / max(norm * np.linalg.norm(true), 1e-30)
      size = norm / np.linalg.norm(true)
      rows[name] = (
        mean / exact,
        deviation / exact,
        along if norm > 1e-9 else np.nan,
        size,
      )
    columns = ('mean/KL', 'deviation/KL', 'cosine', 'norm/norm')
    table(f'KL = {exact:.4g}', columns, rows)
  worked_case()


def worked_case():
  """Four tokens, the reference in the reverse order."""
  logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
  ref = logits[::-1]
  rows = {'exact': np.asarray(jax.grad(kl.exact)(logits, ref))}
  for name, estimator in ESTIMATORS.items():
    rows[name] = expectations(estimator, logits, ref)[2]
  table('π = (.4 .3 .2 .1), π_ref reversed: E[∇]', range(4), rows)


def prompt_weight(advantage, size, chance):
  """E[ĝ] / ∇p of a prompt solved with this chance, by enumeration."""
  rights = np.arange(size + 1)
  rewards = jnp.asarray(np.arange(size) < rights[:, None], float)
  gains = np.asarray(advantage(rewards))
  scores = np.where(np.asarray(rewards) > 0, 1 / chance, -1 / (1 - chance))
  ways = np.array([math.comb(size, n) for n in rights], float)
  odds = ways * chance**rights * (1 - chance) ** (size - rights)
  return float(np.sum(odds * np.mean(gains * scores, axis=1)))


def std_normaliser(folder):
  """What dividing by the deviation makes of easy and hard prompts."""
  chances = np.linspace(0.01, 0.99, 99)
  figure, axis = plt.subplots(figsize=(5, 3))
  shown, rows = (0.02, 0.05, 0.1, 0.3, 0.5), {}
  for size in (4, 8, 16, 64):
    fn = advantages.group_normalized
    weights = [prompt_weight(fn, size, p) for p in chances]
    axis.plot(chances, weights, label=f'group_normalized, G = {size}')
    rows[f'G = {size}'] = [prompt_weight(fn, size, p) for p in shown]
  rows['1/√(p(1−p))'] = [1 / math.sqrt(p * (1 - p)) for p in shown]
  for name in ('group_centered', 'leave_one_out'):
    fn = getattr(advantages, name)
    rows[f'{name}, G = 8'] = [prompt_weight(fn, 8, p) for p in shown]
  axis.axhline(1, color='grey', ls=':', label='leave_one_out')
  axis.set(xlabel='chance p of a right sample', ylabel='weight of the prompt')
  axis.set_ylim(0, 6)
  axis.legend(fontsize=7)
  finish(figure, folder / 'std_normaliser.png')
  table('weight of a prompt', [f'p={p}' for p in shown], rows)


def preferences(folder):
  """Losses of pairs against the reward of the chosen, the rejected at 0."""
  rewards = np.linspace(-4, 4, 400)
  figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
  for i, (name, loss) in enumerate(PREFERENCES.items()):
    values, gradients = pair_curve(loss, rewards)
    style = dict(color=f'C{i % 10}', ls='-' if i < 6 else '--', label=name)
    axes[0].plot(rewards, values, **style)
    axes[1].plot(rewards, gradients, **style)
  axes[0].set(ylabel='value', xlabel='reward of the chosen', ylim=(-1, 8))
  axes[1].set(ylabel='−gradient', xlabel='reward of the chosen', ylim=(-1, 2))
  axes[0].legend(fontsize=6, ncol=2)
  finish(figure, folder / 'preferences.png')
  shown = (-2.0, 0.0, 0.5, 2.0)
  rows = {k: pair_curve(loss, shown)[1] for k, loss in PREFERENCES.items()}
  table('−∂ℓ/∂x, y = 0, β = 1', [f'x={x:g}' for x in shown], rows)


def pair_curve(loss, rewards):
  zeros = jnp.zeros(len(rewards))

  def total(chosen):
    values, _ = loss(chosen, zeros, zeros, zeros, beta=1.0)
    return jnp.sum(values), values

  chosen = jnp.asarray(np.asarray(rewards))
  gradient, values = jax.grad(total, has_aux=True)(chosen)
  return np.asarray(values), -np.asarray(gradient)


def finish(figure, path):
  for axis in figure.axes:
    axis.grid(alpha=0.3)
  figure.tight_layout()
  # A fixed version entry keeps the file the same between runs.
  figure.savefig(path, dpi=72, metadata={'Software': None})
  plt.close(figure)


def table(title, columns, rows):
  width = max(map(len, rows))
  print(f'\n{title}')
  print(' ' * width, *(f'{c!s:>12}' for c in columns))
  for name, row in rows.items():
    # Adding 0 turns −0 into 0.
    print(f'{name:{width}}', *(f'{round(float(x), 3) + 0:12.3f}' for x in row))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  default = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'figures'
  parser.add_argument('--folder', type=pathlib.Path, default=default)
  folder = parser.parse_args().folder
  folder.mkdir(parents=True, exist_ok=True)
  jax.config.update('jax_enable_x64', True)
  plt.switch_backend('Agg')
  for draw in (
    clip_regions,
    ratio_weights,
    kl_estimators,
    std_normaliser,
    preferences,
  ):
    draw(folder)


if __name__ == '__main__':
  main()
