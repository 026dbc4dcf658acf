"""What stays of a model, and how much may: keep plans, budgets, and the best that a budget buys."""
