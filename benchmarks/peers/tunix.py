"""Tunix's side: its sampler and its learners of GRPO and PPO."""

from collections.abc import Iterator
import dataclasses
import json
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from transformers import PreTrainedTokenizerFast
from tunix.generate import sampler
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params
from tunix.rl import common, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

from benchmarks.peers import protocol
from benchmarks.shapes import (
  BETA,
  EOS,
  LEARNING_RATE,
  PAD,
  PPO_BETA,
  PPO_EPOCHS,
)  # fmt: skip

tokens = {}


def even(prompts: Any, completions: list[str], **_: Any) -> list[float]:
  """The reward of every side."""
  tokens['tokens'] = sum(len(text.split()) for text in completions)
  return [protocol.even_share(text) for text in completions]


def load(folder: str, mesh: Any) -> Any:
  """The weights by Tunix's own loader; it mistakes a folder with other files
  for one of many shards, so the file is told by its folder alone."""
  with open(os.path.join(folder, 'config.json')) as file:
    given = json.load(file)
  config = qwen2.ModelConfig(
    num_layers=given['num_hidden_layers'],
    vocab_size=given['vocab_size'],
    embed_dim=given['hidden_size'],
    hidden_dim=given['intermediate_size'],
    num_heads=given['num_attention_heads'],
    head_dim=given['hidden_size'] // given['num_attention_heads'],
    num_kv_heads=given['num_key_value_heads'],
    rope_theta=given['rope_parameters']['rope_theta'],
    norm_eps=given['rms_norm_eps'],
    use_tied_embedding=True,
  )
  return config, params.create_model_from_safe_tensors(
    folder, config, mesh, dtype=jnp.float32
  )


def load_critic(folder: str, mesh: Any) -> Any:
  """The same trunk with the head of values of its own directory.

  As `tunix.rl.utils.create_critic_model` makes one, which knows no model whose
  embedding is its head.
  """
  config, model = load(folder, mesh)
  path = os.path.join(folder, 'critic', 'model.safetensors')
  score = safetensors.numpy.load_file(path)['score.weight']
  model.config = dataclasses.replace(config, use_tied_embedding=False)
  model.lm_head = nnx.Linear(
    config.embed_dim, 1, use_bias=False, rngs=nnx.Rngs(0)
  )
  model.lm_head.kernel.set_value(jnp.asarray(score.T))
  return model


def values(critic: Any, folder: str) -> list[float]:
  prompts, completions = map(jnp.array, protocol.checked(folder))
  found = common.compute_score(
    critic, prompts, completions, pad_id=PAD, eos_id=EOS
  )
  return found[:, prompts.shape[1] - 1 : -1].reshape(-1).tolist()


def sequence_logprobs(model: Any, folder: str) -> list[float]:
  prompts, completions = map(jnp.array, protocol.checked(folder))
  found = common.compute_per_token_logps(
    *nnx.split(model), prompts, completions, pad_id=PAD, eos_id=EOS
  )
  return found.sum(-1).tolist()


def generate(given: Any, config: Any, model: Any, tokenizer: Any) -> None:
  shape = given.shape
  length = shape.prompt_length + shape.completion_length
  cache = sampler.CacheConfig(
    cache_size=length, num_layers=shape.num_layers,
    num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
  )  # fmt: skip
  draw = sampler.Sampler(model, tokenizer, cache)
  rows = protocol.rows(given.folder, 'demonstrations')[: shape.num_prompts]
  prompts = [r['prompt'] for r in rows for _ in range(shape.num_samples)]
  step = 0
  while True:
    out = draw(
      prompts, shape.completion_length, shape.prompt_length, temperature=1.0,
      top_p=1.0, seed=step, eos_tokens=[shape.vocab_size],
    )  # fmt: skip
    protocol.session().answer(tokens=sum(len(row) for row in out.tokens))
    step += 1


def batches(given: Any, model: Any) -> Iterator[dict[str, Any]]:
  """Prompts of a step, asked for where the step before is done."""
  prompts = [r['prompt'] for r in protocol.rows(given.folder, 'demonstrations')]
  size, step = prompts_of(given), 0
  while True:
    if step:
      jax.block_until_ready(nnx.state(model))
      protocol.session().answer(**tokens)
    start = step * size % len(prompts)
    yield {'prompts': np.array(prompts[start : start + size])}
    step += 1


def prompts_of(given: Any) -> int:
  """A step of PPO has a prompt for every completion."""
  shape = given.shape
  return shape.num_rows if given.job == 'ppo' else shape.num_prompts


def learn(
  given: Any, mesh: Any, model: Any, critic: Any, tokenizer: Any
) -> None:
  shape = given.shape
  _, reference = load(given.folder, mesh)
  size = prompts_of(given)
  micro = size // given.micro_batches
  role = rl_cluster.Role
  training = rl_cluster.RLTrainingConfig(
    actor_optimizer=optimizer(),
    critic_optimizer=optimizer() if critic else None,
    eval_every_n_steps=100_000,
    max_steps=100_000,
    mini_batch_size=size,
    train_micro_batch_size=micro,
    rollout_micro_batch_size=size,
    compute_logps_micro_batch_size=micro,
  )
  rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=shape.completion_length,
    max_prompt_length=shape.prompt_length,
    kv_cache_size=shape.prompt_length + shape.completion_length,
    temperature=1.0,
    top_p=1.0,
    eos_tokens=[shape.vocab_size],
  )
  cluster = rl_cluster.RLCluster(
    actor=model,
    reference=reference,
    critic=critic,
    tokenizer=tokenizer,
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(role, mesh),
      training_config=training,
      rollout_config=rollout,
    ),
  )  # fmt: skip
  if critic:
    learner = ppo_learner.PPOLearner(
      cluster,
      ppo_learner.PPOConfig(
        num_iterations=PPO_EPOCHS, beta=PPO_BETA, kl_method='kl'
      ),
      even,
    )
  else:
    learner = grpo_learner.GRPOLearner(
      cluster,
      grpo_learner.GRPOConfig(
        num_generations=shape.num_samples, beta=BETA, kl_loss_mode='low_var_kl'
      ),
      even,
    )
  learner.train(batches(given, cluster.actor_trainer.model))


def optimizer() -> optax.GradientTransformation:
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))


def main() -> None:
  given, session = protocol.options(), protocol.session()
  axes = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=axes)
  tokenizer = PreTrainedTokenizerFast.from_pretrained(given.folder)
  with jax.set_mesh(mesh):
    config, model = load(given.folder, mesh)
    told = dict(logprobs=sequence_logprobs(model, given.folder))
    critic = None
    if given.job == 'ppo':
      critic = load_critic(given.folder, mesh)
      told['values'] = values(critic, given.folder)
    session.answer(
      versions=protocol.versions('jax', 'jaxlib', 'flax', 'google-tunix'),
      **told,
    )
    if given.job == 'generate':
      generate(given, config, model, tokenizer)
    learn(given, mesh, model, critic, tokenizer)


if __name__ == '__main__':
  main()
