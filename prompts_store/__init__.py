"""The registry of soft prompts: value, file, store, resolution. Knows no model."""
