"""Each mistake is one clear error, before any compilation where it can be."""

from collections.abc import Callable
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from postrain import hub, sharding, tokenizers
from postrain.environments import Environment
from postrain.learned_rewards import make_environment
from postrain.models.config import Config
from postrain.models.transformer import transformer
from postrain.recipe import make_recipe, plain
from postrain.trainer import Trainer

quick_compiler = tiny.quick_compiler

NAN = float('nan')
ABSENT = object()

CONTROLLER = {'name': 'adaptive_coef', 'target': 0.1}

# Config, what is changed in it by path, what the error says.
FIELDS = [
  ('sort', {'surprise': 1}, "has no hyperparameter 'surprise'"),
  ('sort', {'rl': ABSENT}, 'config needs a value for: rl'),
  ('sort', {'rl': 3}, 'rl=3 is not of type Reinforcement'),
  ('sort', {'rl.num_promts': 4}, "did you mean 'num_prompts'"),
  ('sort', {'rl.num_prompts': '4'}, "num_prompts='4' is not of type int"),
  ('sort', {'rl.num_prompts': 4.0}, 'num_prompts=4.0 is not of type int'),
  ('sort', {'rl.num_prompts': True}, 'num_prompts=True is not of type int'),
  ('sort', {'rl.num_prompts': 0}, 'rl.num_prompts=0: it must be at least 1'),
  ('sort', {'rl.num_iterations': 0}, 'nothing to run'),
  ('sort', {'num_row_buckets': 0}, 'num_row_buckets=0: it must be at least 1'),
  ('sort', {'rl.row_length': 0}, 'rl.row_length=0: it must be at least 1'),
  ('sort', {'rl.row_length': 5}, 'length=5, but a sequence has up to 6 tokens'),
  ('arithmetic', {'sft.row_length': 5}, 'sft.row_length=5, but a sequence'),
  (
    'arithmetic',
    {'rl.row_length': 16},
    'rl.row_length=16 with rl.share_prompts=True',
  ),
  ('sort', {'rl.num_iterations': -1}, 'rl.num_iterations=-1'),
  ('sort', {'seed': -1}, 'seed=-1: it must be at least 0'),
  ('sort', {'entropy_coef': NAN}, 'entropy_coef=nan'),
  ('sort', {'chunk_size': 0}, 'chunk_size=0'),
  ('sort', {'rl.optimizer.learning_rate': NAN}, 'learning_rate=nan'),
  ('sort', {'rl.optimizer.learning_rate': -1e-3}, 'learning_rate=-0.001'),
  ('sort', {'rl.optimizer.name': 'adan'}, "did you mean 'adam'"),
  ('sort', {'sft.optimizer.schedule': 'cosin'}, "schedule='cosin'"),
  ('sort', {'sft.optimizer.schedule': 'linear'}, 'needs total_steps'),
  ('sort', {'rl.num_minibatches': 3}, 'num_minibatches=3 does not divide 16'),
  ('sort', {'rl.num_micro_batches': 3}, 'num_micro_batches=3 does not divide'),
  ('sort', {'rl.num_score_slices': 5}, 'num_score_slices=5 does not divide'),
  ('arithmetic', {'sft.num_micro_batches': 3}, 'sft.num_micro_batches=3'),
  ('arithmetic', {'sft.num_examples': 0}, 'sft.num_examples=0'),
  ('sort', {'mesh.data': 3}, 'do not divide over 3 devices'),
  ('sort', {'mesh.data': 16}, 'needs 16 devices, there are 8'),
  (
    'arithmetic',
    {'mesh.context': 2, 'model.attention': 'splash'},
    "'splash' needs .*, and rows that lie on one device each",
  ),
  ('sort', {'sampling.num_parts': 3}, 'num_parts=3 does not divide 4'),
  ('sort', {'sampling.num_parts': 0}, 'num_parts=0: it must be at least 1'),
  ('sort', {'mesh.data': 4, 'sampling.num_parts': 2}, 'part of a rollout: 2'),
  ('sort', {'machine.memory_limit': 0}, 'memory_limit=0: it must be at'),
  ('sort', {'sampling.num_samples': 1}, 'group of one has nothing to compare'),
  ('sort', {'sampling.temperature': 0.0}, 'temperature=0.0: it must be posit'),
  ('sort', {'sampling.temperature': NAN}, 'temperature=nan'),
  ('sort', {'sampling.top_p': 1.5}, r'top_p=1.5: it must be in \(0, 1\]'),
  ('sort', {'sampling.min_p': 2.0}, 'min_p=2.0'),
  ('sort', {'sampling.top_k': 0}, 'top_k=0: it must be at least 1'),
  ('sort', {'sampling.num_slots': 0}, 'num_slots=0: it must be at least 1'),
  ('sort', {'sampling.num_cache_sizes': 0}, 'num_cache_sizes=0: it must be'),
  ('sort', {'sampling.num_halvings': -1}, 'num_halvings=-1: it must be at le'),
  ('sort', {'sampling.num_slots': 2}, 'cannot be refilled: sample without sl'),
  (
    'arithmetic',
    {'sampling.num_slots': 8, 'mesh.data': 2},
    'num_slots after 3 halvings: 1 do not divide over 2',
  ),
  ('sort', {'sampling.carry_over': 0}, 'carry_over=0: it must be at least 1'),
  ('sort', {'sampling.carry_over': 4}, 'would give more than .*_tokens=3'),
  ('sort', {'rl.staleness': 2}, 'staleness=2: a rollout is sampled 0 or 1'),
  *(
    ('sort', {**change, **other}, f'{message} with {name}')
    for change, name in (
      ({'sampling.carry_over': 1}, 'sampling.carry_over=1'),
      ({'rl.staleness': 1}, 'rl.staleness=1'),
    )
    for other, message in (
      ({'rl.rescore': False}, 'rl.rescore=False'),
      ({'sampling.num_parts': 2}, 'sampling.num_parts=2'),
      ({'filter.informative_only': True}, 'filter.informative_only=True'),
    )
  ),
  (
    'sort',
    {'sampling.carry_over': 1, 'rl.num_minibatches': 2},
    'num_minibatches=2 with sampling.carry_over=1, .*: set it to 1',
  ),
  (
    'arithmetic',
    {'sampling.carry_over': 1, 'sampling.num_slots': 8},
    'num_slots=8 with sampling.carry_over=1',
  ),
  *(
    (
      'arithmetic',
      {'sampling.num_cache_sizes': 2, **other},
      f'num_cache_sizes=2 with {name}, whose cache does not gr',
    )
    for other, name in (
      ({'sampling.num_slots': 8}, 'sampling.num_slots=8'),
      ({'sampling.carry_over': 1}, 'sampling.carry_over=1'),
    )
  ),
  ('sort', {'sampling.max_new_tokens': 5}, 'max_new_tokens=3'),
  ('sort', {'kl.estimator.name': 'k1', 'kl.loss_coef': 0.1}, 'k1 in the loss'),
  ('sort', {'loss.name': 'pp_clip'}, "did you mean 'ppo_clip'"),
  ('sort', {'loss.clip_hihg': 0.3}, "did you mean 'clip_high'"),
  ('sort', {'loss': {'name': 'squared_error'}}, 'asks for values, returns'),
  ('sort', {'advantage.name': 'group_normalised'}, "'group_normalized'"),
  (
    'sort',
    {'advantage': {'name': 'gae'}},
    'reads values, but critic.network=N',
  ),
  (
    'sort',
    {'critic.network': {'name': 'copied'}},
    "advantage 'group_normalized' reads no values",
  ),
  *(
    ('sort', {'critic.network': {'name': 'copied'}, **change}, message)
    for change, message in (
      (
        {'advantage': {'name': 'gae', 'discount': 0.9}},
        'advantage.discount=0.9 with critic.returns.discount=1.0',
      ),
      (
        {'advantage': {'name': 'gae'}, 'rl.rescore': False},
        'rl.rescore=False with critic.network',
      ),
    )
  ),
  ('sort', {'critic.network': {'name': 'copy'}}, "did you mean 'copied'"),
  ('sort', {'critic.loss.clipp': 1.0}, "did you mean 'clip'"),
  ('sort', {'whitening': {'name': 'whitened'}}, "did you mean 'whiten'"),
  ('sort', {'kl.controller': CONTROLLER}, 'set one of them, where it begins'),
  *(
    ('sort', {'kl.reward_coef': 0.1, **change}, message)
    for change, message in (
      (
        {'kl.controller': {**CONTROLLER, 'horizon': 3.0}},
        'max_error=0.2 times num_sequences=16 is not below horizon=3.0',
      ),
      (
        {'kl.controller': CONTROLLER, 'kl.reward_coef': 0.0},
        'begins at the coefficient 0.0',
      ),
      (
        {'kl.controller': CONTROLLER, 'kl.loss_coef': 0.1},
        'set one of them, where it begins',
      ),
    )
  ),
  (
    'text',
    {'ptx.coef': 1.0, 'environment.completion': None},
    'ptx.coef=1.0, b',
  ),
  ('sort', {'ptx.batch_size': 0}, 'ptx.batch_size=0: it must be at least 1'),
  ('sort', {'ptx.num_examples': 0}, 'ptx.num_examples=0: it must be at leas'),
  (
    'sort',
    {'ptx.num_micro_batches': 3},
    '=3 does not divide ptx.batch_size=32',
  ),
  ('sort', {'ptx.coef': NAN}, 'coef=nan'),
  (
    'sort',
    {'ptx.coef': 1.0, 'ptx.batch_size': 3, 'mesh.data': 2},
    'rows of a ptx micro-batch: 3 do not divide over 2',
  ),
  ('sort', {'rl.kl_stop': 0.0}, 'rl.kl_stop=0.0: no update would be made'),
  ('sort', {'aggregation.name': 'token_sum'}, "has no 'token_sum'"),
  ('sort', {'correction': {}}, r"expected dict\(name='...'\)"),
  ('sort', {'kl.aggregation': {'name': 'mean'}}, "has no 'mean'"),
  ('sort', {'reference.update': 'sometimes'}, "update='sometimes'"),
  ('sort', {'reference.memory': 'disk'}, "memory='disk'"),
  ('sort', {'reference.memory': 'host'}, 'nothing reads a reference: set kl'),
  (
    'arithmetic',
    {'reference.memory': 'host', 'kl.loss_coef': 0.1, 'rl.num_iterations': 0},
    "nothing reads a reference: .* or leave it 'device'",
  ),
  ('sort', {'reference.decay': 1.5}, 'reference.decay=1.5'),
  ('sort', {'filter.overlong': 'drop'}, "overlong='drop'"),
  ('sort', {'filter.overlong': 'mask'}, 'no token ends a completion'),
  ('sort', {'evaluation.grader': 'right'}, "grader='right' is none of the rew"),
  ('arithmetic', {'evaluation.ks': (3,)}, 'ks has 3: pass@k needs k in'),
  ('sort', {'rewards.exact.name': 'exakt'}, "task has no reward 'exakt'"),
  ('sort', {'rewards.exact.weight': NAN}, 'needs a finite number'),
  ('sort', {'rewards.exact': 'exact'}, 'needs a finite number'),
  (
    'sort',
    {'rewards.exact.weight': 0, 'rewards.ordering.weight': 0},
    'at least one needs a weight that is not 0',
  ),
  ('sort', {'environment.name': 'game'}, "has no 'game'"),
  ('sort', {'environment.task.name': 'sorting'}, "did you mean 'sort'"),
  ('sort', {'environment.task.lenght': 3}, "did you mean 'length'"),
  ('sort', {'model.name': 'mamba'}, "has no 'mamba'"),
  ('arithmetic', {'model.name': 'sort_policy'}, 'has no hyperparameter'),
  ('arithmetic', {'model.num_kv_heads': 3}, 'num_kv_heads=3 does not divide'),
  ('arithmetic', {'model.remat': 'all'}, "remat='all' is not a policy"),
  ('arithmetic', {'model.attention': 'flash'}, "attention='flash': use one of"),
  ('arithmetic', {'model.attention': 'cudnn'}, 'needs an NVIDIA GPU .* not cp'),
  ('arithmetic', {'model.max_length': 6}, 'up to 7 tokens, the model 6'),
  ('sort', {'preference.num_steps': 1}, "'task' has no preferences: take a ta"),
  ('text', {'preference.num_steps': 1}, "'text' has no preferences: .*name th"),
  *(
    ('preference', {f'preference.{field}': value}, message)
    for field, value, message in (
      ('num_steps', -1, 'preference.num_steps=-1: it must be at least 0'),
      ('num_steps', 0, 'nothing to run'),
      ('batch_size', 0, 'preference.batch_size=0'),
      ('num_examples', 0, 'preference.num_examples=0'),
      ('num_micro_batches', 3, 'not divide preference.batch_size=4'),
      ('learns', 'critic', "learns='critic'"),
      ('data', 'triples', "data='triples'"),
      ('data', 'rankings', "'policy' and .data='rankings': a policy learns"),
      ('data', 'unpaired', "'dpo' asks for chosen.* it fits 'policy' and 'pa"),
      ('learns', 'reward_model', "'dpo' asks for .*ref_chosen, ref_rejected"),
      ('loss.name', 'simpoo', "did you mean 'simpo'"),
      ('loss', {'name': 'kto'}, "'kto' asks .* it fits 'policy' and 'unpair"),
      ('loss', {'name': 'bradley_terry'}, "it fits 'reward_model' and 'pairs'"),
      ('loss', {'name': 'ppo_clip'}, "'ppo_clip' asks .* it fits neither"),
      ('centering_coef', 0.1, 'centering_coef=0.1 .* scores of pairs'),
      ('optimizer.name', 'adan', "did you mean 'adam'"),
      ('source', 'judges', "source='judges'"),
      ('source', 'rewards', "'rewards' with .num_examples=8: prompts are"),
      ('reference_every', 0, 'preference.reference_every=0'),
      ('ref_logprobs', 'kept', "ref_logprobs='kept'"),
    )
  ),
  *(
    ('preference', {'preference.ref_logprobs': 'cached', **changes}, message)
    for changes, message in (
      (
        {'preference.reference_every': 2},
        'with .reference_every=2: it has one',
      ),
      (
        {'preference.num_examples': None},
        'num_examples=None, whose units are n',
      ),
      ({'preference.loss': {'name': 'simpo'}}, "'simpo', which reads no refer"),
      (
        {'preference.loss': {'name': 'kto'}, 'preference.data': 'unpaired'},
        "loss 'kto', whose reference point is of other",
      ),
      (
        {'preference.source': 'rewards', 'preference.num_examples': None},
        "source='rewards', whose units are new at each step; or take 'live'",
      ),
    )
  ),
  (
    'preference',
    {
      'preference.source': 'raters',
      'preference.data': 'unpaired',
      'preference.loss': {'name': 'kto'},
    },
    "'raters' with .learns='policy' and .data='unpaired': the policy writes",
  ),
  *(
    ('preference', {'preference.loss': {'name': 'simpo'}, path: value}, message)
    for path, value, message in (
      ('preference.source', 'self_play', "'simpo', which reads no reference"),
      ('preference.reference_every', 2, "=2, but loss 'simpo' reads no refe"),
    )
  ),
  *(
    (
      'text',
      {
        'environment.completion': None,
        'preference.num_steps': 1,
        'preference.source': source,
      },
      message,
    )
    for source, message in (
      ('raters', "'text', which has no raters: take a task"),
      ('self_play', "'text', which has no demonstrations: name their field"),
    )
  ),
  (
    'preference',
    {'preference.loss': {'name': 'aot'}, 'preference.num_micro_batches': 2},
    "num_micro_batches=2 with loss 'aot'",
  ),
  (
    'preference',
    {
      'preference.loss': {'name': 'kto'},
      'preference.data': 'unpaired',
      'preference.batch_size': 1,
    },
    "batch_size=1 with loss 'kto'",
  ),
  (
    'preference',
    {
      'preference.learns': 'reward_model',
      'preference.loss': {'name': 'bradley_terry'},
    },
    'gives 5 numbers a position: set model.head=',
  ),
  (
    'preference',
    {'model.head': 'sequence_labels', 'model.num_labels': 1},
    "learns='policy', but the model gives 1 numbers a position, not 5",
  ),
  ('preference', {'mesh.data': 8}, 'preference micro-batch: 4 do not divide'),
  ('scores', {'model.max_length': 4}, 'the preferences has up to 5 tokens'),
  (
    'scores',
    {'preference.loss': {'name': 'soft_preference'}},
    "'soft_preference' asks for preference, which the pairs lack: give",
  ),
  ('preference', {'environment.rater': {'scale': 0.0}}, 'scale=0.0: choose it'),
  ('preference', {'environment.rater': {'scal': 1.0}}, "mean 'scale'"),
  (
    'preference',
    {'environment.num_completions': 1},
    'num_completions=1: a ranking has at least 2',
  ),
  (
    'preference',
    {'environment.writer_logits': (0.0,) * 4},
    'writer_logits has 4 numbers: give one for each of 5 token ids',
  ),
  *(
    ('scores', {path: value}, f"{path}={value!r} with preference.learns='rew")
    for path, value in (('sft.num_steps', 1), ('rl.num_iterations', 1))
  ),
  ('scores', {'preference.sft_coef': 0.1}, 'sft_coef=0.1 .* policy on pairs'),
  ('scores', {'model.num_labels': 0}, 'num_labels=0 of head='),
  (
    'scores',
    {'model.lora': {'rank': 1, 'alpha': 1, 'targets': 'layers/query'}},
    "model.lora of a model with head='sequence_labels'",
  ),
  ('text', {'environment.train': 'no.jsonl'}, 'no.jsonl is no file'),
  ('text', {'environment.prompt': 'query'}, "has no field 'query'"),
  ('text', {'environment.max_prompt_length': 3}, 'prompt has 4 tokens, max_le'),
  ('text', {'environment.max_length': 5}, 'have 6 tokens, max_length=5'),
  ('text', {'environment.stop_ids': ()}, 'expected at least one id'),
  ('text', {'environment.stop_ids': (0,)}, 'also ends completions'),
  ('text', {'environment.stop_ids': (999,)}, r'stop_ids=\(999,\)'),
  ('text', {'environment.tokenizer': {'name': 'words'}}, 'give directory, or'),
  ('text', {'environment.tokenizer': {'directory': 'no'}}, 'does not exist'),
  ('text', {'rewards.length.name': 'lenght'}, "has no 'lenght'"),
  ('text', {'rewards.length.name': 'tiny:none'}, "'tiny:none' cannot be imp"),
  ('text', {'rewards.length.power': 2}, "no hyperparameter 'power'"),
  ('text', {'environment.num_workers': -1}, 'num_workers=-1: it must be at'),
  ('text', {'environment.num_workers': 1.5}, 'num_workers=1.5 is not of'),
  ('text', {'environment.timeout': 5.0}, 'timeout=5.0 with num_workers=0'),
  ('text', {'environment.timeout': NAN}, 'timeout=nan is not of type'),
  (
    'text',
    {'environment.num_workers': 1, 'environment.timeout': 0.0},
    'timeout=0.0 with num_workers=1: it must be a positive number of seconds',
  ),
  (
    'text',
    {'environment.completion': None, 'sft.num_steps': 2},
    'has no demonstrations',
  ),
]


