"""One Hugging Face model, its text and its files."""
