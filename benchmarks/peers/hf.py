"""Hugging Face's side: `generate`."""

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import protocol
from benchmarks.shapes import PAD


def load(folder: str) -> torch.nn.Module:
  """The weights of a directory in float32, on one thread."""
  torch.set_num_threads(1)
  return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def sequence_logprobs(model: torch.nn.Module, folder: str) -> list[float]:
  prompts, completions = map(torch.tensor, protocol.checked(folder))
  tokens = torch.cat([prompts, completions], dim=1)
  logits = model(tokens).logits[:, prompts.shape[1] - 1 : -1]
  found = logits.log_softmax(-1).gather(-1, completions[..., None])
  return found.sum((1, 2)).tolist()


def main() -> None:
  given, session = protocol.options(), protocol.session()
  shape, model = given.shape, load(given.folder).eval()
  session.answer(
    versions=protocol.versions('torch', 'transformers'),
    logprobs=sequence_logprobs(model, given.folder),
  )
  prompts = torch.tensor(protocol.checked(given.folder)[0])
  prompts = prompts[: shape.num_prompts].repeat_interleave(
    shape.num_samples, dim=0
  )
  length = shape.completion_length
  while True:
    with torch.no_grad():
      out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
        max_new_tokens=length, min_new_tokens=length, top_k=0,
        pad_token_id=PAD,
      )  # fmt: skip
    session.answer(tokens=out[:, prompts.shape[1] :].numel())


if __name__ == '__main__':
  main()
