"""GRPO on shapes of published models, to compile and weigh for pods.

  python experiments/compile_for.py --topology=v5p:4x4x4 \\
    --config=configs/scaling.py:qwen2.5-7b

The weights are random and the task is sorting: what a program needs follows
from the shapes alone, those of prompts of 1,024 tokens and completions of as
many, 256 prompts of 8 in an iteration and its one update. Nothing here is a
recipe.
"""

from ml_collections import ConfigDict

from configs import base

SHAPES = {
  'qwen2.5-0.5b': dict(
    num_layers=24, model_dim=896, mlp_dim=4864, num_heads=14, num_kv_heads=2,
    head_dim=64, tie_embeddings=True,
  ),
  'qwen2.5-7b': dict(
    num_layers=28, model_dim=3584, mlp_dim=18_944, num_heads=28, num_kv_heads=4,
    head_dim=128, tie_embeddings=False,
  ),
  'qwen2.5-32b': dict(
    num_layers=64, model_dim=5120, mlp_dim=27_648, num_heads=40, num_kv_heads=8,
    head_dim=128, tie_embeddings=False,
  ),
  'qwen3-30b-a3b': dict(
    num_layers=48, model_dim=2048, mlp_dim=768, num_heads=32, num_kv_heads=4,
    head_dim=128, tie_embeddings=False, num_experts=128, experts_per_token=8,
    family='qwen3_moe', qk_norm=True, qkv_bias=False,
  ),
  'miniature': dict(
    num_layers=2, model_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=2,
    head_dim=64, tie_embeddings=True,
  ),
}  # fmt: skip


def get_config(name: str = 'qwen2.5-0.5b') -> ConfigDict:
  if name not in SHAPES:
    raise ValueError(f'{name!r} is no shape; there are: {", ".join(SHAPES)}')
  vocab_size, length = 151_936, 1024
  if name == 'miniature':
    vocab_size, length = 4096, 256
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='sort', vocab_size=vocab_size, length=length)
  )
  config.rewards = dict(exact=dict(name='exact', weight=1.0))
  config.model = dict(
    dict(
      name='transformer', family='qwen2', max_length=2 * length,
      qkv_bias=True, rope_theta=1e6, dtype='bfloat16', remat='nothing_saveable',
    ),
    **SHAPES[name],
  )  # fmt: skip
  config.evaluation.grader = 'exact'
  config.kl.loss_coef = 0.001
  config.sampling.max_new_tokens = length
  config.rl.num_iterations = 100
  config.rl.num_prompts = 256
  config.rl.num_micro_batches = 16
  config.rl.num_score_slices = 16
  config.chunk_size = 128
  config.mesh.fsdp = -1
  return config
