"""The lab, offline: compress a model, learn prompts through it, measure what was recovered."""
