"""How the schema came to be, one step a file. Run by `prompts_store.database`."""
