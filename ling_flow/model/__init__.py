"""The Ling 2.0 model: configuration, presets, modules, Hugging Face files, cost."""
