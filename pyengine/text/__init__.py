"""Prompts: words, caption cleaning, T5."""
