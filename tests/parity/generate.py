"""What transformers computes with the tiny checkpoint of every family.

  python tests/parity/generate.py

Writes families.json beside it; needs PyTorch. `tests/test_families.py` holds
the model against the file, and where PyTorch is installed against transformers
itself.
"""

import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import numpy as np
import torch
import transformers

from parity import checkpoints

RECORD = pathlib.Path(__file__).with_name('families.json')
SHOWN = 3  # last positions whose logits are kept
FUSED = {
  'gate_proj': ('gate_up_proj', 0), 'w1': ('gate_up_proj', 0),
  'up_proj': ('gate_up_proj', 1), 'w3': ('gate_up_proj', 1),
  'down_proj': ('down_proj', None), 'w2': ('down_proj', None),
}  # fmt: skip


def load(directory: pathlib.Path) -> Any:
  """The model as transformers reads it, every tensor found and used."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    directory, attn_implementation='eager', output_loading_info=True
  )
  wrong = {k: v for k, v in info.items() if v}
  if wrong:
    raise ValueError(f'{directory}: transformers reports {wrong}')
  return model.eval()


def logits(model: Any, tokens: np.ndarray, valid: np.ndarray) -> torch.Tensor:
  """Of left-padded rows."""
  return model(
    input_ids=torch.tensor(tokens, dtype=torch.long),
    attention_mask=torch.tensor(valid),
    position_ids=torch.tensor(np.maximum(valid.cumsum(-1) - 1, 0)),
  ).logits


def loss(out: torch.Tensor, tokens: np.ndarray, valid: np.ndarray) -> Any:
  """Negative log-likelihood of the real tokens that follow a real one."""
  targets = torch.tensor(tokens, dtype=torch.long)[:, 1:, None]
  scores = torch.log_softmax(out[:, :-1], -1).gather(-1, targets)[..., 0]
  return -scores[torch.tensor(valid[:, 1:] & valid[:, :-1])].sum()


def gradient(model: Any, name: str) -> np.ndarray:
  """Of a tensor of the file; transformers has the experts as one."""
  named = dict(model.named_parameters())
  if name in named:
    return named[name].grad.numpy()
  found = re.fullmatch(r'(.*)\.experts\.(\d+)\.(\w+)\.weight', name)
  place = name.replace('block_sparse_moe', 'mlp')
  if not found:
    return named[place].grad.numpy()
  place = found[1].replace('block_sparse_moe', 'mlp')
  fused, half = FUSED[found[3]]
  value = named[f'{place}.experts.{fused}'].grad[int(found[2])].numpy()
  return value if half is None else np.split(value, 2)[half]


def reference(directory: pathlib.Path, names: list[str]) -> dict[str, Any]:
  """Logits, loss and gradients by name in the file."""
  model = load(directory)
  tokens, valid = checkpoints.inputs()
  out = logits(model, tokens, valid)
  total = loss(out, tokens, valid)
  total.backward()
  return {
    'logits': out.detach().numpy(),
    'loss': total.item(),
    'gradients': {name: gradient(model, name) for name in names},
  }


def summary(values: dict[str, Any]) -> dict[str, Any]:
  """What is kept of it: some logits, the loss, norms of the gradients."""
  return {
    'logits': values['logits'][:, -SHOWN:].astype(float).round(6).tolist(),
    'loss': round(float(values['loss']), 5),
    'gradient_norms': {
      name: float(f'{np.linalg.norm(value):.6g}')
      for name, value in values['gradients'].items()
    },
  }


def main() -> None:
  """Write the file."""
  out: dict[str, Any] = {}
  for variant in checkpoints.VARIANTS:
    with tempfile.TemporaryDirectory() as folder:
      directory = checkpoints.write(variant, pathlib.Path(folder))
      names = checkpoints.names(variant)
      out[variant] = summary(reference(directory, names))
  versions = {'torch': torch.__version__,
              'transformers': transformers.__version__}  # fmt: skip
  lines = [
    f'"{k}": {json.dumps(v)}' for k, v in {'versions': versions, **out}.items()
  ]
  RECORD.write_text('{' + ',\n'.join(lines) + '}\n')


if __name__ == '__main__':
  main()
