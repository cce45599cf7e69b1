"""Read, write and stack LoRA adapters in PEFT's folder format."""
