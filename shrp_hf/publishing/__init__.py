"""What is said about a model: the record of what ran, its card, reports and pictures."""
