"""Model families, their registry, the module table, and loading."""