@pytest.mark.parametrize(
  ('base', 'changes', 'message'),
  FIELDS,
  ids=[f'{n}-{" ".join(c)}' for n, (_, c, _) in enumerate(FIELDS)],
)
def test_field(
  base: str, changes: dict, message: str, tmp_path: pathlib.Path
) -> None:
  refuse(changed(base, changes, tmp_path), tmp_path / 'run', message)


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'question': '  ', 'answer': '1'}, "row 1: field 'question' is '  '"),
    ({'question': '1+1='}, "row 1 has no field 'answer'"),
    (['1+1=', '2'], 'row 1 is .* expected an object'),
    ('{"question": "1+1=", "ans\n', 'row 1 is no JSON'),
    ('\n', 'has no examples'),
  ],
)
def test_row(row: Any, message: str, tmp_path: pathlib.Path) -> None:
  config = tiny.text(tmp_path)
  tiny.json_lines(tmp_path / 'train.jsonl', [row])
  refuse(config, tmp_path / 'run', message)


def missing(directory: pathlib.Path) -> None:
  (directory / 'model.safetensors').unlink()


def truncated(directory: pathlib.Path) -> None:
  path = directory / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])


def padded_with_eos(directory: pathlib.Path) -> None:
  tokenizer = tokenizers.byte_level()
  tokenizer.pad_token = tokenizer.eos_token
  tokenizer.save_pretrained(directory)


