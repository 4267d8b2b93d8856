"""Every field of a config, with the choices that GRPO makes on each axis.

No recipe by itself: it has no environment. See `postrain.schema` for what the
fields mean.
"""

from ml_collections import ConfigDict, config_dict


def adamw(**changes: object) -> dict[str, object]:
  """The optimiser block with every field, so that each can be overridden."""
  return {
    **dict(
      name='adamw',
      learning_rate=1e-3,
      schedule='constant',
      warmup_steps=0,
      total_steps=config_dict.placeholder(int),
      b1=0.9,
      b2=0.99,
      eps=1e-8,
      weight_decay=0.0,
      clip_norm=1.0,
    ),
    **changes,
  }


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      seed=0,
      environment=dict(),
      model=dict(),
      rewards=dict(),
      # One choice per axis.
      advantage=dict(name='group_normalized', eps=1e-6),
      whitening=config_dict.placeholder(dict),
      loss=dict(name='ppo_clip', clip_low=0.2, clip_high=0.2),
      aggregation=dict(name='token_mean'),
      selection=config_dict.placeholder(dict),
      correction=config_dict.placeholder(dict),
      critic=dict(
        network=config_dict.placeholder(dict),
        returns=dict(name='lambda_returns', discount=1.0, lambda_=0.95),
        loss=dict(name='clipped_squared_error', clip=0.2),
        coef=1.0,
        optimizer=adamw(learning_rate=1e-3),
      ),
      kl=dict(
        estimator=dict(name='k3'),
        reward_coef=config_dict.placeholder(float),
        loss_coef=config_dict.placeholder(float),
        aggregation=config_dict.placeholder(dict),
        controller=config_dict.placeholder(dict),
      ),
      entropy_coef=config_dict.placeholder(float),
      ptx=dict(
        coef=config_dict.placeholder(float),
        batch_size=32,
        num_examples=config_dict.placeholder(int),
        num_micro_batches=1,
      ),
      reference=dict(update='frozen', decay=0.99, every=1, memory='device'),
      routing=dict(
        record=False,
        replay=config_dict.placeholder(str),
        balance_coef=config_dict.placeholder(float),
        balance_over='sequence',
      ),
      filter=dict(overlong='keep', informative_only=False, max_rollouts=1),
      # How much of it.
      sampling=dict(
        num_samples=8,
        num_parts=1,
        max_new_tokens=16,
        carry_over=config_dict.placeholder(int),
        temperature=1.0,
        top_k=config_dict.placeholder(int),
        top_p=config_dict.placeholder(float),
        min_p=config_dict.placeholder(float),
        num_cache_sizes=1,
        num_slots=config_dict.placeholder(int),
        num_halvings=3,
      ),
      sft=dict(
        num_steps=0,
        batch_size=32,
        num_examples=config_dict.placeholder(int),
        num_micro_batches=1,
        row_length=config_dict.placeholder(int),
        optimizer=adamw(learning_rate=1e-3),
      ),
      preference=dict(
        num_steps=0,
        batch_size=32,
        num_examples=config_dict.placeholder(int),
        num_micro_batches=1,
        learns='policy',
        source='dataset',
        reference_every=config_dict.placeholder(int),
        ref_logprobs='live',
        data='pairs',
        loss=dict(name='dpo', beta=0.1),
        sft_coef=config_dict.placeholder(float),
        centering_coef=config_dict.placeholder(float),
        optimizer=adamw(learning_rate=1e-3),
      ),
      rl=dict(
        num_iterations=0,
        num_prompts=32,
        num_epochs=1,
        num_minibatches=1,
        num_micro_batches=1,
        num_score_slices=1,
        rescore=True,
        share_prompts=True,
        staleness=0,
        row_length=config_dict.placeholder(int),
        kl_stop=config_dict.placeholder(float),
        optimizer=adamw(learning_rate=1e-3),
      ),
      evaluation=dict(
        every=0,
        grader='',
        threshold=1.0,
        exploit_threshold=config_dict.placeholder(float),
        num_prompts=128,
        batch_size=128,
        num_samples=0,
        ks=(1,),
      ),
      logging=dict(
        table_every=0,
        tensorboard=False,
        wandb_project=config_dict.placeholder(str),
      ),
      checkpoint=dict(every=50, keep=2, export=True),
      machine=dict(memory_limit=config_dict.placeholder(int)),
      mesh=dict(slices=1, data=1, fsdp=1, expert=1, context=1, tensor=1),
      chunk_size=16,
      num_row_buckets=6,
    )
  )
