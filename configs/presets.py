"""Published algorithms, and what popular trainers compute under their names.

`PRESETS[algorithm][source]` fixes every axis on which the sources differ:
``paper``, or a trainer's defaults (``trl`` 1.16, ``verl`` 0.9.1, ``tunix``
0.1.7), so that who moves from another stack gets its numbers and sees what
differs. In a config, after the sampling limit is set:

  presets.apply(config, 'dapo/verl')

What a preset does not name (the reference, dynamic sampling) it leaves alone.
`docs/presets.md` is this table, and a test holds losses and gradients against
those of the trainers.
"""

from ml_collections import ConfigDict

Block = dict[str, object]


def group(eps: float = 1e-6, ddof: int = 0) -> Block:
  return dict(name='group_normalized', eps=eps, ddof=ddof)


def clip(low: float = 0.2, high: float = 0.2, **more: object) -> Block:
  return dict(name='ppo_clip', clip_low=low, clip_high=high, **more)


def loss_kl(name: str, coef: float) -> Block:
  return dict(estimator=dict(name=name), loss_coef=coef, reward_coef=None)


def reward_kl(name: str, coef: float) -> Block:
  return dict(estimator=dict(name=name), loss_coef=None, reward_coef=coef)


NO_KL = dict(loss_coef=None, reward_coef=None)
CENTERED = dict(name='group_centered')
LEAVE_ONE_OUT = dict(name='leave_one_out')
TRL, VERL = group(1e-4, ddof=1), group(1e-6, ddof=1)
UNLIMITED = dict(max_log_ratio=None)
DUAL = dict(dual_clip=3.0)  # on by default in verl
TOKENS = dict(name='token_mean')
SEQUENCES = dict(name='sequence_mean')
ALL_SEQUENCES = dict(name='sequence_mean', count_empty=True)
SUMS = dict(name='sequence_sum')
# Dr. GRPO divides by the limit of new tokens, which `apply` fills in.
CONSTANT = dict(name='constant_length', length=None)
ALL_CONSTANT = dict(name='constant_length', length=None, count_empty=True)


def choices(
  advantage: Block, loss: Block, aggregation: Block, kl: Block = NO_KL
) -> Block:
  return dict(advantage=advantage, loss=loss, aggregation=aggregation, kl=kl)


GSPO = dict(clip_low=3e-4, clip_high=4e-4)
PRESETS: dict[str, dict[str, Block]] = {
  'grpo': dict(
    paper=choices(group(), clip(), SEQUENCES, loss_kl('k3', 0.04)),
    trl=choices(TRL, clip(**UNLIMITED), TOKENS),
    verl=choices(VERL, clip(**DUAL), TOKENS),
    # k1 in the loss: its expected gradient is 0, and the trainer refuses it.
    tunix=choices(VERL, clip(), SEQUENCES, loss_kl('k1', 0.04)),
  ),
  'dr_grpo': dict(
    paper=choices(CENTERED, clip(), CONSTANT),
    trl=choices(CENTERED, clip(**UNLIMITED), ALL_CONSTANT),
    verl=choices(CENTERED, clip(**DUAL), CONSTANT),
  ),
  'dapo': dict(
    paper=choices(
      group(), clip(high=0.28), dict(name='group_token_mean')
    ),
    trl=choices(TRL, clip(high=0.28, **UNLIMITED), TOKENS),
    verl=choices(VERL, clip(high=0.28, dual_clip=10.0), TOKENS),
  ),
  'rloo': dict(
    paper=choices(
      LEAVE_ONE_OUT, dict(name='reinforce'), SUMS, reward_kl('k1', 0.05)
    ),
    trl=choices(
      LEAVE_ONE_OUT, dict(name='sequence_clip', **UNLIMITED), ALL_SEQUENCES,
      reward_kl('k1', 0.05),
    ),
    verl=choices(LEAVE_ONE_OUT, clip(**DUAL), TOKENS),
  ),
  'gspo': dict(
    paper=choices(group(), dict(name='gspo', **GSPO), SEQUENCES),
    trl=choices(TRL, dict(name='gspo', **GSPO, **UNLIMITED), TOKENS),
    verl=choices(
      VERL, dict(name='gspo_token', **GSPO, max_log_ratio=10.0), TOKENS
    ),
  ),
  'cispo': dict(
    paper=choices(group(), dict(name='cispo', clip_high=4.0), TOKENS),
    trl=choices(TRL, dict(name='cispo', cap=5.0, **UNLIMITED), TOKENS),
    verl=choices(
      VERL, dict(name='cispo', clip_low=10.0, clip_high=0.2), TOKENS
    ),
  ),
  'sapo': dict(
    paper=choices(group(), dict(name='sapo'), SEQUENCES),
    trl=choices(TRL, dict(name='sapo', **UNLIMITED), ALL_SEQUENCES),
    verl=choices(VERL, dict(name='sapo'), SEQUENCES),
  ),
  'gmpo': dict(
    paper=choices(group(), dict(name='geometric_mean'), SEQUENCES),
  ),
  'dppo': dict(
    verl=choices(
      VERL, dict(name='dppo', divergence='tv', clip_low=0.2, clip_high=0.2),
      TOKENS,
    ),
  ),
  'minirl': dict(
    paper=choices(CENTERED, dict(name='minirl'), SUMS),
  ),
  'opo': dict(
    paper=choices(dict(name='optimal_baseline'), clip(), TOKENS),
    verl=choices(
      dict(name='optimal_baseline', singleton='raw'), clip(**DUAL), TOKENS
    ),
  ),
  'mirror_descent': dict(
    paper=choices(
      CENTERED, dict(name='mirror_descent', kl_coef=1.0), SEQUENCES
    ),
  ),
}  # fmt: skip


def preset(name: str) -> Block:
  """The blocks of ``'algorithm/source'``, a copy.

  Raises:
    ValueError: no such preset.
  """
  algorithm, _, source = name.partition('/')
  if source not in PRESETS.get(algorithm, {}):
    known = ', '.join(f'{a}/{s}' for a, of in PRESETS.items() for s in of)
    raise ValueError(f'preset {name!r} does not exist; there are: {known}')
  return ConfigDict(PRESETS[algorithm][source]).to_dict()


def apply(config: ConfigDict, name: str) -> None:
  """Replace the axes of a config by those of a preset.

  Raises:
    ValueError: no such preset.
  """
  blocks = preset(name)
  if blocks['aggregation'].get('length', 0) is None:
    blocks['aggregation']['length'] = config.sampling.max_new_tokens
  kl = blocks.pop('kl')
  for axis, block in blocks.items():
    config[axis] = ConfigDict(block)
  if 'estimator' in kl:
    config.kl.estimator = ConfigDict(kl.pop('estimator'))
  config.kl.update(kl)
