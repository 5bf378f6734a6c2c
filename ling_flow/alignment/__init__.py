"""Decoupled fine-tuning, Evo-CoT rewards, rollouts and linguistic-unit policy optimisation."""
