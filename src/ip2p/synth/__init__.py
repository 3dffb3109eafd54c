"""From captions to training data: edits written by a language model, pairs by Prompt-to-Prompt, a filter."""
