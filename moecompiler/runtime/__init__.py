"""What runs when an engine runs: communicators, sessions, sampling, generation."""
