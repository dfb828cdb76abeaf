"""Talking to a model: conversations as token ids, sessions, batches, and what of an answer is thought."""

from helpers.chat.session import ChatSession, batch, sampling
from helpers.chat.templates import ROLES, ChatError, fold_system, render, text_of

__all__ = ["ROLES", "ChatError", "ChatSession", "batch", "fold_system", "render", "sampling", "text_of"]
