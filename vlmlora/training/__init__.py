"""Functional training: a loss over (adapters, frozen, batch), and one jitted optax step."""
