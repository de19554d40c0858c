"""What changed models take on the runtime, and the choice within a budget of that."""