def without_eos(directory: pathlib.Path) -> None:
  tokenizer = tokenizers.byte_level()
  tokenizer.eos_token = None
  tokenizer.save_pretrained(directory)


def with_more_tokens(directory: pathlib.Path) -> None:
  tokenizers.byte_level(special_tokens=['<|more|>']).save_pretrained(directory)


@pytest.mark.parametrize(
  ('harm', 'message'),
  [
    (missing, 'neither model.safetensors nor'),
    (truncated, 'model.safetensors is truncated'),
    (padded_with_eos, 'also ends completions'),
    (without_eos, 'eos_token=None: set tokenizer.eos_token, or give stop_ids'),
    (with_more_tokens, 'the tokenizer has 262 ids, the embedding 261 rows'),
  ],
)
def test_checkpoint_directory(
  harm: Callable, message: str, tmp_path: pathlib.Path
) -> None:
  directory = tmp_path / 'model'
  shape = {k: v for k, v in tiny.transformer().items() if k != 'name'}
  network = Config(vocab_size=261, **shape)
  shapes = jax.eval_shape(transformer(network).init, jax.random.key(0))
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  hub.save(directory, network, params, tokenizer=tokenizers.byte_level())
  config = tiny.text(tmp_path)
  config.model = dict(name='pretrained', directory=str(directory))
  config.environment.tokenizer = dict(directory=str(directory))
  config.environment.stop_ids = None
  Trainer(config, str(tmp_path / 'whole'))
  harm(directory)
  refuse(config, tmp_path / 'run', message)


