"""The screen of a run, and the clock of its steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import time
from typing import Any


class Console:
  """Show a run: a progress bar on a terminal, plain lines anywhere else.

  Of a long run about a hundred plain lines, and those with an evaluation.

  Close it even when the run fails (``contextlib.closing``), or the terminal
  stays without a cursor.

  Args:
    num_steps: length of the run.
    headline: names of the figures to show, where a step has them, in order.
    table_every: steps from one table of samples to the next; 0 shows none.
    num_rows: rows of a table.
  """

  def __init__(
    self,
    num_steps: int,
    *,
    headline: Sequence[str],
    table_every: int = 0,
    num_rows: int = 4,
  ):
    import rich.console
    import rich.live
    import rich.progress

    self.num_steps = num_steps
    self.headline = headline
    self.table_every = table_every
    self.num_rows = num_rows
    self._console = rich.console.Console()
    self._live = None
    if self._console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task('', total=num_steps)
      self._live = rich.live.Live(console=self._console, auto_refresh=False)
      self._live.start()

  def write(self, step: int, figures: Mapping[str, Any]) -> None:
    """Show the headline of a step, with the times of `StepTimer` if given."""
    line = summary(step, self.num_steps, figures, self.headline)
    if self._live is None:
      turn = step % max(1, self.num_steps // 100) == 0
      if turn or any(name.startswith('eval/') for name in figures):
        print(line, flush=True)
      return
    import rich.console
    import rich.text

    self._bar.update(self._task, completed=min(step + 1, self.num_steps))
    self._live.update(
      rich.console.Group(self._bar, rich.text.Text(line)), refresh=True
    )

  def table(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Print samples if it is their turn.

    Args:
      step: number of the step.
      rows: with ``prompt``, ``completion`` (text), ``reward``, ``advantage``.
    """
    if not self.table_every or step % self.table_every:
      return
    import rich.box
    import rich.table
    import rich.text

    table = rich.table.Table(title=f'step {step}', box=rich.box.SIMPLE_HEAD)
    for name in ('prompt', 'completion'):
      table.add_column(name, overflow='fold')
    for name in ('reward', 'advantage'):
      table.add_column(name, justify='right', no_wrap=True)
    for row, _ in zip(rows, range(self.num_rows), strict=False):
      # Text, for a prompt may look like markup.
      texts = (
        rich.text.Text(excerpt(row[k])) for k in ('prompt', 'completion')
      )
      table.add_row(
        *texts, *(f'{float(row[k]):.3g}' for k in ('reward', 'advantage'))
      )
    self._console.print(table)

  def close(self) -> None:
    """Leave the last state of the bar on the screen."""
    if self._live is not None:
      self._live.stop()


class StepTimer:
  """Measure the parts of a step in seconds.

  Work of JAX is asynchronous: a span that should hold it must end after the
  result was waited for.

      with timer.span('sample'):
        samples = jax.block_until_ready(sample(...))
      timings = timer.finish(num_tokens=...)
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._start = clock()
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def span(self, name: str) -> Iterator[None]:
    """Add the time spent inside to the part ``name`` of this step."""
    start = self._clock()
    try:
      yield
    finally:
      self.add(name, start)

  def add(self, name: str, start: float | None = None) -> float:
    """Add the time since ``start`` to a part; the time now.

    For what was dispatched and is waited for later.
    """
    now = self._clock()
    if start is not None:
      self._seconds[name] = self._seconds.get(name, 0.0) + now - start
    return now

  def finish(self, num_tokens: int | None = None) -> dict[str, float]:
    """End the step: ``seconds/<part>``, ``seconds/total``, tokens_per_second.

    The total runs from the end of the step before: what it has more than the
    sum of the parts was spent outside of them.
    """
    now = self._clock()
    total = now - self._start
    figures = {f'seconds/{k}': v for k, v in self._seconds.items()}
    figures['seconds/total'] = total
    if num_tokens is not None and total > 0:
      figures['tokens_per_second'] = num_tokens / total
    self._start, self._seconds = now, {}
    return figures


def summary(
  step: int,
  num_steps: int,
  figures: Mapping[str, Any],
  headline: Sequence[str],
) -> str:
  """One line: step, headline figures, seconds by part, tokens per second."""
  width = len(str(num_steps))
  fields = [f'step {step:{width}d}/{num_steps}']
  fields += [f'{k} {float(figures[k]):.4g}' for k in headline if k in figures]
  line = '  '.join(fields)
  seconds = {
    k.removeprefix('seconds/'): v
    for k, v in figures.items()
    if k.startswith('seconds/')
  }
  total = seconds.pop('total', sum(seconds.values()))
  if total:
    parts = ', '.join(f'{k} {v:.2f}' for k, v in seconds.items())
    line += f'  |  {total:.2f} s ({parts})' if parts else f'  |  {total:.2f} s'
  if 'tokens_per_second' in figures:
    line += f'  {figures["tokens_per_second"]:,.0f} tokens/s'
  return line


def excerpt(text: str, *, num_characters: int = 200) -> str:
  """The ends of a text in printable characters, others escaped.

  A model may write control sequences, and a terminal would obey them.
  """
  text = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
  if len(text) <= num_characters:
    return text
  half = (num_characters - 3) // 2
  return f'{text[:half]} … {text[-half:]}'
