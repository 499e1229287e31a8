"""Weights and long prompts (`weights`), alternatives in braces (`alternatives`), `embeddings`: see README.md here."""
