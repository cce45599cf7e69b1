"""What several test files share: weights of every format, and an independent second opinion."""