def test_workdir_that_cannot_be_one(tmp_path: pathlib.Path) -> None:
  file = tmp_path / 'file'
  file.write_text('mine')
  refuse(tiny.sort(), file, 'cannot be written')
  refuse(tiny.sort(), file / 'run', 'cannot be written')
  assert file.read_text() == 'mine'


def test_workdir_of_another_config(tmp_path: pathlib.Path) -> None:
  Trainer(tiny.sort(), str(tmp_path))
  before = (tmp_path / 'config.json').read_bytes()
  other = tiny.sort()
  other.rl.optimizer.learning_rate = 0.5
  other.sampling.top_k = 2
  message = (
    'rl.optimizer.learning_rate: 0.02 there, 0.5 here; sampling.top_k: None'
    ' there, 2 here. Take another --workdir'
  )
  refuse(other, tmp_path, re.escape(message))
  assert (tmp_path / 'config.json').read_bytes() == before
  same = tiny.sort()
  same.logging.table_every = 7
  Trainer(same, str(tmp_path))


def test_workdir_of_something_else(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  refuse(tiny.sort(), tmp_path, 'was not written by a run')


def test_rewards_that_fail(tmp_path: pathlib.Path) -> None:
  config = tiny.text(tmp_path)
  directory = tmp_path / 'run'
  trainer = Trainer(config, str(directory))

  def environment() -> Environment:
    return make_environment(make_recipe(config), sharding.make_mesh())[0]

  for name, message in (
    ('raising', "'length' raised KeyError: 'answer'"),
    ('undefined', "'length' returned nan for row 0"),
    ('short', "'length' returned 1 values for 8"),
    ('silent', "'length' returned None for row 0"),
  ):
    config.rewards.length.name = f'tiny:{name}'
    trainer.environment = environment()  # compiled once for all
    with pytest.raises(ValueError, match=message):
      trainer.run()
    assert not directory.exists()
  with config.environment.unlocked():
    config.environment.num_workers = 1
  trainer.environment = environment()
  with pytest.raises(ValueError, match="'length' returned None for row 0"):
    trainer.run()
  assert not directory.exists()


def test_limit_that_truncates_every_completion(tmp_path: pathlib.Path) -> None:
  config = tiny.text(tmp_path)
  config.environment.stop_ids = (1,)
  config.sampling.max_new_tokens = 2
  with pytest.raises(ValueError, match=r'all 8 completions .* limit of 2 tok'):
    Trainer(config, str(tmp_path / 'run')).run()
  assert not (tmp_path / 'run').exists()


COMMANDS = [
  ([], 'Flag --config must have a value'),
  (['--config=configs/sort_documented.py'], '--workdir must have a value'),
  (['--config=configs/no.py', '--workdir=DIR'], 'configs/no.py'),
  (['--wrokdir=DIR'], "Unknown command line flag 'wrokdir'"),
  (['--workdir=DIR', '--workdir=DIR'], '--workdir=DIR: already defined'),
  (['CONFIG', '--workdir=DIR', '--config.rl.num_promts=4'], 'num_promts'),
  (['CONFIG', '--workdir=DIR', '--config.seed=four'], 'config.seed'),
  (['--config.seed=4', 'CONFIG', '--workdir=DIR'], 'config.seed'),
  (['CONFIG', '--workdir=DIR', 'stray'], 'no flags: stray'),
  (
    ['CONFIG', '--workdir=DIR', '--config.sampling.temperature=0'],
    'sampling.temperature=0.0: it must be positive',
  ),
]


def test_command_line(tmp_path: pathlib.Path) -> None:
  directory = tmp_path / 'run'
  places = {
    'DIR': str(directory),
    'CONFIG': '--config=configs/sort_documented.py',
  }
  for arguments, message in COMMANDS:
    for place, value in places.items():
      arguments = [a.replace(place, value) for a in arguments]
      message = message.replace(place, value)
    done = subprocess.run(
      [sys.executable, 'experiments/train.py', *arguments],
      cwd=tiny.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0, arguments
    assert re.fullmatch(rf'error: .*({message}).*\n', done.stderr), done.stderr
    assert not done.stdout
    assert not directory.exists()


def changed(base: str, changes: dict, folder: pathlib.Path) -> dict:
  """A config as nested dicts, with other values at some paths."""
  config = tiny.text(folder) if base == 'text' else getattr(tiny, base)()
  config = plain(config)
  for path, value in changes.items():
    *blocks, field = path.split('.')
    inner = config
    for block in blocks:
      inner = inner[block]
    inner[field] = value
    if value is ABSENT:
      del inner[field]
  return config


def refuse(config: Any, directory: pathlib.Path, message: str) -> None:
  """Construct: an error, nothing compiled, nothing written."""
  compiled = len(tiny.compilations)
  existed = directory.exists()
  with pytest.raises(ValueError, match=message):
    Trainer(config, str(directory))
  assert tiny.compilations[compiled:] == []
  assert directory.exists() == existed
