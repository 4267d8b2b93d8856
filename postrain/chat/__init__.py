"""Conversations to tokens: a template's text, and what of it is learnt.

A chat template is a program that came with a download. It runs in a sandbox,
its errors and its excesses are errors of the conversation, and nothing that
a message, a tool or a role says is read as a special token.
"""

from postrain.chat.encoding import (
  Conversation,
  encode_chat,
  encode_conversation,
)

__all__ = ['Conversation', 'encode_chat', 'encode_conversation']
