"""What the bundled model is asked in training."""

from vlmlora.demo.text_image import PROMPT

SYSTEM_PROMPT = "You are a helpful assistant."
PROMPTS = (
    PROMPT,
    "What does the image say?",
    "What is written here?",
    "Transcribe the text in the image.",
)
"""The user's questions; the first one is asked most often."""
