"""What runs and the registry hold, as one page that says of every figure where it comes from."""
