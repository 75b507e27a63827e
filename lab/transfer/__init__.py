"""What prompts are worth on models that they were not learned through: measured, written down, and ranked."""
