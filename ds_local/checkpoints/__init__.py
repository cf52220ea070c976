"""What a run leaves behind: checkpoint folders, metrics, Hugging Face folders. No DeepSpeed."""
