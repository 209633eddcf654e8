"""Other libraries' files: Hugging Face's models, PEFT's adapters, and tokenizers that are not ours."""
