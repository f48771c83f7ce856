"""The Hugging Face Hub: repositories, hashes, failures, quantizations."""
