"""LoRA adapters in PEFT's folder format: read, written, and stacked layer by layer."""
