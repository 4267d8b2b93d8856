"""A table of the reference: the figures of a live one, in any resumed run."""

import pathlib

import numpy as np
import pytest
from test_preference_stage import Killed, close, figures
import tiny

from postrain import trainer
from postrain.trainer import Trainer

quick_compiler = tiny.quick_compiler


def test_m22_a_table_is_read_again_and_no_foreign_one(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = tiny.preference()
  config.preference.num_steps = 3
  config.preference.optimizer.learning_rate = 0.1
  config.checkpoint.update(every=1, export=False)
  config.evaluation.num_prompts = 4
  live = Trainer(config, str(tmp_path / 'live')).run()
  config.preference.ref_logprobs = 'cached'
  whole = Trainer(config, str(tmp_path / 'whole')).run()
  assert whole.ref_params is None
  close(whole.params, live.params)
  for ours, theirs in zip(
    *(figures(tmp_path / name) for name in ('whole', 'live')), strict=True
  ):
    assert ours == pytest.approx(theirs, abs=1e-6)

  def die_at(at: str, number: int) -> None:
    if (at, number) == ('after_checkpoint', 2):
      raise Killed

  killed = tmp_path / 'killed'
  with monkeypatch.context() as patch:
    patch.setattr(trainer.workdir, 'die_at', die_at)
    with pytest.raises(Killed):
      Trainer(config, str(killed)).run()
  table = killed / 'reference.npz'
  own = table.read_bytes()
  with np.load(table) as found:
    arrays = [found[name] for name in found.files]
  np.savez(table, arrays[0], arrays[1] + 1, *arrays[2:])
  with pytest.raises(ValueError, match='is not the table of this run'):
    Trainer(config, str(killed)).run()
  table.unlink()
  with pytest.raises(ValueError, match=r'cannot be read .* begin anew'):
    Trainer(config, str(killed)).run()
  table.write_bytes(own)
  close(Trainer(config, str(killed)).run(), whole, atol=0)
  logs = [folder / 'metrics.jsonl' for folder in (killed, tmp_path / 'whole')]
  assert logs[0].read_bytes() == logs[1].read_bytes()
