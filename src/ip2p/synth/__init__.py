"""Generates training data: text edits by a language model, image pairs by Prompt-to-Prompt, filtering."""
