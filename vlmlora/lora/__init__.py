"""LoRA adapters: which modules get one, how it starts, what it computes, and PEFT's files."""
