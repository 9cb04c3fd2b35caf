"""What every method stands on; imports torch and safetensors only, and nothing else of this package."""
