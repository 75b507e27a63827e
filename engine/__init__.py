"""One model, one loop: requests in, token events out. Knows no HTTP and no registry."""
