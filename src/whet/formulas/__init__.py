"""Formulas: tensors in, one number per token, pair or step out. No model, no config, no reduction, no state.

Legend used in every file: T trained tokens, V vocabulary, G rollouts of one prompt, N rows of an optimizer step.
"""
