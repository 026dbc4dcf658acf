"""How models learn: arguments, ShrpTrainer, distillation, and the recipe that every method shares."""
