"""Chat templates of model families, written after their documented formats."""

import functools
from typing import Any, NamedTuple

from postrain import tokenizers

CHATML = """
{%- set first = messages[0] %}
{%- if tools or first.role == 'system' or default_system %}
{{- '<|im_start|>system\n' }}
{{- first.content if first.role == 'system' else 'You are an assistant.' }}
{%- if tools %}
{{- '\n\n# Tools\n<tools>' }}
{%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}OPEN
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{%- if m.content or not loop.first %}{{- '\n' }}{% endif %}
{{- '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}CLOSE
{{- '\n' }}
{%- elif m.role != 'system' or loop.first %}
{%- if m.role != 'system' %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- else %}{{- raise_exception('the system speaks first') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}PROMPT{% endif %}
"""
QWEN3_TURN = """
{%- set said = m.content or '' %}
{%- set thought = m.reasoning_content or '' %}
{%- if not thought and '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1] %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{%- endif %}
{{- said }}
"""
NO_THINKING = """
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}"""
LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{%- if tools and loop.index0 == 0 %}{{- tools | tojson + '\n\n' }}{% endif %}
{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}' }}
{%- else %}{{- m.content | trim }}{% endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """
{{- bos_token }}
{%- set ns = namespace(system='', turn=0, users=0) %}
{%- for m in messages if m.role == 'user' %}
{%- set ns.users = ns.users + 1 %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] ' + m.content | tojson + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' + m.tool_calls[0].function | tojson + ']' + eos_token }}
{%- else %}
{%- if (m.role == 'user') != (ns.turn % 2 == 0) %}
{{- raise_exception('user and assistant take turns') }}
{%- endif %}
{%- set ns.turn = ns.turn + 1 %}
{%- if m.role == 'user' %}
{%- if tools and ns.turn == 2 * ns.users - 1 %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + ns.system + m.content + '[/INST]' }}
{%- set ns.system = '' %}
{%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endif %}
{%- endfor %}
"""
GEMMA = """
{{- bos_token }}
{%- set folded = '' %}
{%- if messages[0].role == 'system' %}
{%- set folded = messages[0].content + '\n\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and model take turns') }}
{%- endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + (folded if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}
"""
PHI3 = """
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}
{%- else %}{{- eos_token }}{% endif %}
"""
DEEPSEEK = """
{{- bos_token }}
{%- if tools %}{{- 'Tools: ' + tools | tojson + '\n\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}
{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.tool_calls %}
{{- '<｜Assistant｜><｜tool▁call▁begin｜>' + m.tool_calls[0].function.name }}
{{- '\n' + m.tool_calls[0].function.arguments | tojson }}
{{- '<｜tool▁call▁end｜><｜end▁of▁sentence｜>' }}
{%- else %}
{%- if loop.previtem.role != 'tool' %}{{- '<｜Assistant｜>' }}{% endif %}
{{- m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- if loop.last and add_generation_prompt and m.role != 'tool' %}
{{- '<｜Assistant｜><think>\n' }}
{%- endif %}
{%- endfor %}
"""
OLMO2 = """
{{- bos_token }}
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content }}
{%- if m.role == 'assistant' %}{{- eos_token }}{% endif %}
{%- if m.role != 'assistant' or not loop.last %}{{- '\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% endif %}
"""
LLAMA2 = """
{%- set folded = '' %}
{%- if messages[0].role == 'system' %}
{%- set folded = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- bos_token + '[INST] ' + (folded if loop.first else '') }}
{{- m.content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}
"""


def chatml(turn: str = '', close: str = '', prompt: str = '') -> str:
  text = CHATML.replace('OPEN', turn if close else '')
  if turn and not close:
    text = text.replace("{{- m.content or '' }}", turn.strip())
  return text.replace('CLOSE', close).replace('PROMPT', prompt).strip()


class Family(NamedTuple):
  """A template, its special tokens, those that only look so, its end."""

  template: str
  special: tuple[str, ...]
  end: str  # what the assistant writes after its text
  begin: str = ''  # and before it
  last: str = ''  # and before the last
  bos: str | None = None
  eos: str | None = None
  added: tuple[str, ...] = ()
  tools: bool = False


IM = ('<|im_start|>', '<|im_end|>', '<|endoftext|>')
TAGS = ('<tool_call>', '</tool_call>', '<think>', '</think>')
FAMILIES = {
  'qwen2.5': Family(
    "{%- set default_system = true %}" + chatml(), IM, '<|im_end|>',
    eos='<|im_end|>', added=TAGS[:2], tools=True,
  ),
  'qwen3': Family(
    chatml(QWEN3_TURN, prompt=NO_THINKING), IM, '<|im_end|>',
    last='<think>\n\n</think>\n\n', eos='<|im_end|>', added=TAGS, tools=True,
  ),
  'marked': Family(
    chatml('{% generation %}', '{% endgeneration %}'), IM, '<|im_end|>',
    eos='<|im_end|>', tools=True,
  ),
  'llama3': Family(
    LLAMA3.strip(),
    ('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>',
     '<|eot_id|>'),
    '<|eot_id|>', bos='<|begin_of_text|>', eos='<|eot_id|>', tools=True,
  ),
  'mistral': Family(
    MISTRAL.strip(),
    ('<s>', '</s>', '[INST]', '[/INST]', '[TOOL_CALLS]', '[AVAILABLE_TOOLS]',
     '[/AVAILABLE_TOOLS]', '[TOOL_RESULTS]', '[/TOOL_RESULTS]'),
    '</s>', ' ', bos='<s>', eos='</s>', tools=True,
  ),
  'gemma': Family(
    GEMMA.strip(), ('<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'),
    '<end_of_turn>', bos='<bos>', eos='<eos>',
  ),
  'phi3': Family(
    PHI3.strip(), ('<|end|>', '<|endoftext|>'), '<|end|>',
    eos='<|endoftext|>',
  ),
  'deepseek': Family(
    DEEPSEEK.strip(),
    ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>', '<｜User｜>',
     '<｜Assistant｜>', '<｜tool▁call▁begin｜>', '<｜tool▁call▁end｜>',
     '<｜tool▁output▁begin｜>', '<｜tool▁output▁end｜>'),
    '<｜end▁of▁sentence｜>', bos='<｜begin▁of▁sentence｜>',
    eos='<｜end▁of▁sentence｜>', added=TAGS[2:], tools=True,
  ),
  'olmo2': Family(
    OLMO2.strip(), ('<|endoftext|>',), '<|endoftext|>',
    bos='<|endoftext|>', eos='<|endoftext|>',
  ),
  'llama2': Family(
    LLAMA2.strip(), ('<s>', '</s>'), ' </s>', ' ', bos='<s>', eos='</s>',
  ),
}  # fmt: skip


@functools.cache
def tokenizer(name: str, kind: str) -> Any:
  """A tokenizer with the tokens of a family, of bytes or of merges."""
  family = FAMILIES[name]
  special = [t for t in family.special if t not in tokenizers.SPECIAL_TOKENS]
  if kind == 'bytes':
    made = tokenizers.byte_level(special_tokens=special)
  else:
    made = tokenizers.train_bpe(
      ['Add two and two.\n\nI think.\n', ' user\n assistant\n model\n'] * 9,
      vocab_size=340,
      special_tokens=special,
    )
  made.add_tokens(list(family.added))
  made.bos_token, made.eos_token = family.bos, family.eos
  made.chat_template = family.template
  return made
