"""The promptstitch command: a thin layer over the packages below."""
