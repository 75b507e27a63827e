"""Learning a soft prompt through the very weights that will be served, and the controls it is held against."""
