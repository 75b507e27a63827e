"""The routes, one noun a module: bodies in, answers out. Each has a `router`."""
